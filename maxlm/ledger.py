"""Where the time of a run goes: WORKDIR/goodput.jsonl, to which every attempt at the run appends, and what it adds up to.

An attempt is one process, from its start to its end. All of its time belongs to one phase or another, by the monotonic
clock; the wall clock only says where an attempt begins. One JSON object a line, each with its attempt:

    {"kind": "start", "attempt": "1f…", "time": 1790000000.0}      the process began (Unix seconds)
    {"kind": "resumed", …, "step": 100}                            it goes on from here: what was done past it is redone
    {"kind": "time", …, "seconds": {"data": 0.1, "step": 4.9}, "from": 100, "to": 120}    steps (from, to] meanwhile
    {"kind": "event", …, "event": "rewind", …}
    {"kind": "end", …, "how": "finished"}

What no line has, an attempt that was killed has lost: its last seconds count as idle.
"""

import collections
import dataclasses
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PHASES = ('init', 'restore', 'compile', 'data', 'step', 'checkpoint', 'evaluation', 'finish')
CATEGORIES = (*PHASES, 'lost', 'idle')
OFTEN = ('data', 'step')  # their changes are not worth a line
FEWEST_SECONDS, MOST_SECONDS, OF_ALL = 5.0, 60.0, 0.01  # between lines: this part of the attempt so far, within these


class Ledger:
  """Notes which phase the process is in, and writes it down from a thread of its own, so that no phase waits for a disk.

  path: None on processes that do not write: the calls do nothing. OSError if the file cannot be opened; later errors are
  told on stderr and tried again. A context manager: ends as 'finished', or with the name of the exception.
  """

  def __init__(self, path: str | Path | None):
    self._marks = collections.deque()  # (monotonic seconds, what, value): appending takes no lock
    self._account, self._shares, self._closed = Account(), {}, path is None
    if path is None:
      return
    self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_RDWR, 0o644)
    for record in records(path):
      self._account.add(record)
    size = os.fstat(self._file).st_size
    self._unwritten = b'\n' if size and os.pread(self._file, 1, size - 1) != b'\n' else b''  # ends a line that was cut
    self._synced_at, self._told = None, False
    now, age = time.time(), process_age()
    if self._account.attempts and 0 <= now - self._account.attempts[-1].end < age:
      age = now - self._account.attempts[-1].end  # it was another attempt of this process
    self._attempt = uuid.uuid4().hex[:8]
    self._cut = self._last_line = self._began = time.monotonic() - age  # what lies before the cut is in a line
    self._phase, self._done, self._seconds, self._from = 'init', 0, {}, 0
    self._line('start', time=round(now - age, 3))
    self._wake = threading.Event()
    self._thread = threading.Thread(target=self._write_on, name='ledger', daemon=True)
    self._thread.start()

  def enter(self, phase: str, at: float | None = None) -> None:
    """The running phase ends and this one begins. Costs about a microsecond. at: when it did (time.monotonic()), for the
    phases from before the ledger was opened: they are to be told at once after it, in their order."""
    assert phase in PHASES, phase
    self._mark('phase', phase, at)
    if phase not in OFTEN and at is None and not self._closed:  # not yet: the thread would give the next ones' time to this
      self._wake.set()

  def resumed(self, step: int) -> None:
    """Says which step the attempt goes on from, 0 for the beginning. Step time past it, of attempts before, is lost."""
    self._mark('resumed', step)

  def steps(self, done: int) -> None:
    """Says how many steps are done. Fewer than before is a rewind: the time of those past it is lost."""
    self._mark('steps', done)

  def event(self, kind: str, **facts: Any) -> None:
    """Something worth a line of its own: a rewind, a save that failed, a straggler. facts: what JSON can hold."""
    json.dumps(facts)  # what cannot be written fails here
    self._mark('event', {'event': kind, **facts})
    if not self._closed:
      self._wake.set()

  def shares(self) -> dict[str, float]:
    """Part of the run's time so far, all attempts, that each category had, as of the last line. They sum to 1."""
    return self._shares

  def close(self, how: str = 'finished') -> None:
    """Writes what is left and how the attempt ended. A second call does nothing; waits ten seconds at most."""
    if self._closed:
      return
    self._mark('end', how)
    self._closed = True
    self._wake.set()
    self._thread.join(10)

  def __enter__(self) -> 'Ledger':
    return self

  def __exit__(self, kind, *_) -> None:
    self.close('finished' if kind is None else kind.__name__)

  def _mark(self, what: str, value: Any, at: float | None = None) -> None:
    if not self._closed:
      self._marks.append((time.monotonic() if at is None else at, what, value))

  # -- in the thread

  def _write_on(self) -> None:
    """Lines as they come due, until the end."""
    while not self._closed:
      self._wake.wait(1.0)
      self._wake.clear()
      self._gather()
      now = time.monotonic()
      if now - self._last_line >= min(max(FEWEST_SECONDS, OF_ALL * (now - self._began)), MOST_SECONDS):
        self._line_of_time()
      self._write(now)
    self._gather()
    self._write(time.monotonic(), last=True)
    os.close(self._file)

  def _gather(self) -> None:
    """Gives the time that has passed to the phases it belongs to."""
    now = time.monotonic()
    while self._marks:
      at, what, value = self._marks.popleft()
      self._pass(at)
      if what == 'phase':
        if value not in OFTEN and self._phase not in OFTEN:
          self._line_of_time()
        self._phase = value
      elif what == 'steps':
        if value < self._done:
          self._line_of_time()
          self._from = value
        self._done = value
      elif what == 'event':
        self._line('event', **value)
      else:
        self._line_of_time()
        self._line(what, **{'resumed': {'step': value}, 'end': {'how': value}}[what])
        if what == 'resumed':
          self._from = self._done = value
    self._pass(now)

  def _pass(self, until: float) -> None:
    if until > self._cut:
      self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + until - self._cut
      self._cut = until

  def _line_of_time(self) -> None:
    if self._seconds:
      seconds = {phase: round(value, 6) for phase, value in self._seconds.items()}
      self._line('time', seconds=seconds, **{'from': self._from, 'to': self._done})
      self._seconds, self._from, self._last_line = {}, self._done, self._cut
      self._shares = self._account.shares()

  def _line(self, kind: str, **facts: Any) -> None:
    record = {'kind': kind, 'attempt': self._attempt, 'time': round(time.time(), 3)} | facts
    self._account.add(record)
    self._unwritten += json.dumps(record).encode() + b'\n'

  def _write(self, now: float, last: bool = False) -> None:
    try:
      while self._unwritten:
        self._unwritten = self._unwritten[os.write(self._file, self._unwritten):]
        self._synced_at = self._synced_at or now
      if self._synced_at and (last or now - self._synced_at >= FEWEST_SECONDS):
        os.fsync(self._file)
        self._synced_at = None
    except OSError as error:
      if last or not self._told:
        print(f'goodput.jsonl: {error.strerror}: {len(self._unwritten):,} bytes wait to be written', file=sys.stderr)
      self._told = True


@dataclasses.dataclass(slots=True)
class Span:
  """A line of time: seconds by phase; lost: those of `step` that are; steps (first, last], that stand."""

  attempt: str
  seconds: dict[str, float]
  lost: float
  first: int
  last: int


@dataclasses.dataclass(slots=True)
class Attempt:
  """start, end: Unix seconds, the end by the monotonic clock. resumed: the step, None where it did not come to that."""

  name: str
  start: float
  end: float
  resumed: int | None = None
  done: int | None = None
  how: str | None = None  # it ended; None: nothing was written about it


class Account:
  """What the lines of a ledger, in their order, add up to. seconds: by category, whose sum is the wall time from the
  first attempt's start to the last line. attempts, spans, events: in order. ignored: lines that say nothing."""

  def __init__(self):
    self.seconds = dict.fromkeys(CATEGORIES, 0.0)
    self.attempts: list[Attempt] = []
    self.spans: list[Span] = []
    self.events: list[dict[str, Any]] = []
    self.ignored = 0
    self._kept: list[Span] = []  # spans with steps that stand so far, steps rising

  @property
  def wall(self) -> float:
    return sum(self.seconds.values())

  @property
  def goodput(self) -> float:
    """Part of the wall time in steps that stand."""
    return self.seconds['step'] / (self.wall or 1.0)

  @property
  def goodput_without_idle(self) -> float:
    return self.seconds['step'] / (self.wall - self.seconds['idle'] or 1.0)

  def shares(self) -> dict[str, float]:
    wall = self.wall or 1.0
    return {category: seconds / wall for category, seconds in self.seconds.items()}

  def add(self, record: dict[str, Any]) -> None:
    """The next line. One that is none, or of an attempt that another one has followed, is counted and ignored."""
    try:
      kind, attempt = record['kind'], record['attempt']
      if kind == 'start':
        start = float(record['time'])
        if self.attempts:  # idle is never negative: the wall clock may have been set back in between
          self.seconds['idle'] += max(0.0, start - self.attempts[-1].end)
        self.attempts.append(Attempt(attempt, start, start))
      elif not self.attempts or self.attempts[-1].name != attempt:
        self.ignored += 1
      elif kind == 'time':
        self._add_time({phase: float(value) for phase, value in record['seconds'].items() if phase in PHASES},
                       int(record['from']), int(record['to']))
      elif kind == 'resumed':
        self._go_back(int(record['step']))
        self.attempts[-1].resumed = self.attempts[-1].done = int(record['step'])
      elif kind == 'event':
        self.events.append({**record, 'at': self.attempts[-1].end})
      elif kind == 'end':
        self.attempts[-1].how = str(record['how'])
      else:
        self.ignored += 1
    except (KeyError, TypeError, ValueError, AttributeError):
      self.ignored += 1

  def _add_time(self, seconds: dict[str, float], first: int, last: int) -> None:
    attempt = self.attempts[-1]
    for phase, value in seconds.items():
      self.seconds[phase] += value
    self.spans.append(Span(attempt.name, seconds, 0.0, first, last))
    attempt.end += sum(seconds.values())
    if attempt.resumed is not None:
      if first < attempt.done:
        self._go_back(first)
      attempt.done = last
    if 'step' in seconds:
      self._kept.append(self.spans[-1])

  def _go_back(self, step: int) -> None:
    """Step time past this step is lost. Of a line that it lies within, in proportion."""
    while self._kept:
      span = self._kept[-1]
      end = max(span.last, span.first + 1)  # time in which no step was done is that of the one to come
      if end <= step:
        return
      kept = max(0.0, (step - span.first) / (end - span.first))
      lost = (span.seconds['step'] - span.lost) * (1 - kept)
      span.lost += lost
      self.seconds['lost'] += lost
      self.seconds['step'] -= lost
      self._kept.pop()
      if kept:
        span.last = step
        self._kept.append(span)
        return


def read(path: str | Path) -> Account:
  """Adds up a ledger. FileNotFoundError if there is none."""
  account = Account()
  for record in records(path):
    account.add(record)
  return account


def records(path: str | Path) -> Iterator[Any]:
  """The lines of a ledger, parsed; None for what is not JSON, such as a line that a kill has cut."""
  with open(path, 'rb') as file:
    for line in file:
      if line.strip():
        try:
          yield json.loads(line)
        except ValueError:
          yield None


def process_age() -> float:
  """Seconds since this process began, interpreter and imports included; 0 where the system does not say."""
  try:
    fields = Path('/proc/self/stat').read_bytes().rpartition(b')')[2].split()  # the name before it may hold spaces
  except OSError:
    return 0.0
  began = int(fields[19]) / os.sysconf('SC_CLK_TCK')  # of a clock that goes on while the machine sleeps
  return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
