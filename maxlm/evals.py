"""Held-out loss and bits per byte of each source, and what simple compressors reach on the same bytes."""

import dataclasses
import gzip
import math

import numpy as np

from data_pipeline import loader
from maxlm.data import to_device
from maxlm.models.decoder import Decoder


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
  """every_steps: steps between evaluations (0: only at the end). rows: held-out rows of each source that are scored."""

  every_steps: int = 0
  rows: int = 64


@dataclasses.dataclass(kw_only=True, slots=True)
class Score:
  """Sums over held-out rows of one source. loss is nats a token; a byte is one of the UTF-8 text."""

  nats: float
  tokens: int
  bytes: int

  @property
  def loss(self) -> float:
    return self.nats / self.tokens

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes

  def __add__(self, other: 'Score') -> 'Score':
    return Score(nats=self.nats + other.nats, tokens=self.tokens + other.tokens, bytes=self.bytes + other.bytes)


def evaluate(step_fn, params: Decoder, corpus: loader.Corpus, rows: int, batch_size: int) -> dict[str, Score]:
  """Score of each source on its first `rows` held-out rows. step_fn: a jitted `step.eval_step` of (params, batch)."""
  scores = {}
  for source in corpus.sources:
    nats, tokens, text_bytes = [], 0, 0
    for batch in loader.validation_batches(corpus, source, batch_size, rows):
      nats.append(step_fn(params, to_device(batch))['nll_by_source'])
      real = batch['segment_ids'] > 0
      tokens += int(real.sum())
      text_bytes += int(corpus.token_bytes[batch['targets']][real].sum())
    if tokens:
      scores[source] = Score(nats=float(sum(np.asarray(n, np.float64).sum() for n in nats)), tokens=tokens, bytes=text_bytes)
  return scores


def total(scores: dict[str, Score]) -> Score:
  """All sources together."""
  return sum(scores.values(), Score(nats=0.0, tokens=0, bytes=0))


def baselines(corpus: loader.Corpus, rows: int, train_rows: int = 4096) -> dict[str, dict[str, float]]:
  """Bits per byte of gzip -9 and of a unigram model on the held-out rows that `evaluate` scores, for each source and 'all'.

  gzip compresses a source's bytes as one stream. The unigram model has the token frequencies, plus one, of up to
  `train_rows` training rows of every source.
  """
  counts_V = np.ones(corpus.vocab_size, np.float64)
  for source in corpus.sources:
    for batch in loader.source_batches(corpus, source, 'train', 256, train_rows):
      counts_V += np.bincount(batch['targets'][batch['segment_ids'] > 0], minlength=corpus.vocab_size)
  bits_V = -np.log2(counts_V / counts_V.sum())
  sums = {}
  for source in corpus.sources:
    targets = np.concatenate([batch['targets'][batch['segment_ids'] > 0]
                              for batch in loader.validation_batches(corpus, source, 64, rows)] or [np.zeros(0, np.int32)])
    if targets.size:
      text = corpus.decode_bytes(targets)
      sums[source] = np.array([8.0 * len(gzip.compress(text, 9, mtime=0)), bits_V[targets].sum(), len(text)])
  sums['all'] = sum(sums.values())
  return {source: {'gzip': float(gz / n), 'unigram': float(uni / n)} for source, (gz, uni, n) in sums.items()}

