"""Tokens to their experts and back: sorting pairs of a token and an expert, and two ways to other devices.

Every reordering is a gather, forward and backward: JAX's own gradient of one is a sum that adds up row by row. What a device
gets depends on the data and shapes do not: rows past the last pair are undefined, and nothing here reads them. A device that
shares experts with others may get all that they have; it works on as much as is usual at a time, in rounds, mostly one.

C tokens  J experts of a token  E experts  X devices that share them  L experts of one device, E / X
P pairs of a token and an expert, C * J  R rows of a buffer, sorted by expert
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.sharding import axes, axis_size


class Dispatch(NamedTuple):
  """How tokens come to their experts, and which kernel multiplies them (`ComputeConfig` says what the fields mean)."""

  exchange: Literal['gather', 'all_to_all'] | None = None
  capacity: float | None = None
  balanced: bool = False
  kernel: str = 'blocked'


def exchange_for(k: int, devices: int) -> Literal['gather', 'all_to_all']:
  """The exchange that moves a layer's tokens over a ring of devices in less time.

  A ring of X devices with W bytes/s a device, both directions together; V bytes of tokens on each. Gathering them and
  scattering the sum of the outputs brings (X - 1) V to every device, twice: 2 (X - 1) V / W. All-to-all sends k V / X to
  each of the others, over X / 4 links in the mean: 2 k V X / (4 W) there and back. So it is faster where k < 4 (X - 1) / X,
  which is 2 for two devices and 4 for many. Where they are equal, the dense collectives are better compiled.
  """
  return 'all_to_all' if k < 4 * (devices - 1) / devices else 'gather'


def buffer_rows(tokens: int, k: int, devices: int, experts: int, capacity: float | None) -> int:
  """Rows that a device has for the pairs of its `experts`, of `tokens` on each of the devices: all that there can be, as a
  token chooses an expert once; or `capacity` times the average load of a device."""
  worst = devices * tokens * min(k, experts)
  return worst if capacity is None else min(worst, math.ceil(capacity * tokens * k))


# -- pairs of this device: which of them are dropped, and their order


def within_capacity(experts_CJ: jax.Array, n_experts: int, rows: int) -> jax.Array:
  """Inside an island: the experts, and n_experts (none) for pairs that do not fit into the `rows` of their device.

  A device that has too many pairs takes from each sender the same share of what it sends, its first tokens.
  """
  devices, me = axis_size('E'), jax.lax.axis_index(axes('E'))
  device_P = experts_CJ.reshape(-1) * devices // n_experts
  to_PX = (device_P[:, None] == jnp.arange(devices)).astype(jnp.int32)
  sent_XX = jax.lax.all_gather(to_PX.sum(axis=0), axes('E'), tiled=False)  # [sender, receiver]
  share_X = jnp.minimum(1.0, rows / jnp.maximum(sent_XX.sum(axis=0), 1)) * (1 - 1e-6)  # less than fp32 rounds
  kept_X = jnp.where(sent_XX.sum(axis=0) <= rows, sent_XX[me], jnp.floor(sent_XX[me] * share_X).astype(jnp.int32))
  rank_P = jnp.sum((jnp.cumsum(to_PX, axis=0) - 1) * to_PX, axis=1)
  limit_P = jnp.append(kept_X, 0)[jnp.minimum(device_P, devices)]
  return jnp.where(rank_P < limit_P, experts_CJ.reshape(-1), n_experts).reshape(experts_CJ.shape)


class Order(NamedTuple):
  """Pairs sorted by expert, all of them or those of a round."""

  pair_R: jax.Array  # the pair in a row: token * J + which of its experts; of any pair past the last row in use
  row_CJ: jax.Array  # the row of a pair; -1: it has none
  sizes_E: jax.Array  # rows of each expert, in order


def sort_pairs(experts_CJ: jax.Array, n_experts: int, rows: int) -> Order:
  """experts_CJ: from 0 to n_experts, and n_experts for pairs that get no row; the others are `rows` at most."""
  flat_P = experts_CJ.reshape(-1)
  pair_P = jnp.argsort(flat_P)
  row_P = jnp.argsort(pair_P)
  sizes_E = jnp.sum(flat_P[:, None] == jnp.arange(n_experts), axis=0, dtype=jnp.int32)
  row_CJ = jnp.where(flat_P < n_experts, row_P, -1).reshape(experts_CJ.shape)
  return Order(jnp.pad(pair_P, (0, max(0, rows - pair_P.size)))[:rows], row_CJ, sizes_E)


@jax.custom_vjp
def to_rows(x_CD: jax.Array, order: Order) -> jax.Array:
  """Each row's token -> [R, D]."""
  return _rows_of(x_CD, order)


@jax.custom_vjp
def from_rows(y_RD: jax.Array, order: Order) -> jax.Array:
  """The sum of each token's rows, in fp32 -> [C, D] in the dtype of y."""
  return _sum_of_rows(y_RD, order.row_CJ).astype(y_RD.dtype)


@jax.custom_vjp
def weights_of_rows(weights_CJ: jax.Array, order: Order) -> jax.Array:
  """Each row's weight -> [R, 1]."""
  return weights_CJ.reshape(-1)[order.pair_R][:, None]


def _rows_of(x_CD, order):
  return x_CD[order.pair_R // order.row_CJ.shape[1]]


def _weights_backward(order, dweights_R1):
  return jnp.where(order.row_CJ >= 0, dweights_R1[:, 0][order.row_CJ], 0), None


to_rows.defvjp(lambda x_CD, order: (to_rows(x_CD, order), order),
               lambda order, dx_RD: (_sum_of_rows(dx_RD, order.row_CJ).astype(dx_RD.dtype), None))
from_rows.defvjp(lambda y_RD, order: (from_rows(y_RD, order), order),
                 lambda order, dout_CD: (_rows_of(dout_CD, order), None))
weights_of_rows.defvjp(lambda weights_CJ, order: (weights_of_rows(weights_CJ, order), order), _weights_backward)


def _sum_of_rows(x_RD, row_CJ):
  """Over J, one after another: [C, J, D] is never there."""
  total_CD = 0.0
  for j in range(row_CJ.shape[1]):
    total_CD += jnp.where(row_CJ[:, j, None] >= 0, x_RD[row_CJ[:, j]].astype(jnp.float32), 0)
  return total_CD


# -- rounds: what a device has to do is known when the program runs, and how much it can do at once when it is compiled

ROUND = 1.25  # rows of a round over what a device has to do if all have the same


def round_rows(tokens: int, k: int, devices: int, experts: int, capacity: float | None) -> int:
  """Rows of one round, of those that `buffer_rows` allows."""
  return min(buffer_rows(tokens, k, devices, experts, capacity), math.ceil(ROUND * tokens * k))


def n_rounds(sizes_E: jax.Array, rows: int) -> jax.Array:
  return (sizes_E.sum() + rows - 1) // rows


def sizes_of_round(sizes_E: jax.Array, i, rows: int) -> jax.Array:
  """Rows of each expert in the i-th round."""
  stop_E = jnp.cumsum(sizes_E)
  here = lambda at_E: jnp.clip(at_E - i * rows, 0, rows)
  return here(stop_E) - here(stop_E - sizes_E)


def order_of_round(order: Order, i, rows: int) -> Order:
  """The i-th round of an order of pairs; order.pair_R is as long as a number of rounds."""
  row_CJ = order.row_CJ - i * rows
  return Order(jax.lax.dynamic_slice_in_dim(order.pair_R, i * rows, rows),
               jnp.where((order.row_CJ >= 0) & (row_CJ >= 0) & (row_CJ < rows), row_CJ, -1),
               sizes_of_round(order.sizes_E, i, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_rounds(function, n: jax.Array, integers, args) -> jax.Array:
  """The sum of function(i, integers, args) over n rounds, at least one. args: a tree of arrays, which get gradients.

  Only the first round is part of the straight program. The gradient goes over the others again, and keeps nothing of them.
  """
  return _sum_of_rounds(function(0, integers, args), lambda i: function(i, integers, args), n)


def _rounds_forward(function, n, integers, args):
  first, pull = jax.vjp(functools.partial(function, 0, integers), args)
  return _sum_of_rounds(first, lambda i: function(i, integers, args), n), (n, integers, args, pull)


def _rounds_backward(function, residuals, dy):
  n, integers, args, pull = residuals
  again = lambda i: jax.vjp(functools.partial(function, i, integers), args)[1](dy)[0]
  return None, None, _sum_of_rounds(pull(dy)[0], again, n)


in_rounds.defvjp(_rounds_forward, _rounds_backward)


def _sum_of_rounds(first, of_round, n):
  with jax.named_scope('more_rounds'):  # maxlm.plan counts none of them
    return jax.lax.fori_loop(1, n, lambda i, total: jax.tree.map(jnp.add, total, of_round(i)), first)


# -- all-to-all: rows go to the devices of their experts


class Slices(NamedTuple):
  """Runs of rows that this device sends and gets, one for each other device and each expert of the receiver [X, L]."""

  sent_XL: jax.Array  # rows to each device
  sent_at_XL: jax.Array  # where they begin here
  placed_at_XL: jax.Array  # where they are to begin there
  got_XL: jax.Array  # rows from each device
  got_at_XL: jax.Array  # where they are to begin here
  came_from_XL: jax.Array  # where they begin there

  def back(self) -> 'Slices':
    """The way back of the same rows."""
    return Slices(self.got_XL, self.got_at_XL, self.came_from_XL, self.sent_XL, self.sent_at_XL, self.placed_at_XL)


def slices_of(sizes_E: jax.Array) -> Slices:
  """Inside an island: from the rows of each expert here, so that rows arrive sorted by expert and then by sender."""
  devices, me = axis_size('E'), jax.lax.axis_index(axes('E'))
  n_XXL = jax.lax.all_gather(sizes_E.reshape(devices, -1), axes('E'), tiled=False)  # [sender, receiver, expert]
  begin_XXL = _exclusive_cumsum(n_XXL.reshape(devices, -1)).reshape(n_XXL.shape)
  place_XLX = _exclusive_cumsum(n_XXL.transpose(1, 2, 0).reshape(devices, -1)).reshape(devices, -1, devices)
  place_XXL = place_XLX.transpose(2, 0, 1)
  return Slices(n_XXL[me], begin_XXL[me], place_XXL[me], n_XXL[:, me], place_XXL[:, me], begin_XXL[:, me])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(x_PD: jax.Array, slices: Slices, rows: int) -> jax.Array:
  """Inside an island: the rows that others sent -> [rows, D]; zeros where nothing came. The gradient goes the way back.

  XLA has no ragged all-to-all on a CPU: there the same slices travel in buckets as long as the worst case.
  """
  return jax.lax.platform_dependent(x_PD, slices, cpu=functools.partial(_in_buckets, rows=rows),
                                    default=functools.partial(_ragged, rows=rows))


def _exchange_forward(x_PD, slices, rows):
  return exchange(x_PD, slices, rows), (slices, x_PD.shape[0])


exchange.defvjp(_exchange_forward, lambda rows, residuals, dy_RD: (exchange(dy_RD, residuals[0].back(), residuals[1]), None))


def _ragged(x_PD, slices, rows):
  flat = lambda a_XL: a_XL.reshape(-1).astype(jnp.int32)
  return jax.lax.ragged_all_to_all(
    x_PD, jnp.zeros_like(x_PD, shape=(rows, x_PD.shape[1])), flat(slices.sent_at_XL), flat(slices.sent_XL),
    flat(slices.placed_at_XL), flat(slices.got_XL), axis_name=axes('E'))


def _in_buckets(x_PD, slices, rows):
  size = min(x_PD.shape[0], rows)

  def places(n_XL, at_XL):
    """[X, size]: where the i-th row to or from a device is here; past the last one, out of every array."""
    end_XL, i = jnp.cumsum(n_XL, axis=1), jnp.arange(size)
    slice_Xi = jnp.sum(i >= end_XL[:, :, None], axis=1)
    pick = lambda a_XL: jnp.take_along_axis(a_XL, jnp.minimum(slice_Xi, n_XL.shape[1] - 1), axis=1)
    return jnp.where(i < end_XL[:, -1:], pick(at_XL - end_XL + n_XL) + i, x_PD.shape[0] + rows)

  sent_XiD = x_PD.at[places(slices.sent_XL, slices.sent_at_XL)].get(mode='fill', fill_value=0)
  got_XiD = jax.lax.all_to_all(sent_XiD, axes('E'), 0, 0, tiled=True)
  return jnp.zeros_like(x_PD, shape=(rows, x_PD.shape[1])).at[places(slices.got_XL, slices.got_at_XL)].set(
    got_XiD, mode='drop')


def _exclusive_cumsum(n):
  return jnp.cumsum(n, axis=-1) - n
