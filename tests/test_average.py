"""The mean of checkpoints: its values, what it may be of, and that every command takes it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm import average, start, typed_json
from maxlm.checkpoint import Checkpoints, lineage, named_leaves
from maxlm.config import Experiment
from maxlm.lora import LoraConfig
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.restore import load_params
from maxlm.trained import not_frozen, take

ROOT = Path(__file__).parents[1]


def experiment(corpus: Path, **optim) -> Experiment:
  config = tiny.get_config()
  config.data.corpus = str(corpus)
  for name, value in optim.items():
    setattr(config.optim, name, value)
  return config


def weights(config: Experiment, seed: int) -> Decoder:
  return jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(seed))


def write_run(workdir: Path, corpus: Path, steps: dict[int, Decoder], config: Experiment | None = None, **kept) -> Path:
  """A workdir with these checkpoints. kept: step_N=other trees of that step."""
  config = config or experiment(corpus)
  workdir.mkdir()
  (workdir / 'tokenizer.json').write_bytes((corpus / 'tokenizer.json').read_bytes())
  checkpoints, of = Checkpoints(workdir / 'checkpoints', keep_last=9), lineage()
  for step, params in steps.items():
    meta = {'step': step, 'cursor': 8 * step, 'stage': 'train', 'tokens': 512 * step, 'bos': 1, 'eot': 0, 'lineage': of,
            'config': json.loads(typed_json.dumps(config)), 'model': typed_json.encode(config.model, DecoderConfig)}
    checkpoints.save(step, params=params, opt={'count': jnp.zeros(2)}, meta=meta, **kept.get(f'step_{step}', {}))
  checkpoints.close()
  return workdir


@pytest.fixture(autouse=True)
def one_device(mesh_of):
  with mesh_of(1):
    yield


@pytest.fixture
def run(tmp_path, corpus) -> Path:
  """Three checkpoints, of which the last two are equal."""
  config = experiment(corpus)
  return write_run(tmp_path / 'run', corpus, {step: weights(config, seed) for step, seed in ((10, 0), (20, 1), (30, 1))})


def mean_of(*words, out: Path, last: int = 1, weights=(), ema: bool = False) -> dict[str, np.ndarray]:
  members = average.find_members([str(word) for word in words], last, list(weights))
  average.write(members, out, ema)
  return loaded(out)


def loaded(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
  checkpoints = Checkpoints(workdir / 'checkpoints')
  params = load_params(checkpoints, checkpoints.latest() if step is None else step)
  return {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def test_mean_of_equal_checkpoints_is_these_bit_for_bit(run, tmp_path, corpus):
  params = weights(experiment(corpus), 1)
  same = jax.tree.map(lambda w: jnp.where(w > 0, w, -0.0), params)  # -0 too
  other = write_run(tmp_path / 'other', corpus, {5: same, 7: same, 9: same})
  for words, more in (([f'{run}@20', f'{run}@30'], {}), ([other], {'last': 3}),
                      ([other], {'last': 3, 'weights': ['1', '3', '0.1']})):
    out = tmp_path / f'out-{len(list(tmp_path.iterdir()))}'
    mean, source = mean_of(*words, out=out, **more), loaded(Path(str(words[0]).split('@')[0]))
    assert all(mean[name].tobytes() == source[name].tobytes() for name in source)
  digests = [Checkpoints(where / 'checkpoints').digests(9)['params'] for where in (out, other)]
  assert digests[0] == digests[1]


def test_mean_is_the_weighted_sum(run, tmp_path):
  a, b = loaded(run, 10), loaded(run, 20)
  uniform = mean_of(f'{run}@10', f'{run}@20', out=tmp_path / 'uniform')
  weighted = mean_of(f'{run}@10', f'{run}@20', f'{run}@30', out=tmp_path / 'weighted', weights=['2', '1', '5'])
  for name in a:
    x, y = a[name].astype(np.float64), b[name].astype(np.float64)
    atol = 4 * 2.0**-24 * max(np.abs(x).max(), np.abs(y).max())  # a rounding for each of the three operations of a member
    np.testing.assert_allclose(uniform[name], (x + y) / 2, rtol=0, atol=atol, err_msg=name)
    np.testing.assert_allclose(weighted[name], (2 * x + 6 * y) / 8, rtol=0, atol=2 * atol, err_msg=name)
  assert any((uniform[name] != a[name]).any() for name in a)


def test_mean_is_the_same_over_any_mesh(run, tmp_path, mesh_of):
  mean_of(f'{run}@10', f'{run}@30', out=tmp_path / 'eight')  # over all fake devices, as the command does
  with mesh_of(1):
    members = average.find_members([f'{run}@10', f'{run}@30'], 1, [])
    alone = average.mean(members, ema=False)
  eight = loaded(tmp_path / 'eight')
  assert all(np.array_equal(eight[name], leaf) for name, leaf in named_leaves(alone).items())


def test_mean_says_where_it_comes_from(run, tmp_path, corpus):
  other = write_run(tmp_path / 'other', corpus, {12: weights(experiment(corpus), 3)})
  mean_of(f'{run}@20', other, out=tmp_path / 'out', weights=['3', '1'])
  checkpoints = Checkpoints(tmp_path / 'out' / 'checkpoints')
  assert checkpoints.steps() == [20]  # of the newest
  meta, newest = checkpoints.meta(20), Checkpoints(run / 'checkpoints').meta(20)
  assert {key: value for key, value in meta.items() if key != 'lineage'} == {
    key: value for key, value in newest.items() if key != 'lineage'}
  parents = meta['lineage']['parents']
  assert [(p['step'], p['weight'], p['ema']) for p in parents] == [(20, 0.75, False), (12, 0.25, False)]
  assert parents[0]['run'] == newest['lineage']['run'] == meta['lineage']['parent']['run'] != meta['lineage']['run']
  assert parents[1]['run'] == Checkpoints(other / 'checkpoints').meta(12)['lineage']['run']
  assert [(tmp_path / 'out' / p['from_here']).resolve() for p in parents] == [run, other]
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == newest['config']
  like = weights(experiment(corpus), 0)
  with pytest.raises(ValueError, match='has params, and no opt: .*init_from'):  # it has no state to go on with
    checkpoints.restore(20, like, {'count': jnp.zeros(2)})


def test_running_mean_takes_the_place_of_what_it_is_the_mean_of(tmp_path, corpus):
  config = experiment(corpus, freeze=('embed_VD',), ema=0.9)
  params, later = weights(config, 0), weights(config, 1)
  kept = take(later, not_frozen(config.optim, config.model, later))
  assert 'embed_VD' not in kept and 'final_norm.scale_D' in kept
  workdir = write_run(tmp_path / 'run', corpus, {4: params}, config, step_4={'ema': kept})
  mean = mean_of(workdir, out=tmp_path / 'out', ema=True)
  a, b = ({name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()} for tree in (params, later))
  assert all(np.array_equal(mean[name], a[name] if name == 'embed_VD' else b[name]) for name in a)
  config = experiment(corpus, ema=0.9)
  whole = write_run(tmp_path / 'whole', corpus, {4: params}, config, step_4={'ema': named_leaves(later)})
  assert all(np.array_equal(leaf, b[name]) for name, leaf in mean_of(whole, out=tmp_path / 'out2', ema=True).items())


def refused(*words, out: Path, **more) -> str:
  with pytest.raises((ValueError, OSError)) as error:
    mean_of(*words, out=out, **more)
  assert not (out / 'checkpoints').exists()
  return str(error.value)


def test_what_does_not_belong_together_is_refused_by_name(run, tmp_path, corpus):
  out, config = tmp_path / 'out', experiment(corpus)
  config.model.pattern[0].mixer.rope.theta *= 2
  longer = write_run(tmp_path / 'longer', corpus, {40: weights(config, 0)}, config)
  assert 'longer@40 is another model' in (said := refused(run, longer, out=out)) and 'rope.theta' in said
  spoken = write_run(tmp_path / 'spoken', corpus, {40: weights(experiment(corpus), 0)})
  (spoken / 'tokenizer.json').write_text('{}')
  assert 'another tokenizer.json' in refused(run, spoken, out=out)
  config = experiment(corpus)
  config.lora = LoraConfig()
  adapters = write_run(tmp_path / 'adapters', corpus, {40: weights(config, 0)}, config)
  assert 'holds adapters' in refused(adapters, run, out=out)
  assert 'alone has no mean' in refused(run, out=out)
  assert 'named twice' in refused(run, f'{run}@30', out=out)
  assert 'optim.ema' in refused(run, out=out, ema=True)
  assert 'no checkpoint of step 15' in refused(f'{run}@15', out=out)
  assert 'fewer than --last=4' in refused(run, out=out, last=4)
  for bad in (['1'], ['1', 'x'], ['1', '0'], ['1', 'nan'], ['1', 'inf']):
    assert '--weights' in refused(f'{run}@10', f'{run}@20', out=out, weights=bad)
  with pytest.raises(FileExistsError, match='give a new --out'):
    mean_of(f'{run}@10', f'{run}@20', out=run)


def command(module: str, *arguments: str, code: int = 0) -> str:
  done = subprocess.run([sys.executable, '-m', f'maxlm.{module}', *arguments], cwd=ROOT, capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stderr


def test_mean_is_evaluated_and_trained_from(run, tmp_path, corpus):
  out = tmp_path / 'out'
  said = command('average', str(run), '--last=2', f'--out={out}')
  assert said.count('0.5 x') == 2 and f'{out}: their mean, as step 30' in said
  scores, same = (json.loads(command('evaluate', f'--checkpoint={where}', '--rows=2', '--json')) for where in (out, run))
  assert scores == same and scores['step'] == 30  # of two equal ones
  parent = start.find_parent(str(out), tmp_path / 'new')
  assert parent.step == 30 and parent.meta['lineage']['parents'][0]['step'] == 20
  trained = command('train', f'--config={ROOT}/configs/tiny.py', f'--config.data.corpus={corpus}', '--config.tokens=2048',
                    f'--workdir={tmp_path}/new', f'--config.init_from={out}', '--config.evals.rows=2')
  assert 'Finished' in trained
