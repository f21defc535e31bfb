"""Real documents, long and short, worked problems, and questions on long texts, at a size for minutes: for runs with stages.

    python -m data_pipeline.build --recipe=staged_tiny --out=corpora/staged_tiny

Rows of 256 and of 1024 tokens. In 'recall' questions follow on short texts: a model learns there to look up what it read.
A stage of long rows takes 'long_recall', the same questions on texts that fill a row, and more of the long documents
('web.1024', 'pdf.1024'), beside what it had before.
"""

from data_pipeline.dedup.exact import Exact
from data_pipeline.filters.heuristics import Compression, GopherQuality, GopherRepetition
from data_pipeline.filters.language import Language
from data_pipeline.filters.pii import Redact
from data_pipeline.filters.step import Filters
from data_pipeline.recipe import Recipe
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.long_range import LongRange
from data_pipeline.sources.pdf import DebianPdfs
from data_pipeline.sources.puzzles import Puzzles

LOOKED_UP = ('multi_key', 'multi_key', 'needle', 'multi_key', 'multi_key', 'tracking', 'multi_key', 'common')
CLEAN = Filters(sources=('web', 'pdf'), rules=(
  GopherRepetition(), GopherQuality(max_words=None, min_alphabetic_words=0.6), Compression(), Language(keep=('en',)),
  Redact()))


def get_recipe() -> Recipe:
  return Recipe(
    name='staged_tiny',
    sources=(
      DebianPackage(name='web', packages=('abs-guide', 'debian-reference-en'), pages='*.html'),
      DebianPdfs(name='pdf', packages=('erlang-doc',), pages='*/pdf/[a-d]*.pdf', ocr=None),
      Puzzles(name='reasoning', kinds=('arithmetic', 'algebra', 'sorting'), levels=(1, 2), documents=1500, characters=500),
      LongRange(name='recall', tasks=LOOKED_UP, documents=30_000, characters=(0, 80, 0, 300, 800), facts=8),
      LongRange(name='long_recall', tasks=LOOKED_UP, documents=1500, characters=(600, 2_000, 4_000), facts=8, seed=1),
    ),
    steps=(CLEAN, Exact()),
    vocab_size=2048,
    seq_lens=(256, 1024),
    length_buckets=(1024,),
    validation_fraction=0.05,
    min_bytes=20,
  )
