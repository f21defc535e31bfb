"""A weight's gradient, summed over the devices of a torus while it is computed (Wang et al. 2023, ASPLOS, "Overlap
communication with dependent computation via decomposition").

The sum for a device travels around a ring towards it, and each device that it passes adds what its own tokens make of that
part: a product. Several rings at once, each with columns of its own, use both directions of every dimension of the torus,
and while one waits for its neighbour the products of the others run. Only permutations travel, and these run beside the
core on all TPUs. Scatters do so on SparseCores alone.
"""

import math

import jax
import jax.numpy as jnp

LANES = 128  # of a TPU's registers
KINDS = ('TPU v5 lite',)
# In parts a product takes half as long again, and a scatter in line as long as a product of 2,200 tokens: more do not pay.
# Nor do parts of fewer FLOPs, which cost more for their number than they hide (docs/LOG.md, 2026-11-23).
MOST_TOKENS, LEAST_FLOPS = 2048, 1e9


def scattered_product(x_dims: str, y_dims: str, w_dims: str, x: jax.Array, y: jax.Array, over: tuple[str, ...]
                      ) -> jax.Array | None:
  """Inside an island: einsum(f'{x_dims},{y_dims}->{w_dims}', x, y), summed over the mesh axes `over`, by which D is split
  in weights, the first outermost: each device keeps its part. The sum is rounded to the dtype of x at each device.

  None where rings do not pay: no axis of several devices, too many tokens, or too few columns for the number of rings.
  """
  if 'D' in y_dims:
    x_dims, y_dims, x, y = y_dims, x_dims, y, x
  at, sizes = x_dims.index('D'), [jax.lax.axis_size(axis) for axis in over]
  ways = [(axis, step) for axis, size in zip(over, sizes) for step in {1: (), 2: (1,)}.get(size, (1, -1))]
  columns, n = _columns(w_dims, y_dims, y.shape, len(ways))
  tokens = math.prod(size for dim, size in zip(x_dims, x.shape) if dim in y_dims)
  if not n or tokens > MOST_TOKENS or 2 * x.size * y.size < LEAST_FLOPS * tokens * max(sizes) * n:
    return None
  x = x.reshape(*x.shape[:at], *sizes, -1, *x.shape[at + 1:])
  parts = jnp.split(y, n, axis=y_dims.index(columns))
  sums = [_around(f'{x_dims},{y_dims}->{w_dims}', x, part, at, over, *way) for part, way in zip(parts, ways)]
  return jnp.concatenate(sums, axis=w_dims.index(columns))


def _columns(w_dims, y_dims, y_shape, most):
  """(a dim of the weight, how many rings share its columns): as many of them as it can be divided among."""
  for n in range(most, 0, -1):
    for dim in w_dims:
      if dim in y_dims and y_shape[y_dims.index(dim)] % (n * (LANES if dim == w_dims[-1] else 1)) == 0:
        return dim, n
  return None, 0


def _around(dims, x, y, at, over, axis, step):
  """One ring, along `axis` in the direction of `step`; then the rest of the sum, over the other axes, in line.

  x: with a dim from `at` on for the place along each of the axes, before what is left of D.
  """
  n, me, i = jax.lax.axis_size(axis), jax.lax.axis_index(axis), over.index(axis)

  def operand(hop):
    """The part of x for the device whose sum is here after so many hops, and has n - 1 - hop to go."""
    part = jax.lax.dynamic_index_in_dim(x, (me - step * (hop + 1)) % n, at + i, keepdims=False)
    return part.reshape(*x.shape[:at], -1, *x.shape[at + len(over) + 1:])

  total = jnp.einsum(dims, operand(0), y)
  for hop in range(1, n):
    total = jax.lax.ppermute(total, axis, [(k, (k + step) % n) for k in range(n)])
    # The product waits for the sum that it is added to: else the compiler makes it before, and adds in a pass of its own.
    part, total = jax.lax.optimization_barrier((operand(hop), total))
    product = jnp.einsum(dims, part, y, preferred_element_type=jnp.float32)
    total = (total.astype(jnp.float32) + product).astype(x.dtype)
  for other in (*over[:i], *over[i + 1:]):
    total = jax.lax.psum_scatter(total, other, scatter_dimension=dims.split('->')[1].index('D'), tiled=True)
  return total
