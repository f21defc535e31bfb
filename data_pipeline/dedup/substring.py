"""Repeated passages: of one of `min_bytes` or more that occurs several times, the first place is kept, the others are cut.

A suffix array (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better") over a group of documents, those
that follow one another in the shards: suffixes that share their first `min_bytes` bytes lie side by side in it. Repeats are
found within documents and between those of a group, not between groups. Cuts are edits, so that no text is rewritten.

Memory: 11 bytes a byte of a group, which is one task.
"""

import dataclasses
import pathlib
import sys

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydivsufsort

from data_pipeline import shards, verdicts

_END = 0xFF  # between documents, and in the place of what was cut before: no byte of utf-8
_BLANK = b' \n\t'
_TO_BLANK = 64  # bytes that a cut is shortened by, at most, so as to begin and end between words
_CUT = np.dtype([('shard', '<u4'), ('row', '<u4'), ('start', '<i4'), ('end', '<i4')])


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Substrings:
  """Cuts what is repeated, by edits. No document goes, but what is left may be shorter than the recipe's min_bytes."""

  name: str = 'substrings'
  min_bytes: int = 500  # the shortest repeat that is cut
  group_bytes: int = 128 << 20  # of text, among which repeats are looked for

  def __post_init__(self):
    if self.min_bytes < 50 or not 0 < self.group_bytes < 1 << 31:
      raise ValueError(f'substrings: min_bytes={self.min_bytes} must be at least 50, and group_bytes={self.group_bytes} '
                       'under 2 GB')

  def state(self) -> str:
    return shards.code_of(sys.modules[__name__], verdicts)

  def judge(self, tasks, shards_: list[verdicts.Shard]) -> list[dict]:
    everything = shards.key_of(shards.describe(self), self.state(), [(shard.documents, shard.hashes) for shard in shards_])
    names, groups_of = [f'{self.name}-{i:05d}' for i in range(len(shards_))], [[] for _ in shards_]
    if None in [tasks.recorded(name, everything) for name in names]:
      pieces = tasks.run('repeats: sizes', _measure, [(f'{self.name}-sizes-{i:05d}', everything, self, shard)
                                                      for i, shard in enumerate(shards_)], lasting=False)
      groups = self._groups([(i, piece) for i, record in enumerate(pieces) for piece in record['pieces']])
      tasks.run('repeats: suffix arrays', _find, [
        (f'{self.name}-found-{g:05d}', everything, self, g, [(shards_[i], i, start, end) for i, (start, end, _) in group])
        for g, group in enumerate(groups)], lasting=False)
      for g, group in enumerate(groups):
        for i in dict(group):
          groups_of[i].append(g)
    return tasks.run('repeats: verdicts', _collect, [(names[i], everything, self, shard, i, groups_of[i])
                                                     for i, shard in enumerate(shards_)])

  def _groups(self, pieces: list[tuple]) -> list[list[tuple]]:
    """Pieces (shard, (first row, end, bytes)) in order, as many together as there is room for."""
    groups, room = [], 0
    for i, piece in pieces:
      if not groups or piece[2] > room:
        groups, room = [*groups, []], self.group_bytes
      groups[-1].append((i, piece))
      room -= piece[2]
    return groups


def _measure(root: pathlib.Path, record_name: str, key: str, step: Substrings, shard: verdicts.Shard) -> dict:
  """record['pieces']: ranges of rows [start, end, bytes] that are no larger than a group (unless one document is)."""
  sizes = pq.read_table(root / shard.documents, columns=['bytes'])['bytes'].to_numpy() + 1
  sizes[verdicts.reasons(root, shard) != ''] = 0
  pieces = [[0, 0, 0]]
  for row, size in enumerate(sizes.tolist()):
    if pieces[-1][2] and pieces[-1][2] + size > step.group_bytes:
      pieces.append([row, row, 0])
    pieces[-1][1], pieces[-1][2] = row + 1, pieces[-1][2] + size
  return shards.write_record(root, record_name, key, [], pieces=pieces)


def _path(step: Substrings, group: int) -> str:
  return f'build/steps/{step.name}/found-{group:05d}.npy'


def _find(root: pathlib.Path, record_name: str, key: str, step: Substrings, group: int, pieces: list[tuple]) -> dict:
  """found-g: _CUT [cuts], by place."""
  text, places, starts = bytearray(), [], []
  for shard, index, first, end in pieces:
    before = _cut_before(root, shard)
    for rows, batch in verdicts.kept(root, shard, ['text']):
      mine = (rows >= first) & (rows < end)
      for row, one in zip(rows[mine].tolist(), batch['text'].filter(pa.array(mine)).to_pylist()):
        if one.startswith('{"'):  # a conversation: without a part it would be no JSON
          continue
        data = bytearray(one, 'utf-8')
        for cut in before.get(row, ()):
          data[cut['start']:cut['end']] = bytes([_END]) * (cut['end'] - cut['start'])
        places.append((index, row))
        starts.append(len(text))
        text += data
        text.append(_END)
  data = np.frombuffer(text, np.uint8)
  found = _cuts(data, _flags(data, pydivsufsort.divsufsort(data), step.min_bytes), step.min_bytes) if len(data) else []
  cuts, starts = [], np.array(starts, np.int64)
  for start, end in found:
    i = int(np.searchsorted(starts, start, side='right')) - 1
    document = data[starts[i]:starts[i + 1] if i + 1 < len(starts) else len(data)].tobytes()[:-1]
    start, end = _between_words(document, int(start - starts[i]), int(end - starts[i]))
    if end - start >= _TO_BLANK:
      cuts.append((*places[i], start, end))
  path = root / _path(step, group)
  with shards.committed(path) as temporary, open(temporary, 'wb') as file:
    np.save(file, np.array(cuts, _CUT))
  return shards.write_record(root, record_name, key, [shards.entry(root, path)])


def _cut_before(root: pathlib.Path, shard: verdicts.Shard) -> dict[int, list]:
  """row -> edits of the steps before."""
  found = {}
  for path in shard.verdicts:
    if 'edits' in pq.read_schema(root / path).names:
      for row, edits in enumerate(pq.read_table(root / path, columns=['edits'])['edits'].to_pylist()):
        if edits:
          found.setdefault(row, []).extend(edits)
  return found


@numba.njit(cache=True)
def _flags(text, suffixes, n):
  """uint8 [bytes]: 1 where the first of several equal passages of n bytes begins, 2 where another does, 3 where both."""
  same, flags, start = _as_the_one_before(text, suffixes, n), np.zeros(len(text), np.uint8), 0
  for i in range(1, len(suffixes) + 1):
    if i < len(suffixes) and same[suffixes[i]]:
      continue
    if i - start > 1:
      first = suffixes[start:i].min()
      for k in range(start, i):
        flags[suffixes[k]] |= 1 if suffixes[k] == first else 2
    start = i
  return flags


@numba.njit(cache=True)
def _as_the_one_before(text, suffixes, n):
  """bool [bytes]: whether a suffix shares n bytes, of one document, with the one before it in the suffix array.

  In the order of the text, where a suffix shares at least one byte less than the one before it did (Kasai et al. 2001), and
  memory is read in order.
  """
  before, same, shared = np.empty(len(text), np.int32), np.zeros(len(text), np.bool_), 0
  before[suffixes[0]] = -1
  for i in range(1, len(suffixes)):
    before[suffixes[i]] = suffixes[i - 1]
  for p in range(len(text)):
    q = before[p]
    if q < 0:
      shared = 0
      continue
    while (shared < n and max(p, q) + shared < len(text) and text[p + shared] == text[q + shared] and
           text[p + shared] != _END):
      shared += 1
    same[p] = shared >= n
    shared = max(shared - 1, 0)
  return same


@numba.njit(cache=True)
def _cuts(text, flags, n):
  """int64 [cuts, 2]: what is covered by repeats of n bytes and by no first place of one."""
  found, n_found, repeat_until, first_until, inside = np.empty((1024, 2), np.int64), 0, 0, 0, False
  for p in range(len(text)):
    if flags[p] & 1:
      first_until = p + n
    if flags[p] & 2:
      repeat_until = p + n
    cut = first_until <= p < repeat_until
    if cut and not inside:
      if n_found == len(found):
        found = np.concatenate((found, np.empty_like(found)))
      found[n_found, 0] = p
    elif inside and not cut:
      found[n_found, 1] = p
      n_found += 1
    inside = cut
  return found[:n_found]  # the last byte is _END, where no cut is


def _between_words(text: bytes, start: int, end: int) -> tuple[int, int]:
  """The cut made shorter: to between words where a blank is near, else to between characters."""
  if start and text[start - 1] not in _BLANK:
    near = [text.find(blank, start, start + _TO_BLANK) for blank in (b' ', b'\n', b'\t')]
    start = min([at + 1 for at in near if at >= 0], default=start)
  if end < len(text) and text[end] not in _BLANK and text[end - 1] not in _BLANK:
    near = max(text.rfind(blank, max(start, end - _TO_BLANK), end) for blank in (b' ', b'\n', b'\t'))
    end = near if near >= 0 else end
  while start < end and text[start] & 0xC0 == 0x80:
    start += 1
  while start < end < len(text) and text[end] & 0xC0 == 0x80:
    end -= 1
  return start, end


def _collect(root: pathlib.Path, record_name: str, key: str, step: Substrings, shard: verdicts.Shard, index: int,
             groups: list[int]) -> dict:
  edits = [None] * shard.rows
  for group in groups:
    found = np.load(root / _path(step, group))
    for _, row, start, end in found[found['shard'] == index].tolist():
      edits[row] = [*(edits[row] or []), {'start': start, 'end': end, 'text': ''}]
  sizes = [one['end'] - one['start'] for some in edits for one in some or ()]
  return verdicts.write(root, record_name, key, step.name, shard, {}, {'edits': pa.array(edits, verdicts.EDITS)},
                        cuts=len(sizes), documents_cut=sum(map(bool, edits)), bytes_cut=sum(sizes))
