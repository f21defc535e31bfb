"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a convolution, a state space with a scalar decay a head, a gated norm.

The in-projection that others have as one matrix is one weight a part here, z (gate), x, B, C, dt:
  w_z_DNH w_x_DNH w_b_DKQ w_c_DKQ w_dt_DN, conv_x_WNH conv_b_WKQ conv_c_WKQ (last tap: the token itself) and their biases
  b_conv_x_NH b_conv_b_KQ b_conv_c_KQ, a_log_N (decay is exp(-exp(a_log) dt)), dt_bias_N, skip_N (D in the paper),
  norm_scale_NH, w_o_NHD.

B batch  T time  D width  N heads in K groups of G  H head dim  Q state dim  W taps  J = W - 1 inputs before a token
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import NormSpec
from maxlm.layers.param import constant, normal
from maxlm.layers.recurrent import a_log, conv_weight, document_starts, dt_bias
from maxlm.layers.rows import Past, Rows
from maxlm.ops.conv import conv_silu
from maxlm.ops.einsum import einsum
from maxlm.ops.ssd import ssd
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class Mamba2Spec:
  """What one Mamba-2 layer computes.

  n_groups: heads of a group share B and C, and are normalised together. conv_width: taps. dt_min, dt_max: limits of the
  time step after its softplus. norm: RMS, before the gate ('norm_first'), after it ('gate_first', Mamba-2) or 'none'.
  in_scales: factors on z, x, B, C and dt as projected; out_scale: on the layer's output (Falcon-H1).
  """

  n_heads: int
  head_dim: int
  state_dim: int
  n_groups: int = 1
  conv_width: int = 4
  conv_bias: bool = True
  dt_min: float = 0.0
  dt_max: float | None = None
  norm: Literal['gate_first', 'norm_first', 'none'] = 'gate_first'
  in_scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
  out_scale: float = 1.0

  def check(self, where: str) -> None:
    for name in ('n_heads', 'head_dim', 'state_dim', 'n_groups', 'conv_width'):
      if getattr(self, name) < 1:
        raise ValueError(f'{where}.{name}={getattr(self, name)} must be at least 1')
    if self.n_heads % self.n_groups:
      raise ValueError(f'{where}.n_heads={self.n_heads} is not a multiple of n_groups={self.n_groups}')
    if self.dt_min < 0 or (self.dt_max is not None and self.dt_max <= self.dt_min):
      raise ValueError(f'{where}.dt_max={self.dt_max} must be more than dt_min={self.dt_min}, and that at least 0')
    if self.norm not in ('gate_first', 'norm_first', 'none'):
      raise ValueError(f'{where}.norm={self.norm!r} is none of gate_first, norm_first, none')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {'n_heads': ('N', self.n_heads), 'n_groups': ('K', self.n_groups)}

  def matmul_params(self, d_model: int) -> int:
    inner, shared = self.n_heads * self.head_dim, 2 * self.n_groups * self.state_dim
    return d_model * (3 * inner + shared + self.n_heads) + self.conv_width * (inner + shared)

  def mixing_flops(self, tokens: int, pairs) -> float:
    return 4.0 * tokens * self.n_heads * self.state_dim * self.head_dim  # by definition: a write and a read of each state

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Mamba2':
    return Mamba2(self, d_model, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> 'Mamba2Cache':
    def zeros(heads, width):
      return jnp.zeros((batch, self.conv_width - 1, heads, width), dtype, out_sharding=shard('BJNH'))

    K, N, Q, H = self.n_groups, self.n_heads, self.state_dim, self.head_dim
    return Mamba2Cache(zeros(N, H), zeros(K, Q), zeros(K, Q),
                       jnp.zeros((batch, N, Q, H), jnp.float32, out_sharding=shard('BNQH')))


class Mamba2Cache(NamedTuple):
  """What a layer remembers: the last inputs of its convolutions, and the states in fp32."""

  x_BJNH: jax.Array
  b_BJKQ: jax.Array
  c_BJKQ: jax.Array
  state_BNQH: jax.Array


class Mamba2(nnx.Module):
  """Weights of a Mamba-2 layer; the spec says how they are used."""

  def __init__(self, spec: Mamba2Spec, d_model: int, rngs: nnx.Rngs):
    D, N, K, H, Q, W = d_model, spec.n_heads, spec.n_groups, spec.head_dim, spec.state_dim, spec.conv_width
    self.w_z_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_x_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_b_DKQ = normal(rngs, 'DKQ', (D, K, Q), D**-0.5)
    self.w_c_DKQ = normal(rngs, 'DKQ', (D, K, Q), D**-0.5)
    self.w_dt_DN = normal(rngs, 'DN', (D, N), D**-0.5)
    self.conv_x_WNH = conv_weight(rngs, 'WNH', (W, N, H))
    self.conv_b_WKQ = conv_weight(rngs, 'WKQ', (W, K, Q))
    self.conv_c_WKQ = conv_weight(rngs, 'WKQ', (W, K, Q))
    if spec.conv_bias:
      self.b_conv_x_NH = constant('NH', (N, H), 0.0)
      self.b_conv_b_KQ = constant('KQ', (K, Q), 0.0)
      self.b_conv_c_KQ = constant('KQ', (K, Q), 0.0)
    self.a_log_N = a_log(rngs, 'N', (N,))
    self.dt_bias_N = dt_bias(rngs, 'N', (N,))
    self.skip_N = constant('N', (N,), 1.0)
    if spec.norm != 'none':
      self.norm_scale_NH = constant('NH', (N, H), 1.0)
    self.w_o_NHD = normal(rngs, 'NHD', (N, H, D), (N * H) ** -0.5)

  def __call__(self, spec: Mamba2Spec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """The layer within the documents of packed rows."""
    cache = spec.empty_cache(x_BTD.shape[0], x_BTD.shape[1], x_BTD.dtype)
    return self._mix(spec, x_BTD, rows, document_starts(rows), cache)[0]

  def extend(self, spec: Mamba2Spec, x_BTD: jax.Array, rows: Rows, cache: Mamba2Cache,
             past: Past) -> tuple[jax.Array, Mamba2Cache]:
    """As `__call__` for T new tokens, after those the cache remembers."""
    return self._mix(spec, x_BTD, rows, document_starts(rows, past), cache)

  def _mix(self, spec, x_BTD, rows, starts_BT, cache):
    z_BTNH, x_BTNH, b_BTKQ, c_BTKQ, dt_BTN = self._project(spec, x_BTD)
    biases = (self.b_conv_x_NH[...], self.b_conv_b_KQ[...], self.b_conv_c_KQ[...]) if spec.conv_bias else (None,) * 3
    x_BTNH, x_BJNH = conv_silu(x_BTNH, self.conv_x_WNH[...], biases[0], starts_BT, cache.x_BJNH)
    b_BTKQ, b_BJKQ = conv_silu(b_BTKQ, self.conv_b_WKQ[...], biases[1], starts_BT, cache.b_BJKQ)
    c_BTKQ, c_BJKQ = conv_silu(c_BTKQ, self.conv_c_WKQ[...], biases[2], starts_BT, cache.c_BJKQ)

    dt_BTN = jax.nn.softplus(dt_BTN.astype(jnp.float32) + self.dt_bias_N[...])
    dt_BTN = jnp.clip(dt_BTN, spec.dt_min, spec.dt_max)
    x_BTNH = x_BTNH.astype(jnp.float32)
    y_BTNH, state_BNQH = ssd(x_BTNH * dt_BTN[..., None], -jnp.exp(self.a_log_N[...]) * dt_BTN, b_BTKQ, c_BTKQ, starts_BT,
                             cache.state_BNQH)
    y_BTNH = self._gated_norm(spec, y_BTNH + self.skip_N[...][:, None] * x_BTNH, z_BTNH, rows.norm.eps)
    y_BTD = einsum('BTNH,NHD->BTD', y_BTNH.astype(x_BTD.dtype), self.w_o_NHD[...])
    return y_BTD if spec.out_scale == 1.0 else y_BTD * spec.out_scale, Mamba2Cache(x_BJNH, b_BJKQ, c_BJKQ, state_BNQH)

  def _project(self, spec, x_BTD):
    parts = (einsum('BTD,DNH->BTNH', x_BTD, self.w_z_DNH[...]), einsum('BTD,DNH->BTNH', x_BTD, self.w_x_DNH[...]),
             einsum('BTD,DKQ->BTKQ', x_BTD, self.w_b_DKQ[...]), einsum('BTD,DKQ->BTKQ', x_BTD, self.w_c_DKQ[...]),
             einsum('BTD,DN->BTN', x_BTD, self.w_dt_DN[...]))
    return [y if scale == 1.0 else y * scale for y, scale in zip(parts, spec.in_scales)]

  def _gated_norm(self, spec, y_BTNH, z_BTNH, eps):
    gate_BTNH = jax.nn.silu(z_BTNH.astype(jnp.float32))
    if spec.norm != 'norm_first':
      y_BTNH *= gate_BTNH
    if spec.norm != 'none':
      B, T, N, H = y_BTNH.shape
      y_BTKGH = y_BTNH.reshape(B, T, spec.n_groups, -1, H, out_sharding=shard('BTKGH'))
      y_BTKGH *= jax.lax.rsqrt(jnp.mean(jnp.square(y_BTKGH), axis=(-2, -1), keepdims=True) + eps)
      y_BTNH = y_BTKGH.reshape(B, T, N, H, out_sharding=shard('BTNH')) * self.norm_scale_NH[...]
    return y_BTNH * gate_BTNH if spec.norm == 'norm_first' else y_BTNH
