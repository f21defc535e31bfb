"""For tests of the engine: a source whose documents do to the process that extracts them what broken parsers do, a step that
edits and sorts, a task that kills its worker. A module of its own because worker processes import it.
"""

import ctypes
import dataclasses
import os
import pathlib
import signal
import time

import pyarrow as pa

from data_pipeline import shards, verdicts
from data_pipeline.recipe import Input, Limits, Raw, Reject, Unreadable

LIMITS = Limits(max_bytes=10_000, cpu_seconds=0.5, wall_seconds=3.0, memory_bytes=1 << 30)


@dataclasses.dataclass(kw_only=True, frozen=True)
class Hostile:
  """Documents whose content says what happens when it is extracted."""

  contents: tuple[str, ...]
  name: str = 'hostile'
  dates: tuple[str, ...] = ()
  limits: Limits = LIMITS

  def state(self):
    return ''

  def fetch(self, scratch):
    half = len(self.contents) // 2
    return [Input(paths=tuple(map(str, numbers)), lineage='') for numbers in
            (range(half), range(half, len(self.contents))) if numbers]

  def read(self, unit):
    for number in map(int, unit.paths):
      content = self.contents[number].encode()
      date = self.dates[number] if self.dates else ''
      yield Unreadable(f'{number}', 'torn', 7) if content == b'torn' else Raw(f'{number}', content, date)

  def extract(self, raw):
    act = {b'segfault': lambda: ctypes.string_at(0), b'abort': os.abort, b'exit': lambda: os._exit(0), b'spin': _spin,
           b'sleep': lambda: time.sleep(60), b'memory': lambda: bytearray(2 << 30), b'reject': _reject, b'deep': _deep,
           b'long': lambda: 'x' * 20_000, b'half': lambda: 'half \ud800 of a pair, and enough text to be kept',
           b'empty': lambda: ' \n\x00 '}
    text = act[raw.content]() if raw.content in act else raw.content.decode()
    return text, {'extracted': 1}


def _spin():
  while True:
    pass


def _reject():
  raise Reject('not wanted')


def _deep(depth=0):
  return _deep(depth + 1) + ''


def die_once(root: pathlib.Path, record_name: str, key: str, times: int) -> dict:
  """A task whose worker is killed the first `times` times that it runs."""
  for i in range(times):
    marker = root / f'{record_name}-{i}'
    if not marker.exists():
      marker.touch()
      os.kill(os.getpid(), signal.SIGKILL)
  return shards.write_record(root, record_name, key, [])


@dataclasses.dataclass(kw_only=True, frozen=True)
class Censor:
  """A step: 'the' becomes 'é', documents whose first word has an x are in bucket q1, those with a zebra are left out."""

  name: str = 'censor'

  def state(self):
    return ''

  def judge(self, tasks, shards_):
    return tasks.run('censor', censor, [(f'{self.name}-{i}', shards.key_of(shard.hashes), self.name, shard)
                                        for i, shard in enumerate(shards_)])


def censor(root, record_name, key, step, shard):
  edits, buckets, rejected = [[] for _ in range(shard.rows)], [''] * shard.rows, {}
  for rows, batch in verdicts.kept(root, shard, ['text']):
    for row, text in zip(rows.tolist(), batch['text'].to_pylist()):
      data = text.encode()
      at = data.find(b'the')
      while at >= 0:
        edits[row].append({'start': at, 'end': at + 3, 'text': 'é'})
        at = data.find(b'the', at + 1)
      buckets[row] = 'q1' if 'x' in text.partition(' ')[0] else ''
      if 'zebra' in text:
        rejected[row] = 'striped'
  return verdicts.write(root, record_name, key, step, shard, rejected,
                        {'edits': pa.array(edits, verdicts.EDITS), 'bucket': pa.array(buckets, pa.string())}, bees=7)
