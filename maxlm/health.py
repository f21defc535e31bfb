"""What watches over a run: the ledger of its time, the watchdog, comparisons of hosts and of the copies of the weights."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax

from maxlm import digest, hosts
from maxlm.hosts import say
from maxlm.ledger import Account, Ledger, read
from maxlm.stragglers import Stragglers
from maxlm.watchdog import Watchdog


@dataclasses.dataclass(kw_only=True, slots=True)
class HealthConfig:
  """hang_seconds: without progress for so long, or five times what slow steps take, the process says where it is and
  exits 124. startup_seconds: the same for what is not a step: set-up, restore, compile, save, the first evaluation.
  compare_every: steps between comparisons of the copies that devices have of the same weights, and of hosts with each
  other (0: never)."""

  hang_seconds: float = 90.0  # less than JAX's heartbeats, which end a process without a word of where it was
  startup_seconds: float = 3600.0
  compare_every: int = 1000


class CorruptCopies(RuntimeError):
  """Devices that should hold the same numbers do not: a fault of the hardware."""


class Health:
  """All of it, for the loop: a context manager from the first phase to the exit code.

  Nothing is written before `begin`: a run that is refused leaves no trace.
  """

  def __init__(self, config: HealthConfig, workdir: Path):
    self._config, self._workdir, self._how = config, workdir, ''
    self._ledger, self._entered = None, []  # phases before the ledger was there
    self._watchdog = Watchdog(config.hang_seconds, config.startup_seconds, workdir, self._last_words)
    self._stragglers = Stragglers(config.compare_every)

  def __enter__(self) -> 'Health':
    return self

  def __exit__(self, kind, *_) -> None:
    self._watchdog.stop()
    if self._ledger is not None:
      self._ledger.close(kind.__name__ if kind else self._how)

  def _last_words(self, reason: str) -> None:
    if self._ledger is not None:
      self._ledger.close(reason)

  def ends(self, how: str, code: int) -> int:
    """Says how the attempt ended; returns the exit code."""
    self._how = how
    return code

  def enter(self, phase: str) -> None:
    """A phase of `ledger.PHASES` begins; the one before it is over."""
    if self._ledger is None:
      self._entered.append((phase, time.monotonic()))
    else:
      self._ledger.enter(phase)
    self._watchdog.enter(phase)
    self._stragglers.enter(phase)

  def begin(self, step: int, params: Any) -> tuple[float, int]:
    """The attempt goes on from a step: opens the ledger. Says whether there are copies of the weights to compare.
    (hours, failures) of the run before this attempt."""
    path = self._workdir / 'goodput.jsonl' if hosts.is_first() else None
    before = read(path) if path and path.exists() else Account()
    self._ledger = Ledger(path)
    for phase, at in self._entered:
      self._ledger.enter(phase, at)
    self._ledger.resumed(step)
    n, of = digest.n_replicated(params)
    if self._config.compare_every and jax.device_count() > 1:
      say(f'copies   of {n} of {of} arrays on several devices are compared every {self._config.compare_every:,} steps')
    return before.wall / 3600, sum(attempt.how not in ('finished', 'stopped') for attempt in before.attempts)

  def steps(self, done: int, params: Any, seconds_per_step: float | None) -> None:
    """A step was started. CorruptCopies where devices disagree on what they share."""
    self._ledger.steps(done)
    for line in self._stragglers.step(done):
      say(f'slow     {line}')
      self.event('straggler', step=done, what=line)
    if self._config.compare_every and done % self._config.compare_every == 0 and (wrong := digest.replicas(params)):
      name, device, process = wrong[0]
      self.event('corrupt', step=done, leaf=name, device=device, process=process)
      raise CorruptCopies(f'at step {done:,} device {device} of process {process} holds other numbers in {name} than the '
                          f'other copies ({len(wrong)} such cases): that chip, or its memory, is not to be trusted; '
                          'run again without it')

  def steps_undone(self, to: int) -> None:
    """The run went back."""
    self._ledger.steps(to)

  def event(self, kind: str, **facts: Any) -> None:
    self._ledger.event(kind, **facts)

  def shares(self) -> dict[str, float]:
    """Part of the run's time that each category of the ledger had so far."""
    return self._ledger.shares()
