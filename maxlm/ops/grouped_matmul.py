"""Products of sorted rows with the matrices of their groups: the work of a mixture of experts.

  blocked     a loop over blocks of rows; for CPUs, where XLA's `ragged_dot` multiplies every row with every matrix: there it
              takes ten times as long for 8 groups, and fifty for 128
  pallas      Pallas kernels for TPUs (`maxlm.ops.grouped_tpu`)
  tokamax     tokamax's kernels for GPUs of the Hopper generation, in bfloat16 (`maxlm.ops.grouped_gpu`)
  ragged_dot  what XLA has; on a GPU it multiplies every row with every matrix, so it is refused there

Rows may end before the array does: what is past the groups is not looked at, its results and gradients are zero. Sums are
fp32.

P rows, those of the first group first  E groups  D width in  F width out
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

KERNELS = ('blocked', 'pallas', 'tokamax', 'ragged_dot')
KERNEL_OF_PLATFORM = {'cpu': 'blocked', 'gpu': 'tokamax', 'tpu': 'pallas'}

# Rows of a block on a CPU: of the size of an average group within these bounds, as a group's last block is part waste.
SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


def default_kernel(platform: str, dtype) -> str:
  """What is fastest for that dtype on 'cpu', 'gpu' or 'tpu'."""
  kernel = KERNEL_OF_PLATFORM[platform]
  return 'blocked' if kernel == 'tokamax' and jnp.dtype(dtype) != jnp.bfloat16 else kernel


def check_grouped_matmul(kernel: str, platform: str, dtype) -> None:
  """ValueError, in one line that names a kernel that can, if `kernel` cannot be used on `platform`, or is not installed."""
  if kernel not in KERNELS:
    raise ValueError(f'experts_kernel {kernel!r} is none of {", ".join(KERNELS)}')
  if kernel == 'pallas' and platform != 'tpu':
    raise ValueError(f"experts_kernel 'pallas' runs on tpu, not on {platform}: use {KERNEL_OF_PLATFORM[platform]!r}")
  if kernel == 'ragged_dot' and platform == 'gpu':
    raise ValueError("experts_kernel 'ragged_dot' multiplies every row with every expert on gpu: use 'tokamax'")
  if kernel == 'tokamax':
    if platform != 'gpu':
      raise ValueError(f"experts_kernel 'tokamax' runs on gpu, not on {platform}: use {KERNEL_OF_PLATFORM[platform]!r}")
    if jnp.dtype(dtype) != jnp.bfloat16:
      raise ValueError(f"experts_kernel 'tokamax' takes bfloat16, not {jnp.dtype(dtype).name}: use 'blocked', or that dtype")
    from maxlm.ops import grouped_gpu
    grouped_gpu.check_installed()


def grouped_matmul(x_PD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, bias_EF: jax.Array | None = None, *, kernel: str,
                   interpret: bool = False) -> jax.Array:
  """Each row times the matrix of its group, plus its bias -> [P, F] in the dtype of x; zeros past the groups.

  sizes_E: rows of each group, P or less in all; any of them may be 0. interpret: run Pallas's Python on a CPU, for tests.
  """
  y_PF, = grouped_matmuls(x_PD, (w_EDF,), sizes_E, (bias_EF,), kernel=kernel, interpret=interpret)
  return y_PF


def grouped_matmuls(x_PD: jax.Array, ws_EDF: tuple[jax.Array, ...], sizes_E: jax.Array, biases_EF: tuple, *, kernel: str,
                    interpret: bool = False) -> tuple[jax.Array, ...]:
  """Several products of the same rows, each in an array of its own. The gradient of the rows is one sum over all."""
  assert not interpret or jax.default_backend() == 'cpu', 'an interpreted kernel is for tests on a CPU'
  return _products(x_PD, ws_EDF, jnp.asarray(sizes_E), biases_EF, kernel, interpret)


def grouped_matmul_reference(x_PD, w_EDF, sizes_E, bias_EF=None):
  """The same with a matrix for each row."""
  group_P = jnp.repeat(jnp.arange(w_EDF.shape[0]), sizes_E, total_repeat_length=x_PD.shape[0])
  used_P1 = (jnp.arange(x_PD.shape[0]) < sizes_E.sum())[:, None]
  y_PF = jnp.einsum('PD,PDF->PF', jnp.where(used_P1, x_PD, 0), w_EDF[group_P])
  return jnp.where(used_P1, y_PF if bias_EF is None else y_PF + bias_EF[group_P], 0)


def bias_of_rows(bias_EF: jax.Array, sizes_E: jax.Array, weights_P1: jax.Array) -> jax.Array:
  """Each row's weight times the bias of its group -> [P, F]; zeros past the groups. A product, as the gradient of
  bias_EF[group_P] adds up row by row."""
  weights_PE = jnp.where(_is_of_PE(len(weights_P1), sizes_E), weights_P1, 0).astype(bias_EF.dtype)
  return jnp.einsum('PE,EF->PF', weights_PE, bias_EF, precision='highest')


def _is_of_PE(rows, sizes_E):
  row_P1, stop_E = jnp.arange(rows)[:, None], jnp.cumsum(sizes_E)
  return (row_P1 < stop_E) & (row_P1 >= stop_E - sizes_E)


class Kernel(NamedTuple):
  """rows_times(((x [P, D], w [E, D, F]), …), sizes, bias=None, transposed=False), or with w [E, F, D] and transposed=True:
  the sum of the products -> [P, F]. outer(x [P, D], dy [P, F], sizes, dtype=…): the sum over the rows of each group of
  x_D * dy_F -> [E, D, F]."""

  rows_times: Callable
  outer: Callable


def _kernel(name: str, interpret: bool) -> Kernel:
  match name:
    case 'blocked':
      return Kernel(_summed(_blocked_rows_times), _blocked_outer)
    case 'pallas':
      from maxlm.ops import grouped_tpu  # Pallas is slow to import and only a TPU needs it
      return Kernel(*(functools.partial(f, interpret=interpret) for f in (grouped_tpu.rows_times, grouped_tpu.outer)))
    case 'tokamax':
      from maxlm.ops import grouped_gpu
      return Kernel(_summed(grouped_gpu.rows_times), grouped_gpu.outer)
  assert name == 'ragged_dot', name
  return Kernel(_summed(_ragged_rows_times), _ragged_outer)


def _summed(rows_times: Callable) -> Callable:
  """Of a kernel that knows one product and no bias."""
  def all_of(pairs, sizes_E, bias_EF=None, *, transposed):
    y_PF = functools.reduce(jnp.add, [rows_times(x_PD, w, sizes_E, transposed=transposed) for x_PD, w in pairs])
    return y_PF if bias_EF is None else y_PF + bias_of_rows(bias_EF, sizes_E, jnp.ones((len(y_PF), 1), bias_EF.dtype))

  return all_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _products(x_PD, ws_EDF, sizes_E, biases_EF, kernel, interpret):
  rows_times = _kernel(kernel, interpret).rows_times
  return tuple(rows_times([(x_PD, w_EDF)], sizes_E, bias_EF, transposed=False) for w_EDF, bias_EF in zip(ws_EDF, biases_EF))


def _products_forward(x_PD, ws_EDF, sizes_E, biases_EF, kernel, interpret):
  return _products(x_PD, ws_EDF, sizes_E, biases_EF, kernel, interpret), (x_PD, ws_EDF, sizes_E, biases_EF)


def _products_backward(kernel, interpret, residuals, dys_PF):
  x_PD, ws_EDF, sizes_E, biases_EF = residuals
  rows_times, outer = _kernel(kernel, interpret)

  def bias_gradient(bias_EF, dy_PF):
    return jnp.einsum('PE,PF->EF', _is_of_PE(len(dy_PF), sizes_E).astype(dy_PF.dtype), zero_past(dy_PF, sizes_E),
                      precision='highest', preferred_element_type=jnp.float32).astype(bias_EF.dtype)

  dx_PD = rows_times(list(zip(dys_PF, ws_EDF)), sizes_E, transposed=True)
  dws_EDF = tuple(outer(x_PD, dy_PF, sizes_E, dtype=w_EDF.dtype) for dy_PF, w_EDF in zip(dys_PF, ws_EDF))
  return dx_PD, dws_EDF, None, tuple(None if bias_EF is None else bias_gradient(bias_EF, dy_PF)
                                     for bias_EF, dy_PF in zip(biases_EF, dys_PF))


_products.defvjp(_products_forward, _products_backward)


def zero_past(rows_PD: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """The rows, with zeros past the groups."""
  return jnp.where((jnp.arange(rows_PD.shape[0]) < sizes_E.sum())[:, None], rows_PD, 0)


# -- XLA


def _ragged_rows_times(x_PD, w, sizes_E, *, transposed):
  w_EDF = w.swapaxes(1, 2) if transposed else w
  return zero_past(jax.lax.ragged_dot(x_PD, w_EDF, sizes_E, preferred_element_type=jnp.float32).astype(x_PD.dtype), sizes_E)


def _ragged_outer(x_PD, dy_PF, sizes_E, *, dtype):
  over_rows = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])
  return jax.lax.ragged_dot_general(zero_past(x_PD, sizes_E), zero_past(dy_PF, sizes_E), sizes_E, over_rows,
                                    preferred_element_type=jnp.float32).astype(dtype)


# -- a loop over blocks of rows that start where their group does ------------------------------------------------------
# Every block is of one size: it runs over the end of its group into rows whose own blocks come later, and write over it.


def _blocked_rows_times(x_PD, w, sizes_E, *, transposed):
  return zero_past(_rows_times('bD,FD->bF' if transposed else 'bD,DF->bF', x_PD, w, sizes_E), sizes_E)


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


def _blocked_outer(x_PD, dy_PF, sizes_E, *, dtype):
  """Sum over the rows of each group of x_D * dy_F -> [E, D, F]."""
  size, count, group, start, stop = _blocks(x_PD.shape[0], sizes_E)
  x_PD, dy_PF = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_PD, dy_PF))

  def block(i, dw_EDF):
    x_bD, dy_bF = (jax.lax.dynamic_slice_in_dim(rows, start[i], size) for rows in (x_PD, dy_PF))
    in_group_b1 = (start[i] + jnp.arange(size) < stop[i])[:, None]
    x_bD, dy_bF = (jnp.where(in_group_b1, rows, 0) for rows in (x_bD, dy_bF))
    return dw_EDF.at[group[i]].add(jnp.einsum('bD,bF->DF', x_bD, dy_bF, preferred_element_type=jnp.float32))

  shape = sizes_E.shape[0], x_PD.shape[1], dy_PF.shape[1]
  return jax.lax.fori_loop(0, count, block, jnp.zeros_like(x_PD, jnp.float32, shape)).astype(dtype)


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
