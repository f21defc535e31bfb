"""A random permutation of 0..n-1 that is computed where it is asked for: no table, no state, any n.

A Feistel network over a rectangle: an index is a place (left, right) in a x b >= n, and each round moves one coordinate,
modulo its side, by a hash of the other: a bijection of the rectangle whatever the hash. A place outside n is moved again
until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The order of a training run depends on
these lines for ever: change them and every run shuffles differently.
"""

import hashlib

import numpy as np

_ROUNDS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@np.errstate(over='ignore')  # products are modulo 2^64
def _hash(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele et al. 2014): a bijection of 64 bits in which each bit depends on all."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def key_of(seed: int, name: str) -> int:
  """The 64-bit key of a seed and of what is shuffled with it."""
  return int.from_bytes(hashlib.sha256(f'{seed}/{name}'.encode()).digest()[:8], 'little')


@np.errstate(over='ignore')
def epoch_keys(keys, epochs) -> np.ndarray:
  """Keys of single epochs: a different permutation for each. uint64, broadcast over both."""
  return _hash(np.asarray(keys, np.uint64) + _GAMMA * (np.asarray(epochs).astype(np.uint64) + np.uint64(1)))


@np.errstate(over='ignore')
def permute(index, n, keys) -> np.ndarray:
  """Where `index` (0 <= index < n) lies in the permutation of 0..n-1 of each key. int64 arrays of one shape; n < 2^62."""
  index, n, keys = np.broadcast_arrays(np.asarray(index).astype(np.uint64), np.asarray(n).astype(np.uint64),
                                       np.asarray(keys, np.uint64))
  index = index.copy()
  assert (index < n).all()
  side_a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
  side_b = -(-n.astype(np.int64) // side_a.astype(np.int64)).astype(np.uint64)
  todo = np.arange(index.size)
  while todo.size:
    a, b, key = side_a[todo], side_b[todo], keys[todo]
    left, right = np.divmod(index[todo], b)
    for i in range(_ROUNDS):
      salt = key + _GAMMA * np.uint64(i)
      if i % 2:
        right = (right + _hash(left ^ salt) % b) % b
      else:
        left = (left + _hash(right ^ salt) % a) % a
    index[todo] = left * b + right
    todo = todo[index[todo] >= n[todo]]
  return index.astype(np.int64)
