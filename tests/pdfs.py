"""PDFs written by code, with text that is known: columns, hyphens, running headers, bad text layers, scans, ciphers."""

import dataclasses
import hashlib
import math
import random
import re
import zlib
from pydoc_data.topics import topics

import numpy as np

# Widths of Helvetica in thousandths, from space to '~' (Adobe's metrics of the 14 standard fonts).
_WIDTHS = [
  278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278, *[556] * 10, 278, 278, 584, 584,
  584, 556, 1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778, 667, 778, 722, 667, 611,
  722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556, 333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500,
  222, 833, 556, 556, 556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584]
_PAD = bytes.fromhex('28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A')
HELVETICA, COURIER, UNMAPPED, CIPHER = 'F1', 'F2', 'F3', 'F4'


@dataclasses.dataclass
class Sheet:
  """A page: what is drawn on it, from the upper left corner, in points."""

  width: float = 595  # that of the first page is said of all, as files do: a page says only what is different
  height: float = 842
  rotate: int = 0
  operations: list[str] = dataclasses.field(default_factory=list)
  images: list[np.ndarray] = dataclasses.field(default_factory=list)

  def line(self, x: float, y: float, text: str, size: float = 10, font: str = HELVETICA, justify: float = 0, turn: float = 0,
           invisible: bool = False) -> None:
    """Text with its baseline at y. justify: the width to fill by wider spaces. turn: degrees against the clock."""
    spacing = (justify - width_of(text, size)) / max(1, text.count(' ')) if justify else 0
    sine, cosine = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    escaped = re.sub(r'([()\\])', r'\\\1', text)
    place = f'{cosine:.5f} {sine:.5f} {-sine:.5f} {cosine:.5f} {x:.3f} {self.height - y:.3f}'
    self.operations.append(f'BT {3 if invisible else 0} Tr {spacing:.4f} Tw /{font} {size} Tf {place} Tm ({escaped}) Tj ET')

  def picture(self, image: np.ndarray, x: float = 0, y: float = 0, width: float = 0, height: float = 0) -> None:
    """A grey image, uint8 [height, width]; over the whole page if nothing else is said."""
    width, height = width or self.width, height or self.height
    self.operations.append(f'q {width} 0 0 {height} {x} {self.height - y - height} cm /I{len(self.images)} Do Q')
    self.images.append(image)


def width_of(text: str, size: float) -> float:
  return sum(_WIDTHS[ord(character) - 32] for character in text) * size / 1000


def make_pdf(sheets: list[Sheet], password: str | None = None) -> bytes:
  """The file. password: what it takes to open it; '' encrypts it so that it opens without one."""
  encrypt, entry = _encryption(password) if password is not None else (lambda number, data: data, '')
  bodies = ['<< /Type /Catalog /Pages 2 0 R >>', '']
  stream = lambda data, facts='': f'<< {facts} /Length {len(data)} >>\nstream\n'.encode('latin-1') + data + b'\nendstream'

  box_of = lambda sheet: f'/MediaBox [0 0 {sheet.width} {sheet.height}]'

  def add(body: str | bytes, data: bytes | None = None) -> int:
    number = len(bodies) + 1
    bodies.append(body if data is None else stream(encrypt(number, data), body))
    return number

  fonts = [add(f'<< /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>')
           for name in ('Helvetica', 'Courier')]
  for meaning in (lambda code: 0xE000 + code, lambda code: ord(_turn_13(chr(code)))):
    to_unicode = add('', _to_unicode(meaning))
    fonts.append(add('<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding '
                     f'/ToUnicode {to_unicode} 0 R >>'))
  kids = []
  for sheet in sheets:
    images = [add(f'/Type /XObject /Subtype /Image /Width {image.shape[1]} /Height {image.shape[0]} /ColorSpace /DeviceGray '
                  '/BitsPerComponent 8 /Filter /FlateDecode', zlib.compress(image.tobytes(), 1)) for image in sheet.images]
    content = add('', '\n'.join(sheet.operations).encode('latin-1'))
    resources = ' '.join(f'/F{i} {number} 0 R' for i, number in enumerate(fonts, 1))
    objects = ' '.join(f'/I{i} {number} 0 R' for i, number in enumerate(images))
    own_box = box_of(sheet) if box_of(sheet) != box_of(sheets[0]) else ''
    kids.append(add(f'<< /Type /Page /Parent 2 0 R {own_box} /Rotate {sheet.rotate} /Contents {content} 0 R '
                    f'/Resources << /Font << {resources} >> /XObject << {objects} >> >> >>'))
  bodies[1] = f'<< /Type /Pages /Count {len(kids)} /Kids [{" ".join(f"{kid} 0 R" for kid in kids)}] {box_of(sheets[0])} >>'
  file, places = b'%PDF-1.4\n', []
  for number, body in enumerate(bodies, 1):
    places.append(len(file))
    file += f'{number} 0 obj\n'.encode() + (body if isinstance(body, bytes) else body.encode('latin-1')) + b'\nendobj\n'
  table = f'xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n' + ''.join(f'{place:010} 00000 n \n' for place in places)
  trailer = f'trailer << /Size {len(bodies) + 1} /Root 1 0 R {entry} >>\nstartxref\n{len(file)}\n%%EOF\n'
  return file + (table + trailer).encode('latin-1')


def _turn_13(character: str) -> str:
  return character.translate({a + i: a + (i + 13) % 26 for a in (65, 97) for i in range(26)})


def _to_unicode(meaning) -> bytes:
  pairs = '\n'.join(f'<{code:02x}> <{meaning(code):04x}>' for code in range(33, 127))
  return (f'/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def 1 begincodespacerange <00> <ff> '
          f'endcodespacerange 94 beginbfchar\n{pairs}\nendbfchar endcmap end end').encode()


def _encryption(password: str):
  """(encrypt(object number, data), entries of the trailer) of the standard handler, revision 2: PDF 1.4, section 3.5."""
  padded, identity = (password.encode() + _PAD)[:32], b'maxlm test file.'
  owner = _rc4(hashlib.md5(padded).digest()[:5], padded)
  key = hashlib.md5(padded + owner + b'\xfc\xff\xff\xff' + identity).digest()[:5]
  entry = (f'/ID [<{identity.hex()}> <{identity.hex()}>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{owner.hex()}> '
           f'/U <{_rc4(key, _PAD).hex()}> >>')
  return lambda number, data: _rc4(hashlib.md5(key + number.to_bytes(3, 'little') + b'\0\0').digest()[:10], data), entry


def _rc4(key: bytes, data: bytes) -> bytes:
  state, j, out, i = list(range(256)), 0, bytearray(), 0
  for k in range(256):
    j = (j + state[k] + key[k % len(key)]) % 256
    state[k], state[j] = state[j], state[k]
  j = 0
  for byte in data:
    i, j = (i + 1) % 256, (j + state[(i + 1) % 256]) % 256
    state[i], state[j] = state[j], state[i]
    out.append(byte ^ state[(state[i] + state[j]) % 256])
  return bytes(out)


def english(seed: int, n_paragraphs: int, n_words: int = 90) -> list[str]:
  """Paragraphs of real sentences, from the reference that is inside Python; each begins with a capital, ends with a stop."""
  words = [word for _, text in sorted(topics.items()) for word in re.findall(r"(?<=\s)[a-z]{2,}[,;]?(?=\s)", text)]
  chance, paragraphs = random.Random(seed), []
  for _ in range(n_paragraphs):
    start = chance.randrange(len(words) - n_words)
    some = [word.rstrip(',;') if chance.random() < 0.9 else word for word in words[start:start + n_words]]
    paragraphs.append(' '.join(some).rstrip(',;').capitalize() + '.')
  return paragraphs


def set_paragraph(sheet: Sheet, x: float, y: float, width: float, text: str, hyphenate: bool = False, indent: float = 0,
                  **how) -> float:
  """Sets a justified paragraph with its first baseline at y; returns where the next line would be."""
  words, size = text.split(), how.get('size', 10)
  while words:
    line, room = [], width - indent
    while words and width_of(' '.join([*line, words[0]]), size) <= room:
      line.append(words.pop(0))
    if hyphenate and words and len(words[0]) > 6 and words[0].isalpha() and (
        width_of(' '.join([*line, words[0][:3] + '-']), size) <= room):
      line.append(words[0][:3] + '-')
      words[0] = words[0][3:]
    sheet.line(x + indent, y, ' '.join(line), justify=room if words else 0, **how)
    y, indent = y + 1.2 * size, 0
  return y


def prose(seed: int, n_paragraphs: int = 5, **how) -> tuple[Sheet, str]:
  """(a page of paragraphs in one column, their text)."""
  sheet, y, paragraphs = Sheet(), 90.0, english(seed, n_paragraphs)
  for paragraph in paragraphs:
    y = set_paragraph(sheet, 72, y, 468, paragraph, **how) + 8
  return sheet, '\n\n'.join(paragraphs)


def two_columns(seed: int, interleaved: bool = False) -> tuple[Sheet, str]:
  """(a page with a heading over two columns, its text). interleaved: the file has their lines by turns."""
  heading = 'What is written about names and about the values they are bound to'
  sheet, paragraphs = Sheet(), english(seed, 6, 70)
  sheet.line(72, 80, heading, size=14)
  ends = [len(sheet.operations)]
  for x, of_column in ((72, paragraphs[:3]), (318, paragraphs[3:])):
    y = 110.0
    for paragraph in of_column:
      y = set_paragraph(sheet, x, y, 222, paragraph, hyphenate=True) + 8
    ends.append(len(sheet.operations))
  if interleaved:
    columns = [sheet.operations[a:b] for a, b in zip(ends, ends[1:])]
    longest = max(map(len, columns))
    by_turns = zip(*(column + [''] * (longest - len(column)) for column in columns))
    sheet.operations[ends[0]:] = [operation for pair in by_turns for operation in pair]
  return sheet, '\n\n'.join([heading, *paragraphs])


def edit_distance(a: str, b: str) -> int:
  """Levenshtein's, a column of the table in the bits of an integer (Myers 1999; Hyyrö 2003)."""
  if not a:
    return len(b)
  places, last = {}, 1 << (len(a) - 1)
  for i, character in enumerate(a):
    places[character] = places.get(character, 0) | 1 << i
  more, less, distance, mask = (1 << len(a)) - 1, 0, len(a), (1 << len(a)) - 1
  for character in b:
    equal = places.get(character, 0)
    vertical = equal | less
    horizontal = (((equal & more) + more) ^ more) | equal
    up, down = less | ~(horizontal | more), more & horizontal
    distance += bool(up & last) - bool(down & last)
    up, down = up << 1 | 1, down << 1
    more, less = (down | ~(vertical | up)) & mask, up & vertical & mask
  return distance


def error_rate(found: str, truth: str) -> float:
  """Wrong characters as a share of those there are, whatever the line ends and spaces between."""
  found, truth = (' '.join(text.split()) for text in (found, truth))
  return edit_distance(truth, found) / max(1, len(truth))
