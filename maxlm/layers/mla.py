"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): all heads' keys and values come from one short
vector a token, so that a cache holds little.

B batch  T query time  S key time  M columns of a cache  N heads  H dims of a head: of queries first those without rotation
R width of a latent vector  D the same where it goes into a product, and the width of the model

Weights: w_q_DNH, or with q_rank w_q_down_DR, q_norm.scale_D and w_q_up_DNH; w_kv_down_DR, kv_norm.scale_D, w_k_up_DNH and
w_v_up_DNH; w_k_rope_DH, one for all heads; w_o_NHD. With biases b_kv_down_R, b_k_rope_H, b_o_D, and with q_rank b_q_down_R.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.param import constant, normal
from maxlm.layers.rope import RopeSpec, rotate
from maxlm.layers.rows import Past, Rows, rope_key
from maxlm.ops.attention import attention, attention_reference, gathered_TBM, max_logits_N, visible_BTS
from maxlm.ops.einsum import einsum
from maxlm.sharding import axis_size
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class MlaSpec:
  """q_rank, kv_rank: widths of the vectors that queries (None: the token itself) and keys and values are made from.

  nope_dim, rope_dim, v_dim: of a head, the dims of queries and keys without and with rotation, and of values; the rotated
  dims of the keys are the same for all heads. rope: None means that these are not rotated either (Kimi Linear).
  scale: of the scores, None means (nope_dim + rope_dim) ** -0.5. norm_eps: of the norms of the two vectors. bias: on what is
  made for all heads together, that is, the two vectors, the keys' rotated dims and the output.
  """

  n_heads: int
  q_rank: int | None
  kv_rank: int
  nope_dim: int
  rope_dim: int
  v_dim: int
  rope: RopeSpec | None = dataclasses.field(default_factory=lambda: RopeSpec(interleaved=True))
  scale: float | None = None
  norm_eps: float = 1e-6
  bias: bool = False

  @property
  def score_scale(self) -> float:
    return (self.nope_dim + self.rope_dim) ** -0.5 if self.scale is None else self.scale

  def check(self, where: str) -> None:
    """ValueError, beginning with `where`, for what has no meaning."""
    for name in ('n_heads', 'q_rank', 'kv_rank', 'nope_dim', 'rope_dim', 'v_dim'):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f'{where}.{name}={value} must be at least 1')
    if self.rope is not None:
      self.rope.check(f'{where}.rope', self.rope_dim)

  def split_dims(self) -> dict[str, tuple[str, int]]:
    ranks = {name: ('D', rank) for name in ('q_rank', 'kv_rank') if (rank := getattr(self, name)) is not None}
    return {'n_heads': ('N', self.n_heads)} | ranks

  def matmul_params(self, d_model: int) -> int:
    qk_dim = self.nope_dim + self.rope_dim
    q = d_model * self.n_heads * qk_dim if self.q_rank is None else self.q_rank * (d_model + self.n_heads * qk_dim)
    kv = d_model * (self.kv_rank + self.rope_dim) + self.kv_rank * self.n_heads * (self.nope_dim + self.v_dim)
    return q + kv + self.n_heads * self.v_dim * d_model

  def mixing_flops(self, tokens: int, pairs) -> float:
    return 2.0 * self.n_heads * (self.nope_dim + self.rope_dim + self.v_dim) * pairs(None)

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Mla':
    return Mla(self, d_model, norm, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> 'LatentCache':
    return LatentCache(jnp.zeros((batch, length, self.kv_rank + self.rope_dim), dtype, out_sharding=shard('BMR')))


class LatentCache(NamedTuple):
  """What keys and values of all heads are made from: kv_rank normalised dims, then rope_dim rotated ones."""

  latent_BMR: jax.Array


class Mla(nnx.Module):
  """Weights of a layer of latent attention; the spec says how they are used."""

  def __init__(self, spec: MlaSpec, d_model: int, norm: NormSpec, rngs: nnx.Rngs):
    D, N, qk_dim = d_model, spec.n_heads, spec.nope_dim + spec.rope_dim
    if spec.q_rank is None:
      self.w_q_DNH = normal(rngs, 'DNH', (D, N, qk_dim), D**-0.5)
    else:
      self.w_q_down_DR = normal(rngs, 'DR', (D, spec.q_rank), D**-0.5)
      self.q_norm = Norm(norm, spec.q_rank)
      self.w_q_up_DNH = normal(rngs, 'DNH', (spec.q_rank, N, qk_dim), spec.q_rank**-0.5)
    self.w_kv_down_DR = normal(rngs, 'DR', (D, spec.kv_rank), D**-0.5)
    self.w_k_rope_DH = normal(rngs, 'DH', (D, spec.rope_dim), D**-0.5)
    self.kv_norm = Norm(norm, spec.kv_rank)
    self.w_k_up_DNH = normal(rngs, 'DNH', (spec.kv_rank, N, spec.nope_dim), spec.kv_rank**-0.5)
    self.w_v_up_DNH = normal(rngs, 'DNH', (spec.kv_rank, N, spec.v_dim), spec.kv_rank**-0.5)
    self.w_o_NHD = normal(rngs, 'NHD', (N, spec.v_dim, D), (N * spec.v_dim) ** -0.5)
    if spec.bias:
      if spec.q_rank is not None:
        self.b_q_down_R = constant('R', (spec.q_rank,), 0.0)
      self.b_kv_down_R = constant('R', (spec.kv_rank,), 0.0)
      self.b_k_rope_H = constant('H', (spec.rope_dim,), 0.0)
      self.b_o_D = constant('D', (D,), 0.0)

  def __call__(self, spec: MlaSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """Attention within the documents of packed rows, with keys and values of every head."""
    return self._attend(spec, rows, *self._project(spec, x_BTD, rows))

  def observed(self, spec: MlaSpec, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same, and {'': the largest logit of each head, [N]} (`ops.attention.max_logits_N`)."""
    q_BTNH, k, v = self._project(spec, x_BTD, rows)
    top_N = max_logits_N(q_BTNH, k, rows.segment_ids_BT, scale=spec.score_scale, causal=rows.causal)
    return self._attend(spec, rows, q_BTNH, k, v), {'': top_N}

  def _project(self, spec, x_BTD, rows):
    q_BTNH = jnp.concatenate(self._queries(spec, x_BTD, rows), axis=-1)
    latent, k_rope = self._latents(spec, x_BTD, rows)
    S = 'BS'
    if axis_size('T') > 1:  # gathered while they are short; then every device makes the keys and values of the whole row
      latent, k_rope = gathered_TBM(latent, k_rope)
      S = 'TBM'
    k = einsum(f'{S}D,DNH->{S}NH', latent, self.w_k_up_DNH[...])
    v = einsum(f'{S}D,DNH->{S}NH', latent, self.w_v_up_DNH[...])
    k_rope = jnp.broadcast_to(k_rope[..., None, :], (*k.shape[:-1], spec.rope_dim), out_sharding=shard(f'{S}NH'))
    return q_BTNH, jnp.concatenate([k, k_rope], axis=-1), v

  def _attend(self, spec, rows, q_BTNH, k, v):
    out_BTNH = attention(q_BTNH, k, v, rows.segment_ids_BT, scale=spec.score_scale, causal=rows.causal, kernel=rows.kernel)
    return self._output(spec, out_BTNH)

  def extend(self, spec: MlaSpec, x_BTD: jax.Array, rows: Rows, cache: LatentCache,
             past: Past) -> tuple[jax.Array, LatentCache]:
    """Attends from T new tokens to all tokens so far. They are written to the cache from `past.column` on.

    Instead of expanding the cache into keys and values, queries are multiplied into the latent space, where all heads share
    one key, and what they gather there is multiplied out of it: the same products in another order (section 2.1.2).
    """
    q_BTNH, q_rope_BTNH = self._queries(spec, x_BTD, rows)
    q_BTNR = jnp.concatenate([einsum('BTNH,DNH->BTND', q_BTNH, self.w_k_up_DNH[...]), q_rope_BTNH], axis=-1)
    latent_BSR = jnp.concatenate(self._latents(spec, x_BTD, rows), axis=-1)

    def attend(q_BTNR, latent_BSR, cache_BMR, segment_ids_BT, cached_ids_BM, column):
      cache_BMR = jax.lax.dynamic_update_slice_in_dim(cache_BMR, latent_BSR.astype(cache_BMR.dtype), column, axis=1)
      mask_BTS = visible_BTS(column + jnp.arange(q_BTNR.shape[1]), jnp.arange(cache_BMR.shape[1]),
                             segment_ids_BT, cached_ids_BM, None)
      k_BMKR = cache_BMR[:, :, None].astype(q_BTNR.dtype)
      return attention_reference(q_BTNR, k_BMKR, k_BMKR[..., :spec.kv_rank], mask_BTS, scale=spec.score_scale), cache_BMR

    heads, latent, row = shard('BMNR'), shard('BMR'), shard('BM')  # M: time is whole on every device, whatever the mesh
    out_BTNR, cache_BMR = jax.shard_map(
      attend, in_specs=(heads, latent, latent, row, row, shard('')), out_specs=(heads, latent))(
        jax.reshard(q_BTNR, heads), jax.reshard(latent_BSR, latent), cache.latent_BMR,
        jax.reshard(rows.segment_ids_BT, row), jax.reshard(past.segment_ids_BM, row), past.column)
    out_BTNH = einsum('BTND,DNH->BTNH', jax.reshard(out_BTNR, shard('BTNR')), self.w_v_up_DNH[...])
    return self._output(spec, out_BTNH), LatentCache(cache_BMR)

  def _queries(self, spec, x_BTD, rows):
    """Their parts without and with rotation, [B, T, N, nope_dim] and [B, T, N, rope_dim]."""
    if spec.q_rank is None:
      q_BTNH = einsum('BTD,DNH->BTNH', x_BTD, self.w_q_DNH[...])
    else:
      latent_BTR = einsum('BTD,DR->BTR', x_BTD, self.w_q_down_DR[...])
      if spec.bias:
        latent_BTR += self.b_q_down_R[...].astype(latent_BTR.dtype)
      q_BTNH = einsum('BTD,DNH->BTNH', self.q_norm(_norm(spec, rows), latent_BTR), self.w_q_up_DNH[...])
    return q_BTNH[..., :spec.nope_dim], _rotated(spec, q_BTNH[..., spec.nope_dim:], rows)

  def _latents(self, spec, x_BTD, rows):
    """What a cache holds of each token: [B, S, kv_rank] and [B, S, rope_dim]."""
    latent_BSR = einsum('BSD,DR->BSR', x_BTD, self.w_kv_down_DR[...])
    k_rope_BSH = einsum('BSD,DH->BSH', x_BTD, self.w_k_rope_DH[...])
    if spec.bias:
      latent_BSR += self.b_kv_down_R[...].astype(latent_BSR.dtype)
      k_rope_BSH += self.b_k_rope_H[...].astype(k_rope_BSH.dtype)
    return self.kv_norm(_norm(spec, rows), latent_BSR), _rotated(spec, k_rope_BSH[:, :, None], rows)[:, :, 0]

  def _output(self, spec, out_BTNH):
    y_BTD = einsum('BTNH,NHD->BTD', out_BTNH, self.w_o_NHD[...])
    return y_BTD + self.b_o_D[...].astype(y_BTD.dtype) if spec.bias else y_BTD


def _norm(spec, rows):
  return dataclasses.replace(rows.norm, eps=spec.norm_eps)


def _rotated(spec, x_BTNH, rows):
  return x_BTNH if spec.rope is None else rotate(x_BTNH, spec.rope, rows.rope[rope_key(spec.rope, spec.rope_dim)])
