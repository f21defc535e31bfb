"""What a person sees of a sweep: a line for each run that ends, and below them those that go on, redrawn on a terminal."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import TextIO

from maxlm.metrics import duration
from maxlm.sweep.count import total_flops
from maxlm.sweep.runs import Run

SECONDS = 30.0, 0.5  # between looks: in a log, on a terminal


class Progress:
  """Of these runs. The time that is left is judged by their FLOPs."""

  def __init__(self, runs: list[Run], stream: TextIO):
    self._steps = {run.name: (run.first_step, run.plan[-1].stop) for run in runs}
    self._flops = {run.name: total_flops(run.settled) * (1 - run.first_step / run.plan[-1].stop) for run in runs}
    self._stream, self._tty, self._n_lines, self._shown_at = stream, stream.isatty(), 0, 0.0
    self._began = None  # (FLOPs that were done, when)

  def print(self, text: str) -> None:
    """A line that stays, above those that change."""
    self._stream.write((f'\x1b[{self._n_lines}A\x1b[J' if self._n_lines else '') + text + '\n')
    self._stream.flush()
    self._n_lines = 0

  def show(self, running: dict[str, tuple[int, float | None]], finished: set[str], n_failed: int, n_waiting: int) -> None:
    """running: {run: (step, loss)}. Where it is not time to, nothing is shown."""
    now = time.monotonic()
    if now - self._shown_at < SECONDS[self._tty]:
      return
    done = sum(self._flops[name] for name in finished)
    head = f'{len(finished)} of {len(self._steps)} finished, {len(running)} running, {n_waiting} to come'
    lines = [head + (f', {n_failed} FAILED' if n_failed else '')]
    for name, (step, loss) in running.items():
      first, last = self._steps[name]
      done += self._flops[name] * max(0, step - first) / (last - first)
      lines.append(f'  {name}  step {step:,}/{last:,}  {step / last:.0%}' + (f'  loss {loss:.4f}' if loss else ''))
    self._began = self._began or (done, now)
    total, gained = sum(self._flops.values()), done - self._began[0]
    if gained > 0:
      left = duration((total - done) * (now - self._began[1]) / gained)
      lines[0] += f'; {done / total:.0%} of the FLOPs, about {left} left'
    if self._tty:
      size = shutil.get_terminal_size()
      lines = [line[:size.columns - 1] for line in lines[:size.lines - 1]]
    self.print('\n'.join(lines))
    self._n_lines, self._shown_at = len(lines) * self._tty, now


def newest_step(workdir: Path) -> tuple[int, float | None]:
  """(step, loss) that the run's record ends with; (0, None) before the first."""
  try:
    with open(workdir / 'metrics.jsonl', 'rb') as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
      lines = file.read().splitlines()
  except FileNotFoundError:
    return 0, None
  for line in reversed(lines):
    try:
      record = json.loads(line)
      return record['step'], record['loss']
    except (ValueError, KeyError, TypeError):
      continue  # another record, a line that is being written, or the end of one
  return 0, None
