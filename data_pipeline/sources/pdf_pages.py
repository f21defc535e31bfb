"""The pages of a PDF -> lines with boxes: from the text layer, or from a reader of images where the layer is not usable.

Which of the two is decided for each page (`route`). A layer is usable if its characters have a meaning (few without one, the
letters as often as in a language) and it is most of what is to be seen: where there is little of it, ink that is not under
any text is looked for in a small picture of the page. A layer that is doubtful and not hopeless stays if OCR finds no more.
"""

import ctypes
import dataclasses
import itertools
import math

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from data_pipeline.recipe import Reject
from data_pipeline.sources import layout
from data_pipeline.sources.layout import Line, Page
from data_pipeline.sources.ocr import Unread

_MAX_LOST = 0.1  # of the pages of a document; with more it is left out
_MAX_PIXELS = 40_000_000  # of the image of a page; larger pages are drawn at a lower resolution
_LOOK_DPI = 72  # at which ink is counted
_INK = 60  # of 255, between the paper and ink
_SOME_INK, _MUCH_INK = 0.0005, 0.02  # of the page: a line of text, a quarter of a page of text
_BORDER = 0.03  # of the page: the dark edge of a scan is no text
_FEW = 50  # characters: a page with fewer has no text layer to speak of
_HEIGHTS, _MANY_HEIGHTS = 60, 12  # of the heights of the page that have text: enough for a layer to be believed at once
_WORTH = 1.2  # times the characters of a doubtful layer is what OCR must find to take its place
_UNMAPPED = 0.2  # of the characters without a meaning: the layer is not usable
_DAMAGED = 0xFFFD, 0xE000, 0xF8FF  # what stands for a character that could not be mapped; the private use area
# How often the letters a to z are in English, in percent. Languages in Latin script are far closer to it than a cipher.
_LETTERS = np.array([8.2, 1.5, 2.8, 4.3, 12.7, 2.2, 2.0, 6.1, 7.0, 0.2, 0.8, 4.0, 2.4, 6.7, 7.5, 1.9, 0.1, 6.0, 6.3, 9.1,
                     2.8, 1.0, 2.4, 0.2, 2.0, 0.1])
_LIKE_A_LANGUAGE, _LETTERS_TO_TELL = 0.35, 200  # correlation with it; of so many letters at least
_HYPHEN = 0x02  # is what pdfium says of one at the end of a line
_MEANT = {_HYPHEN: '-', 0xFFFE: '-', 0xFB00: 'ff', 0xFB01: 'fi', 0xFB02: 'fl', 0xFB03: 'ffi', 0xFB04: 'ffl', 0xFB05: 'st',
          0xFB06: 'st'}
_CJK = 0x2E80

# A call a character: ctypes as pypdfium2 declares it would take longer for that than pdfium for the page.
_fast = lambda function, result, *more: ctypes.CFUNCTYPE(result, ctypes.c_void_p, ctypes.c_int, *more)(
  ctypes.cast(function, ctypes.c_void_p).value)
_BOX = _fast(pdfium_c.FPDFText_GetLooseCharBox, ctypes.c_int, ctypes.c_void_p)
_UNICODE = _fast(pdfium_c.FPDFText_GetUnicode, ctypes.c_uint)
_ANGLE = _fast(pdfium_c.FPDFText_GetCharAngle, ctypes.c_float)
_ERROR = _fast(pdfium_c.FPDFText_HasUnicodeMapError, ctypes.c_int)


@dataclasses.dataclass(slots=True)
class Layer:
  """The text layer of a page. boxes: [n, 4], left, top, right, bottom of its n visible characters, page unturned."""

  pages: list[Page]  # one, and one more for text in each other direction
  codes: np.ndarray
  boxes: np.ndarray
  unsure: float  # of the characters: pdfium found no meaning for them in the file, and guessed

  def is_sound(self) -> bool:
    reads_well = reads_like_a_language(self.codes)
    return meant(self.codes) and (reads_well if reads_well is not None else self.unsure <= _UNMAPPED)


def extract(data: bytes, reader, dpi: float, max_pages: int, max_ocr_pages: int) -> tuple[str, dict[str, int]]:
  """(text, counts) of a PDF, or Reject. reader: of `ocr`, or None."""
  with opened(data) as document:
    n = len(document)
    if n > max_pages:
      raise Reject('too many pages')
    layers, routes = zip(*(_look_at(document, i) for i in range(n)))
    if reader and sum(route in ('image', 'garbage') for route in routes) > max_ocr_pages:
      raise Reject('too many pages without a text layer')
    pages, lost, n_read = [], 0, 0
    for i, (layer, route) in enumerate(zip(layers, routes)):
      found = layer
      if route in ('image', 'garbage'):
        found, is_read, is_lost = _read(document, i, layer, route, reader, dpi)
        n_read, lost = n_read + is_read, lost + is_lost
      pages += found
    lost += routes.count('damaged')
    if lost > _MAX_LOST * n:
      raise Reject('damaged pages' if 'damaged' in routes else 'pages cannot be read' if reader else 'no text layer')
    text, running = layout.document(pages)
  return text, {'pages': n, 'pages_ocr': n_read, 'pages_empty': routes.count('empty'), 'pages_lost': lost,
                'running_lines': running}


def _read(document: pdfium.PdfDocument, i: int, layer: list[Page], route: str, reader,
          dpi: float) -> tuple[list[Page], bool, bool]:
  """(what the page has, whether OCR found it, whether the page is lost) of a page whose layer is doubtful."""
  doubtful = layer if route == 'image' else []
  if reader is None:
    return doubtful, False, not doubtful
  try:
    page = document[i]
    image, dpi = drawn(page, dpi)
    found = reader.read(np.ascontiguousarray(image.to_numpy()), dpi)
  except (Unread, pdfium.PdfiumError):
    return doubtful, False, True
  read = Page(page.get_height(), [], found) if isinstance(found, str) else Page(page.get_height(), found)
  better = worth([read]) > _WORTH * worth(layer)
  return [read] if better else layer, better, False


def opened(data: bytes) -> pdfium.PdfDocument:
  try:
    return pdfium.PdfDocument(data)
  except pdfium.PdfiumError as error:
    encrypted = error.err_code in (pdfium_c.FPDF_ERR_PASSWORD, pdfium_c.FPDF_ERR_SECURITY)
    raise Reject('encrypted' if encrypted else 'not a PDF that can be read') from error


def drawn(page: pdfium.PdfPage, dpi: float, turn: int = 0) -> tuple[pdfium.PdfBitmap, float]:
  """(grey image of a page, its resolution, which is less than dpi for a page of great size)."""
  dpi = min(dpi, 72 * math.sqrt(_MAX_PIXELS / max(1.0, page.get_width() * page.get_height())))
  return page.render(scale=dpi / 72, grayscale=True, rotation=turn % 360, may_draw_forms=False), dpi


def _look_at(document: pdfium.PdfDocument, i: int) -> tuple[list[Page], str]:
  """(what the text layer has, route) of a page."""
  try:
    page = document[i]
    layer = text_layer(page)
    return layer.pages, route(page, layer)
  except pdfium.PdfiumError:
    return [], 'damaged'


def route(page: pdfium.PdfPage, layer: Layer) -> str:
  """'text': the layer is usable. 'image': it is little of what is to be seen. 'garbage': it makes no sense. 'empty': there
  is nothing on the page."""
  n, height = len(layer.codes), page.get_bbox()[3] - page.get_bbox()[1]
  middles = (layer.boxes[:, 1] + layer.boxes[:, 3]) / 2
  if n >= _FEW and len(np.unique((middles * _HEIGHTS / height).astype(int))) >= _MANY_HEIGHTS:
    return 'text' if layer.is_sound() else 'garbage'
  below, beside = _ink(page, layer)
  if n < _FEW:
    return 'image' if beside > _SOME_INK else 'text' if n else 'empty'
  return 'garbage' if not layer.is_sound() else 'image' if beside > _MUCH_INK and beside > 3 * below else 'text'


def _ink(page: pdfium.PdfPage, layer: Layer) -> tuple[float, float]:
  """(ink under the characters of the layer, other ink), as parts of the page."""
  bitmap, dpi = drawn(page, _LOOK_DPI, turn=-page.get_rotation())
  image = bitmap.to_numpy()
  ink = abs(image.astype(np.int16) - np.int16(np.median(image))) > _INK
  height, width = ink.shape
  y, x = int(height * _BORDER), int(width * _BORDER)
  inside = np.zeros_like(ink)
  inside[y:height - y, x:width - x] = ink[y:height - y, x:width - x]
  all_of_it = inside.mean()
  for left, top, right, bottom in np.clip(layer.boxes * (dpi / 72) + (-1, -1, 2, 2), 0, max(ink.shape)).astype(int):
    inside[top:bottom, left:right] = False
  beside = inside.mean()
  return all_of_it - beside, beside


def worth(pages: list[Page]) -> float:
  """How much text is on these pages: characters, those of a cipher a tenth."""
  text = ''.join([piece for page in pages for piece in (page.text, *(line.text for line in page.lines))])
  codes = np.frombuffer(text.encode('utf-32-le', 'replace'), np.uint32)
  codes = codes[codes > 32]
  return len(codes) if meant(codes) and reads_like_a_language(codes) is not False else 0.1 * len(codes)


def meant(codes: np.ndarray) -> bool:
  """Whether most characters have a meaning."""
  replacement, first, last = _DAMAGED
  damaged = (codes == replacement) | (codes >= first) & (codes <= last) | (codes >= 0xF0000)
  return damaged.sum() <= _UNMAPPED * len(codes)


def reads_like_a_language(codes: np.ndarray) -> bool | None:
  """Whether Latin letters are about as frequent as in a language; None where there are too few of them to tell."""
  lower = codes | 32
  counts = np.bincount(lower[(lower >= 97) & (lower <= 122) & (codes < 128)] - 97, minlength=26)
  accented = int(((codes >= 0xC0) & (codes < 0x250)).sum())
  if counts.sum() + accented < _LETTERS_TO_TELL or 2 * (counts.sum() + accented) < len(codes):
    return None
  return bool(accented < counts.sum() and np.corrcoef(counts, _LETTERS)[0, 1] > _LIKE_A_LANGUAGE)


def text_layer(page: pdfium.PdfPage) -> Layer:
  """What the text layer of a page has, in the order of the file."""
  text_page = page.get_textpage()
  try:
    handle, n = ctypes.cast(text_page.raw, ctypes.c_void_p).value, max(0, text_page.count_chars())
    codes = np.fromiter(map(_UNICODE, itertools.repeat(handle, n), range(n)), np.uint32, n)
    boxes = np.zeros((n, 4), np.float32)
    address = boxes.ctypes.data
    for _ in map(_BOX, itertools.repeat(handle, n), range(n), range(address, address + 16 * n, 16)):
      pass
    turns = _turns(handle, n)
    asked = [i for i in range(0, n, max(1, n // 200)) if codes[i] > 32]
    errors = sum(map(_ERROR, itertools.repeat(handle, len(asked)), asked)) / max(1, len(asked))
  finally:
    text_page.close()
  left, bottom, right, top = page.get_bbox()  # a box that the page inherits is only in this one
  boxes = np.stack([boxes[:, 0] - left, top - boxes[:, 1], boxes[:, 2] - left, top - boxes[:, 3]], 1).astype(np.float64)
  is_real = np.isfinite(boxes).all(1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
  visible, = np.nonzero(((codes > 32) & (codes != 0xA0) & (codes != 0xAD) | (codes == _HYPHEN)) & is_real)
  size, pages = (right - left, top - bottom), []
  for turn in sorted(set(turns[visible].tolist()) - {-1}, key=lambda turn: (-(turns[visible] == turn).sum(), turn)):
    mine = visible[turns[visible] == turn]
    pages.append(Page(size[1 - turn % 2], _lines(codes, mine, _turned(boxes[mine], turn, *size))))
  return Layer(pages, codes[visible], boxes[visible], errors)


def _turns(handle: int, n: int) -> np.ndarray:
  """int [n]: how many quarters of a circle each character is turned against the page; -1: between, a watermark."""
  if not any(map(_ANGLE, itertools.repeat(handle), range(0, n, 16))):
    return np.zeros(n, int)
  angles = np.fromiter(map(_ANGLE, itertools.repeat(handle, n), range(n)), np.float64, n)
  quarters = angles / (-math.pi / 2)  # pdfium turns clockwise
  nearest = np.round(np.nan_to_num(quarters, nan=0.5, posinf=0.5, neginf=0.5))
  return np.where(abs(quarters - nearest) < 0.1, nearest.astype(int) % 4, -1)


def _turned(boxes: np.ndarray, turn: int, width: float, height: float) -> np.ndarray:
  """Boxes of a page of this size after `turn` quarters clockwise: text that is turned so far the other way is upright."""
  for _ in range(turn):
    left, top, right, bottom = boxes.T
    boxes, width, height = np.stack([height - bottom, left, height - top, right], 1), height, width
  return boxes


def _lines(codes: np.ndarray, visible: np.ndarray, boxes: np.ndarray) -> list[Line]:
  """Runs of characters without a wide gap, a line end or a jump between them. boxes: [visible, 4]."""
  left, top, right, bottom = boxes.T
  height, middle = np.maximum(bottom - top, 0.1), (top + bottom) / 2
  tall, gap = np.maximum(height[1:], height[:-1]), left[1:] - right[:-1]
  ends = np.cumsum((codes == 10) | (codes == 13))[visible]
  cut = (np.diff(ends) > 0) | (gap > 1.5 * tall) | (gap < -tall) | (abs(np.diff(middle)) > 0.6 * tall)
  starts = np.concatenate([[0], np.nonzero(cut)[0] + 1])
  first, last = visible[starts], visible[np.concatenate([starts[1:], [len(visible)]]) - 1]
  edges = (np.minimum.reduceat(left, starts), np.minimum.reduceat(top, starts), np.maximum.reduceat(right, starts),
           np.maximum.reduceat(bottom, starts))
  width = right - left
  wide, narrow = np.maximum.reduceat(width, starts), np.minimum.reduceat(width, starts)
  is_mono = (wide - narrow < 0.01 * wide) & (np.diff(starts, append=len(visible)) > 3) & (codes[first] < _CJK)
  characters = codes.astype('<u4').tobytes().decode('utf-32-le', 'replace')
  lines = [Line(' '.join(characters[a:b + 1].translate(_MEANT).split()), *box)
           for a, b, *box in zip(first.tolist(), last.tolist(), *(edge.tolist() for edge in (*edges, wide * is_mono)))]
  for i in np.nonzero(is_mono)[0]:  # pdfium gives one space for several
    run = slice(starts[i], starts[i + 1] if i + 1 < len(starts) else None)
    places = ((left[run] - left[starts[i]]) / wide[i]).round().astype(int)
    if (np.diff(places) > 0).all():
      spaced = np.full(places[-1] + 1, ' ')
      spaced[places] = list(characters[j] for j in visible[run])
      lines[i].text = ''.join(spaced).translate(_MEANT)
  return lines
