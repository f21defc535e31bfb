"""How fast packed rows become batches, in tokens a second of one process.

    python tests/benchmarks/loader.py CORPUS --seq_len=256
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from data_pipeline import loader, mixture


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('corpus')
  parser.add_argument('--seq_len', type=int, default=256)
  parser.add_argument('--seconds', type=float, default=3.0)
  arguments = parser.parse_args()
  started = time.perf_counter()
  corpus = loader.open_corpus(arguments.corpus, arguments.seq_len)
  print(f'open: {1e3 * (time.perf_counter() - started):.1f} ms')
  schedule = mixture.MixtureSchedule(stages=((None, {name: corpus.rows(name) for name in corpus.sources}),))
  for batch_size in (32, 128, 512):
    for num_threads in (0, 1, 2, 4):
      started = time.perf_counter()
      batches = loader.batches(corpus, schedule, seed=0, batch_size=batch_size, cursor=12_345_678, num_threads=num_threads)
      next(batches)
      first, n_batches, started = time.perf_counter() - started, 0, time.perf_counter()
      while time.perf_counter() - started < arguments.seconds:
        next(batches)
        n_batches += 1
      rate = n_batches * batch_size * arguments.seq_len / (time.perf_counter() - started)
      batches.close()
      print(f'batch {batch_size:4} x {arguments.seq_len}, {num_threads} threads: {rate / 1e6:6.1f} Mtok/s, '
            f'first batch after {1e3 * first:.0f} ms')


if __name__ == '__main__':
  main()
