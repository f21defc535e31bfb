"""Readers of images of pages: `read(image, dpi)` gives lines with boxes, or text.

    Tesseract()                                        the program of that name; about a page in two seconds and core
    RapidOcr()                                         extra `ocr`: models inside a Python package; much slower
    Endpoint(url='http://host:8000/v1', model='…')     any OpenAI-compatible server of a model that sees

A reader that is out of order (no program, no answer) raises OSError, which ends the build with what it has kept; a page that
it cannot read is `Unread`.
"""

import base64
import dataclasses
import functools
import http.client
import importlib.metadata
import importlib.util
import json
import pathlib
import shutil
import statistics
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib

import numpy as np

from data_pipeline.recipe import SourceUnavailable
from data_pipeline.sources.layout import Line

_PAGE_SECONDS = 60  # of one core, for one page; more is a page that cannot be read
_CONFIDENCE = 50  # percent, of the words of a line; what is less was no text but a drawing
_TRIES = 6  # to reach an endpoint, each after twice the time of the one before: about half a minute in all
_PROMPT = ('Write down the text of this page, exactly as it is printed and in the order in which a person reads it. '
           'Leave out page numbers and running headers and footers. A blank line between paragraphs; tables and formulas as '
           'Markdown. Answer with the text of the page alone, or with nothing if there is none.')


class Unread(Exception):
  """A page that a reader cannot read."""


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Tesseract:
  """The program `tesseract`, a process a page, on one core. language: as of `tesseract --list-langs`, 'eng+deu' for both."""

  language: str = 'eng'

  def state(self) -> str:
    return _tesseract_version()

  def check(self) -> None:
    """SourceUnavailable where the program or the language is missing."""
    if not shutil.which('tesseract'):
      raise SourceUnavailable('OCR needs the program tesseract, which this machine does not have: apt-get install '
                              'tesseract-ocr (or a source with ocr=None, which takes only what has a text layer)')
    known = subprocess.run(['tesseract', '--list-langs'], capture_output=True, text=True, check=True).stdout.split('\n')[1:]
    if missing := [one for one in self.language.split('+') if one not in known]:
      raise SourceUnavailable(f'tesseract does not know the language {missing[0]!r}: '
                              f'apt-get install tesseract-ocr-{missing[0]}')

  def read(self, image: np.ndarray, dpi: float) -> list[Line]:
    """Lines of a grey image (uint8 [height, width]), in points. Unread where tesseract fails or takes too long."""
    height, width = image.shape
    # A limit of its own; and one thread, for its threads make a page slower on all cores together.
    command = ['sh', '-c', f'ulimit -t {_PAGE_SECONDS}; OMP_THREAD_LIMIT=1 exec tesseract "$@"', 'sh', 'stdin', 'stdout',
               '--dpi', f'{dpi:.0f}', '-l', self.language, 'tsv']
    try:
      done = subprocess.run(command, input=f'P5 {width} {height} 255\n'.encode() + image.tobytes(), capture_output=True,
                            timeout=5 * _PAGE_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:  # OSError: no memory is left to start it
      raise Unread('tesseract does not end, or cannot begin') from error
    if done.returncode == 127:
      raise FileNotFoundError('there is no program tesseract on the machine of this worker')
    if done.returncode:
      raise Unread(f'tesseract ended with {done.returncode}')
    return _lines_of_tsv(done.stdout.decode('utf-8', 'replace'), 72 / dpi)


@functools.cache
def _tesseract_version() -> str:
  if not shutil.which('tesseract'):
    return 'none'
  return subprocess.run(['tesseract', '--version'], capture_output=True, text=True, check=True).stdout.split('\n')[0]


def _lines_of_tsv(table: str, scale: float) -> list[Line]:
  """Tesseract's table: level, page, block, paragraph, line, word, left, top, width, height, confidence, text."""
  words = {}
  for row in table.split('\n')[1:]:
    level, *where, confidence, text = row.split('\t') if row.count('\t') == 11 else [''] * 3
    if level == '5' and text.strip():
      words.setdefault(tuple(where[1:4]), []).append((*map(int, where[5:9]), float(confidence), text))
  lines = []
  for of_line in words.values():
    left, top, width, height, confidence, text = zip(*of_line)
    if statistics.fmean(confidence) >= _CONFIDENCE:
      right, bottom = (max(a + b for a, b in zip(*edge)) for edge in ((left, width), (top, height)))
      lines.append(Line(' '.join(text), *(scale * edge for edge in (min(left), min(top), right, bottom))))
  return lines


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class RapidOcr:
  """PP-OCR models in onnxruntime, of the package rapidocr-onnxruntime; one core. A page takes several times as long as with
  tesseract, and that counts as time of the source's own process: give the source limits for it."""

  def state(self) -> str:
    try:
      return importlib.metadata.version('rapidocr-onnxruntime')
    except importlib.metadata.PackageNotFoundError:
      return 'none'

  def check(self) -> None:
    if importlib.util.find_spec('rapidocr_onnxruntime') is None:
      raise SourceUnavailable('this source reads images with rapidocr-onnxruntime, which is not installed: '
                              'pip install "maxlm[ocr]"')

  def read(self, image: np.ndarray, dpi: float) -> list[Line]:
    found, _ = _rapidocr()(np.repeat(image[:, :, None], 3, axis=2))
    lines, scale = [], 72 / dpi
    for corners, text, confidence in found or ():
      if 100 * float(confidence) >= _CONFIDENCE and text.strip():
        x, y = scale * np.array(corners).T
        lines.append(Line(text.strip(), x.min(), y.min(), x.max(), y.max()))
    return lines


@functools.cache
def _rapidocr():
  from rapidocr_onnxruntime import RapidOCR  # a large package, of an extra
  # Its classifier of lines that are upside down takes half of those of a clean page for such.
  return RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1, use_cls=False)


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Endpoint:
  """A vision model behind /chat/completions: a request with one image a page, sampled at temperature 0.

  url: up to and with '/v1'. key_file: a file with the key, if the server wants one. max_tokens: of an answer; a page that
  needs more counts as unread, for half a page is no page.
  """

  url: str
  model: str
  key_file: str = ''
  max_tokens: int = 8192
  timeout: float = 300.0  # seconds for one page

  def state(self) -> str:
    return ''

  def check(self) -> None:
    """SourceUnavailable where nothing answers."""
    try:
      self._ask('GET', '/models', None)
    except (ConnectionError, Unread) as error:
      raise SourceUnavailable(str(error)) from error

  def read(self, image: np.ndarray, dpi: float) -> str:
    picture = {'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{base64.b64encode(png(image)).decode()}'}}
    question = {'role': 'user', 'content': [{'type': 'text', 'text': _PROMPT}, picture]}
    answer = self._ask('POST', '/chat/completions', {'model': self.model, 'messages': [question], 'temperature': 0,
                                                     'max_tokens': self.max_tokens})
    try:
      choice = answer['choices'][0]
      text, reason = choice['message']['content'] or '', choice.get('finish_reason')
    except (KeyError, IndexError, TypeError, AttributeError) as error:
      raise Unread('the answer is not of the form of OpenAI') from error
    if not isinstance(text, str) or reason == 'length':
      raise Unread('the answer is cut off')
    return text.strip()

  def _ask(self, method: str, path: str, question: dict | None) -> dict:
    """The answer as JSON. ConnectionError if there is none, or one that says that no other page would fare better."""
    headers = {'Content-Type': 'application/json'}
    if self.key_file:
      headers['Authorization'] = f'Bearer {pathlib.Path(self.key_file).expanduser().read_text(encoding="utf-8").strip()}'
    request = urllib.request.Request(self.url.rstrip('/') + path, question and json.dumps(question).encode(), headers,
                                     method=method)
    for attempt in range(_TRIES):
      if attempt:
        time.sleep(2 ** (attempt - 1))
      try:
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
          return json.load(response)
      except urllib.error.HTTPError as error:
        failure = f'{error.code} {error.reason}'
        if error.code in (401, 403, 404):
          break
        if error.code < 500 and error.code not in (408, 429):
          raise Unread(failure) from error
      except (OSError, http.client.HTTPException) as error:
        failure = str(getattr(error, 'reason', '') or error or type(error).__name__)
      except ValueError as error:
        raise Unread('the answer is not JSON') from error
    raise ConnectionError(f'the endpoint {self.url} does not answer ({failure}): start it, or mend `Endpoint`, and run the '
                          'same command again, which goes on')


def png(image: np.ndarray) -> bytes:
  """A grey image, uint8 [height, width], as a file."""
  height, width = image.shape
  chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
  rows = np.concatenate([np.zeros((height, 1), np.uint8), image], axis=1)
  return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(rows.tobytes(), 6)) + chunk(b'IEND', b''))
