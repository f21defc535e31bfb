"""Attention kernels: who sees whom, values and gradients against the definition, meshes, remat, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops import attention as ops
from maxlm.ops import splash
from maxlm.ops.tiles import SMALL, TABLE, Tiles, tiles_for
from maxlm.sharding import spec

DIMS = ('BTNH', 'BSKH', 'BSKH', 'BT', 'N')  # q k v segment_ids sinks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so short that a few dozen tokens are several, the longer ones scanned, and splash has 2 x 2 tiles."""
  monkeypatch.setattr(ops, 'UNROLLED_CHUNKS', 3)
  monkeypatch.setattr(ops, 'SHORTEST_CHUNK', 8)
  monkeypatch.setattr(ops, 'SCAN_ROWS', 16)
  monkeypatch.setattr(splash, 'tiles_for', lambda *_: Tiles((128, 128), (128, 128), (128, 128), 128))


def example(B, T, N=4, K=2, H=8, seed=0, dtype=np.float32):
  """q, k, v, segment_ids, sinks: some documents a row and padding at its end."""
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, T, heads, H)).astype(dtype) for heads in (N, K, K))
  segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
  segments[:, T - T // 10:] = 0
  return q, k, v, segments, rng.normal(size=N).astype(np.float32)


def place(arrays, dims=DIMS):
  return [jax.device_put(array, spec(d)) for array, d in zip(arrays, dims)]


def attend(q, k, v, segments, sinks=None, **options):
  return ops.attention(q, k, v, segments, sinks_N=sinks, **{'scale': 0.3, 'interpret': True, **options})


def value_and_gradients(arrays, seed=1, **options):
  """Output, and gradients by q, k, v, sinks of its product with random numbers."""
  weights = np.random.default_rng(seed).normal(size=arrays[0].shape[1:]).astype(np.float32)  # the same for each row
  q, k, v, segments, sinks = place(arrays)

  def loss(q, k, v, sinks):
    out = attend(q, k, v, segments, sinks, **options)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, sinks)
  return jax.device_get(dict(out=out, **dict(zip(('q', 'k', 'v', 'sinks'), gradients))))


def assert_close(actual, expected, rtol=3e-6):
  for name, value in expected.items():
    value = value.astype(np.float32)
    error = np.abs(actual[name].astype(np.float32) - value).max() / np.abs(value).max()
    assert error < rtol, f'{name} is off by {error:.1e} of its largest'


def by_definition(q, k, v, visible, sinks, softcap, scale):
  """Attention in float64, with loops."""
  out = np.zeros(q.shape)
  for b, i, n in np.ndindex(q.shape[:3]):
    kv = n // (q.shape[2] // k.shape[2])
    scores = {j: float(q[b, i, n] @ k[b, j, kv]) * scale for j in np.flatnonzero(visible[b, i])}
    if softcap is not None:
      scores = {j: softcap * math.tanh(s / softcap) for j, s in scores.items()}
    total = sum(map(math.exp, scores.values())) + (0 if sinks is None else math.exp(sinks[n]))
    out[b, i, n] = sum(math.exp(s) / total * v[b, j, kv].astype(np.float64) for j, s in scores.items())
  return out


def visible_by_hand(segments, window):
  i, j = np.mgrid[:segments.shape[1], :segments.shape[1]]
  near = (j <= i) & (True if window is None else i - j < window)
  return near & (segments[:, :, None] == segments[:, None, :])


@pytest.mark.parametrize('window', [None, 1, 7])
@pytest.mark.parametrize('softcap', [None, 2.0])
@pytest.mark.parametrize('with_sinks', [False, True])
@pytest.mark.parametrize('kernel', ['reference', 'chunked'])
def test_output_i_moves_with_key_j_if_and_only_if_i_sees_j(mesh_of, kernel, window, softcap, with_sinks):
  keys = np.arange(45)
  with mesh_of(1):
    moved_matches_mask(kernel, 45, keys, 1, window, softcap, with_sinks)


@pytest.mark.parametrize('window, softcap, with_sinks', [(None, None, True), (100, 2.0, False)])
def test_output_i_moves_with_key_j_if_and_only_if_i_sees_j_in_splash(mesh_of, window, softcap, with_sinks):
  keys = np.array([0, 3, 60, 100, 127, 128, 150, 200, 254, 255])
  with mesh_of(1):
    moved_matches_mask('splash', 256, keys, 2, window, softcap, with_sinks)


def moved_matches_mask(kernel, T, keys, heads, window, softcap, with_sinks):
  """One row of the batch a perturbed key, and one with none; with three documents and padding, and with one document."""
  q, k, v, segments, sinks = example(1, T, N=heads, K=1)
  rows = np.arange(len(keys))
  q, k, v = (np.repeat(x, len(keys) + 1, axis=0) for x in (q, k, v))
  k[rows, keys] += 1
  v[rows, keys] += 3
  run = jax.jit(functools.partial(attend, kernel=kernel, window=window, softcap=softcap))
  for documents in (segments, np.ones_like(segments)):
    out = np.asarray(run(*place((q, k, v, np.repeat(documents, len(keys) + 1, axis=0))),
                         sinks=place([sinks], 'N')[0] if with_sinks else None))
    moved = (np.abs(out[:-1] - out[-1:]) > 1e-5).any(axis=(2, 3))
    np.testing.assert_array_equal(moved, visible_by_hand(documents, window)[0, :, keys])


@pytest.mark.parametrize('window, softcap, with_sinks', [(None, None, False), (6, 1.5, True)])
def test_the_reference_is_the_definition(mesh_of, window, softcap, with_sinks):
  q, k, v, segments, sinks = example(2, 20)
  sinks = sinks if with_sinks else None
  expected = by_definition(q, k, v, visible_by_hand(segments, window), sinks, softcap, 0.3)
  with mesh_of(1):
    run = jax.jit(functools.partial(attend, kernel='reference', window=window, softcap=softcap))
    out = run(*place((q, k, v, segments)), sinks=place([sinks], 'N')[0] if with_sinks else None)
  np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize('T, heads, options', [
  (45, (4, 2), dict()),
  (45, (2, 2), dict(window=9)),
  (48, (3, 1), dict(window=8, softcap=2.0)),
  (100, (4, 2), dict(softcap=1.0)),  # blocks of 48 in scans of 16, and a ragged one
  (97, (4, 2), dict(window=20)),
  (5, (2, 1), dict(window=3)),
  (100, (4, 2), dict(causal=False, softcap=1.0)),
  (97, (4, 2), dict(causal=False, window=20)),
], ids=str)
def test_chunked_agrees_with_the_reference_in_value_and_every_gradient(mesh_of, T, heads, options):
  arrays = example(2, T, *heads)
  with mesh_of(1):
    assert_close(value_and_gradients(arrays, kernel='chunked', **options),
                 value_and_gradients(arrays, kernel='reference', **options))


def test_chunked_agrees_with_the_reference_at_the_sizes_it_is_used_with(mesh_of, monkeypatch):
  monkeypatch.undo()
  assert (ops.UNROLLED_CHUNKS, ops.SHORTEST_CHUNK) == (8, 128)
  arrays = example(1, 400, 2, 1)
  with mesh_of(1):
    assert_close(value_and_gradients(arrays, kernel='chunked', window=130),
                 value_and_gradients(arrays, kernel='reference', window=130))


@pytest.mark.parametrize('T, H, options', [
  (256, 8, {}), (256, 8, {'window': 140, 'softcap': 2.0}), (256, 128, {'window': 140, 'softcap': 2.0}),  # 128: whole lanes
  (256, 8, {'causal': False}), (384, 8, {'causal': False, 'window': 60})], ids=str)  # a third tile, unseen by the first
def test_splash_agrees_with_the_reference_in_value_and_every_gradient(mesh_of, T, H, options):
  arrays = example(2, T, H=H)
  with mesh_of(1):
    assert_close(value_and_gradients(arrays, kernel='splash', **options),
                 value_and_gradients(arrays, kernel='reference', **options), rtol=2e-5)


@pytest.mark.parametrize('kernel', ['reference', 'chunked'])
def test_a_document_has_the_outputs_and_gradients_that_it_has_alone(mesh_of, kernel):
  lengths, T = (22, 3, 17), 45
  starts = np.cumsum((0,) + lengths)
  q, k, v, _, sinks = example(1, T)
  together = np.repeat([1, 2, 3, 0], (*lengths, T - starts[-1]))
  rows = np.stack([together, *((together == document).astype(np.int32) for document in (1, 2, 3))]).astype(np.int32)
  with mesh_of(1):
    results = value_and_gradients((*(np.repeat(x, 4, axis=0) for x in (q, k, v)), rows, sinks), kernel=kernel, window=10)
  for row, (start, length) in enumerate(zip(starts, lengths), 1):
    at = slice(start, start + length)
    assert_close({x: results[x][0, at] for x in ('out', *'qkv')}, {x: results[x][row, at] for x in ('out', *'qkv')})


@pytest.mark.parametrize('kernel', ['reference', 'chunked'])
def test_huge_scores_and_rows_of_padding_are_finite(mesh_of, kernel):
  q, k, v, segments, sinks = example(2, 45)
  segments[0] = 0
  with mesh_of(1):
    results = value_and_gradients((q * 1e4, k, v, segments, sinks), kernel=kernel, window=5)
  for name, value in results.items():
    assert np.isfinite(value).all(), name


@pytest.mark.parametrize('kernel, sizes', [
  ('chunked', {'data': 2, 'fsdp': 2, 'tensor': 2}), ('chunked', {'fsdp': 8}), ('chunked', {'fsdp': 2, 'tensor': 4}),
  ('chunked', {'data': 2, 'expert': 2, 'tensor': 2}), ('reference', {'data': 2, 'fsdp': 2, 'tensor': 2})], ids=str)
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, kernel, sizes):
  arrays = example(8, 45, N=8, K=4)
  with mesh_of(1):
    one = value_and_gradients(arrays, kernel=kernel, window=20, softcap=2.0)
  with mesh_of(8, **sizes):
    assert_close(value_and_gradients(arrays, kernel=kernel, window=20, softcap=2.0), one)


def test_splash_on_a_mesh_gives_the_values_and_gradients_of_the_reference_on_one_device(mesh_of):
  arrays = example(4, 256)
  with mesh_of(1):
    one = value_and_gradients(arrays, kernel='reference')
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    assert_close(value_and_gradients(arrays, kernel='splash'), one, rtol=2e-5)


@pytest.mark.parametrize('kernel, T', [('reference', 45), ('chunked', 45), ('splash', 256)])
def test_bf16_inputs_have_scores_softmax_and_sinks_gradient_in_fp32(mesh_of, kernel, T):
  arrays = example(2, T)
  half = (*(x.astype(jnp.bfloat16) for x in arrays[:3]), *arrays[3:])
  with mesh_of(1):
    results = value_and_gradients(half, kernel=kernel)
    expected = value_and_gradients((*(x.astype(np.float32) for x in half[:3]), *half[3:]), kernel='reference')
    program = jax.make_jaxpr(jax.grad(
      lambda q, k, v, *rest: jnp.sum(attend(q, k, v, *rest, kernel=kernel), dtype=jnp.float32)))(*place(half))
  assert {name: x.dtype for name, x in results.items()} == {
    **dict.fromkeys(('out', 'q', 'k', 'v'), jnp.bfloat16), 'sinks': np.float32}
  assert_close(results, expected, rtol=2e-2)
  found = list(equations(program.jaxpr))
  assert {e.outvars[0].aval.dtype for e in found if e.primitive.name in ('exp', 'exp2')} == {np.dtype(np.float32)}
  if kernel == 'chunked':  # the reference is differentiated by JAX, which rounds the gradients of products
    assert {e.outvars[0].aval.dtype for e in found if e.primitive.name == 'dot_general'} == {np.dtype(np.float32)}


def equations(jaxpr):
  """All equations of a program, those of its inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


@pytest.mark.parametrize('kernel, T, forward', [('chunked', 45, 'exp'), ('splash', 256, 'pallas_call')])
def test_attention_runs_forward_once_when_remat_saves_its_output_and_lse(mesh_of, kernel, T, forward):
  """Counted in the program of the gradient: the exponentials of chunked, the kernels of splash."""
  B, D, N, K, H = 4, 16, 4, 2, 8
  rng = np.random.default_rng(0)

  def block(x_BTD, weights, segments):
    q, k, v = (jnp.einsum('BTD,DNH->BTNH', x_BTD, w, out_sharding=spec('BTNH')) for w in weights[:3])
    out = attend(q, k, v, segments, kernel=kernel)
    return jnp.einsum('BTNH,NHD->BTD', out, weights[3], out_sharding=spec('BTD'))

  def count(policy):
    run = block if policy is None else jax.checkpoint(block, policy=policy)
    gradient = jax.grad(lambda x, weights, segments: jnp.sum(run(x, weights, segments)), argnums=(0, 1))
    names = [e.primitive.name for e in equations(jax.make_jaxpr(gradient)(x, weights, segments).jaxpr)]
    return names.count(forward), names.count('dot_general')

  with mesh_of(4, tensor=2):
    x, segments = place([rng.normal(size=(B, T, D)).astype(np.float32), np.ones((B, T), np.int32)], ('BTD', 'BT'))
    weights = [jax.device_put(rng.normal(size=shape).astype(np.float32), spec(dims, gathered=True))
               for dims, shape in (('DNH', (D, N, H)), ('DKH', (D, K, H)), ('DKH', (D, K, H)), ('NHD', (N, H, D)))]
    kept = count(None)
    full = count(jax.checkpoint_policies.nothing_saveable)
    saved = count(jax.checkpoint_policies.save_only_these_names('attn_out', 'attn_lse'))
  assert full[0] > kept[0] == saved[0]
  assert saved[1] == kept[1] + 3 < full[1] or kernel == 'splash'  # q, k and v are projected again, and nothing more


def test_keys_outside_the_causal_band_or_the_window_cost_no_flops(mesh_of):
  def flops(**options):
    program = jax.make_jaxpr(functools.partial(attend, **options))(*arrays)
    return sum(2 * math.prod(e.outvars[0].aval.shape) * math.prod(
      e.invars[0].aval.shape[d] for d in e.params['dimension_numbers'][0][0])
      for e in equations(program.jaxpr) if e.primitive.name == 'dot_general')

  with mesh_of(1), pytest.MonkeyPatch.context() as patch:
    patch.setattr(ops, 'UNROLLED_CHUNKS', 8)
    patch.setattr(ops, 'SCAN_ROWS', 256)
    arrays = place(example(1, 512)[:4])
    full = flops(kernel='reference')
    assert flops(kernel='chunked') < 0.57 * full
    assert flops(kernel='chunked', window=64) < 0.27 * full


@pytest.mark.parametrize('seq_len', [1, 8, 45, 96, 100, 500, 1000, 4096])
def test_query_chunks_cover_the_sequence_once_and_are_few(seq_len):
  chunks = ops.query_chunks(seq_len)
  assert [i for start, stop in chunks for i in range(start, stop)] == list(range(seq_len))
  assert len(chunks) <= ops.UNROLLED_CHUNKS + 1
  assert all(stop - start <= ops.SCAN_ROWS or (stop - start) % ops.SCAN_ROWS == 0 for start, stop in chunks)


@pytest.mark.parametrize('seq_len', [128, 256, 640, 1280, 4096, 8192])
@pytest.mark.parametrize('window', [None, 1, 128, 1000])
@pytest.mark.parametrize('device', ['cpu', 'TPU v5', 'TPU v6 lite'])
def test_splash_tiles_divide_the_sequence(device, seq_len, window):
  tiles = splash.fitted(tiles_for(device, 256, window, seq_len), seq_len, seq_len)
  for size in (size for pair in tiles[:3] for size in pair):
    assert seq_len % size == 0 and size % 128 == 0
  blocks = splash.block_sizes(tiles, 128)
  assert blocks.q_layout == blocks.k_layout != splash.block_sizes(tiles, 64).q_layout  # narrow heads: time in the lanes
  assert blocks.block_kv % blocks.block_kv_compute == 0 and blocks.block_kv_dkv % blocks.block_kv_dkv_compute == 0
  assert blocks.block_kv <= max(512, window or seq_len // 8)


def test_tiles_are_those_of_the_first_row_of_the_table_that_fits():
  for kind, head_bytes, tiles in TABLE:
    assert tiles_for(kind, head_bytes, None, 1 << 20) == tiles
  assert tiles_for('TPU v6 lite', 257, None, 1 << 20) != tiles_for('TPU v6 lite', 256, None, 1 << 20)
  assert tiles_for('TPU v6 lite', 513, None, 1 << 20) == tiles_for('cpu', 256, None, 1 << 20) == SMALL


@pytest.mark.parametrize('kernel, platform, change, message', [
  ('flash', 'cpu', {}, r"'flash' is none of reference, chunked, splash, cudnn"),
  ('splash', 'cpu', {}, r"runs on tpu, not on cpu: use 'chunked'"),
  ('splash', 'gpu', {}, r"runs on tpu, not on gpu: use 'chunked'"),
  ('splash', 'tpu', {'seq_len': 1000}, r"multiples of 128, not 1000: use 'chunked'"),
  ('splash', 'tpu', {'chunks': 16}, r"multiples of 2048 \(16 chunks of a row on devices that share it\), not 1024"),
  ('splash', 'tpu', {'dtype': 'float16'}, r"float32 or bfloat16, not float16: use 'chunked'"),
  ('chunked', 'cpu', {'window': 0}, r'window 0'),
  ('chunked', 'cpu', {'softcap': -1.0}, r'softcap -1.0'),
  ('reference', 'cpu', {'dtype': 'int32'}, r'int32'),
])
def test_what_a_kernel_cannot_honour_is_refused_in_one_line_that_names_one_that_can(kernel, platform, change, message):
  spec = dict(window=8, softcap=30.0, sinks=True, head_dim=64, seq_len=1024, dtype='bfloat16')
  with pytest.raises(ValueError, match=message) as error:
    ops.check_attention(kernel, platform, **{**spec, **change})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kernel, platform', [('splash', 'tpu'), ('chunked', 'cpu'), ('chunked', 'tpu')])
def test_what_a_kernel_can_honour_is_accepted(kernel, platform):
  ops.check_attention(kernel, platform, window=8, softcap=30.0, sinks=True, head_dim=64, seq_len=1024, dtype='bfloat16')
