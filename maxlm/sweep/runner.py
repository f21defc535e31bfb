"""Runs a sweep on this machine: a process a run, a few at a time, runs that others leave before these.

What is finished is left alone, what was broken off goes on. A run that fails does not stop the rest.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from maxlm.metrics import duration
from maxlm.sweep import table
from maxlm.sweep.progress import Progress, newest_step
from maxlm.sweep.runs import Run

EXIT_STOPPED = 75  # as of maxlm.train
POLL_SECONDS = 0.5


class Runner:
  """A context manager: SIGTERM and Ctrl-C within it stop the runs, which save, and then it."""

  def __init__(self, sweep: str, runs: list[Run], workdir: Path, jobs: int):
    self.sweep, self.workdir, self.jobs, self.stopped = sweep, workdir, jobs, ''
    self.waiting, self.finished, self.failed = list(runs), set(), set()  # runs; names
    self.children: dict[str, tuple[Run, subprocess.Popen, int]] = {}  # by name, with the slot of each
    # Of those that wait: a sweep that was killed left them running, and they go on.
    self.elsewhere = {run.name for run in runs if table.is_held(workdir / run.name)}
    self.progress = Progress(runs, sys.stderr)

  def __enter__(self) -> 'Runner':
    self._handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _stop(self, number, frame) -> None:
    self.stopped = signal.Signals(number).name

  def run(self) -> int:
    """Runs all; 0 where all are finished, 1 where some failed, 75 where it was stopped."""
    (self.workdir / 'logs').mkdir(parents=True, exist_ok=True)
    told = False
    while self.children or not self.stopped and self.waiting:
      if self.stopped and not told:
        self.progress.print(f'stopping by {self.stopped}: {", ".join(self.children) or "nothing"} will save and end')
        for _, process, _ in self.children.values():
          process.terminate()
        told = True
      self.reap()
      if not self.stopped:
        self.start_some()
      self.progress.show({name: newest_step(self.workdir / name) for name in [*self.children, *self.elsewhere]},
                         self.finished, len(self.failed), len(self.waiting) - len(self.elsewhere))
      time.sleep(POLL_SECONDS)
    return EXIT_STOPPED if self.stopped else 1 if self.failed else 0

  def start_some(self) -> None:
    """Starts runs as long as there is room; settles those for which there is nothing to do."""
    for run in list(self.waiting):
      has_room, trunk = len(self.children) + len(self.elsewhere) < self.jobs, run.branch[0] if run.branch else None
      if trunk and trunk not in self.finished | self.failed or not has_room and run.name not in self.elsewhere:
        continue
      status, why = table.state_of(run, self.workdir)
      if trunk in self.failed:
        status, why = 'failed', f'it leaves {trunk}, which failed'
      self.elsewhere.discard(run.name)
      if status == 'running':
        self.elsewhere.add(run.name)
      elif status == 'finished' or trunk in self.failed or why.startswith(table.CHANGED):
        self.waiting.remove(run)
        self.settle(run, status, why)
      elif has_room:
        self.waiting.remove(run)
        self.start(run)

  def start(self, run: Run) -> None:
    """In a session of its own: Ctrl-C on a terminal comes to the sweep alone, which passes it on once."""
    command = [sys.executable, '-m', 'maxlm.train', *run.arguments(self.sweep, str(self.workdir))]
    with open(table.log_of(self.workdir, run.name), 'a', encoding='utf-8') as log:
      process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    slot = min({*range(self.jobs)} - {child[2] for child in self.children.values()})
    if hasattr(os, 'sched_setaffinity'):  # cores of its own, before it counts them
      cores = sorted(os.sched_getaffinity(0))
      os.sched_setaffinity(process.pid, cores[slot::self.jobs] or cores)
    self.children[run.name] = run, process, slot
    self.progress.print(f'started  {run.name}')

  def reap(self) -> None:
    """Takes note of those that have ended."""
    for name, (run, process, _) in list(self.children.items()):
      if process.poll() is None:
        continue
      del self.children[name]
      if process.returncode and not self.stopped:
        with open(table.log_of(self.workdir, name), 'a', encoding='utf-8') as log:
          log.write(f'{table.EXITED}{process.returncode}\n')
      status, why = table.state_of(run, self.workdir)
      if not self.stopped or status == 'finished':
        self.settle(run, status, why)

  def settle(self, run: Run, status: str, why: str) -> None:
    """The run is through."""
    if status == 'finished':
      self.finished.add(run.name)
      row = table.results(self.workdir / run.name, run.plan[-1].stop)
      self.progress.print(f'finished {run.name}: loss {row["loss"]:.4f}, {row["bits_per_byte"]:.4f} bits per byte, '
                          f'{duration(row["seconds"] or 0)}')
    else:
      self.failed.add(run.name)
      self.progress.print(f'FAILED   {run.name}: {why or "see its log"}')
