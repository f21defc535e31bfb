"""Grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions.

B batch  T query time  S key time  D width  N query heads  K key-value heads  H head dim  M cache length
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.param import constant, normal
from maxlm.layers.rope import RopeSpec, rotate
from maxlm.layers.rows import Past, Rows, rope_key
from maxlm.ops.attention import attention, attention_reference, max_logits_N, visible_BTS
from maxlm.ops.einsum import einsum
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class QueryGrowth:
  """Queries times 1 + beta * log(1 + floor(position / length)): sharper attention far out (Llama 4, Ministral 3)."""

  beta: float
  length: int


@dataclasses.dataclass(kw_only=True, slots=True)
class AttentionSpec:
  """What one attention layer computes; a kernel that cannot honour it is an error (`ops.attention.check_attention`).

  window: keys a query sees, itself included (None: all before it); in a model that sees both ways, so many each way.
  rope: None means no rotary positions. qk_norm: the model's norm of each 'head' of queries and keys, or of 'all' heads as
  one vector (OLMo 2). softcap: c * tanh(scores / c). sinks: a learned logit a head in the softmax's denominator (gpt-oss).
  gate: the output times the sigmoid of a projection of the input, one factor an 'element' (Qwen3-Next) or a 'head'. scale:
  of the scores, None means head_dim ** -0.5. out_scale: of the layer's output (Falcon-H1).
  """

  n_heads: int
  n_kv_heads: int
  head_dim: int
  window: int | None = None
  rope: RopeSpec | None = dataclasses.field(default_factory=RopeSpec)
  qk_norm: Literal['head', 'all'] | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  softcap: float | None = None
  sinks: bool = False
  gate: Literal['element', 'head'] | None = None
  scale: float | None = None
  query_growth: QueryGrowth | None = None
  out_scale: float = 1.0

  @property
  def score_scale(self) -> float:
    return self.head_dim**-0.5 if self.scale is None else self.scale

  def check(self, where: str) -> None:
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f'{where}.n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}')
    if self.window is not None and self.window < 1:
      raise ValueError(f'{where}.window={self.window} must be at least 1 (1: only the token itself); None is no window')
    if self.rope is not None:
      self.rope.check(f'{where}.rope', self.head_dim)

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {'n_heads': ('N', self.n_heads), 'n_kv_heads': ('K', self.n_kv_heads)}

  def matmul_params(self, d_model: int) -> int:
    gate = {'element': self.n_heads * self.head_dim, 'head': self.n_heads, None: 0}[self.gate]
    return d_model * (self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads) + gate)

  def mixing_flops(self, tokens: int, pairs) -> float:
    return 4.0 * self.n_heads * self.head_dim * pairs(self.window)

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Attention':
    return Attention(self, d_model, norm, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> 'Cache':
    shape = batch, length, self.n_kv_heads, self.head_dim
    return Cache(*(jnp.zeros(shape, dtype, out_sharding=shard('BMKH')) for _ in range(2)))


class Cache(NamedTuple):
  """Keys and values already seen by one layer. Column m of every row was written at the same time."""

  k_BMKH: jax.Array
  v_BMKH: jax.Array


class Attention(nnx.Module):
  """Weights of an attention layer; the spec says how they are used."""

  def __init__(self, spec: AttentionSpec, d_model: int, norm: NormSpec, rngs: nnx.Rngs):
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
      self.q_norm = Norm(norm, H if spec.qk_norm == 'head' else N * H)
      self.k_norm = Norm(norm, H if spec.qk_norm == 'head' else K * H)
    if spec.sinks:
      self.sinks_N = constant('N', (N,), 0.0)
    if spec.gate == 'element':
      self.w_gate_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    if spec.gate == 'head':
      self.w_gate_DN = normal(rngs, 'DN', (D, N), D**-0.5)

  def __call__(self, spec: AttentionSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """Attention within the documents of packed rows."""
    return self._attend(spec, x_BTD, rows, *self._project(spec, x_BTD, rows))

  def observed(self, spec: AttentionSpec, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same, and {'': the largest logit of each head, [N]} (`ops.attention.max_logits_N`)."""
    q_BTNH, k_BSKH, v_BSKH = self._project(spec, x_BTD, rows)
    top_N = max_logits_N(q_BTNH, k_BSKH, rows.segment_ids_BT, window=spec.window, scale=spec.score_scale, causal=rows.causal)
    return self._attend(spec, x_BTD, rows, q_BTNH, k_BSKH, v_BSKH), {'': top_N}

  def _attend(self, spec, x_BTD, rows, q_BTNH, k_BSKH, v_BSKH):
    out_BTNH = attention(
      q_BTNH, k_BSKH, v_BSKH, rows.segment_ids_BT, sinks_N=self.sinks_N[...] if spec.sinks else None,
      window=spec.window, softcap=spec.softcap, scale=spec.score_scale, causal=rows.causal, kernel=rows.kernel)
    return self._output(spec, x_BTD, out_BTNH)

  def extend(self, spec: AttentionSpec, x_BTD: jax.Array, rows: Rows, cache: Cache,
             past: Past) -> tuple[jax.Array, Cache]:
    """Attends from T new tokens to all tokens so far. They are written to the cache from `past.column` on."""
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
        jax.reshard(rows.segment_ids_BT, split[2]), jax.reshard(past.segment_ids_BM, split[2]), past.column, sinks_N)
    return self._output(spec, x_BTD, jax.reshard(out_BTNH, shard('BTNH'))), cache

  def _project(self, spec, x_BTD, rows):
    q_BTNH = einsum('BTD,DNH->BTNH', x_BTD, self.w_q_DNH[...])
    k_BSKH = einsum('BSD,DKH->BSKH', x_BTD, self.w_k_DKH[...])
    v_BSKH = einsum('BSD,DKH->BSKH', x_BTD, self.w_v_DKH[...])
    if spec.qkv_bias:
      q_BTNH += self.b_q_NH[...].astype(q_BTNH.dtype)
      k_BSKH += self.b_k_KH[...].astype(k_BSKH.dtype)
      v_BSKH += self.b_v_KH[...].astype(v_BSKH.dtype)
    if spec.qk_norm == 'head':
      q_BTNH, k_BSKH = self.q_norm(rows.norm, q_BTNH), self.k_norm(rows.norm, k_BSKH)
    if spec.qk_norm == 'all':
      q_BTNH, k_BSKH = self.q_norm(rows.norm, q_BTNH, 'NH'), self.k_norm(rows.norm, k_BSKH, 'KH')
    if spec.rope is not None:
      table = rows.rope[rope_key(spec.rope, spec.head_dim)]
      q_BTNH, k_BSKH = rotate(q_BTNH, spec.rope, table), rotate(k_BSKH, spec.rope, table)
    if spec.query_growth is not None:
      far_BT = jnp.floor(rows.positions_BT / spec.query_growth.length)
      growth_BT = 1 + spec.query_growth.beta * jnp.log1p(far_BT)
      q_BTNH = (q_BTNH * growth_BT[:, :, None, None]).astype(q_BTNH.dtype)
    return q_BTNH, k_BSKH, v_BSKH

  def _output(self, spec, x_BTD, out_BTNH):
    if spec.gate == 'element':
      out_BTNH *= jax.nn.sigmoid(einsum('BTD,DNH->BTNH', x_BTD, self.w_gate_DNH[...]))
    if spec.gate == 'head':
      out_BTNH *= jax.nn.sigmoid(einsum('BTD,DN->BTN', x_BTD, self.w_gate_DN[...]))[..., None]
    y_BTD = einsum('BTNH,NHD->BTD', out_BTNH, self.w_o_NHD[...])
    if spec.out_bias:
      y_BTD += self.b_o_D[...].astype(y_BTD.dtype)
    return y_BTD * spec.out_scale if spec.out_scale != 1.0 else y_BTD

