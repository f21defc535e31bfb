"""What was saved comes back bit for bit on any mesh, what was not committed never does, and no failure is silent."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from maxlm import checkpoint, storage
from maxlm.checkpoint import Checkpoints, Damaged
from maxlm.sharding import spec

ROOT = Path(__file__).parents[1]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


class Layer(nnx.Module):
  def __init__(self, key, d_ff):
    self.w_up_DF = nnx.Param(jax.random.normal(key, (16, d_ff), out_sharding=spec('DF')))
    self.scale_D = nnx.Param(jnp.ones((16,), jnp.bfloat16, out_sharding=spec('D')))


class Model(nnx.Module):
  def __init__(self, key, d_ff=32, n_layers=2):
    keys = jax.random.split(key, n_layers)
    self.layers = nnx.List([Layer(keys[i], d_ff) for i in range(n_layers)])


def init(seed=0, **shapes):
  params = Model(jax.random.key(seed), **shapes)
  return params, OPTIMIZER.init(params)


def bits(tree) -> dict[str, bytes]:
  return {name: np.asarray(leaf).tobytes() for name, leaf in checkpoint.named_leaves(tree).items()}


def saved(directory, steps=(1,), meta=None, **kwargs) -> Checkpoints:
  """Checkpoints where step s holds init(seed=s), on the current mesh."""
  checkpoints = Checkpoints(directory, **kwargs)
  for step in steps:
    params, opt = jax.jit(init, static_argnums=0)(step)
    checkpoints.save(step, params=params, opt=opt, meta=meta or {'cursor': 10 * step})
  checkpoints.close()
  return checkpoints


def test_names_are_plain_dotted_paths(mesh_of):
  with mesh_of(1):
    params, opt = init()
  assert list(checkpoint.named_leaves(params)) == [
    'layers.0.scale_D', 'layers.0.w_up_DF', 'layers.1.scale_D', 'layers.1.w_up_DF']
  assert list(checkpoint.named_leaves(opt))[:2] == ['1.0.count', '1.0.mu.layers.0.scale_D']


@pytest.mark.parametrize('saving, loading', [((8, {'tensor': 2}), (8, {'tensor': 4})), ((8, {}), (1, {})),
                                             ((1, {}), (4, {'data': 2, 'tensor': 2}))])
def test_restored_state_is_bit_exact_on_any_mesh(tmp_path, mesh_of, saving, loading):
  with mesh_of(saving[0], **saving[1]):
    saved(tmp_path, steps=[3])
    expected = [bits(tree) for tree in jax.jit(init, static_argnums=0)(3)]
  with mesh_of(loading[0], **loading[1]) as mesh:
    params_like, opt_like = jax.eval_shape(init)
    params, opt = Checkpoints(tmp_path).restore(3, params_like, opt_like)
    assert [bits(params), bits(opt)] == expected
    assert jax.tree.structure((params, opt)) == jax.tree.structure((params_like, opt_like))
    for array, like in zip(jax.tree.leaves((params, opt)), jax.tree.leaves((params_like, opt_like)), strict=True):
      assert array.sharding == jax.NamedSharding(mesh, like.sharding.spec if like.sharding else jax.P())


def test_a_checkpoint_does_not_depend_on_the_classes_that_held_it(tmp_path, mesh_of):
  with mesh_of(1):
    saved(tmp_path)
    params, _ = init(1)
    plain = {'layers': {str(i): {'w_up_DF': params.layers[i].w_up_DF[...], 'scale_D': params.layers[i].scale_D[...]}
                        for i in range(2)}}
    assert bits(Checkpoints(tmp_path).restore_params(1, plain)) == bits(params)


def test_floats_are_cast_to_the_dtype_that_is_wanted(tmp_path, mesh_of):
  with mesh_of(1):
    saved(tmp_path)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), jax.eval_shape(init)[0])
    restored = Checkpoints(tmp_path).restore_params(1, like)
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init(1)[0]))


def test_a_random_key_survives(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  state = {'key': jax.random.key(7), 'n': jnp.int32(-3)}
  checkpoints.save(1, params=state, opt={}, meta={})  # and an optimizer without state
  checkpoints.close()
  restored, empty = checkpoints.restore(1, state, {})
  assert empty == {} and int(restored['n']) == -3
  assert jax.random.key_data(restored['key']).tolist() == jax.random.key_data(state['key']).tolist()


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path, mesh_of):
  @jax.jit
  def start():
    return jnp.arange(1 << 20, dtype=jnp.float32)

  overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, keep_last=8)
  x = start()
  for step in range(8):
    checkpoints.save(step, params={'x': x}, opt={'x': x}, meta={})
    x = overwrite(x)
  checkpoints.close()
  for step in range(8):
    for item in checkpoints.restore(step, {'x': x}, {'x': x}):
      np.testing.assert_array_equal(item['x'], np.arange(1 << 20) + step)


def test_meta_is_json_that_a_person_can_read(tmp_path, mesh_of):
  meta = {'cursor': 12345, 'config': {'lr': 1e-3, 'window': None}, 'lineage': checkpoint.lineage()}
  with mesh_of(1):
    checkpoints = saved(tmp_path, meta=meta)
  assert checkpoints.meta(1) == meta
  assert json.loads((tmp_path / '1' / 'meta' / 'data.json').read_text()) == meta
  assert all(meta['lineage'][key] for key in ('run', 'code', 'jax', 'jaxlib')) and meta['lineage']['parent'] is None


def test_what_is_kept_is_the_last_few_and_each_kth(tmp_path, mesh_of):
  with mesh_of(1):
    assert saved(tmp_path / 'a', steps=range(1, 10), keep_last=2, keep_every=4).steps() == [4, 8, 9]
    assert saved(tmp_path / 'b', steps=range(1, 6), keep_last=2).steps() == [4, 5]


@pytest.mark.parametrize('kwargs', [{'keep_last': 0}, {'keep_every': 0}])
def test_keeping_nothing_is_refused(tmp_path, kwargs):
  with pytest.raises(ValueError, match='at least 1'):
    Checkpoints(tmp_path, **kwargs)


def test_a_step_without_its_marker_is_not_there(tmp_path, mesh_of):
  with mesh_of(1):
    saved(tmp_path, steps=[1, 2, 3])
    (tmp_path / '3' / checkpoint.COMMITTED).unlink()  # as a copy that broke off would leave it
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.latest() == 2
    with pytest.raises(FileNotFoundError, match='no checkpoint of step 3 .*it has 1, 2'):
      checkpoints.restore_params(3, init()[0])
    params, opt = init(4)
    checkpoints.save(4, params=params, opt=opt, meta={})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]  # it does not count among those to keep
    checkpoints.save(3, params=params, opt=opt, meta={})  # and it is replaced
    checkpoints.close()
    assert bits(checkpoints.restore_params(3, params)) == bits(params)


def test_a_directory_may_be_relative(tmp_path, mesh_of, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with mesh_of(1):
    saved('runs/a/checkpoints')
    checkpoints, step = checkpoint.find('runs/a')
    assert bits(checkpoints.restore_params(step, init()[0])) == bits(init(1)[0])


def test_the_code_version_is_the_commit():
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
  if not commit:
    pytest.skip('this is no clone')
  assert checkpoint.code_version().removesuffix('-dirty') == commit


def test_saving_a_committed_step_again_changes_nothing(tmp_path, mesh_of):
  with mesh_of(1):
    checkpoints = saved(tmp_path)
    checkpoints.save(1, params=init(5)[0], opt=init(5)[1], meta={})
    checkpoints.close()
    assert bits(checkpoints.restore_params(1, init()[0])) == bits(init(1)[0])


@pytest.mark.parametrize('shapes, message', [
  ({'d_ff': 64}, 'layers.0.w_up_DF is of shape (16, 32) there, of shape (16, 64) in this config'),
  ({'n_layers': 3}, 'layers.2.scale_D is absent there, of shape (16,) in this config'),
  ({'n_layers': 1}, 'layers.1.scale_D is of shape (16,) there, absent in this config'),
])
def test_another_architecture_is_refused_by_its_first_difference(tmp_path, mesh_of, shapes, message):
  with mesh_of(1):
    checkpoints = saved(tmp_path)
    with pytest.raises(ValueError) as error:
      checkpoints.restore_params(1, init(**shapes)[0])
  assert str(error.value) == f'checkpoint {tmp_path}/1 is of another architecture: {message}'


def test_another_optimizer_is_refused(tmp_path, mesh_of):
  with mesh_of(1):
    checkpoints = saved(tmp_path)
    params, _ = init()
    with pytest.raises(ValueError, match=r'0\.trace\.layers\.0\.scale_D is absent there'):
      checkpoints.restore(1, params, optax.sgd(1e-3, momentum=0.9).init(params))


@pytest.mark.parametrize('victim', ['params/_METADATA', 'params/manifest.ocdbt', 'params/d/*', 'params/ocdbt.process_0/d/*',
                                    'meta/data.json', 'digest/data.json'])
def test_a_damaged_checkpoint_is_told_in_one_line_with_what_else_there_is(tmp_path, mesh_of, victim):
  with mesh_of(1):
    checkpoints = saved(tmp_path, steps=[1, 2])
    for path in (tmp_path / '2').glob(victim):
      path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(Damaged, match='2 is damaged .there are also 1.: ') as error:
      checkpoints.restore_params(2, init()[0])
      checkpoints.meta(2)
    assert '\n' not in str(error.value)


def test_nothing_found_is_one_line_and_creates_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no checkpoint in .*run/checkpoints: give the workdir of a run'):
    checkpoint.find(str(tmp_path / 'run'))
  assert Checkpoints(tmp_path / 'run' / 'checkpoints').latest() is None
  assert list(tmp_path.iterdir()) == []


def test_find_takes_a_workdir_or_one_of_its_steps(tmp_path, mesh_of):
  with mesh_of(1):
    saved(tmp_path / 'checkpoints', steps=[5, 20])
  assert checkpoint.find(str(tmp_path))[1] == 20
  assert checkpoint.find(f'{tmp_path}@5')[1] == 5
  with pytest.raises(FileNotFoundError, match='no checkpoint of step 7 .*it has 5, 20'):
    checkpoint.find(f'{tmp_path}@7')


@pytest.mark.parametrize('text, parsed', [('runs/a', ('runs/a', None)), ('runs/a@100', ('runs/a', 100)),
                                          ('runs/me@home', ('runs/me@home', None)), ('a@b@3', ('a@b', 3))])
def test_parse(text, parsed):
  assert checkpoint.parse(text) == parsed


def surfaced(checkpoints: Checkpoints, seconds: float = 20) -> OSError:
  """The failure that polling brings up, as a training loop would poll."""
  until = time.monotonic() + seconds
  with pytest.raises(OSError) as error:
    while time.monotonic() < until:
      checkpoints.poll()
      time.sleep(0.01)
  return error.value


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 10 MB."""
  directory = tmp_path / 'disk'
  directory.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', directory], capture_output=True)
  if mounted.returncode:
    pytest.skip('mounting a file system takes root')
  yield directory
  subprocess.run(['umount', directory], check=True)


def test_a_full_disk_is_told_while_training_goes_on_and_loses_nothing(small_disk, caplog):
  params = {'w': jax.random.normal(jax.random.key(0), (1024, 1024))}  # 4 MB: fits, with its double, once
  checkpoints = Checkpoints(small_disk / 'checkpoints')
  checkpoints.save(1, params=params, opt={}, meta={})
  checkpoints.wait()
  checkpoints.save(2, params=params, opt=params, meta={})
  message = str(surfaced(checkpoints))
  assert message == (f'the checkpoint of step 2 was not written to {small_disk}/checkpoints: the disk is full: '
                     'free space, or keep fewer of them (--config.checkpoint.keep_last)')
  assert not [record for record in caplog.records if record.exc_info]
  checkpoints.close()  # told once
  assert Checkpoints(small_disk / 'checkpoints').steps() == [1]
  assert bits(checkpoints.restore_params(1, params)) == bits(params)
  (small_disk / 'checkpoints' / '2').mkdir(exist_ok=True)  # as by a thread that was still writing another array
  checkpoints.save(3, params=params, opt={}, meta={})
  checkpoints.close()
  assert not (small_disk / 'checkpoints' / '2').exists()
  assert checkpoints.steps() == [1, 3]


def test_a_save_that_failed_can_be_made_again(small_disk):
  params = {'w': jax.random.normal(jax.random.key(0), (1024, 1024))}
  (small_disk / 'other').write_bytes(bytes(8 << 20))
  checkpoints = Checkpoints(small_disk / 'checkpoints')
  for _ in range(3):  # as often as it fails
    checkpoints.save(1, params=params, meta={'cursor': 1})
    surfaced(checkpoints)
  (small_disk / 'other').unlink()
  checkpoints.save(1, params=params, meta={'cursor': 1})
  checkpoints.close()
  assert checkpoints.steps() == [1] and checkpoints.verify(1)[0] == 1


def test_the_next_save_tells_that_the_last_one_failed(small_disk):
  params = {'w': jax.random.normal(jax.random.key(0), (2048, 2048))}
  checkpoints = Checkpoints(small_disk / 'checkpoints')
  checkpoints.save(1, params=params, opt={}, meta={})
  with pytest.raises(OSError, match='the checkpoint of step 1 was not written'):
    checkpoints.save(2, params=params, opt={}, meta={})


def test_a_directory_that_may_not_be_written_is_an_error_that_names_it(tmp_path, mesh_of):
  with mesh_of(1):
    params, opt = init()
    saved(tmp_path)
  tmp_path.chmod(0o555)
  user = os.geteuid()
  try:
    if user == 0:  # whom no permission binds
      os.seteuid(65534)
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    with pytest.raises(OSError, match=f'not written to {tmp_path}/checkpoints: .*Permission denied'):
      checkpoints.save(2, params=params, opt=opt, meta={})
      checkpoints.wait()
  finally:
    os.seteuid(user)
    tmp_path.chmod(0o755)


SAVES_FOREVER = '''
import itertools, sys, jax, jax.numpy as jnp
from maxlm.checkpoint import Checkpoints, Damaged
checkpoints = Checkpoints(sys.argv[1])
for step in itertools.count((checkpoints.latest() or 0) + 1):
  state = {'w': jnp.full((256, 1024), float(step))}
  checkpoints.save(step, params=state, opt=state, meta={'cursor': step})
'''


def test_after_a_kill_the_newest_committed_step_is_whole(tmp_path):
  """Twice in a row: the second attempt begins among what the first left behind."""
  like = {'w': jnp.zeros((256, 1024))}
  for attempt in range(2):
    before = Checkpoints(tmp_path).latest() or 0
    process = subprocess.Popen([sys.executable, '-c', SAVES_FOREVER, tmp_path], cwd=ROOT)
    try:
      until = time.monotonic() + 60
      while (Checkpoints(tmp_path).latest() or 0) < before + 3 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.003)
      time.sleep(0.02 * attempt)
    finally:
      process.send_signal(signal.SIGKILL)
      process.wait()
    checkpoints = Checkpoints(tmp_path)
    step = checkpoints.latest()
    assert step >= before + 3
    for item in checkpoints.restore(step, like, like):
      assert np.unique(item['w']).tolist() == [step]
    assert checkpoints.meta(step) == {'cursor': step}


def test_orbax_is_imported_when_it_is_needed():
  """It costs a second of every start, and a command that stops at a typo should not pay it."""
  code = "import sys, maxlm.checkpoint; print('orbax' in sys.modules)"
  printed = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert printed.strip() == 'False'


def test_only_tracebacks_of_orbax_are_kept_out_of_the_log():
  storage.orbax()
  raised = (ValueError, ValueError(), None)
  for path, text, exc_info, kept in (
      ('orbax/a.py', '', raised, False), ('orbax/a.py', '', None, True), ('jax/a.py', '', raised, True),
      ('asyncio/a.py', 'exception was never retrieved: orbax/b.py', raised, False), ('asyncio/a.py', 'ours', raised, True)):
    for name in ('absl', 'asyncio'):
      record = logging.LogRecord(name, logging.ERROR, path, 1, text, (), exc_info)
      assert bool(logging.getLogger(name).filter(record)) == kept
