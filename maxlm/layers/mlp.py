"""Feed-forward layer, gated (Shazeer 2020, arXiv 2002.05202) or plain.  D width  F hidden width

Weights: w_up_DF w_down_FD, gated w_gate_DF; with biases b_up_F b_down_D, gated b_gate_F; of xIELU the scalars alpha_p and
alpha_n, as they are before softplus.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import NormSpec
from maxlm.layers.param import constant, normal
from maxlm.ops.einsum import Adapted, after, einsum

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=True),
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}
XIELU_BETA, XIELU_ALPHA = 0.5, 0.8  # the second is where both curvatures start
SWIGLU_STEEPNESS = 1.702


@dataclasses.dataclass(kw_only=True, slots=True)
class MlpSpec:
  """d_ff: hidden width. gated: act(gate) * up, else act(up). bias: on every projection.

  activation: silu, gelu (tanh form), relu2 (Primer, arXiv 2109.08668), xielu (learned; plain only) or clamped_swiglu, which
  is gate * sigmoid(1.702 gate) * (up + 1) for gate <= limit and |up| <= limit (gpt-oss, arXiv 2508.10925).
  gate_scale, out_scale: factors on the gate before its activation and on the output (Falcon-H1).
  """

  d_ff: int
  activation: Literal['silu', 'gelu', 'relu2', 'xielu', 'clamped_swiglu'] = 'silu'
  gated: bool = True
  bias: bool = False
  limit: float | None = None
  gate_scale: float = 1.0
  out_scale: float = 1.0

  def check(self, where: str) -> None:
    """ValueError, beginning with `where`, for what has no meaning."""
    if self.d_ff < 1:
      raise ValueError(f'{where}.d_ff={self.d_ff} must be at least 1')
    if self.activation not in (*ACTIVATIONS, 'xielu', 'clamped_swiglu'):
      raise ValueError(f'{where}.activation={self.activation!r} is none of {", ".join(ACTIVATIONS)}, xielu, clamped_swiglu')
    clamped = self.activation == 'clamped_swiglu'
    if self.activation in ('xielu', 'clamped_swiglu') and self.gated != clamped:
      raise ValueError(f'{where}.gated={self.gated} does not go with activation={self.activation!r}: set it to {clamped}')
    if clamped != (self.limit is not None) or clamped and self.limit <= 0:
      raise ValueError(f'{where}.limit={self.limit}: activation={self.activation!r} takes '
                       + ('a positive number, such as 7.0 of gpt-oss' if clamped else 'no limit: set it to None'))
    if self.gate_scale != 1.0 and not self.gated:
      raise ValueError(f'{where}.gate_scale={self.gate_scale} has no gate to act on: set it to 1.0, or gated=True')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {'d_ff': ('F', self.d_ff)}

  def matmul_params(self, d_model: int) -> int:
    return (3 if self.gated else 2) * d_model * self.d_ff

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Mlp':
    return Mlp(self, d_model, rngs)


class Mlp(nnx.Module):
  """Weights of an MLP; the spec says how they are used."""

  def __init__(self, spec: MlpSpec, d_model: int, rngs: nnx.Rngs):
    D, F = d_model, spec.d_ff
    self.w_up_DF = normal(rngs, 'DF', (D, F), D**-0.5)
    if spec.gated:
      self.w_gate_DF = normal(rngs, 'DF', (D, F), D**-0.5)
    self.w_down_FD = normal(rngs, 'FD', (F, D), F**-0.5)
    if spec.bias:
      self.b_up_F = constant('F', (F,), 0.0)
      if spec.gated:
        self.b_gate_F = constant('F', (F,), 0.0)
      self.b_down_D = constant('D', (D,), 0.0)
    if spec.activation == 'xielu':
      self.alpha_p = constant('', (), _inverse_softplus(XIELU_ALPHA))
      self.alpha_n = constant('', (), _inverse_softplus(XIELU_ALPHA - XIELU_BETA))

  def __call__(self, spec: MlpSpec, x_BTD: jax.Array) -> jax.Array:
    up_BTF = einsum('BTD,DF->BTF', x_BTD, self.w_up_DF[...])
    gate_BTF = einsum('BTD,DF->BTF', x_BTD, self.w_gate_DF[...]) if spec.gated else None
    if spec.bias:
      up_BTF += self.b_up_F[...].astype(up_BTF.dtype)
      if spec.gated:
        gate_BTF += self.b_gate_F[...].astype(up_BTF.dtype)
    alphas = (self.alpha_p[...], self.alpha_n[...]) if spec.activation == 'xielu' else ()
    w_down_FD = self.w_down_FD[...]
    if spec.gated and not isinstance(w_down_FD, Adapted):
      # v5e's compiler, which schedules from the end, hides w_down's gather behind both products, and w_gate's behind none.
      w_down_FD, up_BTF = after(w_down_FD, up_BTF)
    y_BTD = einsum('BTF,FD->BTD', hidden(spec, up_BTF, gate_BTF, *alphas), w_down_FD)
    if spec.bias:
      y_BTD += self.b_down_D[...].astype(y_BTD.dtype)
    return y_BTD if spec.out_scale == 1.0 else y_BTD * spec.out_scale


def hidden(spec: MlpSpec, up: jax.Array, gate: jax.Array | None = None, *alphas: jax.Array) -> jax.Array:
  """The hidden layer, elementwise from what the projections give, in their dtype. alphas: xIELU's alpha_p and alpha_n."""
  if spec.gate_scale != 1.0:
    gate *= spec.gate_scale
  if spec.activation == 'clamped_swiglu':
    gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return gate * jax.nn.sigmoid(SWIGLU_STEEPNESS * gate) * (up + 1)
  if spec.activation == 'xielu':
    return xielu(up, *alphas)
  activation = ACTIVATIONS[spec.activation]
  return activation(gate) * up if spec.gated else activation(up)


def xielu(x: jax.Array, alpha_p: jax.Array, alpha_n: jax.Array) -> jax.Array:
  """xIELU (arXiv 2411.13010), in fp32: expm1(x) - x is a difference of near equals, of which bf16 would leave nothing.

  transformers takes expm1 of min(x, -1e-6): values within 1e-6 of these, and a slope that is wrong between -1e-6 and 0.
  """
  dtype, x = x.dtype, x.astype(jnp.float32)
  above = jax.nn.softplus(alpha_p) * jnp.square(x)
  below = (XIELU_BETA + jax.nn.softplus(alpha_n)) * (jnp.expm1(jnp.minimum(x, 0)) - x)
  return (jnp.where(x < 0, below, above) + XIELU_BETA * x).astype(dtype)


def _inverse_softplus(y: float) -> float:
  return math.log(math.expm1(y))
