"""The step that judges documents one by one, by rules. Cheap rules first: each sees only what those before it have kept.

    Filters(rules=(Urls(), Language(keep=('en',)), GopherRepetition(), GopherQuality(), C4Lines(), FineWeb(), Redact()))

A rule that cuts or replaces changes what the rules after it see, and what is trained on; the text on disk stays.
docs/data.md lists the rules.
"""

import collections
import dataclasses
import pathlib
import sys
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import shards, verdicts
from data_pipeline.filters import kernels


@dataclasses.dataclass(frozen=True, slots=True)
class Texts:
  """Documents: the utf-8 text of document i is data[offsets[i]:offsets[i + 1]]."""

  data: np.ndarray  # uint8
  offsets: np.ndarray  # int64 [documents + 1]
  urls: list[str]

  def bytes(self, i: int) -> bytes:
    return self.data[self.offsets[i]:self.offsets[i + 1]].tobytes()

  @staticmethod
  def of(texts: list[bytes], urls: list[str] | None = None) -> 'Texts':
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return Texts(np.frombuffer(b''.join(texts), np.uint8), offsets, urls or [''] * len(texts))


@dataclasses.dataclass(slots=True)
class Found:
  """What a rule says of the n documents that it was shown, in their order."""

  reasons: np.ndarray | None = None  # object [n]: why each is left out, '' where it is not. None: all are kept
  edits: dict[int, list[tuple[int, int, str]]] = dataclasses.field(default_factory=dict)  # of the i-th: (start, end, text)
  columns: dict[str, list] = dataclasses.field(default_factory=dict)  # [n] each
  facts: dict[str, int | dict] = dataclasses.field(default_factory=dict)  # added up over batches and shards


class Rule:
  """A frozen dataclass whose fields are what a recipe may set; None for a limit: this one is not applied."""

  columns: ClassVar[dict[str, pa.DataType]] = {}  # what it adds to the file of verdicts
  edits: ClassVar[bool] = False  # whether it cuts or replaces

  def state(self) -> str:
    """What decides besides the fields: hashes of files that it reads. ValueError where one cannot be read."""
    return ''

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    """Of the documents at these rows of `texts`, which are all that is left."""
    raise NotImplementedError


def first_reason(n: int, *conditions: tuple[str, np.ndarray]) -> np.ndarray:
  """object [n]: of (reason, bool [n]), the first that is true of each."""
  reasons = np.full(n, '', object)
  for reason, holds in reversed(conditions):
    reasons[holds] = reason
  return reasons


def below(values: np.ndarray, limit: float | None) -> np.ndarray:
  return np.zeros(len(values), bool) if limit is None else values < limit


def above(values: np.ndarray, limit: float | None) -> np.ndarray:
  return np.zeros(len(values), bool) if limit is None else values > limit


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Filters:
  rules: tuple[Rule, ...]
  name: str = 'filters'
  sources: tuple[str, ...] = ()  # whose documents are judged; (): all

  def state(self) -> str:
    if unknown := [rule for rule in self.rules if type(rule).__module__ not in sys.modules]:
      raise ValueError(f'step {self.name}: put the rule {type(unknown[0]).__name__} in a module that Python can import')
    modules = sorted({type(rule).__module__ for rule in self.rules} | {kernels.__name__, __name__, verdicts.__name__})
    return shards.key_of(shards.code_of(*(sys.modules[module] for module in modules)), [rule.state() for rule in self.rules])

  def judge(self, tasks, shards_: list[verdicts.Shard]) -> list[dict]:
    key = shards.key_of(shards.describe(self), self.state())
    return tasks.run(self.name, _judge_shard, [
      (f'{self.name}-{i:05d}', shards.key_of(key, shard.documents, shard.hashes), self, shard)
      for i, shard in enumerate(shards_)])


def _judge_shard(root: pathlib.Path, record_name: str, key: str, step: Filters, shard: verdicts.Shard) -> dict:
  rejected, facts = {}, {}
  types = {name: type_ for rule in step.rules for name, type_ in rule.columns.items()}
  columns = {name: np.full(shard.rows, '' if type_ == pa.string() else None, object) for name, type_ in types.items()}
  edits = np.full(shard.rows, None, object)
  earlier = [pq.read_table(root / path, columns=['edits'])['edits'] for path in shard.verdicts
             if 'edits' in pq.read_schema(root / path).names]
  for rows, batch in verdicts.kept(root, shard, ['text', 'url']):
    view = _View(batch, [column.take(pa.array(rows)).to_pylist() for column in earlier])
    alive = np.arange(len(rows))
    for rule in step.rules:
      found = rule.judge(view.texts, alive)
      verdicts.add_up(facts, found.facts)
      for name, values in found.columns.items():
        columns[name][rows[alive]] = values
      view.edit({int(alive[i]): some for i, some in found.edits.items()})
      if found.reasons is not None:
        gone = found.reasons != ''
        rejected |= zip(rows[alive[gone]].tolist(), found.reasons[gone].tolist())
        alive = alive[~gone]
      if not len(alive):
        break
    for i, some in view.edits.items():
      edits[rows[i]] = some
  arrays = {name: pa.array(values, types[name]) for name, values in columns.items()}
  if any(rule.edits for rule in step.rules):
    arrays['edits'] = pa.array(edits, verdicts.EDITS)
  return verdicts.write(root, record_name, key, step.name, shard, rejected, arrays, **facts)


class _View:
  """A batch as its next reader is to see it, and how its bytes lie in the text on disk.

  texts: with all edits so far. edits: {document: those of this step, in bytes of the text on disk}.
  """

  def __init__(self, batch: pa.RecordBatch, earlier: list[list]):
    text = batch['text']
    _, offsets, data = text.buffers()
    wide = np.int64 if text.type == pa.large_string() else np.int32
    offsets = np.frombuffer(offsets, wide)[text.offset:text.offset + len(text) + 1].astype(np.int64)
    self.texts = Texts(np.frombuffer(data or b'', np.uint8), offsets, batch['url'].to_pylist())
    self._origins, self.edits = {}, {}  # document -> int64 [bytes + 1]: where each byte is on disk
    of_document = [[one for some in of_steps for one in some or ()] for of_steps in zip(*earlier)]
    self.edit({i: [(one['start'], one['end'], one['text']) for one in some] for i, some in enumerate(of_document) if some})
    self.edits = {}

  def edit(self, edits: dict[int, list[tuple[int, int, str]]]) -> None:
    """edits: {document: (start, end, text)}, in bytes of the document as it is seen now."""
    if not edits:
      return
    texts = list(map(self.texts.bytes, range(len(self.texts.urls))))
    for i, some in edits.items():
      origin = self._origins.get(i, np.arange(len(texts[i]) + 1))
      for start, end, text in some:
        new = {'start': int(origin[start]), 'end': int(origin[end]), 'text': text}
        others = [one for one in self.edits.get(i, ()) if not new['start'] <= one['start'] <= one['end'] <= new['end']]
        self.edits[i] = sorted([*others, new], key=lambda one: one['start'])
      pieces, origins, at = [], [], 0
      for start, end, text in sorted(some):
        if start >= at:
          pieces += [texts[i][at:start], text.encode()]
          origins += [origin[at:start], np.full(len(pieces[-1]), origin[start])]
        at = max(at, end)
      texts[i] = b''.join([*pieces, texts[i][at:]])
      self._origins[i] = np.concatenate([*origins, origin[at:]])
    self.texts = Texts.of(texts, self.texts.urls)


def hash_of(path: str) -> str:
  """Of a file that a rule reads. ValueError where it cannot be read."""
  try:
    return shards.hash_file(pathlib.Path(path))
  except OSError as error:
    raise ValueError(f'{path}, which a filter needs, cannot be read: {error.strerror}') from error


def count(values) -> dict:
  return dict(sorted(collections.Counter(values).items()))
