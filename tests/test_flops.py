"""The FLOPs that MFU is made of, counted again: from the products in the traced program, and pair by pair."""

import types

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm import flops
from maxlm.data import to_device
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import ComputeConfig, Decoder
from maxlm.ops.attention import visible_BTS
from tests.rows import pack, random_batch

MODEL = tiny.get_config().model


def product_flops(jaxpr) -> int:
  """2 x multiply-adds of every dot_general in a jaxpr and in what it calls, loops as often as they run."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * int(np.prod([left[dim] for dim in contracted]))
    assert equation.primitive.name != 'while', 'how often it runs is not known'
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else [value]:
        inner = getattr(inner, 'jaxpr', inner)  # of a closed one
        if hasattr(inner, 'eqns'):
          total += product_flops(inner) * equation.params.get('length', 1)
  return total


def loss(params, batch):
  return next_token_loss(params, MODEL, ComputeConfig(dtype='float32', kernel='reference'), LossConfig(), batch)[0]


def test_flops_of_a_step_are_those_of_its_products(mesh_of):
  """Rows of one document each, without padding; the reference kernel computes every pair, seen or not."""
  rng = np.random.default_rng(0)
  batch = pack([[rng.integers(0, 512, 65)] for _ in range(3)], 64)
  tokens, pairs = 3 * 64, 3 * 64 * 64
  with mesh_of(1):
    params = jax.eval_shape(lambda: Decoder(MODEL, jax.random.key(0)))
    forward = product_flops(jax.make_jaxpr(loss)(params, to_device(batch)).jaxpr)
    with_backward = product_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, to_device(batch)).jaxpr)
  heads = sum(layer.mixer.n_heads * layer.mixer.head_dim for layer in MODEL.layers)
  assert forward == 2 * flops.matmul_params(MODEL) * tokens + 4 * heads * pairs
  assert with_backward == 3 * forward
  windows = [layer.mixer.window for layer in MODEL.layers]
  seen = [3 * sum(min(i + 1, window or 64) for i in range(64)) for window in windows]
  scores = sum(4 * layer.mixer.n_heads * layer.mixer.head_dim * n for layer, n in zip(MODEL.layers, seen))
  assert flops.train_flops(MODEL, batch) == 3 * (2 * flops.matmul_params(MODEL) * tokens + scores)


def test_matmul_params_are_all_but_norms_biases_sinks_and_the_look_up(mesh_of):
  with mesh_of(1):
    params = jax.eval_shape(lambda: Decoder(MODEL, jax.random.key(0)))
  named = {jax.tree_util.keystr(path): leaf.size for path, leaf in jax.tree.leaves_with_path(params)}
  assert flops.matmul_params(MODEL) == sum(size for name, size in named.items() if '.w_' in name or 'unembed' in name)


@pytest.mark.parametrize('window', [None, 1, 5, 24, 1000])
def test_pairs_are_those_that_the_mask_admits(window):
  """Documents of random lengths, some rows padded: padding sees and is seen by nothing that counts."""
  batch = random_batch(np.random.default_rng(1), 6, 64, 512)
  segments = batch['segment_ids']
  mask_BTS = np.asarray(visible_BTS(np.arange(64), np.arange(64), segments, segments, window))
  assert (segments == 0).any()
  assert flops.visible_pairs(batch['positions'], segments, window) == int((mask_BTS & (segments > 0)[:, :, None]).sum())


@pytest.mark.parametrize('kind, peak', [
  ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v6 lite', 918e12), ('TPU7x', 1153.5e12),
  ('NVIDIA H100 80GB HBM3', 989e12), ('Abacus', None)])
def test_peak_is_that_of_the_longest_name_that_fits(kind, peak):
  assert flops.peak_flops(types.SimpleNamespace(platform='other', device_kind=kind)) == peak


def test_peak_of_a_cpu_is_measured():
  assert 1e9 < flops.peak_flops(jax.devices()[0]) < 1e14
