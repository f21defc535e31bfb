"""Digests of arrays: the same under any sharding, on any number of devices, and another one after any single bit flip.

Each element's bits are mixed with a hash of its place in the whole array, and the results are added modulo 2^32. Addition
is associative on integers, so no order of summation and no split of the array changes the sum: what was saved on 64 chips
is verified on one. Two such sums with different constants are the 64 bits of a digest. It is one pass over the array where
it lies, and it does not guard against an attacker: who can write a checkpoint can write its digests.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

# Per word: a salt, and the multipliers of the finalizer of MurmurHash3 (Appleby 2011, `fmix32`) and of `lowbias32`
# (Wellons 2018). Odd multipliers and shifted xors can be undone: each is a bijection on 32 bits. So an element that
# differs always contributes another number, and where only one differs each word of the digest does.
_MIXES = ((0x9E3779B9, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)), (0x7F4A7C15, (16, 0x7FEB352D, 15, 0x846CA68B, 16)))


def of_tree(tree) -> dict[str, str]:
  """{leaf name: 16 hex digits} of a tree of jax arrays, on every process. A program is compiled for each kind of leaf
  (shape, dtype, sharding), of which a state has far fewer than leaves."""
  found = jax.device_get({name: _words_of(leaf) for name, leaf in named_leaves(tree).items()})
  return {name: f'{first:08x}{second:08x}' for name, (first, second) in found.items()}


def replicas(tree) -> list[tuple[str, int, int]]:
  """(leaf name, device id, process index) of each copy that differs from most copies of the same part of an array.

  Each device digests what it holds itself, which no other program compares: one that computes wrongly, or whose memory
  does not keep what it is given, is found so. Where no value has more copies than each other, all are named. Every
  process gets the list.
  """
  named = _replicated(tree)
  found, different = jax.device_get({name: _words_held(leaf, leaf.sharding.mesh) for name, leaf in named.items()}), []
  for name, leaf in named.items():
    parts = collections.defaultdict(list)  # index range -> its devices and what they hold
    places = leaf.sharding.devices_indices_map(leaf.shape)
    for device, held in zip(leaf.sharding.mesh.devices.flatten(), found[name].tolist()):
      parts[_place(places[device])].append((device, tuple(held)))
    for copies in parts.values():
      counts = collections.Counter(held for _, held in copies).most_common()
      most = None if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]
      different += [(name, device.id, device.process_index) for device, held in copies if held != most]
  return different


def n_replicated(tree) -> tuple[int, int]:
  """(leaves that `replicas` has copies of to compare, all leaves)."""
  return len(_replicated(tree)), len(named_leaves(tree))


def named_leaves(tree) -> dict[str, Any]:
  """{'stacks.0.mixer.w_q_DNH': leaf}: the leaves under their dotted paths, in the tree's order."""
  named = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    parts = [str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', None)))) for key in path]
    name = '.'.join(parts[:-1] if parts[-1] == 'value' else parts)  # nnx.Param keeps its array in `.value`
    assert name not in named, f'two leaves are named {name}'
    named[name] = leaf
  return named


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
  mixed = tuple(_mix(bits ^ _mix(place + jnp.uint32(salt), *mix), *mix) for salt, mix in _MIXES)
  # Both sums in one reduction: ten times as fast on a CPU as one after the other, in which XLA does not use its vectors.
  return jnp.stack(jax.lax.reduce(mixed, (jnp.uint32(0), jnp.uint32(0)), lambda x, y: (x[0] + y[0], x[1] + y[1]),
                                  tuple(range(bits.ndim))))


_words_of = jax.jit(words)


@functools.partial(jax.jit, static_argnames='mesh')
def _words_held(leaf: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """uint32 [devices, 2]: of what each device holds, in the order of mesh.devices."""
  held = jax.shard_map(lambda block: words(block)[None], mesh=mesh, in_specs=jax.typeof(leaf).sharding.spec,
                       out_specs=jax.P(mesh.axis_names), check_vma=False)
  return jax.sharding.reshard(held(leaf), jax.NamedSharding(mesh, jax.P()))


def _replicated(tree) -> dict[str, jax.Array]:
  """The leaves of which a part is on several devices."""
  return {name: leaf for name, leaf in named_leaves(tree).items() if isinstance(leaf.sharding, jax.NamedSharding)
          and len(set(map(_place, leaf.sharding.devices_indices_map(leaf.shape).values()))) < leaf.sharding.num_devices}


def _place(index: tuple[slice, ...]) -> tuple:
  return tuple((part.start, part.stop) for part in index)


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
