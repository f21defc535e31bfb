"""PDFs -> text: the text layer of a page where it is usable, what a reader of images makes of the page where it is not.

    Pdfs(name='papers', pattern='/data/papers/**/*.pdf')                      scanned pages by tesseract
    Pdfs(name='papers', pattern='…', ocr=None)                                text layers only
    DebianPdfs(name='r-doc-pdf')                                              the PDFs of a Debian package
    Scanned(name='scans', of=DebianPdfs(name='r-doc-pdf'), pages=4)           pages as images, so that OCR has a truth

A PDF is opened only inside `sandbox.Sandbox`. Never half a document without a word: one with too many pages, or with too
many that cannot be read, is left out with that reason, and what is lost of one that is kept is counted.
"""

import dataclasses
import importlib.metadata
import io
import pathlib
from collections.abc import Iterator

import pypdfium2 as pdfium

from data_pipeline import shards
from data_pipeline.recipe import Input, Limits, Raw, Unreadable
from data_pipeline.sources import debian, files, layout, ocr, pdf_pages
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.ocr import Endpoint, RapidOcr, Tesseract

_BYTES_A_SHARD = 32 << 20


@dataclasses.dataclass(kw_only=True, frozen=True)
class _PdfSource:
  """What all sources of PDFs have."""

  name: str
  ocr: Tesseract | RapidOcr | Endpoint | None = Tesseract()  # None: pages without a text layer are lost
  dpi: int = 300  # of the images that it reads, whatever a scan has: tesseract errs half as often as at 200
  max_pages: int = 5000  # of a document
  max_ocr_pages: int = 500  # of a document, that need OCR
  limits: Limits = Limits(max_bytes=256 << 20, cpu_seconds=180, wall_seconds=7200)  # of a document; OCR waits in wall time

  def state(self) -> str:
    """The versions of everything that decides the text."""
    return ' '.join(['pdfium', importlib.metadata.version('pypdfium2'), self.ocr.state() if self.ocr else '',
                     shards.code_of(layout, ocr, pdf_pages, debian, files)])

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    if self.ocr:
      self.ocr.check()
    return self._inputs(scratch)

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    """(text, what is counted: pages, those with OCR, those without text, those lost, running lines taken out)."""
    return pdf_pages.extract(raw.content, self.ocr, self.dpi, self.max_pages, self.max_ocr_pages)


@dataclasses.dataclass(kw_only=True, frozen=True)
class Pdfs(_PdfSource):
  """PDF files, gzipped ones too. pattern: as of `glob`, '/data/papers/**/*.pdf', or a URL that fsspec knows."""

  pattern: str

  def state(self) -> str:
    return f'{super().state()} {files.state(self.name, self.pattern)}'

  def _inputs(self, scratch: pathlib.Path) -> list[Input]:
    return files.inputs(self.name, self.pattern, _BYTES_A_SHARD)

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    for path in unit.paths:
      with files.opened(path) as file:
        yield _uncompressed(path, file, self.limits.max_bytes)


@dataclasses.dataclass(kw_only=True, frozen=True)
class DebianPdfs(_PdfSource):
  """The PDFs of Debian packages. packages: the one of the source's name if none."""

  packages: tuple[str, ...] = ()
  pages: str = '*.pdf'  # which members; '*.pdf.gz' of packages that compress them

  def _inputs(self, scratch: pathlib.Path) -> list[Input]:
    return DebianPackage(name=self.name, packages=self.packages, pages=self.pages).fetch(scratch)

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    for raw in DebianPackage(name=self.name, packages=self.packages, pages=self.pages).read(unit):
      yield _uncompressed(raw.url, io.BytesIO(raw.content), self.limits.max_bytes)


@dataclasses.dataclass(kw_only=True, frozen=True)
class Scanned(_PdfSource):
  """`pages` of each PDF of another source, evenly spread, as a scanner would give them: images, without a text layer."""

  of: Pdfs | DebianPdfs
  pages: int = 10
  scan_dpi: int = 200

  def state(self) -> str:
    return f'{super().state()} {self.of.state()}'

  def _inputs(self, scratch: pathlib.Path) -> list[Input]:
    return self.of.fetch(scratch)

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    for raw in self.of.read(unit):
      yield dataclasses.replace(raw, url=f'{raw.url}#scanned')

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    return super().extract(dataclasses.replace(raw, content=as_images(raw.content, self.pages, self.scan_dpi)))


def _uncompressed(path: str, file, limit: int) -> Raw | Unreadable:
  try:
    data = files.uncompressed(path, file).read(limit + 1)
  except OSError as error:
    return Unreadable(path, files.damage(error))
  return Raw(path, data) if len(data) <= limit else Unreadable(path, 'too large', len(data))


def as_images(data: bytes, n_pages: int, dpi: float) -> bytes:
  """A PDF of so many pages of a PDF, evenly spread, each a grey image and nothing else. Reject as of `extract`."""
  copy = pdfium.PdfDocument.new()
  with pdf_pages.opened(data) as document:
    n_pages = min(n_pages, len(document))
    for i in range(n_pages):
      page = document[(2 * i + 1) * len(document) // (2 * n_pages)]
      width, height = page.get_size()
      image = pdfium.PdfImage.new(copy)
      image.set_bitmap(pdf_pages.drawn(page, dpi)[0])
      image.set_matrix(pdfium.PdfMatrix().scale(width, height))
      sheet = copy.new_page(width, height)
      sheet.insert_obj(image)
      sheet.gen_content()
  file = io.BytesIO()
  copy.save(file)
  return file.getvalue()
