"""Attention on TPU: an adapter over JAX's own Pallas kernel, `jax.experimental.pallas.ops.tpu.splash_attention`.

The kernel takes one example with heads first, wants the scale of the scores inside q, and by default has tiles of 128,
several times slower than tiles that fill a chip's memory. Tiles outside the causal band or the window are skipped;
segments are masked, not skipped. Both residuals bear the name 'attn_out', so a remat policy that saves 'attn_out' and
'attn_lse' saves them here too.
"""

import functools

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

# (queries, keys) of a tile in the three kernels. They do COMPUTE of a tile's keys at a time (the last one all of them), so
# fp32 scores take 1 MiB and everything fits the 16 MiB of VMEM that a kernel has unless flags say otherwise.
FORWARD, DKV, DQ, COMPUTE = (512, 1024), (512, 1024), (512, 512), 512


def splash_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, sinks_N, *, window, softcap, scale, interpret=False):
  """`ops.attention.attention` on one device. interpret: run the kernel's Python on a CPU, for tests."""
  assert not interpret or jax.default_backend() == 'cpu', 'an interpreted kernel is for tests on a CPU'
  blocks = block_sizes(q_BTNH.shape[1], window)
  *mask_tables, mask_function = _mask_tables(q_BTNH.shape[1], window, blocks)
  kernel = kernels.SplashAttentionKernel(
    *mask_tables, block_sizes=blocks, is_mqa=False, save_residuals=False, mask_value=kernels.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=softcap, residual_checkpoint_name='attn_out', mask_function=mask_function, interpret=interpret)

  def example(q_TNH, k_SKH, v_SKH, segment_ids_T):
    q_NTH = (q_TNH * scale).astype(q_TNH.dtype).swapaxes(0, 1)
    segment_ids = kernels.SegmentIds(segment_ids_T, segment_ids_T)
    return kernel(q_NTH, k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1), segment_ids, sinks_N).swapaxes(0, 1)

  return jax.vmap(example)(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)


def block_sizes(seq_len: int, window: int | None) -> kernels.BlockSizes:
  """The tiles above, shrunk to divide the sequence; of keys no more than the window, or most of a tile is masked."""
  most = seq_len if window is None else max(128, window)
  queries = [_divisor(seq_len, q) for q, _ in (FORWARD, DKV, DQ)]
  keys = [_divisor(seq_len, min(k, most)) for _, k in (FORWARD, DKV, DQ)]
  return kernels.BlockSizes(
    block_q=queries[0], block_kv=keys[0], block_kv_compute=_divisor(keys[0], COMPUTE),
    block_q_dkv=queries[1], block_kv_dkv=keys[1], block_kv_dkv_compute=_divisor(keys[1], COMPUTE),
    block_q_dq=queries[2], block_kv_dq=keys[2])


@functools.lru_cache
def _mask_tables(seq_len: int, window: int | None, blocks: kernels.BlockSizes):
  """Which tiles to visit in forward, dq, dk and dv, and the mask as a function of indices. One mask, for all heads.

  JAX's own `make_splash_mha` would put the tables on a device: there is none when compiling ahead of time, and what is
  made in a trace cannot be kept for the next layer, while making them takes half a second at 8192 tokens, six at 32768.
  """
  shape = seq_len, seq_len
  mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
  mask = masks.MultiHeadMask([mask])
  forward, mask_function = tables.process_mask(mask, (blocks.block_q, blocks.block_kv))
  dq, _ = tables.process_mask(mask, (blocks.block_q_dq, blocks.block_kv_dq))
  dkv, _ = tables.process_mask_dkv(mask, (blocks.block_q_dkv, blocks.block_kv_dkv))
  return forward, dq, dkv, mask_function


def _divisor(length: int, limit: int) -> int:
  """The longest multiple of 128 that divides `length`, a multiple of 128 itself, and is at most `limit`."""
  return max(size for size in range(128, min(limit, length) + 1, 128) if length % size == 0)
