"""A classifier of quality: logistic regression on hashed n-grams of words, trained on documents that a user holds for good.

    python -m data_pipeline.filters.quality train --positive='good/*.jsonl' --out=quality.npz \\
      --negative='corpora/web/documents/web/*.parquet'

The files are those that the source TextFiles reads. The negatives stand for what is to be judged: the bounds of the buckets
are quantiles of their scores, so that as many of such documents fall in each ('q00' the worst). The rule `Quality` gives a
document its bucket, which makes it part of a source of its own (web.q07), and leaves out buckets whose weight is 0;
`weights` turns the rest of the curve into the weights of a mixture. A bucket is seen as often as its weight says: quality is
a matter of degree (OLMo 3, Nemotron-CC), and not a threshold.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from typing import ClassVar

import numba
import numpy as np
import pyarrow as pa
import xxhash

from data_pipeline import shards
from data_pipeline.filters import kernels
from data_pipeline.filters.step import Found, Rule, Texts, count, first_reason, hash_of
from data_pipeline.recipe import Limits, Raw, Reject, Unreadable
from data_pipeline.sandbox import Sandbox
from data_pipeline.sources.text import clean
from data_pipeline.sources.text_files import TextFiles

_BITS = 20  # of the hash of an n-gram: a weight for each
_WORDS = 2000  # from the beginning of a document
_HELD_OUT = 0.2
_FORMAT = 1


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Quality(Rule):
  """Columns `quality` (the log odds of being good) and `bucket` ('q00', the worst, and on).

  model: the file that `train` wrote. curve: how often each bucket is to be seen, from the worst to the best; 0 leaves it out
  (as 'quality'), the others are for `weights`. (): all are kept.
  """

  columns: ClassVar[dict[str, pa.DataType]] = {'quality': pa.float32(), 'bucket': pa.string()}
  model: str
  curve: tuple[float, ...] = ()

  def state(self) -> str:
    state = hash_of(self.model)
    n_buckets = len(_load(self.model, os.stat(self.model).st_mtime_ns)['bounds']) + 1
    if self.curve and (len(self.curve) != n_buckets or min(self.curve) < 0 or not max(self.curve)):
      raise ValueError(f'Quality: {self.model} has {n_buckets} buckets: curve={self.curve} needs a weight for each, 0 or '
                       'more, and not only 0')
    return state

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    model = _load(self.model, os.stat(self.model).st_mtime_ns)
    scores = kernels.score(texts.data, texts.offsets, rows, kernels.classes(), model['weights'], model['bias'], _WORDS)
    buckets = np.searchsorted(model['bounds'], scores, side='right')
    names = [f'q{bucket:02d}' for bucket in buckets]
    out = np.array([bool(self.curve) and self.curve[bucket] == 0 for bucket in buckets], bool)
    return Found(first_reason(len(rows), ('quality', out)), columns={'quality': scores, 'bucket': names},
                 facts={'quality': count(names)})


def weights(corpus, source: str, curve: tuple[float, ...], total: int = 1000) -> dict[str, int]:
  """Weights for a stage of `MixtureSchedule` in which each bucket of a source of a finished corpus is seen in proportion to
  its tokens times its weight in the curve: {'web.q03': 28, …}, adding up to about `total`, at least 1 each."""
  amounts = {}
  for part, facts in shards.read_manifest(pathlib.Path(corpus))['sources'].items():
    if match := re.fullmatch(re.escape(source) + r'\.q(\d\d)(\.\d+)?', part):
      bucket = int(match[1])
      if bucket >= len(curve):
        raise ValueError(f'the corpus {corpus} has a part {part} and the curve only {len(curve)} weights')
      amounts[part] = curve[bucket] * facts['train']['tokens']
  if not sum(amounts.values()):
    raise ValueError(f'the corpus {corpus} has no tokens in buckets of {source!r} that the curve wants')
  unit = total / sum(amounts.values())
  return {part: max(1, round(amount * unit)) for part, amount in amounts.items() if amount}


@functools.lru_cache(2)
def _load(path: str, changed: int) -> dict:
  """changed: when the file was, so that what is remembered is of the file as it is."""
  try:
    with np.load(path, allow_pickle=False) as file:
      model = {name: file[name] for name in ('format', 'weights', 'bias', 'bounds')}
  except (ValueError, KeyError, OSError, EOFError) as error:
    raise ValueError(f'{path} is no model of quality: `python -m data_pipeline.filters.quality train` makes one') from error
  if model['format'] != _FORMAT or model['weights'].shape != (1 << _BITS,):
    raise ValueError(f'{path} is a model of quality of another version: train it again')
  return model | {'bias': float(model['bias'])}


@numba.njit(cache=True)
def fit(found, bounds, labels, importance, epochs, rate):
  """(float32 [2**_BITS] weights, bias) by AdaGrad (Duchi et al. 2011), a document at a time, in the given order.

  found: features of all documents, those of document i at bounds[i]:bounds[i + 1]. labels: 0 or 1. importance: of each.
  """
  weights, squares = np.zeros(1 << _BITS, np.float32), np.full(1 << _BITS, 1e-10, np.float32)
  bias, bias_squares = 0.0, 1e-10
  for _ in range(epochs):
    for i in range(len(labels)):
      n, total = max(bounds[i + 1] - bounds[i], 1), 0.0
      for k in range(bounds[i], bounds[i + 1]):
        total += weights[found[k]]
      error = importance[i] * (1 / (1 + math.exp(-bias - total / n)) - labels[i])
      bias_squares += error * error
      bias -= rate * error / math.sqrt(bias_squares)
      gradient = error / n
      for k in range(bounds[i], bounds[i + 1]):
        squares[found[k]] += gradient * gradient
        weights[found[k]] -= rate * gradient / math.sqrt(squares[found[k]])
  return weights, bias


def train(positive: list[str], negative: list[str], out, *, n_buckets: int = 20, max_documents: int = 100_000,
          epochs: int = 5, rate: float = 0.5) -> dict:
  """Trains on the files of these patterns and writes the model; returns what was measured on documents held out.

  max_documents: of each side, those with the smallest hashes, so that the order of files does not matter. Two sides of
  different size count the same. ValueError where there is too little to hold out.
  """
  if not 2 <= n_buckets <= 100:
    raise ValueError(f'{n_buckets} buckets: give 2 to 100')
  good, bad = (_documents(patterns, max_documents) for patterns in (positive, negative))
  labels = {name: 0 for name in bad} | {name: 1 for name in good}
  held_out = {name for name in labels if int(name[16:], 16) < _HELD_OUT * 2**64}
  fitted = sorted(labels.keys() - held_out)  # by hash: the two sides are mixed
  for side, patterns, needed in ((1, positive, 1), (0, negative, n_buckets)):
    has = sum(labels[name] == side for name in held_out)
    if has < needed or not any(labels[name] == side for name in fitted):
      raise ValueError(f'{len(good if side else bad)} documents of {", ".join(patterns)} are too few: {has} of them would '
                       f'be held out, and {needed} are needed')
  documents = bad | good
  y = np.array([labels[name] for name in fitted])
  importance = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
  found = np.concatenate([documents[name] for name in fitted])
  learnt, bias = fit(found, np.cumsum([0, *(len(documents[name]) for name in fitted)]), y, importance, epochs, rate)
  scores = [np.sort([bias + learnt[documents[name]].mean(dtype=np.float64) for name in held_out if labels[name] == side])
            for side in (0, 1)]
  bounds = np.quantile(scores[0], np.arange(1, n_buckets) / n_buckets)
  with shards.committed(pathlib.Path(out).absolute()) as temporary, open(temporary, 'wb') as file:
    np.savez_compressed(file, format=_FORMAT, weights=learnt, bias=bias, bounds=bounds)
  above = np.searchsorted(scores[0], scores[1]).mean() / len(scores[0])
  buckets = np.searchsorted(bounds, scores[1], side='right')
  return {'positive': len(good), 'negative': len(bad), 'held_out': [len(scores[1]), len(scores[0])],
          'accuracy': float(((scores[0] < 0).mean() + (scores[1] >= 0).mean()) / 2), 'area_under_curve': float(above),
          'bounds': bounds.tolist(),
          'positives_of_buckets': np.bincount(buckets, minlength=n_buckets).tolist()}


def _documents(patterns: list[str], most: int) -> dict[str, np.ndarray]:
  """Hash -> features, uint32, of the documents of these files."""
  documents, unreadable = {}, 0
  for pattern in patterns:
    source = TextFiles(name='quality', pattern=os.path.abspath(pattern) if '://' not in pattern else pattern)
    with tempfile.TemporaryDirectory() as scratch, Sandbox(source, Limits()) as sandbox:
      for raw in (raw for unit in source.fetch(pathlib.Path(scratch)) for raw in source.read(unit)):
        try:
          data = _text_of(raw, sandbox).encode()
        except Reject:
          unreadable += 1
          continue
        texts, out = Texts.of([data]), np.empty(2 * _WORDS, np.uint32)
        tables = kernels.tables(texts.data, texts.offsets, np.arange(1))
        n = kernels.features(texts.data, kernels.classes(), *tables, _WORDS, np.uint64((1 << _BITS) - 1), out)
        documents[xxhash.xxh3_128_hexdigest(data)] = out[:n].copy()
        if len(documents) > 2 * most:
          documents = {name: documents[name] for name in sorted(documents)[:most]}
  if unreadable:
    print(f'notice: {unreadable} documents of {", ".join(patterns)} could not be read', file=sys.stderr)
  return {name: documents[name] for name in sorted(documents)[:most]}


def _text_of(raw: Raw | Unreadable, sandbox: Sandbox) -> str:
  if isinstance(raw, Unreadable):
    raise Reject(raw.reason)
  text = clean(raw.content if isinstance(raw.content, str) else sandbox.extract(raw)[0])
  if not text.strip():
    raise Reject('no text')
  return text


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m data_pipeline.filters.quality', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', choices=['train'])
  for side, what in (('positive', 'what is to be kept'), ('negative', 'what is to be judged, unselected')):
    parser.add_argument(f'--{side}', action='append', required=True,
                        help=f'files of documents of {what}: a pattern as of glob; may be given again')
  parser.add_argument('--out', required=True, help='the model, .npz')
  parser.add_argument('--buckets', type=int, default=20)
  parser.add_argument('--max_documents', type=int, default=100_000, help='of each side')
  parser.add_argument('--epochs', type=int, default=5)
  parser.add_argument('--json', action='store_true', help='what was measured as JSON')
  arguments = parser.parse_args(argv)
  try:
    found = train(arguments.positive, arguments.negative, arguments.out, n_buckets=arguments.buckets,
                  epochs=arguments.epochs, max_documents=arguments.max_documents)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  if arguments.json:
    print(json.dumps(found))
    return 0
  print(f'{arguments.out}: trained on {found["positive"]:,} good documents and {found["negative"]:,} others, of which '
        f'{found["held_out"][0]:,} and {found["held_out"][1]:,} were held out\n'
        f'  held-out accuracy {found["accuracy"]:.3f} (both sides count the same), area under the curve '
        f'{found["area_under_curve"]:.3f}')
  for bucket, n in enumerate(found['positives_of_buckets']):
    print(f'  q{bucket:02d}  {1 / arguments.buckets:6.1%} of the others  {n / found["held_out"][0]:6.1%} of the good')
  return 0


if __name__ == '__main__':
  sys.exit(main())
