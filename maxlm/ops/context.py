"""Rows split over devices: the order in which these hold a row, and what they tell each other about it.

The row is cut into 2X chunks, X the parts into which the mesh splits time (T), and device i holds chunks i and 2X - 1 - i,
one after the other: "zigzag" order. Under a causal mask a chunk's work grows with its number, and all devices have the same.
The chunk before i is on device i - 1, the one before 2X - 1 - i on device i + 1 (or here, on the last device): what a token
sees a short way back comes from neighbours, both ways at once.

`to_zigzag` and `to_natural` take whole arrays; the other functions are for islands, and arrays are this device's part.
[B, T, …]: its two chunks one after the other.  [2B, C, …]: the same as rows of their own.  C tokens of a chunk
"""

import jax
import jax.numpy as jnp

from maxlm.sharding import axes, axis_size, spec


def to_zigzag(x_BT: jax.Array) -> jax.Array:
  """From the order of the text, device i holding chunks 2i and 2i + 1, to zigzag order. Nothing to do if rows are whole."""
  X = axis_size('T')
  if X == 1:
    return x_BT

  def island(x_BT):
    even, odd = jnp.split(x_BT, 2, axis=1)
    even = jax.lax.ppermute(even, axes('T'), [(i, _holder(2 * i, X)) for i in range(X)])
    odd = jax.lax.ppermute(odd, axes('T'), [(i, _holder(2 * i + 1, X)) for i in range(X)])
    return jnp.concatenate(_swapped_if_odd(even, odd), axis=1)  # chunks i and 2X - 1 - i: one is even, one odd

  return _over_devices(island, x_BT)


def to_natural(x_BT: jax.Array) -> jax.Array:
  """From zigzag order to the order of the text."""
  X = axis_size('T')
  if X == 1:
    return x_BT

  def island(x_BT):
    even, odd = _swapped_if_odd(*jnp.split(x_BT, 2, axis=1))
    even = jax.lax.ppermute(even, axes('T'), [(_holder(2 * i, X), i) for i in range(X)])
    odd = jax.lax.ppermute(odd, axes('T'), [(_holder(2 * i + 1, X), i) for i in range(X)])
    return jnp.concatenate([even, odd], axis=1)

  return _over_devices(island, x_BT)


def as_rows(x: jax.Array) -> jax.Array:
  """[B, T, …] -> [2B, C, …]."""
  B, T = x.shape[:2]
  return x.reshape(2 * B, T // 2, *x.shape[2:])


def joined(x: jax.Array) -> jax.Array:
  """[2B, C, …] -> [B, T, …]."""
  rows, C = x.shape[:2]
  return x.reshape(rows // 2, 2 * C, *x.shape[2:])


def from_before(ends: jax.Array, missing=0) -> jax.Array:
  """For each chunk what `ends` holds of the chunk before it in the row; `missing` for the row's first. Both [2B, …]."""
  X = axis_size('T')
  device = jax.lax.axis_index(axes('T'))
  ends = ends.reshape(-1, 2, *ends.shape[1:])
  first = jax.lax.ppermute(ends[:, 0], axes('T'), [(i, i + 1) for i in range(X - 1)])
  second = jax.lax.ppermute(ends[:, 1], axes('T'), [(i + 1, i) for i in range(X - 1)])
  if missing:
    first = jnp.where(device == 0, missing, first)  # it is zero already where nothing was sent
  second = jnp.where(device == X - 1, ends[:, 0], second)
  return jnp.stack([first, second], axis=1).reshape(-1, *ends.shape[2:])


def with_halo(x: jax.Array, size: int, missing=0) -> jax.Array:
  """[B, T, …] -> [2B, size + C, …]: each chunk after the `size` <= C tokens before it."""
  x = as_rows(x)
  if size == 0:
    return x
  assert size <= x.shape[1], f'a halo of {size} tokens is more than a chunk of {x.shape[1]}'
  return jnp.concatenate([from_before(x[:, x.shape[1] - size:], missing), x], axis=1)


def gathered(x: jax.Array) -> jax.Array:
  """[B, T, …] -> [B, X T, …]: the whole row, in the order of the text. Its gradient is summed and scattered back."""
  B, T = x.shape[:2]
  x = jax.lax.all_gather(x.reshape(B, 2, T // 2, *x.shape[2:]), axes('T'), axis=1)  # [B, X, 2, C, …]
  return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1).reshape(B, -1, *x.shape[4:])


def index(length: int) -> jax.Array:
  """int32 [length]: where in the row each of this device's tokens is."""
  device, last = jax.lax.axis_index(axes('T')), 2 * axis_size('T') - 1
  within = jnp.arange(length // 2, dtype=jnp.int32)
  return jnp.concatenate([device * within.size + within, (last - device) * within.size + within])


def states_before(step, summaries, shape: tuple[int, ...]) -> jax.Array:
  """fp32 [2B, *shape]: the state before each chunk, zeros before the first of the row.

  summaries: a tree of [2B, …], what is to be known of a chunk; step(state before a chunk, its summary): the state after it.
  Every device gets all summaries and goes through the row by itself: they are small, and nobody waits for a neighbour.
  """
  def of_row(x):
    x = jax.lax.all_gather(x.reshape(-1, 2, *x.shape[1:]), axes('T'))  # [X, B, 2, …]
    return jnp.concatenate([x[:, :, 0], x[::-1, :, 1]], axis=0)

  with jax.named_scope('states'):
    summaries = jax.tree.map(of_row, summaries)
    first = jax.tree.leaves(summaries)[0][0]
    empty = jnp.zeros_like(first, jnp.float32, shape=(first.shape[0], *shape))
    before = jax.lax.scan(lambda state, summary: (step(state, summary), state), empty, summaries)[1]
    device = jax.lax.axis_index(axes('T'))
    return jnp.stack([before[device], before[-1 - device]], axis=1).reshape(-1, *shape)


def _holder(chunk: int, X: int) -> int:
  return min(chunk, 2 * X - 1 - chunk)


def _swapped_if_odd(first, second):
  odd = jax.lax.axis_index(axes('T')) % 2 == 1
  return jnp.where(odd, second, first), jnp.where(odd, first, second)


def _over_devices(island, x_BT):
  return jax.shard_map(island, in_specs=spec('BT'), out_specs=spec('BT'))(x_BT)
