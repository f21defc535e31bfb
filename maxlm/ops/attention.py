"""Self-attention over packed documents: `attention` picks a kernel, `check_attention` says what a kernel can honour.

  reference  all scores at once, the definition; tests and decoding
  chunked    blocks of queries against the keys they can see, in XLA; any platform (`chunked_attention`)
  splash     TPU Pallas kernel (`maxlm.ops.splash`)
  cudnn      cuDNN's fused kernel on NVIDIA GPUs (`maxlm.ops.cudnn`)

Token i sees token j iff j <= i, i - j < window, and both are of one segment; where attention is not causal, iff
|i - j| < window and both are of one segment. Scores and softmax are fp32. A learned logit a head may sit in the
denominator of the softmax ("sinks": gpt-oss, arXiv:2508.10925).

Rows may be split over devices, in zigzag order (`ops.context`). Then a layer with a window gets the window - 1 keys and
values before each of a device's chunks from its neighbours; one without, with a longer window, or not causal, those of the
whole row.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maxlm.ops import context
from maxlm.sharding import axes, axis_size, spec

KERNELS = ('reference', 'chunked', 'splash', 'cudnn')
MASKED = -1e30  # a score nobody sees. Finite: a difference of two of them is not NaN

# Chunked: at most 8 blocks of queries are written out in the program, each of at least 128 queries; what is longer than
# 256 is scanned, 256 at a time. On a CPU 4 to 8 blocks of 64 to 128 queries are about equally fast at T=512.
UNROLLED_CHUNKS, SHORTEST_CHUNK, SCAN_ROWS = 8, 128, 256


def check_attention(kernel: str, platform: str, *, window: int | None, softcap: float | None, sinks: bool,
                    head_dim: int, seq_len: int, dtype, chunks: int = 1, causal: bool = True) -> None:
  """ValueError, in one line that names a kernel that can, if `kernel` cannot honour this attention on `platform`.

  chunks: into which a row is cut, two a device where devices share it.
  """
  if kernel not in KERNELS:
    raise ValueError(f'attention kernel {kernel!r} is none of {", ".join(KERNELS)}')
  if window is not None and window < 1:
    raise ValueError(f'attention window {window}: a token sees at least itself, so 1 or more (None: no window)')
  if softcap is not None and softcap <= 0:
    raise ValueError(f'attention softcap {softcap}: it must be positive (None: no cap)')
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'attention in {jnp.dtype(dtype).name}: it must be a float type')
  if kernel == 'cudnn':
    if platform != 'gpu':
      raise ValueError(f"attention kernel 'cudnn' runs on gpu, not on {platform}: use 'chunked'")
    if reason := cudnn_cannot(softcap=softcap, sinks=sinks, head_dim=head_dim, dtype=dtype, chunks=chunks,
                              causal=causal):
      raise ValueError(f"attention kernel 'cudnn' {reason}: use 'chunked'")
  if kernel != 'splash':
    return
  if platform != 'tpu':
    raise ValueError(f"attention kernel 'splash' runs on tpu, not on {platform}: use 'chunked'")
  if seq_len % (128 * chunks):
    cut = f' ({chunks} chunks of a row on devices that share it)' if chunks > 1 else ''
    raise ValueError(f"attention kernel 'splash' needs a sequence in multiples of {128 * chunks}{cut}, not {seq_len}: "
                     "use 'chunked'")
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"attention kernel 'splash' takes float32 or bfloat16, not {jnp.dtype(dtype).name}: use 'chunked'")


def cudnn_cannot(*, softcap: float | None, sinks: bool, head_dim: int, dtype, chunks: int = 1,
                 causal: bool = True) -> str | None:
  """Why cuDNN cannot honour this attention; None if it can."""
  reasons = {'has no sinks': sinks, 'has no softcap': softcap is not None,
             f'takes bfloat16 or float16, not {jnp.dtype(dtype).name}': jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16),
             f'takes heads of a multiple of 8 dims, 256 at most, not {head_dim}': head_dim % 8 or head_dim > 256,
             'needs whole rows, and devices share them here': chunks > 1,
             'is used for causal attention only, and this model sees both ways (mask_token)': not causal}
  return next((reason for reason, is_so in reasons.items() if is_so), None)


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BT: jax.Array, *,
              sinks_N: jax.Array | None = None, window: int | None = None, softcap: float | None = None,
              scale: float, causal: bool = True, kernel: str = 'chunked', interpret: bool = False) -> jax.Array:
  """Self-attention of packed rows -> out_BTNH in the dtype of q.

  q has N heads in groups of N/K that share one of the K heads of k and v. segment_ids: tokens of different ids do not
  see each other; padding is a segment like any other, so its rows are finite. softcap: c*tanh(score/c), before the mask.
  k and v of a layer without a window may be [T, B, M, K, H]: whole rows, one copy for each part of T (`gathered_TBM`).
  """
  if kernel == 'splash':
    from maxlm.ops.splash import splash_attention  # Pallas is slow to import and only a TPU needs it
    run = functools.partial(splash_attention, interpret=interpret)
  elif kernel == 'cudnn':
    from maxlm.ops.cudnn import cudnn_attention
    run = cudnn_attention
  else:
    run = {'reference': _reference, 'chunked': chunked_attention}[kernel]
  run = functools.partial(run, window=window, softcap=softcap, scale=scale, causal=causal)
  keys = spec('BSKH' if k_BSKH.ndim == 4 else 'TBMKH')
  return jax.shard_map(
    functools.partial(_island, run, window if causal else None, 128 if kernel == 'splash' else 1),
    in_specs=(spec('BTNH'), (keys, keys), spec('BT'), spec('N')), out_specs=spec('BTNH'),
    check_vma=kernel != 'splash',  # the outputs of its Pallas calls do not say along which axes they vary
  )(q_BTNH, (k_BSKH, v_BSKH), segment_ids_BT, sinks_N)


def max_logits_N(q_BTNH: jax.Array, k_BSKH: jax.Array, segment_ids_BT: jax.Array, *, window: int | None = None,
                 scale: float, causal: bool = True) -> jax.Array:
  """The largest score of each head over all pairs of the batch in which a token sees another (or itself): fp32 [N], of the
  rows of all devices.

  Arguments as of `attention`. Scores are taken before a softcap and without sinks; padding (segment 0) does not count, and
  MASKED is what there is without a token. Kernels keep their scores to themselves, so this is a product of queries and keys
  beside them, in memory O(T * chunk). It has no gradient.
  """
  run = functools.partial(_chunked_max, window=window, scale=scale, causal=causal)

  def island(q_BTNH, k_BSKH, segment_ids_BT):
    top_BTN = _island(run, window if causal else None, 1, q_BTNH, (k_BSKH,), segment_ids_BT, None)
    return jax.lax.pmax(jnp.max(top_BTN, axis=(0, 1)), axes('BT'))

  keys = spec('BSKH' if k_BSKH.ndim == 4 else 'TBMKH')
  with jax.named_scope('max_logits'):
    return jax.shard_map(island, in_specs=(spec('BTNH'), keys, spec('BT')), out_specs=spec('N'))(
      jax.lax.stop_gradient(q_BTNH), jax.lax.stop_gradient(k_BSKH), segment_ids_BT)


def gathered_TBM(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Arrays [B, S, …] as [T, B, M, …]: whole rows on each device that holds a part of them, in the order of the text."""
  def island(*arrays):
    with jax.named_scope('gather_kv'):
      return tuple(context.gathered(x)[None] for x in arrays)

  specs = [tuple(spec(dims + 'HG'[:x.ndim - 2]) for x in arrays) for dims in ('BS', 'TBM')]
  return jax.shard_map(island, in_specs=specs[0], out_specs=specs[1])(*arrays)


def has_halo(window: int | None, chunk: int) -> bool:
  """Whether a layer with this window sees no further than one chunk back, where rows are split into such chunks."""
  return window is not None and window - 1 <= chunk


def _island(run, window, unit, q_BTNH, keys, segment_ids_BT, sinks_N):
  """What a device needs of others, then the kernel; halos are in units of that many tokens. window: how far back it sees, if
  it does not see ahead. keys: k_BSKH and v_BSKH, or what else `run` takes after the queries."""
  if axis_size('T') == 1:
    return run(q_BTNH, *keys, segment_ids_BT, segment_ids_BT, sinks_N, offset=0)
  if has_halo(window, q_BTNH.shape[1] // 2):
    halo = _round_up(window - 1, unit)
    with jax.named_scope('halo'):
      keys = [context.with_halo(x, halo) for x in keys]
      k_segments = context.with_halo(segment_ids_BT, halo, missing=-1)
    q_BTNH, q_segments = context.as_rows(q_BTNH), context.as_rows(segment_ids_BT)
    return context.joined(run(q_BTNH, *keys, q_segments, k_segments, sinks_N, offset=halo))
  with jax.named_scope('gather_kv'):
    keys = [context.gathered(x) if x.ndim == 4 else x[0] for x in keys]
    k_segments = context.gathered(segment_ids_BT)
  return run(q_BTNH, *keys, segment_ids_BT, k_segments, sinks_N, offset=None)


def visible_BTS(q_index: jax.Array, k_index: jax.Array, q_segments: jax.Array, k_segments: jax.Array,
                window: int | None, causal: bool = True) -> jax.Array:
  """Who sees whom: bool [B, T, S] (or what the leading dimensions of the [B, T] and [B, S] arguments broadcast to)."""
  ahead = q_index[..., :, None] - k_index[..., None, :]
  if not causal:
    near = abs(ahead) < (math.inf if window is None else window)
  else:
    near = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
  return near & (q_segments[..., :, None] == k_segments[..., None, :])


def attention_reference(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array, *,
                        sinks_N: jax.Array | None = None, softcap: float | None = None, scale: float) -> jax.Array:
  """Attention as it is defined, with any mask: O(T*S) memory. A row that sees nothing is the mean of the values."""
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
  s_BKGTS = _capped(_dot('BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH) * scale, softcap)
  s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS, MASKED)
  if sinks_N is not None:
    sinks_KG = sinks_N.astype(jnp.float32).reshape(q_BKGTH.shape[1:3])
    sinks_BKGT1 = jnp.broadcast_to(sinks_KG[:, :, None, None], (*s_BKGTS.shape[:-1], 1))
    s_BKGTS = jnp.concatenate([s_BKGTS, sinks_BKGT1], axis=-1)
  p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1)[..., : k_BKSH.shape[2]]
  out_BKGTH = _dot('BKGTS,BKSH->BKGTH', p_BKGTS.astype(q_BTNH.dtype), v_BKSH)
  return _heads_last(out_BKGTH).astype(q_BTNH.dtype)


# A kernel meets q_BTNH with k_BSKH and v_BSKH on one device. offset: query t is token offset + t of those that the keys are
# of; None: queries are in zigzag order and the keys are those of the whole row, in the order of the text.


def _reference(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, *, offset, window, softcap, scale, causal):
  mask_BTS = visible_BTS(_index(q_BTNH.shape[1], offset), jnp.arange(k_BSKH.shape[1]), q_segments_BT, k_segments_BS, window,
                         causal)
  return attention_reference(q_BTNH, k_BSKH, v_BSKH, mask_BTS, sinks_N=sinks_N, softcap=softcap, scale=scale)


def _index(length, offset):
  return context.index(length) if offset is None else offset + jnp.arange(length)


# -- chunked --------------------------------------------------------------------------------------------------------
# A block of queries meets all the keys it can see at once, so its softmax needs no second pass. The backward pass makes
# the probabilities again from the log-sum-exp, as FlashAttention does (arXiv:2205.14135, algorithm 4), and makes them
# transposed, keys before queries: then none of its five products needs a transpose, which on a CPU costs as much as
# the product. In the names below t and s are the queries of one block and the keys it can see; band is (window, causal).


def chunked_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, *, offset, window, softcap, scale,
                      causal=True):
  """`attention` on one device in memory O(T * chunk). Keys outside the band that is seen cost nothing, unless the offset is
  None: then the program does not know where the queries are, and what a block does not see is masked."""
  if sinks_N is not None:  # a copy for each shard of the batch, so that its gradient is the sum of theirs
    sinks_N = jax.lax.pcast(sinks_N.astype(jnp.float32), axes('BT'), to='varying')
  index_T = _index(q_BTNH.shape[1], offset)
  return _chunked(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, offset, (window, causal), softcap,
                  scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9, 10))
def _chunked(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, offset, band, softcap, scale):
  return _chunked_forward(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, offset, band, softcap,
                          scale)[0]


def _chunked_forward(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, offset, band, softcap, scale):
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
  block = functools.partial(_forward_block, sinks_N=sinks_N, band=band, softcap=softcap, scale=scale)
  outs, lses = [], []
  for start, stop in query_chunks(q_BTNH.shape[1]):
    q_BKGTH, outs = jax.lax.optimization_barrier((q_BKGTH, outs))  # one after another: scores of one block live
    at = slice(start, stop)
    seen = _keys_seen(at, q_BTNH.shape[1], k_BSKH.shape[1], offset, *band)
    queries = q_BKGTH[:, :, :, at], q_segments_BT[:, at], index_T[at]
    keys = k_BKSH[:, :, seen], v_BKSH[:, :, seen], k_segments_BS[:, seen], jnp.arange(seen.start, seen.stop)
    _, (out_BKGtH, lse_BKGt) = _over_rows(block, (), queries, (3, 1, 0), keys, (3, 3))
    outs.append(out_BKGtH)
    lses.append(lse_BKGt)
  out_BTNH = checkpoint_name(_heads_last(jnp.concatenate(outs, axis=3)), 'attn_out')
  lse_BKGT = checkpoint_name(jnp.concatenate(lses, axis=3), 'attn_lse')
  return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, out_BTNH, lse_BKGT)


def _forward_block(carry, queries, keys, *, sinks_N, band, softcap, scale):
  q_BKGtH, q_segments, q_index = queries
  k_BKsH, v_BKsH, k_segments, k_index = keys
  s_BKGts = _capped(_dot('BKGtH,BKsH->BKGts', q_BKGtH, k_BKsH) * scale, softcap)
  mask_Bts = visible_BTS(q_index, k_index, q_segments, k_segments, *band)
  s_BKGts = jnp.where(mask_Bts[:, None, None], s_BKGts, MASKED)
  top_BKGt1 = s_BKGts.max(axis=-1, keepdims=True)
  if sinks_N is not None:
    sinks_KG11 = sinks_N.reshape(*q_BKGtH.shape[1:3], 1, 1)
    top_BKGt1 = jnp.maximum(top_BKGt1, sinks_KG11)
  p_BKGts = jnp.exp(s_BKGts - top_BKGt1)
  total_BKGt1 = p_BKGts.sum(axis=-1, keepdims=True)
  if sinks_N is not None:
    total_BKGt1 += jnp.exp(sinks_KG11 - top_BKGt1)
  out_BKGtH = _dot('BKGts,BKsH->BKGtH', p_BKGts.astype(v_BKsH.dtype), v_BKsH) / total_BKGt1
  return carry, (out_BKGtH.astype(q_BKGtH.dtype), (top_BKGt1 + jnp.log(total_BKGt1))[..., 0])


def _chunked_backward(offset, band, softcap, scale, residuals, dout_BTNH):
  q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, index_T, out_BTNH, lse_BKGT = residuals
  q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
  dout_BKGTH, *_ = _heads_first(dout_BTNH, k_BSKH, v_BSKH)
  delta_BTN = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1)
  delta_BKGT = delta_BTN.swapaxes(1, 2).reshape(lse_BKGT.shape)
  k_BKHS = k_BKSH.swapaxes(2, 3)
  block = functools.partial(_backward_block, band=band, softcap=softcap, scale=scale)
  dk_BKSH, dv_BKSH = jnp.zeros_like(k_BKSH, jnp.float32), jnp.zeros_like(v_BKSH, jnp.float32)
  dqs = []
  for start, stop in query_chunks(q_BTNH.shape[1]):
    q_BKGTH, dout_BKGTH, dqs = jax.lax.optimization_barrier((q_BKGTH, dout_BKGTH, dqs))
    at = slice(start, stop)
    seen = _keys_seen(at, q_BTNH.shape[1], k_BSKH.shape[1], offset, *band)
    queries = (*(x[:, :, :, at] for x in (q_BKGTH, dout_BKGTH, lse_BKGT, delta_BKGT)), q_segments_BT[:, at], index_T[at])
    keys = (k_BKSH[:, :, seen], k_BKHS[..., seen], v_BKSH[:, :, seen],
            k_segments_BS[:, seen], jnp.arange(seen.start, seen.stop))
    sums = dk_BKSH[:, :, seen], dv_BKSH[:, :, seen]
    (dk_BKsH, dv_BKsH), dq_BKHGt = _over_rows(block, sums, queries, (3, 3, 3, 3, 1, 0), keys, 4)
    dqs.append(dq_BKHGt)
    dk_BKSH = jax.lax.dynamic_update_slice_in_dim(dk_BKSH, dk_BKsH, seen.start, axis=2)
    dv_BKSH = jax.lax.dynamic_update_slice_in_dim(dv_BKSH, dv_BKsH, seen.start, axis=2)
  dq_BTNH = jnp.concatenate(dqs, axis=4).transpose(0, 4, 1, 3, 2).reshape(q_BTNH.shape)
  dk_BSKH, dv_BSKH = dk_BKSH.swapaxes(1, 2).astype(k_BSKH.dtype), dv_BKSH.swapaxes(1, 2).astype(v_BSKH.dtype)
  dsinks_N = None
  if sinks_N is not None:  # a sink's probability is exp(sink - lse) and its value is zero
    sinks_KG1 = sinks_N.reshape(*lse_BKGT.shape[1:3], 1)
    dsinks_N = -jnp.sum(jnp.exp(sinks_KG1 - lse_BKGT) * delta_BKGT, axis=(0, 3)).reshape(sinks_N.shape)
  return dq_BTNH, dk_BSKH, dv_BSKH, None, None, dsinks_N, None


def _backward_block(sums, queries, keys, *, band, softcap, scale):
  q_BKGtH, dout_BKGtH, lse_BKGt, delta_BKGt, q_segments, q_index = queries
  k_BKsH, k_BKHs, v_BKsH, k_segments, k_index = keys
  s_BKsGt = _capped(_dot('BKsH,BKGtH->BKsGt', k_BKsH, q_BKGtH) * scale, softcap)
  mask_Bst = visible_BTS(q_index, k_index, q_segments, k_segments, *band).swapaxes(1, 2)
  p_BKsGt = jnp.where(mask_Bst[:, None, :, None], jnp.exp(s_BKsGt - lse_BKGt[:, :, None]), 0)
  ds_BKsGt = p_BKsGt * (_dot('BKsH,BKGtH->BKsGt', v_BKsH, dout_BKGtH) - delta_BKGt[:, :, None]) * scale
  if softcap is not None:
    ds_BKsGt *= 1 - jnp.square(s_BKsGt / softcap)
  ds_BKsGt, p_BKsGt = ds_BKsGt.astype(q_BKGtH.dtype), p_BKsGt.astype(q_BKGtH.dtype)
  dk_BKsH = sums[0] + _dot('BKsGt,BKGtH->BKsH', ds_BKsGt, q_BKGtH)
  dv_BKsH = sums[1] + _dot('BKsGt,BKGtH->BKsH', p_BKsGt, dout_BKGtH)
  dq_BKHGt = _dot('BKHs,BKsGt->BKHGt', k_BKHs, ds_BKsGt)
  return (dk_BKsH, dv_BKsH), dq_BKHGt.astype(q_BKGtH.dtype)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _chunked_max(q_BTNH, k_BSKH, q_segments_BT, k_segments_BS, sinks_N, *, offset, window, scale, causal):
  """`max_logits_N` on one device, of each query: [B, T, N], MASKED for padding. It has no sinks."""
  q_BKGTH, k_BKSH, _ = _heads_first(q_BTNH, k_BSKH, k_BSKH)
  index_T = _index(q_BTNH.shape[1], offset)

  def block(carry, queries, keys):
    (q_BKGtH, q_segments, q_index), (k_BKsH, k_segments, k_index) = queries, keys
    mask_Bts = visible_BTS(q_index, k_index, q_segments, k_segments, window, causal) & (q_segments > 0)[:, :, None]
    s_BKGts = _dot('BKGtH,BKsH->BKGts', q_BKGtH, k_BKsH) * scale
    return carry, jnp.where(mask_Bts[:, None, None], s_BKGts, MASKED).max(axis=-1)

  tops = []
  for start, stop in query_chunks(q_BTNH.shape[1]):
    q_BKGTH, tops = jax.lax.optimization_barrier((q_BKGTH, tops))  # one after another, as in `_chunked_forward`
    at = slice(start, stop)
    seen = _keys_seen(at, q_BTNH.shape[1], k_BSKH.shape[1], offset, window, causal)
    queries = q_BKGTH[:, :, :, at], q_segments_BT[:, at], index_T[at]
    keys = k_BKSH[:, :, seen], k_segments_BS[:, seen], jnp.arange(seen.start, seen.stop)
    tops.append(_over_rows(block, (), queries, (3, 1, 0), keys, 3)[1])
  return _heads_last(jnp.concatenate(tops, axis=3)[..., None])[..., 0]


def query_chunks(seq_len: int) -> list[tuple[int, int]]:
  """Blocks (start, stop) of queries; one longer than SCAN_ROWS is a multiple of it."""
  chunk = _round_up(math.ceil(seq_len / UNROLLED_CHUNKS), SHORTEST_CHUNK)
  if chunk > SCAN_ROWS:
    chunk = _round_up(chunk, SCAN_ROWS)
  starts = [*range(0, seq_len, chunk)]
  if seq_len - starts[-1] > SCAN_ROWS and seq_len % SCAN_ROWS:
    starts.append(seq_len // SCAN_ROWS * SCAN_ROWS)
  return list(zip(starts, [*starts[1:], seq_len]))


def _over_rows(block, carry, queries, dims, keys, out_dims):
  """`block(carry, queries, keys)`, scanned over SCAN_ROWS queries at a time (along `dims`) if there are more."""
  length = queries[-1].shape[0]
  if length <= SCAN_ROWS:
    return block(carry, queries, keys)
  split = lambda x, dim: jnp.moveaxis(x.reshape(*x.shape[:dim], -1, SCAN_ROWS, *x.shape[dim + 1:]), dim, 0)
  join = lambda x, dim: jnp.moveaxis(x, 0, dim).reshape(*x.shape[1:dim + 1], length, *x.shape[dim + 2:])
  carry, outs = jax.lax.scan(lambda carry, rows: block(carry, rows, keys), carry, tuple(map(split, queries, dims)))
  return carry, jax.tree.map(join, outs, out_dims)


def _keys_seen(at: slice, n_queries: int, n_keys: int, offset: int | None, window: int | None, causal: bool) -> slice:
  """The keys that a block of queries sees, and no others that can be told; from an index that keeps slices aligned."""
  if offset is None:  # of a device's two chunks the first is in the first half of the row
    return slice(0, n_keys // 2 if causal and at.stop <= n_queries // 2 else n_keys)
  first = 0 if window is None else max(0, offset + at.start - window + 1) // SHORTEST_CHUNK * SHORTEST_CHUNK
  ahead = 0 if causal else n_keys if window is None else window - 1
  return slice(first, min(n_keys, offset + at.stop + ahead))


def _round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def _heads_first(q_BTNH, k_BSKH, v_BSKH):
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
  return q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _heads_last(out_BKGTH):
  B, K, G, T, H = out_BKGTH.shape
  return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _capped(s, softcap):
  return s if softcap is None else softcap * jnp.tanh(s / softcap)


def _dot(dims, x, y):
  return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)
