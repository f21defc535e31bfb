"""What a word is to the steps that compare texts, and hashes of words and of n-grams of them.

A text is first normalised (NFKC, lower case). A word is then a run of letters and digits; scripts that set no spaces between
words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) count each character as a word. Everything else is a gap, so that
neither punctuation nor layout, nor the underscores of a program, make two texts different.
"""

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def normal(texts: pa.Array) -> pa.Array:
  """[texts] of string: NFKC, lower case."""
  return pc.utf8_lower(pc.utf8_normalize(texts, 'NFKC'))


def hashes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  """uint64 [words], a hash of each word of normal texts, and int64 [texts + 1], where each text begins in it."""
  data, offsets = _buffers(texts)
  return _hash_words(data, offsets, np.empty(0, np.int64))


def spans(text: bytes) -> np.ndarray:
  """int64 [words, 2]: where each word of one normal text begins and ends, in bytes."""
  data = np.frombuffer(text, np.uint8)
  found = np.empty(2 * (len(data) // 2 + 1), np.int64)
  n_words = _hash_words(data, np.array([0, len(data)]), found)[1][-1]
  return found[:2 * n_words].reshape(-1, 2)


def ngrams(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
  """As `hashes`, of each n words in a row; of all words where there are fewer than n."""
  return _hash_ngrams(*hashes(texts), n)


def _buffers(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
  wide = texts.cast(pa.large_string())
  offsets = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset:wide.offset + len(wide) + 1]
  data = wide.buffers()[2]
  return np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), offsets if len(offsets) else np.zeros(1, np.int64)


_GAP, _LETTER, _ALONE = 0, 1, 2  # kinds of characters; the last is a word of its own


@numba.njit(cache=True)
def _kind(data, i, end):
  """(kind, bytes) of the character at i. Valid utf-8, of which NFKC has left no full-width letters."""
  a = data[i]
  if a < 0x80:
    return _LETTER if 97 <= a <= 122 or 48 <= a <= 57 or 65 <= a <= 90 else _GAP, 1
  b = data[i + 1] if i + 1 < end else 0
  if a < 0xE0:
    return _GAP if a == 0xC2 else _LETTER, 2
  if a < 0xF0:
    if a == 0xE2 and b < 0xB0 or a == 0xE3 and b == 0x80:  # general punctuation, arrows, …; CJK punctuation
      return _GAP, 3
    alone = 0xE3 <= a <= 0xE9 or a == 0xE0 and 0xB8 <= b <= 0xBB or a == 0xE1 and (0x80 <= b <= 0x82 or 0x9E <= b <= 0x9F)
    return _ALONE if alone else _LETTER, 3
  if a == 0xF0 and b == 0x9F:  # emoji
    return _GAP, 4
  return _ALONE if a == 0xF0 and b >= 0xA0 else _LETTER, 4


@numba.njit(cache=True)
def _mix(x):
  """The finaliser of splitmix64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


@numba.njit(cache=True)
def _hash_words(data, offsets, spans):
  """Hashes of words and where each text begins; into `spans` unless it is empty: the first and last byte of each word."""
  n_texts = len(offsets) - 1
  most = (offsets[-1] - offsets[0] + n_texts) // 2 + n_texts + 1
  found, first = np.empty(most, np.uint64), np.zeros(n_texts + 1, np.int64)
  prime, basis, n = np.uint64(0x100000001B3), np.uint64(0xCBF29CE484222325), 0
  for t in range(n_texts):
    i, end = offsets[t], offsets[t + 1]
    while i < end:
      kind, size = _kind(data, i, end)
      if kind == _GAP:
        i += size
        continue
      start, h = i, basis
      alone = kind == _ALONE
      while kind == _LETTER or i == start:
        for j in range(i, min(i + size, end)):
          h = (h ^ np.uint64(data[j])) * prime
        i += size
        if alone or i >= end:
          break
        kind, size = _kind(data, i, end)
      if len(spans):
        spans[2 * n], spans[2 * n + 1] = start, i
      found[n] = _mix(h)
      n += 1
    first[t + 1] = n
  return found[:n], first


@numba.njit(cache=True)
def _hash_ngrams(words, first, n):
  n_texts = len(first) - 1
  grams, begins = np.empty(len(words), np.uint64), np.zeros(n_texts + 1, np.int64)
  base, top, total = np.uint64(0x9E3779B97F4A7C15), np.uint64(1), 0
  for _ in range(n):
    top *= base
  for t in range(n_texts):
    h = np.uint64(0)
    for i in range(first[t], first[t + 1]):
      h = h * base + words[i]
      if i - first[t] >= n:
        h -= words[i - n] * top
      if i - first[t] >= n - 1 or i == first[t + 1] - 1:
        grams[total] = _mix(h)
        total += 1
    begins[t + 1] = total
  return grams[:total], begins
