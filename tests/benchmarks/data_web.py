"""Web archive to documents: MB of HTML a second and core, beside warcio and trafilatura.

    PYTHONPATH=. python tests/benchmarks/data_web.py [--peer=VENV/bin/python] [--packages=python3.11-doc,postgresql-doc-15]
      [--rounds=3] [--peer_pages=200]

The pages of Debian packages are put into a .warc.gz, a gzip member a record, and a shard of documents is written of it, as
the first stage of a build does: archive, sandbox, extraction, Parquet. CPU seconds of the worker and of its sandbox together
(starting and importing left out), the best of some rounds, since CPU seconds vary less than seconds on a busy machine.
The peer reads the first pages of the same archive and writes JSON lines.
"""

import argparse
import dataclasses
import gzip
import json
import subprocess
import tempfile
import time
from pathlib import Path

from data_pipeline import documents
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.warc import Warc

PEER = '''
import json, sys, time, trafilatura, warcio
started, n_bytes, texts, left = time.process_time(), 0, 0, int(sys.argv[2])
with open(sys.argv[1], 'rb') as archive, open(sys.argv[1] + '.jsonl', 'w') as out:
  for record in warcio.ArchiveIterator(archive):
    if record.rec_type == 'response' and left:
      left -= 1
      html = record.content_stream().read()
      n_bytes += len(html)
      text = trafilatura.extract(html, fast=True) or ''
      texts += len(text.encode())
      out.write(json.dumps({'url': record.rec_headers.get_header('WARC-Target-URI'), 'text': text}) + '\\n')
print(json.dumps([n_bytes, texts, time.process_time() - started]))
'''

_seen = 0


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class TimedWarc(Warc):
  """Counts the CPU time of the process that extracts, since its first document."""

  def extract(self, raw):
    global _seen
    text, _ = Warc.extract(self, raw)
    spent, _seen = time.process_time_ns() - _seen if _seen else 0, time.process_time_ns()
    return text, {'nanoseconds': spent}


def write_archive(path: Path, packages: list[str]) -> tuple[int, int]:
  """(pages, bytes of HTML)."""
  n_pages = n_bytes = 0
  with open(path, 'wb') as archive, tempfile.TemporaryDirectory() as scratch:
    for name in packages:
      package = DebianPackage(name=name, pages='*.html')
      unit, = package.fetch(Path(scratch))
      for page in package.read(unit):
        http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n'
        head = (f'WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {page.url}\r\nWARC-Date: 2024-05-01T00:00:00Z\r\n'
                f'WARC-Record-ID: <urn:uuid:{n_pages:032x}>\r\nContent-Type: application/http; msgtype=response\r\n'
                f'Content-Length: {len(http) + len(page.content)}\r\n\r\n')
        archive.write(gzip.compress(head.encode() + http + page.content + b'\r\n\r\n', 6))
        n_pages, n_bytes = n_pages + 1, n_bytes + len(page.content)
  return n_pages, n_bytes


def measure(peer: str = '', packages=('python3.11-doc', 'postgresql-doc-15'), rounds: int = 3,
            peer_pages: int = 200) -> list[dict]:
  """A row for each program: name, pages, mb (of HTML), mb_per_s, text_mb_per_s, pages_per_s."""
  with tempfile.TemporaryDirectory() as folder:
    archive, times, facts = Path(folder) / 'a.warc.gz', [], {}
    n_pages, n_bytes = write_archive(archive, list(packages))
    source = TimedWarc(name='web', pattern=str(archive))
    unit, = source.fetch(Path(folder))
    for i in range(rounds):
      started = time.process_time()
      facts = documents.write_shards(Path(folder), f'd{i}', 'key', source, unit, f'web/{i}')
      times.append(time.process_time() - started + facts['facts']['nanoseconds'] / 1e9)
    rows = [_row('ours: archive to Parquet', n_pages, n_bytes, facts['bytes'], min(times))]
    if peer:
      done = subprocess.run([peer, '-c', PEER, str(archive), str(peer_pages)], capture_output=True, text=True, check=True)
      n_bytes, texts, seconds = json.loads(done.stdout)
      rows.append(_row('warcio, trafilatura fast, JSON lines', min(peer_pages, n_pages), n_bytes, texts, seconds))
  return rows


def _row(name: str, n_pages: int, n_bytes: int, text_bytes: int, seconds: float) -> dict:
  return dict(name=name, pages=n_pages, mb=n_bytes / 1e6, mb_per_s=n_bytes / 1e6 / seconds,
              text_mb_per_s=text_bytes / 1e6 / seconds, pages_per_s=n_pages / seconds)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--peer', default='', help='a Python with warcio and trafilatura')
  parser.add_argument('--packages', default='python3.11-doc,postgresql-doc-15')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--peer_pages', type=int, default=200)
  arguments = parser.parse_args()
  print('| | pages | MB of HTML | MB/s/core | MB/s/core of text | pages/s/core |\n|---|---|---|---|---|---|')
  for row in measure(arguments.peer, arguments.packages.split(','), arguments.rounds, arguments.peer_pages):
    print('| {name} | {pages:,} | {mb:.1f} | {mb_per_s:.1f} | {text_mb_per_s:.1f} | {pages_per_s:.0f} |'.format(**row))


if __name__ == '__main__':
  main()
