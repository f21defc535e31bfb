"""What the rules of data_pipeline/filters count, in plain Python over str: slow, and easy to read."""

import collections
import itertools
import re
import unicodedata

from data_pipeline.filters import kernels, pii


def words(text: str) -> list[str]:
  return text.split()


def compared(word: str) -> str:
  """A word as it is compared with others."""
  is_punctuation = lambda c: unicodedata.category(c)[0] in 'PS'
  core = list(word)
  while core and is_punctuation(core[0]):
    core.pop(0)
  while core and is_punctuation(core[-1]):
    core.pop()
  return small(''.join(core) or word)


def small(text: str) -> str:
  return ''.join(c.lower() if c.isascii() else c for c in text)


def lines(text: str) -> list[str]:
  return [line.strip() for line in text.split('\n') if line.strip()]


def paragraphs(text: str) -> list[tuple[str, ...]]:
  groups = itertools.groupby(text.split('\n'), key=lambda line: bool(line.strip()))
  return [tuple(line.strip() for line in group) for is_text, group in groups if is_text]


def quality(text: str, stop_words) -> list[float]:
  found = words(text)
  if not found:
    return [0.0] * 8
  n, n_lines = len(found), len(lines(text))
  return [n, sum(map(len, found)) / n, text.count('#') / n, len(re.findall(r'\.\.\.|…', text)) / n,
          sum(line[0] in kernels.BULLETS for line in lines(text)) / n_lines,
          sum(line.endswith(('...', '…')) for line in lines(text)) / n_lines,
          sum(any(c.isalpha() for c in word) for word in found) / n,
          len({compared(word) for word in found} & set(stop_words))]


def line_shares(text: str, stops: str, short_line: int) -> list[float]:
  found = lines(text)
  if not found:
    return [0.0] * 4
  return [sum(line[-1] in stops for line in found) / len(found), sum(len(line) <= short_line for line in found) / len(found),
          repeated([(small(line), len(line)) for line in found])[1], len(found) / len(words(text))]


def repeated(things: list[tuple]) -> tuple[float, float]:
  """(key, characters) -> share of those whose key was there before, and of their characters."""
  seen, n, characters = set(), 0, 0
  for key, length in things:
    n, characters = n + (key in seen), characters + length * (key in seen)
    seen.add(key)
  return n / len(things), characters / sum(length for _, length in things)


def repetition(text: str) -> list[float]:
  found = words(text)
  if not found:
    return [0.0] * 13
  of_lines = repeated([(small(line), len(line)) for line in lines(text)])
  of_paragraphs = repeated([(tuple(map(small, one)), sum(map(len, one))) for one in paragraphs(text)])
  shares, total, cores = [], sum(map(len, found)), list(map(compared, found))
  for n in range(2, 11):
    places = collections.defaultdict(list)
    for i in range(len(found) - n + 1):
      places[tuple(cores[i:i + n])].append(i)
    more = [some for some in places.values() if len(some) > 1]
    length_of = lambda i: sum(map(len, found[i:i + n]))
    if n < 5:
      shares.append(max([(len(some), sum(map(length_of, some))) for some in more], default=(0, 0))[1] / total)
    else:
      covered = {k for some in more for i in some[1:] for k in range(i, i + n)}
      shares.append(sum(len(found[k]) for k in covered) / total)
  return [of_lines[0], of_paragraphs[0], of_lines[1], of_paragraphs[1], *shares]


def cut_lines(text: str, terminal: str, min_words: int, max_word_length: int, phrases) -> str:
  """The text without its bad lines; of the blank lines around them those before are kept, or where there are none those
  after."""
  def is_bad(line):
    line, found = line.strip(), line.split()
    return (len(found) < min_words or max(map(len, found)) > max_word_length
            or bool(terminal) and (line[-1] not in terminal or line.endswith(('...', '…')))
            or any(phrase in small(line) for phrase in phrases))

  kept, blank, before = [], [], []
  after_bad, adjacent = False, False
  for line in text.split('\n'):
    if not line.strip():
      blank.append(line)
    elif is_bad(line):
      if not after_bad:
        adjacent, before = bool(kept) and not blank, blank
      after_bad, blank = True, []
    else:
      kept += (blank if adjacent else before) if after_bad else blank
      kept.append(line)
      after_bad, blank = False, []
  return '\n'.join(kept if after_bad else kept + blank)


def sentences(text: str) -> int:
  return len(re.findall(rf'[{kernels.STOPS}][{kernels.STOPS}{re.escape(kernels.CLOSERS)}]*(?=\s|$)', text))


def redacted(text: str, kinds=pii.KINDS) -> str:
  """All forms looked for in all of the text."""
  found, taken = [], []
  for finder in (pii._emails, pii._numbers, pii._addresses, pii._accounts):
    found += [(kinds.index(kind), start, end) for kind, start, end in finder(text) if kind in kinds]
  for kind, start, end in sorted(found):
    if all(end <= other or start >= other_end for other, other_end, _ in taken):
      taken.append((start, end, f'[{kinds[kind]}]'))
  for start, end, placeholder in sorted(taken, reverse=True):
    text = text[:start] + placeholder + text[end:]
  return text
