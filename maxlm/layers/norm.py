"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467).  D width of what is normalised (the model's, or a head's)."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.param import constant


class RmsNorm(nnx.Module):
  """x / rms(x) * scale over the last dimension; statistics and scale in fp32, result in the dtype of x."""

  def __init__(self, width: int):
    self.scale_D = constant('D', (width,), 1.0)

  def __call__(self, x: jax.Array, eps: float) -> jax.Array:
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * self.scale_D[...]).astype(x.dtype)
