"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) and Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692).

Weights: w_q_DKQ w_k_DKQ w_v_DNH, their convolutions conv_q_WKQ conv_k_WKQ conv_v_WNH (last tap: the token itself),
w_beta_DN, a_log_N, out_norm.scale_D (over H, one for all heads), w_o_NHD. Decay is exp(-exp(a_log) softplus(a + dt_bias)):
  decay 'head':     a from w_decay_DN, dt_bias_N; output gate from w_gate_DNH
  decay 'channel':  a from w_decay_down_DR w_decay_up_RNQ, dt_bias_NQ; output gate from w_gate_down_DR w_gate_up_RNH

B batch  T time  D width  N value heads  K key heads  Q key dim  H value dim  R = H low rank  W taps  J = W - 1 inputs before
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.param import normal
from maxlm.layers.recurrent import a_log, conv_weight, document_starts, dt_bias
from maxlm.layers.rows import Past, Rows
from maxlm.ops.conv import conv_silu
from maxlm.ops.delta import delta_rule
from maxlm.ops.einsum import einsum
from maxlm.sharding import spec as shard

UNIT_EPS = 1e-6  # of the l2 norm of queries and keys


@dataclasses.dataclass(kw_only=True, slots=True)
class DeltaSpec:
  """What one layer with the gated delta rule computes.

  n_heads, head_dim: of values; n_key_heads, key_dim: of keys and queries. conv_width: taps. decay: one a 'head', with an
  output gate of SiLU (Gated DeltaNet), or one a key 'channel', with decay and a sigmoid output gate of low rank (Kimi).
  negative_eigenvalues: beta in (0, 2) rather than (0, 1) (arXiv 2411.12537). norm_eps: of the output's RMS norm (None: the
  model's).
  """

  n_heads: int
  n_key_heads: int
  head_dim: int
  key_dim: int
  conv_width: int = 4
  decay: Literal['head', 'channel'] = 'head'
  negative_eigenvalues: bool = False
  norm_eps: float | None = None

  def check(self, where: str) -> None:
    for name in ('n_heads', 'n_key_heads', 'head_dim', 'key_dim', 'conv_width'):
      if getattr(self, name) < 1:
        raise ValueError(f'{where}.{name}={getattr(self, name)} must be at least 1')
    if self.n_heads % self.n_key_heads:
      raise ValueError(f'{where}.n_heads={self.n_heads} is not a multiple of n_key_heads={self.n_key_heads}')
    if self.decay not in ('head', 'channel'):
      raise ValueError(f'{where}.decay={self.decay!r} is none of head, channel')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {'n_heads': ('N', self.n_heads), 'n_key_heads': ('K', self.n_key_heads)}

  def matmul_params(self, d_model: int) -> int:
    values, keys = self.n_heads * self.head_dim, self.n_key_heads * self.key_dim
    projections = d_model * (2 * values + 2 * keys + self.n_heads) + self.conv_width * (values + 2 * keys)
    if self.decay == 'head':
      return projections + d_model * (values + self.n_heads)
    return projections + self.head_dim * (2 * d_model + values + self.n_heads * self.key_dim)

  def mixing_flops(self, tokens: int, pairs) -> float:
    return 6.0 * tokens * self.n_heads * self.key_dim * self.head_dim  # by definition: two reads and a write of each state

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Delta':
    return Delta(self, d_model, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> 'DeltaCache':
    def zeros(heads, width):
      return jnp.zeros((batch, self.conv_width - 1, heads, width), dtype, out_sharding=shard('BJNH'))

    K, N, Q, H = self.n_key_heads, self.n_heads, self.key_dim, self.head_dim
    return DeltaCache(zeros(K, Q), zeros(K, Q), zeros(N, H),
                      jnp.zeros((batch, N, Q, H), jnp.float32, out_sharding=shard('BNQH')))


class DeltaCache(NamedTuple):
  """What a layer remembers: the last inputs of its convolutions, and the states in fp32."""

  q_BJKQ: jax.Array
  k_BJKQ: jax.Array
  v_BJNH: jax.Array
  state_BNQH: jax.Array


class Delta(nnx.Module):
  """Weights of a layer with the gated delta rule; the spec says how they are used."""

  def __init__(self, spec: DeltaSpec, d_model: int, rngs: nnx.Rngs):
    D, N, K, H, Q, W = d_model, spec.n_heads, spec.n_key_heads, spec.head_dim, spec.key_dim, spec.conv_width
    self.w_q_DKQ = normal(rngs, 'DKQ', (D, K, Q), D**-0.5)
    self.w_k_DKQ = normal(rngs, 'DKQ', (D, K, Q), D**-0.5)
    self.w_v_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.conv_q_WKQ = conv_weight(rngs, 'WKQ', (W, K, Q))
    self.conv_k_WKQ = conv_weight(rngs, 'WKQ', (W, K, Q))
    self.conv_v_WNH = conv_weight(rngs, 'WNH', (W, N, H))
    self.w_beta_DN = normal(rngs, 'DN', (D, N), D**-0.5)
    self.a_log_N = a_log(rngs, 'N', (N,))
    if spec.decay == 'head':
      self.w_decay_DN = normal(rngs, 'DN', (D, N), D**-0.5)
      self.dt_bias_N = dt_bias(rngs, 'N', (N,))
      self.w_gate_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    else:
      self.w_decay_down_DR = normal(rngs, 'DR', (D, H), D**-0.5)
      self.w_decay_up_RNQ = normal(rngs, 'RNQ', (H, N, Q), H**-0.5)
      self.dt_bias_NQ = dt_bias(rngs, 'NQ', (N, Q))
      self.w_gate_down_DR = normal(rngs, 'DR', (D, H), D**-0.5)
      self.w_gate_up_RNH = normal(rngs, 'RNH', (H, N, H), H**-0.5)
    self.out_norm = Norm(NormSpec(), H)
    self.w_o_NHD = normal(rngs, 'NHD', (N, H, D), (N * H) ** -0.5)

  def __call__(self, spec: DeltaSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """The layer within the documents of packed rows."""
    cache = spec.empty_cache(x_BTD.shape[0], x_BTD.shape[1], x_BTD.dtype)
    return self._mix(spec, x_BTD, rows, document_starts(rows), cache)[0]

  def extend(self, spec: DeltaSpec, x_BTD: jax.Array, rows: Rows, cache: DeltaCache,
             past: Past) -> tuple[jax.Array, DeltaCache]:
    """As `__call__` for T new tokens, after those the cache remembers."""
    return self._mix(spec, x_BTD, rows, document_starts(rows, past), cache)

  def _mix(self, spec, x_BTD, rows, starts_BT, cache):
    q_BTKQ = einsum('BTD,DKQ->BTKQ', x_BTD, self.w_q_DKQ[...])
    k_BTKQ = einsum('BTD,DKQ->BTKQ', x_BTD, self.w_k_DKQ[...])
    v_BTNH = einsum('BTD,DNH->BTNH', x_BTD, self.w_v_DNH[...])
    q_BTKQ, q_BJKQ = conv_silu(q_BTKQ, self.conv_q_WKQ[...], None, starts_BT, cache.q_BJKQ)
    k_BTKQ, k_BJKQ = conv_silu(k_BTKQ, self.conv_k_WKQ[...], None, starts_BT, cache.k_BJKQ)
    v_BTNH, v_BJNH = conv_silu(v_BTNH, self.conv_v_WNH[...], None, starts_BT, cache.v_BJNH)
    beta_BTN = jax.nn.sigmoid(einsum('BTD,DN->BTN', x_BTD, self.w_beta_DN[...]).astype(jnp.float32))
    if spec.negative_eigenvalues:
      beta_BTN *= 2
    y_BTNH, state_BNQH = delta_rule(unit(q_BTKQ) * spec.key_dim**-0.5, unit(k_BTKQ), v_BTNH, self._log_decay(spec, x_BTD),
                                    beta_BTN, starts_BT, cache.state_BNQH)
    norm = NormSpec(eps=rows.norm.eps if spec.norm_eps is None else spec.norm_eps)
    y_BTNH = self.out_norm(norm, y_BTNH) * self._gate(spec, x_BTD)
    y_BTD = einsum('BTNH,NHD->BTD', y_BTNH.astype(x_BTD.dtype), self.w_o_NHD[...])
    return y_BTD, DeltaCache(q_BJKQ, k_BJKQ, v_BJNH, state_BNQH)

  def _log_decay(self, spec, x_BTD):
    """fp32 [B, T, N], or [B, T, N, Q] where each channel has its own."""
    if spec.decay == 'head':
      a_BTN = einsum('BTD,DN->BTN', x_BTD, self.w_decay_DN[...]).astype(jnp.float32)
      return -jnp.exp(self.a_log_N[...]) * jax.nn.softplus(a_BTN + self.dt_bias_N[...])
    a_BTNQ = einsum('BTR,RNQ->BTNQ', einsum('BTD,DR->BTR', x_BTD, self.w_decay_down_DR[...]), self.w_decay_up_RNQ[...])
    return -jnp.exp(self.a_log_N[...])[:, None] * jax.nn.softplus(a_BTNQ.astype(jnp.float32) + self.dt_bias_NQ[...])

  def _gate(self, spec, x_BTD):
    if spec.decay == 'head':
      return jax.nn.silu(einsum('BTD,DNH->BTNH', x_BTD, self.w_gate_DNH[...]).astype(jnp.float32))
    low_BTR = einsum('BTD,DR->BTR', x_BTD, self.w_gate_down_DR[...])
    return jax.nn.sigmoid(einsum('BTR,RNH->BTNH', low_BTR, self.w_gate_up_RNH[...]).astype(jnp.float32))


def unit(x: jax.Array) -> jax.Array:
  """fp32 vectors of length one, along the last dimension."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_EPS)
