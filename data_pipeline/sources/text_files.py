"""A source made of one's own files: plain text, HTML, and JSON lines."""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

from data_pipeline.recipe import Input, Raw
from data_pipeline.sources.text import html_to_text

_BYTES_A_SHARD = 64 << 20


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class TextFiles:
  """Files on this machine. A `.jsonl` file has a document a line, {"text": …, "url": …}; any other file is a document.

  pattern: as of `glob`, '**' included, e.g. '/data/books/**/*.txt'. `.html` files are turned into text.
  """

  name: str
  pattern: str

  def _files(self) -> list[str]:
    files = sorted(path for path in glob.glob(os.path.expanduser(self.pattern), recursive=True) if os.path.isfile(path))
    if not files:
      raise ValueError(f'source {self.name}: no file matches {self.pattern!r}')
    return files

  def state(self) -> str:
    """A hash of names, sizes and times of change: a changed file rebuilds the source."""
    listing = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in self._files()]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    groups, size = [[]], 0
    for path in self._files():
      if size > _BYTES_A_SHARD:
        groups, size = [*groups, []], 0
      groups[-1].append(path)
      size += os.stat(path).st_size
    return [Input(paths=tuple(group), lineage=f'{len(group)} files of {self.pattern}') for group in groups]

  def read(self, unit: Input) -> Iterator[Raw]:
    for path in unit.paths:
      if path.endswith('.jsonl'):
        yield from _read_json_lines(path)
      elif path.endswith(('.html', '.htm')):
        yield Raw(path, pathlib.Path(path).read_bytes())
      else:
        try:
          yield Raw(path, pathlib.Path(path).read_text(encoding='utf-8'))
        except UnicodeDecodeError as error:
          raise ValueError(f'{path} is not utf-8 text ({error.reason} at byte {error.start}): convert it or '
                           'narrow the pattern') from error

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    return html_to_text(raw.content), {}


def _read_json_lines(path: str) -> Iterator[Raw]:
  with open(path, encoding='utf-8') as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f'{path} line {number} is not JSON: {error}') from error
      if not isinstance(record, dict) or not isinstance(record.get('text'), str):
        raise ValueError(f'{path} line {number} has no "text": each line is an object {{"text": "…"}}')
      yield Raw(record.get('url') or f'{path}#{number}', record['text'])
