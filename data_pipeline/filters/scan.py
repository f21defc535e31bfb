"""Words, lines and paragraphs of a text, in one pass over its utf-8 bytes: what the rules count.

  word       a run of characters that are not white space (Unicode's). Words are compared without punctuation at their ends
             and with A-Z as a-z; a word of punctuation alone is compared as it is.
  line       what stands between line feeds, without white space at its ends; blank ones do not count.
  paragraph  lines with no blank line between them.
  character  a code point.

Languages that are written without spaces have long "words": their limits have to be other ones.
"""

import functools
import unicodedata

import numba
import numpy as np

ALPHA, SPACE, PUNCTUATION, BULLET, STOP, CLOSER = (1 << i for i in range(6))  # classes of characters
BULLETS = '•‣⁃◦▪▫■□●○∙·*-–—'
STOPS = '.!?…。！？｡؟۔।'
CLOSERS = '"\'”’»)]」』）'

# Rows of the tables that `scan` fills: a column a word, a column a line. Positions are bytes of the text.
WORD_CHARACTERS, WORD_ALPHA = range(2)
LINE_BEGIN, LINE_START, LINE_END, LINE_STOP, LINE_CHARACTERS, LINE_WORDS, LINE_LONGEST, LINE_PARAGRAPH = range(8)
# of the line with its white space: BEGIN, STOP; without: START, END; of its longest word, in characters: LONGEST


@functools.cache
def classes() -> np.ndarray:
  """uint8 [code points]: the classes of each."""
  table = np.zeros(0x110000, np.uint8)
  for code in range(0x110000):
    character = chr(code)
    table[code] = character.isalpha() * ALPHA | character.isspace() * SPACE | (
      unicodedata.category(character)[0] in 'PS') * PUNCTUATION
  for characters, flag in ((BULLETS, BULLET), (STOPS, STOP), (CLOSERS, CLOSER)):
    table[[ord(character) for character in characters]] |= flag
  return table


def codes(characters: str) -> np.ndarray:
  """int32 [n]: code points."""
  return np.array([ord(character) for character in characters], np.int32)


def hash_of_word(word: str) -> int:
  """What `scan` makes of this word."""
  data = np.frombuffer(word.encode(), np.uint8)
  hashes, words, lines = tables(len(data))
  n_words, _ = scan(data, classes(), hashes, words, lines)
  if n_words != 1:
    raise ValueError(f'{word!r} is not one word')
  return int(hashes[0])


@numba.njit(cache=True)
def decode(text, i):
  """(code point at i, where the next begins), of valid utf-8."""
  a = np.int32(text[i])
  if a < 0x80:
    return a, i + 1
  if a < 0xe0:
    return (a & 31) << 6 | np.int32(text[i + 1] & 63), i + 2
  if a < 0xf0:
    return (a & 15) << 12 | np.int32(text[i + 1] & 63) << 6 | np.int32(text[i + 2] & 63), i + 3
  b, c, d = np.int32(text[i + 1] & 63), np.int32(text[i + 2] & 63), np.int32(text[i + 3] & 63)
  return (a & 7) << 18 | b << 12 | c << 6 | d, i + 4


@numba.njit(cache=True)
def last_character(text, end):
  """The code point that ends at `end`."""
  i = end - 1
  while text[i] & 0xc0 == 0x80:
    i -= 1
  return decode(text, i)[0]


@numba.njit(cache=True)
def hash_bytes(text, start, end):
  """FNV-1a over bytes, A-Z as a-z, and the last step of murmur3."""
  h = np.uint64(0xcbf29ce484222325)
  for i in range(start, end):
    b = text[i]
    if 65 <= b <= 90:
      b += np.uint8(32)
    h = (h ^ np.uint64(b)) * np.uint64(0x100000001b3)
  return mixed(h)


@numba.njit(cache=True)
def mixed(h):
  h = (h ^ h >> np.uint64(33)) * np.uint64(0xff51afd7ed558ccd)
  h = (h ^ h >> np.uint64(33)) * np.uint64(0xc4ceb9fe1a85ec53)
  return h ^ h >> np.uint64(33)


@numba.njit(cache=True)
def most_words(data, offsets, rows):
  """No document of these rows has more words, or more lines."""
  most = 0
  for row in rows:
    n = 1
    for i in range(offsets[row], offsets[row + 1]):
      b = data[i]
      n += b <= 32 or b == 0xc2 or 0xe1 <= b <= 0xe3  # white space, and what may begin it
    most = max(most, n)
  return most


@numba.njit(cache=True)
def tables(n):
  """What `scan` needs for texts of up to n words: their hashes, words, lines."""
  return np.empty(n + 1, np.uint64), np.empty((2, n + 1), np.int32), np.empty((8, n + 1), np.int32)


@numba.njit(cache=True)
def scan(text, classes, hashes, words, lines):
  """Fills the tables; returns the numbers of words and of lines."""
  n_words = n_lines = paragraph = i = 0
  n = len(text)
  while i < n:  # a line
    begin, start, end, characters, trailing, first, longest = i, -1, i, 0, 0, n_words, 0
    while i < n and text[i] != 10:
      code, after = decode(text, i)
      if classes[code] & SPACE:
        trailing += start >= 0
        i = after
        continue
      if start < 0:
        start = i
      word, core, core_end, length, alpha = i, -1, i, 0, 0
      while True:  # a word
        kind = classes[code]
        alpha |= kind & ALPHA
        length += 1
        if not kind & PUNCTUATION:
          core = i if core < 0 else core
          core_end = after
        i = after
        if i == n:
          break
        code, after = decode(text, i)
        if classes[code] & SPACE:
          break
      hashes[n_words] = hash_bytes(text, word, i) if core < 0 else hash_bytes(text, core, core_end)
      words[WORD_CHARACTERS, n_words] = length
      words[WORD_ALPHA, n_words] = alpha
      n_words += 1
      characters += trailing + length
      trailing, end, longest = 0, i, max(longest, length)
    if start < 0:
      paragraph += 1
    else:
      lines[LINE_BEGIN, n_lines], lines[LINE_START, n_lines], lines[LINE_END, n_lines] = begin, start, end
      lines[LINE_STOP, n_lines], lines[LINE_CHARACTERS, n_lines] = i, characters
      lines[LINE_WORDS, n_lines], lines[LINE_LONGEST, n_lines] = n_words - first, longest
      lines[LINE_PARAGRAPH, n_lines] = paragraph
      n_lines += 1
    i += 1
  return n_words, n_lines


@numba.njit(cache=True)
def first_of(keys, n, slots, firsts, counts):
  """firsts[i]: the first of the n keys that equals key i; counts[firsts[i]]: how many do. slots: at least 4n of int32."""
  size = 1
  while size < 2 * n:
    size *= 2
  slots[:size] = 0
  mask = np.uint64(size - 1)
  for i in range(n):
    slot = mixed(keys[i]) & mask
    while slots[slot] and keys[slots[slot] - 1] != keys[i]:
      slot = (slot + np.uint64(1)) & mask
    if not slots[slot]:
      slots[slot] = i + 1
      counts[i] = 0
    firsts[i] = slots[slot] - 1
    counts[firsts[i]] += 1
