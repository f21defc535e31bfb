"""What the rules count in utf-8 text: words, lines and paragraphs of it, found in one pass, and what follows from them.

  word       a run of characters that are not white space (Unicode's). Words are compared without punctuation at their ends
             and with A-Z as a-z; a word of punctuation alone is compared as it is.
  line       what stands between line feeds, without white space at its ends; blank ones do not count.
  paragraph  lines with no blank line between them.
  character  a code point.

Languages that are written without spaces have long "words": their limits have to be other ones.

What numba compiles is cached until the file changes that it is in: so a kernel calls only kernels of its own file.
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
  hashes, words, lines = tables(data, np.array([0, len(data)]), np.zeros(1, np.int64))
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
def tables(data, offsets, rows):
  """What `scan` needs for any document of these rows: hashes of words, words, lines."""
  most_words = most_lines = 0
  for row in rows:
    n_words = n_lines = 1
    for i in range(offsets[row], offsets[row + 1]):
      b = data[i]
      n_words += b <= 32 or b == 0xc2 or 0xe1 <= b <= 0xe3  # white space, and what may begin it
      n_lines += b == 10
    most_words, most_lines = max(most_words, n_words), max(most_lines, n_lines)
  return np.empty(most_words, np.uint64), np.empty((2, most_words), np.int32), np.empty((8, most_lines), np.int32)


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


@numba.njit(cache=True)
def quality(data, offsets, rows, classes, stop_words):
  """float64 [rows, 8]: words, characters a word, '#' a word, ellipses a word, shares of lines with a bullet and with an
  ellipsis at the end, share of words with a letter, number of different stop words."""
  found = np.zeros((len(rows), 8))
  hashes, words, lines = tables(data, offsets, rows)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan(text, classes, hashes, words, lines)
    if not n_words:
      continue
    symbols, ellipses, bullets, ends, seen = 0, 0, 0, 0, np.uint64(0)
    i = 0
    while i < len(text):
      if text[i] == 35:
        symbols += 1
      elif _is_ellipsis(text, i):
        ellipses += 1
        i += 2
      i += 1
    for k in range(n_lines):
      bullets += classes[decode(text, lines[LINE_START, k])[0]] & BULLET != 0
      ends += lines[LINE_END, k] - lines[LINE_START, k] >= 3 and _is_ellipsis(text, lines[LINE_END, k] - 3)
    for k in range(n_words):
      for s in range(len(stop_words)):
        if hashes[k] == stop_words[s]:
          seen |= np.uint64(1) << np.uint64(s)
    stops = 0
    while seen:
      stops += np.int64(seen & np.uint64(1))
      seen >>= np.uint64(1)
    characters, alphabetic = 0, 0
    for k in range(n_words):
      characters += words[WORD_CHARACTERS, k]
      alphabetic += words[WORD_ALPHA, k] != 0
    found[r, 0], found[r, 7] = n_words, stops
    found[r, 1], found[r, 2], found[r, 3] = characters / n_words, symbols / n_words, ellipses / n_words
    found[r, 4], found[r, 5], found[r, 6] = bullets / n_lines, ends / n_lines, alphabetic / n_words
  return found


@numba.njit(cache=True)
def _is_ellipsis(text, i):
  """Whether '...' or '…' (e2 80 a6) begins here."""
  if i + 3 > len(text):
    return False
  return (text[i] == 46 and text[i + 1] == 46 and text[i + 2] == 46
          or text[i] == 0xe2 and text[i + 1] == 0x80 and text[i + 2] == 0xa6)


@numba.njit(cache=True)
def line_shares(data, offsets, rows, classes, stops, short_line):
  """float64 [rows, 4]: shares of lines that end in a character of `stops` and that are short, share of characters in lines
  that were there before, lines a word."""
  found = np.zeros((len(rows), 4))
  hashes, words, lines = tables(data, offsets, rows)
  n = len(hashes)
  slots, firsts, counts = np.empty(4 * n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan(text, classes, hashes, words, lines)
    if not n_words:
      continue
    keys = line_keys(text, lines, n_lines)
    first_of(keys, n_lines, slots, firsts, counts)
    punctuated, short, repeated, characters = 0, 0, 0, 0
    for k in range(n_lines):
      length = lines[LINE_CHARACTERS, k]
      punctuated += _ends_in(text, lines[LINE_END, k], stops)
      short += length <= short_line
      repeated += length * (firsts[k] != k)
      characters += length
    found[r, 0], found[r, 1] = punctuated / n_lines, short / n_lines
    found[r, 2], found[r, 3] = repeated / characters, n_lines / n_words
  return found


@numba.njit(cache=True)
def line_keys(text, lines, n_lines):
  """uint64 [lines]: equal for lines that are equal but for case."""
  keys = np.empty(n_lines, np.uint64)
  for k in range(n_lines):
    keys[k] = hash_bytes(text, lines[LINE_START, k], lines[LINE_END, k])
  return keys


@numba.njit(cache=True)
def _ends_in(text, end, stops):
  last = last_character(text, end)
  for stop in stops:
    if last == stop:
      return True
  return False


@numba.njit(cache=True)
def line_cuts(data, offsets, rows, classes, terminal, min_words, max_word_length, phrases, bounds):
  """int64 [cuts, 4]: (index in rows, start, end, lines), in bytes of the document. Neighbouring lines are one cut, and the
  lines that stay have at most as many blank ones between them as before."""
  cuts = [(0, 0, 0, 0) for _ in range(0)]
  hashes, words, lines = tables(data, offsets, rows)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    _, n_lines = scan(text, classes, hashes, words, lines)
    k = 0
    while k < n_lines:
      first = k
      while k < n_lines and _is_cut(text, lines, k, terminal, min_words, max_word_length, phrases, bounds):
        k += 1
      if k > first:
        start, end = lines[LINE_BEGIN, first], lines[LINE_STOP, k - 1]
        if k == n_lines:
          start, end = lines[LINE_STOP, first - 1] if first else 0, len(text)
        elif first and lines[LINE_PARAGRAPH, first] == lines[LINE_PARAGRAPH, first - 1]:
          end += 1
        else:
          end = lines[LINE_BEGIN, k]
        cuts.append((r, start, end, k - first))
      k += 1
  return np.array(cuts, np.int64).reshape(-1, 4) if cuts else np.empty((0, 4), np.int64)


@numba.njit(cache=True)
def _is_cut(text, lines, k, terminal, min_words, max_word_length, phrases, bounds):
  start, end = lines[LINE_START, k], lines[LINE_END, k]
  if lines[LINE_WORDS, k] < min_words or lines[LINE_LONGEST, k] > max_word_length:
    return True
  if len(terminal) and (not _ends_in(text, end, terminal) or end - start >= 3 and _is_ellipsis(text, end - 3)):
    return True
  return _has_phrase(text, start, end, phrases, bounds)


@numba.njit(cache=True)
def _has_phrase(text, start, end, phrases, bounds):
  """Whether one of the phrases, which are in small letters, is in text[start:end] in whatever case."""
  begins = np.zeros(256, np.bool_)
  for p in range(len(bounds) - 1):
    begins[phrases[bounds[p]]] = True
  for i in range(start, end):
    if not begins[_small(text[i])]:
      continue
    for p in range(len(bounds) - 1):
      length = bounds[p + 1] - bounds[p]
      if i + length <= end:
        j = 0
        while j < length and _small(text[i + j]) == phrases[bounds[p] + j]:
          j += 1
        if j == length:
          return True
  return False


@numba.njit(cache=True)
def _small(b):
  return b + 32 if 65 <= b <= 90 else b


@numba.njit(cache=True)
def sentences_and_phrases(data, offsets, rows, classes, phrases, bounds):
  """(int64 [rows]: sentences, bool [rows]: whether one of the phrases is in it)"""
  sentences, has_phrase = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    has_phrase[r] = _has_phrase(text, 0, len(text), phrases, bounds)
    i, stopped = 0, False
    while i < len(text):
      code, i = decode(text, i)
      kind = classes[code]
      if kind & SPACE:
        sentences[r] += stopped
        stopped = False
      else:
        stopped = bool(kind & STOP or stopped and kind & CLOSER)
    sentences[r] += stopped
  return sentences, has_phrase


@numba.njit(cache=True)
def repetition(data, offsets, rows, classes):
  """float64 [rows, 13]: the shares, in the order of the fields."""
  found = np.zeros((len(rows), 13))
  hashes, words, lines = tables(data, offsets, rows)
  n = len(hashes)
  slots, firsts, counts = np.empty(4 * n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
  ids, where, keys = np.empty(n + 1, np.int32), np.empty(n, np.int32), np.empty(n, np.uint64)
  ends = np.empty(n + 1, np.int64)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan(text, classes, hashes, words, lines)
    if n_words:
      _lines(found[r], text, lines, n_lines, slots, firsts, counts)
      _n_grams(found[r], hashes, words, n_words, slots, firsts, counts, ids, where, keys, ends)
  return found


@numba.njit(cache=True)
def _lines(found, text, lines, n_lines, slots, firsts, counts):
  keys, characters = line_keys(text, lines, n_lines), lines[LINE_CHARACTERS, :n_lines].astype(np.int64)
  paragraph_keys, paragraph_characters = np.empty(n_lines, np.uint64), np.empty(n_lines, np.int64)
  n = 0
  for k in range(n_lines):
    if not k or lines[LINE_PARAGRAPH, k] != lines[LINE_PARAGRAPH, k - 1]:
      paragraph_keys[n] = paragraph_characters[n] = 0
      n += 1
    paragraph_keys[n - 1] = mixed(paragraph_keys[n - 1] + keys[k])
    paragraph_characters[n - 1] += characters[k]
  found[0], found[2] = _repeated(keys, characters, n_lines, slots, firsts, counts)
  found[1], found[3] = _repeated(paragraph_keys, paragraph_characters, n, slots, firsts, counts)


@numba.njit(cache=True)
def _repeated(keys, characters, n, slots, firsts, counts):
  """Share of the n things that are there for the second time or more, and of characters in them."""
  first_of(keys, n, slots, firsts, counts)
  things = repeated = total = 0
  for k in range(n):
    things += firsts[k] != k
    repeated += characters[k] * (firsts[k] != k)
    total += characters[k]
  return things / n, repeated / total


@numba.njit(cache=True)
def _n_grams(found, hashes, words, n_words, slots, firsts, counts, ids, where, keys, ends):
  """An n-gram that is there twice begins and ends with (n-1)-grams that are there twice: only these are looked at.

  ids[i]: where the n-gram at word i was first; -1 if it is there but once. where: the words at which it is not.
  """
  ends[0] = 0
  for i in range(n_words):
    ends[i + 1] = ends[i] + words[WORD_CHARACTERS, i]
    keys[i], where[i] = hashes[i], i
  ids[:n_words + 1] = -1
  left = n_words
  for n in range(1, 11):
    first_of(keys, left, slots, firsts, counts)
    for k in range(left):
      ids[where[k]] = where[firsts[k]] if counts[firsts[k]] > 1 else -1
    if 2 <= n < 5:
      found[2 + n] = _top(n, where, left, firsts, counts, ends) / ends[n_words]
    elif n >= 5:
      found[2 + n] = _covered(n, where, left, firsts, ends) / ends[n_words]
    kept, candidates = 0, counts  # whose memory is free now
    for k in range(left):
      i = where[k]
      if ids[i] >= 0 and ids[i + 1] >= 0:
        keys[kept], candidates[kept] = np.uint64(ids[i]) << np.uint64(32) | np.uint64(ids[i + 1]), i
        kept += 1
    for k in range(left):
      ids[where[k]] = -1
    where[:kept] = candidates[:kept]
    left = kept


@numba.njit(cache=True)
def _top(n, where, left, firsts, counts, ends):
  """Characters in the most frequent n-gram (of equally frequent ones, in the longest)."""
  characters = np.zeros(left, np.int64)
  best = best_count = 0
  for k in range(left):
    first = firsts[k]
    characters[first] += ends[where[k] + n] - ends[where[k]]
  for k in range(left):
    if firsts[k] == k and counts[k] > 1 and (counts[k] > best_count or counts[k] == best_count and characters[k] > best):
      best, best_count = characters[k], counts[k]
  return best


@numba.njit(cache=True)
def _covered(n, where, left, firsts, ends):
  """Characters in n-grams that were there before."""
  covered, reached = 0, 0
  for k in range(left):
    if firsts[k] != k:
      covered += ends[where[k] + n] - ends[max(where[k], reached)]
      reached = where[k] + n
  return covered


@numba.njit(cache=True)
def features(text, classes, hashes, words, lines, most, mask, out):
  """Fills `out` with the hashes, under the mask, of the first words and pairs of words; returns how many there are."""
  n_words, _ = scan(text, classes, hashes, words, lines)
  n = min(n_words, most)
  for i in range(n):
    out[i] = hashes[i] & mask
  for i in range(n - 1):
    out[n + i] = mixed(hashes[i] * np.uint64(0x9e3779b97f4a7c15) + hashes[i + 1]) & mask
  return max(2 * n - 1, 0)


@numba.njit(cache=True)
def score(data, offsets, rows, classes, weights, bias, most):
  """float64 [rows]: log odds: the bias and the mean weight of the features."""
  scores = np.empty(len(rows))
  hashes, words, lines = tables(data, offsets, rows)
  found, mask = np.empty(2 * most, np.uint32), np.uint64(len(weights) - 1)
  for r in range(len(rows)):
    n = features(data[offsets[rows[r]]:offsets[rows[r] + 1]], classes, hashes, words, lines, most, mask, found)
    total = 0.0
    for i in range(n):
      total += weights[found[i]]
    scores[r] = bias + total / max(n, 1)
  return scores
