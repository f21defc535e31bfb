"""Rules of thumb for web text: of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A), C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2) and FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6), with the authors' limits.

What a word, a line and a paragraph is, `scan` says. Shares of lines are of lines that are not blank. GopherRepetition is in
repetition.py.
"""

import dataclasses
from typing import ClassVar

import numba
import numpy as np
import pyarrow as pa

from data_pipeline.filters import scan
from data_pipeline.filters.scan import BULLET, CLOSER, SPACE, STOP, WORD_ALPHA, WORD_CHARACTERS
from data_pipeline.filters.step import Found, Rule, Texts, above, below, first_reason


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class GopherQuality(Rule):
  """Documents that are hardly prose. The limits are those of the paper's table; for another language give its stop words."""

  min_words: int | None = 50
  max_words: int | None = 100_000
  min_mean_word_length: float | None = 3.0  # in characters
  max_mean_word_length: float | None = 10.0
  max_hashes: float | None = 0.1  # '#', a word
  max_ellipses: float | None = 0.1  # '...' and '…', a word
  max_bullet_lines: float | None = 0.9  # share of lines that begin with one
  max_ellipsis_lines: float | None = 0.3  # share of lines that end with one
  min_alphabetic_words: float | None = 0.8  # share of words with at least one letter
  min_stop_words: int | None = 2  # different ones
  stop_words: tuple[str, ...] = ('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with')

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    stop_words = np.array([scan.hash_of_word(word) for word in self.stop_words], np.uint64)
    words, characters, hashes, ellipses, bullet_lines, ellipsis_lines, alphabetic, stops = quality(
      texts.data, texts.offsets, rows, scan.classes(), stop_words).T
    return Found(first_reason(
      len(rows),
      ('gopher: few words', below(words, self.min_words)), ('gopher: many words', above(words, self.max_words)),
      ('gopher: short words', below(characters, self.min_mean_word_length)),
      ('gopher: long words', above(characters, self.max_mean_word_length)),
      ('gopher: hashes', above(hashes, self.max_hashes)), ('gopher: ellipses', above(ellipses, self.max_ellipses)),
      ('gopher: bullet lines', above(bullet_lines, self.max_bullet_lines)),
      ('gopher: ellipsis lines', above(ellipsis_lines, self.max_ellipsis_lines)),
      ('gopher: few letters', below(alphabetic, self.min_alphabetic_words)),
      ('gopher: few stop words', below(stops, self.min_stop_words))))


@numba.njit(cache=True)
def quality(data, offsets, rows, classes, stop_words):
  """float64 [rows, 8]: words, characters a word, '#' a word, ellipses a word, shares of lines with a bullet and with an
  ellipsis at the end, share of words with a letter, number of different stop words."""
  found = np.zeros((len(rows), 8))
  hashes, words, lines = scan.tables(scan.most_words(data, offsets, rows))
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan.scan(text, classes, hashes, words, lines)
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
      bullets += classes[scan.decode(text, lines[scan.LINE_START, k])[0]] & BULLET != 0
      ends += lines[scan.LINE_END, k] - lines[scan.LINE_START, k] >= 3 and _is_ellipsis(text, lines[scan.LINE_END, k] - 3)
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


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class FineWeb(Rule):
  """Lists, navigation, text broken at random. The paper gives 0.1 for duplicate lines, its program uses 0.01."""

  min_punctuated_lines: float | None = 0.12  # share of lines that end in one of `stops`; it has to be more
  stops: str = '.\'"!?'
  max_short_lines: float | None = 0.67  # share of lines of at most `short_line` characters; it has to be less
  short_line: int = 30
  max_duplicate_characters: float | None = 0.1  # share of characters in lines that repeat an earlier one; it has to be less
  max_lines_a_word: float | None = 0.3

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    punctuated, short, duplicates, lines = line_shares(
      texts.data, texts.offsets, rows, scan.classes(), scan.codes(self.stops), self.short_line).T
    at_most = lambda values, limit: ~above(values, limit) & (limit is not None)
    at_least = lambda values, limit: ~below(values, limit) & (limit is not None)
    return Found(first_reason(
      len(rows), ('fineweb: few lines end in punctuation', at_most(punctuated, self.min_punctuated_lines)),
      ('fineweb: short lines', at_least(short, self.max_short_lines)),
      ('fineweb: duplicate lines', at_least(duplicates, self.max_duplicate_characters)),
      ('fineweb: many lines', above(lines, self.max_lines_a_word))))


@numba.njit(cache=True)
def line_shares(data, offsets, rows, classes, stops, short_line):
  """float64 [rows, 4]: shares of lines that end in a character of `stops` and that are short, share of characters in lines
  that were there before, lines a word."""
  found = np.zeros((len(rows), 4))
  hashes, words, lines = scan.tables(scan.most_words(data, offsets, rows))
  n = len(hashes)
  slots, firsts, counts = np.empty(4 * n, np.int32), np.empty(n, np.int32), np.empty(n, np.int32)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    n_words, n_lines = scan.scan(text, classes, hashes, words, lines)
    if not n_words:
      continue
    keys = line_keys(text, lines, n_lines)
    scan.first_of(keys, n_lines, slots, firsts, counts)
    punctuated, short, repeated, characters = 0, 0, 0, 0
    for k in range(n_lines):
      length = lines[scan.LINE_CHARACTERS, k]
      punctuated += _ends_in(text, lines[scan.LINE_END, k], stops)
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
    keys[k] = scan.hash_bytes(text, lines[scan.LINE_START, k], lines[scan.LINE_END, k])
  return keys


@numba.njit(cache=True)
def _ends_in(text, end, stops):
  last = scan.last_character(text, end)
  for stop in stops:
    if last == stop:
      return True
  return False


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class C4Lines(Rule):
  """Cuts lines that are no sentences: of menus, notices, scripts. FineWeb leaves `terminal` empty, which keeps headings."""

  edits: ClassVar[bool] = True
  terminal: str = '.?!"\''  # a line ends in one of these, and not in '...'; '' for any end
  min_words: int = 3
  max_word_length: int = 1000
  phrases: tuple[str, ...] = ('javascript', 'terms of use', 'privacy policy', 'cookie policy', 'uses cookies',
                              'use of cookies', 'use cookies')  # a line with one of them, in whatever case, goes

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    cuts = line_cuts(texts.data, texts.offsets, rows, scan.classes(), scan.codes(self.terminal), self.min_words,
                     self.max_word_length, *_packed(self.phrases))
    edits = {}
    for i, start, end, _ in cuts.tolist():
      edits.setdefault(i, []).append((start, end, ''))
    return Found(edits=edits, facts={'c4: lines cut': int(cuts[:, 3].sum()),
                                     'c4: bytes cut': int((cuts[:, 2] - cuts[:, 1]).sum())})


def _packed(phrases: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Their bytes, one after the other, and where each begins (and the last ends)."""
  phrases = [phrase.lower().encode() for phrase in phrases]
  return np.frombuffer(b''.join(phrases), np.uint8), np.cumsum([0, *map(len, phrases)])


@numba.njit(cache=True)
def line_cuts(data, offsets, rows, classes, terminal, min_words, max_word_length, phrases, bounds):
  """int64 [cuts, 4]: (index in rows, start, end, lines), in bytes of the document. Neighbouring lines are one cut, and the
  lines that stay have at most as many blank ones between them as before."""
  cuts = [(0, 0, 0, 0) for _ in range(0)]
  hashes, words, lines = scan.tables(scan.most_words(data, offsets, rows))
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    _, n_lines = scan.scan(text, classes, hashes, words, lines)
    k = 0
    while k < n_lines:
      first = k
      while k < n_lines and _is_cut(text, lines, k, terminal, min_words, max_word_length, phrases, bounds):
        k += 1
      if k > first:
        start, end = lines[scan.LINE_BEGIN, first], lines[scan.LINE_STOP, k - 1]
        if k == n_lines:
          start, end = lines[scan.LINE_STOP, first - 1] if first else 0, len(text)
        elif first and lines[scan.LINE_PARAGRAPH, first] == lines[scan.LINE_PARAGRAPH, first - 1]:
          end += 1
        else:
          end = lines[scan.LINE_BEGIN, k]
        cuts.append((r, start, end, k - first))
      k += 1
  return np.array(cuts, np.int64).reshape(-1, 4) if cuts else np.empty((0, 4), np.int64)


@numba.njit(cache=True)
def _is_cut(text, lines, k, terminal, min_words, max_word_length, phrases, bounds):
  start, end = lines[scan.LINE_START, k], lines[scan.LINE_END, k]
  if lines[scan.LINE_WORDS, k] < min_words or lines[scan.LINE_LONGEST, k] > max_word_length:
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


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class C4Pages(Rule):
  """Documents with few sentences, after C4Lines, or with a phrase that real text does not have.

  A sentence ends in full stops, question or exclamation marks, perhaps quotation marks and brackets after them, and white
  space or the end of the text. '{' among the phrases is for a corpus that is to have no code.
  """

  min_sentences: int = 5
  phrases: tuple[str, ...] = ('lorem ipsum', '{')

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    sentences, has_phrase = sentences_and_phrases(texts.data, texts.offsets, rows, scan.classes(), *_packed(self.phrases))
    return Found(first_reason(len(rows), ('c4: forbidden phrase', has_phrase),
                              ('c4: few sentences', below(sentences, self.min_sentences))))


@numba.njit(cache=True)
def sentences_and_phrases(data, offsets, rows, classes, phrases, bounds):
  """(int64 [rows]: sentences, bool [rows]: whether one of the phrases is in it)"""
  sentences, has_phrase = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.bool_)
  for r in range(len(rows)):
    text = data[offsets[rows[r]]:offsets[rows[r] + 1]]
    has_phrase[r] = _has_phrase(text, 0, len(text), phrases, bounds)
    i, stopped = 0, False
    while i < len(text):
      code, i = scan.decode(text, i)
      kind = classes[code]
      if kind & SPACE:
        sentences[r] += stopped
        stopped = False
      else:
        stopped = bool(kind & STOP or stopped and kind & CLOSER)
    sentences[r] += stopped
  return sentences, has_phrase


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Compression(Rule):
  """Long documents that are degenerate: zstd makes too little of them (repetition, tables) or too much (noise, base64)."""

  min_ratio: float | None = 0.12  # compressed bytes a byte
  max_ratio: float | None = 0.75
  min_bytes: int = 8192  # shorter ones are not judged: they compress less
  columns: ClassVar[dict[str, pa.DataType]] = {'compression': pa.float32()}

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    codec, ratios = pa.Codec('zstd', compression_level=3), np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
      size = texts.offsets[row + 1] - texts.offsets[row]
      if size >= max(self.min_bytes, 1):
        text = texts.data[texts.offsets[row]:texts.offsets[row + 1]]
        ratios[i] = codec.compress(pa.py_buffer(text), asbytes=False).size / size
    reasons = first_reason(len(rows), ('compression: repetitive', below(ratios, self.min_ratio)),
                           ('compression: noise', above(ratios, self.max_ratio)))
    return Found(reasons, columns={'compression': ratios})
