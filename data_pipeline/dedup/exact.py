"""Exact duplicates: of documents with the same text one is kept, the newest, and of these the first.

Ids travel, not text: a task a shard lays out the ids of its documents by partition (their first bits); a task a partition
sorts what all shards have there, and names every place but the first of an id; a task a shard collects its verdicts.
"""

import dataclasses
import pathlib
import sys

import numpy as np
import pyarrow as pa

from data_pipeline import shards, verdicts

DUPLICATE = 'duplicate'
_PLACE = np.dtype([('high', '<u8'), ('low', '<u8'), ('date', 'S10'), ('shard', '<u4'), ('row', '<u4')])
_DOCUMENTS_A_PARTITION = 8_000_000  # 300 MB


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Exact:
  """Leaves out the repetitions of a text, as 'duplicate'; the column `of` is where the kept one is, '<shard>:<row>'."""

  name: str = 'exact'

  def state(self) -> str:
    return shards.code_of(sys.modules[__name__], verdicts)

  def judge(self, tasks, shards_: list[verdicts.Shard]) -> list[dict]:
    everything = shards.key_of(shards.describe(self), self.state(), [(shard.documents, shard.hashes) for shard in shards_])
    n_partitions = 1 + sum(shard.rows for shard in shards_) // _DOCUMENTS_A_PARTITION
    work = [f'build/steps/{self.name}/ids-{i:05d}.npy' for i in range(len(shards_))]
    found = [f'build/steps/{self.name}/found-{i:05d}.npy' for i in range(n_partitions)]
    last = [(f'{self.name}-{i:05d}', everything, self.name, shard, found, i) for i, shard in enumerate(shards_)]
    if None in [tasks.recorded(*task[:2]) for task in last]:
      tasks.run('exact duplicates: ids', _lay_out, [
        (f'{self.name}-ids-{i:05d}', everything, shard, path, i, n_partitions) for i, (shard, path) in
        enumerate(zip(shards_, work))], lasting=False)
      tasks.run('exact duplicates: sort', _find, [
        (f'{self.name}-found-{i:05d}', everything, work, path, i) for i, path in enumerate(found)], lasting=False)
    return tasks.run('exact duplicates: verdicts', _collect, last)


def _lay_out(root: pathlib.Path, record_name: str, key: str, shard: verdicts.Shard, path: str, index: int,
             n_partitions: int) -> dict:
  """Places of one shard, by partition."""
  parts = [np.empty(0, _PLACE)]
  for rows, batch in verdicts.kept(root, shard, ['id', 'date']):
    places = np.empty(len(rows), _PLACE)
    ids = np.frombuffer(bytes.fromhex(''.join(batch['id'].to_pylist())), '>u8').reshape(-1, 2)
    places['high'], places['low'], places['date'] = ids[:, 0], ids[:, 1], batch['date'].to_numpy(zero_copy_only=False)
    places['shard'], places['row'] = index, rows
    parts.append(places)
  places = np.concatenate(parts)
  places = places[np.argsort(places['high'], kind='stable')]
  bounds = np.searchsorted(places['high'], _first_of(n_partitions))
  with shards.committed(root / path) as temporary, open(temporary, 'wb') as file:
    np.save(file, places)
  return shards.write_record(root, record_name, key, [shards.entry(root, root / path)], bounds=bounds.tolist())


def _first_of(n_partitions: int) -> np.ndarray:
  """The least first half of an id in each partition."""
  return np.array([i * 2**64 // n_partitions for i in range(n_partitions)], np.uint64)


def _find(root: pathlib.Path, record_name: str, key: str, work: list[str], path: str, partition: int) -> dict:
  """Repetitions of one partition: pairs of places (of the repetition, of the one that is kept), by shard and row."""
  record_of = record_name.rpartition('-found-')[0]
  parts = []
  for i, name in enumerate(work):
    bounds = [*shards.read_record(root, f'{record_of}-ids-{i:05d}', key)['bounds'], None]
    parts.append(np.load(root / name, mmap_mode='r')[bounds[partition]:bounds[partition + 1]])
  places = np.concatenate(parts)
  places = places[np.lexsort((places['row'], places['shard'], places['low'], places['high']))]
  same = (places['high'][1:] == places['high'][:-1]) & (places['low'][1:] == places['low'][:-1])
  group = np.concatenate([[0], np.cumsum(~same)]) if len(places) else np.empty(0, np.int64)
  # of each group the newest, and of these the first
  newest = np.lexsort((np.arange(len(places)), _oldness(places['date']), group))
  first = newest[np.searchsorted(group, group)]
  pairs = np.stack([places[['shard', 'row']], places[first][['shard', 'row']]], axis=1)[first != np.arange(len(places))]
  pairs = pairs[np.argsort(pairs[:, 0], order=('shard', 'row'))] if len(pairs) else pairs
  with shards.committed(root / path) as temporary, open(temporary, 'wb') as file:
    np.save(file, pairs)
  return shards.write_record(root, record_name, key, [shards.entry(root, root / path)])


def _oldness(dates: np.ndarray) -> np.ndarray:
  """Rank of each date, the newest 0; no date is the oldest."""
  known, rank = np.unique(dates, return_inverse=True)
  return len(known) - 1 - rank


def _collect(root: pathlib.Path, record_name: str, key: str, step: str, shard: verdicts.Shard, found: list[str],
             index: int) -> dict:
  of = np.full(shard.rows, '', object)
  for name in found:
    pairs = np.load(root / name, mmap_mode='r')
    mine = pairs[np.searchsorted(pairs[:, 0]['shard'], index):np.searchsorted(pairs[:, 0]['shard'], index, side='right')]
    for row, where in zip(mine[:, 0]['row'].tolist(), mine[:, 1].tolist()):
      of[row] = '{}:{}'.format(*where)
  rejected = {int(row): DUPLICATE for row in np.flatnonzero(of)}
  return verdicts.write(root, record_name, key, step, shard, rejected, {'of': pa.array(of, pa.string())})
