"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), pairs (i, i + H/2) as Llama stores them."""

import jax
import jax.numpy as jnp


def rope_table(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each fp32 [B, T, 1, head_dim/2], for angles position * theta^(-2i/head_dim)."""
  frequency_H = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle_BTNH = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_H
  return jnp.cos(angle_BTNH), jnp.sin(angle_BTNH)


def rotate(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates each head's pairs by its token's angles, in fp32; result in the dtype of x."""
  cos, sin = table
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
