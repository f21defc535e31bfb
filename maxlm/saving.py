"""When a run saves: every so many steps, or as often as its own failures and the price of a save say."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from maxlm import hosts
from maxlm.checkpoint import CheckpointConfig, Checkpoints
from maxlm.hosts import say

FIRST = 10  # steps to the first save of an automatic run: it shows that the place can be written, and what a save costs
MAX_STALL = 0.01  # share of the time
# Failures are counted from the run's own attempts, on top of one in so many device hours, which is what 16,384 H100s had
# in 54 days of Llama 3 (419 unexpected ones; arXiv 2407.21783, section 3.3.4), and of one a day for small machines.
DEVICE_HOURS, HOURS = 50_000, 24


def interval_seconds(stall: float, hours: float, failures: int, n_devices: int) -> float:
  """Seconds between saves that lose least, Young's sqrt(2 * stall * mean time between failures) (CACM 17(9), 1974), but no
  more than 1 % of the time. stall: seconds a save holds training up. hours, failures: of the run so far."""
  expected = min(HOURS, DEVICE_HOURS / n_devices)
  between = 3600 * (expected + hours) / (1 + failures)
  return max(math.sqrt(2 * stall * between), stall / MAX_STALL)


class Saver:
  """Saves the run's checkpoints when it is time to. Every process asks the same questions in the same order."""

  def __init__(self, checkpoints: Checkpoints, config: CheckpointConfig, first_step: int, *, hours: float, failures: int,
               n_devices: int, event: Callable[..., None]):
    """hours, failures: of the run before this attempt. event: takes what happened, for the ledger."""
    self._checkpoints, self._config, self._event = checkpoints, config, event
    self._hours, self._failures, self._n_devices, self._began = hours, failures, n_devices, time.monotonic()
    self._stalls, self._next = [], first_step + FIRST
    self._failed = []  # the errors of the last saves, since one was good
    self.last = first_step  # the newest step that is saved, or on its way

  def is_due(self, step: int, seconds_per_step: float | None) -> bool:
    """Whether the state after that step is to be saved now: it is time to, or the save before has turned out to have failed.
    Of several processes any may notice that alone; they try again when it is time to."""
    self._attempt(self._checkpoints.poll)
    if self._failed and jax.process_count() == 1:
      return True
    if self._config.keep_every is not None and step % self._config.keep_every == 0:
      return True
    if self._config.every_steps is not None:
      return step % self._config.every_steps == 0
    if step < self._next:
      return False
    if self._stalls and seconds_per_step:
      self._next = step + hosts.agree('next save', lambda: self._steps_between(seconds_per_step))
    else:
      self._next = step + FIRST
    return True

  def save(self, step: int, **what: Any) -> None:
    """Starts to save. OSError where that has failed as often in a row as `checkpoint.max_failures` allows."""
    began = time.monotonic()
    self._attempt(self._checkpoints.wait)
    if self._attempt(lambda: self._checkpoints.save(step, **what)):
      self.last = step
    self._stalls = [*self._stalls[-4:], time.monotonic() - began]

  def close(self) -> None:
    """Waits for the save in flight. OSError if it failed or was never started: no other will follow."""
    self._attempt(self._checkpoints.wait)
    if self._failed:
      raise self._failed[-1]
    self._checkpoints.close()

  def _steps_between(self, seconds_per_step: float) -> int:
    stall, hours = sorted(self._stalls)[len(self._stalls) // 2], self._hours + (time.monotonic() - self._began) / 3600
    seconds = interval_seconds(stall, hours, self._failures, self._n_devices)
    return max(1, round(seconds / seconds_per_step))

  def _attempt(self, act: Callable[[], None]) -> bool:
    """Whether it ended well. A failure is told, and raised if there were too many in a row."""
    was_saving = self._checkpoints.is_saving
    try:
      act()
    except OSError as error:
      self._failed.append(error)
      self._event('save failed', reason=str(error))
      if len(self._failed) >= self._config.max_failures:
        raise
      say(f'warning  {error}; failure {len(self._failed)} in a row, {self._config.max_failures} end the run: trying again')
      return False
    if was_saving and not self._checkpoints.is_saving:
      self._failed.clear()
    return True
