"""Grouped products on NVIDIA GPUs of the Hopper generation: an adapter over tokamax's Pallas kernels.

Tokamax chooses blocks by the name of the GPU: it knows the H100 and not the H200, for which it falls back to small
ones, so they are given here. Its kernels leave rows past the groups unwritten, and read them multiplied by zero:
these rows are zeroed here, going in and coming out.
"""

import importlib.util

import jax

from maxlm.ops.grouped_matmul import zero_past

# What tokamax's own table for the H100 has in most of its entries; a step of the pipeline holds 48 KiB of the 227.
BLOCKS = dict(block_m=128, block_n=64, block_k=128, num_stages=4, split_k=1, persistent=True, grid_tile_width=8)

# Contractions of [P, D] with [E, F, D], and of [P, D] with [P, F] over the rows of each group.
TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
OUTER = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


def rows_times(x_PD: jax.Array, w: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> jax.Array:
  """Each row times the matrix of its group -> [P, F], zeros past the groups. w: [E, D, F], or transposed [E, F, D]."""
  tokamax, kernel = _kernel()
  if transposed:
    y_PF = tokamax.ragged_dot_general(x_PD, w, sizes_E, TRANSPOSED, preferred_element_type=x_PD.dtype, implementation=kernel)
  else:
    y_PF = tokamax.ragged_dot(x_PD, w, sizes_E, preferred_element_type=x_PD.dtype, implementation=kernel)
  return zero_past(y_PF, sizes_E)


def outer(x_PD: jax.Array, dy_PF: jax.Array, sizes_E: jax.Array, *, dtype) -> jax.Array:
  """The sum over the rows of each group of x_D * dy_F -> [E, D, F], summed in fp32, zeros for groups without rows."""
  tokamax, kernel = _kernel()
  return tokamax.ragged_dot_general(zero_past(x_PD, sizes_E), zero_past(dy_PF, sizes_E), sizes_E, OUTER,
                                    preferred_element_type=dtype, implementation=kernel)


def check_installed() -> None:
  """ValueError that says what to install."""
  if importlib.util.find_spec('tokamax') is None:
    raise ValueError("experts_kernel='tokamax' needs tokamax, which is not installed: pip install 'maxlm[kernels]', or use "
                     "'blocked'")


def _kernel():
  """(tokamax, the implementation to ask it for). Imported here: it takes seconds."""
  check_installed()
  import tokamax
  from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu, pallas_mosaic_gpu_common
  minor = pallas_mosaic_gpu_common.MatmulDimension.N
  config = pallas_mosaic_gpu_common.Config(grid_minor_dim=minor, **BLOCKS)
  return tokamax, (pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=config),)
