"""The one place where activations meet weights.  A rank of an adapter"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from maxlm.ops import rings
from maxlm.ops.rings import LANES
from maxlm.sharding import axes, axis_size, device_kind, spec


class Adapted(NamedTuple):
  """A weight with a low-rank addition, W + scale * A B (`maxlm.lora`). magnitude: with DoRA the length of each column."""

  base: jax.Array
  a: jax.Array  # [inputs, A]
  b: jax.Array  # [A, outputs]
  scale: float
  magnitude: jax.Array | None  # [outputs]


def einsum(dims: str, x: jax.Array, w: jax.Array | Adapted) -> jax.Array:
  """`jnp.einsum(dims, x, w)` of an activation with a master weight; the letters of `dims` give every sharding.

  The weight is cast to the activation's dtype and gathered over fsdp here, where it is used, and again for the backward
  pass rather than kept. Its gradient is summed over devices in that dtype. Remat policies know the result as 'product'.
  einsum('BTD,DF->BTF', x_BTD, w_DF).
  """
  x_dims, w_dims, out_dims = _split(dims)
  if isinstance(w, Adapted):
    return _adapted(x_dims, w_dims, out_dims, x, w)
  heads = next((pair for pair in ('NH', 'KH') if pair in w_dims), '')
  inner, outer = (x_dims, out_dims) if heads in x_dims else (out_dims, x_dims)
  if heads and heads in inner and heads[0] not in outer and _merges(x_dims, w_dims, out_dims, heads, x, w):
    flat = _product(dims.replace(heads, 'F'), _merged(x_dims, heads, x), _merged(w_dims, heads, w))
    n_heads, width = (w.shape[w_dims.index(dim)] for dim in heads)
    y = flat if outer is out_dims else jax.lax.reshape(flat, (*flat.shape[:-1], n_heads, width), out_sharding=spec(out_dims))
  else:
    y = _product(dims, x, w)
  return checkpoint_name(y, 'product')


@jax.custom_jvp
def after(w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(w, y), of which the weight is not to be gathered before y is there: a hint for the compiler's schedule."""
  return jax.lax.optimization_barrier((w, y))


# JAX's own rule would make tangents of zeros, and of a frozen weight one that is trained.
after.defjvp(lambda primals, tangents: (after(*primals), tangents), symbolic_zeros=True)


def _merges(x_dims, w_dims, out_dims, heads, x, w):
  """Whether heads are multiplied as one wide matrix: where they do not fill a TPU's lanes, half of it would be idle; and
  where a weight is gathered for fewer tokens than it has rows: a TPU's compiler then turns these around, not the weight."""
  tokens = ''.join(dim for dim in x_dims if dim in out_dims)
  rows, = (w.shape[i] for i, dim in enumerate(w_dims) if dim not in heads)
  here = math.prod(x.shape[x_dims.index(dim)] for dim in tokens) // axis_size(tokens)
  return w.shape[w_dims.index('H')] % LANES or spec(w_dims) != spec(w_dims, gathered=True) and here < rows


def _merged(dims, heads, a):
  """Heads and their dims as one: the heads of one device are neighbours, so nothing moves between devices."""
  if heads not in dims:
    return a
  i = dims.index(heads)
  return jax.lax.reshape(a, (*a.shape[:i], a.shape[i] * a.shape[i + 1], *a.shape[i + 2:]),
                         out_sharding=spec(dims.replace(heads, 'F')))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(dims, x, w):
  """Barriers: a TPU's compiler would make what comes before a product, an activation say, while it loads the product's
  tiles, and the matrix unit waits: 1.6 times the cycles by its own count, where a pass of its own costs a tenth."""
  _, w_dims, out_dims = _split(dims)
  x = jax.lax.optimization_barrier(x)
  return row_major(jnp.einsum(dims, x, _gathered(w_dims, w, x.dtype), out_sharding=spec(out_dims)))


def row_major(x: jax.Array) -> jax.Array:
  """An array whose last dim is no multiple of LANES, kept in rows: a TPU's compiler would turn it around, and back wherever
  somebody needs rows."""
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if x.shape[-1] % LANES else x


def _forward(dims, x, w):
  """A frozen weight gets no gradient, nor does data: then nothing is kept for it."""
  return _product(dims, x.value, w.value), (x.value if w.perturbed else None, w.value)


def _backward(dims, residuals, dy):
  """JAX's own gradient of a gathered weight is a sum over all devices, of which each then takes its part: twice the bytes of
  a scatter, which a TPU's compiler makes only of sums over one dimension of its torus after another."""
  (x, w), (x_dims, w_dims, out_dims) = residuals, _split(dims)
  dy = jax.lax.optimization_barrier(dy)
  dx = jnp.einsum(f'{out_dims},{w_dims}->{x_dims}', dy, _gathered(w_dims, w, dy.dtype), out_sharding=spec(x_dims))
  dx = row_major(dx)
  if axis_size(''.join(dim for dim in out_dims if dim not in x_dims)) == 1:
    dx = jax.lax.optimization_barrier(dx)  # a sum over devices becomes a scatter with the slice that follows, if it may
  if x is None:
    return dx, None
  summed = axes(''.join(dim for dim in dict.fromkeys(x_dims + out_dims) if dim not in w_dims))

  def island(x, dy):
    return summed_product(x_dims, out_dims, w_dims, x, dy, summed)

  dw = jax.shard_map(island, in_specs=(spec(x_dims), spec(out_dims)), out_specs=spec(w_dims))(x, dy)
  return dx, dw.astype(w.dtype)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def summed_product(x_dims: str, y_dims: str, w_dims: str, x: jax.Array, y: jax.Array, summed: tuple[str, ...]) -> jax.Array:
  """Inside an island: a weight's gradient einsum(f'{x_dims},{y_dims}->{w_dims}', x, y), summed and scattered as `scatter`
  does; where it pays, while it is computed."""
  over = tuple(axis for axis in split_axes(w_dims, w_dims.index('D')) if axis in summed) if 'D' in w_dims else ()
  if device_kind().startswith(rings.KINDS):
    dw = rings.scattered_product(x_dims, y_dims, w_dims, x, y, over)
    if dw is not None:
      return jax.lax.psum(dw, tuple(axis for axis in summed if axis not in over))
  return scatter(w_dims, jnp.einsum(f'{x_dims},{y_dims}->{w_dims}', x, y), summed)


def scatter(dims: str, partial: jax.Array, summed: tuple[str, ...]) -> jax.Array:
  """Inside an island: the sum over mesh axes `summed` of a weight's gradient, of which a device keeps the part it has of the
  weight. Scattered over one axis after another, then summed over those that do not split the weight."""
  scattered = [(axis, i) for i, dim in enumerate(dims) for axis in split_axes(dims, i) if axis in summed]
  for axis, i in scattered:
    partial = jax.lax.psum_scatter(partial, axis, scatter_dimension=i, tiled=True)
  return jax.lax.psum(partial, tuple(axis for axis in summed if axis not in dict(scattered)))


def split_axes(dims: str, i: int) -> tuple[str, ...]:
  """Mesh axes over which the i-th dimension of an array of `dims` is split."""
  split = spec(dims)[i]
  return split if isinstance(split, tuple) else (split,) if split else ()


def _gathered(w_dims, w, dtype):
  return jax.reshard(w.astype(dtype), spec(w_dims, gathered=True))


def _split(dims):
  inputs, out_dims = dims.split('->')
  return *inputs.split(','), out_dims


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
