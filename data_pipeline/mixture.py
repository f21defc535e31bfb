"""Which source each row of training comes from: exact integer weights, a pure function of the row index.

All rows of a corpus have the same length, so weights of rows are weights of tokens. Within a stage the sources are split by
a balanced binary tree; at a node of weights a and b the first n rows give exactly floor((n*a + (a+b)//2) / (a+b)) rows to
the left branch (Bresenham's line). Counts up to any row are therefore a closed form, never a scan; after each period
(the sum of the weights) they equal the weights exactly; and in between each node is off by at most half a row.

Stages are append-only: a stage starts where the last one ends and every source goes on where it was, so that appending a
stage never changes an earlier row. No JAX, no Grain, and no state.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class _Stage:
  start: int  # first row
  stop: int | None  # None: open-ended
  carried: dict[str, int]  # rows of each source before `start`
  names: tuple[str, ...]  # sorted, so that the order in a config does not matter
  weights: tuple[int, ...]  # divided by their common divisor


class MixtureSchedule:
  """MixtureSchedule(stages=((1000, {'web': 3, 'books': 1}), (None, {'web': 1, 'books': 1}))): rows and weights a stage.

  Only the last stage may be open-ended (rows=None). A source of weight 0 is named and never drawn.
  sources: names in the order of first appearance (sorted within a stage): what `source` in a batch indexes.
  n_rows: rows in all, None if open-ended. ValueError for weights or rows that are not exact.
  """

  def __init__(self, stages):
    self._stages, names, start = [], {}, 0
    stages = tuple(stages)
    if not stages:
      raise ValueError('a mixture needs at least one stage: ((rows or None, {source: weight, …}), …)')
    for i, (rows, weights) in enumerate(stages):
      _check_stage(i, rows, weights, last=i == len(stages) - 1)
      names.update(dict.fromkeys(sorted(weights)))
      drawn = sorted(name for name, weight in weights.items() if weight)
      divisor = math.gcd(*(weights[name] for name in drawn))
      carried = {name: self._count(name, start) for name in names}
      stop = None if rows is None else start + rows
      self._stages.append(_Stage(start, stop, carried, tuple(drawn), tuple(weights[name] // divisor for name in drawn)))
      start = stop
    self.sources = tuple(names)
    self.n_rows = start

  def source_of(self, row: int) -> tuple[int, int]:
    """Row of training -> (index of its source, row within that source's own endless stream)."""
    sources, rows = self.sources_of(np.array([row], np.int64))
    return int(sources[0]), int(rows[0])

  def sources_of(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """The same for an array of rows: int64 arrays. IndexError outside the schedule."""
    rows = np.asarray(rows, np.int64)
    if rows.size and (rows.min() < 0 or (self.n_rows is not None and rows.max() >= self.n_rows)):
      raise IndexError(f'rows {rows.min()}..{rows.max()} are outside the schedule of {self.n_rows} rows')
    sources, within = np.empty_like(rows), np.empty_like(rows)
    for stage in self._stages:
      here = rows >= stage.start
      if stage.stop is not None:
        here &= rows < stage.stop
      if here.any():
        position, stream_row = _split(rows[here] - stage.start, np.array(stage.weights, np.int64))
        carried = np.array([stage.carried[name] for name in stage.names], np.int64)
        sources[here] = np.array([self.sources.index(name) for name in stage.names], np.int64)[position]
        within[here] = stream_row + carried[position]
    return sources, within

  def counts(self, start_row: int, stop_row: int) -> dict[str, int]:
    """Rows of each source in [start_row, stop_row): exact, and as quick for a trillion rows as for one."""
    if not 0 <= start_row <= stop_row or (self.n_rows is not None and stop_row > self.n_rows):
      raise IndexError(f'rows [{start_row}, {stop_row}) are outside the schedule of {self.n_rows} rows')
    return {name: self._count(name, stop_row) - self._count(name, start_row) for name in self.sources}

  def draws(self, name: str) -> bool:
    """Whether any row ever comes from this source."""
    return any(name in stage.names for stage in self._stages)

  def _count(self, name: str, row: int) -> int:
    """Rows of one source before `row`."""
    stages = [stage for stage in self._stages if stage.start <= row]
    if not stages:
      return 0
    stage = stages[-1]
    carried = stage.carried.get(name, 0)
    return carried + _prefix(row - stage.start, stage.weights, stage.names.index(name)) if name in stage.names else carried


def _check_stage(i: int, rows, weights, *, last: bool) -> None:
  is_int = lambda value: isinstance(value, int) and not isinstance(value, bool)
  if rows is None and not last:
    raise ValueError(f'stage {i} of the mixture is open-ended but not the last: give it a number of rows')
  if rows is not None and (not is_int(rows) or rows < 0):
    raise ValueError(f'stage {i} of the mixture has rows={rows!r}: it must be an integer >= 0, or None in the last stage')
  if wrong := {name: weight for name, weight in weights.items() if not is_int(weight) or weight < 0}:
    raise ValueError(f'stage {i} of the mixture has weights {wrong}: weights are integers >= 0, '
                     'such as 3 and 1 instead of 0.75 and 0.25')
  total = sum(weights.values())
  if not 0 < total < 1 << 31:
    raise ValueError(f'weights of stage {i} of the mixture add up to {total}: they must add up to 1 … 2^31-1')


def _left(n, left_weight, weight):
  """Of a node's first n rows, those of its left branch. n: int, or an array below 2^31."""
  return (n * left_weight + weight // 2) // weight


def _prefix(n: int, weights: tuple[int, ...], position: int) -> int:
  """Of a stage's first n rows, those of the source at `position`. Python integers: exact at any n."""
  if len(weights) == 1:
    return n
  half = len(weights) // 2
  left = _left(n, sum(weights[:half]), sum(weights))
  return _prefix(left, weights[:half], position) if position < half else _prefix(n - left, weights[half:], position - half)


def _split(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows of a node -> (position of each row's source among `weights`, row within that source)."""
  if len(weights) == 1:
    return np.zeros_like(rows), rows
  half = len(weights) // 2
  left_weight, weight = weights[:half].sum(), weights.sum()
  periods, rest = np.divmod(rows, weight)  # whole periods apart: the products below stay under 2^62
  before = periods * left_weight + _left(rest, left_weight, weight)
  is_left = periods * left_weight + _left(rest + 1, left_weight, weight) > before
  position, within = np.empty_like(rows), np.empty_like(rows)
  position[is_left], within[is_left] = _split(before[is_left], weights[:half])
  position[~is_left], within[~is_left] = _split((rows - before)[~is_left], weights[half:])
  position[~is_left] += half
  return position, within
