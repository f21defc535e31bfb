"""Feed-forward layer, gated (Shazeer 2020, arXiv 2002.05202) or plain.  D width  F hidden width."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

from maxlm.layers.param import constant, normal
from maxlm.ops.einsum import einsum

ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=True),
  'relu2': lambda x: jax.numpy.square(jax.nn.relu(x)),
}


@dataclasses.dataclass(kw_only=True, slots=True)
class MlpSpec:
  """d_ff: hidden width. activation: silu, gelu (tanh form) or relu2. gated: act(gate) * up. bias: on every projection."""

  d_ff: int
  activation: Literal['silu', 'gelu', 'relu2'] = 'silu'
  gated: bool = True
  bias: bool = False


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

  def __call__(self, spec: MlpSpec, x_BTD: jax.Array) -> jax.Array:
    up_BTF = einsum('BTD,DF->BTF', x_BTD, self.w_up_DF[...])
    if spec.bias:
      up_BTF += self.b_up_F[...].astype(up_BTF.dtype)
    activation = ACTIVATIONS[spec.activation]
    if spec.gated:
      gate_BTF = einsum('BTD,DF->BTF', x_BTD, self.w_gate_DF[...])
      if spec.bias:
        gate_BTF += self.b_gate_F[...].astype(up_BTF.dtype)
      hidden_BTF = activation(gate_BTF) * up_BTF
    else:
      hidden_BTF = activation(up_BTF)
    y_BTD = einsum('BTF,FD->BTD', hidden_BTF, self.w_down_FD[...])
    return y_BTD + self.b_down_D[...].astype(y_BTD.dtype) if spec.bias else y_BTD
