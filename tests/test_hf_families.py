"""Every family of maxlm/hf against transformers: tiny models with perturbed weights (tests/golden/make_hf_goldens.py).

A fixture is tested as soon as a family has its model_type.
"""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm import decode, typed_json
from maxlm.checkpoint import Checkpoints
from maxlm.hf import convert, families
from maxlm.hf.tensors import ToWrite, open_directory, write_directory
from maxlm.layers.rows import Past
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, empty_caches
from maxlm.sharding import spec

GOLDEN = Path(__file__).parent / 'golden' / 'hf'
KNOWN = [model_type for family in families.families().values() for model_type in family.MODEL_TYPES]
FOLDERS = sorted(path.parent for path in GOLDEN.glob('*/config.json')
                 if json.loads(path.read_text())['model_type'] in KNOWN)
FP32 = ComputeConfig(dtype='float32', kernel='reference').resolve('cpu')
OLD_NAMES = ('gpt2_bare', 'olmo_hybrid_nope')  # of a first release: they are read and not written
BUFFERS = ('.attn.bias', '_decay', 'slope_rate')  # masks of GPT-2, and MiniMax' decays (test_hf_recurrent.py): no weights
TOLERANCE = 2e-4  # of the largest logit: fp32 on both sides, sums in another order
LONG = 'phi3_longrope'  # rows beyond the original length: computed with long_factor, where an import takes short_factor

each_folder = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope='module')
def imported(tmp_path_factory, mesh_of):
  """A function from a fixture's folder to (workdir, model that gives its logits, fp32 parameters on one device)."""

  @functools.cache
  def load(folder: Path):
    workdir = tmp_path_factory.mktemp(folder.name) / 'run'
    with mesh_of(1):
      convert.import_directory(folder, workdir)
      checkpoints = Checkpoints(workdir / 'checkpoints')
      model = typed_json.decode(checkpoints.meta(0)['model'], DecoderConfig)
      if folder.name == LONG:
        config = json.loads((folder / 'config.json').read_text())
        config['rope_parameters']['short_factor'] = config['rope_parameters']['long_factor']
        model = families.read_config(config)[1]
      return workdir, model, checkpoints.restore_params(0, jax.eval_shape(lambda: Decoder(model, jax.random.key(0))))

  return load


def rows_of(tokens_BT: np.ndarray) -> list[jax.Array]:
  """Tokens, segment ids and positions of rows that are one document each."""
  positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
  return [jax.device_put(a, spec('BT')) for a in (tokens_BT, np.ones_like(tokens_BT), positions_BT)]


def logits_of(model: DecoderConfig, params: Decoder, tokens_BT: np.ndarray) -> np.ndarray:
  def run(params, *rows):
    return params.logits(model, params.hidden(model, FP32, *rows)[0])

  return np.asarray(jax.jit(run)(params, *rows_of(tokens_BT)))


def assert_same_tensors(folder: Path, original: Path) -> None:
  """Names, dtypes and bits; not how they are spread over files."""
  mine, theirs = ({name: tensor for name, tensor in open_directory(where).items() if not name.endswith(BUFFERS)}
                  for where in (folder, original))
  if original.name in OLD_NAMES:
    mine, theirs = ({str(i): tensor for i, tensor in enumerate(sorted(stored.values(), key=lambda t: t.array().tobytes()))}
                    for stored in (mine, theirs))
  assert sorted(mine) == sorted(theirs)
  for name, tensor in mine.items():
    assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
    assert tensor.array().tobytes() == theirs[name].array().tobytes(), name


@each_folder
def test_logits_are_those_of_transformers(imported, mesh_of, folder):
  golden, (_, model, params) = np.load(folder / 'golden.npz'), imported(folder)
  with mesh_of(1):
    error = np.abs(logits_of(model, params, golden['tokens']) - golden['logits']).max() / np.abs(golden['logits']).max()
  print(f'{folder.name}: {error:.1e}')
  assert error <= TOLERANCE


@each_folder
def test_greedy_generation_is_that_of_transformers(imported, mesh_of, folder):
  golden, (_, model, params) = np.load(folder / 'golden.npz'), imported(folder)
  with mesh_of(1):
    out = decode.generate(params, model, FP32, golden['prompts'].tolist(), eos=(), temperature=0.0,
                          max_tokens=golden['continuations'].shape[1])
  assert out == golden['continuations'].tolist()


@each_folder
def test_decoding_with_the_cache_equals_the_full_forward(imported, mesh_of, folder):
  golden, (_, model, params) = np.load(folder / 'golden.npz'), imported(folder)
  tokens_BT = golden['tokens']
  B, T = tokens_BT.shape

  def run(params, tokens_BT, ones_BT, positions_BT):
    caches, pieces = empty_caches(model, FP32, B, T), []
    for start, stop in ((0, T - 3), (T - 3, T - 2), (T - 2, T - 1), (T - 1, T)):
      part = slice(start, stop)
      x_BTD, caches = params.extend(model, FP32, tokens_BT[:, part], ones_BT[:, part], positions_BT[:, part], caches,
                                    Past(ones_BT, start))
      pieces.append(params.logits(model, x_BTD))
    return jax.numpy.concatenate(pieces, axis=1)

  with mesh_of(1):
    got = np.asarray(jax.jit(run)(params, *rows_of(tokens_BT)))
    full = logits_of(model, params, tokens_BT)
  np.testing.assert_allclose(got, full, atol=TOLERANCE * np.abs(full).max())


@each_folder
def test_export_gives_back_every_bit_and_the_config(imported, mesh_of, folder, tmp_path):
  workdir, _, _ = imported(folder)
  with mesh_of(1):
    convert.export_directory(str(workdir), tmp_path / 'out')
  assert_same_tensors(tmp_path / 'out', folder)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == json.loads((folder / 'config.json').read_text())
  assert (tmp_path / 'out' / 'generation_config.json').read_text() == (folder / 'generation_config.json').read_text()


@each_folder
def test_a_config_that_is_written_anew_describes_the_same_model(imported, mesh_of, folder, tmp_path):
  """As for a model that was trained here: nothing is taken from the file that it came with."""
  workdir, _, _ = imported(folder)
  family, model, _ = families.read_config(json.loads((folder / 'config.json').read_text()))
  with mesh_of(1):
    convert.export_directory(str(workdir), tmp_path / 'out', family=family.__name__.rpartition('.')[2])
  assert_same_tensors(tmp_path / 'out', folder)
  _, again, _ = families.read_config(json.loads((tmp_path / 'out' / 'config.json').read_text()))
  assert families.differences(model, again) == []


@pytest.mark.parametrize('folder', [folder for folder in FOLDERS if (folder / 'config.hub.json').exists()],
                         ids=lambda folder: folder.name)
def test_the_published_spelling_of_a_config_is_the_same_model(folder):
  models = [families.read_config(json.loads((folder / name).read_text()))[1] for name in ('config.json', 'config.hub.json')]
  assert families.differences(*models) == []


@pytest.mark.parametrize('name, seeing', [('gemma3', 'gemma3'), ('ministral3', 'mistral3'), ('mistral', 'mistral3')])
def test_of_a_model_that_also_sees_the_text_model_is_imported(imported, mesh_of, tmp_path, name, seeing):
  folder, source = GOLDEN / name, tmp_path / 'in'
  config = {'model_type': seeing, 'text_config': json.loads((folder / 'config.json').read_text()),
            'vision_config': {'hidden_size': 8}, 'image_token_index': 90, 'torch_dtype': 'bfloat16'}
  tensors = {f'language_model.{name}': tensor for name, tensor in open_directory(folder).items()}
  tensors['vision_tower.conv.weight'] = tensors['multi_modal_projector.norm.weight'] = next(iter(tensors.values()))
  source.mkdir()
  (source / 'config.json').write_text(json.dumps(config))
  write_directory(source, [ToWrite(name, t.dtype, t.shape, t.array) for name, t in tensors.items()], 10**9)
  with mesh_of(1):
    report = convert.import_directory(source, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
  assert report.notes == ['left out vision_tower.conv.weight and 1 more: the text model alone is imported']
  assert_same_tensors(tmp_path / 'out', folder)
  _, model, _ = families.read_config(json.loads((tmp_path / 'out' / 'config.json').read_text()))
  assert families.differences(model, imported(folder)[1]) == []


@pytest.mark.parametrize('name, block, parts', [
  ('mixtral', 'block_sparse_moe', ('w1', 'w3', 'w2')), ('qwen3_moe', 'mlp', ('gate_proj', 'up_proj', 'down_proj'))])
def test_experts_may_be_stacked_as_transformers_5_has_them_in_memory(mesh_of, tmp_path, name, block, parts):
  folder, source = GOLDEN / name, tmp_path / 'in'
  tensors = {key: np.array(tensor.array()) for key, tensor in open_directory(folder).items()}
  for layer in sorted({key.partition(f'{block}.experts.0.')[0] for key in tensors if f'{block}.experts.0.' in key}):
    n_experts = len(tensors[f'{layer}{block}.gate.weight'])
    gate, up, down = (np.stack([tensors.pop(f'{layer}{block}.experts.{e}.{part}.weight') for e in range(n_experts)])
                      for part in parts)
    tensors[f'{layer}mlp.gate.weight'] = tensors.pop(f'{layer}{block}.gate.weight')
    tensors[f'{layer}mlp.experts.gate_up_proj'] = np.concatenate([gate, up], axis=1)
    tensors[f'{layer}mlp.experts.down_proj'] = down
  source.mkdir()
  shutil.copy(folder / 'config.json', source)
  write_directory(source, [ToWrite(key, a.dtype, a.shape, lambda a=a: a) for key, a in tensors.items()], 10**9)
  with mesh_of(1):
    convert.import_directory(source, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
  assert_same_tensors(tmp_path / 'out', folder)


@each_folder
def test_every_family_writes_a_model_or_says_why_it_cannot(folder):
  _, model, _ = families.read_config(json.loads((folder / 'config.json').read_text()))
  for family in families.families().values():
    try:
      families.write_config(family, model)
    except ValueError as reason:
      assert str(reason)


@pytest.mark.parametrize('name', ['deepseek_v3', 'glm4_moe', 'minimax_m2'])
def test_layers_for_multi_token_prediction_are_left_out(mesh_of, tmp_path, name):
  """Published files have them behind the last layer."""
  folder, source = GOLDEN / name, tmp_path / 'in'
  tensors = open_directory(folder)
  for more in ('eh_proj', 'mlp.experts.0.up_proj', 'self_attn.o_proj'):
    tensors[f'model.layers.3.{more}.weight'] = tensors['model.norm.weight']
  source.mkdir()
  shutil.copy(folder / 'config.json', source)
  write_directory(source, [ToWrite(key, t.dtype, t.shape, t.array) for key, t in tensors.items()], 10**9)
  with mesh_of(1):
    report = convert.import_directory(source, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
  assert [note.partition(' and 2 more')[0] for note in report.notes] == ['left out model.layers.3.eh_proj.weight']
  assert_same_tensors(tmp_path / 'out', folder)


def test_every_family_has_a_fixture():
  tested = {json.loads((folder / 'config.json').read_text())['model_type'] for folder in FOLDERS}
  assert [name for name, family in families.families().items() if not tested & set(family.MODEL_TYPES)] == []


def test_the_page_lists_every_family_with_its_model_types():
  rows = [line for line in (GOLDEN.parents[2] / 'docs' / 'hf.md').read_text().splitlines() if line.startswith('| [')]
  listed = {row.split(']')[0].removeprefix('| ['): tuple(re.findall('`(.*?)`', row)) for row in rows}
  assert listed == {name: family.MODEL_TYPES for name, family in families.families().items()}
