"""Web archives and files as sources: what is read, and what damage costs. Archives, pages and files are made here."""

import collections
import functools
import gzip
import importlib.util
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import corpora
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastwarc.stream_io import BrotliWriter

from data_pipeline import build, shards
from data_pipeline.recipe import Limits, Raw, Recipe, Reject
from data_pipeline.sandbox import Sandbox
from data_pipeline.sources import files
from data_pipeline.sources.text import html_to_text
from data_pipeline.sources.text_files import TextFiles
from data_pipeline.sources.warc import Page, Warc
from tests.benchmarks import extraction

ROOT = Path(__file__).parents[1]
packed = functools.partial(gzip.compress, mtime=0)


def record(url: str, body: bytes, kind: str = 'response', http: str = 'Content-Type: text/html', status: int = 200) -> bytes:
  """A record of a WARC file."""
  block = body if kind == 'conversion' else f'HTTP/1.1 {status} OK\r\n{http}\r\n\r\n'.encode() + body
  of = 'text/plain' if kind == 'conversion' else f'application/http; msgtype={kind}'
  return (f'WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-05-01T10:00:00Z\r\n'
          f'Content-Type: {of}\r\nWARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\n'
          f'Content-Length: {len(block)}\r\n\r\n').encode() + block + b'\r\n\r\n'


def page(i: int) -> bytes:
  lines = corpora.made_up_text(i, 60).split('\n')
  return ('<!DOCTYPE html><html><head><title>T</title></head><body><nav>Menu</nav><div class="content">'
          + ''.join(f'<p>{line}</p>' for line in lines) + '</div></body></html>').encode()


def zstd(data: bytes) -> bytes:
  return pa.compress(data, codec='zstd', asbytes=True)


RECORDS = [record(f'http://host/{i}', page(i)) for i in range(5)]


def outcomes(source, tmp_path: Path, sandbox=None) -> list[tuple[str, str]]:
  """(url, text or reason in brackets) of all that a source reads."""
  found = []
  for unit in source.fetch(tmp_path):
    for one in source.read(unit):
      try:
        if not isinstance(one, Raw):
          raise Reject(one.reason)
        text = one.content if isinstance(one.content, str) else (sandbox or source).extract(one)[0]
      except Reject as reject:
        text = f'[{reject}]'
      found.append((one.url, text))
  return found


def read_warc(tmp_path: Path, data: bytes, **options) -> list[tuple[str, str]]:
  (tmp_path / 'a.warc').write_bytes(data)
  return outcomes(Warc(name='web', pattern=f'{tmp_path}/a.warc', **options), tmp_path)


# -- archives


PACKS = {'plain': b''.join, 'gzip': lambda records: b''.join(map(packed, records)),
         'one gzip': lambda records: packed(b''.join(records)), 'zstd': lambda records: b''.join(map(zstd, records))}


@pytest.mark.parametrize('pack', PACKS.values(), ids=PACKS)
def test_pages_of_an_archive_are_read_whatever_it_is_packed_with(tmp_path, pack):
  noise = [record('http://host/request', b'', 'request'), record('http://host/gone', page(1), status=404),
           record('http://host/image', b'\x89PNG', http='Content-Type: image/png')]
  (tmp_path / 'a.warc').write_bytes(pack([*RECORDS[:2], *noise, *RECORDS[2:]]))
  source = Warc(name='web', pattern=f'{tmp_path}/*.warc')
  unit, = source.fetch(tmp_path)
  assert unit.lineage == f'{tmp_path}/a.warc'
  found = list(source.read(unit))
  assert {one.url: one.reason for one in found if not isinstance(one, Raw)} == {
    'http://host/gone': 'HTTP status is not 200', 'http://host/image': 'not HTML'}
  pages = [one for one in found if isinstance(one, Raw)]
  for i, one in zip(range(5), pages, strict=True):
    assert (one.url, one.content, one.date) == (f'http://host/{i}', page(i), '2024-05-01')
  text, _ = source.extract(pages[3])
  assert text.split() == corpora.made_up_text(3, 60).split()


def test_the_texts_of_a_wet_file_are_taken_as_they_are(tmp_path):
  texts = ['Ein Text — mit allem.', 'and\nanother <p>']
  data = b''.join(record(f'http://host/{i}', text.encode(), 'conversion') for i, text in enumerate(texts))
  assert read_warc(tmp_path, data) == [('http://host/0', texts[0]), ('http://host/1', texts[1])]


@pytest.mark.parametrize('charset, meta, http', [
  ('utf-8', '', ''), ('utf-8', '', 'utf-8'), ('cp1251', '', 'windows-1251'), ('cp1251', 'windows-1251', ''),
  ('shift_jis', 'Shift_JIS', ''), ('cp1251', 'utf-8', 'windows-1251'), ('utf-8', '', 'no-such-charset'),
  ('gb18030', '', 'GB18030'), ('utf-16', '', ''),
  ('latin-1', '', 'iso-8859-1'), ('cp1251', '', '')], ids=lambda value: value or '-')
def test_the_charset_is_the_server_s_or_the_page_s_or_found_out(charset, meta, http):
  words = {'latin-1': 'déjà vu über Äpfel', 'shift_jis': '日本語の文章です。', 'gb18030': '这是中文的句子。'}
  text = words.get(charset, 'Съешь же ещё этих мягких французских булок, да выпей чаю. ')
  html = f'<html><head>{meta and f"<meta charset={meta}>"}</head><body><p>{text * 5}</p></body></html>'.encode(charset)
  assert html_to_text(html, main_content=True, charset=http) == (text * 5).strip()


def chunked(data: bytes) -> bytes:
  return b''.join(b'%x\r\n%s\r\n' % (len(part), part) for part in (data[:7], data[7:])) + b'0\r\n\r\n'


def brotli(data: bytes) -> bytes:
  stream = io.BytesIO()
  with BrotliWriter(stream) as writer:
    writer.write(data)
    writer.close()
    return stream.getvalue()


@pytest.mark.parametrize('encode, header', [
  (packed, 'Content-Encoding: gzip'), (zlib.compress, 'Content-Encoding: deflate'),
  (chunked, 'Transfer-Encoding: chunked'),
  (lambda data: chunked(packed(data)), 'Content-Encoding: gzip\r\nTransfer-Encoding: chunked'),
  (brotli, 'Content-Encoding: br'), (bytes, 'Content-Encoding: gzip\r\nTransfer-Encoding: chunked'),
  (bytes, 'Content-Encoding: br'), (bytes, 'Content-Encoding: deflate'), (packed, 'X-Other: 1')])
def test_encodings_of_the_way_are_undone_where_the_crawler_has_not(tmp_path, encode, header):
  data = record('http://host/', encode(page(3)), http=f'Content-Type: text/html; charset=utf-8\r\n{header}')
  (_, text), = read_warc(tmp_path, data)
  assert text.split() == corpora.made_up_text(3, 60).split()
  if encode is not bytes:
    damaged = encode(page(3))[:-20]
    (_, text), = read_warc(tmp_path, record('http://host/', damaged, http=f'Content-Type: text/html\r\n{header}'))
    assert text == '[damaged encoding]'


OVERWRITTEN = {'length': (b'Content-Length: ', b'Content-Length: x'),
               'negative': (b'Content-Length: ', b'Content-Length: -'), 'short': (b'Content-Length: ', b'Content-Length: 1'),
               'long': (b'Content-Length: ', b'Content-Length: 99999999999'),
               'absent': (b'Content-Length', b'Content-Longth'), 'version': (b'WARC/1.0', b'WERC/1.0'),
               'endless header': (b'WARC-Date', b'WARC-Data: ' + b'x' * (3 << 20) + b'\r\nWARC-Date'),
               'cut': None, 'flipped': None}


@pytest.mark.parametrize('compress', [bytes, packed, zstd], ids=['plain', 'gzip', 'zstd'])
@pytest.mark.parametrize('damage', OVERWRITTEN)
@pytest.mark.parametrize('where', [0, 1, 4])
def test_damage_costs_the_record_that_it_touches_and_is_counted(tmp_path, compress, damage, where):
  parts = [compress(one) for one in RECORDS]
  if OVERWRITTEN[damage]:
    parts[where] = compress(RECORDS[where].replace(*OVERWRITTEN[damage]))
  elif damage == 'cut':
    parts[where] = parts[where][:len(parts[where]) // 2]
  else:
    parts[where] = parts[where][:20] + b'\0\0\0\0' + parts[where][24:]
  found = read_warc(tmp_path, b''.join(parts))
  pages = [url for url, text in found if not text.startswith('[')]
  if damage == 'flipped' and compress is bytes:  # in the name of a header: the record is as it was
    return
  assert [url for url in pages if url != f'http://host/{where}'] == [f'http://host/{i}' for i in range(5) if i != where]
  assert len(pages) == len(set(pages)) and any(text.startswith('[') for _, text in found), found


def test_where_an_archive_ends_too_soon_is_told_wherever_that_is(tmp_path):
  whole = b''.join(map(packed, RECORDS))
  starts = [0, *itertools.accumulate(len(packed(one)) for one in RECORDS)]
  for end in range(1, len(whole), 37):
    found = read_warc(tmp_path, whole[:end])
    complete = sum(start <= end for start in starts) - 1
    pages = [text for _, text in found if not text.startswith('[')]
    assert complete <= len(pages) <= complete + (end + 12 > starts[complete + 1])  # all of it but the end of its packing
    assert any(text.startswith('[') for _, text in found) == (end not in starts), (end, found)


def test_empty_files_and_files_of_something_else_are_counted(tmp_path):
  assert read_warc(tmp_path, b'') == [(f'{tmp_path}/a.warc', '[empty file]')]
  for start in (b'', b'\x1f\x8b\x08', b'WARC/1.0\r\n', b'\x28\xb5\x2f\xfd'):
    found = read_warc(tmp_path, start + random.Random(0).randbytes(200_000))
    assert found and all(text.startswith('[') for _, text in found)


# -- what is too large

_LIMITED = '''
import resource, sys
from data_pipeline.recipe import Limits
from data_pipeline.sources.{module} import {name}
source = {name}(name='x', pattern=sys.argv[1])
units = source.fetch(None)
resource.setrlimit(resource.RLIMIT_AS, ((1 << 30) + 3 * source.limits.max_bytes,) * 2)  # with libraries
for unit in units:
  for one in source.read(unit):
    print(one.url.rsplit('/')[-1], getattr(one, 'reason', 'read'), flush=True)
'''


def read_in_little_memory(source, path: Path) -> list[str]:
  code = _LIMITED.format(module=source.__module__.rsplit('.')[-1], name=source.__name__)
  done = subprocess.run([sys.executable, '-c', code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def zeros(size: int, head: bytes, tail: bytes, wbits: int = 31) -> bytes:
  """gzip of head, `size` zeros and tail."""
  packer, block = zlib.compressobj(1, wbits=wbits), b'0' * (1 << 20)
  return b''.join([packer.compress(head), *(packer.compress(block) for _ in range(size >> 20)), packer.compress(tail),
                   packer.flush()])


def test_a_record_of_two_gigabytes_is_passed_by(tmp_path):
  head, _, _ = record('http://host/bomb', b'').partition(b'Content-Length: ')
  http = b'HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n'
  head += f'Content-Length: {len(http) + (2 << 30)}\r\n\r\n'.encode() + http
  bomb = zeros(2 << 30, head, b'\r\n\r\n')
  (tmp_path / 'a.warc.gz').write_bytes(packed(RECORDS[0]) + bomb + packed(RECORDS[1]))
  assert read_in_little_memory(Warc, tmp_path / 'a.warc.gz') == ['0 read', 'bomb too large', '1 read']


def test_a_response_that_unpacks_to_gigabytes_is_left_out(tmp_path):
  bomb = Page('http://host/', zeros(1 << 30, b'<p>', b''), encoding=', gzip')
  with Sandbox(source := Warc(name='x', pattern=''), source.limits) as sandbox, pytest.raises(Reject, match='too large'):
    sandbox.extract(bomb)


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_a_line_of_500_megabytes_is_passed_by(tmp_path, suffix):
  path = tmp_path / f'a.jsonl{suffix}'
  first, last = b'{"text": "first", "url": "a"}\n{"text": "', b'"}\n{"text": "last", "url": "b"}'
  if suffix:
    path.write_bytes(zeros(500 << 20, first, last))
  else:
    with open(path, 'wb') as file:
      file.write(first)
      for _ in range(500):
        file.write(b'0' * (1 << 20))
      file.write(last)
  assert read_in_little_memory(TextFiles, path) == ['a read', f'a.jsonl{suffix}#2 too large', 'b read']


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_a_document_of_500_megabytes_is_passed_by(tmp_path, suffix):
  path = tmp_path / f'a.txt{suffix}'
  if suffix:
    path.write_bytes(zeros(500 << 20, b'', b''))
  else:
    path.touch()
    os.truncate(path, 500 << 20)
  assert read_in_little_memory(TextFiles, path) == [f'a.txt{suffix} too large']


# -- files


def test_files_of_every_kind_are_read(tmp_path):
  lines = '{"text": "first", "date": "2024-05-01T10:00:00Z"}\n\n{"text": "second", "url": "u", "date": 1700000000}\n'
  contents = {
    'a.jsonl': lines.encode(), 'b.jsonl.gz': packed(lines.encode()), 'c.jsonl.zst': zstd(lines.encode()),
    'd.txt': 'één'.encode(), 'e.txt.gz': packed(b'packed'), 'f.md.zst': zstd(b'# also'), 'g.html': b'<p>page</p>',
    'h.HTM.gz': packed(b'<p>packed page</p>'), 'i.txt': 'é'.encode('utf-16'), 'j.txt': b'\xef\xbb\xbfmarked'}
  for name, data in contents.items():
    (tmp_path / name).write_bytes(data)
  found = dict(outcomes(TextFiles(name='mine', pattern=f'{tmp_path}/*'), tmp_path))
  assert {url.removeprefix(f'{tmp_path}/'): text for url, text in found.items() if url != 'u'} == {
    'a.jsonl#1': 'first', 'b.jsonl.gz#1': 'first', 'c.jsonl.zst#1': 'first', 'd.txt': 'één', 'e.txt.gz': 'packed',
    'f.md.zst': '# also',
    'g.html': 'page', 'h.HTM.gz': 'packed page', 'i.txt': 'é', 'j.txt': 'marked'}
  table = {'content': ['third', 'fourth'], 'link': ['u', None], 'day': pa.array([0, 0], pa.timestamp('s'))}
  pq.write_table(pa.table(table), tmp_path / 'k.parquet')
  source = TextFiles(name='mine', pattern=f'{tmp_path}/k.parquet', text='content', url='link', date='day')
  unit, = source.fetch(tmp_path)
  place = f'{tmp_path}/k.parquet#2'
  assert list(source.read(unit)) == [Raw('u', 'third', '1970-01-01'), Raw(place, 'fourth', '1970-01-01')]
  source = TextFiles(name='mine', pattern=f'{tmp_path}/a.jsonl')
  assert [raw.date for raw in source.read(source.fetch(tmp_path)[0])] == ['2024-05-01', '']


def test_lines_and_rows_that_are_no_documents_are_counted_and_the_rest_is_read(tmp_path):
  no_text = "no field 'text'"
  bad = {b'{': 'not JSON', b'[1]': 'not JSON', b'[' * 100_000: 'not JSON', b'{"text": "\xff"}': 'not utf-8',
         b'\0': 'not JSON', b'{"txt": 1}': no_text, b'{"text": null}': no_text, b'{"text": ["a"]}': no_text}
  lines = b''.join(b'{"text": "good", "url": "\\ud800"}\n' + line + b'\n' for line in bad)
  (tmp_path / 'a.jsonl').write_bytes(lines + b'{"text": "last"}')
  found = outcomes(TextFiles(name='mine', pattern=f'{tmp_path}/a.jsonl'), tmp_path)
  assert [text for _, text in found] == [text for reason in bad.values() for text in ('good', f'[{reason}]')] + ['last']
  assert found[0][0] == '?'  # what cannot be written in utf-8

  cells = pa.array([b'good', b'\xff\xfe', None, b'last'], pa.binary())
  strings = pa.StringArray.from_buffers(4, cells.buffers()[1], cells.buffers()[2], cells.buffers()[0])
  for column in (cells, strings):
    pq.write_table(pa.table({'text': column}), tmp_path / 'b.parquet')
    found = outcomes(TextFiles(name='mine', pattern=f'{tmp_path}/b.parquet'), tmp_path)
    assert [text for _, text in found] == ['good', '[not utf-8]', "[no field 'text']", 'last']


@pytest.mark.parametrize('name, data, texts', [
  ('a.txt', b'', ['[empty file]']), ('a.jsonl', b'', ['[empty file]']), ('a.txt.gz', b'text', ['[damaged]']),
  ('a.txt', b'\xff\xf0' * 100, ['[not utf-8]']), ('a.txt', b'x' * 300 + b'\xff', ['x' * 300 + '\ufffd']),
  ('a.txt.gz', packed(b'text')[:-3], ['[cut short]']), ('a.txt.zst', zstd(b'text')[:-3], ['[cut short]']),
  ('a.jsonl.gz', packed(b'{"text": "a"}\n' * 9)[:-3], ['a'] * 9 + ['[cut short]']),
  ('a.parquet', b'PAR1' + bytes(50), ['[damaged]']), ('a.parquet', b'PAR1', ['[damaged]'])])
def test_a_damaged_file_is_read_as_far_as_it_goes_and_counted(tmp_path, name, data, texts):
  (tmp_path / name).write_bytes(data)
  found = [text for _, text in outcomes(TextFiles(name='mine', pattern=f'{tmp_path}/*'), tmp_path)]
  assert found[-1] == texts[-1] and (found == texts or set(found[:-1]) <= {'a'})


def test_an_error_of_the_disk_is_no_property_of_the_document():
  with pytest.raises(OSError, match='Input/output'):
    files.damage(OSError(5, 'Input/output error'))
  assert files.damage(OSError('Truncated compressed stream')) == 'cut short'


def test_files_at_a_url_are_read_like_those_here(tmp_path):
  (tmp_path / 'a.warc.gz').write_bytes(b''.join(map(packed, RECORDS)))
  (tmp_path / 'b.jsonl').write_text('{"text": "first", "url": "u"}\n')
  for path in tmp_path.iterdir():
    with fsspec.open(f'memory://web/{path.name}', 'wb') as file:
      file.write(path.read_bytes())
  for here, there in ((f'{tmp_path}/*.warc.gz', 'memory://web/*.warc.gz'), (f'{tmp_path}/*.jsonl', 'memory://web/*.jsonl')):
    kind = Warc if 'warc' in here else TextFiles
    source = kind(name='web', pattern=there)
    assert outcomes(source, tmp_path) == outcomes(kind(name='web', pattern=here), tmp_path)
    before = source.state()
    assert before == source.state()
    with fsspec.open(there.replace('*', 'new'), 'wb') as file:
      file.write(b'x')
    assert source.state() != before
  for pattern, why in (('memory://none/*', 'no file matches'), ('nowhere://a/*', 'Protocol not known')):
    with pytest.raises(ValueError, match=why):
      Warc(name='web', pattern=pattern).fetch(tmp_path)


def test_files_of_a_web_server_are_read(tmp_path):
  pytest.importorskip('aiohttp')
  for i in range(3):
    (tmp_path / f'{i}.html').write_bytes(page(i))
  server = subprocess.Popen([sys.executable, '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1', '-d', str(tmp_path)],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  port = re.search(r'port (\d+)', server.stdout.readline())[1]
  try:
    source = TextFiles(name='pages', pattern=f'http://127.0.0.1:{port}/*.html', main_content=True)
    found = outcomes(source, tmp_path)
    assert [text.split() for _, text in found] == [corpora.made_up_text(i, 60).split() for i in range(3)]
    assert [url.rsplit('/')[-1] for url, _ in found] == ['0.html', '1.html', '2.html']
  finally:
    server.kill()
    server.communicate()


def test_small_files_share_a_shard_and_large_ones_do_not(tmp_path):
  for i in range(10):
    (tmp_path / f'{i}.warc').touch()
    os.truncate(tmp_path / f'{i}.warc', 100 << 20 if i != 4 else 300 << 20)
  units = Warc(name='web', pattern=f'{tmp_path}/*').fetch(tmp_path)
  assert [''.join(Path(path).stem for path in unit.paths) for unit in units] == ['01', '23', '4', '56', '78', '9']


# -- pages


def test_a_page_that_the_crawler_has_cut_is_kept_and_counted(tmp_path):
  data = record('http://host/', page(1)[:-200]).replace(b'WARC-Date', b'WARC-Truncated: length\r\nWARC-Date')
  (tmp_path / 'a.warc').write_bytes(data)
  source = Warc(name='web', pattern=f'{tmp_path}/a.warc')
  one, = source.read(source.fetch(tmp_path)[0])
  text, counts = source.extract(one)
  assert text.split() == corpora.made_up_text(1, 60).split()[:len(text.split())]
  assert counts == {'cut short by the crawler': 1}


def test_main_content_keeps_lists_of_text_and_drops_lists_of_links():
  links = ''.join(f'<li><a href="/{i}">Another page {i}</a></li>' for i in range(9))
  items = ''.join(f'<li>item {i} has <a href="x">one</a> link<ul><li>under {i}</li></ul></li>' for i in range(9))
  html = f'<body><div class="sidebar">aside</div><ul>{links}</ul><p>{"Some words. " * 9}</p><UL>{items}</UL></body>'
  text = html_to_text(html.encode(), True)
  assert 'Another page' not in text and 'aside' not in text
  assert all(f'• item {i} has one link' in text and f'• under {i}' in text for i in range(9))
  for broken in (b'<ul>' * 50 + b'words of a list', b'</ul></ul><p>words of a list', b'<ul><li>words of a list</ul></ul><u'):
    assert 'words of a list' in html_to_text(broken) and isinstance(html_to_text(broken, True), str)


@pytest.mark.slow
def test_text_of_real_pages_is_nearer_to_their_source_than_a_peer_s():
  peer = sys.executable if importlib.util.find_spec('trafilatura') else ''
  marked, unmarked, whole, *peers = extraction.measure(peer, every=4)
  assert marked['f1'] > 0.96 and unmarked['f1'] > 0.95 and whole['recall'] > 0.995 and marked['recall'] > 0.98
  assert all(row['f1'] < marked['f1'] for row in peers)


def bad_inputs(folder: Path) -> Recipe:
  """A recipe of archives and files, many of them damaged."""
  folder.mkdir()
  gz = [packed(record(f'http://host/{i}', page(i))) for i in range(60)]
  (folder / 'a.warc.gz').write_bytes(b''.join(gz[:20]) + gz[20][:100] + b''.join(gz[21:40]))
  (folder / 'b.warc.gz').write_bytes(b''.join(gz[40:])[:-50])
  (folder / 'c.warc.gz').write_bytes(b'')
  (folder / 'd.warc').write_bytes(b'nothing of the kind')
  lines = [json.dumps({'text': corpora.made_up_text(100 + i, 80)}) + '\n{"text": 1}\n' for i in range(30)]
  (folder / 'a.jsonl').write_text(''.join(lines))
  (folder / 'b.txt').write_bytes(b'\xff' * 1000)
  sources = Warc(name='web', pattern=f'{folder}/*.warc*'), TextFiles(name='files', pattern=f'{folder}/*.[jt]*')
  return Recipe(name='bad', sources=sources, vocab_size=400, seq_lens=(64,), validation_fraction=0.1, min_bytes=20)


def test_a_build_goes_on_past_damage_and_says_what_it_left_out(tmp_path, capsys):
  recipe = bad_inputs(tmp_path / 'in')
  out = build.build(recipe, tmp_path / 'out', workers=2)
  said = capsys.readouterr().err
  sources = shards.read_manifest(out)['sources']
  assert sum(sources['web']['documents'].values()) == 58 and sum(sources['files']['documents'].values()) == 30
  for line in ('1 empty file', '1 cut short', "30 no field 'text'", '1 not utf-8', '2 damaged'):
    assert re.search(rf'left out +{line}', said), (line, said)
  assert corpora.files_of(build.build(recipe, tmp_path / 'again', workers=1)) == corpora.files_of(out)


def mutated(data: bytes, chance: random.Random) -> bytes:
  """Data with a few bytes, stretches or numbers of it changed."""
  data = bytearray(data)
  for _ in range(chance.choice((1, 1, 2, 5, 40))):
    at, n = chance.randrange(len(data) + 1), chance.choice((1, 2, 16, 300))
    kind = chance.randrange(7)
    if kind == 0:
      data[at:at + n] = b''
    elif kind == 1:
      data[at:at] = chance.randbytes(n)
    elif kind == 2:
      data[at:at + 1] = bytes([chance.randrange(256)])
    elif kind == 3:
      data[at:at] = data[chance.randrange(len(data) + 1):][:n * 20]
    elif kind == 4:
      del data[at:]
    elif kind == 5:
      data[at:at] = chance.choice((
        b'<', b'<ul>' * n, b'<div>' * n * 10, b'<!--', b'<script>', b'&#x110000;', b'\0' * n, b'\r\n\r\n',
        b'<table><td>' * n, b'WARC/1.0\r\n', b'\x1f\x8b\x08', b'<a href="', b'\xf0\x9f', b'</ul>' * n, b'<svg><math>' * n))
    elif numbers := list(re.finditer(rb'\d+', data)):
      number = chance.choice(numbers)
      data[slice(*number.span())] = chance.choice((b'0', b'-1', b'4294967296', b'18446744073709551616', b'9' * 40, b'1'))
  return bytes(data)


def fuzz(n: int, tmp_path: Path, cap_seconds: float = 10) -> collections.Counter:
  """Outcomes of n mutated files, each read by its source and extracted in a sandbox. Nothing but Reject may come out."""
  html, chance, counts = [page(i) for i in range(5)], random.Random(5), collections.Counter()
  html.append(b'<html><head><meta charset="utf-8"></head><body><main><ul><li>one <a href="x">two</a></ul>'
              b'<table><tr><td>x</table><pre>code</pre><form><input></form></main></body></html>' * 3)
  extra = [record('http://host/gz', packed(html[1]), http='Content-Type: text/html\r\nContent-Encoding: gzip'),
           record('http://host/br', brotli(html[1]), http='Content-Type: text/html\r\nContent-Encoding: br'),
           record('http://host/ch', chunked(html[1]), http='Content-Type: text/html\r\nTransfer-Encoding: chunked'),
           record('http://host/wet', 'Wörter'.encode(), 'conversion')]
  lines = b''.join(json.dumps({'text': corpora.made_up_text(i, 9), 'date': '2024-01-01'}).encode() + b'\n' for i in range(9))
  sink = io.BytesIO()
  pq.write_table(pa.table({'text': [corpora.made_up_text(i, 9) for i in range(9)], 'url': ['u'] * 9}), sink)
  inputs = {'a.warc': [b''.join(RECORDS[:3] + extra)], 'a.warc.gz': [b''.join(map(packed, RECORDS[:3] + extra))],
            'b.warc.zst': [b''.join(map(zstd, RECORDS[:3] + extra))], 'a.html': html, 'a.jsonl': [lines],
            'a.jsonl.gz': [packed(lines)], 'a.jsonl.zst': [zstd(lines)], 'a.parquet': [sink.getvalue()]}
  weights = (4, 4, 1, 6, 1, 1, 1, 1)
  limits = Limits(max_bytes=8 << 20, cpu_seconds=5, wall_seconds=8)
  sources = {name: (Warc if 'warc' in name else TextFiles)(
    name='fuzz', pattern=str(tmp_path / name), limits=limits, main_content=True) for name in inputs}
  with Sandbox(sources['a.warc'], limits) as warc, Sandbox(sources['a.html'], limits) as text:
    for name in chance.choices(list(inputs), weights, k=n):
      (tmp_path / name).write_bytes(mutated(chance.choice(inputs[name]), chance) or b' ')
      started = time.monotonic()
      found = outcomes(sources[name], tmp_path, warc if 'warc' in name else text)
      assert time.monotonic() - started < cap_seconds * (1 + len(found))
      for url, text_ in found:
        pa.array([url, text_.encode('utf-8', 'ignore').decode()])  # can be written
        counts[re.sub(r' .*', '', name) + ' ' + (text_ if re.fullmatch(r'\[[^\]\n]{,40}\]', text_) else 'text')] += 1
      (tmp_path / name).unlink()
  return counts


def test_no_mutated_file_ends_a_build(tmp_path):
  counts = fuzz(400, tmp_path)
  assert sum(n for name, n in counts.items() if name.endswith('text')) > 200 and len(counts) > 20


@pytest.mark.slow
def test_no_mutated_file_of_10_000_ends_a_build(tmp_path):
  counts = fuzz(10_000, tmp_path)
  print('\n'.join(f'{count:7,} {name}' for name, count in sorted(counts.items())))
  assert sum(count for name, count in counts.items() if name.endswith('text')) > 5000
