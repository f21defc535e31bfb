"""Damage: it is told, set aside, and never kept in the place of what is known to be good. Flips by the thousand: chaos/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import checkpoint, digest, start, storage
from maxlm.checkpoint import Checkpoints, Damaged
from maxlm.spikes import Skips
from tests.jobs import free_port

ROOT = Path(__file__).parents[1]


def bits(tree) -> dict[str, bytes]:
  return {name: np.asarray(leaf).tobytes() for name, leaf in digest.named_leaves(tree).items()}


def damage(checkpoints: Checkpoints, step: int, what: str = 'params/ocdbt.process_0/d/*') -> None:
  """Flips one bit in the middle of each of these files."""
  for path in (Path(checkpoints.directory) / str(step)).glob(what):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def big(seed: int = 0):
  """Arrays that are too large for Orbax to put them into its index, which has checksums."""
  return {'w': jax.random.normal(jax.random.key(seed), (64, 128)), 'v': jnp.ones((64, 128), jnp.bfloat16)}


def saved_big(directory, steps, **kwargs) -> Checkpoints:
  checkpoints = Checkpoints(directory, **kwargs)
  for step in steps:
    checkpoints.save(step, params=big(step), opt={'m': big(-step)}, recent={'loss': jnp.ones(8)}, meta={'cursor': step})
  checkpoints.close()
  return checkpoints


def restored(checkpoints: Checkpoints, step: int):
  return checkpoints.restore(step, big(), {'m': big()}, recent={'loss': jnp.ones(8)})


def test_what_else_is_saved_comes_back_in_order(tmp_path):
  params, opt, recent = restored(saved_big(tmp_path, [3]), 3)
  assert [bits(params), bits(opt), bits(recent)] == [bits(big(3)), bits({'m': big(-3)}), bits({'loss': jnp.ones(8)})]


def test_a_wrong_weight_is_damage_that_names_step_leaf_and_what_else_there_is(tmp_path):
  checkpoints = saved_big(tmp_path, [1, 2])
  damage(checkpoints, 2)
  message = r'/2 is damaged \(there are also 1\): params\.[wv] is not what was saved \(digest \w{16}, it was \w{16}\)'
  with pytest.raises(Damaged, match=f'^checkpoint {tmp_path}{message}$'):
    restored(checkpoints, 2)
  with pytest.raises(Damaged, match='2 is damaged'):
    checkpoints.restore_params(2, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), big()))  # nor when cast


def test_orbax_itself_takes_a_wrong_weight_for_a_weight(tmp_path):
  """Why there are digests. If this fails one day, Orbax has got its own."""
  checkpoints = saved_big(tmp_path, [1])
  damage(checkpoints, 1)
  assert bits(storage.orbax().load_checkpointables(tmp_path / '1', {'params': None})['params']) != bits(big(1))


@pytest.mark.parametrize('item', ['meta', 'digest'])
def test_another_number_in_the_json_is_damage(tmp_path, item):
  checkpoints = saved_big(tmp_path, [1])
  path = tmp_path / '1' / item / 'data.json'
  path.write_text(path.read_text().replace('1', '2', 1))
  with pytest.raises(Damaged, match=f'there is no other.: {item} is not what was saved'):
    checkpoints.meta(1)


def test_a_checkpoint_without_digests_is_damage(tmp_path):
  checkpoints = saved_big(tmp_path, [1])
  (tmp_path / '1' / 'digest' / 'data.json').unlink()
  with pytest.raises(Damaged, match='digest cannot be read: .*No such file'):
    checkpoints.restore_params(1, big())


def test_a_damaged_step_is_not_taken_for_one_that_a_rewind_undid(tmp_path):
  """It would be removed without a word, and where it is the only one the run would begin anew."""
  skips = Skips().rewound(at=3, to=1, jump_steps=0)
  checkpoints = Checkpoints(tmp_path, keep_last=10)
  for step, known in ((1, Skips()), (2, Skips()), (3, skips), (4, skips)):
    checkpoints.save(step, params=big(step), meta={'skips': known.to_json()})
  checkpoints.close()
  meta = tmp_path / '4' / 'meta' / 'data.json'
  meta.write_text(meta.read_text().replace('3', '4', 1))
  start.undo(checkpoints, skips)
  assert checkpoints.steps() == [1, 3, 4]


def test_what_may_not_be_read_is_not_taken_for_damage(tmp_path):
  checkpoints = saved_big(tmp_path / 'run', [1])
  victim, = (tmp_path / 'run' / '1' / 'params' / 'd').iterdir()
  for folder in (tmp_path, *tmp_path.parents):
    if folder.stat().st_mode & 0o777 == 0o700:  # pytest's own: nobody else may look into them
      folder.chmod(0o755)
  victim.chmod(0)
  user = os.geteuid()
  try:
    if user == 0:  # whom no permission binds
      os.seteuid(65534)
    with pytest.raises(OSError, match='run/1 cannot be reached: PERMISSION_DENIED'):
      checkpoints.restore_params(1, big())
  finally:
    os.seteuid(user)


def test_a_step_that_is_set_aside_is_out_of_the_way(tmp_path):
  checkpoints = saved_big(tmp_path, [1, 2])
  assert checkpoints.set_aside(2, 'a test says so').name == 'damaged-2'
  assert checkpoints.steps() == [1]
  assert (tmp_path / 'damaged-2' / 'REASON').read_text() == 'a test says so\n'
  checkpoints.save(2, params=big(7), meta={})
  checkpoints.close()
  assert bits(checkpoints.restore_params(2, big())) == bits(big(7))
  assert checkpoints.set_aside(2, 'again').name == 'damaged-2-2'
  with pytest.raises(ValueError, match='1 is the only one, and it is not set aside'):
    checkpoints.set_aside(1, 'the last one')
  with pytest.raises(FileNotFoundError, match='no checkpoint of step 2'):
    checkpoints.set_aside(2, 'it is gone')
  assert checkpoints.steps() == [1]


def test_the_newest_verified_step_is_kept_until_a_newer_one_is_verified(tmp_path):
  checkpoints = saved_big(tmp_path, [1, 2, 3], keep_last=2)
  assert checkpoints.steps() == [2, 3] and checkpoints.newest_verified() is None
  restored(checkpoints, 2)
  assert saved_big(tmp_path, [4, 5, 6], keep_last=2).steps() == [2, 5, 6]  # as another process would
  checkpoints.restore_params(5, big())  # of which only a part was read
  assert checkpoints.newest_verified() == 2
  checkpoints.verify(5)
  assert saved_big(tmp_path, [7, 8], keep_last=2).steps() == [5, 7, 8]


def test_a_step_that_was_saved_again_is_not_verified(tmp_path):
  checkpoints = saved_big(tmp_path, [1, 2])
  checkpoints.verify(1)
  checkpoints.verify(2)
  checkpoints.set_aside(2, 'a test says so')
  assert checkpoints.newest_verified() == 1
  checkpoints.save(2, params=big(9), meta={})
  checkpoints.close()
  assert checkpoints.newest_verified() == 1
  checkpoints.verify(2)
  (tmp_path / checkpoint.VERIFIED).write_text('no json')
  assert checkpoints.newest_verified() is None


def test_verify_reads_a_part_at_a_time_and_all_of_it(tmp_path, monkeypatch):
  checkpoints = saved_big(tmp_path, [1])
  for limit in (1, 40_000, 1 << 30):
    monkeypatch.setattr(checkpoint, 'VERIFY_BYTES', limit)
    assert checkpoints.verify(1) == (5, 2 * (4 + 2) * 64 * 128 + 4 * 8)


def verify(*arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, '-m', 'maxlm.checkpoint', 'verify', *map(str, arguments)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_verifies_every_step(tmp_path):
  checkpoints = saved_big(tmp_path / 'checkpoints', [1, 2])
  good = verify(tmp_path)
  assert good.returncode == 0 and good.stdout.splitlines() == [
    f'{tmp_path}/checkpoints/{step}: 5 arrays, 98,336 bytes: all as saved' for step in (1, 2)]
  assert checkpoints.newest_verified() == 2
  damage(checkpoints, 2, 'opt/ocdbt.process_0/d/*')
  bad = verify(tmp_path, '--json')
  assert bad.returncode == 1
  one, two = json.loads(bad.stdout)
  assert one == {'step': 1, 'damage': None, 'arrays': 5, 'bytes': 98_336}
  assert two['step'] == 2 and 'opt.m.' in two['damage']
  assert verify(f'{tmp_path}@1').returncode == 0
  nothing = verify(tmp_path / 'nothing')
  assert nothing.returncode == 2 and nothing.stderr.startswith('error: no checkpoint in ')


def test_digests_are_public_and_say_whether_two_steps_are_equal(tmp_path):
  checkpoints = saved_big(tmp_path, [1, 2])
  assert checkpoints.digests(1).keys() == {'params', 'opt', 'recent'} and len(checkpoints.digests(1)['params']['w']) == 16
  same = {item: checkpoints.digests(1)[item] == checkpoints.digests(2)[item] for item in ('params', 'recent')}
  assert same == {'params': False, 'recent': True}


ON_TWO_PROCESSES = '''
import json, sys
from pathlib import Path
import jax
from maxlm import hosts
hosts.connect(f'127.0.0.1:{sys.argv[2]}', 2, int(sys.argv[1]))
import numpy as np
from maxlm import digest
from maxlm.checkpoint import Checkpoints, Damaged
from maxlm.sharding import MeshConfig, make_mesh, spec

directory, said = Path(sys.argv[3]), {}
x = np.arange(4 * 4096, dtype=np.float32).reshape(4, 4096)
with jax.set_mesh(make_mesh(MeshConfig(data=2))):
  put = lambda spec: jax.make_array_from_callback(x.shape, jax.NamedSharding(jax.sharding.get_mesh(), spec), lambda i: x[i])
  tree = {'split': put(spec('BX')), 'whole': put(jax.P())}
  said['digests'] = digest.of_tree(tree)
  wrong = np.array(x)
  wrong[1, 1] += 1
  copies = [jax.device_put(wrong if device.id == 1 else x, device) for device in jax.local_devices()]
  said['replicas'] = digest.replicas({'split': tree['split'], 'whole': jax.make_array_from_single_device_arrays(
    x.shape, tree['whole'].sharding, copies)})
  checkpoints = Checkpoints(directory)
  for step in (1, 2, 3):
    checkpoints.save(step, params=tree, meta={'step': step})
  checkpoints.close()
  if hosts.is_first():  # of what the other process wrote, and will read
    for path in (directory / '3' / 'params' / 'ocdbt.process_1' / 'd').iterdir():
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
    for path in (directory / '2' / 'params' / 'ocdbt.process_1' / 'd').iterdir():
      path.unlink()
  hosts.barrier('damaged')
  for step in (3, 2):
    try:
      checkpoints.restore(step, tree, None)
    except Damaged as error:
      said[f'damaged {step}'] = f'{directory}/{step} is damaged' in str(error)
    checkpoints.set_aside(step, 'a test says so')
  try:
    checkpoints.set_aside(1, 'a test says so')
  except ValueError as error:
    said['refused'] = 'is the only one' in str(error)
  params, _ = checkpoints.restore(1, tree, None)
  parts = [part for leaf in params.values() for part in leaf.addressable_shards]
  said['equal'] = all(np.array_equal(part.data, x[part.index]) for part in parts)
  checkpoints.save(3, params=tree, meta={'step': 3})
  checkpoints.close()
  said['left'] = [checkpoints.steps(), checkpoints.newest_verified()]
hosts.shutdown()
print(json.dumps(said))
'''


def test_two_processes_agree_on_what_is_damaged_and_set_it_aside(tmp_path):
  """One of them reads what is damaged, both are told and go on together. Digests are those of one process."""
  port, environment = free_port(), os.environ | {'JAX_NUM_CPU_DEVICES': '2', 'PYTHONPATH': str(ROOT)}
  processes = [subprocess.Popen([sys.executable, '-c', ON_TWO_PROCESSES, str(i), str(port), str(tmp_path)], env=environment,
                                cwd=ROOT, stdout=subprocess.PIPE, text=True) for i in range(2)]
  try:
    printed = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0]
  one, other = (json.loads(text.splitlines()[-1]) for text in printed)
  alone = digest.of_tree({'x': np.arange(4 * 4096, dtype=np.float32).reshape(4, 4096)})['x']
  assert one == other == {'digests': {'split': alone, 'whole': alone}, 'replicas': [['whole', 1, 0]], 'damaged 3': True,
                          'damaged 2': True, 'refused': True, 'equal': True, 'left': [[1, 3], 1]}
