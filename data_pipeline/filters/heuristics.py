"""Rules of thumb for web text: of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A), C4 (Raffel et al. 2020,
arXiv:1910.10683, section 2.2) and FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.6), with the authors' limits.

What a word, a line and a paragraph is, `kernels` says. Shares of lines are of lines that are not blank.
"""

import dataclasses
from typing import ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.filters import kernels
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
    stop_words = np.array([kernels.hash_of_word(word) for word in self.stop_words], np.uint64)
    words, characters, hashes, ellipses, bullet_lines, ellipsis_lines, alphabetic, stops = kernels.quality(
      texts.data, texts.offsets, rows, kernels.classes(), stop_words).T
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


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class GopherRepetition(Rule):
  """Documents that repeat themselves. Limits are shares: of lines or paragraphs that repeat an earlier one, of
  characters in them, and of the characters of all words in the most frequent n-gram of words (top) or in n-grams that were
  there before (duplicate; each character once)."""

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
    shares = kernels.repetition(texts.data, texts.offsets, rows, kernels.classes())
    limits = {'lines': self.max_duplicate_lines, 'paragraphs': self.max_duplicate_paragraphs,
              'characters in lines': self.max_duplicate_line_characters,
              'characters in paragraphs': self.max_duplicate_paragraph_characters,
              '2-gram': self.max_top_2_gram, '3-gram': self.max_top_3_gram, '4-gram': self.max_top_4_gram,
              '5-grams': self.max_duplicate_5_grams, '6-grams': self.max_duplicate_6_grams,
              '7-grams': self.max_duplicate_7_grams, '8-grams': self.max_duplicate_8_grams,
              '9-grams': self.max_duplicate_9_grams, '10-grams': self.max_duplicate_10_grams}
    return Found(first_reason(len(rows), *((f'repetition: {what}', above(shares[:, i], limit))
                                           for i, (what, limit) in enumerate(limits.items()))))


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
    punctuated, short, duplicates, lines = kernels.line_shares(
      texts.data, texts.offsets, rows, kernels.classes(), kernels.codes(self.stops), self.short_line).T
    at_most = lambda values, limit: ~above(values, limit) & (limit is not None)
    at_least = lambda values, limit: ~below(values, limit) & (limit is not None)
    return Found(first_reason(
      len(rows), ('fineweb: few lines end in punctuation', at_most(punctuated, self.min_punctuated_lines)),
      ('fineweb: short lines', at_least(short, self.max_short_lines)),
      ('fineweb: duplicate lines', at_least(duplicates, self.max_duplicate_characters)),
      ('fineweb: many lines', above(lines, self.max_lines_a_word))))


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
    cuts = kernels.line_cuts(texts.data, texts.offsets, rows, kernels.classes(), kernels.codes(self.terminal),
                             self.min_words, self.max_word_length, *_packed(self.phrases))
    edits = {}
    for i, start, end, _ in cuts.tolist():
      edits.setdefault(i, []).append((start, end, ''))
    return Found(edits=edits, facts={'c4: lines cut': int(cuts[:, 3].sum()),
                                     'c4: bytes cut': int((cuts[:, 2] - cuts[:, 1]).sum())})


def _packed(phrases: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Their bytes, one after the other, and where each begins (and the last ends)."""
  phrases = [phrase.lower().encode() for phrase in phrases]
  return np.frombuffer(b''.join(phrases), np.uint8), np.cumsum([0, *map(len, phrases)])


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class C4Pages(Rule):
  """Documents with few sentences, after C4Lines, or with a phrase that real text does not have.

  A sentence ends in full stops, question or exclamation marks, perhaps quotation marks and brackets after them, and white
  space or the end of the text. '{' among the phrases is for a corpus that is to have no code.
  """

  min_sentences: int = 5
  phrases: tuple[str, ...] = ('lorem ipsum', '{')

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    sentences, has_phrase = kernels.sentences_and_phrases(
      texts.data, texts.offsets, rows, kernels.classes(), *_packed(self.phrases))
    return Found(first_reason(len(rows), ('c4: forbidden phrase', has_phrase),
                              ('c4: few sentences', below(sentences, self.min_sentences))))


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
