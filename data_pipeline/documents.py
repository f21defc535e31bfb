"""Stage 1: sources -> shards of documents, in Parquet, and beside each what could not be read, with the reason.

    documents/<source>/00000-of-00001.parquet   id, text, bytes, source, url, date, parent, lineage
    rejects/<source>/00000-of-00001.parquet     url, reason, bytes

The id is the xxh3-128 of the text: equal documents have equal ids wherever they come from, and whatever is decided by a
hash of the id (the validation split) stays as it is when a corpus grows.
"""

import collections
import contextlib
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline import shards
from data_pipeline.recipe import Input, Limits, Raw, Reject, Source, Unreadable
from data_pipeline.sandbox import Sandbox
from data_pipeline.sources.text import clean

_STRINGS = ('id', 'text', 'source', 'url', 'date', 'parent', 'lineage')
_SCHEMA = pa.schema([*((name, pa.string()) for name in _STRINGS), ('bytes', pa.int64())])
_REJECTS = pa.schema([('url', pa.string()), ('reason', pa.string()), ('bytes', pa.int64())])
_ROWS_A_GROUP, _BYTES_A_GROUP, _BYTES_A_SHARD = 1000, 64 << 20, 128 << 20  # of text


def limits_of(source: Source) -> Limits:
  return getattr(source, 'limits', Limits())


def write_shards(root: pathlib.Path, record_name: str, key: str, source: Source, unit: Input, name: str) -> dict:
  """Reads one input and commits its documents as documents/<name>.parquet, of more than `_BYTES_A_SHARD` as several files;
  returns the record. Runs in a worker."""
  counts, lengths, removed, rejects, n_bytes = collections.Counter(), collections.Counter(), {}, [], 0
  with _Writer(root / 'documents', name) as writer, Sandbox(source, limits_of(source)) as sandbox:
    for raw in source.read(unit):
      try:
        text, found = _text_of(raw, sandbox, hasattr(source, 'chats'))
      except Reject as reject:
        reason, size = str(reject), raw.n_bytes if isinstance(raw, Unreadable) else len(raw.content)
        rejects.append({'url': raw.url, 'reason': reason, 'bytes': size})
        of_reason = removed.setdefault(reason, {'documents': 0, 'bytes': 0, 'samples': []})
        of_reason['documents'] += 1
        of_reason['bytes'] += size
        if len(of_reason['samples']) < 3:
          of_reason['samples'].append({'url': raw.url, 'text': ''})
        continue
      data = text.encode()
      counts.update(found)
      lengths[len(data).bit_length() - 1] += 1
      n_bytes += len(data)
      writer.add({'id': xxhash.xxh3_128_hexdigest(data), 'text': text, 'bytes': len(data), 'source': source.name,
                  'url': raw.url, 'date': raw.date, 'parent': raw.parent, 'lineage': unit.lineage})
  rejects_path = root / 'rejects' / f'{name}.parquet'
  with shards.committed(rejects_path) as temporary:
    pq.write_table(pa.Table.from_pylist(rejects, _REJECTS), temporary, compression='zstd')
  written = [{**shards.entry(root, path), 'rows': rows} for path, rows in writer.written]
  files = [{fact: shard[fact] for fact in ('path', 'bytes', 'xxh3')} for shard in written]
  return shards.write_record(root, record_name, key, [*files, shards.entry(root, rejects_path)], shards=written,
                             source=source.name, lineage=unit.lineage, documents=lengths.total(), bytes=n_bytes,
                             lengths=dict(sorted(lengths.items())), removed=removed, facts=dict(sorted(counts.items())))


class _Writer:
  """Documents to files, one after the other. A context manager, which commits the last. written: their paths and rows."""

  def __init__(self, folder: pathlib.Path, name: str):
    self.folder, self.name, self.written = folder, name, []

  def __enter__(self):
    self._begin()
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self._end()
    else:
      self._open.__exit__(kind, error, trace)

  def add(self, document: dict) -> None:
    if self._bytes >= _BYTES_A_SHARD:
      self._end()
      self._begin()
    self._group.append(document)
    self._rows, self._bytes, self._group_bytes = (
      self._rows + 1, self._bytes + document['bytes'], self._group_bytes + document['bytes'])
    if len(self._group) == _ROWS_A_GROUP or self._group_bytes > _BYTES_A_GROUP:
      self._write_group()

  def _begin(self) -> None:
    number = f'-{len(self.written):03d}' if self.written else ''
    self._path, self._rows, self._bytes = self.folder / f'{self.name}{number}.parquet', 0, 0
    self._group, self._group_bytes, self._open = [], 0, contextlib.ExitStack()
    temporary = self._open.enter_context(shards.committed(self._path))
    self._writer = self._open.enter_context(pq.ParquetWriter(temporary, _SCHEMA, compression='zstd'))

  def _write_group(self) -> None:
    self._writer.write_table(pa.Table.from_pylist(self._group, _SCHEMA))
    self._group, self._group_bytes = [], 0

  def _end(self) -> None:
    self._write_group()
    self._open.close()
    self.written.append((self._path, self._rows))


def _text_of(raw: Raw | Unreadable, sandbox: Sandbox, is_chat: bool) -> tuple[str, dict[str, int]]:
  """The text as it is kept, and what the source counts. Reject where there is none."""
  if isinstance(raw, Unreadable):
    raise Reject(raw.reason)
  limit = sandbox.limits.max_bytes
  if len(raw.content) > limit:
    raise Reject('too large')
  text, counts = (raw.content, {}) if isinstance(raw.content, str) else sandbox.extract(raw)
  text = text if is_chat else clean(text)
  if not text:
    raise Reject('no text')
  if len(text.encode()) > limit:
    raise Reject('too large')
  return text, counts
