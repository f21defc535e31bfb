"""The one place where activations meet weights.  A rank of an adapter"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.sharding import spec


class Adapted(NamedTuple):
  """A weight with a low-rank addition, W + scale * A B (`maxlm.lora`). magnitude: with DoRA the length of each column."""

  base: jax.Array
  a: jax.Array  # [inputs, A]
  b: jax.Array  # [A, outputs]
  scale: float
  magnitude: jax.Array | None  # [outputs]


def einsum(dims: str, x: jax.Array, w: jax.Array | Adapted) -> jax.Array:
  """`jnp.einsum(dims, x, w)` of an activation with a master weight; the letters of `dims` give every sharding.

  The weight is cast to the activation's dtype and gathered over fsdp here, where it is used: under remat it is gathered
  again in the backward pass rather than kept, and its gradient leaves as a scatter. einsum('BTD,DF->BTF', x_BTD, w_DF).
  """
  inputs, out_dims = dims.split('->')
  x_dims, w_dims = inputs.split(',')
  if isinstance(w, Adapted):
    return _adapted(x_dims, w_dims, out_dims, x, w)
  w = jax.reshard(w.astype(x.dtype), spec(w_dims, gathered=True))
  return jnp.einsum(dims, x, w, out_sharding=spec(out_dims))


def _adapted(x_dims: str, w_dims: str, out_dims: str, x: jax.Array, w: Adapted) -> jax.Array:
  """x W + scale (x A) B, each column times magnitude / length: the sum of weights is never made."""
  ins, outs = in_and_out(w_dims)
  assert x_dims.endswith(ins) and out_dims.endswith(outs), f'{w_dims} is no matrix from {ins} to {outs} here: merge it first'
  low_dims = x_dims.removesuffix(ins) + 'A'
  low = einsum(f'{x_dims},{ins}A->{low_dims}', x, w.a)
  y = einsum(f'{x_dims},{w_dims}->{out_dims}', x, w.base)
  y += w.scale * einsum(f'{low_dims},A{outs}->{out_dims}', low, w.b)
  if w.magnitude is not None:
    lengths = jax.lax.stop_gradient(column_lengths(w_dims, w.base, w.a, w.b, w.scale))  # arXiv 2402.09353, section 4.3
    y *= (w.magnitude / lengths).astype(y.dtype)
  return y


def in_and_out(w_dims: str) -> tuple[str, str]:
  """The letters of a weight that a product sums over, and those that it makes: to the width D, or from the first letter."""
  return (w_dims[:-1], 'D') if w_dims.endswith('D') else (w_dims[0], w_dims[1:])


def column_lengths(w_dims: str, base: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """Euclidean length, over the inputs, of each output's column of W + scale * A B: fp32 [outputs]. The sum is not made:
  |w + s A b|^2 = |w|^2 + b . (2 s A'w + s^2 A'A b)."""
  ins, outs = in_and_out(w_dims)

  def product(dims, x, y):
    return jnp.einsum(dims, x, y, precision='highest', out_sharding=spec(dims.split('->')[1]))

  cross = 2 * scale * product(f'{ins}A,{w_dims}->A{outs}', a, base)
  cross += scale**2 * product(f'AC,C{outs}->A{outs}', product(f'{ins}A,{ins}C->AC', a, a), b)  # C: A once more
  return jnp.sqrt(product(f'{w_dims},{w_dims}->{outs}', base, base) + product(f'A{outs},A{outs}->{outs}', b, cross))
