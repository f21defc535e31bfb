"""Rates of dedup and decontamination on one core, and what their tasks take of memory.

    python tests/benchmarks/data_dedup.py [--peer=PYTHON] TEXT.jsonl …

TEXT.jsonl: {"text": …} a line; without one, text is made up. --peer: an interpreter that has datasketch, for the same 128
hashes of word 5-grams. Seconds are those of the processor.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import judging
import pyarrow as pa

from data_pipeline import words
from data_pipeline.decontaminate import Decontaminate
from data_pipeline.dedup import fuzzy
from data_pipeline.dedup.exact import Exact
from data_pipeline.dedup.fuzzy import Fuzzy
from data_pipeline.dedup.substring import Substrings

PEER = """
import json, sys, time
from datasketch import MinHash
texts = json.load(sys.stdin)
start = time.process_time()
for text in texts:
  found = text.lower().split()
  minhash = MinHash(num_perm=128)
  minhash.update_batch([' '.join(found[i:i + 5]).encode() for i in range(len(found) - 4)])
print(time.process_time() - start)
"""


def made_up(n_bytes: int) -> list[str]:
  """Text of about that size: words of a few letters, frequent and rare ones; a document in ten a copy with a few changes."""
  chance, texts, size = random.Random(0), [], 0
  vocabulary = [''.join(chance.choices('etaoinshrdlu', k=chance.randint(2, 10))) for _ in range(50_000)]
  while size < n_bytes:
    if texts and chance.random() < 0.1:
      found = chance.choice(texts).split()
      found[chance.randrange(len(found))] = 'changed'
    else:
      found = [vocabulary[int(50_000 * chance.random()**3)] for _ in range(chance.randint(50, 3000))]
    texts.append(' '.join(found))
    size += len(texts[-1])
  return texts


def timed(what: str, n_bytes: int, call, times: int = 3):
  call()  # compiles
  seconds = []
  for _ in range(times):
    start = time.process_time()
    result = call()
    seconds.append(time.process_time() - start)
  print(f'{what:44} {n_bytes / 1e6 / min(seconds):8.1f} MB/s')
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('files', nargs='*')
  parser.add_argument('--peer', help='an interpreter with datasketch')
  parser.add_argument('--megabytes', type=float, default=100, help='of text at most')
  arguments = parser.parse_args()
  texts = [json.loads(line)['text'] for file in arguments.files for line in open(file, encoding='utf-8')]
  texts = texts or made_up(int(arguments.megabytes * 1e6))
  n_bytes = sum(len(text.encode()) for text in texts)
  print(f'{len(texts):,} documents, {n_bytes / 1e6:.1f} MB')
  column, step = pa.array(texts, pa.large_string()), Fuzzy()
  n_hashes = step.bands[0] * step.bands[1]
  normal = timed('normal form', n_bytes, lambda: words.normal(column))
  grams, first = timed('word 5-grams of it', n_bytes, lambda: words.ngrams(normal, 5))
  timed(f'{n_hashes} minima of those', n_bytes, lambda: fuzzy._minima(grams, first, *fuzzy._permutations(n_hashes)))
  timed('MinHash signatures from text', n_bytes, lambda: fuzzy._minima(*words.ngrams(words.normal(column), 5),
                                                                        *fuzzy._permutations(n_hashes)))
  if arguments.peer:
    some = texts[:max(1, len(texts) // 20)]
    done = subprocess.run([arguments.peer, '-c', PEER], input=json.dumps(some), capture_output=True, text=True, check=True)
    print(f'{"datasketch, 128 hashes":44} {sum(len(text.encode()) for text in some) / 1e6 / float(done.stdout):8.1f} MB/s')
  with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as nothing, contextlib.redirect_stderr(nothing):
    root = pathlib.Path(folder)
    evals = root / 'evals.jsonl'
    chance = random.Random(1)
    some = [word for text in texts[:100] for word in text.split()]
    questions = [' '.join(chance.choices(some, k=chance.randint(12, 80))) for _ in range(2000)]
    evals.write_text('\n'.join(json.dumps({'q': question}) for question in questions))
    judging.judge(root / 'warm', Fuzzy(), judging.write(root / 'warm', [['warm ' * 20, 'warm ' * 21, 'up ' * 20]]))
    judging.judge(root / 'warm', Substrings(min_bytes=50), judging.write(root / 'warm', [['warm ' * 20, 'up ' * 20]]))
    n_shards = 1 + n_bytes // (64 << 20)
    of = judging.write(root, [texts[i::n_shards] for i in range(n_shards)])
    for one in (Exact(), Fuzzy(), Substrings(), Decontaminate(against=(str(evals),))):
      start = time.process_time()
      records, _ = judging.judge(root, one, of)
      seconds = time.process_time() - start
      work = sum(path.stat().st_size for path in root.glob(f'build/steps/{one.name}/*'))
      gone = sum(of_reason['documents'] for record in records for of_reason in record['removed'].values())
      most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
      print(f'{f"step {one.name}, shards to verdicts":44} {n_bytes / 1e6 / seconds:8.1f} MB/s, {gone:,} documents gone; '
            f'{work / n_bytes:.2f} bytes a byte on disk meanwhile; {most:.2f} GB at most so far')


if __name__ == '__main__':
  main()
