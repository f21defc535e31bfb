"""Recurrent mixers: by definition, packed as alone, decoding as the full pass, meshes, bf16, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec, slopes
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.rows import Past, Rows
from maxlm.ops import delta, ssd
from maxlm.sharding import spec as shard
from tests.modules import NORM, assert_close, values_and_gradients

D = 8
GROUPED = dict(n_heads=4, head_dim=6, state_dim=5, n_groups=2)
SPECS = {
  'mamba2': Mamba2Spec(**GROUPED),
  'nemotron_h': Mamba2Spec(**GROUPED, dt_min=0.3, dt_max=0.6),
  'falcon_h1': Mamba2Spec(**GROUPED, norm='none', conv_bias=False, in_scales=(0.5, 0.6, 1.7, 1.8, 0.9), out_scale=1.3),
  'falcon_h1 norm': Mamba2Spec(**GROUPED, norm='norm_first', conv_width=2),
  'qwen3_next': DeltaSpec(n_heads=4, n_key_heads=2, head_dim=6, key_dim=5),
  'olmo_hybrid': DeltaSpec(n_heads=2, n_key_heads=2, head_dim=6, key_dim=5, negative_eigenvalues=True, norm_eps=0.1),
  'kimi_linear': DeltaSpec(n_heads=4, n_key_heads=2, head_dim=6, key_dim=5, decay='channel'),
  'minimax': LightningSpec(n_heads=4, head_dim=6),
}
every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=list(SPECS))
one_of_a_kind = pytest.mark.parametrize('spec', [SPECS[name] for name in ('mamba2', 'qwen3_next', 'kimi_linear', 'minimax')],
                                        ids=['mamba2', 'qwen3_next', 'kimi_linear', 'minimax'])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Chunks so short that a few dozen tokens are several."""
  monkeypatch.setattr(ssd, 'CHUNK', 8)
  monkeypatch.setattr(delta, 'CHUNK', 8)


def example(batch, length, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, length, D)).astype(np.float32)


def module_of(spec):
  """The spec's module with random weights: factors are not 1, biases not 0, and decays neither all nor nothing."""
  rng = np.random.default_rng(0)

  def draw(path, w):
    name, normal = jax.tree_util.keystr(path), rng.normal(size=w.shape)
    if 'decay_N' in name:
      value = 0.3 * np.abs(normal)
    else:
      value = ('scale' in name or 'skip' in name) + 0.4 * normal
    return jax.device_put(value.astype(np.float32), w.sharding.spec)

  return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: spec.build(D, NORM, nnx.Rngs(0))))


def rows_of(segment_ids):
  ids_BT = jax.reshard(jnp.asarray(segment_ids, jnp.int32), shard('BT'))
  return Rows(segment_ids_BT=ids_BT, positions_BT=None, rope={}, kernel='chunked', norm=NORM)


def apply(spec):
  return lambda module, x_BTD, segment_ids: module(spec, x_BTD, rows_of(segment_ids))


# -- by definition: one document in float64, token by token, with the formulas of the papers -------------------------------


def silu(x):
  return x / (1 + np.exp(-x))


def softplus(x):
  return np.log1p(np.exp(x))


def conv(x, w, bias=0.0):
  """SiLU of a causal convolution: x [T, …], w [W, …]."""
  W = len(w)
  return np.stack([silu(sum(w[W - 1 - lag] * x[t - lag] for lag in range(min(W, t + 1))) + bias) for t in range(len(x))])


def rms(x, axes, eps):
  return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps)


def mamba2(spec, w, x):
  """Dao & Gu 2024: discretised state space, section 2; the block, section 7."""
  z, xs, b, c, dt = (np.tensordot(x, w[f'w_{name}'], 1) * scale
                     for name, scale in zip(('z_DNH', 'x_DNH', 'b_DKQ', 'c_DKQ', 'dt_DN'), spec.in_scales))
  xs, b, c = (conv(a, w[f'conv_{name}'], w.get(f'b_conv_{name.replace("W", "")}', 0.0))
              for a, name in ((xs, 'x_WNH'), (b, 'b_WKQ'), (c, 'c_WKQ')))
  dt = np.clip(softplus(dt + w['dt_bias_N']), spec.dt_min, spec.dt_max or np.inf)
  heads, y = spec.n_heads // spec.n_groups, np.zeros(xs.shape)
  for n in range(spec.n_heads):
    state = np.zeros((spec.head_dim, spec.state_dim))
    for t in range(len(x)):
      state = np.exp(-np.exp(w['a_log_N'][n]) * dt[t, n]) * state + dt[t, n] * np.outer(xs[t, n], b[t, n // heads])
      y[t, n] = state @ c[t, n // heads] + w['skip_N'][n] * xs[t, n]
  if spec.norm != 'norm_first':
    y = y * silu(z)
  if spec.norm != 'none':
    y = rms(y.reshape(len(x), spec.n_groups, -1), 2, NORM.eps).reshape(y.shape) * w['norm_scale_NH']
  if spec.norm == 'norm_first':
    y = y * silu(z)
  return np.tensordot(y, w['w_o_NHD'], 2) * spec.out_scale


def gated_delta(spec, w, x):
  """Yang et al. 2024, equation 10; Kimi Team 2025, equation 1 and section 4."""
  q, k, v = (conv(np.tensordot(x, w[f'w_{name}'], 1), w[f'conv_{name.replace("D", "W")}'])
             for name in ('q_DKQ', 'k_DKQ', 'v_DNH'))
  q, k = (a / np.sqrt(np.sum(a**2, axis=-1, keepdims=True) + 1e-6) for a in (q, k))
  beta = (2 if spec.negative_eigenvalues else 1) / (1 + np.exp(-x @ w['w_beta_DN']))
  if spec.decay == 'head':
    alpha = np.exp(-np.exp(w['a_log_N']) * softplus(x @ w['w_decay_DN'] + w['dt_bias_N']))
    alpha, gate = np.repeat(alpha[..., None], spec.key_dim, axis=-1), silu(np.tensordot(x, w['w_gate_DNH'], 1))
  else:
    a = np.tensordot(x @ w['w_decay_down_DR'], w['w_decay_up_RNQ'], 1)
    alpha = np.exp(-np.exp(w['a_log_N'])[:, None] * softplus(a + w['dt_bias_NQ']))
    gate = 1 / (1 + np.exp(-np.tensordot(x @ w['w_gate_down_DR'], w['w_gate_up_RNH'], 1)))
  heads, y = spec.n_heads // spec.n_key_heads, np.zeros(v.shape)
  for n in range(spec.n_heads):
    state = np.zeros((spec.key_dim, spec.head_dim))
    for t in range(len(x)):
      key, b = k[t, n // heads], beta[t, n]
      state = (np.eye(spec.key_dim) - b * np.outer(key, key)) @ np.diag(alpha[t, n]) @ state + b * np.outer(key, v[t, n])
      y[t, n] = state.T @ q[t, n // heads] / np.sqrt(spec.key_dim)
  return np.tensordot(rms(y, 2, spec.norm_eps or NORM.eps) * w['out_norm.scale_D'] * gate, w['w_o_NHD'], 2)


def lightning(spec, w, x):
  """MiniMax 2025, section 2.2: linear attention, decays in the mask, then norm and gate."""
  q, k, v = (silu(np.tensordot(x, w[f'w_{name}_DNH'], 1)) for name in 'qkv')
  t, s = np.mgrid[:len(x), :len(x)]
  mask = np.where(s <= t, np.exp(-w['decay_N'][:, None, None] * (t - s)), 0)
  y = np.einsum('nts,tnh,snh,snj->tnj', mask, q, k, v)
  scale = w['out_norm.scale_D'].reshape(y.shape[1:])
  gate = 1 / (1 + np.exp(-np.tensordot(x, w['w_gate_DNH'], 1)))
  return np.tensordot(rms(y, (1, 2), 1e-6) * scale * gate, w['w_o_NHD'], 2)


DEFINITIONS = {Mamba2Spec: mamba2, DeltaSpec: gated_delta, LightningSpec: lightning}


def weights_of(module):
  """{'out_norm.scale_D': float64 array, …}."""
  return {jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value'): np.asarray(w, np.float64)
          for path, w in jax.tree_util.tree_leaves_with_path(module)}


@every_spec
def test_the_output_is_the_definition(mesh_of, spec):
  spec.check('here')
  x = example(1, 21)
  with mesh_of(1):
    module = module_of(spec)
    y = jax.jit(apply(spec))(module, jax.device_put(x, shard('BTD')), np.ones((1, 21)))
    weights = weights_of(module)
  expected = DEFINITIONS[type(spec)](spec, weights, x[0].astype(np.float64))
  np.testing.assert_allclose(y[0], expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


# -- documents -------------------------------------------------------------------------------------------------------------


@one_of_a_kind
def test_a_document_has_the_outputs_and_gradients_that_it_has_alone(mesh_of, spec):
  """Three documents, one of them a token, with padding between; the gradients of weights are the sums of theirs."""
  T, x, w = 24, example(1, 24), example(1, 24, seed=1)
  ids = np.repeat([[1, 2, 0, 3]], [9, 1, 3, 11], axis=1)

  def loss(module, x, w, ids):
    y = apply(spec)(module, x, ids)
    return jnp.sum(y * w), y

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  with mesh_of(1):
    module = module_of(spec)
    place = lambda *arrays: [jax.device_put(a, shard('BTD')) for a in arrays]
    (_, y), (packed, by_x) = run(module, *place(x, w * (ids > 0)[..., None]), ids)
    assert not by_x[:, 10:13].any()
    sums = dict.fromkeys(weights_of(packed), 0)
    for at in (slice(0, 9), slice(9, 10), slice(13, 24)):
      n = at.stop - at.start
      move = lambda a, at=at, n=n: np.concatenate([a[:, at], np.zeros((1, T - n, D), np.float32)], axis=1)
      (_, y_alone), (alone, by_x_alone) = run(module, *place(move(x), move(w)), (np.arange(T) < n)[None].astype(ids.dtype))
      for name, together, by_itself in ('y', y, y_alone), ('x', by_x, by_x_alone):
        np.testing.assert_allclose(together[:, at], by_itself[:, :n], atol=3e-6 * np.abs(together).max(), err_msg=name)
      sums = {name: sums[name] + value for name, value in weights_of(alone).items()}
  assert_close(weights_of(packed), sums, 1e-5, without_gradient=['decay_N'])


@one_of_a_kind
def test_a_token_moves_those_after_it_in_its_document_and_no_other_by_a_single_bit(mesh_of, spec):
  """One row of the batch a perturbed token, and one with none."""
  T = 21
  ids = np.repeat([[2, 0, 3, 1]], [3, 8, 1, 9], axis=1)
  x = np.repeat(example(1, T), T + 1, axis=0)
  tokens = np.arange(T)
  x[tokens, tokens] += 1
  with mesh_of(1):
    y = jax.jit(apply(spec))(module_of(spec), jax.device_put(x, shard('BTD')), np.repeat(ids, T + 1, axis=0))
  moved = np.asarray(y[:-1] != y[-1:]).any(axis=2)
  np.testing.assert_array_equal(moved, (tokens[:, None] <= tokens) & (ids[0][:, None] == ids[0]))


# -- decoding --------------------------------------------------------------------------------------------------------------


@one_of_a_kind
def test_extending_in_pieces_is_the_full_pass(mesh_of, spec):
  """Rows with left padding of several lengths, and one of several documents. What an old cache holds does not matter."""
  T, M = 14, 17
  ids = np.ones((4, M), np.int32)
  ids[1, :2], ids[2, :9], ids[3, :T] = 0, 0, np.repeat([0, 1, 2, 3], [2, 6, 1, 5])
  x = example(4, T)
  with mesh_of(1):
    module = module_of(spec)
    full = jax.jit(apply(spec))(module, jax.device_put(x, shard('BTD')), ids[:, :T])
    ids_BM = jax.device_put(ids, shard('BM'))

    @jax.jit
    def extend(x_BTD, cache, column):
      now = jax.lax.dynamic_slice_in_dim(ids_BM, column, x_BTD.shape[1], axis=1)
      return module.extend(spec, x_BTD, rows_of(now), cache, Past(ids_BM, column))

    for lengths in ((9, 1, 1, 1, 1, 1), (1, 4, 9), (4, 1, 9), (14,)):
      cache, at, ys = jax.tree.map(lambda a: a + 1, spec.empty_cache(4, M, jnp.float32)), 0, []
      for length in lengths:
        y, after = extend(jax.device_put(x[:, at:at + length], shard('BTD')), cache, jnp.int32(at))
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, cache)  # so that a loop can carry it
        at, cache = at + length, after
        ys.append(y)
      np.testing.assert_allclose(np.concatenate(ys, axis=1), full, atol=3e-6 * np.abs(full).max(), rtol=0)


@one_of_a_kind
def test_every_mesh_decodes_as_one_device_and_in_bf16_too(mesh_of, spec):
  def decode(dtype):
    module, x = module_of(spec), example(8, 5).astype(dtype)
    ids_BM = jax.device_put(np.repeat([[0, 1]], [1, 4], axis=1).repeat(8, axis=0).astype(np.int32), shard('BM'))
    cache, ys = spec.empty_cache(8, 5, dtype), []
    extend = jax.jit(lambda module, x, ids, cache, past: module.extend(spec, x, rows_of(ids), cache, past))
    for t in range(5):
      x_BTD = jax.device_put(x[:, t:t + 1], shard('BTD'))
      y, cache = extend(module, x_BTD, ids_BM[:, t:t + 1], cache, Past(ids_BM, jnp.int32(t)))
      ys.append(np.asarray(y, np.float32))
    return np.concatenate(ys, axis=1)

  with mesh_of(1):
    one = decode(jnp.float32)
    half = decode(jnp.bfloat16)
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    np.testing.assert_allclose(decode(jnp.float32), one, atol=2e-6 * np.abs(one).max(), rtol=0)
  np.testing.assert_allclose(half, one, atol=0.03 * np.abs(one).max(), rtol=0)


# -- meshes and types ------------------------------------------------------------------------------------------------------


@one_of_a_kind
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, spec):
  x, ids = example(8, 14), np.repeat([[0, 1, 2]], [2, 5, 7], axis=1).repeat(8, axis=0)
  with mesh_of(1):
    one = values_and_gradients(apply(spec), module_of(spec), x, ids)
  with mesh_of(data=2, fsdp=2, tensor=2):
    assert_close(values_and_gradients(apply(spec), module_of(spec), x, ids), one, 3e-6, without_gradient=['decay_N'])


@one_of_a_kind
def test_bf16_activations_stay_close_to_fp32_with_decays_and_states_in_fp32(mesh_of, spec):
  x, ids = example(2, 40), np.ones((2, 40))
  half = x.astype(jnp.bfloat16)
  with mesh_of(1):
    module = module_of(spec)
    y, expected = (np.asarray(jax.jit(apply(spec))(module, jax.device_put(a, shard('BTD')), ids)) for a in (half, x))
    program = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(apply(spec)(module, x, ids).astype(jnp.float32))))(
      jax.device_put(half, shard('BTD')))
  assert y.dtype == jnp.bfloat16
  assert np.linalg.norm(y.astype(np.float32) - expected) < 4 * 2**-8 * np.linalg.norm(expected)  # a few roundings of 2**-9
  in_islands = [e for island in equations(program.jaxpr) if island.primitive.name == 'shard_map'
                for e in equations(island.params['jaxpr'])]
  kinds = {'exp', 'cumsum', 'dot_general', 'scan'}
  assert kinds <= {e.primitive.name for e in in_islands}
  for e in in_islands:
    if e.primitive.name in kinds | {'triangular_solve'}:
      assert {v.aval.dtype for v in e.outvars} <= {np.dtype(np.float32), np.dtype(np.int32)}, e


def equations(jaxpr):
  """All equations of a program, those of its inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


# -- specs and weights -----------------------------------------------------------------------------------------------------


@every_spec
def test_weights_that_multiply_activations_are_counted(mesh_of, spec):
  with mesh_of(1):
    weights = weights_of(module_of(spec))
  assert spec.matmul_params(D) == sum(w.size for name, w in weights.items() if name.startswith(('w_', 'conv_')))


def test_mixing_flops_are_those_of_the_definition():
  """A multiply-add is 2: a state of 5 x 6 is written and read by each of 4 heads, and read once more by the delta rule."""
  assert SPECS['mamba2'].mixing_flops(10, None) == 10 * 4 * (5 * 6) * 2 * 2
  assert SPECS['kimi_linear'].mixing_flops(10, None) == 10 * 4 * (5 * 6) * 2 * 3
  assert SPECS['minimax'].mixing_flops(10, None) == 10 * 4 * (6 * 6) * 2 * 2


@pytest.mark.parametrize('name', ['kimi_linear', 'minimax'])
def test_fresh_weights_do_not_depend_on_the_mesh_and_can_be_stacked(mesh_of, name):
  def build():
    keys = jax.random.split(jax.random.key(0), 3)
    return weights_of(jax.jit(jax.vmap(lambda key: SPECS[name].build(D, NORM, nnx.Rngs(key))))(keys))

  with mesh_of(1):
    one = build()
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    for name, w in build().items():
      np.testing.assert_array_equal(w, one[name], err_msg=name)
      assert len(w) == 3 and np.isfinite(w).all()
  if 'a_log_N' in one:
    a, dt = np.exp(one['a_log_N']), softplus(one['dt_bias_NQ'])
    assert 1 <= a.min() and a.max() <= 16 and a.std() > 1
    assert 0.999e-3 <= dt.min() and dt.max() <= 0.1001 and dt.std() > 1e-3


def test_slopes_are_halved_from_head_to_head_and_less_in_later_layers():
  np.testing.assert_allclose(slopes(8, 0, 4), 0.5 ** np.arange(1, 9), rtol=2e-5)
  np.testing.assert_allclose(slopes(8, 1, 4), 0.5 ** np.arange(1, 9) * (2 / 3), rtol=3e-5)
  np.testing.assert_allclose(slopes(64, 3, 4)[[0, -1]], 1e-5 * 2.0 ** np.array([-1 / 8, -8]), rtol=0.4)


@pytest.mark.parametrize('spec, message', [
  (Mamba2Spec(n_heads=4, head_dim=0, state_dim=5), r'head_dim=0 must be at least 1'),
  (Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, n_groups=3), r'n_heads=4 is not a multiple of n_groups=3'),
  (Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, dt_min=0.1, dt_max=0.1), r'dt_max=0.1 must be more than dt_min=0.1'),
  (Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, dt_min=-0.1), r'dt_min=-0.1'),
  (Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, norm='rms'), r"norm='rms' is none of gate_first, norm_first, none"),
  (DeltaSpec(n_heads=4, n_key_heads=3, head_dim=6, key_dim=5), r'n_heads=4 is not a multiple of n_key_heads=3'),
  (DeltaSpec(n_heads=4, n_key_heads=2, head_dim=6, key_dim=5, conv_width=0), r'conv_width=0 must be at least 1'),
  (DeltaSpec(n_heads=4, n_key_heads=2, head_dim=6, key_dim=5, decay='token'), r"decay='token' is none of head, channel"),
  (LightningSpec(n_heads=0, head_dim=6), r'n_heads=0 must be at least 1'),
])
def test_a_spec_without_meaning_is_refused_in_one_line(spec, message):
  with pytest.raises(ValueError, match=message) as error:
    spec.check('model.pattern[0].mixer')
  assert str(error.value).startswith('model.pattern[0].mixer') and '\n' not in str(error.value)
