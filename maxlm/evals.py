"""Held-out loss and bits per byte of each source, and what simple compressors reach on the same bytes."""

import dataclasses
import gzip
import math

import numpy as np
import tokenizers

from data_pipeline import loader
from data_pipeline.mixture import MixtureSchedule
from maxlm.data import rows_of_host, to_device
from maxlm.models.decoder import Decoder
from maxlm.tasks import FileTask, LongRangeTasks, PuzzleTasks


@dataclasses.dataclass(kw_only=True, slots=True)
class EvalConfig:
  """every_steps: steps between evaluations (0: only at the end). rows: held-out rows of each source that are scored. tasks:
  what else is (`maxlm.tasks`), each time."""

  every_steps: int = 0
  rows: int = 64
  tasks: tuple[LongRangeTasks | PuzzleTasks | FileTask, ...] = ()


@dataclasses.dataclass(kw_only=True, slots=True)
class Score:
  """Sums over the targets that count in held-out rows of one source. loss is nats a token; a byte is one of the UTF-8 text;
  a hit is a token that was the likeliest one (None: not counted)."""

  nats: float
  tokens: int
  bytes: int
  hits: int | None = None

  @property
  def loss(self) -> float:
    return self.nats / self.tokens

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes

  @property
  def accuracy(self) -> float | None:
    return None if self.hits is None else self.hits / self.tokens


def evaluate(score, params: Decoder, corpus: loader.Corpus, rows: int, batch_size: int) -> dict[str, Score]:
  """Score of each source on up to `rows` of its held-out rows, always the same ones.

  score: a jitted `step.eval_step` of (params, batch); it may count `hits` besides. batch_size: rows at a time, of all
  hosts.
  """
  part, scores = rows_of_host(batch_size), {}
  for source in corpus.sources:
    sums = []
    for batch in loader.validation_batches(corpus, source, batch_size, rows, part):
      target_bytes = corpus.token_bytes[batch['targets']] * batch['loss_mask']
      sums.append(score(params, to_device({**batch, 'target_bytes': target_bytes.astype(np.int32)}, part, batch_size)))
    if sums:
      added = {name: sum(float(of_batch[name]) for of_batch in sums) for name in sums[0]}
      scores[source] = Score(nats=added['nll'], tokens=int(added['tokens']), bytes=int(added['bytes']),
                             hits=int(added['hits']) if 'hits' in added else None)
  return scores


def total(scores: dict[str, Score]) -> Score:
  """All sources together."""
  parts = list(scores.values())
  hits = None if any(s.hits is None for s in parts) else sum(s.hits for s in parts)
  return Score(nats=sum(s.nats for s in parts), tokens=sum(s.tokens for s in parts),
               bytes=sum(s.bytes for s in parts), hits=hits)


def baselines(corpus: loader.Corpus, rows: int, train_rows: int = 2048) -> dict[str, dict[str, float]]:
  """Bits per byte of gzip -9 and of a unigram model on the held-out rows that `evaluate` scores: {source or 'all': …}.

  gzip compresses the text of a source's rows as one stream. The unigram model has the token frequencies, plus one, of up to
  `train_rows` training rows of every source.
  """
  counts_V = np.ones(corpus.vocab_size, np.float64)
  for source in corpus.sources:
    batch = loader.batch_at(corpus, MixtureSchedule(stages=((None, {source: 1}),)), seed=0, step=0,
                            batch_size=min(train_rows, corpus.rows(source, 'train')))
    counts_V += np.bincount(batch['targets'][batch['loss_mask'] > 0], minlength=corpus.vocab_size)
  bits_V = -np.log2(counts_V / counts_V.sum())
  tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_path))
  sums = {}
  for source in corpus.sources:
    batches = loader.validation_batches(corpus, source, 64, rows)
    targets = [batch['targets'][batch['loss_mask'] > 0] for batch in batches]
    if targets:
      ids = np.concatenate(targets)
      text = tokenizer.decode(ids.tolist()).encode()
      sums[source] = np.array([8.0 * len(gzip.compress(text, 9)), bits_V[ids].sum(), corpus.token_bytes[ids].sum()])
  sums['all'] = sum(sums.values())
  return {source: {'gzip': float(packed / n), 'unigram': float(bits / n)} for source, (packed, bits, n) in sums.items()}
