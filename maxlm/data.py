"""From packed rows on disk to sharded batches on the mesh."""

import dataclasses
from collections.abc import Iterator

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


def train_batches(config: DataConfig, corpus: loader.Corpus, seed: int, step: int) -> Iterator[tuple[dict, Batch]]:
  """(host batch, device batch) of each step from `step` on: pure function of (seed, step), whatever the hosts."""
  host = (jax.process_index(), jax.process_count())
  for batch in loader.batches(corpus, mixture(config, corpus), seed=seed, batch_size=config.batch_size,
                              cursor=step * config.batch_size, host=host):
    yield batch, to_device(batch)


def to_device(batch: dict[str, np.ndarray]) -> Batch:
  """This host's rows as its part of global arrays on the current mesh, split over the batch axes."""
  mesh = jax.sharding.get_mesh()
  return {name: jax.make_array_from_process_local_data(
            jax.sharding.NamedSharding(mesh, spec('BT' if array.ndim == 2 else 'B')), array)
          for name, array in batch.items()}
