"""Digests of arrays: the same under any sharding, on any number of devices, and another one after any single bit flip.

Each element's bits are mixed with a hash of its place in the whole array, and the results are added modulo 2^32. Addition
is associative on integers, so no order of summation and no split of the array changes the sum: what was saved on 64 chips
is verified on one. Two such sums with different constants are the 64 bits of a digest. It is one pass over the array where
it lies, and it does not guard against an attacker: who can write a checkpoint can write its digests.
"""

import jax
import jax.numpy as jnp

# Per word: a salt, and the multipliers of the finalizer of MurmurHash3 (Appleby 2011, `fmix32`) and of `lowbias32`
# (Wellons 2018). Odd multipliers and shifted xors can be undone: each is a bijection on 32 bits. So an element that
# differs always contributes another number, and where only one differs each word of the digest does.
_MIXES = ((0x9E3779B9, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)), (0x7F4A7C15, (16, 0x7FEB352D, 15, 0x846CA68B, 16)))


def words(array: jax.Array) -> jax.Array:
  """uint32 [2], replicated: the digest of an array of any shape and dtype (random keys too). To be traced, where shardings
  are types or not, but not inside of shard_map, where an element's place in the whole array is not known."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  bits = _bits(array)
  sharding = jax.typeof(bits).sharding
  place = jnp.zeros((), jnp.uint32)
  for dim, size in enumerate(bits.shape):  # row by row, modulo 2^32
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, bits.shape, dim, out_sharding=None if sharding.mesh.empty else sharding)
  return jnp.stack([jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(salt), *mix), *mix), dtype=jnp.uint32)
                    for salt, mix in _MIXES])


def _bits(array: jax.Array) -> jax.Array:
  """The bits of each element as uint32; two of them, in a dimension of their own, for elements of 64."""
  if array.dtype == jnp.bool:
    return array.astype(jnp.uint32)
  size = min(jax.dtypes.itemsize_bits(array.dtype), 32)
  return jax.lax.bitcast_convert_type(array, jnp.dtype(f'uint{size}')).astype(jnp.uint32)


def _mix(x: jax.Array, shift_0: int, factor_0: int, shift_1: int, factor_1: int, shift_2: int) -> jax.Array:
  x = (x ^ (x >> jnp.uint32(shift_0))) * jnp.uint32(factor_0)
  x = (x ^ (x >> jnp.uint32(shift_1))) * jnp.uint32(factor_1)
  return x ^ (x >> jnp.uint32(shift_2))
