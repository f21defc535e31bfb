"""The record of a run as a reader wants it: what its workdir says of it, a series for each name of metrics.jsonl.

Works while the run goes on, and whatever has happened to it: what was undone by a rewind or done again after a kill counts
once, as it was done last; a value that is no number is NaN; a line that was cut is counted and left out.
"""

import array
import dataclasses
import difflib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from maxlm import ledger, typed_json
from maxlm.checkpoint import Checkpoints


@dataclasses.dataclass(slots=True)
class Series:
  """One value over the steps, which rise. Where a stage ends and another begins, a step may have a value of each."""

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(slots=True)
class Evaluation:
  """What was measured after a step, in which stage; its names are those of metrics.jsonl without 'eval/'."""

  step: int
  stage: str
  values: dict[str, float]


@dataclasses.dataclass(slots=True)
class Span:
  """The steps of a stage: (first - 1, last]."""

  name: str
  first: int
  last: int


@dataclasses.dataclass(kw_only=True, slots=True)
class Run:
  """workdir: as it was given. name: what tells it from the others. series: by the names of metrics.jsonl, and `time` (Unix
  seconds) of each step. stages, evaluations: in order. redone: steps that were recorded and then done again. config: JSON,
  {} where there is none. meta: of the newest checkpoint. n_parameters: that it holds. done: what DONE says. account: of the
  ledger. notes: what could not be read.
  """

  workdir: str
  name: str
  series: dict[str, Series]
  stages: list[Span]
  evaluations: list[Evaluation]
  redone: int
  config: dict[str, Any]
  meta: dict[str, Any]
  n_parameters: int | None
  done: dict[str, Any] | None
  account: ledger.Account | None
  notes: list[str]

  @property
  def last_step(self) -> int:
    return max(int(series.steps[-1]) for series in self.series.values())

  @property
  def tokens_per_step(self) -> int | None:
    """By the config, for a record that does not say how many tokens the run had seen."""
    data = self.config.get('data', {})
    return data['batch_size'] * data['seq_len'] if {'batch_size', 'seq_len'} <= data.keys() else None

  @property
  def has_tokens(self) -> bool:
    return 'tokens' in self.series or self.tokens_per_step is not None

  def tokens(self, steps: np.ndarray) -> np.ndarray:
    """How many the run had seen after those steps; the steps themselves where nothing says."""
    seen, steps = self.series.get('tokens'), np.asarray(steps, np.float64)
    if seen is not None and (seen.steps[0] <= self.series['loss'].steps[0] or self.tokens_per_step is None):
      return np.interp(steps, seen.steps, seen.values)
    return steps * (self.tokens_per_step or 1)

  @property
  def goal(self) -> int | None:
    """Tokens that the config asks for."""
    stages = self.config.get('stages') or []
    return sum(stage['tokens'] for stage in stages) or self.config.get('tokens')

  def seconds(self, steps: np.ndarray) -> np.ndarray:
    """Time from the first start of the run to when a step was recorded, without what no attempt was under way in."""
    times = self.series['time']
    moments, attempts = times.values, self.account.attempts if self.account else []
    start = min([moments[0], *(attempt.start for attempt in attempts[:1])])
    passed = moments - start
    for before, attempt in zip(attempts, attempts[1:]):
      passed -= np.where(moments >= attempt.start, max(0.0, attempt.start - before.end), 0.0)
    return np.interp(steps, times.steps, np.maximum.accumulate(passed))

  def names(self, prefix: str) -> list[str]:
    """What stands behind the prefix in the names of series, in the order in which they first came."""
    return [name.removeprefix(prefix) for name in self.series if name.startswith(prefix)]

  def steps_where(self, name: str, is_so) -> list[int]:
    series = self.series.get(name)
    return [] if series is None else series.steps[is_so(series.values)].tolist()

  @property
  def not_finite(self) -> list[int]:
    """Steps whose loss or gradient is no number."""
    return sorted({step for name in ('loss', 'grad_norm') for step in self.steps_where(name, lambda v: ~np.isfinite(v))})

  @property
  def skipped(self) -> list[int]:
    """Steps whose update was left out."""
    return self.steps_where('skipped', lambda values: values > 0)

  @property
  def shares(self) -> dict[str, float]:
    """Part of the wall time that each category of the ledger had."""
    if self.account is not None and self.account.wall:
      return self.account.shares()
    return {name: float(self.series[f'goodput/{name}'].values[-1]) for name in self.names('goodput/')}

  @property
  def state(self) -> str:
    if self.done is not None and self.done.get('steps', 0) >= self.last_step:
      return 'finished'
    how = self.account.attempts[-1].how if self.account and self.account.attempts else None
    return how or 'goes on, or was killed'


def read(workdir: str | Path) -> Run:
  """What a workdir says. FileNotFoundError or ValueError, in one line, if it is not that of a run that took a step."""
  workdir = Path(workdir)
  check(workdir)
  reader, notes = Reader(), []
  for record in ledger.records(workdir / 'metrics.jsonl'):
    reader.add(record)
  if 'loss' not in reader.columns:
    raise ValueError(f'{workdir}/metrics.jsonl has no step yet: the first ones come after some seconds')
  if reader.ignored:
    notes.append(f'{reader.ignored:,} line{"s" * (reader.ignored > 1)} of metrics.jsonl could not be read')
  config = read_json(workdir / 'config.json', notes)
  meta, n_parameters = newest_checkpoint(workdir, notes)
  account = ledger.read(workdir / 'goodput.jsonl') if (workdir / 'goodput.jsonl').is_file() else None
  if account and account.ignored:
    notes.append(f'{account.ignored:,} line{"s" * (account.ignored > 1)} of goodput.jsonl could not be read')
  return Run(workdir=str(workdir), name=str(workdir), series=reader.series(), stages=reader.spans(),
             evaluations=reader.evaluations, redone=reader.redone, config=config or meta.get('config', {}), meta=meta,
             n_parameters=n_parameters, done=read_json(workdir / 'DONE', notes) or None, account=account, notes=notes)


def read_all(workdirs: list[str]) -> list[Run]:
  """Of each workdir, as `read` does; several are named by what their paths do not have in common."""
  runs = [read(workdir) for workdir in workdirs]
  if len(runs) > 1:
    paths = [os.path.abspath(run.workdir) for run in runs]
    for run, path in zip(runs, paths):
      run.name = os.path.relpath(path, os.path.commonpath(paths))
  return runs


def check(workdir: Path) -> None:
  """FileNotFoundError, naming what it may have been meant to be."""
  if (workdir / 'metrics.jsonl').is_file():
    return
  if workdir.is_dir():
    raise FileNotFoundError(f'{workdir} has no metrics.jsonl: give the workdir of a run')
  beside = os.listdir(workdir.parent) if workdir.parent.is_dir() else []
  near = difflib.get_close_matches(workdir.name, beside, n=1)
  hint = f'; did you mean {workdir.with_name(near[0])}?' if near else ': give the workdir of a run'
  raise FileNotFoundError(f'there is no directory {workdir}{hint}')


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
  """{} where there is no such file, or where it is no object of JSON, which is noted."""
  if not path.is_file():
    return {}
  try:
    plain = json.loads(path.read_text(encoding='utf-8'))
  except ValueError:
    plain = None
  if not isinstance(plain, dict):
    notes.append(f'{path.name} could not be read')
    return {}
  return plain


def newest_checkpoint(workdir: Path, notes: list[str]) -> tuple[dict[str, Any], int | None]:
  """(what was saved beside the newest checkpoint, its parameters); ({}, None) as long as there is none."""
  checkpoints = Checkpoints(workdir / 'checkpoints')
  step = checkpoints.latest()
  if step is None:
    return {}, None
  try:
    return checkpoints.meta(step), sum(map(math.prod, checkpoints.shapes(step).values()))
  except (ValueError, OSError) as error:  # damaged; or a run that goes on has removed it meanwhile
    notes.append(f'checkpoint {step} could not be read: {error}')
    return {}, None


class Reader:
  """Takes the lines of a metrics.jsonl in their order."""

  def __init__(self):
    self.columns: dict[str, tuple[array.array, array.array]] = {}  # name -> (steps, values)
    self.evaluations: list[Evaluation] = []
    self.ignored = self.redone = 0
    self._stages: list[tuple[int, str]] = []  # (first step, name)
    self._newest = 0

  def add(self, record: Any) -> None:
    """A record of a step, or of what was measured after it. One of an earlier step undoes what was recorded past it."""
    step = record.get('step') if isinstance(record, dict) else None
    if type(step) is not int or step < 0:
      self.ignored += 1
      return
    is_step = 'loss' in record
    if step < self._newest or is_step and step == self._newest:
      self._undo(step - is_step)
    self._newest = step
    values = {name: math.nan if value is None else value for name, value in record.items()
              if (value is None or type(value) in (int, float)) and name != 'step' and (name != 'time' or is_step)}
    stage = str(record.get('stage', ''))
    measured = {name.removeprefix('eval/'): value for name, value in values.items() if name.startswith('eval/')}
    last = self.evaluations[-1] if self.evaluations else None
    is_beside = measured and last and last.step == step and last.stage != stage
    if measured and last and (last.step, last.stage) == (step, stage):  # a part of it, or it was measured again
      last.values |= measured
    elif measured:
      self.evaluations.append(Evaluation(step, stage, measured))
    for name, value in values.items():
      self._append(name, step, value, is_beside and name.startswith('eval/'))
    if is_step and stage and (not self._stages or self._stages[-1][1] != stage):
      self._stages.append((step, stage))

  def _append(self, name: str, step: int, value: float, is_beside: bool) -> None:
    steps, values = self.columns.setdefault(name, (array.array('q'), array.array('d')))
    if steps and steps[-1] == step and not is_beside:
      steps.pop(), values.pop()
    steps.append(step)
    values.append(value)

  def _undo(self, after: int) -> None:
    for name, (steps, values) in self.columns.items():
      n = len(steps)
      while steps and steps[-1] > after:
        steps.pop(), values.pop()
      self.redone += n - len(steps) if name == 'loss' else 0
    while self._stages and self._stages[-1][0] > after:
      self._stages.pop()
    while self.evaluations and self.evaluations[-1].step > after:
      self.evaluations.pop()

  def series(self) -> dict[str, Series]:
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in self.columns.items() if steps}

  def spans(self) -> list[Span]:
    """The stages; none where the run has only one, which then has no name worth telling."""
    if len(self._stages) < 2:
      return []
    lasts = [first - 1 for first, _ in self._stages[1:]] + [self._newest]
    return [Span(name, first, last) for (first, name), last in zip(self._stages, lasts)]


def config_differences(runs: list[Run]) -> dict[str, list]:
  """{key: its value in each run's config} of those in which they differ; 'absent' where a config has no such key."""
  flat = [typed_json.flat(run.config) if run.config else {} for run in runs]
  keys = sorted({key for one in flat for key in one})
  values = {key: [one.get(key, 'absent') for one in flat] for key in keys}
  return {key: of_key for key, of_key in values.items() if any(value != of_key[0] for value in of_key)}
