"""All rates of the data pipeline, with their targets, in one run.

    PYTHONPATH=. python tests/benchmarks/data.py [--peer=VENV/bin/python] [--packages=python3.11-doc,linux-doc-6.1]
      [--pdfs=erlang-doc] [--only=cores,web,filters,dedup,pdf,tokens,packing] [--rounds=3]

Debian packages are the text. First a corpus is built of their pages; then each part is measured on it: CPU seconds of one
core, the best of the rounds, since they vary less than seconds on a busy machine. "cores" are the seconds that the same
build takes, with its tokenizer given, on one core of this machine and on two: they mean something only where nothing else
runs. The peers are warcio with trafilatura, datasketch (in the interpreter that --peer names) and the tokenizers library.
`data_web.py`, `data_filters.py`, `data_dedup.py`, `ocr.py` and `extraction.py` say more of their parts.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from data_pipeline import pack, tokenizer, words
from data_pipeline.dedup import fuzzy
from data_pipeline.sources import layout, pdf_pages
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.pdf import DebianPdfs
from tests.benchmarks import data_dedup, data_filters, data_web

SEQ_LEN, PARTS = 2048, 8
RECIPE = """
from data_pipeline.dedup.exact import Exact
from data_pipeline.dedup.fuzzy import Fuzzy
from data_pipeline.filters.heuristics import GopherQuality, GopherRepetition
from data_pipeline.filters.step import Filters
from data_pipeline.recipe import Recipe
from data_pipeline.sources.text_files import TextFiles

def get_recipe():
  sources = tuple(TextFiles(name=f'web{{i}}', pattern=f'{pages}/{{i}}/*.html') for i in range({parts}))
  return Recipe(name='benchmark', sources=sources, vocab_size=32_000, seq_lens=({seq_len},), validation_fraction=0.01,
                min_bytes=200, steps=(Filters(rules=(GopherQuality(max_words=None), GopherRepetition())), Exact(), Fuzzy()))
"""


def unpack(folder: Path, packages: list[str]) -> int:
  """Writes the pages into PARTS folders, by turns; returns their bytes."""
  n_bytes, i = 0, 0
  for part in range(PARTS):
    (folder / 'pages' / str(part)).mkdir(parents=True)
  for name in packages:
    package = DebianPackage(name=name, pages='*.html')
    for unit in package.fetch(folder / 'scratch'):
      for page in package.read(unit):
        (folder / 'pages' / str(i % PARTS) / f'{i}.html').write_bytes(page.content)
        n_bytes, i = n_bytes + len(page.content), i + 1
  (folder / 'recipe.py').write_text(RECIPE.format(pages=folder / 'pages', parts=PARTS, seq_len=SEQ_LEN))
  return n_bytes


def best(work, rounds: int):
  """(CPU seconds, result) of the quickest round; what compiles does so before."""
  result, times = work(), []
  for _ in range(rounds):
    started = time.process_time()
    result = work()
    times.append(time.process_time() - started)
  return min(times), result


# A row each: (what, value, unit, target, beside it)


def web(corpus, arguments) -> list[tuple]:
  ours, *peers = data_web.measure(arguments.peer, rounds=arguments.rounds)
  beside = ', '.join(f'{peer["name"]}: {peer["mb_per_s"]:.1f}' for peer in peers)
  return [('web archive to documents', ours['mb_per_s'], 'MB of HTML/s', 15, beside)]


def filters(corpus, arguments) -> list[tuple]:
  done = subprocess.run([sys.executable, data_filters.__file__, str(corpus), '--json', f'--rounds={arguments.rounds}'],
                        capture_output=True, text=True, check=True, env=os.environ | {'PYTHONPATH': '.'})
  found = json.loads(done.stdout)
  return [('heuristics, all', found['MB_a_second']['all heuristics'], 'MB/s', 10,
           f'plain Python: {found["plain"]["all heuristics"]:.2f}')]


def dedup(corpus, arguments) -> list[tuple]:
  texts, _ = data_filters.documents(corpus)
  column, step = pa.array(texts, pa.large_string()), fuzzy.Fuzzy()
  permutations = fuzzy._permutations(step.bands[0] * step.bands[1])
  size = lambda some: sum(len(text.encode()) for text in some) / 1e6
  seconds, _ = best(lambda: fuzzy._minima(*words.ngrams(words.normal(column), step.ngram), *permutations), arguments.rounds)
  beside = ''
  if arguments.peer:
    some = texts[:max(1, len(texts) // 20)]
    done = subprocess.run([arguments.peer, '-c', data_dedup.PEER], input=json.dumps(some), capture_output=True, text=True,
                          check=True)
    beside = f'datasketch: {size(some) / float(done.stdout):.1f}'
  return [('MinHash signatures', size(texts) / seconds, 'MB/s', 25, beside)]


def pdf(corpus, arguments) -> list[tuple]:
  with tempfile.TemporaryDirectory() as scratch:
    source = DebianPdfs(name=arguments.pdfs, ocr=None)
    opened = [pdf_pages.opened(raw.content) for unit in source.fetch(Path(scratch)) for raw in source.read(unit)]
    pages = [(document, i) for document in opened for i in range(len(document))][::4]

    def read():
      for document, i in pages:
        layer = pdf_pages.text_layer(document[i])
        pdf_pages.route(document[i], layer)
        layout.document(layer.pages)

    seconds, _ = best(read, arguments.rounds)
  return [('PDF text layer, routed and laid out', len(pages) / seconds, 'pages/s', 100, '')]


def tokens(corpus, arguments) -> list[tuple]:
  encoder, (texts, _) = tokenizer.load(corpus / 'tokenizer.json'), data_filters.documents(corpus)
  theirs = lambda: [ids for i in range(0, len(texts), 256)
                    for ids in encoder.encode_batch_fast(texts[i:i + 256], add_special_tokens=False)]
  ours, found = best(lambda: list(tokenizer.encode(encoder, texts)), arguments.rounds)
  peer, expected = best(theirs, 1)
  assert all(ids.tolist() == other.ids for ids, other in zip(found, expected, strict=True))
  n = sum(map(len, found)) / 1e6
  return [(f'tokens, vocabulary of {encoder.get_vocab_size():,}', n / ours, 'Mtok/s', 0.6, f'tokenizers: {n / peer:.2f}')]


def packing(corpus, arguments) -> list[tuple]:
  encoder, (texts, _) = tokenizer.load(corpus / 'tokenizer.json'), data_filters.documents(corpus)
  pieces = pack.cut(list(tokenizer.encode(encoder, texts)), SEQ_LEN)
  seconds, bins = best(lambda: pack.best_fit_decreasing(pieces.lengths, SEQ_LEN), arguments.rounds)
  filled = int(pieces.lengths.sum())
  return [(f'packing into rows of {SEQ_LEN}, fill', filled / len(bins) / SEQ_LEN, 'of 1', 0.999, f'{len(bins):,} rows'),
          ('packing, rate', filled / 1e6 / seconds, 'Mtok/s', None, '')]


def run_build(folder: Path, name: str, cores: set[int]) -> tuple[float, float]:
  """(seconds, GB that the process takes)."""
  tokenizer_of = [f'--tokenizer={folder / "corpus"}'] * (name != 'corpus')
  started = time.monotonic()
  with open(folder / 'log', 'w') as log:
    process = subprocess.Popen([sys.executable, '-m', 'data_pipeline.build', f'--recipe={folder / "recipe.py"}',
                                f'--out={folder / name}', f'--workers={len(cores)}', *tokenizer_of], stderr=log,
                               preexec_fn=functools.partial(os.sched_setaffinity, 0, cores))
    _, status, usage = os.wait4(process.pid, 0)
  assert status == 0, (folder / 'log').read_text()
  return time.monotonic() - started, usage.ru_maxrss / 1e6


def cores(corpus, arguments) -> list[tuple]:
  every, times, memory = sorted(arguments.cores), {1: [], 2: []}, 0
  for _ in range(arguments.rounds):
    for n in times:
      seconds, gigabytes = run_build(corpus.parent, 'again', set(every[:n]))
      times[n].append(seconds)
      memory = max(memory, gigabytes) if n == 1 else memory  # where all but the sandbox is one process
      shutil.rmtree(corpus.parent / 'again')
  one, two = (min(of) for of in times.values())
  return [('the same build, two cores against one', one / two, 'times', 1.8, f'{one:.1f} s, {two:.1f} s'),
          ('memory of that on one core', memory, 'GB', None, '')]


def main() -> None:
  parts = (cores, web, filters, dedup, pdf, tokens, packing)  # cores first: a process is said to take what its parent has
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--peer', default='', help='a Python with warcio, trafilatura and datasketch')
  parser.add_argument('--packages', default='python3.11-doc,linux-doc-6.1')
  parser.add_argument('--pdfs', default='erlang-doc')
  parser.add_argument('--only', default=','.join(part.__name__ for part in parts))
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  arguments.cores = os.sched_getaffinity(0)
  if 'cores' in arguments.only and len(arguments.cores) < 2:
    parser.error('two cores against one: this process may use only one')
  with tempfile.TemporaryDirectory() as folder:
    n_bytes = unpack(Path(folder), arguments.packages.split(','))
    run_build(Path(folder), 'corpus', arguments.cores)
    corpus = Path(folder) / 'corpus'
    n_documents = sum(record['documents'] for record in json.loads(
      (corpus / 'report.json').read_text())['stages'][0]['sources'].values())
    print(f'{n_bytes / 1e6:.0f} MB of HTML, {n_documents:,} documents, {time.strftime("%Y-%m-%d")}\n\n'
          '| | measured | target | beside it |\n|---|---:|---:|---|')
    os.sched_setaffinity(0, {min(arguments.cores)})
    for part in parts:
      if part.__name__ in arguments.only.split(','):
        for what, value, unit, target, beside in part(corpus, arguments):
          digits = 4 if unit == 'of 1' else 2 if value < 100 else 0
          wanted = '' if target is None else f'{target:g}' + ('' if value >= target else ' MISSED')
          print(f'| {what} | {value:,.{digits}f} {unit} | {wanted} | {beside} |', flush=True)


if __name__ == '__main__':
  main()
