"""What recurrent mixers share: where documents start in packed rows, and how decays and convolutions are initialised.

B batch  T time  M columns of a cache
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.param import normal
from maxlm.layers.rows import Past, Rows
from maxlm.ops import context
from maxlm.sharding import axis_size
from maxlm.sharding import spec as shard


def document_starts(rows: Rows, past: Past | None = None) -> jax.Array:
  """bool [B, T]: the segment id differs from that of the token before, the last one of the past; the first of all starts."""
  if axis_size('T') > 1:
    return jax.shard_map(_starts_of_parts, in_specs=shard('BT'), out_specs=shard('BT'))(rows.segment_ids_BT)
  ids_BT = jax.reshard(rows.segment_ids_BT, shard('BM'))  # M is never split, and here T is not either
  first_B1 = jnp.full((ids_BT.shape[0], 1), True, out_sharding=shard('BM'))
  if past is not None:
    past_BM = jax.reshard(past.segment_ids_BM, shard('BM'))
    last_B1 = jax.lax.dynamic_slice_in_dim(past_BM, jnp.maximum(past.column - 1, 0), 1, axis=1)
    first_B1 = (past.column == 0) | (ids_BT[:, :1] != last_B1)
  return jnp.concatenate([first_B1, ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)


def _starts_of_parts(ids_BT):
  with jax.named_scope('halo'):
    ids = context.with_halo(ids_BT, 1, missing=-1)
  return context.joined(ids[:, 1:] != ids[:, :-1])


def a_log(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...]) -> nnx.Param:
  """log(A) with A uniform in [1, 16]: a state decays by exp(-A dt). As Mamba-2 (arXiv 2405.21060, its released code)."""
  return nnx.Param(jnp.log(jax.random.uniform(rngs.params(), shape, jnp.float32, 1.0, 16.0, out_sharding=shard(dims))))


def dt_bias(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...]) -> nnx.Param:
  """b with softplus(b), the time step of an input of zero, log-uniform in [0.001, 0.1] (Mamba, arXiv 2312.00752, 3.6)."""
  low, high = math.log(0.001), math.log(0.1)
  dt = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, low, high, out_sharding=shard(dims)))
  return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))


def conv_weight(rngs: nnx.Rngs, dims: str, shape: tuple[int, ...]) -> nnx.Param:
  """Taps [W, …] of variance 1 / 3W, that of uniform in ±W**-0.5."""
  return normal(rngs, dims, shape, (3 * shape[0]) ** -0.5)
