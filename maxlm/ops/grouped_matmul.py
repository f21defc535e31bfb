"""Products of sorted rows with the matrices of their groups: the work of a mixture of experts.

P rows, those of the first group first  E groups  D width in  F width out
"""

import functools

import jax
import jax.numpy as jnp

# Rows of a block on a CPU: of the size of an average group within these bounds, as a group's last block is part waste.
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


def grouped_matmul(x_PD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Each row times the matrix of its group -> [P, F] in the dtype of x.

  sizes_E: rows of each group, P in all; any of them may be 0. Accelerators run XLA's `ragged_dot`, which on a CPU multiplies
  every row with every matrix: there it takes ten times as long as the blocks below for 8 groups, and fifty for 128.
  """
  return jax.lax.platform_dependent(x_PD, w_EDF, sizes_E, cpu=_blocked, default=jax.lax.ragged_dot)


def grouped_matmul_reference(x_PD, w_EDF, sizes_E):
  """The same with a matrix for each row."""
  group_P = jnp.repeat(jnp.arange(w_EDF.shape[0]), sizes_E, total_repeat_length=x_PD.shape[0])
  return jnp.einsum('PD,PDF->PF', x_PD, w_EDF[group_P])


# -- CPU: a loop over blocks of rows that start where their group does ------------------------------------------------
# Every block is of one size: it runs over the end of its group into rows whose own blocks come later, and write over it.


@jax.custom_vjp
def _blocked(x_PD, w_EDF, sizes_E):
  return _rows_times('bD,DF->bF', x_PD, w_EDF, sizes_E)


def _blocked_forward(x_PD, w_EDF, sizes_E):
  return _blocked(x_PD, w_EDF, sizes_E), (x_PD, w_EDF, sizes_E)


def _blocked_backward(residuals, dy_PF):
  x_PD, w_EDF, sizes_E = residuals
  return _rows_times('bF,DF->bD', dy_PF, w_EDF, sizes_E), _outer(x_PD, dy_PF, sizes_E).astype(w_EDF.dtype), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _rows_times(dims, x_PD, w_EDF, sizes_E):
  """einsum(dims, block of x, matrix of its group) for all blocks."""
  size, count, group, start, _ = _blocks(x_PD.shape[0], sizes_E)
  x_PD = jnp.pad(x_PD, ((0, size), (0, 0)))
  product = functools.partial(jnp.einsum, dims, preferred_element_type=jnp.float32)

  def block(i, y_PF):
    y_bF = product(jax.lax.dynamic_slice_in_dim(x_PD, start[i], size), w_EDF[group[i]])
    return jax.lax.dynamic_update_slice_in_dim(y_PF, y_bF.astype(y_PF.dtype), start[i], axis=0)

  width = jax.eval_shape(product, x_PD[:size], w_EDF[0]).shape[1]
  return jax.lax.fori_loop(0, count, block, jnp.zeros_like(x_PD, shape=(x_PD.shape[0], width)))[:-size]


def _outer(x_PD, dy_PF, sizes_E):
  """Sum over the rows of each group of x_D * dy_F -> fp32 [E, D, F]."""
  size, count, group, start, stop = _blocks(x_PD.shape[0], sizes_E)
  x_PD, dy_PF = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_PD, dy_PF))

  def block(i, dw_EDF):
    x_bD, dy_bF = (jax.lax.dynamic_slice_in_dim(rows, start[i], size) for rows in (x_PD, dy_PF))
    in_group_b1 = (start[i] + jnp.arange(size) < stop[i])[:, None]
    return dw_EDF.at[group[i]].add(jnp.einsum('bD,bF->DF', jnp.where(in_group_b1, x_bD, 0), dy_bF,
                                              preferred_element_type=jnp.float32))

  shape = sizes_E.shape[0], x_PD.shape[1], dy_PF.shape[1]
  return jax.lax.fori_loop(0, count, block, jnp.zeros_like(x_PD, jnp.float32, shape))


def _blocks(rows: int, sizes_E):
  """(rows of a block, number of blocks, and of each block: its group, its first row, the end of its group)."""
  groups = sizes_E.shape[0]
  size = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, rows // groups))
  blocks_E, stop_E = -(-sizes_E // size), jnp.cumsum(sizes_E)
  last_E = jnp.cumsum(blocks_E)
  index = jnp.arange(rows // size + groups)  # the most there can be
  group = jnp.minimum(jnp.searchsorted(last_E, index, side='right'), groups - 1)
  start = stop_E[group] - sizes_E[group] + size * (index - last_E[group] + blocks_E[group])
  return size, last_E[-1], group, start, stop_E[group]
