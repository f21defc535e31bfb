"""Rows of a corpus -> batches, as a pure function of (seed, global row index).

Global row i belongs to a source (`MixtureSchedule`), where it is row j of an endless stream; j is (epoch, place), and the
place is permuted with a key of its own for each source and epoch. Nothing else enters: not the number of hosts, nor the
batch size, nor what was read before. So the state of a loader is one integer, the next global row, and any batch can be
made again from its index. Batch s after cursor c is rows [c + s*G, c + (s+1)*G); a host reads those that its devices hold.

Grain's `MapDataset` carries it: a batch is one random access, prefetched by threads without changing the order.
"""

import functools
import pathlib
import sys
import threading
from collections.abc import Sequence

import numpy as np
from array_record.python import array_record_module

from data_pipeline import pack, shards, shuffle, tokenizer
from data_pipeline.mixture import MixtureSchedule

_READER_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'  # records are read one by one, here and there


def open_corpus(directory, seq_len: int) -> 'Corpus':
  """The corpus that data_pipeline.build left in `directory`, for rows of seq_len.

  FileNotFoundError or ValueError with one line: missing, unfinished, no such row length, a tokenizer or a shard that is not
  the one of the manifest. Sizes are checked here, and contents by `python -m data_pipeline.shards verify`.
  """
  return Corpus(pathlib.Path(directory), seq_len)


class Corpus:
  """Rows of one length of a corpus. sources: names; vocab_size, bos, eot, tokenizer_path, tokenizer_sha256: of its
  tokenizer; chat_template: of its conversations (`chat.Template.source`), None where there are none; contents: a key of the
  rows of each source, by their hashes."""

  def __init__(self, directory: pathlib.Path, seq_len: int):
    manifest = shards.read_manifest(directory)
    self.directory, self.seq_len = directory, seq_len
    self.vocab_size, self.bos, self.eot = manifest['vocab_size'], manifest['bos'], manifest['eot']
    self.chat_template = manifest['chat_template']
    self.tokenizer_path, self.tokenizer_sha256 = directory / 'tokenizer.json', manifest['tokenizer_sha256']
    self.sources = tuple(manifest['sources'])
    self._facts = manifest['sources']
    if seq_len not in manifest['seq_lens']:
      raise ValueError(f'the corpus at {directory} has rows of {", ".join(map(str, manifest["seq_lens"]))} tokens, not '
                       f'{seq_len}: choose one of them or add it: `python -m data_pipeline.build --seq_lens={seq_len} …`')
    entries = [entry for entry in manifest['rows'] if entry['seq_len'] == seq_len]
    _check_files(directory, self.tokenizer_sha256, entries)
    self.contents = {source: shards.key_of([entry['xxh3'] for entry in entries if entry['source'] == source])
                     for source in self.sources}
    self._tables = {(source, split): _Table(directory, [
      entry for entry in entries if (entry['source'], entry['split']) == (source, split)])
      for source in self.sources for split in ('train', 'validation')}

  def rows(self, source: str, split: str = 'train') -> int:
    """Rows of an epoch."""
    return self.table(source, split).n_rows

  def tokens(self, source: str, split: str = 'train') -> int:
    """Targets of an epoch that are trained on: the tokens of the documents and an end of text for each, or the answers'."""
    return self._facts[source][split]['tokens']

  def text_bytes(self, source: str, split: str = 'train') -> int:
    """Bytes (utf-8) of the text that these stand for."""
    return self._facts[source][split]['text_bytes']

  @functools.cached_property
  def token_bytes(self) -> np.ndarray:
    """int32 [vocab_size]: bytes of text each token stands for, 0 for special ones: for bits per byte."""
    return tokenizer.token_bytes(tokenizer.load(self.tokenizer_path))

  def table(self, source: str, split: str) -> '_Table':
    if (source, split) not in self._tables:
      raise ValueError(f'the corpus at {self.directory} has no source {source!r} with a split {split!r}: it has '
                       f'{", ".join(self.sources)}, each with train and validation')
    return self._tables[source, split]


def _check_files(directory: pathlib.Path, tokenizer_sha256: str, entries: list[dict]) -> None:
  path = directory / 'tokenizer.json'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing: build the corpus again')
  if shards.sha256_file(path) != tokenizer_sha256:
    raise ValueError(f'{path} is not the tokenizer that the corpus was built with: its tokens would mean something else; '
                     'put the old file back or build the corpus again')
  for entry in entries:
    if entry['tokenizer_sha256'] != tokenizer_sha256:
      raise ValueError(f'{directory / entry["path"]} was made with another tokenizer (sha256 '
                       f'{entry["tokenizer_sha256"][:12]}…) than the corpus has ({tokenizer_sha256[:12]}…): '
                       'build the corpus again')
    if not shards.is_there(directory, entry):
      raise FileNotFoundError(f'{directory / entry["path"]} is missing or not {entry["bytes"]:,} bytes long: '
                              'build the corpus again')


class _Table:
  """Rows of one source and split, over its shards, by index."""

  def __init__(self, directory: pathlib.Path, entries: list[dict]):
    self._paths = [directory / entry['path'] for entry in entries]
    self._ends = np.cumsum([entry['rows'] for entry in entries], dtype=np.int64)
    self.n_rows = int(self._ends[-1]) if entries else 0
    self.masked = any(entry['masked'] for entry in entries)  # of one source: all are, or none is
    self._readers, self._lock = {}, threading.Lock()

  def read(self, indices: np.ndarray) -> list[bytes]:
    """Records of these rows, in this order. ValueError where a shard is not what was written: each record has a hash."""
    shard_of = np.searchsorted(self._ends, indices, side='right')
    records = [b''] * len(indices)
    for shard in np.unique(shard_of).tolist():
      here, = np.nonzero(shard_of == shard)
      first = self._ends[shard - 1] if shard else 0
      try:
        found = self._reader(shard).read((indices[here] - first).tolist())
      except RuntimeError as error:  # of ArrayRecord, whatever it is
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{self._paths[shard]} cannot be read: put back what was built there, or build the corpus again; '
                         f'`python -m data_pipeline.shards verify` names what else is damaged ({reason})') from error
      for place, record in zip(here.tolist(), found, strict=True):
        records[place] = record
    return records

  def _reader(self, shard: int):
    with self._lock:
      if shard not in self._readers:
        self._readers[shard] = array_record_module.ArrayRecordReader(
          str(self._paths[shard]), _READER_OPTIONS, file_reader_buffer_size=1 << 15)
      return self._readers[shard]


def check(corpus: Corpus, schedule: MixtureSchedule, split: str = 'train') -> None:
  """ValueError for a mixture that the corpus cannot give."""
  unknown = [name for name in schedule.sources if name not in corpus.sources]
  if unknown:
    raise ValueError(f'the mixture names {", ".join(unknown)}, which the corpus at {corpus.directory} does not have: '
                     f'it has {", ".join(corpus.sources)}')
  for name in schedule.sources:
    if not corpus.rows(name, split) and schedule.draws(name):
      raise ValueError(f'the mixture draws from {name}, whose {split} split has no rows in {corpus.directory}')


class _HostBatches:
  """A host's batches by index: what Grain calls a random-access data source."""

  def __init__(self, corpus: Corpus, schedule: MixtureSchedule, *, seed: int, batch_size: int, cursor: int,
               part: Sequence[int] | None, split: str):
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size} must be at least 1')
    if cursor < 0:
      raise ValueError(f'cursor={cursor}: the next global row is 0 or more')
    check(corpus, schedule, split)
    self._tables = [corpus.table(name, split) for name in schedule.sources]
    self._schedule, self._cursor, self._batch_size = schedule, cursor, batch_size
    self._part = _part_of(batch_size, part)
    self._n_rows = np.array([max(table.n_rows, 1) for table in self._tables], np.int64)
    self._masked = np.array([table.masked for table in self._tables])
    self._keys = np.array([shuffle.key_of(seed, f'{name}/{split}') for name in schedule.sources], np.uint64)
    self._seq_len, self._dtype = corpus.seq_len, pack.token_dtype(corpus.vocab_size)

  def __len__(self) -> int:
    n_rows = self._schedule.n_rows
    return (sys.maxsize - self._cursor if n_rows is None else max(n_rows - self._cursor, 0)) // self._batch_size

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    sources, _, rows = self.places(step)
    records = [b''] * len(rows)
    for source in np.unique(sources).tolist():
      here, = np.nonzero(sources == source)
      for place, record in zip(here.tolist(), self._tables[source].read(rows[here])):
        records[place] = record
    batch = pack.decode_rows(records, self._seq_len, self._dtype, self._masked[sources])
    return {**batch, 'source': sources.astype(np.int32)}

  def places(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, epoch, row of the source) of each row of a batch."""
    sources, stream_rows = self._schedule.sources_of(self._cursor + step * self._batch_size + self._part)
    n_rows = self._n_rows[sources]
    epochs, places = np.divmod(stream_rows, n_rows)
    return sources, epochs, shuffle.permute(places, n_rows, shuffle.epoch_keys(self._keys[sources], epochs))


def _part_of(batch_size: int, part: Sequence[int] | None) -> np.ndarray:
  """The rows of a batch that a host reads: ascending offsets into it; None: all."""
  rows = np.arange(batch_size) if part is None else np.asarray(part, np.int64)
  if rows.ndim != 1 or len(rows) and (rows[0] < 0 or rows[-1] >= batch_size or (np.diff(rows) < 1).any()):
    raise ValueError(f'part={part}: it has offsets into a batch of {batch_size} rows, ascending')
  return rows


class BatchIterator:
  """Endless or finite iterator of a host's batches. cursor: the next global row, all there is to save and to resume from."""

  def __init__(self, batches: _HostBatches, cursor: int, batch_size: int, num_threads: int):
    import grain  # here: it takes a second and more, which commands that only read a corpus's facts need not wait

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    self._batches = iter(grain.MapDataset.source(batches).to_iter_dataset(options))
    self.cursor, self._batch_size = cursor, batch_size

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._batches)
    self.cursor += self._batch_size
    return batch

  def close(self) -> None:
    """Ends the prefetch threads."""
    self._batches.close()


def batches(corpus: Corpus, schedule: MixtureSchedule, *, seed: int, batch_size: int, cursor: int = 0,
            part: Sequence[int] | None = None, split: str = 'train', num_threads: int = 2) -> BatchIterator:
  """Batches from global row `cursor` on; of their batch_size rows those that this host's devices hold.

  part: their offsets into the batch, ascending (None: all rows). Each: {tokens, targets, segment_ids, positions, loss_mask:
  int32 [rows, seq_len], source: int32 [rows], into schedule.sources}. It ends where fewer than batch_size rows of the
  schedule are left.
  num_threads: prefetch threads (0: none), without effect on what is read. ValueError with one line for a mixture or batch
  that does not fit.
  """
  source = _HostBatches(corpus, schedule, seed=seed, batch_size=batch_size, cursor=cursor, part=part, split=split)
  return BatchIterator(source, cursor, batch_size, num_threads)


def batch_at(corpus: Corpus, schedule: MixtureSchedule, *, seed: int, batch_size: int, step: int,
             split: str = 'train') -> dict[str, np.ndarray]:
  """Batch `step` of a run that began at row 0: to look at what a step was trained on."""
  return _HostBatches(corpus, schedule, seed=seed, batch_size=batch_size, cursor=0, part=None, split=split)[step]


def row_ids(corpus: Corpus, schedule: MixtureSchedule, *, seed: int, batch_size: int, step: int,
            cursor: int = 0) -> list[dict]:
  """Where the rows of batch `step` after a cursor come from: a record each of its source, its epoch, and its row in the
  source's shards."""
  batches = _HostBatches(corpus, schedule, seed=seed, batch_size=batch_size, cursor=cursor, part=None, split='train')
  return [{'source': schedule.sources[source], 'epoch': int(epoch), 'row': int(row)}
          for source, epoch, row in zip(*batches.places(step))]


def validation_batches(corpus: Corpus, source: str, batch_size: int, limit_rows: int | None = None,
                       part: Sequence[int] | None = None):
  """Yields the held-out rows of one source, at most limit_rows, once, in an order that is always the same.

  The rows are a fixed sample where limit_rows is less than there are. As of `batches`; the last batch is filled with rows
  whose segment_ids are 0 throughout; `source` indexes corpus.sources.
  """
  table = corpus.table(source, 'validation')
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} must be at least 1')
  part = _part_of(batch_size, part)
  n_rows = table.n_rows if limit_rows is None else min(limit_rows, table.n_rows)
  order = shuffle.permute(np.arange(n_rows), table.n_rows, shuffle.key_of(0, 'validation'))
  dtype = pack.token_dtype(corpus.vocab_size)
  for start in range(0, n_rows, batch_size):
    places = start + part
    records = table.read(order[places[places < n_rows]])
    batch = pack.decode_rows(records, corpus.seq_len, dtype, table.masked) if records else {
      name: np.zeros((0, corpus.seq_len), np.int32) for name in pack.FIELDS}
    padding = ((0, len(part) - len(records)), (0, 0))
    yield {**{name: np.pad(value, padding) for name, value in batch.items()},
           'source': np.full(len(part), corpus.sources.index(source), np.int32)}
