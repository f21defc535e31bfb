"""Near duplicates: documents whose sets of word n-grams have a Jaccard similarity of at least a threshold.

MinHash (Broder 1997) in bands proposes pairs; a pair counts only once its sets have been compared in full. Documents are
then gone through from the best to the worst (the newest, then the longest, then the smallest id): one goes only if it is
similar to one that is kept. What is similar to it only by way of others stays, so no chain of likenesses empties a source.

Only hashes and places travel. The graph of tasks, in build/steps/<name>/:

    signatures  a task a shard: a byte a hash for each document, and its bands' hashes with their rows, sorted
    pairs       a task a range of band hashes: pairs of documents in one bucket whose signatures agree well enough
    sets        a task a shard: the n-gram hashes of the documents that are in a pair
    compared    a task a shard: pairs that reach the threshold, of documents of the shard with better ones
    decided     one task: goes through all pairs in order, with 16 bytes a document, on disk and mapped
    verdicts    a task a shard

Disk: about 400 bytes a document, and 8 a word of those in a pair. Memory: a batch, or `_BANDS_A_PARTITION` bands.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import sys

import numba
import numpy as np
import pyarrow as pa

from data_pipeline import shards, verdicts, words

NEAR = 'near duplicate'
_RECALL = 0.99  # of pairs at the threshold, to be in one bucket of some band
_DEVIATIONS = 3.5  # of an estimate by signatures, that a pair is given before it is dropped unseen
_BANDS_A_PARTITION, _PAIRS_AT_ONCE = 4_000_000, 4_000_000  # 0.7 GB, 0.5 GB
_EDGES_A_SAMPLE = 1024
_LEADERS, _PAIRS_A_BAND = 256, 16  # that a document is compared with, and paired with, in one bucket
_BAND = np.dtype([('hash', '<u8'), ('row', '<u4')])
_RANK = np.dtype([('age', '<u8'), ('id', '<u8')])  # the smaller the better
_EDGE = np.dtype([('age', '<u8'), ('id', '<u8'), ('worse', '<u8'), ('better', '<u8'), ('jaccard', '<f4')])
_FOUND = np.dtype([('of', '<u8'), ('jaccard', '<f4'), ('copies', '<u4')])  # of: 1 + place; 0: kept
_ROW = np.uint64(32)  # bits of a place, (shard << 32) + row


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Fuzzy:
  """Leaves out near duplicates, as 'near duplicate'. Columns: `of`, '<shard>:<row>' of one that is kept, and `jaccard`."""

  name: str = 'fuzzy'
  threshold: float = 0.8  # Jaccard similarity of the sets of n-grams
  ngram: int = 5  # words
  hashes: int = 128  # at most, of a signature; the more, the fewer pairs are proposed in vain

  def __post_init__(self):
    if not 0.3 <= self.threshold <= 1:
      raise ValueError(f'fuzzy: threshold={self.threshold} must be in [0.3, 1]: a lower one finds what is not alike')
    if self.ngram < 1 or self.hashes < 32:
      raise ValueError(f'fuzzy: ngram={self.ngram} must be at least 1, hashes={self.hashes} at least 32')

  @property
  def bands(self) -> tuple[int, int]:
    """(bands, hashes in a band): the longest bands that still propose `_RECALL` of the pairs at the threshold."""
    fits = [rows for rows in range(1, 17) if 1 - (1 - self.threshold**rows)**(self.hashes // rows) >= _RECALL]
    return self.hashes // max(fits, default=1), max(fits, default=1)

  def state(self) -> str:
    return shards.code_of(sys.modules[__name__], verdicts, words)

  def judge(self, tasks, shards_: list[verdicts.Shard]) -> list[dict]:
    everything = shards.key_of(shards.describe(self), self.state(), [(shard.documents, shard.hashes) for shard in shards_])
    n_shards, n_rows = len(shards_), [shard.rows for shard in shards_]
    n_partitions = 1 + sum(n_rows) * self.bands[0] // _BANDS_A_PARTITION
    of_each = lambda what, *more: [(f'{self.name}-{what}-{i:05d}', everything, self, shard, i, *more)
                                   for i, shard in enumerate(shards_)]
    last = [(f'{self.name}-{i:05d}', everything, self, shard, i, first) for i, (shard, first) in
            enumerate(zip(shards_, itertools.accumulate(n_rows, initial=0)))]
    if None in [tasks.recorded(*task[:2]) for task in last]:
      run = functools.partial(tasks.run, lasting=False)
      run('near duplicates: signatures', _sign, of_each('signatures', n_partitions))
      run('near duplicates: pairs', _propose, [(f'{self.name}-pairs-{i:05d}', everything, self, i, n_shards)
                                               for i in range(n_partitions)])
      run('near duplicates: sets', _write_sets, of_each('sets', n_partitions))
      run('near duplicates: compare', _compare, of_each('compared', n_partitions))
      run('near duplicates: decide', _decide, [(f'{self.name}-decided', everything, self, n_rows)])
    return tasks.run('near duplicates: verdicts', _collect, last)


def _work(step: Fuzzy, what: str, index: int) -> pathlib.PurePosixPath:
  return pathlib.PurePosixPath('build/steps', step.name, f'{what}-{index:05d}.npy')


def _save(root: pathlib.Path, path: pathlib.PurePosixPath, values: np.ndarray) -> dict:
  with shards.committed(root / path) as temporary, open(temporary, 'wb') as file:
    np.save(file, values)
  return shards.entry(root, root / path)


def _load(root: pathlib.Path, step: Fuzzy, what: str, index: int) -> np.ndarray:
  path = root / _work(step, what, index)
  return np.load(path, mmap_mode='r')


# Signatures and bands.


def _sign(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, shard: verdicts.Shard, index: int,
          n_partitions: int) -> dict:
  """signatures-i: uint8 [rows, hashes]; ranks-i: _RANK [rows]; bands-i: _BAND [documents * bands] by hash."""
  n_bands, n_rows = step.bands
  signatures, ranks = np.zeros((shard.rows, n_bands * n_rows), np.uint8), np.zeros(shard.rows, _RANK)
  bands = [np.empty(0, _BAND)]
  for rows, batch in verdicts.kept(root, shard, ['id', 'text', 'date', 'bytes']):
    grams, first = words.ngrams(words.normal(batch['text']), step.ngram)
    minima = _minima(grams, first, *_permutations(n_bands * n_rows))
    signatures[rows] = (minima * np.uint32(0x9E3779B1)) >> np.uint32(24)  # a byte of each; those of small numbers are few
    ranks['age'][rows] = _age(batch['date'].to_pylist(), batch['bytes'].to_numpy())
    ranks['id'][rows] = [int(name[:16], 16) for name in batch['id'].to_pylist()]
    some = np.flatnonzero(np.diff(first))  # a text of no words is like no other
    found = np.empty((len(some), n_bands), _BAND)
    found['hash'], found['row'] = _band_hashes(minima[some], n_bands, n_rows), rows[some, None]
    bands.append(found.ravel())
  bands = np.concatenate(bands)
  bands = bands[np.argsort(bands['hash'], kind='stable')]
  starts = np.array([i * 2**64 // n_partitions for i in range(n_partitions)], np.uint64)
  bounds = np.searchsorted(bands['hash'], starts)
  files = [_save(root, _work(step, what, index), values)
           for what, values in (('signatures', signatures), ('ranks', ranks), ('bands', bands))]
  return shards.write_record(root, record_name, key, files, bounds=[*bounds.tolist(), len(bands)])


def _age(dates: list[str], n_bytes: np.ndarray) -> np.ndarray:
  """uint64 [documents]: the smaller the better: the newest day (none: the oldest), then the longest."""
  days = [int(''.join(filter(str.isdecimal, date[:10])).ljust(8, '0')[:8] or 0) if date.isascii() else 0 for date in dates]
  most = np.uint64(2**32 - 1)
  return (most - np.array(days, np.uint64) << np.uint64(32)) | most - np.minimum(n_bytes, 2**32 - 1).astype(np.uint64)


def _permutations(n: int) -> tuple[np.ndarray, np.ndarray]:
  """uint32 [n], [n]: x -> a x + b modulo 2^32, a odd."""
  a, b = np.random.Generator(np.random.PCG64(1997)).integers(0, 2**32, (2, n), np.uint32)
  return a | np.uint32(1), b


@numba.njit(cache=True)
def _minima(grams, first, a, b):
  """uint32 [texts, hashes]: of each text the least value of each permutation over its n-grams."""
  minima = np.full((len(first) - 1, len(a)), np.uint32(0xFFFFFFFF))
  for t in range(len(first) - 1):
    least = minima[t]
    for i in range(first[t], first[t + 1]):
      x = np.uint32(grams[i] >> np.uint64(32))
      for k in range(len(a)):
        least[k] = min(least[k], np.uint32(x * a[k] + b[k]))
  return minima


@numba.njit(cache=True)
def _band_hashes(minima, n_bands, n_rows):
  """uint64 [texts, bands]: of the number of the band and its minima."""
  found = np.empty((len(minima), n_bands), np.uint64)
  for t in range(len(minima)):
    for band in range(n_bands):
      h = np.uint64(band + 1) * np.uint64(0x9E3779B97F4A7C15)
      for k in range(band * n_rows, (band + 1) * n_rows):
        h = (h ^ np.uint64(minima[t, k])) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(31)
      found[t, band] = h * np.uint64(0x94D049BB133111EB)
  return found


# Pairs.


def _propose(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, partition: int, n_shards: int) -> dict:
  """pairs-p: uint64 [pairs, 2], places of the worse and the better document, by the former; members-p: all of them."""
  entries = []
  for i in range(n_shards):
    start, end = shards.read_record(root, f'{step.name}-signatures-{i:05d}', key)['bounds'][partition:partition + 2]
    mine = _load(root, step, 'bands', i)[start:end]
    entries.append((mine['hash'], (np.uint64(i) << _ROW) + mine['row']))
  hashes, places = (np.concatenate(parts) for parts in zip(*entries))
  order = np.argsort(hashes, kind='stable')
  hashes, places = hashes[order], places[order]
  same = np.concatenate([[False], hashes[1:] == hashes[:-1], [False]])
  shared = same[1:] | same[:-1]
  hashes, places = hashes[shared], places[shared]
  signatures, ranks = np.empty((len(places), np.prod(step.bands)), np.uint8), np.empty(len(places), _RANK)
  owner = (places >> _ROW).astype(np.int64)
  for i in np.unique(owner).tolist():
    mine = np.flatnonzero(owner == i)
    rows = (places[mine] & np.uint64(2**32 - 1)).astype(np.int64)
    signatures[mine], ranks[mine] = _load(root, step, 'signatures', i)[rows], _load(root, step, 'ranks', i)[rows]
  order = np.lexsort((places, ranks['id'], ranks['age'], hashes))
  least, sure = (_agreements(step, deviations) for deviations in (-_DEVIATIONS, _DEVIATIONS))
  pairs = _pairs(hashes[order], signatures, order, least, sure, step.bands[1])
  pairs = np.unique(places[pairs], axis=0) if len(pairs) else np.empty((0, 2), np.uint64)
  files = [_save(root, _work(step, 'pairs', partition), pairs),
           _save(root, _work(step, 'members', partition), np.unique(pairs))]
  return shards.write_record(root, record_name, key, files)


def _agreements(step: Fuzzy, deviations: float) -> int:
  """How many bytes of two signatures agree at the threshold, and `deviations` standard deviations more."""
  n = np.prod(step.bands)
  p = step.threshold + (1 - step.threshold) / 256
  return int(np.ceil(n * p + deviations * (n * p * (1 - p))**0.5))


@numba.njit(cache=True)
def _pairs(hashes, signatures, order, least, sure, n_rows):
  """int64 [pairs, 2] of members (worse, better) of one bucket whose signatures agree in `least` bytes.

  In a bucket of up to `_LEADERS` documents all are compared. One that has more, even without those that are copies (agree in
  `sure` bytes) of one before, is divided once more by each of the bands of n_rows. Work and pairs are linear in the bucket.
  """
  found, n_found, start = np.empty((1024, 2), np.int64), 0, 0
  while start < len(hashes):
    end = start + 1
    while end < len(hashes) and hashes[end] == hashes[start]:
      end += 1
    members, start = order[start:end], end
    found, n_found, different = _pair_up(members, signatures, least, sure, found, n_found)
    for first in range(0, signatures.shape[1] if different > _LEADERS else 0, n_rows):
      keys = np.zeros(len(members), np.uint64)
      for i in range(len(members)):
        for k in range(first, first + n_rows):
          keys[i] = (keys[i] ^ np.uint64(signatures[members[i], k])) * np.uint64(0x100000001B3)
      by_key = np.argsort(keys, kind='mergesort')  # the better stay first
      low = 0
      for high in range(1, len(members) + 1):
        if high == len(members) or keys[by_key[high]] != keys[by_key[low]]:
          found, n_found, _ = _pair_up(members[by_key[low:high]], signatures, least, sure, found, n_found)
          low = high
  return found[:n_found]


@numba.njit(cache=True)
def _pair_up(members, signatures, least, sure, found, n_found):
  """(found, n_found, how many members are no copies), with the pairs of members, the best first, added to `found`.

  Of more than `_LEADERS` each is compared with as many of those before it that are no copies.
  """
  leaders, n_leaders = np.empty(len(members), np.int64), 0
  for i in members:
    n_mine, is_copy = 0, False
    for other in leaders[max(0, n_leaders - _LEADERS):n_leaders]:
      agree = 0
      for k in range(signatures.shape[1]):
        agree += signatures[i, k] == signatures[other, k]
      if agree >= least:
        if n_found == len(found):
          found = np.concatenate((found, np.empty_like(found)))
        found[n_found, 0], found[n_found, 1] = i, other
        n_found, n_mine = n_found + 1, n_mine + 1
        is_copy = is_copy or agree >= sure
        if n_mine == _PAIRS_A_BAND:
          break
    if len(members) <= _LEADERS or not is_copy:
      leaders[n_leaders] = i
      n_leaders += 1
  return found, n_found, n_leaders


# The pairs compared.


def _of_shard(values: np.ndarray, index: int) -> np.ndarray:
  """Those of sorted places (or of rows that begin with one) that are in a shard."""
  places = values if values.ndim == 1 else values[:, 0]
  start, end = np.searchsorted(places, np.array([index << 32, (index + 1) << 32], np.uint64))
  return np.array(values[start:end])


def _write_sets(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, shard: verdicts.Shard, index: int,
                n_partitions: int) -> dict:
  """sets-i: uint64, the n-gram hashes of the documents that are in a pair; sizes-i: uint64 [documents, 2], row and end."""
  wanted = np.unique(np.concatenate([_of_shard(_load(root, step, 'members', p), index) for p in range(n_partitions)]))
  wanted = (wanted & np.uint64(2**32 - 1)).astype(np.int64)
  path, sizes = root / _work(step, 'sets', index), []
  with shards.committed(path) as temporary, open(temporary, 'wb') as file:
    for rows, batch in verdicts.kept(root, shard, ['text']) if len(wanted) else ():
      mine = np.flatnonzero(np.isin(rows, wanted))
      grams, first = words.ngrams(words.normal(batch['text'].take(pa.array(mine))), step.ngram)
      for row, start, end in zip(rows[mine].tolist(), first, first[1:]):
        grams_of_row = np.unique(grams[start:end])
        grams_of_row.tofile(file)
        sizes.append((row, len(grams_of_row)))
  sizes = np.array(sizes, np.int64).reshape(-1, 2)
  sizes[:, 1] = np.cumsum(sizes[:, 1])
  files = [shards.entry(root, path), _save(root, _work(step, 'sizes', index), sizes)]
  return shards.write_record(root, record_name, key, files)


def _compare(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, shard: verdicts.Shard, index: int,
             n_partitions: int) -> dict:
  """compared-i: _EDGE [pairs that reach the threshold], whose worse document is of this shard, the best of those first."""
  pairs = np.unique(np.concatenate([_of_shard(_load(root, step, 'pairs', p), index) for p in range(n_partitions)]), axis=0)
  owners = (pairs[:, 1] >> _ROW).astype(np.int64)
  jaccard, ours = np.zeros(len(pairs)), _sets(root, step, index)
  for other in np.unique(owners).tolist():
    mine = np.flatnonzero(owners == other)
    jaccard[mine] = _jaccard(pairs[mine] & np.uint64(2**32 - 1), *ours, *_sets(root, step, other))
  pairs, kept = pairs[jaccard >= step.threshold], jaccard[jaccard >= step.threshold]
  edges, ranks = np.empty(len(pairs), _EDGE), _load(root, step, 'ranks', index)
  edges['worse'], edges['better'], edges['jaccard'] = pairs[:, 0], pairs[:, 1], kept
  edges['age'], edges['id'] = (ranks[name][(pairs[:, 0] & np.uint64(2**32 - 1)).astype(np.int64)] for name in ('age', 'id'))
  edges = edges[_in_order(edges)]
  return shards.write_record(root, record_name, key, [_save(root, _work(step, 'compared', index), edges)],
                             compared=len(jaccard), similar=len(edges))


def _sets(root: pathlib.Path, step: Fuzzy, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(hashes, rows, ends) of the sets of a shard."""
  path, sizes = root / _work(step, 'sets', index), _load(root, step, 'sizes', index)
  grams = np.memmap(path, np.uint64, 'r') if path.stat().st_size else np.empty(0, np.uint64)
  return np.asarray(grams), np.ascontiguousarray(sizes[:, 0]), np.ascontiguousarray(sizes[:, 1])


@numba.njit(cache=True)
def _jaccard(pairs, grams_a, rows_a, ends_a, grams_b, rows_b, ends_b):
  """float64 [pairs] of rows: shared members of two ascending sets, by members of either."""
  found = np.zeros(len(pairs))
  for p in range(len(pairs)):
    a, b = np.searchsorted(rows_a, np.int64(pairs[p, 0])), np.searchsorted(rows_b, np.int64(pairs[p, 1]))
    i, j, shared = ends_a[a - 1] if a else 0, ends_b[b - 1] if b else 0, 0
    total = ends_a[a] - i + ends_b[b] - j
    while i < ends_a[a] and j < ends_b[b]:
      x, y = grams_a[i], grams_b[j]
      shared += x == y
      i += x <= y
      j += y <= x
    found[p] = shared / (total - shared)
  return found


# The decision.


def _in_order(edges: np.ndarray) -> np.ndarray:
  """Indices: the better of the worse documents first, and of one its most similar first."""
  return np.lexsort((edges['better'], -edges['jaccard'], edges['worse'], edges['id'], edges['age']))


def _decide(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, n_rows: list[int]) -> dict:
  """decided: _FOUND [all documents]. All pairs of a better document come before those in which it is the better one."""
  edges = [_load(root, step, 'compared', i) for i in range(len(n_rows))]
  n_edges, path = sum(map(len, edges)), root / _work(step, 'decided', 0)
  sample = np.sort(np.concatenate([part['age'][::_EDGES_A_SAMPLE] for part in edges]))
  ages = np.unique(sample[::max(1, len(sample) * _PAIRS_AT_ONCE // max(n_edges, 1))])  # a range of ages at a time
  first = np.cumsum([0, *n_rows[:-1]])
  with shards.committed(path) as temporary:
    found = np.lib.format.open_memmap(temporary, 'w+', _FOUND, (sum(n_rows),))
    for low, high in zip([0, *ages[1:]], [*ages[1:], None]):
      bounds = [[np.searchsorted(part['age'], np.uint64(age)) if age is not None else len(part) for age in (low, high)]
                for part in edges]
      some = np.concatenate([part[start:end] for part, (start, end) in zip(edges, bounds)])
      some = some[_in_order(some)]
      _go_through(some['worse'], some['better'], some['jaccard'], first, found['of'], found['jaccard'], found['copies'])
    found.flush()
    del found
  return shards.write_record(root, record_name, key, [shards.entry(root, path)])


@numba.njit(cache=True)
def _go_through(worse, better, jaccard, first, of, similarity, copies):
  low = np.uint64(2**32 - 1)
  for i in range(len(worse)):
    mine = first[np.int64(worse[i] >> np.uint64(32))] + np.int64(worse[i] & low)
    other = first[np.int64(better[i] >> np.uint64(32))] + np.int64(better[i] & low)
    if not of[mine] and not of[other]:
      of[mine], similarity[mine] = better[i] + np.uint64(1), jaccard[i]
      copies[other] += 1


def _collect(root: pathlib.Path, record_name: str, key: str, step: Fuzzy, shard: verdicts.Shard, index: int,
             first: int) -> dict:
  """Verdicts. Facts: pairs compared and similar, documents by the similarity for which they go and by their near copies."""
  found = np.array(_load(root, step, 'decided', 0)[first:first + shard.rows])
  compared = shards.read_record(root, f'{step.name}-compared-{index:05d}', key)
  gone, of = np.flatnonzero(found['of']), np.full(shard.rows, '', object)
  for row, place in zip(gone.tolist(), (found['of'][gone] - 1).tolist()):
    of[row] = f'{place >> 32}:{place & (2**32 - 1)}'
  similarity = collections.Counter(f'{value:.2f}' for value in np.floor(found['jaccard'][gone] * 100 + 1e-4) / 100)
  sizes = collections.Counter(2**int(np.log2(n)) for n in found['copies'][found['copies'] > 0].tolist())
  columns = {'of': pa.array(of, pa.string()), 'jaccard': pa.array(found['jaccard'], pa.float32(), mask=found['of'] == 0)}
  return verdicts.write(root, record_name, key, step.name, shard, {int(row): NEAR for row in gone}, columns,
                        pairs_compared=compared['compared'], pairs_similar=compared['similar'],
                        similarity=dict(sorted(similarity.items())),
                        near_copies={f'{n} to {2 * n - 1}' if n > 1 else '1': sizes[n] for n in sorted(sizes)})
