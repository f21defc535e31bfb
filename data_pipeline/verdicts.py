"""What the steps of a recipe say of documents: a file of verdicts beside each shard of documents, a row each, same order.

    verdicts/<step>/<source>/00000-of-00001.parquet
      reason    why the document is left out, by this step or one before; '' while it is kept
      edits     optional: what is cut out of its text or replaced, [{start, end, text}], in bytes of utf-8, ascending
      …         whatever else the step found: language, score, the id of the document it repeats

Text is written once. A step writes verdicts, and a new step rewrites no text.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import shards

EDITS = pa.list_(pa.struct([('start', pa.int32()), ('end', pa.int32()), ('text', pa.string())]))
_SAMPLES, _SAMPLE_CHARACTERS = 3, 300  # of what is left out, for each reason and shard
_ROWS_A_BATCH = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
  """A shard of documents and what has been said of it. Small: it travels to workers."""

  source: str
  documents: str  # path in the corpus: documents/<source>/00000-of-00001.parquet
  rows: int
  hashes: tuple[str, ...]  # of the documents' file and of each file of verdicts: they are the key of what is made from it
  verdicts: tuple[str, ...] = ()  # paths of files of verdicts, one a step, in order

  def judged(self, record: dict) -> 'Shard':
    """The shard after the step that wrote this record."""
    file, = record['files']
    return dataclasses.replace(self, hashes=(*self.hashes, file['xxh3']), verdicts=(*self.verdicts, file['path']))


def of_corpus(root: pathlib.Path, manifest: dict) -> list[Shard]:
  """The shards of a finished corpus, with what all steps have said of them."""
  hashes, said = {file['path']: file['xxh3'] for file in manifest['files']}, {}
  for path in hashes:  # in the order of the steps
    if path.startswith('verdicts/'):
      said.setdefault(path.split('/', 2)[2], []).append(path)
  return [Shard(source=path.split('/')[1], documents=path, rows=pq.read_metadata(root / path).num_rows, hashes=(digest,),
                verdicts=tuple(said.get(path.partition('/')[2], ())))
          for path, digest in hashes.items() if path.startswith('documents/')]


def reasons(root: pathlib.Path, shard: Shard) -> np.ndarray:
  """object [rows] of str: '' for each document that is kept so far."""
  if not shard.verdicts:
    return np.full(shard.rows, '', object)
  return pq.read_table(root / shard.verdicts[-1], columns=['reason'])['reason'].to_numpy(zero_copy_only=False)


def column(root: pathlib.Path, shard: Shard, step: str, name: str) -> pa.ChunkedArray:
  """What an earlier step found: [rows] of the column `name`. KeyError where no step of that name was run."""
  for path in shard.verdicts:
    if pathlib.PurePosixPath(path).parts[1] == step:
      return pq.read_table(root / path, columns=[name])[name]
  raise KeyError(step)


def kept(root: pathlib.Path, shard: Shard, columns: list[str]) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
  """(rows, columns of documents) of what is kept so far, in order and in batches; text as the source gave it."""
  alive, first = reasons(root, shard) == '', 0
  for batch in _batches(root / shard.documents, columns):
    rows, = np.nonzero(alive[first:first + len(batch)])
    if len(rows):
      yield rows + first, batch.take(pa.array(rows))
    first += len(batch)


def _batches(path: pathlib.Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
  """A group of rows at a time: these are bounded in bytes (`documents`), and batches over their ends would not be."""
  file = pq.ParquetFile(path)
  for group in range(file.num_row_groups):
    yield from file.iter_batches(_ROWS_A_BATCH, row_groups=[group], columns=columns)


def edited(root: pathlib.Path, shard: Shard) -> Iterator[tuple[np.ndarray, list[str]]]:
  """(rows, texts) of what is kept so far, with the edits of all steps applied."""
  files = [pq.ParquetFile(root / path) for path in shard.verdicts]
  columns = [file.read(['edits'])['edits'] for file in files if 'edits' in file.schema_arrow.names]
  for rows, batch in kept(root, shard, ['text']):
    edits = zip(*(column.take(pa.array(rows)).to_pylist() for column in columns)) if columns else [()] * len(rows)
    yield rows, [edit(text, [one for some in of_steps for one in some or ()])
                 for text, of_steps in zip(batch['text'].to_pylist(), edits)]


def edit(text: str, edits: list[dict]) -> str:
  """The text after all of these, which refer to the text as it was. Where two overlap, what either cuts is gone."""
  if not edits:
    return text
  data, pieces, end = text.encode(), [], 0
  for one in sorted(edits, key=lambda one: (one['start'], -one['end'])):
    if one['start'] >= end:
      pieces += [data[end:one['start']], one['text'].encode()]
    end = max(end, one['end'])
  return b''.join([*pieces, data[end:]]).decode()


def write(root: pathlib.Path, record_name: str, key: str, step: str, shard: Shard, rejected: Mapping[int, str],
          columns: Mapping[str, pa.Array] | None = None, **facts) -> dict:
  """Commits what a step says of a shard; returns the record. Called by the step's task, in a worker.

  rejected: row -> reason, of rows that were kept so far. columns: what else was found, [rows] each ('edits' as EDITS).
  facts: numbers for the report, added up over shards: {'languages': {'en': 12}}. The rest of the record is of `count`.
  """
  before, after = reasons(root, shard), reasons(root, shard).copy()
  for row, reason in rejected.items():
    assert before[row] == '' and reason
    after[row] = reason
  path = root / 'verdicts' / step / pathlib.PurePosixPath(shard.documents).relative_to('documents')
  with shards.committed(path) as temporary:
    pq.write_table(pa.table({'reason': pa.array(after, pa.string()), **(columns or {})}), temporary, compression='zstd')
  return shards.write_record(root, record_name, key, [shards.entry(root, path)], source=shard.source, step=step,
                             facts=facts, **count(root, shard, rejected))


def count(root: pathlib.Path, shard: Shard, rejected: Mapping[int, str]) -> dict:
  """For a record: documents and bytes that come in, and {removed: {reason: {documents, bytes, samples: [{url, text}]}}}."""
  sizes = pq.read_table(root / shard.documents, columns=['bytes'])['bytes'].to_numpy()
  removed, alive = {}, reasons(root, shard) == ''
  for row in sorted(rejected):
    of_reason = removed.setdefault(rejected[row], {'documents': 0, 'bytes': 0, 'samples': []})
    of_reason['documents'] += 1
    of_reason['bytes'] += int(sizes[row])
    if len(of_reason['samples']) < _SAMPLES:
      of_reason['samples'].append(row)
  _show(root / shard.documents, removed)
  return {'documents': int(alive.sum()), 'bytes': int(sizes[alive].sum()), 'removed': removed}


def _show(documents: pathlib.Path, removed: dict) -> None:
  """Rows of samples -> {url, text}."""
  wanted = sorted(row for of_reason in removed.values() for row in of_reason['samples'])
  shown, first = {}, 0
  for batch in _batches(documents, ['url', 'text']) if wanted else ():
    for row in wanted:
      if first <= row < first + len(batch):
        url, text = (batch[name][row - first].as_py() for name in ('url', 'text'))
        shown[row] = {'url': url, 'text': text[:_SAMPLE_CHARACTERS]}
    first += len(batch)
  for of_reason in removed.values():
    of_reason['samples'] = [shown[row] for row in of_reason['samples']]


def add_up(total: dict, more: dict) -> None:
  """Adds numbers, and those of dicts inside, to those of the same names."""
  for name, value in more.items():
    if isinstance(value, dict):
      add_up(total.setdefault(name, {}), value)
    else:
      total[name] = total.get(name, 0) + value
