"""Adapters of the library PEFT: read, they give its logits (tests/golden/make_peft_goldens.py); they are its own again."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm import lora, peft, start, typed_json
from maxlm.checkpoint import Checkpoints, find, named_leaves
from maxlm.hf.convert import import_directory
from maxlm.hf.tensors import open_file
from maxlm.models.decoder import ComputeConfig
from maxlm.restore import load_params, lora_of, model_of
from maxlm.sharding import spec

GOLDEN = Path(__file__).parent / 'golden'
CASES = ('lora', 'dora', 'some_layers')


@pytest.fixture(scope='module')
def llama(tmp_path_factory, mesh_of) -> Path:
  """A workdir of the golden llama."""
  workdir = tmp_path_factory.mktemp('peft') / 'llama'
  with mesh_of(1):
    import_directory(GOLDEN / 'hf' / 'llama', workdir)
  return workdir


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
  monkeypatch.setattr(peft, 'FAMILY', type('Flag', (), {'value': ''}))


def logits(workdir: Path, tokens: np.ndarray) -> np.ndarray:
  checkpoints, step = find(str(workdir))
  model, params = model_of(checkpoints.meta(step)), load_params(checkpoints, step)
  compute = ComputeConfig(dtype='float32', kernel='reference').resolve('cpu')
  positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
  rows = [jax.device_put(array, spec('BT')) for array in (tokens, np.ones_like(tokens), np.array(positions))]
  run = jax.jit(lambda params, *rows: params.logits(model, params.hidden(model, compute, *rows)[0]))
  return np.asarray(run(params, *rows))


@pytest.mark.parametrize('case', CASES)
def test_their_adapters_give_their_logits_and_go_back_as_they_came(llama, tmp_path, mesh_of, case):
  golden = np.load(GOLDEN / 'peft' / case / 'golden.npz')
  with mesh_of(1):
    peft.import_adapters(str(GOLDEN / 'peft' / case), str(llama), tmp_path / 'run')
    got, base = logits(tmp_path / 'run', golden['tokens']), logits(llama, golden['tokens'])
    peft.merge(str(tmp_path / 'run'), tmp_path / 'merged')
    merged = logits(tmp_path / 'merged', golden['tokens'])
    peft.export_adapters(str(tmp_path / 'run'), tmp_path / 'again')
  scale = np.abs(golden['logits']).max()
  assert np.abs(base - golden['logits']).max() > 0.05 * scale
  np.testing.assert_allclose(got, golden['logits'], rtol=0, atol=5e-6 * scale)
  np.testing.assert_array_equal(merged, got)
  theirs, ours = (open_file(folder / peft.WEIGHTS) for folder in (GOLDEN / 'peft' / case, tmp_path / 'again'))
  assert ours.keys() == theirs.keys() or case == 'some_layers' and ours.keys() > theirs.keys()
  for name, tensor in ours.items():
    expected = theirs[name].array() if name in theirs else np.zeros(tensor.shape)
    np.testing.assert_array_equal(tensor.array(), expected, err_msg=name)
  plain, said = (json.loads((folder / peft.CONFIG).read_text()) for folder in (GOLDEN / 'peft' / case, tmp_path / 'again'))
  assert sorted(said['target_modules']) == sorted(plain['target_modules']) and said['use_dora'] == plain['use_dora']
  assert said['lora_alpha'] / said['r'] == pytest.approx(plain['lora_alpha'] / plain['r'] ** (0.5 if case == 'lora' else 1))
  assert not (tmp_path / 'merged' / 'config.json').exists() and lora_of(find(str(tmp_path / 'merged'))[0].meta(0)) is None


def broken(tmp_path: Path, change, config=None) -> str:
  """A copy of the golden adapters with tensors changed by `change`, or with keys of the config."""
  folder = tmp_path / 'broken'
  shutil.copytree(GOLDEN / 'peft' / 'dora', folder)
  tensors = {name: tensor.array().copy() for name, tensor in open_file(folder / peft.WEIGHTS).items()}
  change(tensors)
  peft.write_file(folder / peft.WEIGHTS, [
    peft.ToWrite(name, array.dtype, array.shape, lambda array=array: array) for name, array in tensors.items()])
  plain = json.loads((folder / peft.CONFIG).read_text()) | (config or {})
  (folder / peft.CONFIG).write_text(json.dumps(plain))
  return str(folder)


FIRST = 'base_model.model.model.layers.0.self_attn.q_proj.'


@pytest.mark.parametrize('change, config, says', [
  (lambda t: t.pop(FIRST + 'lora_B.weight'), {}, FIRST + 'lora_B.weight is missing'),
  (lambda t: t.update({FIRST + 'lora_A.weight': t[FIRST + 'lora_A.weight'].T.copy()}), {}, 'lora_A.weight is missing or'),
  (lambda t: t.update({FIRST + 'extra': np.zeros(3, np.float32)}), {}, f'no place for {FIRST}extra'),
  (lambda t: [t.pop(name) for name in [*t] if name.startswith(FIRST)], {}, 'only some layers have stacks.0.mixer.w_q_DNH'),
  (lambda t: None, {'r': 3}, 'not of shape (3, '),
  (lambda t: None, {'peft_type': 'LOHA'}, "peft_type='LOHA'"),
  (lambda t: None, {'bias': 'all'}, 'bias="all" is not known here'),
  (lambda t: None, {'modules_to_save': ['lm_head']}, 'modules_to_save=["lm_head"] is not known here'),
  (lambda t: None, {'rank_pattern': {'q_proj': 4}}, 'rank_pattern={"q_proj": 4} is not known here'),
])
def test_adapters_that_we_would_not_compute_are_refused(llama, tmp_path, mesh_of, change, config, says):
  source = broken(tmp_path, change, config)
  with mesh_of(1), pytest.raises(ValueError) as error:
    peft.import_adapters(source, str(llama), tmp_path / 'run')
  assert says in str(error.value) and '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_a_model_without_adapters_and_adapters_of_fused_modules_are_refused(llama, tmp_path, mesh_of):
  with mesh_of(1):
    for command in (peft.merge, peft.export_adapters):
      with pytest.raises(ValueError, match='holds a whole model and no adapters'):
        command(str(llama), tmp_path / 'out')
    import_directory(GOLDEN / 'hf' / 'phi3', tmp_path / 'phi3')
    checkpoints, step = find(str(tmp_path / 'phi3'))
    parent = start.Parent(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step))
    config = lora.LoraConfig(rank=2)
    params = jax.jit(lambda params: lora.adapt(params, config, jax.random.key(0)))(load_params(checkpoints, step))
    peft.write_workdir(tmp_path / 'run', parent, lora.adapters(params), {'lora': typed_json.encode(config, lora.LoraConfig)})
    same = named_leaves(load_params(Checkpoints(tmp_path / 'run' / 'checkpoints'), 0))
    assert all((np.asarray(same[name]) == np.asarray(leaf)).all() for name, leaf in named_leaves(
      load_params(checkpoints, step)).items())  # they compute nothing yet
    with pytest.raises(ValueError, match='layers.0.mixer.w_._D.H shares a module of theirs with other weights'):
      peft.export_adapters(str(tmp_path / 'run'), tmp_path / 'out')
