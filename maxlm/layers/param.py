"""Creating weights: shape, sharding and initial scale said in one place."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.sharding import spec


def normal(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...], std: float) -> nnx.Param:
  """fp32 weight, normal cut at three sigma. The values do not depend on the mesh."""
  draw = jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32, out_sharding=spec(dims))
  return nnx.Param(std * draw)


def constant(dims: str, shape: tuple[int, ...], value: float) -> nnx.Param:
  """fp32 weight with one value everywhere: norm scales (1), biases and sinks (0)."""
  return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec(dims)))
