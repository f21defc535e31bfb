"""Attention on NVIDIA GPUs: an adapter over cuDNN's fused kernel, as JAX reaches it.

Documents of packed rows are what needs care. A boolean mask is correct, but takes memory T * S and is two to three
times slower than none; MaxText's `cudnn_flash_jax` leaves it out, and documents see each other
(AI-Hypercomputer/maxtext#4476). cuDNN has a packed layout, where each document is a sequence of its own: from Hopper
on, and with a limit on documents that is part of the program. So a program has three ways, and its data choose when
it runs: rows of one document are causal; rows of at most DOCUMENTS are packed; a batch with a row of more is computed
by `chunked_attention`, slowly and as exactly. Padding counts as a document.

The packed layout is only in JAX's private function: `jax.nn.dot_product_attention` does not pass it on. What its
backward pass keeps has no name that a remat policy could save, so with remat='attention' the forward kernel runs
twice, as with 'full'.
"""

import functools

import jax
import jax.numpy as jnp

from maxlm.ops.attention import chunked_attention

# Of a row, in the packed layout. Its log-sum-exps take 4 * T * DOCUMENTS bytes a row and head: 8 MiB at 4096 tokens and
# 16 heads.
DOCUMENTS = 32


def cudnn_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, k_segments_BS, sinks_N, *, offset, window, softcap, scale,
                    causal=True):
  """`ops.attention.attention` on one device, of queries and keys of whole rows."""
  assert offset == 0 and sinks_N is None and softcap is None and causal, 'refused by check_attention'
  most = documents(q_segments_BT).max()
  ways = (functools.partial(_causal, window=window, scale=scale), functools.partial(_packed, window=window, scale=scale),
          functools.partial(_chunked, window=window, scale=scale))
  way = (most > 1).astype(jnp.int32) + (most > DOCUMENTS).astype(jnp.int32)
  return jax.lax.switch(way, ways, q_BTNH, k_BSKH, v_BSKH, q_segments_BT)


def documents(segment_ids_BT: jax.Array) -> jax.Array:
  """How many each row has [B]: a document is a run of equal ids."""
  return 1 + jnp.sum(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], axis=1)


def layout(segment_ids_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """(tokens of each document [B, most], where each starts [B, most + 1]), of rows with at most so many; -1 fills up."""
  T = segment_ids_BT.shape[1]
  is_start_BT = jnp.pad(segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  start_BM = jax.vmap(lambda is_start_T: jnp.nonzero(is_start_T, size=most, fill_value=T)[0])(is_start_BT).astype(jnp.int32)
  stop_BM = jnp.pad(start_BM[:, 1:], ((0, 0), (0, 1)), constant_values=T)
  is_there_BM = start_BM < T
  offset_BM = jnp.pad(jnp.where(is_there_BM, start_BM, -1), ((0, 0), (0, 1)), constant_values=-1)
  return jnp.where(is_there_BM, stop_BM - start_BM, -1), offset_BM


def _causal(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, window, scale):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  return cudnn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, scale=scale, mask_type=cudnn.MaskType.CAUSAL,
                                     sliding_window_length=window)


def _packed(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, window, scale):
  from jax._src.cudnn import fused_attention_stablehlo as cudnn
  length_BM, offset_BM = layout(segment_ids_BT, DOCUMENTS)
  return cudnn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, q_seqlen=length_BM, kv_seqlen=length_BM, q_offsets=offset_BM, kv_offsets=offset_BM,
    scale=scale, mask_type=cudnn.MaskType.PADDING_CAUSAL, sliding_window_length=window)


def _chunked(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, *, window, scale):
  return chunked_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, segment_ids_BT, None, offset=0, window=window,
                           softcap=None, scale=scale)
