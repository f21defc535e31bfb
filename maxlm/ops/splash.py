"""Attention on TPU: an adapter over JAX's own Pallas kernel, `jax.experimental.pallas.ops.tpu.splash_attention`.

The kernel takes one example with heads first and wants the scale of the scores inside q. Tiles of queries and keys that do
not see each other are skipped: tables, made here, say which to visit. Segments are masked, not skipped. Both residuals bear
the name 'attn_out', so a remat policy that saves 'attn_out' and 'attn_lse' saves them here too.

The backward pass is two kernels. There is one for all three gradients, which computes scores once: what it saves goes into
adding up the parts of dq that each tile of keys leaves (docs/LOG.md, 2026-11-23).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

from maxlm.ops import context
from maxlm.ops.rings import LANES
from maxlm.ops.tiles import Tiles, tiles_for
from maxlm.sharding import axes, axis_size, device_kind


def splash_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, *, offset, window, softcap, scale,
                     causal=True, interpret=False):
  """`ops.attention.attention` on one device. interpret: run the kernel's Python on a CPU, for tests."""
  assert not interpret or jax.default_backend() == 'cpu', 'an interpreted kernel is for tests on a CPU'
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  X = axis_size('T') if offset is None else 1  # devices whose queries differ in what they see
  chunk = T // 2 if offset is None else T
  tiles = tiles_for(device_kind(), q_BTNH.shape[-1] * q_BTNH.dtype.itemsize, window, S)
  tiles = fitted(tiles, chunk, S if offset is None else S - offset)
  if offset:  # so that tiles divide the keys: some before the first, which nobody sees
    pad = -offset % math.lcm(*(keys for _, keys in tiles[:3]))
    k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (pad, 0), (0, 0), (0, 0))) for x in (k_BSKH, v_BSKH))
    k_segments_BS = jnp.pad(k_segments_BS, ((0, 0), (pad, 0)), constant_values=-1)
    offset, S = offset + pad, S + pad
  starts = tuple(_starts(X, chunk, offset))
  q_index = context.index(T) if offset is None else offset + jnp.arange(T, dtype=jnp.int32)
  infos = [_mask_info(visits(starts, chunk, S, *tile, window, of_keys, causal), q_index)
           for tile, of_keys in ((tiles.forward, False), (tiles.dq, False), (tiles.dkv, True))]
  kernel = kernels.SplashAttentionKernel(
    *infos, block_sizes=block_sizes(tiles, q_BTNH.shape[-1]), is_mqa=False, save_residuals=False,
    mask_value=kernels.DEFAULT_MASK_VALUE, attn_logits_soft_cap=softcap, residual_checkpoint_name='attn_out',
    mask_function=_sees(window, causal), interpret=interpret)

  def example(q_TNH, k_SKH, v_SKH, q_segments_T, k_segments_S):
    q_NTH = (q_TNH * scale).astype(q_TNH.dtype).swapaxes(0, 1)
    segment_ids = kernels.SegmentIds(q_segments_T, k_segments_S)
    return kernel(q_NTH, k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1), segment_ids, sinks_N).swapaxes(0, 1)

  return jax.vmap(example)(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS)


def fitted(tiles: Tiles, n_queries: int, n_keys: int) -> Tiles:
  """The tiles, shrunk to divide so many queries and keys, both multiples of 128."""
  pairs = [(_divisor(n_queries, q), _divisor(n_keys, k)) for q, k in (tiles.forward, tiles.dkv, tiles.dq)]
  return Tiles(*pairs, compute=tiles.compute)


def block_sizes(tiles: Tiles, head_dim: int) -> kernels.BlockSizes:
  """In the words of the kernel. Queries whose heads do not fill a register's lanes come with time in the lanes: as the
  projection writes them and a rotation takes them, in half of the memory."""
  (q, k), (q_dkv, k_dkv), (q_dq, k_dq) = tiles[:3]
  layout = kernels.QKVLayout.SEQ_MINOR if head_dim % LANES else kernels.QKVLayout.HEAD_DIM_MINOR
  return kernels.BlockSizes(
    block_q=q, block_kv=k, block_kv_compute=_divisor(k, tiles.compute), block_q_dkv=q_dkv, block_kv_dkv=k_dkv,
    block_kv_dkv_compute=_divisor(k_dkv, tiles.compute), block_q_dq=q_dq, block_kv_dq=k_dq, q_layout=layout)


def _starts(X, chunk, offset):
  """For each device where its runs of `chunk` queries are among the keys."""
  return [(offset,)] if offset is not None else [(i * chunk, (2 * X - 1 - i) * chunk) for i in range(X)]


@functools.lru_cache
def visits(starts: tuple[tuple[int, ...], ...], chunk: int, n_keys: int, q_tile: int, k_tile: int, window: int | None,
           of_keys: bool, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """(which tile to meet, whether it is there) for each device, tile and step: int16 [X, 1, query tiles, steps].

  Each tile of queries goes in `steps` over the tiles of keys it sees. of_keys: each tile of keys over those of queries that
  see it, [X, 1, steps, key tiles]. Where nothing is left to meet, the last tile is named again, so that nothing is fetched.
  """
  first_q = np.array([[start + i for start in run for i in range(0, chunk, q_tile)] for run in starts])[:, :, None]
  first_k = np.arange(0, n_keys, k_tile)
  sees = (first_k <= first_q + q_tile - 1) | (not causal)
  if window is not None:
    sees &= first_q - (first_k + k_tile - 1) < window
  if window is not None and not causal:
    sees &= first_k - (first_q + q_tile - 1) < window
  if of_keys:
    sees = sees.swapaxes(1, 2)
  count = sees.sum(axis=2, keepdims=True)
  step = np.arange(count.max())
  met = np.argsort(~sees, axis=2, kind='stable')
  tile = np.take_along_axis(met, np.minimum(step, np.maximum(count - 1, 0)), axis=2).astype(np.int16)
  there = (step < count).astype(np.int16)
  return tuple((x.swapaxes(1, 2) if of_keys else x)[:, None] for x in (tile, there))


def _mask_info(visited, q_index):
  device = jax.lax.axis_index(axes('T')) if visited[0].shape[0] > 1 else 0
  tile, there = (jnp.asarray(x)[device] for x in visited)
  return tables.MaskInfo(data_next=tile, mask_next=None, block_mask=there, partial_mask_blocks=None, q_sequence=q_index)


@functools.lru_cache
def _sees(window, causal):
  """The mask as a function of indices; the same object each time, since it is part of the key of a compiled program."""
  if not causal:
    return lambda q_index, k_index: abs(q_index - k_index) < (1 << 30 if window is None else window)
  if window is None:
    return lambda q_index, k_index: q_index >= k_index
  return lambda q_index, k_index: (q_index >= k_index) & (q_index - k_index < window)


def _divisor(length: int, limit: int) -> int:
  """The longest multiple of 128 that divides `length`, a multiple of 128 itself, and is at most `limit`."""
  return max(size for size in range(128, min(limit, length) + 1, 128) if length % size == 0)
