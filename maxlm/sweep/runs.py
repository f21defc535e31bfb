"""The runs of a sweep: a Python file whose `get_sweep(arg)` returns a list of `Run`, and what has to be so of that list."""

import dataclasses
import inspect
import re
from collections.abc import Callable

from maxlm import flags, stages
from maxlm.config import Experiment
from maxlm.stages import Segment


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
  """experiment: its name is the run's, and that of its directory. branch: (name of the run that it leaves, step), and stages
  the names of those that it is for, as `maxlm.train --branch --stages`; of a run that others leave, those it has itself.
  group: the runs that belong together in the table."""

  experiment: Experiment
  branch: tuple[str, int] | None = None
  stages: tuple[str, ...] = ()
  group: str = ''

  @property
  def name(self) -> str:
    return self.experiment.name

  @property
  def settled(self) -> Experiment:
    """The experiment as the run trains it, with the stages of its whole lineage. ValueError if they do not follow."""
    if self.branch is not None:
      return stages.branched(self.experiment, self.branch[1], self.stages)
    return stages.chosen(self.experiment, self.stages) if self.stages else self.experiment

  @property
  def plan(self) -> tuple[Segment, ...]:
    """The whole lineage."""
    return stages.segments(self.settled)

  @property
  def first_step(self) -> int:
    """Steps that the run it leaves has done."""
    return self.branch[1] if self.branch else 0

  def arguments(self, sweep: str, workdir: str) -> list[str]:
    """What `maxlm.train` is told of the run. sweep: 'F.py' or 'F.py:arg'; workdir: of the sweep."""
    found = [f'--config={sweep}:{self.name}', f'--workdir={workdir}/{self.name}']
    if self.branch is not None:
      found.append(f'--branch={workdir}/{self.branch[0]}@{self.branch[1]}')
    return found + ([f'--stages={",".join(self.stages)}'] if self.stages else [])


def member_of(get_sweep: Callable[..., list[Run]], name: str) -> Experiment:
  """What `get_config(name)` of a sweep returns: the experiment of one run, by 'NAME' or 'arg:NAME'. ValueError for none."""
  arg, _, name = name.rpartition(':')
  runs = {run.name: run.experiment for run in get_sweep(arg)}
  if name not in runs:
    known = flags.nearest(name, [*runs]) or next(iter(runs))
    raise ValueError(f'this sweep has no run {name!r}; after the colon give the name of one, such as :{known}')
  return runs[name]


def load(sweep: str) -> list[Run]:
  """The runs of 'F.py' or 'F.py:arg', those that others leave before these. FileNotFoundError or ValueError, in one line."""
  path, _, arg = sweep.partition(':')
  get_sweep = getattr(flags.module_of(path), 'get_sweep', None)
  if get_sweep is None:
    raise ValueError(f'{path}: has no get_sweep(arg) that returns runs')
  if arg and not inspect.signature(get_sweep).parameters:
    raise ValueError(f'{path}: its get_sweep() takes no argument, got {arg!r}')
  runs = get_sweep(arg) if arg else get_sweep()
  check(sweep, runs)
  return runs


def check(sweep: str, runs: list[Run]) -> None:
  """ValueError, in one line with the fix, for runs that are no sweep or could not be trained."""
  if not runs:
    raise ValueError(f'{sweep}: has no runs')
  by_name = {}
  for run in runs:
    if not re.fullmatch(r'[\w.@+-]*\w', run.name) or run.name[0] in '.-':
      raise ValueError(f'{sweep}: a run has the name {run.name!r}, and has to be a directory: use letters, digits, . _ -')
    if run.name in by_name:
      raise ValueError(f'{sweep}: two runs have the name {run.name!r}: put what they differ in into the name')
    by_name[run.name] = run
  for run in runs:
    if run.branch is not None:
      trunk, step = by_name.get(run.branch[0]), run.branch[1]
      if trunk is None:
        near = flags.nearest(run.branch[0], [*by_name])
        raise ValueError(f'{sweep}: {run.name} leaves {run.branch[0]!r}, which is no run of it'
                         + (f'; did you mean {near!r}?' if near else ''))
      if trunk.branch is not None or not run.stages:
        what = 'a branch itself: leave the trunk' if run.stages else 'left for no stages: name them'
        raise ValueError(f'{sweep}: {run.name} leaves {trunk.name}: it is {what}')
      every, ends = trunk.experiment.checkpoint.keep_every, {part.stop for part in trunk.plan if part.is_last}
      if step not in ends and (every is None or step % every or not 0 < step < max(ends)):
        raise ValueError(f'{sweep}: {run.name} leaves {trunk.name} at step {step:,}, of which that run keeps no checkpoint: '
                         f'set its checkpoint.keep_every to a divisor of {step} (now {every})')
    try:
      for part in run.plan:
        part.config.optim.check(part.config.tokens)
    except ValueError as error:
      raise ValueError(f'{sweep}: {run.name}: {error}') from error
