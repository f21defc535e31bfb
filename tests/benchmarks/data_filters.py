"""How fast the rules of data_pipeline/filters judge the documents of a corpus, in MB of text a second of one core.

    PYTHONPATH=. python tests/benchmarks/data_filters.py CORPUS [--plain=2] [--rounds=3] [--json]

CORPUS: a directory that data_pipeline.build made; its documents are judged as they are, all of them by every rule. CPU
seconds, the best of the rounds. "plain": the same counts in plain Python (tests/plain_filters.py), on the first PLAIN
megabytes. "all heuristics" are the rules that count words and lines, one after the other.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.filters.heuristics import C4Lines, C4Pages, Compression, FineWeb, GopherQuality, GopherRepetition
from data_pipeline.filters.language import Language
from data_pipeline.filters.pii import Redact
from data_pipeline.filters.quality import Quality
from data_pipeline.filters.step import Texts
from data_pipeline.filters.urls import Urls
from tests import plain_filters as plain

HEURISTICS = (GopherQuality(), GopherRepetition(), FineWeb(), C4Lines(), C4Pages())


def documents(corpus: pathlib.Path) -> tuple[list[str], list[str]]:
  paths = sorted((corpus / 'documents').rglob('*.parquet'))
  table = pa.concat_tables(pq.read_table(path, columns=['text', 'url']) for path in paths)
  return table['text'].to_pylist(), table['url'].to_pylist()


def seconds(work, rounds: int = 1) -> float:
  times = []
  for _ in range(rounds):
    started = time.process_time()
    work()
    times.append(time.process_time() - started)
  return min(times)


def plain_seconds(texts: list[str]) -> dict[str, float]:
  lines = C4Lines()
  work = {
    'GopherQuality': lambda text: plain.quality(text, GopherQuality().stop_words), 'GopherRepetition': plain.repetition,
    'FineWeb': lambda text: plain.line_shares(text, FineWeb().stops, FineWeb().short_line), 'C4Pages': plain.sentences,
    'C4Lines': lambda text: plain.cut_lines(text, lines.terminal, lines.min_words, lines.max_word_length, lines.phrases),
    'Redact': plain.redacted}
  return {name: seconds(lambda: list(map(one, texts))) for name, one in work.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('corpus', type=pathlib.Path)
  parser.add_argument('--plain', type=float, default=2.0, help='megabytes for plain Python; 0: none')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json', action='store_true')
  arguments = parser.parse_args()
  found, urls = documents(arguments.corpus)
  batches = [Texts.of([text.encode() for text in found[i:i + 1000]], urls[i:i + 1000]) for i in range(0, len(found), 1000)]
  size = sum(len(batch.data) for batch in batches) / 1e6
  with tempfile.TemporaryDirectory() as folder:
    model = f'{folder}/model.npz'
    np.savez(model, format=1, weights=np.zeros(1 << 20, np.float32), bias=0.0, bounds=np.linspace(-1, 1, 19))
    rules = (*HEURISTICS, Compression(), Urls(), Language(), Redact(), Quality(model=model))
    taken = {}
    for rule in rules:
      judge = lambda: [rule.judge(batch, np.arange(len(batch.urls))) for batch in batches]
      judge()  # compiles
      taken[type(rule).__name__] = seconds(judge, arguments.rounds)
  few, n_bytes = [], 0
  for text in found:
    if n_bytes < arguments.plain * 1e6:
      few, n_bytes = [*few, text], n_bytes + len(text.encode())
  slow = {name: n_bytes / 1e6 / time_ for name, time_ in plain_seconds(few).items()} if few else {}
  rates = {name: size / time_ for name, time_ in taken.items()}
  of_all = lambda times: size / sum(times[type(rule).__name__] for rule in HEURISTICS)
  rates['all heuristics'] = of_all(taken)
  if slow:
    slow['all heuristics'] = 1 / sum(1 / slow[type(rule).__name__] for rule in HEURISTICS)
  rates['everything'] = size / sum(taken.values())
  if arguments.json:
    print(json.dumps({'documents': len(found), 'MB': size, 'MB_a_second': rates, 'plain': slow}))
    return
  print(f'{len(found):,} documents, {size:.1f} MB\n\n| rule | MB/s a core | plain Python |\n|---|---:|---:|')
  for name, rate in rates.items():
    print(f'| {name} | {rate:,.1f} | {f"{slow[name]:.2f}" if name in slow else ""} |')


if __name__ == '__main__':
  main()
