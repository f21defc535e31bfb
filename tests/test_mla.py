"""Latent attention: by definition, packed against alone, its cache, values of another width in every kernel, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import named_leaves
from maxlm.layers.mla import LatentCache, MlaSpec
from maxlm.layers.rope import RopeSpec, YarnScaling, rope_table
from maxlm.layers.rows import Past, Rows, rope_key
from maxlm.ops import attention as ops
from maxlm.sharding import spec as shard
from tests.modules import NORM, assert_close, perturbed, values_and_gradients

D, T = 16, 20
YARN = RopeSpec(theta=100.0, interleaved=True, scaling=YarnScaling(factor=4.0, original_length=16, amplitude=1.1))
SPECS = {
  'deepseek': MlaSpec(n_heads=4, q_rank=12, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=9, rope=YARN, scale=0.4, norm_eps=1e-3,
                      bias=True),
  'kimi linear': MlaSpec(n_heads=4, q_rank=None, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8, rope=None),
  'halves': MlaSpec(n_heads=2, q_rank=8, kv_rank=12, nope_dim=4, rope_dim=6, v_dim=4, rope=RopeSpec(theta=100.0)),
}
every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)

LENGTHS = 9, 1, 7  # documents of the first row; then padding


def example(B=2, seed=0):
  """x, segment_ids and positions of packed rows: the first as above, others of one document."""
  x = np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)
  ids, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
  ids[0] = np.repeat([1, 2, 3, 0], (*LENGTHS, T - sum(LENGTHS)))
  positions[0] = np.concatenate([np.arange(n) for n in (*LENGTHS, T - sum(LENGTHS))])
  return x, ids, positions


def rows_for(spec, ids, positions, kernel='chunked'):
  ids, positions = jax.device_put(ids, shard('BT')), jax.device_put(positions, shard('BT'))
  tables = {} if spec.rope is None else {rope_key(spec.rope, spec.rope_dim): rope_table(positions, spec.rope, spec.rope_dim)}
  return Rows(ids, positions, tables, kernel, NORM)


def apply(spec, kernel='chunked'):
  return lambda mla, x, ids, positions: mla(spec, x, rows_for(spec, ids, positions, kernel))


def outputs(spec, mla, x, ids, positions):
  return np.asarray(jax.jit(apply(spec))(mla, jax.device_put(x, shard('BTD')), ids, positions))


def by_definition(spec, w, x, ids, positions):
  """The layer in float64, a query of a head at a time."""
  w = {name: np.asarray(value, np.float64) for name, value in w.items()}

  def bias(name):
    return w[name] if spec.bias else 0

  def norm(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * scale

  def rotated(x, position):
    if spec.rope is None:
      return x
    R = spec.rope_dim
    turn = 1 / spec.rope.theta ** (np.arange(0, R, 2) / R)
    cos, sin = np.cos(turn * position), np.sin(turn * position)
    if spec.rope.scaling is not None:  # tests/test_layers.py has the definition
      cos, sin = (np.asarray(t, np.float64)[0, 0, 0] for t in rope_table(np.array([[position]]), spec.rope, R))
    pairs = [(2 * i, 2 * i + 1) if spec.rope.interleaved else (i, i + R // 2) for i in range(R // 2)]
    y = np.zeros(R)
    for i, (a, b) in enumerate(pairs):
      y[a], y[b] = x[a] * cos[i] - x[b] * sin[i], x[b] * cos[i] + x[a] * sin[i]
    return y

  y = np.zeros(x.shape)
  for b in range(x.shape[0]):
    latent = norm(x[b] @ w['w_kv_down_DR'] + bias('b_kv_down_R'), w['kv_norm.scale_D'])
    k_rope = [rotated(k, p) for k, p in zip(x[b] @ w['w_k_rope_DH'] + bias('b_k_rope_H'), positions[b])]
    q_in = x[b] if spec.q_rank is None else norm(x[b] @ w['w_q_down_DR'] + bias('b_q_down_R'), w['q_norm.scale_D'])
    w_q = w['w_q_DNH' if spec.q_rank is None else 'w_q_up_DNH']
    for t, n in np.ndindex(x.shape[1], spec.n_heads):
      q = q_in[t] @ w_q[:, n]
      q_rope = rotated(q[spec.nope_dim:], positions[b, t])
      seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t]]
      scale = spec.scale or (spec.nope_dim + spec.rope_dim) ** -0.5
      scores = [scale * (q[:spec.nope_dim] @ (latent[s] @ w['w_k_up_DNH'][:, n]) + q_rope @ k_rope[s]) for s in seen]
      p = np.exp(scores) / np.exp(scores).sum()
      y[b, t] += sum(p * latent[s] @ w['w_v_up_DNH'][:, n] for p, s in zip(p, seen)) @ w['w_o_NHD'][n]
  return y + bias('b_o_D')


@every_spec
def test_the_output_is_the_definition(mesh_of, spec):
  spec.check('here')
  x, ids, positions = example()
  with mesh_of(1):
    mla = perturbed(spec, D)
    y = outputs(spec, mla, x, ids, positions)
  expected = by_definition(spec, named_leaves(mla), x.astype(np.float64), ids, positions)
  np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max(), rtol=0)


@every_spec
def test_a_packed_document_has_the_outputs_and_gradients_it_has_alone(mesh_of, spec):
  """Three documents in one row, and each in its own; gradients by weights are sums over rows."""
  x, ids, positions = (part[:1] for part in example())
  starts = np.cumsum((0, *LENGTHS))
  factors = np.random.default_rng(1).normal(size=x.shape).astype(np.float32) * (ids > 0)[..., None]
  alone_x, alone_factors = np.zeros((2, 3, T, D), np.float32)
  for row, (start, stop) in enumerate(zip(starts, starts[1:])):
    alone_x[row, :stop - start], alone_factors[row, :stop - start] = x[0, start:stop], factors[0, start:stop]
  alone_ids = (np.arange(T) < np.array(LENGTHS)[:, None]).astype(np.int32)
  alone_positions = np.tile(np.arange(T, dtype=np.int32), (3, 1))
  with mesh_of(1):
    mla = perturbed(spec, D)
    together = values_and_gradients(apply(spec), mla, x, ids, positions, factors=factors)
    apart = values_and_gradients(apply(spec), mla, alone_x, alone_ids, alone_positions, factors=alone_factors)
  for name in ('y', 'x'):
    together[name], apart[name] = together[name][ids > 0], apart[name][alone_ids > 0]
  assert_close(together, apart, 3e-6)


@every_spec
@pytest.mark.parametrize('pieces', [(T,), (9, 4, *[1] * 7)], ids=str)
def test_decoding_in_pieces_with_the_cache_equals_the_full_forward(mesh_of, spec, pieces):
  """A row that is padded on the left beside one that is not; columns past the present hold garbage."""
  x, ids, positions = example()
  ids[0], positions[0] = np.arange(T) >= 6, np.maximum(np.arange(T) - 6, 0)
  with mesh_of(1):
    mla = perturbed(spec, D)
    full = outputs(spec, mla, x, ids, positions)
    cache = jax.tree.map(lambda a: a + 7, spec.empty_cache(2, T + 3, np.float32))
    cached_ids = jnp.asarray(np.pad(ids, ((0, 0), (0, 3)), constant_values=1))

    @jax.jit
    def extend(mla, x, ids, positions, cache, column):
      return mla.extend(spec, x, rows_for(spec, ids, positions), cache, Past(cached_ids, column))

    got, column = [], 0
    for piece in pieces:
      at = slice(column, column + piece)
      x_new = jax.device_put(x[:, at], shard('BTD'))
      y, cache = extend(mla, x_new, ids[:, at], positions[:, at], cache, jnp.asarray(column))
      got.append(np.asarray(y))
      column += piece
  assert cache.latent_BMR.shape == (2, T + 3, spec.kv_rank + spec.rope_dim)  # nothing a head
  np.testing.assert_allclose(np.concatenate(got, axis=1)[ids > 0], full[ids > 0], atol=3e-6 * np.abs(full).max(), rtol=0)


@pytest.mark.parametrize('name', ['deepseek', 'kimi linear'])
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, name):
  spec, arrays = SPECS[name], example(B=8)
  with mesh_of(1):
    one = values_and_gradients(apply(spec), perturbed(spec, D), *arrays)
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    assert_close(values_and_gradients(apply(spec), perturbed(spec, D), *arrays), one, 3e-6)


def test_the_cache_is_right_on_a_mesh(mesh_of):
  spec, (x, ids, positions) = SPECS['deepseek'], example(B=8)

  def extend(mla, x):
    cache = spec.empty_cache(8, T, np.float32)
    return mla.extend(spec, x, rows_for(spec, ids, positions), cache, Past(jax.device_put(ids, shard('BM')), jnp.asarray(0)))

  with mesh_of(1):
    y, cache = jax.device_get(jax.jit(extend)(perturbed(spec, D), jax.device_put(x, shard('BTD'))))
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    y_many, cache_many = jax.device_get(jax.jit(extend)(perturbed(spec, D), jax.device_put(x, shard('BTD'))))
  np.testing.assert_allclose(y_many, y, atol=2e-6 * np.abs(y).max())
  np.testing.assert_allclose(cache_many.latent_BMR, cache.latent_BMR, atol=2e-6)
  assert isinstance(cache_many, LatentCache)


@pytest.mark.parametrize('kernel, length, v_dim', [('chunked', 45, 24), ('chunked', 45, 8), ('splash', 256, 8)])
def test_kernels_take_values_of_another_width_than_keys(mesh_of, monkeypatch, kernel, length, v_dim):
  """As `ops.attention` is called here: a key and a value for each head."""
  for name, value in (('UNROLLED_CHUNKS', 3), ('SHORTEST_CHUNK', 8), ('SCAN_ROWS', 16)):
    monkeypatch.setattr(ops, name, value)
  rng = np.random.default_rng(0)
  q, k, v, factors = (rng.normal(size=(2, length, 2, H)).astype(np.float32) for H in (16, 16, v_dim, v_dim))
  segments = np.sort(rng.integers(1, 4, (2, length)), axis=1).astype(np.int32)

  def run(kernel):
    @jax.jit
    def out_and_gradients(q, k, v, segments, factors):
      attend = functools.partial(ops.attention, segment_ids_BT=segments, scale=0.3, kernel=kernel, interpret=True)
      out, pull = jax.vjp(attend, q, k, v)
      return dict(zip(('out', *'qkv'), (out, *pull(factors))))

    arrays = ((x, 'BTNH') for x in (q, k, v)), ((segments, 'BT'), (factors, 'BTNH'))
    return jax.device_get(out_and_gradients(*(jax.device_put(x, shard(dims)) for part in arrays for x, dims in part)))

  with mesh_of(1):
    assert_close(run(kernel), run('reference'), 2e-5 if kernel == 'splash' else 3e-6)


def test_bf16_stays_near_fp32(mesh_of):
  spec, (x, ids, positions) = SPECS['deepseek'], example()
  x = x.astype(jnp.bfloat16)
  with mesh_of(1):
    mla = perturbed(spec, D)
    assert jax.eval_shape(apply(spec), mla, jax.device_put(x, shard('BTD')), ids, positions).dtype == jnp.bfloat16
    assert_close(values_and_gradients(apply(spec), mla, x, ids, positions),
                 values_and_gradients(apply(spec), mla, x.astype(np.float32), ids, positions), 0.03)


@every_spec
def test_matmul_params_are_the_sizes_of_the_matrices(mesh_of, spec):
  with mesh_of(1):
    leaves = named_leaves(perturbed(spec, D))
  assert spec.matmul_params(D) == sum(leaf.size for name, leaf in leaves.items() if name.startswith('w_'))


def test_mixing_flops_are_those_of_scores_and_values():
  spec = SPECS['deepseek']
  assert spec.mixing_flops(100, lambda window: {None: 50}[window]) == 2 * 4 * 50 * (6 + 4) + 2 * 4 * 50 * 9


@pytest.mark.parametrize('change, message', [
  ({'n_heads': 0}, r'mixer\.n_heads=0 must be'), ({'q_rank': 0}, r'mixer\.q_rank=0 must be'),
  ({'v_dim': -1}, r'mixer\.v_dim=-1 must be'), ({'rope_dim': 3}, r'mixer\.rope.*even')])
def test_what_has_no_meaning_is_refused(change, message):
  with pytest.raises(ValueError, match=message) as error:
    dataclasses.replace(SPECS['deepseek'], **change).check('model.pattern[0].mixer')
  assert '\n' not in str(error.value)
