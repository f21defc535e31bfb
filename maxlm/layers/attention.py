"""Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions.

B batch  T query time  S key time  D width  N query heads  K key-value heads  H head dim  M cache length
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import RmsNorm
from maxlm.layers.param import constant, normal
from maxlm.layers.rope import rotate
from maxlm.ops.attention import attention, attention_reference, visible_BTS
from maxlm.ops.einsum import einsum
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionSpec:
  """What one attention layer computes; a kernel that cannot honour it is an error (`ops.attention.check_attention`).

  window: keys a query sees, itself included (None: all before it). rope_theta: None means no rotary positions.
  qk_norm: RMSNorm of each query and key head. softcap: c * tanh(scores / c). sinks: a learned logit a head in the
  softmax's denominator (gpt-oss). scale: of the scores, None means head_dim ** -0.5.
  """

  n_heads: int
  n_kv_heads: int
  head_dim: int
  window: int | None = None
  rope_theta: float | None = 10_000.0
  qk_norm: bool = False
  qkv_bias: bool = False
  out_bias: bool = False
  softcap: float | None = None
  sinks: bool = False
  scale: float | None = None

  @property
  def score_scale(self) -> float:
    return self.head_dim**-0.5 if self.scale is None else self.scale


class Rows(NamedTuple):
  """What every layer knows of the packed rows it works on."""

  segment_ids_BT: jax.Array  # 1, 2, … one number a document; 0 is padding
  rope: dict  # (head_dim, theta) -> (cos, sin)
  kernel: str  # of attention: 'chunked', 'splash' or 'reference'
  norm_eps: float


class Cache(NamedTuple):
  """Keys and values already seen by one layer. Column m of every row was written at the same time."""

  k_BMKH: jax.Array
  v_BMKH: jax.Array


class Attention(nnx.Module):
  """Weights of an attention layer; the spec says how they are used."""

  def __init__(self, spec: AttentionSpec, d_model: int, rngs: nnx.Rngs):
    D, N, K, H = d_model, spec.n_heads, spec.n_kv_heads, spec.head_dim
    self.w_q_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_k_DKH = normal(rngs, 'DKH', (D, K, H), D**-0.5)
    self.w_v_DKH = normal(rngs, 'DKH', (D, K, H), D**-0.5)
    self.w_o_NHD = normal(rngs, 'NHD', (N, H, D), (N * H) ** -0.5)
    if spec.qkv_bias:
      self.b_q_NH = constant('NH', (N, H), 0.0)
      self.b_k_KH = constant('KH', (K, H), 0.0)
      self.b_v_KH = constant('KH', (K, H), 0.0)
    if spec.out_bias:
      self.b_o_D = constant('D', (D,), 0.0)
    if spec.qk_norm:
      self.q_norm = RmsNorm(H)
      self.k_norm = RmsNorm(H)
    if spec.sinks:
      self.sinks_N = constant('N', (N,), 0.0)

  def __call__(self, spec: AttentionSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """Attention within the documents of packed rows."""
    q_BTNH, k_BSKH, v_BSKH = self._project(spec, x_BTD, rows)
    out_BTNH = attention(
      q_BTNH, k_BSKH, v_BSKH, rows.segment_ids_BT, sinks_N=self.sinks_N[...] if spec.sinks else None,
      window=spec.window, softcap=spec.softcap, scale=spec.score_scale, kernel=rows.kernel)
    return self._output(spec, out_BTNH)

  def extend(self, spec: AttentionSpec, x_BTD: jax.Array, rows: Rows, cache: Cache, cached_ids_BM: jax.Array,
             column: jax.Array) -> tuple[jax.Array, Cache]:
    """Attends from T new tokens to all tokens so far. They are written to the cache from `column` on.

    cached_ids_BM: segment ids of the cache's columns, new ones included; a column past the present is hidden by causality.
    """
    q_BTNH, k_BSKH, v_BSKH = self._project(spec, x_BTD, rows)
    sinks_N = self.sinks_N[...] if spec.sinks else None

    def attend(q_BTNH, k_BSKH, v_BSKH, cache, segment_ids_BT, cached_ids_BM, column, sinks_N):
      cache = Cache(*(jax.lax.dynamic_update_slice_in_dim(old_BMKH, new_BSKH.astype(old_BMKH.dtype), column, axis=1)
                      for old_BMKH, new_BSKH in zip(cache, (k_BSKH, v_BSKH))))
      mask_BTS = visible_BTS(column + jnp.arange(q_BTNH.shape[1]), jnp.arange(cached_ids_BM.shape[1]),
                             segment_ids_BT, cached_ids_BM, spec.window)
      k_BMKH, v_BMKH = (a.astype(q_BTNH.dtype) for a in cache)
      return attention_reference(q_BTNH, k_BMKH, v_BMKH, mask_BTS, sinks_N=sinks_N, softcap=spec.softcap,
                                 scale=spec.score_scale), cache

    split = shard('BMNH'), shard('BMKH'), shard('BM')  # M: time is whole on every device, whatever the mesh
    out_BTNH, cache = jax.shard_map(
      attend, in_specs=(split[0], split[1], split[1], split[1], split[2], split[2], shard(''), shard('N')),
      out_specs=(split[0], split[1]))(
        jax.reshard(q_BTNH, split[0]), jax.reshard(k_BSKH, split[1]), jax.reshard(v_BSKH, split[1]), cache,
        jax.reshard(rows.segment_ids_BT, split[2]), jax.reshard(cached_ids_BM, split[2]), column, sinks_N)
    return self._output(spec, jax.reshard(out_BTNH, shard('BTNH'))), cache

  def _project(self, spec, x_BTD, rows):
    q_BTNH = einsum('BTD,DNH->BTNH', x_BTD, self.w_q_DNH[...])
    k_BSKH = einsum('BSD,DKH->BSKH', x_BTD, self.w_k_DKH[...])
    v_BSKH = einsum('BSD,DKH->BSKH', x_BTD, self.w_v_DKH[...])
    if spec.qkv_bias:
      q_BTNH += self.b_q_NH[...].astype(q_BTNH.dtype)
      k_BSKH += self.b_k_KH[...].astype(k_BSKH.dtype)
      v_BSKH += self.b_v_KH[...].astype(v_BSKH.dtype)
    if spec.qk_norm:
      q_BTNH = self.q_norm(q_BTNH, rows.norm_eps)
      k_BSKH = self.k_norm(k_BSKH, rows.norm_eps)
    if spec.rope_theta is not None:
      table = rows.rope[spec.head_dim, spec.rope_theta]
      q_BTNH = rotate(q_BTNH, table)
      k_BSKH = rotate(k_BSKH, table)
    return q_BTNH, k_BSKH, v_BSKH

  def _output(self, spec, out_BTNH):
    y_BTD = einsum('BTNH,NHD->BTD', out_BTNH, self.w_o_NHD[...])
    return y_BTD + self.b_o_D[...].astype(y_BTD.dtype) if spec.out_bias else y_BTD
