"""A digest depends on every bit and on nothing else: not on the mesh, nor on the split; and copies that differ are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import digest
from maxlm.sharding import spec

DTYPES = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2', 'float4_e2m1fn', 'int32', 'int16', 'uint8',
          'int4')
SHAPE = (8, 16, 8)
words = jax.jit(digest.words)
words_of_each = jax.jit(jax.vmap(digest.words))


def array_of(dtype: str, bits: np.ndarray) -> jax.Array:
  """An array of any bit patterns, those of NaNs among them."""
  n_bits = jax.dtypes.itemsize_bits(jnp.dtype(dtype))
  narrow = jnp.asarray(bits & (2**n_bits - 1), jnp.uint32).astype(f'uint{n_bits}')
  return jax.lax.bitcast_convert_type(narrow, jnp.dtype(dtype))


def random_bits(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 2**32, SHAPE, np.uint32)


def value_of(array) -> list[int]:
  return words(array).tolist()


@pytest.mark.parametrize('dtype', DTYPES)
def test_any_bit_changes_both_words(dtype):
  bits, n_bits = random_bits(), jax.dtypes.itemsize_bits(jnp.dtype(dtype))
  before, flips = value_of(array_of(dtype, bits)), np.stack([bits] * n_bits * 4)
  for i, flipped in enumerate(flips):
    flipped.flat[i * 251 % bits.size] ^= np.uint32(1 << i % n_bits)
  after = np.asarray(words_of_each(array_of(dtype, flips)))
  assert (after[:, 0] != before[0]).all() and (after[:, 1] != before[1]).all()


def test_a_bool_and_a_random_key_have_digests():
  flags = np.array([True, False, True])
  assert len({tuple(value_of(flags)), tuple(value_of(~flags)), tuple(value_of(flags[:2]))}) == 3
  assert value_of(jax.random.key(1)) == value_of(jax.random.key(1)) != value_of(jax.random.key(2))


def test_elements_that_change_places_change_the_digest():
  x = np.arange(24, dtype=np.float32).reshape(4, 6)
  assert len({tuple(value_of(y)) for y in (x, x[::-1], x[:, ::-1], np.roll(x, 1))}) == 4


def test_pairs_of_flips_do_not_cancel():
  """Any two of the 64 bits of two elements, 2,016 pairs: no two digests are alike."""
  pairs = [(one, other) for one in range(64) for other in range(one)]
  flipped = np.zeros((len(pairs) + 1, 2), np.uint32)
  for row, pair in zip(flipped, pairs):
    for bit in pair:
      row[bit // 32] ^= np.uint32(1 << bit % 32)
  assert len(np.unique(np.asarray(words_of_each(flipped)), axis=0)) == len(flipped)


@pytest.mark.parametrize('dtype', ['float32', 'float8_e4m3fn', 'bool'])
@pytest.mark.parametrize('sizes', [{'tensor': 2}, {'data': 2, 'tensor': 2}])
def test_the_digest_is_the_same_under_any_sharding(mesh_of, dtype, sizes):
  x = random_bits() % 3 == 0 if dtype == 'bool' else array_of(dtype, random_bits())
  alone = value_of(x)
  with mesh_of(8, **sizes) as mesh:
    for letters in ('BXX', 'DXN', 'XBF'):
      split = jax.device_put(x, jax.NamedSharding(mesh, spec(letters)))
      assert value_of(split) == alone
      assert digest.of_tree({'x': split}) == digest.of_tree({'x': x}) == {'x': '{:08x}{:08x}'.format(*alone)}
  assert value_of(split) == alone  # and where no mesh is set


def test_two_processes_would_add_what_one_adds():
  """The sum over parts that each know their place is the sum over the whole: what makes it independent of hosts."""
  x = jnp.asarray(random_bits())
  whole = np.array(value_of(x), np.uint32)
  zeros = [x.at[:3].set(0), x.at[3:].set(0)]
  parts = sum(np.array(value_of(part), np.uint32) for part in zeros) - np.array(value_of(jnp.zeros_like(x)), np.uint32)
  assert whole.tolist() == parts.tolist()


def test_a_digest_is_what_it_was():
  """Digests outlive a version of this code: checkpoints hold them."""
  tree = {'b': {'x': jnp.arange(12, dtype=jnp.float32).reshape(3, 4)}, 'a': jnp.bfloat16(1.5), 'none': None,
          'empty': jnp.zeros((0, 3))}
  assert digest.of_tree(tree) == {'a': '7843b100347afb57', 'b.x': 'a4e4c5e269ad6d2e', 'empty': '0000000000000000'}


def test_the_first_word_is_the_sum_of_murmur3_finalizers():
  def fmix32(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16

  assert fmix32(1) == 0x514E28B7  # of MurmurHash3_x86_32 of nothing with seed 1
  x = [7, 2**31, 12345]
  assert value_of(np.array(x, np.uint32))[0] == sum(fmix32(v ^ fmix32(i + 0x9E3779B9)) for i, v in enumerate(x)) % 2**32


def corrupted(array: jax.Array, *places: int) -> jax.Array:
  """The same array, but that the copies on some devices have one bit that the others do not have."""
  blocks = [np.array(shard.data) for shard in array.addressable_shards]
  for place in places:
    blocks[place].reshape(-1).view(np.uint32)[1] ^= 1 << 7
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [
    jax.device_put(block, shard.device) for block, shard in zip(blocks, array.addressable_shards)])


def test_copies_that_differ_are_named(mesh_of):
  with mesh_of(8, data=4, tensor=2) as mesh:
    x = jax.random.normal(jax.random.key(0), (8, 4))
    tree = {'whole': jax.device_put(x, jax.NamedSharding(mesh, jax.P())),
            'twice': jax.device_put(x, jax.NamedSharding(mesh, spec('XF'))),
            'split': jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, spec('BF')))}
    assert digest.n_replicated(tree) == (2, 3)
    assert digest.replicas(tree) == []
    at = [shard.device.id for shard in tree['twice'].addressable_shards]
    broken = tree | {'twice': corrupted(tree['twice'], 5), 'split': corrupted(tree['split'], 3)}
    assert digest.replicas(broken) == [('twice', at[5], 0)]  # the one that is split has nothing to compare with
    assert digest.of_tree(tree)['whole'] == digest.of_tree(broken)['whole']
    broken = tree | {'whole': corrupted(tree['whole'], 0, 6)}
    assert sorted(digest.replicas(broken)) == [('whole', at[0], 0), ('whole', at[6], 0)]


def test_of_two_copies_that_differ_both_are_named(mesh_of):
  with mesh_of(data=2) as mesh:
    x = corrupted(jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P())), 1)
    assert [device for _, device, _ in digest.replicas({'x': x})] == [0, 1]


def test_a_single_device_has_nothing_to_compare(mesh_of):
  with mesh_of(1):
    tree = {'x': jnp.ones((4, 4)), 'on no mesh': jax.device_put(1.0, jax.devices()[1])}
    assert digest.n_replicated(tree) == (0, 2) and digest.replicas(tree) == []
