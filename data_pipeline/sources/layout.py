"""Lines with boxes, as a PDF or a reader of images gives them -> text in the order in which a person reads it.

Of each page: columns one after the other, the pieces of a line put together, the indentation of code kept. Of the document:
running headers, footers and page numbers taken out, lines joined to paragraphs (over the end of a page too), words that the
end of a line has cut mended. All of it by geometry and the words of the document itself.
"""

import dataclasses
import math
import re
import statistics

import numpy as np

_COLUMN_LINES = 4  # at least, on both sides of the gap between two columns
_COLUMN_CHARACTERS = 25  # a line, on average: columns of text and not of a table, in whatever order the file has them
_GAP = 2  # heights of a line without any text, over the whole width, end columns
_EDGE = 3  # lines at the top and at the bottom of a page that may be running headers and footers
_NEAR = 8  # pages before and after, which are asked for the same header
_LEADING = 1.35  # times the usual distance of lines is the end of a paragraph
_LEADERS = re.compile(r'(?:\s?[.·‥…]){5,}\s*')  # of a table of contents
_ITEM = re.compile(r'[•◦▪‣∙·*–—-]\s|[([]?(\d{1,3}|[a-zA-Z]|[ivx]{2,4})[.)\]]\s')
_PAGE_NUMBER = re.compile(r'(page|p\.)?\W*(\d{1,5}|[ivxlc]{1,8})(\s*(/|of|-)\s*\d{1,5})?\W*', re.IGNORECASE)
_WORD = re.compile(r'[^\W\d_]+(?:-[^\W\d_]+)*')
_CJK = '\u2e80'  # from here on there are no spaces between words
_CUT_WORD = re.compile(r'([^\W\d_]+)[-\u00ad\u2010]$')


@dataclasses.dataclass(slots=True)
class Line:
  """Text between left and right, top and bottom: points, from the upper left corner of the page."""

  text: str
  left: float
  top: float
  right: float
  bottom: float
  mono: float = 0.0  # the width of its characters where all are equally wide, as those of code are
  parts: int = 1  # pieces with wide gaps between them, as in the row of a table

  @property
  def height(self) -> float:
    return self.bottom - self.top


@dataclasses.dataclass(slots=True)
class Page:
  """Lines in the order of the file; or text, of a reader that puts it in order itself."""

  height: float
  lines: list[Line]
  text: str = ''


def document(pages: list[Page]) -> tuple[str, int]:
  """(text, number of running headers, footers and page numbers that are not in it)."""
  removed = _remove_running_lines(pages)
  text = _Text(pages)
  for page in pages:
    if page.text:
      text.end('\n\n')
      text.done += [page.text, '\n\n']
    for block in _in_order(page.lines):
      text.add(block)
  text.end('')
  return ''.join(text.done), removed


# A page.


def _in_order(lines: list[Line], depth: int = 0) -> list[list[Line]]:
  """Blocks: columns, and what stands above, between and below them. Each a list of whole lines from top to bottom."""
  keys = _columns(lines) if len(lines) >= 2 * _COLUMN_LINES and depth < 4 else None
  if keys is None:
    return [[_put_together(row) for row in _rows(lines)]] if lines else []
  groups = {}
  for key, line in zip(keys.tolist(), lines):
    groups.setdefault(key, []).append(line)
  return [block for key in sorted(groups) for block in _in_order(groups[key], depth + 1)]


def _columns(lines: list[Line]) -> np.ndarray | None:
  """int [lines]: in which order they are read as far as one gap between two columns decides it; None where there is none.

  A gap is a place x that enough lines end before and enough begin at. Lines across it, and height without any text, cut the
  page into bands; a band with text on both sides is read left, then right. In what order the file has the lines tells
  columns of short lines (an index) from the columns of a table.
  """
  left, right, top, bottom = np.array([(line.left, line.right, line.top, line.bottom) for line in lines]).T
  characters, height = np.array([len(line.text) for line in lines]), np.median(bottom - top)
  low, high = left.min(), right.max()
  places = np.unique(left.round())
  places = places[(places > low + 0.2 * (high - low)) & (places < high - 0.1 * (high - low))][:, None]
  lefts, rights = right <= places - 0.6 * height, left >= places - 1
  enough = np.minimum(lefts.sum(1), rights.sum(1)) >= _COLUMN_LINES
  order, best, keys = np.argsort(top, kind='stable'), 0, None
  is_below_gap = np.zeros(len(lines), bool)
  is_below_gap[order[1:]] = top[order[1:]] > np.maximum.accumulate(bottom[order])[:-1] + _GAP * height
  for is_left, is_right in zip(lefts[enough], rights[enough]):
    band = np.empty(len(lines), int)
    band[order] = np.cumsum((~(is_left | is_right) | is_below_gap)[order])
    n = [np.bincount(band[side], minlength=band.max() + 1) for side in (is_left, is_right)]
    good = np.minimum(*n) >= _COLUMN_LINES
    for i in np.nonzero(good)[0]:
      sides = [(band == i) & side for side in (is_left, is_right)]
      n_rows = min(len(np.unique((top[side] / height).round())) for side in sides)
      changes = np.count_nonzero(np.diff(is_left[sides[0] | sides[1]]))
      is_long = min(characters[side].mean() for side in sides) >= _COLUMN_CHARACTERS
      good[i] = n_rows >= _COLUMN_LINES and (is_long or changes <= max(2, 0.2 * n_rows))
    if (score := np.minimum(*n)[good].sum()) > best:
      before = np.cumsum(good) - good
      best, keys = score, 3 * before[band] + np.where(good[band], is_left + 2 * is_right, 0)
  return keys


def _rows(lines: list[Line]) -> list[list[Line]]:
  """Lines of one height on the page together, from left to right; from top to bottom."""
  rows = []
  for line in sorted(lines, key=lambda line: line.top + line.bottom):
    first = rows[-1][0] if rows else None
    if first and min(first.bottom, line.bottom) - max(first.top, line.top) > 0.5 * min(first.height, line.height):
      rows[-1].append(line)
    else:
      rows.append([line])
  return [sorted(row, key=lambda line: line.left) for row in rows]


def _put_together(row: list[Line]) -> Line:
  mono = row[0].mono if all(abs(line.mono - row[0].mono) < 0.02 * row[0].mono for line in row) else 0.0
  text, parts = row[0].text, 1
  for before, line in zip(row, row[1:]):
    gap = line.left - before.right
    parts += gap > 2 * line.height
    text += ' ' * (max(1, round(gap / mono)) if mono else int(gap > 0.1 * line.height)) + line.text
  return Line(text, row[0].left, min(line.top for line in row), max(line.right for line in row),
              max(line.bottom for line in row), mono, parts)


# What runs through the document.


@dataclasses.dataclass(slots=True)
class _EdgeLine:
  pieces: list[Line]
  key: str  # the text, with digits the same
  y: float
  apart: bool  # from the text of the page
  is_number: bool


def _remove_running_lines(pages: list[Page]) -> int:
  """Takes them out of pages; returns how many there were.

  From the edge inwards, a line goes if the pages near have the same one at the same height, or if it is a page number, or
  if it stands apart where lines of most pages near stand apart (headers that change from page to page).
  """
  removed = 0
  for from_top in (True, False):
    edges = [_edge(page, from_top) for page in pages]
    for i, (page, edge) in enumerate(zip(pages, edges)):
      near, gone = edges[max(0, i - _NEAR):i + _NEAR + 1], set()
      for depth, line in enumerate(edge):
        there = [[other for other in others if abs(other.y - line.y) < 0.008 * page.height] for others in near]
        same = sum(any(other.key == line.key for other in others) for others in there)
        apart = line.apart and sum(any(other.apart for other in others) for others in there) > 0.6 * len(near) > 2
        repeated = same >= (min(3, max(2, len(pages) - 1)) if depth == 0 else max(2, 0.5 * len(near)))
        if not (repeated or apart and depth == 0 or line.is_number and (line.apart or len(edge) == 1)):
          break
        gone.update(map(id, line.pieces))
        removed += 1
      if gone:
        page.lines = [line for line in page.lines if id(line) not in gone]
  return removed


def _edge(page: Page, from_top: bool) -> list[_EdgeLine]:
  """The outermost lines of a page, the outermost first."""
  outer = sorted(page.lines, key=lambda line: line.top if from_top else -line.bottom)[:6 * _EDGE]
  rows = _rows(outer) if from_top else _rows(outer)[::-1]
  edge = []
  for row, inner in zip(rows[:_EDGE], [*rows[1:], None]):
    line, after = _put_together(row), inner and _put_together(inner)
    gap = 0 if after is None else after.top - line.bottom if from_top else line.top - after.bottom
    edge.append(_EdgeLine(row, re.sub(r'\d+', '0', line.text.casefold()), line.top if from_top else line.bottom,
                          gap > line.height, bool(_PAGE_NUMBER.fullmatch(line.text))))
  return edge


class _Text:
  """Whole lines of blocks, in order -> paragraphs."""

  def __init__(self, pages: list[Page]):
    self.done, self._pages, self._words = [], pages, None
    self._lines, self._text = [], ''  # of the paragraph under way
    self._room = self._distance = 0.0

  def add(self, block: list[Line]) -> None:
    """The lines of a column: from top to bottom."""
    margin, left = _margin([line.right for line in block], max), _margin([line.left for line in block], min)
    distances = [b.bottom - a.bottom for a, b in zip(block, block[1:]) if b.bottom > a.bottom]
    distance = statistics.median_low(distances) if distances else 0.0
    code_left = min((line.left for line in block if line.mono), default=0.0)
    for i, line in enumerate(block):
      if self._lines:
        last = self._lines[-1]
        near = i > 0 and line.bottom - last.bottom <= _LEADING * distance
        if self._goes_on(line, near, i == 0, left):
          self._join(line.text)
        else:
          is_code = last.mono and line.mono
          self.end('\n' if near and (is_code or len(self._lines) < 3) else '\n\n')
      if not self._lines:
        self._text = (' ' * round((line.left - code_left) / line.mono) if line.mono else '') + line.text
      self._lines.append(line)
      self._room = margin - line.right if len(block) > 1 else math.inf

  def end(self, between: str) -> None:
    """Ends the paragraph under way."""
    if self._lines:
      self.done += [_LEADERS.sub(' … ', self._text), between]
    self._lines, self._text = [], ''

  def _goes_on(self, line: Line, near: bool, is_first: bool, left: float) -> bool:
    """Whether the paragraph under way goes on in this line: its last line had no room for the first word of this."""
    last = self._lines[-1]
    if last.mono or line.mono or line.parts > 1 or _ITEM.match(line.text) or _LEADERS.search(last.text):
      return False
    first = 1 if line.text[0] >= _CJK else line.text.find(' ') + 1 or len(line.text) + 1
    word = first * (line.right - line.left) / len(line.text)
    if self._room >= word or not 0.6 < line.height / max(last.height, 1e-3) < 1.7:
      return False
    if is_first:  # of a column or page: the text goes on if nothing says that it ended
      return line.left < left + 0.5 * line.height and (last.text[-1:] not in '.!?:' or line.text[:1].islower())
    if len(self._lines) > 1:
      return near and abs(line.left - last.left) < 0.5 * line.height
    return near and (line.left < last.left + 0.5 * line.height or bool(_ITEM.match(last.text)) or last.parts > 1)

  def _join(self, text: str) -> None:
    cut, rest = _CUT_WORD.search(self._text), _WORD.match(text)
    if not cut or not text[:1].isalnum():
      self._text += ' ' * (self._text[-1] < _CJK or text[0] < _CJK) + text
    elif rest and text[:1].islower() and not self._has_hyphen(cut[1], rest[0]):
      self._text = self._text[:-1] + text
    else:
      self._text += text

  def _has_hyphen(self, begin: str, rest: str) -> bool:
    """Whether the hyphen at the end of a line belongs to the word: the document has it elsewhere, and not without."""
    if self._words is None:
      self._words = {word for page in self._pages for line in page.lines for word in _WORD.findall(line.text.lower())}
    begin, rest = begin.lower(), rest.lower()
    return f'{begin}-{rest}' in self._words and begin + rest not in self._words


def _margin(edges: list[float], outermost) -> float:
  """Where most lines of a block begin or end; the outermost where no place is common."""
  places = [round(edge / 2) for edge in edges]
  common = statistics.mode(places)
  return 2.0 * common if places.count(common) >= max(3, 0.25 * len(places)) else outermost(edges, default=0.0)
