"""Kills runs at random, again and again, and asks whether they end as if nobody had.

    python -m tests.chaos.campaign --kills=200 --out=campaign.jsonl

Each run trains on two processes. At a random moment of a random phase, one of them or both get kill -9; then the same
command is run again, and may be killed again, until it is left alone to finish. Then the digest of every array of its last
checkpoint, every loss and every batch must be those of the run that nobody disturbed. One line of JSON a kill, and a table.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from maxlm.checkpoint import COMMITTED, Checkpoints
from tests.jobs import Job, batches, losses
from tests.make_corpus import make_corpus

PHASES = ('start', 'restore', 'compile', 'step', 'save', 'commit', 'evaluation')
N_STEPS = 36
SETTINGS = ('--config.model.n_layers=1', f'--config.tokens={N_STEPS * 512}', '--config.checkpoint.every_steps=5',
            '--config.evals.every_steps=12', '--config.evals.rows=8')


@dataclasses.dataclass
class Kill:
  """One kill. victim: process, or 'both'. step: steps recorded then. waited: the others were left to notice it alone, where
  all had come: before, they wait for each other for half an hour."""

  run: int
  attempt: int
  phase: str
  victim: int | str
  step: int
  waited: bool


class Campaign:
  """Kills until there were so many; `kills` and `ends` say what happened."""

  def __init__(self, directory: Path, seed: int, processes: int = 2):
    self.directory, self.random, self.processes = directory, random.Random(seed), processes
    self.kills: list[Kill] = []
    self.ends: list[str] = []  # of each run: '' or what differs
    make_corpus(directory / 'corpus')
    job = self.start('undisturbed')
    assert job.wait() == [0] * processes, job.told()
    self.expected = outcome(job.workdir)

  def start(self, name: str) -> Job:
    (self.directory / name).mkdir(exist_ok=True)
    return Job(self.directory / 'corpus', self.directory / name / 'run', *SETTINGS, processes=self.processes)

  def run(self, n_kills: int) -> None:
    """One run that is killed so often, if it does not end before."""
    number, name = len(self.ends), f'run{len(self.ends)}'
    for attempt in range(n_kills):
      job = self.start(name)
      phase = self.random.choice([phase for phase in PHASES if phase != 'restore' or steps_saved(job.workdir)])
      if self.come_to(phase, job):
        self.kill(job, Kill(number, attempt, phase, self.random.choice([*range(self.processes), 'both']),
                            len(losses_or_none(job.workdir)), 'steps  ' in job.said() and self.random.random() < 0.1))
      if job.wait(120) == [0] * self.processes:
        break
    job = self.start(name)  # a finished one ends at once
    codes = job.wait()
    self.ends.append(job.told() if codes != [0] * self.processes else difference(outcome(job.workdir), self.expected))
    shutil.rmtree(self.directory / name)

  def kill(self, job: Job, kill: Kill) -> None:
    if kill.victim == 'both':
      job.kill()
    else:
      job.kill(kill.victim)
      if not kill.waited:  # as a supervisor does
        time.sleep(self.random.uniform(0, 0.5))
        job.kill()
    self.kills.append(kill)

  def come_to(self, phase: str, job: Job) -> bool:
    """Waits until the job is in the phase, and then some more; False if it has ended before."""
    run, begun = job.workdir, len(losses_or_none(job.workdir))
    known, leftovers = set(steps_saved(run)), unfinished(run)
    waits = {'start': (lambda: True, 3.0), 'restore': (lambda: 'steps  ' in job.said(), 0.6),
             'compile': (lambda: 'compile  …' in job.said(), 1.0),
             'step': (lambda: len(losses_or_none(run)) > begun, 0.4),
             'save': (lambda: unfinished(run) - leftovers, 0.03), 'commit': (lambda: set(steps_saved(run)) - known, 0.01),
             'evaluation': (lambda: any(n in (12, 24, 36) and n > begun for n in [len(losses_or_none(run))]), 0.3)}
    condition, longest = waits[phase]
    until = time.monotonic() + 100
    while not condition():
      if any(process.poll() is not None for process in job.processes) or time.monotonic() > until:
        return False
      time.sleep(0.002)
    time.sleep(self.random.uniform(0, longest))
    return all(process.poll() is None for process in job.processes)


def unfinished(workdir: Path) -> set[tuple[str, int]]:
  """(name, inode) of steps that are being written, or were when a kill came."""
  found = set()
  for path in (workdir / 'checkpoints').glob('*'):
    with contextlib.suppress(FileNotFoundError):  # it may be renamed or removed meanwhile
      if path.name.isdecimal() and not (path / COMMITTED).exists():
        found.add((path.name, path.stat().st_ino))
  return found


def steps_saved(workdir: Path) -> list[int]:
  return Checkpoints(workdir / 'checkpoints').steps()


def losses_or_none(workdir: Path) -> list[float]:
  try:
    return losses(workdir)
  except (OSError, ValueError):  # not there yet, or a line is half written
    return []


def outcome(workdir: Path) -> dict:
  """All that two equal runs have in common."""
  return {'digests': Checkpoints(workdir / 'checkpoints').digests(N_STEPS), 'losses': losses(workdir),
          'batches': batches(workdir)}


def difference(found: dict, expected: dict) -> str:
  return ', '.join(f'other {what}' for what in expected if found[what] != expected[what])


def table(campaign: Campaign) -> str:
  """Kills by phase and victim, and how the runs ended."""
  counts = collections.Counter((kill.phase, str(kill.victim)) for kill in campaign.kills)
  victims = sorted({victim for _, victim in counts})
  rows = [['phase', *victims], *([phase, *(str(counts[phase, victim]) for victim in victims)] for phase in PHASES)]
  deepest = collections.Counter(kill.run for kill in campaign.kills)
  same = sum(end == '' for end in campaign.ends)
  return '\n'.join(['  '.join(f'{cell:>10}' for cell in row) for row in rows] + [
    f'{len(campaign.kills)} kills in {len(campaign.ends)} runs, up to {max(deepest.values(), default=0)} a run: '
    f'{same} runs ended with the bits of the undisturbed one',
    *(f'run {i}: {end}' for i, end in enumerate(campaign.ends) if end)])


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=Path, default=Path('campaign.jsonl'))
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory, open(arguments.out, 'w', buffering=1) as out:
    campaign = Campaign(Path(directory), arguments.seed)
    while len(campaign.kills) < arguments.kills:
      before, began = len(campaign.kills), time.time()
      campaign.run(min(campaign.random.randint(2, 8), arguments.kills - before))
      for kill in campaign.kills[before:]:
        out.write(json.dumps(dataclasses.asdict(kill)) + '\n')
      out.write(json.dumps({'run': len(campaign.ends) - 1, 'end': campaign.ends[-1] or 'the same bits',
                            'seconds': round(time.time() - began, 1)}) + '\n')
    print(table(campaign))
  return int(any(campaign.ends))


if __name__ == '__main__':
  sys.exit(main())
