"""What to do next about a run, from what was decided before and what is seen: a pure function, no clock, no cloud.

    record, action = decide(record, seen, now)

The record is written down before the action is taken, and every action can be taken twice: a supervisor that is killed
anywhere goes on where it was. An attempt is one queued resource, RUN-a1, RUN-a2, …; the next begins only when the service
says that the one before is not there any more, so that a run never holds two. An attempt that comes too late is fenced by
its number (launch/worker.py).
"""

import dataclasses
from typing import Any

from launch import request
from launch.request import Launch

WAITING = ('CREATING', 'ACCEPTED', 'PROVISIONING', 'WAITING_FOR_RESOURCES')
GONE_NODES = ('PREEMPTED', 'TERMINATED', 'STOPPED', 'STOPPING', 'DELETING')
SICK_NODES = ('REPAIRING', 'RESTARTING', 'REIMAGING', 'UNKNOWN')

BOOTSTRAP, REPAIR, SILENCE = 1800.0, 1200.0, 900.0  # seconds: until all machines report, until repaired, without a report
LEAVING = 120.0  # after one machine has finished, until the others are taken to have
LONGEST_PAUSE = 900.0
SAME = 3  # failures at the same step with the same code, until a person is called

# What counts for the brake; the others come from outside, however often they do.
OURS = ('crash', 'hang', 'bootstrap')
MOVES = ('preempted', 'quota', 'capacity', 'expired', 'hardware', 'failed', 'suspended')  # may try another zone


@dataclasses.dataclass(kw_only=True, slots=True)
class Failure:
  """An attempt that ended. kind: of OURS or MOVES, …. step: of the run, as far as it was reported. code: of the trainer."""

  attempt: int
  kind: str
  reason: str
  step: int
  code: int
  time: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Record:
  """All that is kept of a run. desired: 'up' or 'down'. status: 'running', and 'finished', 'failed' or 'down', with which
  it ends once nothing is left. created: the attempt's resource was seen. since: of what is seen of it now, `sight`.
  active: when its machines came. hours: of earlier attempts. holder: the supervisor; beat: grows while it lives."""

  launch: Launch
  desired: str = 'up'
  status: str = 'running'
  reason: str = ''
  attempt: int = 1
  zone: str = ''
  created: bool = False
  retiring: str = ''
  sight: str = ''
  since: float = 0.0
  active: float = 0.0
  hours: float = 0.0
  not_before: float = 0.0
  step: int = 0
  failures: list[Failure] = dataclasses.field(default_factory=list)
  holder: str = ''
  beat: int = 0

  @property
  def name(self) -> str:
    return request.name_of(self.launch.run, self.attempt)

  @property
  def ended(self) -> bool:
    return self.status != 'running'

  def spent(self, now: float) -> float:
    """Hours that slices were held."""
    return self.hours + (max(0.0, now - self.active) / 3600 if self.active else 0.0)


def to_json(record: Record) -> dict[str, Any]:
  return dataclasses.asdict(record)


def from_json(plain: dict[str, Any]) -> Record:
  failures = [Failure(**failure) for failure in plain['failures']]
  return Record(**plain | {'launch': Launch(**plain['launch']), 'failures': failures})


@dataclasses.dataclass(kw_only=True, slots=True)
class Resource:
  """A queued resource of ours, as the service has it. nodes: name -> state. initiator: who brought it there."""

  name: str
  zone: str
  state: str
  error: str = ''
  initiator: str = ''
  ours: bool = True
  nodes: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(kw_only=True, slots=True)
class Report:
  """What a machine last said of itself. phase: 'running' or 'ended'. code: the trainer's last exit code, None before."""

  worker: str
  attempt: int
  phase: str
  time: float
  code: int | None = None
  step: int = 0
  starts: int = 0
  line: str = ''


@dataclasses.dataclass(kw_only=True, slots=True)
class Seen:
  """Of one look at the cloud and the bucket. reports: of this attempt."""

  resources: list[Resource] = dataclasses.field(default_factory=list)
  reports: list[Report] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True, slots=True)
class Action:
  """kind: 'create', 'delete' (of a name in a zone), 'wait' or 'end'. line: for people."""

  kind: str
  line: str
  name: str = ''
  zone: str = ''


def decide(record: Record, seen: Seen, now: float) -> tuple[Record, Action]:
  """The next action for the run, and the record to write down before it is taken."""
  record = dataclasses.replace(record, failures=list(record.failures))
  record.step = max([record.step, *(report.step for report in seen.reports)])
  mine = next((resource for resource in seen.resources if resource.name == record.name), None)
  strays = [other for other in seen.resources if other is not mine and other.ours]
  for stray in strays:
    if stray.state != 'DELETING':
      return record, Action(kind='delete', name=stray.name, zone=stray.zone,
                            line=f'{stray.name} in {stray.zone} is of an earlier attempt: it goes')
  if mine is not None and not mine.ours:
    record = end(record, 'failed', f'{mine.name} in {mine.zone} is not of this launch: give another --name')
    return record, Action(kind='end', line=record.reason)
  if not record.ended and record.desired == 'down':
    record = end(record, 'down', 'it was asked to be taken down')
  if not record.ended and record.spent(now) >= record.launch.max_hours:
    record = end(record, 'failed', f'slices were held {record.spent(now):.1f} hours: raise --max_hours to go on')
  if not record.ended and not record.retiring:
    record = _judge(record, mine, seen.reports, now)
  if record.ended or record.retiring:
    why = record.reason if record.ended else record.failures[-1].reason
    if mine is not None and mine.state == 'DELETING':
      return record, Action(kind='wait', line=f'deleting {record.name} ({why})')
    return record, Action(kind='delete', name=record.name, zone=record.zone, line=f'{why}: {record.name} goes')
  if mine is None:
    if now < record.not_before:
      return record, Action(kind='wait', line=f'attempt {record.attempt} in {record.not_before - now:.0f} s')
    if strays:
      return record, Action(kind='wait', line=f'{strays[0].name} is still being deleted')
    return record, Action(kind='create', name=record.name, zone=record.zone,
                          line=f'asking for {record.launch.tpu} x {record.launch.slices} in {record.zone}')
  return record, Action(kind='wait', line=_line(record, mine, seen.reports, now))


def deleted(record: Record, now: float) -> Record:
  """The service says that the attempt's resource is not there any more: the next attempt is made ready, if there is one."""
  if record.ended:
    return dataclasses.replace(record, hours=record.spent(now), active=0.0)
  zones, kind = record.launch.zones, record.retiring
  moved = zones[(zones.index(record.zone) + 1) % len(zones)] if kind in MOVES else record.zone
  stuck = [failure for failure in record.failures if failure.step == record.step]  # without a step since
  pause = min(LONGEST_PAUSE, record.launch.pause_seconds * 2**max(0, len(stuck) - 1))
  return dataclasses.replace(
    record, hours=record.spent(now), active=0.0, attempt=record.attempt + 1, zone=moved, created=False, retiring='',
    sight='', since=now, not_before=now + (0.0 if len(stuck) <= 1 and kind == 'preempted' else pause))


def refused(record: Record, kind: str, text: str, now: float) -> Record:
  """The service does not take the request. Nothing was made, unless the name exists: then the next look shows it."""
  if kind == 'fatal':
    return end(record, 'failed', text)
  if kind == 'exists':  # of an attempt whose answer was lost, or one that the service is not done deleting
    return dataclasses.replace(record, not_before=now + record.launch.pause_seconds)
  return retire(record, kind if kind in MOVES else 'failed', text, now)


def end(record: Record, status: str, reason: str) -> Record:
  return dataclasses.replace(record, status=status, reason=reason)


def retire(record: Record, kind: str, reason: str, now: float, code: int = 0) -> Record:
  """The attempt is given up for the next; for good where it fails the same way again and again."""
  failure = Failure(attempt=record.attempt, kind=kind, reason=reason, step=record.step, code=code, time=now)
  record = dataclasses.replace(record, retiring=kind, failures=[*record.failures, failure])
  last = record.failures[-SAME:]
  if kind in OURS and len(last) == SAME and {(f.kind, f.step, f.code) for f in last} == {(kind, record.step, code)}:
    record = end(record, 'failed', f'{SAME} times the same at step {record.step}: {reason}')
  return record


def _judge(record: Record, mine: Resource | None, reports: list[Report], now: float) -> Record:
  """The record after what is seen of its resource: as it was, retiring, or ended."""
  if mine is None:
    return retire(record, 'preempted', f'{record.name} is not there any more', now) if record.created else record
  record.created = True
  sick = sorted(f'{name} {state}' for name, state in mine.nodes.items() if state in SICK_NODES)
  sight = ' '.join([mine.state, *sick])
  if sight != record.sight:
    record.sight, record.since = sight, now
  if mine.state == 'FAILED':
    kind = 'quota' if 'quota' in mine.error.lower() else 'expired' if 'expired' in mine.error.lower() else 'failed'
    return retire(record, kind, mine.error or f'{mine.name} has failed', now)
  if mine.state in ('SUSPENDING', 'SUSPENDED'):
    return retire(record, 'suspended', f'{mine.name} is {mine.state}', now)
  if mine.state == 'DELETING':
    return retire(record, 'preempted', f'{mine.name} is being deleted by {mine.initiator.lower() or "somebody"}', now)
  if mine.state != 'ACTIVE':
    return record
  record.active = record.active or now
  lost = sorted(f'{name} {state}' for name, state in mine.nodes.items() if state in GONE_NODES)
  if lost:
    return retire(record, 'preempted', ', '.join(lost), now)
  if sick and now - record.since > REPAIR:
    return retire(record, 'hardware', f'{", ".join(sick)} for {REPAIR / 60:.0f} minutes', now)
  return _judge_workers(record, reports, bool(sick), now)


def _judge_workers(record: Record, reports: list[Report], sick: bool, now: float) -> Record:
  """By the exit codes of maxlm.train (docs/reliability.md), of machines that have given up starting it again."""
  ended = [report for report in reports if report.phase == 'ended']
  finished = [report for report in ended if report.code == 0]
  if finished and (len(finished) >= record.launch.hosts or now - min(report.time for report in finished) > LEAVING):
    return end(record, 'finished', f'finished after {record.step:,} steps')
  for report in ended:
    if report.code == 2:
      return end(record, 'failed', f'{report.worker}: {report.line or "a mistake that the log names"}')
  for report in ended:
    if report.code not in (0, 75):
      kind = {124: 'hang', 70: 'hardware'}.get(report.code, 'crash')
      return retire(record, kind, f'{report.worker} ended with {report.code}: {report.line}', now, report.code or 0)
  if sick:
    return record
  if len(reports) < record.launch.hosts and now - record.active > BOOTSTRAP:
    return retire(record, 'bootstrap', f'{len(reports)} of {record.launch.hosts} machines came up', now)
  silent = sorted(report.worker for report in reports if report not in finished and now - report.time > SILENCE)
  if silent:
    return retire(record, 'hardware', f'{silent[0]} has said nothing for {SILENCE / 60:.0f} minutes', now)
  return record


def _line(record: Record, mine: Resource, reports: list[Report], now: float) -> str:
  """For people: the state, what it is about, and how long it has been so."""
  parts = [f'{record.name} {record.zone} {record.sight} {_clock(now - record.since)}']
  if mine.state == 'ACTIVE':
    starts = sum(report.starts for report in reports)
    parts.append(f'{len(reports)}/{record.launch.hosts} machines, {starts} starts, step {record.step:,}')
  if record.launch.dollars_per_hour:
    parts.append(f'{record.spent(now):.2f} h ${record.spent(now) * record.launch.dollars_per_hour:,.2f}')
  return ', '.join(parts)


def _clock(seconds: float) -> str:
  return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'
