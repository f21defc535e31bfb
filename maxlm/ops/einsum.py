"""The one place where activations meet weights."""

import jax
import jax.numpy as jnp

from maxlm.sharding import spec


def einsum(dims: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """`jnp.einsum(dims, x, w)` of an activation with a master weight; the letters of `dims` give every sharding.

  The weight is cast to the activation's dtype and gathered over fsdp here, where it is used: under remat it is gathered
  again in the backward pass rather than kept, and its gradient leaves as a scatter. einsum('BTD,DF->BTF', x_BTD, w_DF).
  """
  inputs, out_dims = dims.split('->')
  w_dims = inputs.split(',')[1]
  w = jax.reshard(w.astype(x.dtype), spec(w_dims, gathered=True))
  return jnp.einsum(dims, x, w, out_sharding=spec(out_dims))
