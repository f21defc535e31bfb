"""The MLP: its activations against formulas in float64, its switches, meshes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.layers.mlp import MlpSpec, xielu
from maxlm.sharding import spec as shard
from tests.modules import assert_close, perturbed, values_and_gradients

SPECS = [
  MlpSpec(d_ff=16),
  MlpSpec(d_ff=16, activation='gelu', bias=True),
  MlpSpec(d_ff=16, activation='gelu', gated=False, bias=True),
  MlpSpec(d_ff=16, activation='relu2', gated=False),
  MlpSpec(d_ff=16, activation='xielu', gated=False),
  MlpSpec(d_ff=16, activation='clamped_swiglu', limit=0.7, bias=True),
  MlpSpec(d_ff=16, gate_scale=0.6, out_scale=1.7, bias=True),
]
every_spec = pytest.mark.parametrize('spec', SPECS, ids=[
  'silu', 'gelu', 'plain gelu', 'relu2', 'xielu', 'clamped_swiglu', 'scaled'])


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softplus(x):
  return np.log1p(np.exp(x))


FORMULAS = {
  'silu': lambda x: x * sigmoid(x),
  'gelu': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
  'relu2': lambda x: np.where(x > 0, x * x, 0),
}


def by_definition(spec, w, x):
  """The MLP in float64 with weights {name: array}."""
  w = {name: np.asarray(value, np.float64) for name, value in w.items()}
  up = x @ w['w_up_DF'] + w.get('b_up_F', 0)
  gate = x @ w['w_gate_DF'] + w.get('b_gate_F', 0) if spec.gated else up
  gate = gate * spec.gate_scale
  if spec.activation == 'clamped_swiglu':
    gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
    h = gate * sigmoid(1.702 * gate) * (up + 1)
  elif spec.activation == 'xielu':
    above = softplus(w['alpha_p']) * up**2 + 0.5 * up
    below = (0.5 + softplus(w['alpha_n'])) * (np.expm1(up) - up) + 0.5 * up
    h = np.where(up > 0, above, below)
  else:
    h = FORMULAS[spec.activation](gate) * (up if spec.gated else 1)
  return (h @ w['w_down_FD'] + w.get('b_down_D', 0)) * spec.out_scale


def example(B=2, T=5, D=8):
  return np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def apply(spec):
  return lambda mlp, x: mlp(spec, x)


@every_spec
def test_the_output_is_the_definition(mesh_of, spec):
  spec.check('here')
  with mesh_of(1):
    mlp = perturbed(spec, 8)
    y = jax.jit(apply(spec))(mlp, jax.device_put(example(), shard('BTD')))
  weights = {name: value[...] for name, value in vars(mlp).items() if hasattr(value, 'shape')}
  expected = by_definition(spec, weights, example().astype(np.float64))
  np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@every_spec
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, spec):
  x = example(B=8)
  with mesh_of(1):
    one = values_and_gradients(apply(spec), perturbed(spec, 8), x)
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    assert_close(values_and_gradients(apply(spec), perturbed(spec, 8), x), one, rtol=2e-6)


@every_spec
def test_matmul_params_are_the_sizes_of_the_matrices(mesh_of, spec):
  with mesh_of(1):
    mlp = perturbed(spec, 8)
  assert spec.matmul_params(8) == sum(value.size for name, value in vars(mlp).items() if name.startswith('w_'))


def test_xielu_starts_with_both_alphas_at_0_8_and_is_smooth_at_zero(mesh_of):
  x = np.array([-3, -1, -1e-3, -1e-7, 0, 1e-7, 1e-3, 1, 3], np.float32)
  with mesh_of(1):
    mlp = perturbed(MlpSpec(d_ff=4, activation='xielu', gated=False), 4, noise=0.0)
    y, slope = jax.vmap(jax.value_and_grad(lambda x: xielu(x, mlp.alpha_p[...], mlp.alpha_n[...])))(x)
  exact = x.astype(np.float64)
  np.testing.assert_allclose(y, np.where(x > 0, 0.8 * exact**2, 0.8 * (np.expm1(exact) - exact)) + 0.5 * exact, atol=1e-6)
  np.testing.assert_allclose(slope, 0.5 + np.where(x > 0, 1.6 * exact, 0.8 * np.expm1(exact)), atol=1e-6)


def test_xielu_of_bf16_is_computed_in_fp32(mesh_of):
  x = np.linspace(-0.2, 0.2, 81).astype(jnp.bfloat16)
  with mesh_of(1):
    alphas = jnp.float32(0.3), jnp.float32(5.0)
    y, exact = xielu(x, *alphas), xielu(x.astype(np.float32), *alphas)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(np.float32), exact, rtol=2**-8)


@pytest.mark.parametrize('change, message', [
  ({'d_ff': 0}, r'mlp\.d_ff=0 must be'),
  ({'activation': 'swish'}, r"mlp\.activation='swish' is none of silu, gelu, relu2, xielu, clamped_swiglu"),
  ({'activation': 'xielu'}, r"mlp\.gated=True does not go with activation='xielu': set it to False"),
  ({'activation': 'clamped_swiglu', 'gated': False}, r'mlp\.gated=False does not go .*: set it to True'),
  ({'activation': 'clamped_swiglu'}, r'mlp\.limit=None: .* takes a positive number'),
  ({'activation': 'clamped_swiglu', 'limit': -1.0}, r'mlp\.limit=-1\.0: .* takes a positive number'),
  ({'limit': 7.0}, r"mlp\.limit=7\.0: activation='silu' takes no limit"),
  ({'gated': False, 'gate_scale': 0.5}, r'mlp\.gate_scale=0\.5 has no gate'),
])
def test_what_has_no_meaning_is_refused(change, message):
  with pytest.raises(ValueError, match=message) as error:
    MlpSpec(**{'d_ff': 8, **change}).check('model.pattern[0].mlp')
  assert '\n' not in str(error.value)
