"""Rows split over devices: the order of chunks, who sees whom, values and every gradient as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from maxlm.config import describe, validate
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.layers.rope import RopeSpec, rope_table
from maxlm.layers.rows import Rows, rope_key
from maxlm.models.decoder import DecoderConfig, LayerSpec, ropes
from maxlm.ops import attention as ops
from maxlm.ops import context, delta, splash, ssd
from maxlm.ops.tiles import Tiles
from maxlm.sharding import MeshConfig
from maxlm.sharding import spec as shard
from tests import models
from tests.modules import NORM, assert_close, perturbed, values_and_gradients
from tests.rows import random_batch

D = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks and chunks so short that a few dozen tokens are several."""
  monkeypatch.setattr(ops, 'UNROLLED_CHUNKS', 3)
  monkeypatch.setattr(ops, 'SHORTEST_CHUNK', 8)
  monkeypatch.setattr(ops, 'SCAN_ROWS', 16)
  monkeypatch.setattr(ssd, 'CHUNK', 4)
  monkeypatch.setattr(delta, 'CHUNK', 4)
  monkeypatch.setattr(splash, 'tiles_for', lambda *_: Tiles((128, 128), (128, 128), (128, 128), 128))


def order_of(T, X):
  """Indices of a row in the order in which X devices hold it: device i has chunks i and 2X - 1 - i."""
  chunks = np.arange(T).reshape(2 * X, -1)
  return np.concatenate([chunks[j] for i in range(X) for j in (i, 2 * X - 1 - i)])


def documents(B, T, seed=0):
  """Some documents a row, one of them over several chunks, and padding at the end."""
  ids = np.sort(np.random.default_rng(seed).integers(1, 4, (B, T)), axis=1).astype(np.int32)
  ids[0, T // 8:T - T // 6] = 2
  ids[:, T - T // 10:] = 0
  return ids


# -- order -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('X', [1, 2, 4, 8])
def test_zigzag_order_is_that_of_the_chunks_and_is_undone(mesh_of, X):
  x = np.arange(96, dtype=np.int32).reshape(2, 48)
  with mesh_of(context=X):
    placed = jax.device_put(x, shard('BT'))
    mixed = jax.jit(context.to_zigzag)(placed)
    np.testing.assert_array_equal(mixed, x[:, order_of(48, X)])
    np.testing.assert_array_equal(jax.jit(context.to_natural)(mixed), x)
    if X == 1:
      assert context.to_zigzag(placed) is placed and context.to_natural(placed) is placed


def test_what_is_gathered_is_in_the_order_of_the_text_and_halos_are_what_was_before(mesh_of):
  X, T = 4, 48
  x = np.arange(T, dtype=np.int32)[None] + 1
  with mesh_of(context=X):
    def island(x_BT):
      return context.gathered(x_BT)[None], context.with_halo(x_BT, 3, missing=-7)[None], context.index(x_BT.shape[1])

    split = jax.shard_map(island, in_specs=shard('BT'), out_specs=(shard('TBM'), shard('TBM'), shard('T')))
    whole, halo, index = jax.jit(split)(jax.device_put(x[:, order_of(T, X)], shard('BT')))
  np.testing.assert_array_equal(whole[:, 0], np.repeat(x, X, axis=0))
  np.testing.assert_array_equal(index, order_of(T, X))
  padded = np.concatenate([[-7] * 3, x[0]])
  expected = [padded[j * 6:j * 6 + 9] for i in range(X) for j in (i, 2 * X - 1 - i)]
  np.testing.assert_array_equal(halo.reshape(2 * X, -1), expected)


# -- attention -------------------------------------------------------------------------------------------------------------


def example(B, T, N=4, K=2, H=4, seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
  return q, k, v, documents(B, T, seed), rng.normal(size=N).astype(np.float32)


def attend(X, q, k, v, segments, sinks, **options):
  """Attention of rows in the order of the text, on the current mesh."""
  to, back = order_of(q.shape[1], X), np.argsort(order_of(q.shape[1], X))
  place = lambda x, dims: jax.device_put(x, shard(dims))

  def run(q, k, v, segments, sinks):
    return ops.attention(q, k, v, segments, sinks_N=sinks, **{'scale': 0.3, 'interpret': True, **options})

  weights = place(np.random.default_rng(1).normal(size=q.shape).astype(np.float32)[:, to], 'BTNH')

  def loss(q, k, v, segments, sinks):
    out = run(q, k, v, segments, sinks)
    return jnp.sum(out * weights), out

  (_, out), (dq, dk, dv, dsinks) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 4), has_aux=True))(
    *(place(x[:, to], dims) for x, dims in ((q, 'BTNH'), (k, 'BSKH'), (v, 'BSKH'), (segments, 'BT'))), place(sinks, 'N'))
  natural = {name: np.asarray(x)[:, back] for name, x in dict(out=out, q=dq, k=dk, v=dv).items()}
  return natural | {'sinks': np.asarray(dsinks)}


@pytest.mark.parametrize('window', [None, 1, 5, 20])
@pytest.mark.parametrize('X', [2, 4])
def test_output_i_moves_with_key_j_if_and_only_if_i_sees_j(mesh_of, X, window):
  """One row of the batch a perturbed key, and one with none. Chunks are of 12 and 6 tokens: windows shorter and longer."""
  T = 48
  q, k, v, _, _ = example(1, T, N=1, K=1)
  q, k, v = (np.repeat(x, T + 1, axis=0) for x in (q, k, v))
  k[np.arange(T), np.arange(T)] += 1
  v[np.arange(T), np.arange(T)] += 3
  order = order_of(T, X)
  i, j = np.mgrid[:T, :T]
  near = (j <= i) & (window is None or i - j < (window or 0))
  with mesh_of(context=X):
    run = jax.jit(functools.partial(ops.attention, scale=0.3, window=window))
    place = lambda x, dims: jax.device_put(x[:, order], shard(dims))
    for ids in (documents(1, T), np.ones((1, T), np.int32)):
      out = run(place(q, 'BTNH'), place(k, 'BSKH'), place(v, 'BSKH'), place(np.repeat(ids, T + 1, axis=0), 'BT'))
      out = np.asarray(out)[:, np.argsort(order)]
      moved = (np.abs(out[:-1] - out[-1:]) > 1e-5).any(axis=(2, 3))
      np.testing.assert_array_equal(moved, (near & (ids[0][:, None] == ids[0]))[:, np.arange(T)].T)


@pytest.mark.parametrize('kernel', ['chunked', 'reference'])
@pytest.mark.parametrize('options', [dict(), dict(window=5, softcap=2.0), dict(window=20)], ids=str)
def test_attention_has_the_values_and_gradients_of_one_device(mesh_of, kernel, options):
  arrays = example(2, 80)
  with mesh_of(1):
    one = attend(1, *arrays, kernel='reference', **options)
  for sizes in (dict(context=4), dict(context=2, fsdp=2, tensor=2)):
    with mesh_of(**sizes):
      assert_close(attend(sizes['context'], *arrays, kernel=kernel, **options), one, 3e-6)


@pytest.mark.parametrize('options', [dict(softcap=2.0), dict(window=100)], ids=str)
def test_splash_has_the_values_and_gradients_of_one_device(mesh_of, options):
  """Two chunks of 128 on each of two devices: whole rows of keys with tables of tiles, and a halo."""
  arrays = example(1, 512, N=2, K=1, H=8)
  with mesh_of(1):
    one = attend(1, *arrays, kernel='reference', **options)
  with mesh_of(context=2):
    assert_close(attend(2, *arrays, kernel='splash', **options), one, 2e-5)


@pytest.mark.parametrize('X, chunk, window, tile', [(1, 1024, None, (256, 128)), (2, 256, None, (128, 256)),
                                                    (4, 256, 300, (128, 128))])
def test_tiles_that_are_visited_are_those_that_some_token_sees(X, chunk, window, tile):
  S = 2 * X * chunk if X > 1 else chunk
  runs = tuple(splash._starts(X, chunk, None if X > 1 else 0))
  by_queries, by_keys = (splash.visits(runs, chunk, S, *tile, window, of_keys) for of_keys in (False, True))
  for i, run in enumerate(runs):
    q = np.concatenate([start + np.arange(chunk) for start in run])[:, None]
    sees = (np.arange(S) <= q) & (window is None or q - np.arange(S) < (window or 0))
    sees = sees.reshape(len(q) // tile[0], tile[0], S // tile[1], tile[1]).any(axis=(1, 3))
    visited = [np.zeros_like(sees), np.zeros_like(sees)]
    for at, (tiles, there) in enumerate((by_queries, by_keys)):
      for row, column in zip(*np.nonzero(there[i, 0])):
        met = tiles[i, 0, row, column]
        visited[at][(row, met) if at == 0 else (met, column)] += 1
    np.testing.assert_array_equal(visited[0], sees)
    np.testing.assert_array_equal(visited[1], sees)


def test_every_device_visits_the_same_number_of_tiles():
  _, there = splash.visits(tuple(splash._starts(16, 4096, None)), 4096, 131072, 512, 1024, None, False)
  assert len(set(there.sum(axis=(1, 2, 3)).tolist())) == 1


# -- layers ----------------------------------------------------------------------------------------------------------------

HEADS = dict(n_heads=4, n_kv_heads=2, head_dim=4)
MIXERS = {
  'window, sinks': AttentionSpec(**HEADS, window=5, sinks=True, softcap=5.0),
  'full, gated': AttentionSpec(**HEADS, gate='head', qk_norm='all', rope=RopeSpec(fraction=0.5)),
  'mla': MlaSpec(n_heads=4, q_rank=None, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=3),
  'mamba2': Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, n_groups=2),
  'gated delta': DeltaSpec(n_heads=4, n_key_heads=2, head_dim=6, key_dim=5, negative_eigenvalues=True),
  'kimi delta': DeltaSpec(n_heads=4, n_key_heads=4, head_dim=6, key_dim=5, decay='channel'),
  'lightning': LightningSpec(n_heads=4, head_dim=6),
}


def layer(spec, X, T):
  """apply(module, x) of rows in the order of the text."""
  order = order_of(T, X)

  def apply(module, x_BTD, ids, positions):
    rows = Rows(segment_ids_BT=ids, positions_BT=positions, kernel='chunked', norm=NORM,
                rope={rope_key(*rope): rope_table(positions, *rope) for rope in ropes(spec)})
    return module(spec, x_BTD, rows)

  def run(module, x, ids, factors):
    positions = np.tile(np.arange(T, dtype=np.int32), (len(x), 1))
    placed = (jax.device_put(a[:, order], shard('BT')) for a in (ids, positions))
    results = values_and_gradients(apply, module, x[:, order], *placed, factors=factors[:, order])
    back = np.argsort(order)
    return results | {name: results[name][:, back] for name in 'yx'}

  return run


@pytest.mark.parametrize('name', MIXERS)
def test_a_layer_has_the_values_and_gradients_of_one_device(mesh_of, name):
  spec, T = MIXERS[name], 48
  rng = np.random.default_rng(0)
  x, factors = (rng.normal(size=(2, T, D)).astype(np.float32) for _ in range(2))
  ids = documents(2, T)
  with mesh_of(1):
    one = layer(spec, 1, T)(perturbed(spec, D), x, ids, factors)
  for sizes in (dict(context=4), dict(context=2, fsdp=2, tensor=2)):
    with mesh_of(**sizes):
      many = layer(spec, sizes['context'], T)(perturbed(spec, D), x, ids, factors)
    assert_close(many, one, 1e-5, without_gradient=['decay_N'])


def test_a_hybrid_model_has_the_loss_and_every_gradient_of_one_device(mesh_of):
  mlp = MlpSpec(d_ff=16)
  config = DecoderConfig(vocab_size=32, d_model=16, n_layers=2, pattern=(
    LayerSpec(mixer=ParallelSpec(mixers=(MIXERS['mamba2'], MIXERS['window, sinks'])), mlp=mlp),
    LayerSpec(mixer=AttentionSpec(**HEADS), mlp=MoeSpec(n_experts=4, k=2, experts=mlp))))
  batch = random_batch(np.random.default_rng(0), 4, 32, 32)
  with mesh_of(1):
    loss_one, one = models.gradients(models.perturbed(config), batch, config)
  with mesh_of(context=2, fsdp=2, tensor=2):
    loss_many, many = models.gradients(models.perturbed(config), batch, config)
  assert loss_many == pytest.approx(loss_one, rel=1e-6)
  models.assert_same_gradients(one, many, 2e-5)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('platform, seq_len, message', [
  ('cpu', 250, r'data.seq_len=250 does not divide into 8 chunks \(2 x mesh.context=4\): use a multiple of 8, such as 256'),
  ('tpu', 1536, r"'splash' needs a sequence in multiples of 1024 \(8 chunks .*\), not 1536: use 'chunked'"),
])
def test_rows_that_cannot_be_split_are_refused_in_one_line(platform, seq_len, message):
  config = quickstart.get_config()
  config.mesh, config.data.seq_len = MeshConfig(context=4), seq_len
  with pytest.raises(ValueError, match=message) as error:
    validate(config, platform, 8)
  assert '\n' not in str(error.value)


def test_a_run_says_which_windows_are_longer_than_a_chunk(mesh_of):
  config = quickstart.get_config()
  config.mesh, config.data.seq_len, config.data.batch_size = MeshConfig(context=4), 256, 8
  config.model.pattern = tuple(LayerSpec(mixer=AttentionSpec(**HEADS, window=w), mlp=None) for w in (33, 34))
  validate(config, 'cpu', 8)
  assert ('rows     of 8 chunks of 32 tokens, two on a device; window 33: a halo of 32; '
          'window 34: longer than a chunk, so whole rows of keys\n') in describe(config, 'cpu', 1, 0)
