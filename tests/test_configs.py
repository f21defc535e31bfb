"""The contract of configs/: each file loads, survives JSON, is valid on its own pod, and there type-checks a full step.

The pod is an abstract mesh: no device, no memory, but every sharding is checked, and the kernel traced is the pod's.
"""

import ast
import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from data_pipeline.pack import FIELDS
from maxlm import dry_run, stages, typed_json
from maxlm.config import Experiment, validate
from maxlm.flags import load_config
from maxlm.hf import families
from maxlm.layers import mlp
from maxlm.layers.mla import MlaSpec
from maxlm.models.decoder import ComputeConfig, LayerSpec
from maxlm.sharding import abstract_mesh, axes, spec
from maxlm.step import init_state, train_step

ROOT = Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))

# As published, where the model is: by the tensors on huggingface.co, or by the config (test_hf_configs).
PARAMETERS = {
  'deepseek_v3': 671_026_419_200,
  'dense_1b': 1_140_922_368,
  'gpt_oss_120b': 116_829_156_672,
  'hybrid_mamba_8b': 8_654_517_248,
  'llama3_70b': 70_553_706_496,
  'llama3_8b': 8_030_261_248,
  'marin_8b': 8_030_261_248,
  'moe_30b_a3b': 30_532_122_624,
  'moe_tiny': 5_449_088,
  'nemotron3_nano': 31_577_940_288,
  'olmo3_32b': 32_234_279_936,  # 32,233,522,176 without the 74 rows and columns that pad the vocabulary
  'olmo3_7b': 7_298_617_344,  # 7,298,011,136 without them
  'quickstart': 4_197_120,
  'quickstart_diffusion': 4_229_888,
  'qwen3_30b_a3b': 30_532_122_624,
  'staged_tiny': 1_312_128,
  'tiny': 231_112,
  'web_pdf_synthetic': 4_197_120,
}
SHAPE_OF = {
  'deepseek_v3': 'DeepSeek-V3', 'gpt_oss_120b': 'gpt-oss-120b', 'nemotron3_nano': 'NVIDIA-Nemotron-3-Nano-30B-A3B-BF16',
  'qwen3_30b_a3b': 'Qwen3-30B-A3B'}


def load(name: str) -> Experiment:
  """name: of a file, or a file and one of its stages as 'olmo3_7b/long', which is as that stage sees the run."""
  file, _, stage = name.partition('/')
  config = load_config(str(ROOT / 'configs' / f'{file}.py'))
  return stages.flat(config, [s.name for s in config.stages].index(stage)) if stage else config


def programs(file: str) -> list[str]:
  """The names of what differs in a file's steps: it itself, or its stages, but for those that compile to the same."""
  config, found = load(file), {}
  for stage in config.stages:
    flat = load(f'{file}/{stage.name}')
    found.setdefault(repr((flat.model, flat.compute, flat.mesh, flat.data.seq_len, flat.data.batch_size, flat.microbatches)),
                     f'{file}/{stage.name}')
  return [*found.values()] or [file]


def platform_of(config: Experiment) -> str:
  return 'tpu' if config.pod else 'cpu'


def traced_step(config: Experiment):
  """(state, state after a step, metrics) as shapes with shardings, traced for the config's pod; and the step's jaxpr."""
  mesh, key = abstract_mesh(config.mesh, config.pod_devices), jax.random.key(0)
  rows, length = config.data.batch_size, config.data.seq_len
  shapes = {name: (rows, length) for name in FIELDS} | {'source': (rows,)}
  batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, spec('BT'[:len(shape)])))
           for name, shape in shapes.items()}
  with jax.sharding.use_abstract_mesh(mesh):
    step_config = config.step_config(platform_of(config), n_sources=2)
    state = jax.eval_shape(functools.partial(init_state, step_config), key)
    step = jax.jit(functools.partial(train_step, step_config)).trace(state, batch)
    return state, *step.out_info, step.jaxpr


@functools.cache
def traced_step_of(name: str):
  """`traced_step` of a file as it is, once for all tests."""
  return traced_step(load(name))


def test_every_config_is_in_the_table():
  assert FILES == sorted(PARAMETERS)


@pytest.mark.parametrize('name', FILES)
def test_a_config_survives_json(name):
  config = load(name)
  assert config.name == name
  assert typed_json.loads(typed_json.dumps(config), Experiment) == config


PROGRAMS = [name for file in FILES for name in programs(file)]


@pytest.mark.parametrize('name', PROGRAMS)
def test_a_config_is_valid_on_its_own_pod_and_type_checks_a_full_step_there(name):
  config = load(name)
  validate(config, platform_of(config), config.pod_devices)
  state, after, metrics, jaxpr = traced_step_of(name)
  assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[name.partition('/')[0]]
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(after)):
    assert (new.shape, new.dtype) == (old.shape, old.dtype), path
    if old.ndim:
      assert new.sharding.spec == old.sharding.spec, path
  assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt)) if leaf.ndim} == {jnp.dtype('float32')}
  assert metrics['loss'].shape == () and metrics['loss_by_source'].shape == (2,)
  assert ('pallas_call' in str(jaxpr)) == (platform_of(config) == 'tpu')


@pytest.mark.parametrize('file', sorted({file for file in FILES if load(file).pod}))
def test_a_config_for_a_pod_says_what_is_planned_for_it(file):
  said = ' '.join(ast.get_docstring(ast.parse((ROOT / 'configs' / f'{file}.py').read_text())).split())
  assert re.search(r'Planned for the pod .*: [\d.]+ s a step.*, [\d.]+ % of the peak, [\d.]+ of [\d.]+ GiB', said)


@pytest.mark.parametrize('name', [name for name in PROGRAMS if load(name).pod])
def test_big_weights_are_split_over_the_whole_pod(name):
  """What a device holds of parameters and optimizer is near a devices-th of them: nothing big is replicated. (Experts'
  biases are split over `expert` alone: 0.02% of gpt-oss.)"""
  config = load(name)
  state, *_ = traced_step_of(name)
  sizes = abstract_mesh(config.mesh, config.pod_devices).shape

  def parts(leaf) -> int:
    split = [axis for entry in leaf.sharding.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    return math.prod(sizes[axis] for axis in split)

  leaves = [leaf for path, leaf in jax.tree.leaves_with_path((state.params, state.opt))
            if leaf.ndim and '.b_' not in jax.tree_util.keystr(path)]
  held = sum(leaf.size / parts(leaf) for leaf in leaves)
  assert held < 1.01 * sum(leaf.size for leaf in leaves) / math.prod(sizes[axis] for axis in axes('DF')) + 2e6


@pytest.mark.parametrize('name', SHAPE_OF)
def test_a_shape_is_that_of_the_published_config(name):
  published = json.loads((Path(__file__).parent / 'golden' / 'configs' / f'{SHAPE_OF[name]}.json').read_text())
  assert families.differences(load(name).model, families.read_config(published)[1]) == []


@pytest.mark.parametrize('name', FILES)
def test_a_dry_run_adds_up(name, monkeypatch):
  """Of every file: stages, rates, meshes and epochs are checked for its own machine, or for one device."""
  config = load(name)
  if not config.pod:
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
  assert f'{PARAMETERS[name]:,} parameters' in dry_run.dry_run(config, None)


# How the published scripts were wrong, and what is said of it: OLMo-core's 7B long stage kept the duration of pre-training
# (issue 627); its 32B long stage loads the checkpoint of pre-training.
@pytest.mark.parametrize('name', ['olmo3_7b', 'olmo3_32b', 'marin_8b', 'moe_30b_a3b', 'hybrid_mamba_8b'])
def test_a_recipe_that_is_wrong_as_published_ones_were_is_refused(name):
  config = load(name)
  falls = [i for i, stage in enumerate(config.stages) if stage.lr.schedule == 'linear' and not stage.lr.horizon_tokens]
  for i in falls:
    stage = config.stages[i]
    kept = dataclasses.replace(stage, lr=dataclasses.replace(stage.lr, horizon_tokens=config.stages[0].tokens * 2))
    with pytest.raises(ValueError, match=rf"\('{stage.name}'\).lr: the learning rate ends at .* not at end_lr="):
      dry_run.dry_run(with_stage(config, i, kept), None)
    never = dataclasses.replace(stage, lr=dataclasses.replace(stage.lr, schedule='wsd'))
    with pytest.raises(ValueError, match='the learning rate ends at .* not at end_lr='):
      dry_run.dry_run(with_stage(config, i, never), None)
  assert falls
  plan = stages.segments(config)
  end_of_first = next(segment.stop for segment in plan if segment.is_last)
  with pytest.raises(ValueError, match=f"is in stage '{plan[0].name}', after it .* needs a checkpoint of stage"):
    stages.branched(config, end_of_first, (config.stages[-1].name,))


def with_stage(config: Experiment, i: int, stage) -> Experiment:
  return dataclasses.replace(config, stages=(*config.stages[:i], stage, *config.stages[i + 1:]))


def test_a_recipe_that_repeats_its_data_for_the_wrong_duration_is_refused():
  """The same mistake in the tokens themselves: five trillion of a pool that has fewer."""
  config = load('olmo3_7b')
  longer = dataclasses.replace(config.stages[1], tokens=5_000_000_000_000,
                               lr=dataclasses.replace(config.stages[1].lr, horizon_tokens=None, end_lr=3e-5,
                                                      decay_tokens=5_000_000_000_000))
  with pytest.raises(ValueError, match="source 'web' of corpora/dolma3 is read 1.27 times in this run"):
    dry_run.dry_run(with_stage(config, 1, longer), None)


def test_a_mesh_that_heads_do_not_divide_into_is_found():
  config = load('llama3_8b')
  config.mesh.tensor, config.mesh.fsdp = 16, 4
  with pytest.raises(ValueError, match='n_kv_heads=8 does not divide into 16 parts'):
    validate(config, 'tpu', config.pod_devices)
  with pytest.raises(ValueError, match='does not evenly divide the dimension size 8'):
    traced_step(config)


def test_a_missing_sharding_annotation_is_found(monkeypatch):
  """An MLP that multiplies without saying how its weights and its output are split."""
  config = load('llama3_8b')
  config.mesh.tensor, config.mesh.fsdp = 2, 32
  traced_step(config)
  monkeypatch.setattr(mlp, 'einsum', lambda dims, x, w: jnp.einsum(dims, x, w.astype(x.dtype)))
  with pytest.raises(Exception, match='out_sharding') as error:
    traced_step(config)
  assert error.type.__name__ == 'ShardingTypeError'


LATENT = MlaSpec(n_heads=2, q_rank=None, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8)


@pytest.mark.parametrize('layer, options, message', [
  (LayerSpec(mixer=None, mlp=None), {}, r'model.pattern\[0\] has neither a mixer nor an mlp'),
  (LayerSpec(mixer=LATENT, mlp=None), {'compute': ComputeConfig(kernel='splash')}, "'splash' runs on tpu, not on cpu"),
  (LayerSpec(mixer=dataclasses.replace(LATENT, rope_dim=3), mlp=None), {}, r'model.pattern\[0\].mixer.rope: 3 of 3 dims'),
  (LayerSpec(mixer=LATENT, mlp=mlp.MlpSpec(d_ff=8, activation='clamped_swiglu')), {},
   r'model.pattern\[0\].mlp.limit=None: .* takes a positive number')])
def test_a_layer_that_cannot_be_computed_is_refused(layer, options, message):
  config = load('tiny')
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=(layer,)), **options)
  with pytest.raises(ValueError, match=message):
    validate(config, 'cpu', 1)


def test_a_row_longer_than_the_learned_positions_is_refused():
  config = load('tiny')
  config.model.max_positions = config.data.seq_len
  validate(config, 'cpu', 1)
  config.model.max_positions -= 1
  with pytest.raises(ValueError, match=r'is more than the \d+ positions of the model'):
    validate(config, 'cpu', 1)
