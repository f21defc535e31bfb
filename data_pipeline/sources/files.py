"""The files of a source: a pattern on this machine, or wherever fsspec reaches ('s3://bucket/crawl/*.warc.gz')."""

import contextlib
import glob
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

import fsspec
import pyarrow as pa

from data_pipeline.recipe import Input

_CODECS = {'.gz': 'gzip', '.zst': 'zstd'}
_CHANGES = ('ETag', 'etag', 'md5Hash', 'mtime', 'LastModified', 'last_modified', 'updated', 'created')  # of file systems
_DAY = re.compile(r'\d{4}(-\d\d(-\d\d)?)?(?=$|[T ])')
_BLOCK = 1 << 22
_DAMAGED = 1 << 16  # bytes before a damaged place of a compressed file that go with it


def listing(name: str, pattern: str) -> list[tuple[str, int, str]]:
  """(path or URL, bytes, what changes with its content) of each file, sorted. ValueError of one line where there is none.

  pattern: as of `glob`, '**' and '~' included, or a URL of fsspec with the same wildcards.
  """
  if '://' in pattern:
    try:
      system, path = fsspec.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # a protocol that is not known, or needs a package
      raise ValueError(f'source {name}: {pattern}: {error}') from error
    found = [(system.unstrip_protocol(path), info) for path, info in system.glob(path, detail=True).items()]
    files = [(url, info['size'] or 0, next((str(info[key]) for key in _CHANGES if info.get(key)), ''))
             for url, info in found if info['type'] == 'file']
  else:
    paths = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
    files = [(path, os.stat(path).st_size, str(os.stat(path).st_mtime_ns)) for path in paths]
  if not files:
    raise ValueError(f'source {name}: no file matches {pattern!r}')
  return sorted(files)


def state(name: str, pattern: str) -> str:
  """A hash of names, sizes and times of change: a changed file rebuilds the source."""
  return hashlib.sha256(json.dumps(listing(name, pattern)).encode()).hexdigest()


def inputs(name: str, pattern: str, n_bytes: int) -> list[Input]:
  """Neighbours together up to n_bytes; a file alone that is larger."""
  groups, room = [], 0
  for path, size, _ in listing(name, pattern):
    if size > room or not groups:
      groups.append([])
      room = n_bytes
    groups[-1].append(path)
    room -= size
  return [Input(paths=tuple(group), lineage=group[0] if len(group) == 1 else f'{len(group)} files of {pattern}')
          for group in groups]


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedIOBase]:
  """The bytes of a file, on this machine: a remote one is copied first (to no name, so that nothing is left behind)."""
  if '://' not in path:
    with open(path, 'rb') as file:
      yield file
    return
  with tempfile.TemporaryFile() as file:
    with fsspec.open(path, 'rb') as remote:
      shutil.copyfileobj(remote, file, _BLOCK)
    file.seek(0)
    yield file


def kind_of(path: str) -> str:
  """'.jsonl' of 'a.jsonl.gz'."""
  stem, suffix = os.path.splitext(path.lower())
  return os.path.splitext(stem)[1] if suffix in _CODECS else suffix


def uncompressed(path: str, file) -> io.BufferedReader:
  """What a file holds, read as a stream: of '.gz' and '.zst' what is in them. Reading damage: OSError, as `damage` tells."""
  codec = _CODECS.get(pathlib.PurePath(path).suffix.lower())
  return io.BufferedReader(pa.CompressedInputStream(file, codec), _DAMAGED) if codec else file


def damage(error: OSError) -> str:
  """Why a file cannot be read to its end. An error of the disk or the network is no property of the file: raised again."""
  if error.errno is not None:
    raise error
  return 'cut short' if 'runcated' in str(error) else 'damaged'


def lines(stream, limit: int) -> Iterator[tuple[int, bytes | None, int]]:
  """(number, line, its bytes) of a stream; None in place of a line over the limit, which is passed by, not loaded."""
  number = 0
  while line := stream.readline(limit + 1):
    number, size = number + 1, len(line)
    if size > limit:
      while line and not line.endswith(b'\n'):
        line = stream.readline(_BLOCK)
        size += len(line)
      line = None
    yield number, line, size


def day(value: object) -> str:
  """'2024-05-01' of a date or time in ISO 8601, as far as it is known; else ''."""
  found = _DAY.match(str(value))
  return found[0] if found else ''


def address(value: object, otherwise: str) -> str:
  """A document's url, in characters that can be written."""
  return value.encode('utf-8', 'replace').decode() if value and isinstance(value, str) else otherwise
