"""From packed rows on disk to sharded batches on the mesh."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from data_pipeline import loader
from data_pipeline.mixture import MixtureSchedule
from maxlm.sharding import spec

Batch = dict[str, jax.Array]


@dataclasses.dataclass(kw_only=True, slots=True)
class DataConfig:
  """corpus: directory made by `python -m data_pipeline.build`. recipe: builds the corpus if it is not there ('' : an error
  instead). mixture: source -> integer weight in tokens (empty: every source by its size). seq_len: positions a row.
  batch_size: rows a step, over all hosts. mask: tokens see their own 'document' only, or all of a 'row' before them, where
  positions then count through.

  max_epochs: how often a run may repeat a source, by name, '*' for the others (empty: as often as it likes). source_tokens:
  what a source is known to have, for planning where the corpus is not there yet.
  """

  corpus: str
  recipe: str = ''
  mixture: dict[str, int] = dataclasses.field(default_factory=dict)
  seq_len: int
  batch_size: int
  mask: Literal['document', 'row'] = 'document'
  max_epochs: dict[str, float] = dataclasses.field(default_factory=dict)
  source_tokens: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
  """Where the batches of some steps of a run come from.

  first_row: of the schedule, that of batch `first_batch`. Batches are counted through the run, as steps are, but for those
  that a run has left out.
  """

  corpus: loader.Corpus
  schedule: MixtureSchedule
  first_row: int
  first_batch: int
  batch_size: int
  mask: str
  seed: int

  def row(self, batch: int) -> int:
    """The first row of the schedule that is in that batch."""
    return self.first_row + (batch - self.first_batch) * self.batch_size


def weights(config: DataConfig, corpus: loader.Corpus) -> dict[str, int]:
  """The mixture as configured, or the sources' own sizes in rows."""
  return config.mixture or {source: corpus.rows(source, 'train') for source in corpus.sources}


def feeds(parts: Sequence[tuple[DataConfig, int]], corpora: Sequence[loader.Corpus], seed: int) -> tuple[Feed, ...]:
  """A feed for each part of a run: (config, steps) of each, and its corpus.

  A part goes on in the sources where the last one left them that had rows of the same corpus and length. The last stage of
  each schedule is open-ended: a run that has left out batches reads on in it.
  """
  made, batch = [], 0
  for i, ((config, n_steps), corpus) in enumerate(zip(parts, corpora, strict=True)):
    before = [(n * of.batch_size, weights(of, corpus)) for (of, n), other in zip(parts[:i], corpora) if other is corpus]
    schedule = MixtureSchedule(stages=(*before, (None, weights(config, corpus))))
    loader.check(corpus, schedule)
    made.append(Feed(corpus=corpus, schedule=schedule, first_row=sum(rows for rows, _ in before), first_batch=batch,
                     batch_size=config.batch_size, mask=config.mask, seed=seed))
    batch += n_steps
  return tuple(made)


def train_batches(feed: Feed, step: int, batch_of: Callable[[int], int] = lambda step: step) -> Iterator[tuple[dict, Batch]]:
  """(what this host reads of it, device batch) of each step from `step` on: pure function of (seed, step), whatever the
  hosts. batch_of: the batch that a step takes, for runs that have jumped over some."""
  part = rows_of_host(feed.batch_size)
  while True:
    first, begun = batch_of(step), step
    with contextlib.closing(loader.batches(feed.corpus, feed.schedule, seed=feed.seed, batch_size=feed.batch_size,
                                           cursor=feed.row(first), part=part)) as batches:
      while batch_of(step) - first == step - begun:  # until the run jumps
        batch = masked(next(batches), feed.mask)
        yield batch, to_device(batch, part, feed.batch_size)
        step += 1


def masked(batch: dict[str, np.ndarray], mask: str) -> dict[str, np.ndarray]:
  """The batch as tokens see each other: of a 'row', all of it is one document to the model."""
  if mask == 'document':
    return batch
  real = (batch['segment_ids'] > 0).astype(np.int32)
  return {**batch, 'segment_ids': real, 'positions': np.arange(real.shape[1], dtype=np.int32) * real}


def rows_of_host(batch_size: int) -> np.ndarray:
  """The rows of a batch that devices of this host hold, ascending: on a torus they need not be neighbours, and hosts that
  share rows along other axes have the same ones."""
  places = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec('B')).addressable_devices_indices_map((batch_size,))
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places.values()]))


def to_device(batch: dict[str, np.ndarray], rows: np.ndarray | None = None, batch_size: int | None = None) -> Batch:
  """Global arrays on the current mesh, split over the batch axes. rows: which of the batch_size rows these are, ascending,
  all that this host's devices hold (None: all of the batch)."""
  mesh = jax.sharding.get_mesh()

  def put(array):
    held = np.arange(len(array)) if rows is None else rows
    shape = (batch_size or len(array), *array.shape[1:])
    sharding = jax.sharding.NamedSharding(mesh, spec('BT' if array.ndim == 2 else 'B'))

    def piece(index):
      start, stop, _ = index[0].indices(shape[0])
      first = np.searchsorted(held, start)
      return array[(slice(first, first + stop - start), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, piece)

  return {name: put(array) for name, array in batch.items()}
