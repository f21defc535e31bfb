"""Grouped products on TPU: two Pallas kernels, one whose result has rows and one that sums over rows.

A grid of visits: a visit is a tile of rows and a group that has rows in it, so a tile where two groups meet is
visited twice, in a row, and stays in the chip's fast memory (VMEM) between. A product's inner dim is never cut: then
the matrix of a group is read once for all its rows, and nothing is added up over steps of the grid. Rows past the
groups are a last group without a matrix, whose results are zero.

JAX has kernels of this kind too (`jax.experimental.pallas.ops.tpu.megablox`, after MegaBlocks, arXiv 2211.15841).
Those here may run inside a `shard_map` that checks what varies, take tiles as large as the chip's memory, mask only
tiles where groups meet, take any number of rows, and write every row.

P rows  p those of a tile  E groups  D width in  F width out  V visits
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlm.sharding import device_kind

# Bytes of VMEM that a kernel may take for its tiles, and in all; of a v4, that has 16 MiB, less.
TILES, VMEM, TILES_V4, VMEM_V4 = 36 << 20, 56 << 20, 10 << 20, 15 << 20

# What tiles are chosen by: multiply-adds that cost as much as a byte from memory, and as much as a step of the grid. About
# those of v5p and v6e; the choice is not sensitive to them.
PER_BYTE, PER_STEP = 150.0, 0.8e8
ROW_TILES = (128, 256, 512, 1024)
PART = 128  # rows of a tile that are multiplied at a time: less code, and only those that the group has


def rows_times(pairs: Sequence[tuple[jax.Array, jax.Array]], sizes_E: jax.Array, bias_EF: jax.Array | None = None, *,
               transposed: bool, interpret: bool) -> jax.Array:
  """Each row times the matrix of its group, summed over pairs of x [P, D] and w [E, D, F], or transposed [E, F, D], plus its
  group's bias -> [P, F], zeros past the groups."""
  xs_PD, ws = zip(*pairs)
  (P, D), E, F = xs_PD[0].shape, ws[0].shape[0], ws[0].shape[1 if transposed else 2]
  dtype = xs_PD[0].dtype
  tile_rows, tile_F = row_tiles(P, len(pairs) * D, F, E, dtype.itemsize)
  visits = make_visits(sizes_E, P, tile_rows, past=True)

  def kernel(group_V, tile_V, read_V, start_G, *blocks):
    xs_pD, w_blocks, (*bias_1F, y_pF) = (blocks[:len(pairs)], blocks[len(pairs):2 * len(pairs)], blocks[2 * len(pairs):])
    v = pl.program_id(1)
    group, first_row = group_V[v], tile_V[v] * tile_rows
    start, stop = start_G[group], start_G[group + 1]

    @pl.when(group == E)
    def _():
      row = first_row + jax.lax.broadcasted_iota(jnp.int32, y_pF.shape, 0)
      y_pF[...] = jnp.where(row < start, y_pF[...].astype(jnp.float32), 0.0).astype(y_pF.dtype)

    @pl.when(group < E)
    def _():
      first, end = jnp.maximum(start - first_row, 0), jnp.minimum(stop - first_row, tile_rows)

      @pl.loop(jax.lax.div(first, PART), jax.lax.div(end + PART - 1, PART))
      def _(part):
        at = pl.ds(part * PART, PART)
        y = sum(jax.lax.dot_general(x_pD[at, :], w_block[...], (((1,), (1 if transposed else 0,)), ((), ())),
                                    precision=_precision(dtype), preferred_element_type=jnp.float32)
                for x_pD, w_block in zip(xs_pD, w_blocks))
        for bias in bias_1F:
          y += bias[...].astype(jnp.float32)
        row = first_row + part * PART + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
        y_pF[at, :] = jnp.where((row >= start) & (row < stop), y, y_pF[at, :].astype(jnp.float32)).astype(y_pF.dtype)

  last = E - 1
  if transposed:
    w_spec = pl.BlockSpec((None, tile_F, D), lambda f, v, group_V, *_: (jnp.minimum(group_V[v], last), f, 0))
  else:
    w_spec = pl.BlockSpec((None, D, tile_F), lambda f, v, group_V, *_: (jnp.minimum(group_V[v], last), 0, f))
  biases = () if bias_EF is None else (bias_EF[:, None],)
  of_group = pl.BlockSpec((None, 1, tile_F), lambda f, v, group_V, *_: (jnp.minimum(group_V[v], last), 0, f))
  x_spec = pl.BlockSpec((tile_rows, D), lambda f, v, group_V, tile_V, read_V, _: (read_V[v], 0))
  steps = pl.cdiv(F, tile_F)
  return pl.pallas_call(
    kernel, name=f'grouped_rows{"_transposed" if transposed else ""}',
    out_shape=_output((P, F), dtype, *xs_PD, *ws, sizes_E, *biases),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(steps, visits.count),
      in_specs=[*[x_spec] * len(pairs), *[w_spec] * len(pairs), *[of_group] * len(biases)],
      out_specs=pl.BlockSpec((tile_rows, tile_F), lambda f, v, group_V, tile_V, *_: (tile_V[v], f))),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=_vmem()[1]),
    cost_estimate=pl.CostEstimate(flops=2 * P * D * F * len(pairs), transcendentals=0, bytes_accessed=(
      (steps * P * D + E * D * F) * len(pairs) + P * F) * dtype.itemsize),
    interpret=interpret)(*visits.tables, *xs_PD, *ws, *biases)


def outer(x_PD: jax.Array, dy_PF: jax.Array, sizes_E: jax.Array, *, dtype, interpret: bool) -> jax.Array:
  """The sum over the rows of each group of x_D * dy_F -> [E, D, F], summed in fp32, zeros for groups without rows."""
  (P, D), F, E = x_PD.shape, dy_PF.shape[1], sizes_E.shape[0]
  tile_rows, tile_D, tile_F = outer_tiles(P, D, F, E, x_PD.dtype.itemsize)
  visits = make_visits(sizes_E, P, tile_rows, past=False)

  def kernel(group_V, tile_V, read_V, start_G, x_pD, dy_pF, dw_DF, sum_DF):
    v = pl.program_id(2)
    group, first_row = group_V[v], tile_V[v] * tile_rows
    start, stop = start_G[group], start_G[group + 1]
    is_whole = (start <= first_row) & (stop >= first_row + tile_rows)

    def add(x_pD, dy_pF):
      sum_DF[...] += jax.lax.dot_general(x_pD, dy_pF, (((0,), (0,)), ((), ())), precision=_precision(x_PD.dtype),
                                         preferred_element_type=jnp.float32)

    def masked(tile):
      row = first_row + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
      return jnp.where((row >= start) & (row < stop), tile[...].astype(jnp.float32), 0.0).astype(tile.dtype)

    @pl.when((start >= first_row) | (stop == start))
    def _():
      sum_DF[...] = jnp.zeros_like(sum_DF)

    @pl.when(is_whole)
    def _():
      add(x_pD[...], dy_pF[...])

    @pl.when(~is_whole & (stop > start))
    def _():
      add(masked(x_pD), masked(dy_pF))

    @pl.when((stop <= first_row + tile_rows) | (stop == start))
    def _():
      dw_DF[...] = sum_DF[...].astype(dw_DF.dtype)

  steps_D, steps_F = pl.cdiv(D, tile_D), pl.cdiv(F, tile_F)
  return pl.pallas_call(
    kernel, name='grouped_outer', out_shape=_output((E, D, F), dtype, x_PD, dy_PF, sizes_E),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4, grid=(steps_D, steps_F, visits.count),
      in_specs=[pl.BlockSpec((tile_rows, tile_D), lambda d, f, v, group_V, tile_V, *_: (tile_V[v], d)),
                pl.BlockSpec((tile_rows, tile_F), lambda d, f, v, group_V, tile_V, *_: (tile_V[v], f))],
      out_specs=pl.BlockSpec((None, tile_D, tile_F), lambda d, f, v, group_V, *_: (group_V[v], d, f)),
      scratch_shapes=[pltpu.VMEM((tile_D, tile_F), jnp.float32)]),
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'),
                                         vmem_limit_bytes=_vmem()[1]),
    cost_estimate=pl.CostEstimate(flops=2 * P * D * F, transcendentals=0, bytes_accessed=(
      steps_F * x_PD.size + steps_D * dy_PF.size + E * D * F) * x_PD.dtype.itemsize),
    interpret=interpret)(*visits.tables, x_PD, dy_PF)


# -- which tiles are visited, for which groups


class Visits:
  """count: of visits, known when the program runs. tables: of each visit its group, its tile, and the tile to read; and
  where each group starts."""

  def __init__(self, count: jax.Array, tables: tuple[jax.Array, jax.Array, jax.Array, jax.Array]):
    self.count, self.tables = count, tables


def make_visits(sizes_E: jax.Array, rows: int, tile_rows: int, *, past: bool) -> Visits:
  """Visits in the order of the rows. past: the rows past the groups are one more group, and groups without rows have no
  visit; else such groups have one, and what is past the groups none."""
  tiles = pl.cdiv(rows, tile_rows)
  sizes_E = sizes_E.astype(jnp.int32)
  sizes_G = jnp.append(sizes_E, rows - sizes_E.sum()) if past else sizes_E
  stop_G = jnp.cumsum(sizes_G, dtype=jnp.int32)
  start_G = stop_G - sizes_G
  first_G = jnp.minimum(start_G // tile_rows, tiles - 1)
  n_G = jnp.where(sizes_G > 0, (stop_G - 1) // tile_rows - first_G + 1, 0 if past else 1)
  end_G = jnp.cumsum(n_G, dtype=jnp.int32)
  index_V = jnp.arange(tiles + sizes_G.shape[0], dtype=jnp.int32)  # the most there can be
  group_V = jnp.minimum(jnp.sum(index_V[:, None] >= end_G, axis=1, dtype=jnp.int32), sizes_G.shape[0] - 1)
  tile_V = jnp.clip(first_G[group_V] + index_V - (end_G - n_G)[group_V], 0, tiles - 1)
  last_used = jnp.maximum(sizes_E.sum() - 1, 0) // tile_rows
  return Visits(end_G[-1], (group_V, tile_V, jnp.minimum(tile_V, last_used), jnp.append(start_G, stop_G[-1])))


# -- tiles: of all that fit, those that cost least


def row_tiles(P: int, D: int, F: int, E: int, itemsize: int) -> tuple[int, int]:
  """(rows, columns of the result) of a tile of `rows_times`. ValueError if not even the smallest fits."""
  def cost(rows, width):
    steps = pl.cdiv(F, width)
    work = (P + E * PART) * D * steps * _lanes(width, F)
    return work + PER_BYTE * itemsize * (steps * P * D + E * D * F) + PER_STEP * steps * (P / rows + E)

  def size(rows, width):
    return 2 * itemsize * (rows * D + D * width + rows * width) + 2 * 4 * PART * width

  return _cheapest([(rows, width) for rows in _row_tiles(P) for width in _widths(F)], cost, size, D)


def outer_tiles(P: int, D: int, F: int, E: int, itemsize: int) -> tuple[int, int, int]:
  """(rows, D, F) of a tile of `outer`. ValueError if not even the smallest fits."""
  def cost(rows, d, f):
    steps_D, steps_F = pl.cdiv(D, d), pl.cdiv(F, f)
    work = (P + E * rows) * steps_D * _lanes(d, D) * steps_F * _lanes(f, F)
    return work + PER_BYTE * itemsize * P * (steps_F * D + steps_D * F) + PER_STEP * steps_D * steps_F * (P / rows + E)

  def size(rows, d, f):
    return 2 * itemsize * rows * (d + f) + 4 * rows * (d + f) + (2 * 4 + 2 * itemsize) * d * f

  return _cheapest([(rows, d, f) for rows in _row_tiles(P) for d in _widths(D) for f in _widths(F)], cost, size, D)


def _cheapest(tiles: list[tuple], cost: Callable, size: Callable, inner: int) -> tuple:
  fitting = [tile for tile in tiles if size(*tile) <= _vmem()[0]]
  if not fitting:
    raise ValueError(f"experts_kernel='pallas' cannot hold rows of {inner} in a TPU's VMEM: use 'ragged_dot'")
  return min(fitting, key=lambda tile: cost(*tile))


def _row_tiles(P: int) -> list[int]:
  return [rows for rows in ROW_TILES if rows < P + PART] or [ROW_TILES[0]]


def _widths(dim: int) -> list[int]:
  """Blocks of a dim: the whole, or multiples of 128, of those with as many steps the smallest."""
  by_steps = {pl.cdiv(dim, width): width for width in range(128 * (dim // 128), 0, -128)}
  return [dim, *(width for width in by_steps.values() if width < dim)]


def _lanes(width: int, dim: int) -> int:
  """Columns that a block costs: the matrix unit takes 128 at a time."""
  return -(-min(width, dim) // 128) * 128


def _vmem() -> tuple[int, int]:
  return (TILES_V4, VMEM_V4) if 'v4' in device_kind() else (TILES, VMEM)


def _precision(dtype) -> jax.lax.Precision | None:
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _output(shape: tuple[int, ...], dtype, *operands: jax.Array) -> jax.ShapeDtypeStruct:
  """It varies over the mesh axes that any operand varies over."""
  varying = frozenset().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))
