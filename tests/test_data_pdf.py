"""PDFs: what their pages say, in the order in which people read; which pages need OCR; what hostile files cost."""

import base64
import collections
import dataclasses
import gzip
import http.server
import json
import random
import shutil
import subprocess
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, shards
from data_pipeline.recipe import Limits, Raw, Recipe, Reject, SourceUnavailable
from data_pipeline.sandbox import Sandbox
from data_pipeline.sources import ocr, pdf_pages
from data_pipeline.sources.ocr import Endpoint, RapidOcr, Tesseract
from data_pipeline.sources.pdf import DebianPdfs, Pdfs, Scanned, as_images
from tests import pdfs
from tests.pdfs import COURIER, Sheet, make_pdf

needs_tesseract = pytest.mark.skipif(shutil.which('tesseract') is None, reason='apt-get install tesseract-ocr')


def extract(data: bytes, reader=None, dpi=200, **limits) -> tuple[str, dict]:
  return pdf_pages.extract(data, reader, dpi, **({'max_pages': 100, 'max_ocr_pages': 10} | limits))


def scan_of(sheet: Sheet, dpi: float = 150) -> np.ndarray:
  with pdf_pages.opened(make_pdf([sheet])) as document:
    return pdf_pages.drawn(document[0], dpi)[0].to_numpy().copy()


# -- what a page says


@pytest.mark.parametrize('seed', range(8))
def test_justified_and_hyphenated_paragraphs_come_out_as_they_were_written(seed):
  sheet, text = pdfs.prose(seed, hyphenate=True)
  assert sum('-)' in operation for operation in sheet.operations) > 0
  counts = {'pages': 1, 'pages_ocr': 0, 'pages_empty': 0, 'pages_lost': 0, 'running_lines': 0}
  assert extract(make_pdf([sheet])) == (text, counts)


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('seed', range(4))
def test_columns_are_read_one_after_the_other_in_whatever_order_the_file_has_them(seed, interleaved):
  sheet, text = pdfs.two_columns(seed, interleaved)
  assert extract(make_pdf([sheet]))[0] == text


def test_a_table_is_read_by_rows_and_an_index_by_columns():
  table, index = Sheet(), Sheet()
  for i in range(12):
    for x, text in ((72, f'name {i}'), (250, f'{i * 37 % 100}'), (400, f'{i * 11 % 7} of 9')):
      table.line(x, 100 + 14 * i, text)
  for x, letter in ((72, 'a'), (330, 'b')):
    for i in range(12):
      index.line(x, 100 + 14 * i, f'{letter}{"lmnopqrstuvw"[i]}e, {i + 10}')
  assert extract(make_pdf([table]))[0].split('\n')[:2] == ['name 0 0 0 of 9', 'name 1 37 4 of 9']
  assert extract(make_pdf([index]))[0].split()[:4] == ['ale,', '10', 'ame,', '11']


def test_running_lines_go_and_a_sentence_goes_on_over_the_page():
  paragraphs, sheets = pdfs.english(5, 4, 220), []
  words = ' '.join(paragraphs).split()
  for page in range(4):
    sheet = Sheet()
    sheet.line(72, 40, 'On names and values' if page % 2 else f'Chapter {page}', size=9)
    part = words[page * 220:(page + 1) * 220]
    pdfs.set_paragraph(sheet, 72, 90, 468, ' '.join(part))
    sheet.line(300, 760, f'{page + 17}', size=9)
    sheets.append(sheet)
  text, counts = extract(make_pdf(sheets))
  assert counts['running_lines'] == 8 and 'Chapter' not in text and 'On names' not in text
  assert text.split() == words


def test_a_compound_keeps_its_hyphen_at_the_end_of_a_line_if_the_document_has_it_elsewhere():
  sheet = Sheet()
  lines = ['a well-known word that is written here so that it is seen', 'again at the end of this line, where it is well-',
           'known that a hyphen may be of the word, or only of the li-', 'ne. This is the end of the paragraph.']
  for i, line in enumerate(lines):
    sheet.line(72, 100 + 12 * i, line, justify=300 if i < 3 else 0)
  text, _ = extract(make_pdf([sheet]))
  assert 'is well-known that' in text and 'of the line.' in text


def test_code_keeps_its_lines_and_its_indentation():
  sheet, code = Sheet(), 'def f(x):\n  if x:\n    return x + 1  # one\n  return 0'
  y = pdfs.set_paragraph(sheet, 72, 100, 468, pdfs.english(2, 1)[0])
  for line in code.split('\n'):
    bare = line.lstrip()
    sheet.line(72 + 6 * (len(line) - len(bare)), y, bare, font=COURIER)
    y += 12
  assert code in extract(make_pdf([sheet]))[0]


@pytest.mark.parametrize('turn', [90, 270])
def test_a_page_that_is_set_sideways_is_read_and_a_watermark_is_not(turn):
  sheet, paragraph = Sheet(), pdfs.english(3, 1, 120)[0]
  flat = Sheet()
  pdfs.set_paragraph(flat, 0, 100, 468, paragraph)
  lines = [operation.split('Tm (')[1].removesuffix(') Tj ET') for operation in flat.operations]
  for i, line in enumerate(lines):
    x, y = (100 + 12 * i, 700) if turn == 90 else (500 - 12 * i, 100)
    sheet.line(x, y, line, turn=turn)
  sheet.line(100, 600, 'DRAFT', size=90, turn=45)
  assert extract(make_pdf([sheet]))[0].split() == paragraph.split()


# -- which pages need OCR


def pages_of_all_kinds() -> dict[str, tuple[Sheet, str]]:
  """name -> (page, the right route)."""
  prose, short, blank = pdfs.prose(1)[0], Sheet(), Sheet()
  pdfs.set_paragraph(short, 72, 90, 468, pdfs.english(7, 1, 40)[0])
  kinds = {'prose': (prose, 'text'), 'the end of a chapter': (short, 'text'), 'nothing': (blank, 'empty')}
  scan = scan_of(prose)
  noise = np.random.default_rng(0).integers(215, 256, scan.shape).astype(np.uint8)

  def page(right: str, image=None, text=(), rotate=0, **picture) -> tuple[Sheet, str]:
    sheet = Sheet(rotate=rotate)
    if image is not None:
      sheet.picture(image, **picture)
    for x, y, words, how in text:
      sheet.line(x, y, words, **how)
    return sheet, right

  lines = [(72, 90 + 12 * i, paragraph[:90], {}) for i, paragraph in enumerate(pdfs.english(4, 45))]
  set_in = lambda **how: [(*line, words, how) for *line, words, _ in lines]
  specks = noise.copy()
  specks[np.random.default_rng(1).random(specks.shape) < 1e-4] = 0
  outlined = Sheet()
  for y in range(90, 700, 14):
    outlined.operations += [f'{72 + 6 * i} {y} m {75 + 6 * i} {y + 7} l {77 + 6 * i} {y + (3 * i) % 7} l S'
                            for i in range(75)]
  return kinds | {
    'a title': page('text', None, [(90, 400, 'On names and values', {'size': 30})]),
    'a scan': page('image', scan), 'a grey scan': page('image', np.minimum(scan, noise)),
    'a scan that is turned': page('image', np.rot90(scan).copy(), rotate=90),
    'a scan with a stamp': page('image', scan, [(72, 780, 'Downloaded from an archive on 1 May 2020', {})]),
    'a scan with a page number': page('image', scan, [(300, 780, '17', {})]),
    'a scan with a good layer': page('text', scan, set_in(invisible=True)),
    'a scan with a layer that is a cipher': page('garbage', scan, set_in(invisible=True, font=pdfs.CIPHER)),
    'a scan of nothing': page('empty', noise),
    'a scan of nothing with specks': page('empty', specks),
    'no meaning': page('garbage', None, set_in(font=pdfs.UNMAPPED)),
    'a cipher': page('garbage', None, set_in(font=pdfs.CIPHER)),
    'code': page('text', None, set_in(font=COURIER)),
    'numbers': page('text', None, [(72 + 60 * j, 90 + 14 * i, f'{i * j * 37 % 1000}', {})
                                   for i in range(40) for j in range(7)]),
    'text and a photograph': page('text', noise // 2, lines[:25], x=72, y=420, width=300, height=300),
    'letters as drawings': (outlined, 'image')}


def test_the_route_of_each_kind_of_page():
  kinds = pages_of_all_kinds()
  with pdf_pages.opened(make_pdf([sheet for sheet, _ in kinds.values()])) as document:
    found = [pdf_pages.route(page, pdf_pages.text_layer(page)) for page in document]
  wrong = {name: (route, right) for (name, (_, right)), route in zip(kinds.items(), found) if route != right}
  assert not wrong


TEXTS = {
  'German': 'Wer einen langen Text liest, der fragt nach dem Sinn der Worte und nicht nach den Zeichen; doch ohne die '
            'Zeichen '
            'gäbe es keine Worte, und darum ist es gut, dass sie auf jeder Seite stehen, wo sie hingehören.',
  'Finnish': 'Tämä on pitkä lause, jonka kirjaimet ovat niin kuin suomen kielessä on tavallista, ja siinä sanotaan, '
             'että talossa on monta huonetta ja pihalla kasvaa vanhoja puita, joiden alla lapset leikkivät kesällä.',
  'Polish': 'To jest długie zdanie, w którym litery są takie, jak to bywa w języku polskim, i mówi ono, że w tym domu jest '
            'wiele pokojów, a przed domem rosną stare drzewa, pod którymi dzieci bawią się latem od rana do wieczora.',
  'code': 'def f(self, x):\n return self.items[x] if x in self.items else None\n'
          'for i in range(10):\n print(i, f(i), sum(map(int, y)))'}


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS)
def test_other_languages_and_code_are_no_ciphers(text):
  codes = lambda text: np.array([ord(character) for character in 3 * text if character > ' '], np.uint32)
  assert pdf_pages.reads_like_a_language(codes(text))
  shift = lambda by: ''.join(chr((ord(c) - 97 + by) % 26 + 97) if 'a' <= c <= 'z' else c for c in text.lower())
  assert sum(pdf_pages.reads_like_a_language(codes(shift(by))) for by in range(1, 26)) <= 2


# -- OCR


@needs_tesseract
def test_a_scan_is_read_by_tesseract_on_one_core_and_the_stamp_on_it_does_not_hinder():
  sheet, text = pdfs.two_columns(1)
  scan = Sheet()
  scan.picture(scan_of(sheet, 200))
  scan.line(72, 785, 'Downloaded from an archive on 1 May 2020', size=8)
  found, counts = extract(make_pdf([scan, Sheet(), pdfs.prose(3)[0]]), Tesseract())
  assert counts == {'pages': 3, 'pages_ocr': 1, 'pages_empty': 1, 'pages_lost': 0, 'running_lines': 0}
  assert pdfs.error_rate(found, f'{text} Downloaded from an archive on 1 May 2020 {pdfs.prose(3)[1]}') < 0.01
  assert Tesseract().state().startswith('tesseract 5')


@needs_tesseract
def test_a_cipher_gives_way_to_what_is_seen_and_a_drawing_to_nothing():
  cipher, drawing, text = Sheet(), Sheet(), ' '.join(pdfs.english(4, 4))
  pdfs.set_paragraph(cipher, 72, 100, 468, text, font=pdfs.CIPHER)
  drawing.operations += [f'{i} 0 0 {i} 300 400 cm 0 0 m 1 1 2 3 4 1 c S' for i in (20, 2, 3)]
  found, counts = extract(make_pdf([cipher, drawing]), Tesseract())
  assert pdfs.error_rate(found, text) < 0.01 and counts['pages_ocr'] == 1 and counts['pages_lost'] == 0


def test_rapidocr_reads_a_scan():
  pytest.importorskip('rapidocr_onnxruntime')
  sheet = Sheet(width=400, height=200)
  pdfs.set_paragraph(sheet, 40, 60, 320, text := pdfs.english(6, 1, 30)[0], size=12)
  found = RapidOcr().read(scan_of(sheet), 150)
  assert pdfs.error_rate(''.join(line.text for line in found).replace(' ', ''), text.replace(' ', '')) < 0.05
  assert all(30 < line.left < line.right < 370 and 40 < line.top < line.bottom < 150 for line in found)


@needs_tesseract
def test_what_is_missing_is_said_before_anything_is_read(monkeypatch, tmp_path):
  (tmp_path / 'a.pdf').write_bytes(make_pdf([Sheet()]))
  source = lambda reader: Pdfs(name='p', pattern=f'{tmp_path}/*.pdf', ocr=reader)
  with pytest.raises(SourceUnavailable, match='apt-get install tesseract-ocr-xyz'):
    source(Tesseract(language='xyz')).fetch(tmp_path)
  with pytest.raises(ValueError, match='no file matches'):
    Pdfs(name='p', pattern=f'{tmp_path}/*.none').fetch(tmp_path)
  monkeypatch.setattr(ocr.shutil, 'which', lambda name: None)
  ocr._tesseract_version.cache_clear()
  assert source(None).fetch(tmp_path) and 'none' in source(Tesseract()).state()
  with pytest.raises(SourceUnavailable, match='apt-get install tesseract-ocr '):
    source(Tesseract()).fetch(tmp_path)
  ocr._tesseract_version.cache_clear()


@pytest.fixture
def server():
  """An OpenAI-compatible server of a model that sees: it reads the picture with tesseract. `plan`: a status, or what it says
  instead, for each request to come; `seen`: the requests."""
  plan, seen = [], []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.answer(200 if self.path == '/v1/models' else 404, {'data': [{'id': 'eyes'}]})

    def do_POST(self):
      question = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      seen.append((self.path, self.headers['Authorization'], question['model']))
      planned = plan.pop(0) if plan else 200
      if not isinstance(planned, int):
        return self.answer(200, planned)
      if planned != 200:
        return self.answer(planned, {'error': {'message': 'no'}})
      picture = question['messages'][0]['content'][1]['image_url']['url'].removeprefix('data:image/png;base64,')
      done = subprocess.run(['tesseract', 'stdin', 'stdout', '--dpi', '200'], input=base64.b64decode(picture),
                            capture_output=True, check=True)
      return self.answer(200, {'choices': [{'message': {'content': done.stdout.decode()}, 'finish_reason': 'stop'}]})

    def answer(self, status, value):
      data = json.dumps(value).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)

    def log_message(self, *arguments):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/v1', plan, seen
    httpd.shutdown()


@needs_tesseract
def test_an_endpoint_reads_pages_and_is_asked_again_when_it_is_busy(server, tmp_path, monkeypatch):
  url, plan, seen = server
  monkeypatch.setattr(ocr.time, 'sleep', lambda seconds: None)
  (tmp_path / 'key').write_text('k3y\n')
  endpoint = Endpoint(url=url, model='eyes', key_file=str(tmp_path / 'key'))
  endpoint.check()
  sheet, text = pdfs.prose(2, 2)
  scan = as_images(make_pdf([sheet]), 1, 200)
  plan += [503, 429]
  found, counts = extract(scan, endpoint)
  assert pdfs.error_rate(found, text) < 0.01 and counts['pages_ocr'] == 1
  assert seen == [('/v1/chat/completions', 'Bearer k3y', 'eyes')] * 3
  cut_off = {'choices': [{'message': {'content': 'half a'}, 'finish_reason': 'length'}]}
  for answer in (400, cut_off, {'choices': []}, [1]):
    plan.append(answer)
    with pytest.raises(Reject, match='pages cannot be read'):
      extract(scan, endpoint)


def test_an_endpoint_that_is_dead_ends_the_build_and_loses_no_document(server, tmp_path):
  url, plan, _ = server
  (tmp_path / 'a.pdf').write_bytes(as_images(make_pdf([pdfs.prose(2, 2)[0]]), 1, 100))
  source = Pdfs(name='p', pattern=f'{tmp_path}/*.pdf', ocr=Endpoint(url=url, model='eyes'))
  raw, = source.read(*source.fetch(tmp_path))
  plan.append(401)
  with Sandbox(source, source.limits) as sandbox, pytest.raises(OSError, match='does not answer .401'):
    sandbox.extract(raw)
  with pytest.raises(SourceUnavailable, match='does not answer'):
    Endpoint(url=url.replace('/v1', '/none'), model='eyes').check()


# -- what hostile files cost


def test_reasons_for_which_a_document_is_left_out():
  good, scan = make_pdf([pdfs.prose(1)[0]] * 3), as_images(make_pdf([pdfs.prose(1)[0]]), 1, 72)
  for reason, data, how in [
    ('encrypted', make_pdf([Sheet()], 'secret'), {}), ('not a PDF that can be read', b'', {}),
    ('not a PDF that can be read', good[:40], {}),
    ('too many pages', good, {'max_pages': 2}), ('no text layer', scan, {}),
    ('too many pages without a text layer', scan, {'reader': Tesseract(), 'max_ocr_pages': 0})]:
    with pytest.raises(Reject) as caught:
      extract(data, **how)
    assert str(caught.value) == reason
  assert extract(make_pdf([pdfs.prose(1)[0]], password=''))[0] == pdfs.prose(1)[1]  # encrypted, and open to all
  assert extract(good[:good.index(b'startxref')])[1]['pages'] == 3  # the table of contents is not to be found


def test_what_is_lost_of_a_document_that_is_kept_is_counted():
  scan = Sheet()
  scan.picture(scan_of(pdfs.prose(1)[0], 72))
  sheets = [pdfs.prose(i)[0] for i in range(12)]
  assert extract(make_pdf([*sheets, scan]))[1]['pages_lost'] == 1
  with pytest.raises(Reject, match='no text layer'):
    extract(make_pdf([*sheets, scan, scan]))


def test_bombs_are_stopped_by_the_sandbox_and_the_next_document_is_read():
  """A page that draws for ever, one that fills the memory, one of a square kilometre; then a good one."""
  loop, huge, full = Sheet(), Sheet(width=2_800_000, height=2_800_000), Sheet()
  loop.operations = ['0 0 m 600 700 l 10 500 l 300 3 l f*'] * 300_000
  huge.operations = ['0 0 2800000 2800000 re f']
  full.operations = ['BT /F1 1 Tf (' + 'a' * 20_000_000 + ') Tj ET']  # of which pdfium takes a part
  source = Pdfs(name='p', pattern='-', ocr=Tesseract(), limits=Limits(cpu_seconds=2, memory_bytes=2 << 30))
  outcomes = []
  with Sandbox(source, source.limits) as sandbox:
    for sheet in (loop, huge, full, pdfs.prose(1)[0]):
      started = time.monotonic()
      try:
        outcomes.append(sandbox.extract(Raw('x', make_pdf([sheet])))[0])
      except Reject as reject:
        outcomes.append(str(reject))
      assert time.monotonic() - started < 60
  assert outcomes[3] == pdfs.prose(1)[1], outcomes
  assert outcomes[0] == 'out of time' and len(outcomes[2]) < 100_000, outcomes


def test_files_are_read_compressed_ones_too_and_what_cannot_be_is_named(tmp_path):
  data = make_pdf([pdfs.prose(1)[0]])
  (tmp_path / 'a.pdf').write_bytes(data)
  (tmp_path / 'b.pdf.gz').write_bytes(gzip.compress(data))
  (tmp_path / 'c.pdf.gz').write_bytes(gzip.compress(data)[:-100])
  (tmp_path / 'd.pdf.gz').write_bytes(gzip.compress(bytes(200 << 20)))
  (tmp_path / 'e.pdf.gz').write_bytes(b'no gzip')
  source = Pdfs(name='p', pattern=f'{tmp_path}/*.pdf*', limits=Limits(max_bytes=1 << 20))
  unit, = source.fetch(tmp_path)
  found = [getattr(one, 'reason', None) or one.content == data for one in source.read(unit)]
  assert found == [True, True, 'cut short', 'too large', 'damaged']


def mutants(n: int, seed: int = 0):
  """PDFs with bytes changed, parts left out, doubled, exchanged or cut off."""
  chance = random.Random(seed)
  originals = [make_pdf([pdfs.prose(i)[0], pdfs.two_columns(i)[0]]) for i in range(4)]
  originals += [as_images(make_pdf([pdfs.prose(1, 2)[0]]), 1, 50), make_pdf([pdfs.prose(1)[0]], '')]
  for _ in range(n):
    data = bytearray(chance.choice(originals))
    for _ in range(chance.choice((1, 3, 30))):
      a, size = chance.randrange(len(data)), chance.choice((1, 8, 100, 2000))
      how = chance.randrange(6)
      if how == 0:
        data[a:a + size] = chance.randbytes(size)
      elif how == 1:
        del data[a:a + size]
      elif how == 2:
        data[a:a] = data[a:a + size]
      elif how == 3:
        i = next((i for i in range(a, len(data)) if 48 <= data[i] < 58), a)
        data[i] = chance.choice(b'0123456789-.')
      elif how == 4:
        b = chance.randrange(len(data))
        data[a:a + size] = data[b:b + size]
      elif how == 5 and chance.random() < 0.2:
        del data[a:]
      if not data:
        break
    yield bytes(data)


def outcomes_of(files) -> collections.Counter:
  limits, outcomes = Limits(cpu_seconds=5, memory_bytes=2 << 30), collections.Counter()
  source = Pdfs(name='p', pattern='-', ocr=None, limits=limits)
  with Sandbox(source, limits) as sandbox:
    for data in files:
      started = time.monotonic()
      try:
        sandbox.extract(Raw('x', data))
        outcomes['text'] += 1
      except Reject as reject:
        outcomes[str(reject)] += 1
      assert time.monotonic() - started < 60
  return outcomes


def test_damaged_files_cost_themselves_only():
  outcomes = outcomes_of(mutants(300))
  assert outcomes.total() == 300 and outcomes['text'] > 30 and outcomes['not a PDF that can be read'] > 5, outcomes
  assert outcomes['crashed'] <= 6, outcomes


@pytest.mark.slow
def test_thousands_of_damaged_files_cost_themselves_only():
  outcomes = outcomes_of(mutants(4000, seed=1))
  print(dict(outcomes))
  assert outcomes.total() == 4000 and outcomes['crashed'] <= 80, outcomes


# -- a corpus


@needs_tesseract
def test_a_corpus_of_pdfs_is_the_same_for_one_worker_and_two(tmp_path):
  (tmp_path / 'pdf').mkdir()
  for i in range(4):
    (tmp_path / 'pdf' / f'{i}.pdf').write_bytes(make_pdf([pdfs.prose(i)[0], pdfs.two_columns(i)[0]]))
  (tmp_path / 'pdf' / '8.pdf').write_bytes(make_pdf([Sheet()], 'secret'))
  (tmp_path / 'pdf' / '9.pdf').write_bytes(b'%PDF-1.7\nnothing')
  texts = Pdfs(name='pdf', pattern=f'{tmp_path}/pdf/*.pdf', ocr=None)
  scanned = dataclasses.replace(texts, pattern=f'{tmp_path}/pdf/0.pdf')
  scans = Scanned(name='scans', of=scanned, pages=1, scan_dpi=150)
  recipe = Recipe(name='pdfs', sources=(texts, scans), vocab_size=300, seq_lens=(64,), validation_fraction=0, min_bytes=100)
  for workers in (1, 2):
    build.build(recipe, tmp_path / f'{workers}', workers=workers)
  one, two = (shards.read_manifest(tmp_path / name) for name in ('1', '2'))
  assert one['files'] == two['files']
  read = lambda name: pq.read_table(next((tmp_path / '1').glob(name))).to_pylist()
  assert [document['text'] for document in read('documents/pdf/*')] == [
    pdfs.prose(i)[1] + '\n\n' + pdfs.two_columns(i)[1] for i in range(4)]
  assert [row['reason'] for row in read('rejects/pdf/*')] == ['encrypted', 'not a PDF that can be read']
  document, = read('documents/scans/*')
  assert pdfs.error_rate(document['text'], pdfs.two_columns(0)[1]) < 0.01 and document['url'].endswith('0.pdf#scanned')


# -- real PDFs, of Debian packages


@pytest.fixture(scope='module')
def manuals(tmp_path_factory) -> list[bytes]:
  folder = tmp_path_factory.mktemp('debian')
  files = []
  for name, pages in (('r-doc-pdf', '*.pdf'), ('erlang-doc', '*/doc/pdf/*.pdf'), ('installation-guide-amd64', '*.pdf.gz')):
    source = DebianPdfs(name=name, pages=pages, ocr=None)
    try:
      unit, = source.fetch(folder)
    except SourceUnavailable as error:
      pytest.skip(str(error))
    files += [raw.content for raw in source.read(unit)]
  return files


@pytest.mark.slow
def test_pages_of_real_manuals_and_scans_of_them_go_the_right_way(manuals):
  right, n, chance = 0, 0, random.Random(0)
  for data in manuals:
    with pdf_pages.opened(data) as document:
      for i in chance.sample(range(len(document)), min(8, len(document))):
        page = document[i]
        if len(pdf_pages.text_layer(page).codes) < 20:
          continue  # an empty page is neither
        right += pdf_pages.route(page, pdf_pages.text_layer(page)) == 'text'
        scan = Sheet(*page.get_size())
        scan.picture(pdf_pages.drawn(page, 100)[0].to_numpy())
        with pdf_pages.opened(make_pdf([scan])) as scanned:
          right += pdf_pages.route(scanned[0], pdf_pages.text_layer(scanned[0])) == 'image'
        n += 2
  print(f'{right} of {n} pages')
  assert n > 300 and right >= 0.95 * n


@pytest.mark.slow
def test_a_core_reads_a_hundred_pages_of_text_a_second(manuals):
  started, n = time.process_time(), 0
  for data in manuals:
    n += pdf_pages.extract(data, None, 200, 5000, 0)[1]['pages']
  rate = n / (time.process_time() - started)
  print(f'{n} pages, {rate:.0f} a second and core')
  assert n > 5000 and rate >= 100
