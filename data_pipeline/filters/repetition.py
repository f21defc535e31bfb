"""Documents that repeat themselves: lines, paragraphs, and runs of words (Rae et al. 2021, arXiv:2112.11446, table A1)."""

import dataclasses

import numba
import numpy as np

from data_pipeline.filters import scan
from data_pipeline.filters.heuristics import line_keys
from data_pipeline.filters.scan import WORD_CHARACTERS
from data_pipeline.filters.step import Found, Rule, Texts, above, first_reason

TOP, DUPLICATE = 2, 5  # least lengths of n-grams of each kind


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class GopherRepetition(Rule):
  """Limits are shares: of lines or paragraphs that repeat an earlier one, of characters in them, and of the characters of
  all words in the most frequent n-gram (top) or in n-grams that were there before (duplicate; each character once)."""

  max_duplicate_lines: float | None = 0.3
  max_duplicate_paragraphs: float | None = 0.3
  max_duplicate_line_characters: float | None = 0.2
  max_duplicate_paragraph_characters: float | None = 0.2
  max_top_2_gram: float | None = 0.2
  max_top_3_gram: float | None = 0.18
  max_top_4_gram: float | None = 0.16
  max_duplicate_5_grams: float | None = 0.15
  max_duplicate_6_grams: float | None = 0.14
  max_duplicate_7_grams: float | None = 0.13
  max_duplicate_8_grams: float | None = 0.12
  max_duplicate_9_grams: float | None = 0.11
  max_duplicate_10_grams: float | None = 0.1

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    shares = repetition(texts.data, texts.offsets, rows, scan.classes())
    limits = {'lines': self.max_duplicate_lines, 'paragraphs': self.max_duplicate_paragraphs,
              'characters in lines': self.max_duplicate_line_characters,
              'characters in paragraphs': self.max_duplicate_paragraph_characters,
              '2-gram': self.max_top_2_gram, '3-gram': self.max_top_3_gram, '4-gram': self.max_top_4_gram,
              '5-grams': self.max_duplicate_5_grams, '6-grams': self.max_duplicate_6_grams,
              '7-grams': self.max_duplicate_7_grams, '8-grams': self.max_duplicate_8_grams,
              '9-grams': self.max_duplicate_9_grams, '10-grams': self.max_duplicate_10_grams}
    return Found(first_reason(len(rows), *((f'repetition: {what}', above(shares[:, i], limit))
                                           for i, (what, limit) in enumerate(limits.items()))))


@numba.njit(cache=True)
def repetition(data, offsets, rows, classes):
  """float64 [rows, 13]: the shares, in the order of the fields."""
  found = np.zeros((len(rows), 13))
  hashes, words, lines = scan.tables(scan.most_words(data, offsets, rows))
  n = len(hashes)
  slots, firsts, counts = np.empty(4 * n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
  ids, where, keys = np.empty(n + 1, np.int32), np.empty(n, np.int32), np.empty(n, np.uint64)
  ends = np.empty(n + 1, np.int64)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan.scan(text, classes, hashes, words, lines)
    if n_words:
      _lines(found[r], text, lines, n_lines, slots, firsts, counts)
      _n_grams(found[r], hashes, words, n_words, slots, firsts, counts, ids, where, keys, ends)
  return found


@numba.njit(cache=True)
def _lines(found, text, lines, n_lines, slots, firsts, counts):
  keys, characters = line_keys(text, lines, n_lines), lines[scan.LINE_CHARACTERS, :n_lines].astype(np.int64)
  paragraph_keys, paragraph_characters = np.empty(n_lines, np.uint64), np.empty(n_lines, np.int64)
  n = 0
  for k in range(n_lines):
    if not k or lines[scan.LINE_PARAGRAPH, k] != lines[scan.LINE_PARAGRAPH, k - 1]:
      paragraph_keys[n] = paragraph_characters[n] = 0
      n += 1
    paragraph_keys[n - 1] = scan.mixed(paragraph_keys[n - 1] + keys[k])
    paragraph_characters[n - 1] += characters[k]
  found[0], found[2] = _repeated(keys, characters, n_lines, slots, firsts, counts)
  found[1], found[3] = _repeated(paragraph_keys, paragraph_characters, n, slots, firsts, counts)


@numba.njit(cache=True)
def _repeated(keys, characters, n, slots, firsts, counts):
  """Share of the n things that are there for the second time or more, and of characters in them."""
  scan.first_of(keys, n, slots, firsts, counts)
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
    scan.first_of(keys, left, slots, firsts, counts)
    for k in range(left):
      ids[where[k]] = where[firsts[k]] if counts[firsts[k]] > 1 else -1
    if TOP <= n < DUPLICATE:
      found[2 + n] = _top(n, where, left, firsts, counts, ends) / ends[n_words]
    elif n >= DUPLICATE:
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
