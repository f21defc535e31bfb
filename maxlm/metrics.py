"""The record of a run, metrics.jsonl, with TensorBoard beside it; and the progress line. Values come as floats."""

import collections
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

# What the progress line shows of a step's values, in order, each where it is there.
SHOWN = {
  'loss': lambda value: f'loss {value:.4f}',
  'tokens_per_second': lambda value: f'{si(value)} tok/s',
  'mfu': lambda value: f'MFU {value:.1%}',
  'learning_rate': lambda value: f'lr {value:.2e}',
  'grad_norm': lambda value: f'grad norm {value:.3g}',
  'moe/load_violation': lambda value: f'load violation {value:.2f}',
}


class MetricsWriter:
  """Appends to WORKDIR/metrics.jsonl, one JSON object a line: step, time (Unix seconds) and the values.

  A value that is not finite is null there, for JSON has no other word. WORKDIR/tensorboard has the same values under
  the same names, ten seconds later at most. A step is recorded once: what an attempt wrote after the checkpoint it is
  resumed from is dropped, `eval/…` of that step too: it comes after the checkpoint, unless it is the one that a stage ends
  with (`ended`). OSError where a file cannot be written.
  """

  def __init__(self, workdir: str | Path, *, resumed_from: int | None = None):
    """resumed_from: the step of that checkpoint; None begins anew."""
    # Here, for what only formats lines does not need it. Of tensorboardX only the file: its SummaryWriter writes from a
    # thread, and when that dies of a full disk, the next values wait for it for ever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    board, last = Path(workdir) / 'tensorboard', -1 if resumed_from is None else resumed_from
    board.mkdir(parents=True, exist_ok=True)
    drop_lines_after(board.parent / 'metrics.jsonl', last)
    self._file = open(board.parent / 'metrics.jsonl', 'a', buffering=1, encoding='utf-8')
    self._board = EventsWriter(str(board / 'events'), filename_suffix=f'.{time.time_ns()}')
    start = SessionLog(status=SessionLog.START)  # TensorBoard hides what came before from this step on
    self._board.write_event(Event(step=last + 1, wall_time=time.time(), session_log=start))
    self._synced_at = 0.0

  def write(self, step: int, values: Mapping[str, float], **facts: str) -> None:
    """facts: what is no number, for metrics.jsonl alone."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    now = time.time()
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._file.write(json.dumps({'step': step, 'time': round(now, 3), **finite, **facts}, allow_nan=False) + '\n')
    scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    self._board.write_event(Event(step=step, wall_time=now, summary=Summary(value=scalars)))
    if now - self._synced_at > 10:
      self._board.flush()  # with an fsync of milliseconds
      self._synced_at = now

  def close(self) -> None:
    self._file.close()
    self._board.close()


def drop_lines_after(path: Path, step: int) -> None:
  """Keeps the lines of a metrics.jsonl up to that step: not later ones, nor its evaluation, nor what a kill has cut."""
  if not path.exists():
    return
  text = path.read_bytes()
  kept = b''.join(line + b'\n' for line in text.split(b'\n') if _place_of(line) <= (step, False))
  if kept != text:
    partial = path.with_suffix('.partial')
    partial.write_bytes(kept)
    os.replace(partial, path)


def has_end(path: Path, step: int) -> bool:
  """Whether a metrics.jsonl has the evaluation of the stage that ended with that step."""
  lines = path.read_bytes().split(b'\n') if path.exists() else []
  return any(b'"ended"' in line and _place_of(line) == (step, False) for line in lines)


def _place_of(line: bytes) -> tuple[float, bool]:
  """(step, whether it is an evaluation) of a line of metrics.jsonl; an infinite step for what is not one."""
  try:
    record = json.loads(line)
    return record['step'], 'ended' not in record and any(name.startswith('eval/') for name in record)
  except (ValueError, TypeError, KeyError):
    return math.inf, False


class StepClock:
  """Seconds a step takes, over the last finished ones.

  The first step after the start or after `pause` is not timed: it compiled, or an evaluation came before it.
  """

  def __init__(self, window: int = 20):
    self._spans = collections.deque(maxlen=window)  # (steps, seconds)
    self._last = None  # (step, when it was finished)

  def finished(self, step: int, now: float | None = None) -> float | None:
    """Call it when the step's results are there. Seconds a step, None as long as they are not known."""
    now = time.monotonic() if now is None else now
    if self._last is not None:
      self._spans.append((step - self._last[0], now - self._last[1]))
    self._last = step, now
    return self.seconds_per_step

  def pause(self) -> None:
    """Something that is not training comes next."""
    self._last = None

  @property
  def seconds_per_step(self) -> float | None:
    steps = sum(n for n, _ in self._spans)
    return sum(seconds for _, seconds in self._spans) / steps if steps else None


class Progress:
  """How far a run is: one line that changes on a terminal, elsewhere a line every few seconds."""

  def __init__(self, total: int, *, every_seconds: float = 5.0, stream: TextIO | None = None):
    self._total, self._every = total, every_seconds
    self._stream = sys.stderr if stream is None else stream
    self._tty = self._stream.isatty()
    self._line, self._n_shown, self._shown_at = '', 0, -math.inf

  def show(self, step: int, values: Mapping[str, float], seconds_per_step: float | None) -> None:
    """Shows a finished step, if it is time to: the first three and the last always are."""
    now = time.monotonic()
    wait = 0.1 if self._tty else self._every
    if self._n_shown >= 3 and step < self._total and now - self._shown_at < wait:
      return
    self._n_shown, self._shown_at = self._n_shown + 1, now
    line = progress_line(step, self._total, values, seconds_per_step)
    if self._tty:
      self._line = line[:shutil.get_terminal_size().columns - 1]
      self._stream.write(f'\r{self._line}\x1b[K')
    else:
      self._stream.write(line + '\n')
    self._stream.flush()

  def print(self, text: str) -> None:
    """A line of its own, above the one that changes."""
    self._stream.write(f'\r\x1b[K{text}\n{self._line}' if self._tty else text + '\n')
    self._stream.flush()

  def close(self) -> None:
    """Leaves the last line as it is and goes on below it."""
    if self._line:
      self._stream.write('\n')
      self._stream.flush()
      self._line = ''


def progress_line(step: int, total: int, values: Mapping[str, float], seconds_per_step: float | None) -> str:
  """'step 1,200/5,000  24%  3m 10s left  loss 4.2130  12.3k tok/s  MFU 41.2%  lr 3.00e-04  grad norm 0.82'."""
  parts = [f'step {step:,}/{total:,}', f'{step / total:.0%}']
  if seconds_per_step is not None and step < total:
    parts.append(f'{duration((total - step) * seconds_per_step)} left')
  return '  '.join(parts + [shown(values[name]) for name, shown in SHOWN.items() if name in values])


def si(value: float) -> str:
  """si(12_345) == '12.3k'."""
  for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
    if value >= 0.9995 * size:
      return f'{value / size:.3g}{unit}'
  return f'{value:.3g}'


def duration(seconds: float) -> str:
  """duration(190) == '3m 10s': the two largest units."""
  seconds = math.ceil(seconds)
  days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
  if days:
    return f'{days}d {hours:02}h'
  if hours:
    return f'{hours}h {minutes:02}m'
  return f'{minutes}m {seconds % 60:02}s' if minutes else f'{seconds}s'
