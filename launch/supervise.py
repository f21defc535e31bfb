"""Looks at a run, decides (states.py), writes the decision down, does it, and again, until nothing is left to do.

All that it knows lies in the bucket, in one object: BUCKET/runs/RUN/launch/record.json. Each turn replaces it, if it is
still what this supervisor wrote: of two supervisors one finds that it is not, and ends. So a supervisor may be killed,
moved to another machine, or started twice.
"""

import dataclasses
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable

from launch import bootstrap, gcloud, request, states
from launch.states import Action, Record, Report, Resource, Seen

TICK = 30.0  # seconds between looks
DEAD_AFTER = 4  # ticks without a sign of a supervisor, until another takes the run


class Lost(Exception):
  """Another supervisor has the run."""


def record_url(folder: str) -> str:
  return f'{folder}/launch/record.json'


def read(folder: str) -> tuple[Record | None, int]:
  """The record of the run in BUCKET/runs/RUN, and its generation."""
  text, generation = gcloud.get(record_url(folder))
  return None if text is None else states.from_json(json.loads(text)), generation


def write(folder: str, record: Record, generation: int) -> int:
  """Its new generation. Failed of kind 'conflict' where somebody else wrote."""
  return gcloud.put(record_url(folder), json.dumps(states.to_json(record), indent=1) + '\n', generation)


def change(folder: str, of: Callable[[Record], Record]) -> Record:
  """Changes the record, whoever holds it. ValueError where there is none."""
  while True:
    record, generation = read(folder)
    if record is None:
      raise ValueError(f'there is no run in {folder}: python -m launch.tpu status lists those of a bucket')
    record = of(record)
    try:
      write(folder, record, generation)
    except gcloud.Failed as error:
      if error.kind != 'conflict':
        raise
    else:
      return record


# -- what is seen


def observe(record: Record) -> Seen:
  """Looks into all zones of the launch. Failed where one cannot be looked into: not to see is not to be gone."""
  of, resources = record.launch, []
  for zone in of.zones:
    listed = gcloud.read_json(request.list_argv(of.project, zone)) or ()
    found = [mine for mine in (resource_of(plain, zone, of.run, of.id) for plain in listed) if mine is not None]
    if any(resource.state in ('ACTIVE', 'SUSPENDING') for resource in found):
      nodes = gcloud.read_json(request.nodes_argv(of.project, zone)) or ()
      states_of = {node['name'].rpartition('/')[2]: node.get('state', 'UNKNOWN') for node in nodes}
      for resource in found:
        resource.nodes = {name: state for name, state in states_of.items()
                          if re.fullmatch(re.escape(resource.name) + r'(-\d+)?', name)}
    resources += found
  return Seen(resources=resources, reports=reports(of.folder, record.attempt))


def resource_of(plain: dict, zone: str, run: str, launch_id: str) -> Resource | None:
  """Of the service's JSON; None for one of another run."""
  name, state = plain['name'].rpartition('/')[2], plain.get('state', {})
  if not re.fullmatch(re.escape(run) + r'-a\d+', name):
    return None
  specs = plain.get('tpu', {}).get('nodeSpec', [{}])
  ours = all(spec.get('node', {}).get('labels', {}).get('maxlm-id') == launch_id for spec in specs)
  error = state.get('failedData', {}).get('error', {}).get('message', '')
  return Resource(name=name, zone=zone, state=state.get('state', 'UNKNOWN'), error=error, ours=ours,
                  initiator=state.get('stateInitiator', ''))


def reports(folder: str, attempt: int) -> list[Report]:
  """What the machines of an attempt last said, one line each."""
  return [Report(**json.loads(line)) for line in gcloud.cat(f'{folder}/launch/a{attempt}/*.json').splitlines() if line]


# -- the loop


def supervise(folder: str, tick: float = TICK, live: bool | None = None) -> int:
  """Brings the run in `folder` to its end, however it is now: 0 finished or taken down, 1 failed. Lost where another
  supervisor has it. KeyboardInterrupt leaves the run alone, for whoever goes on."""
  say = Line(sys.stderr.isatty() if live is None else live)
  record, generation = take(folder, tick)
  try:
    while True:
      try:
        record, action = states.decide(record, observe(record), time.time())
        record.beat += 1
        record, generation, mine = write_down(folder, record, generation)
        say(action)
        if mine:
          record, done = act(record, action)
          if done:
            write_down(folder, record, generation)
            say.end(f'{record.launch.run}: {record.status}: {record.reason}')
            return 1 if record.status == 'failed' else 0
      except gcloud.Failed as error:
        say(Action(kind='wait', line=f'cannot look or act, and tries again: {error}'))
      time.sleep(tick if action_is_slow(record) else min(tick, 1.0))
  except KeyboardInterrupt:
    change(folder, lambda record: dataclasses.replace(record, holder=''))
    say.end(f'{record.launch.run} goes on by itself, but nobody mends it: python -m launch.tpu supervise takes it up')
    raise


def action_is_slow(record: Record) -> bool:
  """Whether nothing is to be done at once."""
  return not (record.retiring or record.ended)


def take(folder: str, tick: float) -> tuple[Record, int]:
  """The record, held by this process. Where another holds it and lives, Lost; it lives while the record changes."""
  me, watched = f'{socket.gethostname()}:{os.getpid()}', None
  while True:
    record, generation = read(folder)
    if record is None:
      raise ValueError(f'there is no run in {folder}: launch it with python -m launch.tpu up')
    if not record.holder or record.holder == me or _is_dead(record.holder) or watched == generation:
      record.holder = me
      try:
        return record, write(folder, record, generation)
      except gcloud.Failed as error:
        if error.kind != 'conflict':
          raise
    if watched is not None and watched != generation:
      raise Lost(f'{record.launch.run} is supervised by {record.holder}')
    watched = generation
    print(f'{record.launch.run} was supervised by {record.holder}: waits {DEAD_AFTER * tick:.0f} s for a sign of it',
          file=sys.stderr)
    time.sleep(DEAD_AFTER * tick)


def _is_dead(holder: str) -> bool:
  """Whether the process is of this machine, and gone."""
  host, _, pid = holder.rpartition(':')
  if host != socket.gethostname():
    return False
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return False


def write_down(folder: str, record: Record, generation: int) -> tuple[Record, int, bool]:
  """The record, its generation, and whether it is as decided: where a person changed it meanwhile, it is theirs."""
  try:
    return record, write(folder, record, generation), True
  except gcloud.Failed as error:
    if error.kind != 'conflict':
      raise
  now, generation = read(folder)
  if now is None or now.holder != record.holder:
    raise Lost(f'{record.launch.run} is supervised by {now.holder if now else "nobody: its record is gone"}')
  return now, generation, False


def act(record: Record, action: Action) -> tuple[Record, bool]:
  """Does what was decided; the record after it, and whether all is done."""
  of = record.launch
  if action.kind == 'end':
    return record, True
  if action.kind == 'create':
    gcloud.put(f'{of.folder}/launch/fence', f'{record.attempt}\n')
    asked = request.Request(launch=of, attempt=record.attempt, zone=record.zone, script=bootstrap.script(of, record.attempt))
    path = gcloud.private_file(asked.script)
    try:
      gcloud.run(asked.argv(path))
    except gcloud.Failed as error:
      if error.kind in ('passing', 'unknown'):
        raise
      record = states.refused(record, error.kind, str(error), time.time())
    finally:
      os.remove(path)
  if action.kind == 'delete':
    try:
      gcloud.run(request.delete_argv(of.project, action.zone, action.name))
    except gcloud.Failed as error:
      if error.kind != 'missing':
        raise
      if action.name == record.name:
        return states.deleted(record, time.time()), record.ended
  return record, False


class Line:
  """What a person watches: one line that is redrawn on a terminal; elsewhere a line where it says something new."""

  EVERY = 600.0  # seconds

  def __init__(self, live: bool):
    self._live, self._kind, self._last = live, '', 0.0

  def __call__(self, action: Action) -> None:
    kind = re.sub(r'[\d:.,$]+', '', action.line)
    if self._live and action.kind == 'wait':
      print(f'\r\033[K{action.line}', end='', file=sys.stderr, flush=True)
    elif kind != self._kind or time.monotonic() - self._last > self.EVERY:
      print(f'{self._start()}{time.strftime("%H:%M:%S")} {action.line}', file=sys.stderr, flush=True)
      self._last = time.monotonic()
    self._kind = kind

  def end(self, text: str) -> None:
    print(f'{self._start()}{text}', file=sys.stderr, flush=True)

  def _start(self) -> str:
    return '\r\033[K' if self._live else ''
