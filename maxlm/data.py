"""From packed rows on disk to sharded batches on the mesh."""

import dataclasses
from collections.abc import Callable, Iterator

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
  batch_size: rows a step, over all hosts."""

  corpus: str
  recipe: str = ''
  mixture: dict[str, int] = dataclasses.field(default_factory=dict)
  seq_len: int
  batch_size: int


def mixture(config: DataConfig, corpus: loader.Corpus) -> MixtureSchedule:
  """The mixture of a run: one stage without end, weights as configured or the sources' own sizes in rows."""
  weights = config.mixture or {source: corpus.rows(source, 'train') for source in corpus.sources}
  return MixtureSchedule(stages=((None, weights),))


def train_batches(config: DataConfig, corpus: loader.Corpus, seed: int, step: int,
                  batch_of: Callable[[int], int] = lambda step: step) -> Iterator[tuple[dict, Batch]]:
  """(what this host reads of it, device batch) of each step from `step` on: pure function of (seed, step), whatever the
  hosts. batch_of: the batch that a step takes, for runs that have jumped over some."""
  part = rows_of_host(config.batch_size)
  while True:
    first, begun = batch_of(step), step
    batches = loader.batches(corpus, mixture(config, corpus), seed=seed, batch_size=config.batch_size,
                             cursor=first * config.batch_size, part=part)
    while batch_of(step) - first == step - begun:  # until the run jumps
      batch = next(batches)
      yield batch, to_device(batch, part, config.batch_size)
      step += 1
    batches.close()


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
