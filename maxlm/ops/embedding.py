"""Looking up rows of a table whose width is split over devices: the vectors travel, not the table.

B batch  T time  V rows of the table  D width
"""

import jax
import jax.numpy as jnp

from maxlm.sharding import axes, spec


def look_up(table_VD: jax.Array, index_BT: jax.Array, dtype, dims: str = 'VD') -> jax.Array:
  """table[index] -> [B, T, D] in `dtype`; the table's gradient is summed in its own dtype.

  A device has a part of each row. It looks up that part for the tokens of all devices that have the others, and swaps: it
  gives away what it has of their tokens for what they have of its own. So a device receives its tokens' vectors, where
  gathering the table would bring it V of them, and its gradient as many again. dims: of the table.
  """
  def island(table_VD, index_BT):
    index_BT = jax.lax.all_gather(index_BT, axes('D'), axis=0, tiled=True)
    rows = table_VD.shape[0]
    index_BT -= jax.lax.axis_index(axes(dims[0])) * rows if axes(dims[0]) else 0
    here_BT = (index_BT >= 0) & (index_BT < rows)
    x_BTD = jnp.where(here_BT[..., None], table_VD[jnp.clip(index_BT, 0, rows - 1)], 0).astype(dtype)
    x_BTD = jax.lax.all_to_all(x_BTD, axes('D'), split_axis=0, concat_axis=2, tiled=True)
    return jax.lax.psum(x_BTD, axes(dims[0]))

  index_BT = jax.reshard(index_BT, spec('BT'))  # where tokens are written, time is whole
  return jax.shard_map(island, in_specs=(spec(dims), spec('BT')), out_specs=spec('BTD'))(table_VD, index_BT)
