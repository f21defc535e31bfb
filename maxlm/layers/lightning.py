"""Lightning attention (Qin et al. 2024, arXiv 2401.04658) as in MiniMax-01 (arXiv 2501.08313): linear attention whose heads
forget, each at its own fixed rate.

Weights: w_q_DNH w_k_DNH w_v_DNH, out_norm.scale_D (over all heads, N-major), w_gate_DNH, w_o_NHD; and decay_N, not trained:
a head's state decays by exp(-decay) at each token. It is `slopes` of the first layer until an importer sets it.

B batch  T time  D width  N heads  H head dim
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.param import normal
from maxlm.layers.recurrent import document_starts
from maxlm.layers.rows import Past, Rows
from maxlm.ops.einsum import einsum
from maxlm.ops.ssd import ssd
from maxlm.sharding import spec as shard

NORM = NormSpec(eps=1e-6)  # of the output, whatever the model's norm is


@dataclasses.dataclass(kw_only=True, slots=True)
class LightningSpec:
  """What one lightning attention layer computes: n_heads of queries, keys and values, each of head_dim."""

  n_heads: int
  head_dim: int

  def check(self, where: str) -> None:
    for name in ('n_heads', 'head_dim'):
      if getattr(self, name) < 1:
        raise ValueError(f'{where}.{name}={getattr(self, name)} must be at least 1')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {'n_heads': ('N', self.n_heads)}

  def matmul_params(self, d_model: int) -> int:
    return 5 * d_model * self.n_heads * self.head_dim

  def mixing_flops(self, tokens: int, pairs) -> float:
    return 4.0 * tokens * self.n_heads * self.head_dim**2  # by definition: a write and a read of each state

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Lightning':
    return Lightning(self, d_model, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> 'LightningCache':
    shape = batch, self.n_heads, self.head_dim, self.head_dim
    return LightningCache(jnp.zeros(shape, jnp.float32, out_sharding=shard('BNHH')))


class LightningCache(NamedTuple):
  """What a layer remembers, in fp32: for each head a sum of keys times values, decayed."""

  state_BNHH: jax.Array


class Lightning(nnx.Module):
  """Weights of a lightning attention layer; the spec says how they are used."""

  def __init__(self, spec: LightningSpec, d_model: int, rngs: nnx.Rngs):
    D, N, H = d_model, spec.n_heads, spec.head_dim
    self.w_q_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_k_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_v_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.decay_N = nnx.Param(jax.reshard(jnp.asarray(slopes(N, 0, 1)), shard('N')))
    self.out_norm = Norm(NORM, N * H)
    self.w_gate_DNH = normal(rngs, 'DNH', (D, N, H), D**-0.5)
    self.w_o_NHD = normal(rngs, 'NHD', (N, H, D), (N * H) ** -0.5)

  def __call__(self, spec: LightningSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    """Linear attention within the documents of packed rows."""
    cache = spec.empty_cache(x_BTD.shape[0], x_BTD.shape[1], x_BTD.dtype)
    return self._mix(x_BTD, document_starts(rows), cache)[0]

  def extend(self, spec: LightningSpec, x_BTD: jax.Array, rows: Rows, cache: LightningCache,
             past: Past) -> tuple[jax.Array, LightningCache]:
    """As `__call__` for T new tokens, after those the cache remembers."""
    return self._mix(x_BTD, document_starts(rows, past), cache)

  def _mix(self, x_BTD, starts_BT, cache):
    q_BTNH, k_BTNH, v_BTNH = (jax.nn.silu(einsum('BTD,DNH->BTNH', x_BTD, w_DNH[...]))
                              for w_DNH in (self.w_q_DNH, self.w_k_DNH, self.w_v_DNH))
    log_decay_N = -jax.lax.stop_gradient(self.decay_N[...])
    log_decay_BTN = jnp.broadcast_to(log_decay_N, v_BTNH.shape[:3], out_sharding=shard('BTN'))
    y_BTNH, state_BNHH = ssd(v_BTNH, log_decay_BTN, k_BTNH, q_BTNH, starts_BT, cache.state_BNHH)
    gate_BTNH = jax.nn.sigmoid(einsum('BTD,DNH->BTNH', x_BTD, self.w_gate_DNH[...]).astype(jnp.float32))
    y_BTNH = (gate_BTNH * self.out_norm(NORM, y_BTNH, 'NH')).astype(x_BTD.dtype)
    return einsum('BTNH,NHD->BTD', y_BTNH, self.w_o_NHD[...]), LightningCache(state_BNHH)


def slopes(n_heads: int, layer: int, n_layers: int) -> np.ndarray:
  """decay_N of a layer, from 0, of MiniMax-01: fp32, ALiBi's slopes (arXiv 2108.12409), less in later layers."""
  head_N = np.arange(1, n_heads + 1)
  return (2.0 ** (-8 * head_N / n_heads) * (1 - layer / (n_layers - 1 + 1e-5) + 1e-5)).astype(np.float32)
