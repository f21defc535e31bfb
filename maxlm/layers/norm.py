"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and LayerNorm (Ba et al. 2016, arXiv 1607.06450).

D width of what is normalised: the model's, a head's, or that of all heads together.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.param import constant
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class NormSpec:
  """kind: 'layer' subtracts the mean and has a bias, 'rms' neither. one_plus: the factor is 1 + scale (Gemma).
  cast: the normalised x goes back to its dtype 'after' the factor (OLMo, Gemma) or 'before' it (Llama); one in fp32."""

  kind: Literal['rms', 'layer'] = 'rms'
  eps: float = 1e-6
  one_plus: bool = False
  cast: Literal['after', 'before'] = 'after'


class Norm(nnx.Module):
  """Weights of a norm; statistics are fp32, the result has the dtype of x."""

  def __init__(self, spec: NormSpec, width: int):
    self.scale_D = constant('D', (width,), 0.0 if spec.one_plus else 1.0)
    if spec.kind == 'layer':
      self.bias_D = constant('D', (width,), 0.0)

  def __call__(self, spec: NormSpec, x: jax.Array, dims: str = 'D') -> jax.Array:
    """dims: the last dims of x, normalised together: 'NH' is all heads of a token as one vector."""
    def over_dims(w_D):
      return jax.reshard(w_D.reshape(x.shape[-len(dims):]), shard(dims))

    together = tuple(range(-len(dims), 0))
    y = x.astype(jnp.float32)
    if spec.kind == 'layer':
      y -= jnp.mean(y, axis=together, keepdims=True)
    y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=together, keepdims=True) + spec.eps)
    if spec.cast == 'before':
      y = y.astype(x.dtype)
    y *= over_dims(1.0 + self.scale_D[...] if spec.one_plus else self.scale_D[...]).astype(y.dtype)
    if spec.kind == 'layer':
      y += over_dims(self.bias_D[...]).astype(y.dtype)
    return y.astype(x.dtype)
