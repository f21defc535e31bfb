"""A source made of one's own files: plain text, HTML, JSON lines and Parquet, compressed or not, here or at a URL."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import shards
from data_pipeline.recipe import Input, Limits, Raw, Reject, Unreadable
from data_pipeline.sources import files
from data_pipeline.sources.text import decode, html_to_text

_BYTES_A_SHARD = 64 << 20
_ROWS_A_BATCH = 16  # in memory, whatever is in them
_HTML = ('.html', '.htm', '.xhtml')


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class TextFiles:
  """Files on this machine or at a URL: '.jsonl' has a document a line, '.parquet' a row, any other file is a document.

  pattern: as of `files.listing`: '/data/books/**/*.txt', 's3://bucket/pages/*.html'. Files of HTML become text; with
  main_content without what is around the content of a page. '.gz' and '.zst' are uncompressed (not of Parquet).
  text, url, date: names of the fields and columns. What cannot be read is counted, and the rest of its file read.
  """

  name: str
  pattern: str
  text: str = 'text'
  url: str = 'url'
  date: str = 'date'
  main_content: bool = False
  limits: Limits = Limits()

  def state(self) -> str:
    """A changed file rebuilds the source."""
    return files.state(self.name, self.pattern) + shards.code_of(files)

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return files.inputs(self.name, self.pattern, _BYTES_A_SHARD)

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    for path in unit.paths:
      with files.opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
          yield Unreadable(path, 'empty file')
          continue
        kind = files.kind_of(path)
        try:
          if kind == '.parquet':
            yield from self._rows(path, file)
          elif kind == '.jsonl':
            yield from self._lines(path, files.uncompressed(path, file))
          else:
            content = files.uncompressed(path, file).read(self.limits.max_bytes + 1)
            yield Raw(path, content) if len(content) <= self.limits.max_bytes else Unreadable(path, 'too large', size)
        except OSError as error:
          yield Unreadable(path, files.damage(error), size)
        except (pa.ArrowException, UnicodeDecodeError):
          yield Unreadable(path, 'damaged', size)

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    if files.kind_of(raw.url) in _HTML:
      return html_to_text(raw.content, self.main_content), {}
    return decode(raw.content)

  def _lines(self, path: str, stream) -> Iterator[Raw | Unreadable]:
    for number, line, size in files.lines(stream, self.limits.max_bytes):
      place = f'{path}#{number}'
      try:
        if line is None:
          raise Reject('too large')
        if line.strip():
          yield self._document(_parsed(line), place)
      except Reject as reject:
        yield Unreadable(place, str(reject), size)

  def _rows(self, path: str, file) -> Iterator[Raw | Unreadable]:
    table, number = pq.ParquetFile(file), 0
    columns = [name for name in (self.text, self.url, self.date) if name in table.schema_arrow.names]
    for batch in table.iter_batches(_ROWS_A_BATCH, columns=columns):
      # Arrow believes that strings are utf-8; a file may say so of any bytes
      wide = [column.cast(pa.large_binary()) if pa.types.is_string(column.type) else column for column in batch.columns]
      for row in pa.RecordBatch.from_arrays(wide, names=batch.schema.names).to_pylist():
        number += 1
        place = f'{path}#{number}'
        try:
          yield self._document({name: _string(value) for name, value in row.items()}, place)
        except Reject as reject:
          yield Unreadable(place, str(reject), len(row.get(self.text) or ''))

  def _document(self, record: dict, place: str) -> Raw:
    text = record.get(self.text)
    if not isinstance(text, str):
      raise Reject(f'no field {self.text!r}')
    return Raw(files.address(record.get(self.url), place), text, files.day(record.get(self.date)))


def _parsed(line: bytes) -> dict:
  try:
    record = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    raise Reject('not utf-8') from error
  except (ValueError, RecursionError) as error:
    raise Reject('not JSON') from error
  if not isinstance(record, dict):
    raise Reject('not JSON')
  return record


def _string(value: object) -> object:
  """A cell, with its bytes as text."""
  try:
    return value.decode() if isinstance(value, bytes) else value
  except UnicodeDecodeError as error:
    raise Reject('not utf-8') from error
