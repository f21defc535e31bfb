"""OCR against a truth: pages of PDFs with a text layer are drawn as a scanner would, read, and compared with their layer.

    PYTHONPATH=. python tests/benchmarks/ocr.py 'manuals/*.pdf' [--pages=12] [--dpi=100,150,200,300]
        [--reader=rapidocr]

For each resolution: the character error rate (wrong characters as a share of those in the layer; the order of reading is
part of it, line ends are not) and CPU seconds a page, with those of the program that reads. Then the text layers of all
pages: pages a second and core, and how `route` judges pages as they are and as scans.
"""

import argparse
import glob
import random
import resource
import statistics

from data_pipeline.sources import layout, pdf_pages
from data_pipeline.sources.layout import Page
from data_pipeline.sources.ocr import RapidOcr, Tesseract
from tests.pdfs import Sheet, error_rate, make_pdf


def cpu() -> float:
  """Seconds of this process and of the programs that it ran."""
  both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return sum(usage.ru_utime + usage.ru_stime for usage in both)


def scan_of(page, dpi: float) -> bytes:
  sheet = Sheet(*page.get_size())
  sheet.picture(pdf_pages.drawn(page, dpi)[0].to_numpy())
  return make_pdf([sheet])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('pattern')
  parser.add_argument('--pages', type=int, default=12)
  parser.add_argument('--dpi', default='100,150,200,300')
  parser.add_argument('--reader', choices=['tesseract', 'rapidocr'], default='tesseract')
  args = parser.parse_args()
  reader = Tesseract() if args.reader == 'tesseract' else RapidOcr()
  reader.check()
  documents = [pdf_pages.opened(open(path, 'rb').read()) for path in sorted(glob.glob(args.pattern, recursive=True))]
  chance, pages = random.Random(0), []
  while len(pages) < args.pages:  # of text: not title pages, nor tables of contents
    document = chance.choice(documents)
    page = document[chance.randrange(len(document))]
    text, _ = layout.document(pdf_pages.text_layer(page).pages)
    if len(text) > 800 and '…' not in text:
      pages.append((page, text))
  print(f'{len(pages)} pages of {len(documents)} PDFs, {sum(len(text) for _, text in pages)} characters; {reader.state()}')
  print('  dpi   mean error   median    worst   seconds a page   routes to OCR')
  for dpi in map(int, args.dpi.split(',')):
    rates, started, routed = [], cpu(), 0
    for page, text in pages:
      with pdf_pages.opened(scan_of(page, dpi)) as scan:
        image, drawn_dpi = pdf_pages.drawn(scan[0], dpi)
        found = reader.read(image.to_numpy().copy(), drawn_dpi)
        rates.append(error_rate(layout.document([Page(page.get_height(), found)])[0], text))
    seconds = (cpu() - started) / len(pages)
    for page, _ in pages:
      with pdf_pages.opened(scan_of(page, dpi)) as scan:
        routed += pdf_pages.route(scan[0], pdf_pages.text_layer(scan[0])) == 'image'
    print(f'  {dpi:3}   {statistics.fmean(rates):10.2%}   {statistics.median(rates):6.2%}   {max(rates):6.2%}   '
          f'{seconds:14.2f}   {routed:5} of {len(pages)}', flush=True)
  routes, started, n = [], cpu(), 0
  for document in documents:
    for i in range(0, len(document), max(1, len(document) // 100)):
      layer = pdf_pages.text_layer(page := document[i])
      routes.append(pdf_pages.route(page, layer))
      layout.document(layer.pages)
      n += 1
  print(f'text layers: {n / (cpu() - started):.0f} pages a second and core; '
        f'{routes.count("text") + routes.count("empty")} of {n} pages need no OCR')


if __name__ == '__main__':
  main()
