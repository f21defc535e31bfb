"""Web archives: WARC files of pages, and WET files of their text, as Common Crawl and other crawlers write them."""

import dataclasses
import io
import os
import pathlib
import re
import zlib
from collections.abc import Iterator

import pyarrow as pa
from fastwarc.stream_io import BrotliReader, ChunkedReader
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType

from data_pipeline import shards
from data_pipeline.recipe import Input, Limits, Raw, Reject, Unreadable
from data_pipeline.sources import files
from data_pipeline.sources.text import html_to_text

_BYTES_A_SHARD = 256 << 20
_REPAIRS = 1000  # places of a file after which the next record is looked for; so much of it is read again at most
_STARTS = {'gzip': b'\x1f\x8b\x08', 'zstd': b'\x28\xb5\x2f\xfd'}  # of the members of a compressed file
_BLOCK = 1 << 22
_PAGES = WarcRecordType.response | WarcRecordType.resource
_HTML = ('text/html', 'application/xhtml+xml')
_CHUNK = re.compile(rb'[0-9A-Fa-f]+\s*\r\n')


@dataclasses.dataclass(frozen=True, slots=True)
class Page(Raw):
  """A response of a server, as it came."""

  charset: str = ''  # what its header says
  encoding: str = ''  # of the transfer and the content: 'chunked, gzip'
  is_cut: bool = False  # by the crawler, at a size of its own


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Warc:
  """Pages of HTML in WARC files, or the texts of WET files: plain, '.gz' or '.zst'.

  pattern: as of `files.listing`: '/data/crawl/*.warc.gz', 's3://bucket/crawl/*.warc.gz'. main_content: without what is
  around the content of a page. Damage costs the records that it touches: reading goes on at the next that can be found.
  """

  name: str
  pattern: str
  main_content: bool = True
  limits: Limits = Limits()

  def state(self) -> str:
    """A changed file rebuilds the source."""
    return files.state(self.name, self.pattern) + shards.code_of(files)

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return files.inputs(self.name, self.pattern, _BYTES_A_SHARD)

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    for path in unit.paths:
      with files.opened(path) as file:
        one = None
        for one in self._records(path, file):
          yield one
        if one is None:
          yield Unreadable(path, 'no pages')

  def _records(self, path: str, file) -> Iterator[Raw | Unreadable]:
    size, begin, repairs = os.fstat(file.fileno()).st_size, 0, 0
    if not size:
      yield Unreadable(path, 'empty file')
    while begin < size and repairs < _REPAIRS:
      last, n_records, whole, reason = begin, 0, True, ''
      file.seek(begin)
      try:
        for record in ArchiveIterator(file, record_types=WarcRecordType.any_type, max_header_len=1 << 20):
          last, n_records = record.stream_pos, n_records + 1
          whole = record.content_length <= self.limits.max_bytes
          yield from self._document(record)
        _read_to_the_end(file, last)
      except OSError as error:
        reason = files.damage(error)
      except EOFError:
        reason = 'cut short'
      if not reason and whole:  # one that is not read as a whole may say that it is longer than it is
        return
      first, repairs, begin = not begin, repairs + bool(reason), _next_start(file, last + 1)
      if reason and (n_records or first):  # else the damage has been counted
        yield Unreadable(path, reason, begin - last)

  def _document(self, record: WarcRecord) -> Iterator[Raw | Unreadable]:
    """The document of a record if it has one. EOFError where the file ends within it."""
    kind, size = record.record_type, record.content_length
    url, date = record.headers.get('WARC-Target-URI', ''), files.day(record.headers.get('WARC-Date', ''))
    if kind == WarcRecordType.conversion:
      content_type = 'text/plain'
    elif kind & _PAGES:
      content_type = record.http_content_type if record.is_http else record.headers.get('Content-Type', '').partition(';')[0]
    else:
      return
    status = record.http_headers.status_code if record.is_http else 200
    if status is None:
      yield Unreadable(url, 'malformed HTTP', size)
      if len(record.reader.read(min(size, self.limits.max_bytes))) < min(size, self.limits.max_bytes):
        raise EOFError
    elif status != 200:
      yield Unreadable(url, 'HTTP status is not 200', size)
    elif kind & _PAGES and (content_type or '').strip().lower() not in _HTML:
      yield Unreadable(url, 'not HTML', size)
    elif size > self.limits.max_bytes:
      yield Unreadable(url, 'too large', min(size, 1 << 40))
    else:
      content = record.reader.read(size)
      if len(content) < size:
        raise EOFError
      if kind == WarcRecordType.conversion:
        yield Raw(url, content.decode('utf-8', 'replace'), date)
      else:
        headers = record.http_headers if record.is_http else {}
        encoding = f'{headers.get("Transfer-Encoding", "")}, {headers.get("Content-Encoding", "")}'
        yield Page(url, content, date, charset=(record.is_http and record.http_charset) or '', encoding=encoding.lower(),
                   is_cut='WARC-Truncated' in record.headers)

  def extract(self, raw: Page) -> tuple[str, dict[str, int]]:
    text = html_to_text(_decoded(raw, self.limits.max_bytes), self.main_content, raw.charset)
    return text, {'cut short by the crawler': 1} if raw.is_cut else {}


def _codec(file) -> str:
  file.seek(0)
  begin = file.read(4)
  return next((codec for codec, start in _STARTS.items() if begin.startswith(start)), '')


def _read_to_the_end(file, begin: int) -> None:
  """OSError where a compressed file ends within the member at `begin` or one after it, which fastwarc takes for its end."""
  if codec := _codec(file):
    with os.fdopen(os.dup(file.fileno()), 'rb') as again, pa.CompressedInputStream(again, codec) as stream:
      again.seek(begin)
      while stream.read(_BLOCK):
        pass


def _next_start(file, begin: int) -> int:
  """Where the next record may start: the place of the next member of a compressed file or, of another, line of a header."""
  start, tail = _STARTS.get(_codec(file), b'WARC/1.'), b''
  file.seek(begin)
  while block := file.read(_BLOCK):
    block = tail + block
    if (found := block.find(start)) >= 0:
      return begin + found
    tail = block[1 - len(start):]
    begin += len(block) - len(tail)
  return file.tell()


def _decoded(page: Page, limit: int) -> bytes:
  """The content without the encodings of its way. Crawlers undo them and leave the header as it was: where the content does
  not look so, nothing is done."""
  content = page.content
  try:
    if 'chunked' in page.encoding and _CHUNK.match(content):
      content = ChunkedReader(io.BytesIO(content)).read()
    if content.startswith(b'\x1f\x8b') or ('deflate' in page.encoding and content.startswith(b'\x78')):
      unpacker = zlib.decompressobj(wbits=47)
      content = unpacker.decompress(content, limit + 1)
      if len(content) <= limit and not unpacker.eof and not page.is_cut:
        raise Reject('damaged encoding')
    elif ', br' in page.encoding and not content.lstrip().startswith(b'<'):
      content = BrotliReader(io.BytesIO(content)).read(limit + 1)
  except (OSError, zlib.error) as error:
    raise Reject('damaged encoding') from error
  if len(content) > limit:
    raise Reject('too large')
  return content
