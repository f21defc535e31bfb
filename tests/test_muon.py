"""Muon: its definition in double precision, which weights it has, and the same updates on every mesh, for every mixer."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from maxlm import lora
from maxlm.checkpoint import named_leaves
from maxlm.data import to_device
from maxlm.flags import load_config
from maxlm.models.decoder import Decoder
from maxlm.muon import is_matrix, newton_schulz, orthogonalised, rows_and_columns, scale_by_muon
from maxlm.optim import OptimConfig, optimizer
from maxlm.sharding import spec
from maxlm.step import init_state, train_step
from maxlm.trained import first_rows, take
from tests.rows import random_batch
from tests.test_mixers import MODELS

FILES = Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(path.stem for path in FILES.glob('*.py'))


def by_definition(m: np.ndarray) -> np.ndarray:
  """Newton-Schulz of one matrix as the author of Muon has it, in double precision."""
  x = m.astype(np.float64)
  x = x.T if len(m) > len(m[0]) else x
  x = x / np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x.T if len(m) > len(m[0]) else x


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape, lowest, highest, rms', [
  ((256, 1024), 0.67, 1.15, 0.191), ((256, 256), 0.0, 1.21, 0.180), ((512, 64), 0.67, 1.21, 0.158)])
def test_singular_values_come_near_one_and_updates_have_the_size_of_adamw(mesh_of, shape, lowest, highest, rms):
  """The figures that the reference implementation gives. A square Gaussian has values too small for five steps."""
  with mesh_of(1):
    g = jnp.asarray(gaussian(1, *shape))
    values = np.linalg.svd(np.asarray(newton_schulz(g)[0]), compute_uv=False)
    update = np.asarray(orthogonalised('stacks.0.mlp.w_up_DF', g))
  assert lowest < values.min() and values.max() < highest
  assert np.sqrt(np.mean(update**2)) == pytest.approx(rms, abs=0.003)


def test_singular_values_above_half_a_percent_of_the_norm_come_to_0_68_to_1_20(mesh_of):
  """On a diagonal matrix, whose singular values the iteration maps one by one; small ones grow by 3.4445 a step."""
  values = np.geomspace(0.005, 1, 100)
  with mesh_of(1):
    for value in values:  # beside one that makes the norm 1
      diagonal = np.array([value, np.sqrt(1 - value**2)], np.float32) if value < 1 else np.array([1, 0], np.float32)
      mapped = np.asarray(newton_schulz(jnp.asarray(np.diag(diagonal)[None])))[0, 0, 0]
      assert 0.68 < mapped < 1.205, value
    tiny_value = np.asarray(newton_schulz(jnp.asarray(np.diag([1e-6, 1]).astype(np.float32)[None])))[0, 0, 0]
  assert tiny_value == pytest.approx(1e-6 * 3.4445**5, rel=1e-3)
  assert not np.asarray(newton_schulz(jnp.zeros((1, 3, 4)))).any()  # not NaN: padding, and weights without a gradient


@pytest.mark.parametrize('name, shape, flat', [
  ('stacks.0.mixer.w_q_DNH', (3, 16, 4, 6), (3, 16, 24)), ('stacks.0.mixer.w_o_NHD', (3, 4, 6, 16), (3, 24, 16)),
  ('stacks.1.mlp.w_up_EDF', (3, 4, 16, 8), (12, 16, 8)), ('stacks.0.mixer.w_q_DNH.lora_b', (2, 3, 4, 6), (2, 3, 24)),
  ('stacks.0.mixer.w_decay_up_RNQ', (1, 6, 4, 5), (1, 6, 20)), ('mtp.w_in_EDF', (4, 16, 8), (4, 16, 8)),
  ('mtp.w_in_DF', (16, 8), (1, 16, 8))])
def test_two_steps_are_muon_in_double_precision(mesh_of, name, shape, flat):
  """Momentum, Nesterov's look ahead, a matrix a layer and an expert with all its heads, and Moonlight's scale."""
  rule, first, second = scale_by_muon(optax.scale_by_adam()), gaussian(*shape), gaussian(*shape, seed=1)
  with mesh_of(1):
    state = rule.init({name: jnp.zeros(shape)})
    got = []
    for g in (first, second):
      updates, state = rule.update({name: jnp.asarray(g)}, state)
      got.append(np.asarray(updates[name]))
  momentum = np.zeros(shape)
  for g, update in zip((first, second), got):
    momentum = 0.95 * momentum + 0.05 * g
    matrices = (0.95 * momentum + 0.05 * g).reshape(flat)
    expected = np.stack([0.2 * np.sqrt(max(flat[1:])) * by_definition(m) for m in matrices]).reshape(shape)
    np.testing.assert_allclose(update, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)
  np.testing.assert_allclose(state.momentum[name], momentum, atol=1e-6)


# -- which weights are matrices


@pytest.mark.parametrize('name', CONFIGS)
def test_of_every_config_each_weight_is_known(mesh_of, name):
  model = load_config(str(FILES / f'{name}.py')).model
  with mesh_of(1):
    params = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))
  leaves = named_leaves(params)
  matrices = {n.rpartition('.')[2] for n in leaves if is_matrix(n)}
  assert {'w_q_DNH', 'w_o_NHD'} <= matrices or 'w_q_up_DNH' in matrices
  for leaf in leaves:
    if is_matrix(leaf):  # its letters are its dims
      assert leaves[leaf].ndim == 1 + len(leaf.rpartition('_')[2])


def test_the_rest_is_adamws_and_what_is_unknown_is_refused(mesh_of):
  with mesh_of(1):
    leaves = {n: leaf for model in MODELS.values()
              for n, leaf in named_leaves(jax.eval_shape(lambda m=model: Decoder(m, jax.random.key(0)))).items()}
  rest = {n.rpartition('.')[2] for n in leaves if not is_matrix(n)}
  assert {'embed_VD', 'unembed_DV', 'w_router_DE', 'w_shared_gate_D', 'conv_q_WKQ', 'a_log_N', 'decay_N', 'scale_D',
          'sinks_N', 'select_bias_E', 'skip_N'} <= rest
  assert not {n for n in rest if n.startswith('w_')} - {'w_router_DE', 'w_shared_gate_D'}
  assert rows_and_columns('stacks.0.mixer.w_q_DNH.lora_a') == ('D', 'A')
  assert not is_matrix('stacks.0.mixer.w_q_DNH.lora_magnitude')
  for unknown in ('stacks.0.mixer.kernel_DF', 'stacks.0.mixer.w_scale', 'stacks.0.mixer.w_new_D'):
    with pytest.raises(ValueError, match='does not know whether .* is a matrix: name it'):
      rows_and_columns(unknown)


# -- meshes


MESHES = ({'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'context': 2})
LORA = 'adapters'


def trained_of(name: str):
  """Shapes of what is trained of a model, by name."""
  if name == LORA:
    config = tiny.get_config()
    config.model.n_layers, config.model.pattern = 3, config.model.pattern[1:2]
    make = lambda: lora.adapt(Decoder(config.model, jax.random.key(0)), lora.LoraConfig(rank=3), jax.random.key(0))
    return jax.eval_shape(lambda: take(make(), first_rows(config.optim, config.model, make())))
  model = MODELS[name]
  make = lambda: Decoder(model, jax.random.key(0))
  return jax.eval_shape(lambda: take(make(), first_rows(OptimConfig(peak_lr=1.0), model, make())))


@pytest.mark.parametrize('name', [*MODELS, LORA])
def test_updates_are_the_same_on_every_mesh(mesh_of, name):
  """From equal gradients. Products of whole matrices give equal sums but for their order, which the iteration's slope of
  485 at 0 makes larger where singular values are small."""
  rule, found = optimizer(OptimConfig(peak_lr=1.0, optimizer='muon')), {}
  sizes = [{'fsdp': 1}, *MESHES, *([{'expert': 2, 'fsdp': 4}] if 'moe' in name else [])]
  for i, size in enumerate(sizes):
    with mesh_of(**size):
      shapes = trained_of(name)
      put = {n: jax.device_put(gaussian(*s.shape, seed=k), jax.NamedSharding(jax.sharding.get_mesh(), s.sharding.spec))
             for k, (n, s) in enumerate(shapes.items())}
      updates, state = jax.jit(lambda g: rule.update(g, rule.init(g), g))(put)
      assert all(jax.typeof(updates[n]).sharding.spec == shapes[n].sharding.spec for n in shapes)
      found[i] = {n: np.asarray(u) for n, u in updates.items()}
  for i in range(1, len(sizes)):
    for n, one in found[0].items():
      np.testing.assert_allclose(found[i][n], one, atol=1e-4 * np.abs(one).max(), rtol=0, err_msg=f'{sizes[i]} {n}')


@pytest.mark.parametrize('sizes, moves', [({'fsdp': 8}, 1), ({'fsdp': 4, 'tensor': 2}, 2)])
def test_matrices_go_to_their_device_and_back_and_each_is_made_once(mesh_of, sizes, moves):
  """An all-to-all for each axis there, and one back; nothing is gathered. Of 12 layers two come to a device of eight."""
  with mesh_of(**sizes) as mesh:
    g = jax.device_put(gaussian(12, 16, 4, 8), jax.NamedSharding(mesh, spec('LDNH')))
    hlo = jax.jit(functools.partial(orthogonalised, 'stacks.0.mixer.w_q_DNH')).lower(g).compile().as_text()
  collectives = re.findall(r' (all-[a-z-]+|collective-[a-z-]+|reduce-scatter)\(', hlo)
  assert collectives == ['all-to-all'] * 2 * moves
  products = re.findall(r'= f32\[([\d,]+)\]\S* dot\(', hlo)
  assert len(products) == 3 and {shape.split(',')[0] for shape in products} == {'2'}


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 8}], ids=str)
def test_three_steps_on_a_mesh_are_those_of_one_device(mesh_of, sizes):
  """Losses, and weights to what the small singular values of nearly singular gradients let differ."""
  config = tiny.get_config()
  config.model.n_layers, config.model.pattern = 3, config.model.pattern[1:2]
  config.optim = dataclasses.replace(config.optim, optimizer='muon', cautious=False, warmup_tokens=0)
  found = {}
  for n, size in ((1, {}), (8, sizes)):
    with mesh_of(n, **size):
      state = jax.jit(functools.partial(init_state, config.step_config('cpu', 1)))(jax.random.key(0))
      update, losses = jax.jit(functools.partial(train_step, config.step_config('cpu', 1))), []
      start = {name: np.asarray(w) for name, w in named_leaves(state.params).items()}
      for i in range(3):
        state, metrics = update(state, to_device(random_batch(np.random.default_rng(i), 8, 64, 512)))
        losses.append(float(metrics['loss']))
      found[n] = losses, {name: np.asarray(w) - start[name] for name, w in named_leaves(state.params).items()}
  np.testing.assert_allclose(found[8][0], found[1][0], rtol=1e-5)
  for name, moved in found[1][1].items():
    assert np.linalg.norm(found[8][1][name] - moved) < 1e-2 * np.linalg.norm(moved), name
