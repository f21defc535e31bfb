"""maxlm.train in which something goes wrong at a known place, for test_faults.py. What does, PROVOKE says, in JSON:

    PROVOKE='{"hang": 12}' python -m tests.chaos.provoked --config=…

    hang: n                     the source of batches blocks for ever after the n-th
    slow: s                     a batch takes s seconds
    empty: n                    batch n has no target that counts, so that the loss is 0 / 0
    clock: [[n, s], …]          from the n-th batch on, the wall clock is s seconds off
    kill_at: 'undo'             kill -9 when a rewind is written down, and before the checkpoints that it undoes are removed
    stop_at: place              SIGTERM to process `process` (0) in call number `call` (1): restore, evaluation, save
                                (when it has begun and goes on in the background)
"""

import json
import os
import signal
import sys
import threading
import time

from maxlm import flags, hosts, start, train
from maxlm.checkpoint import Checkpoints

PLACES = {'restore': (Checkpoints, 'restore'), 'evaluation': (train, 'evaluate'), 'save': (Checkpoints, 'save')}


def hang(n: int) -> None:
  real = train.train_batches

  def batches(*args):
    for i, batch in enumerate(real(*args), 1):
      yield batch
      if i == n:
        wait_for_ever()

  train.train_batches = batches


def slow(seconds: float) -> None:
  real = train.train_batches

  def batches(*args):
    for batch in real(*args):
      time.sleep(seconds)
      yield batch

  train.train_batches = batches


def wait_for_ever() -> None:
  threading.Event().wait()


def empty(n: int) -> None:
  real = train.train_batches

  def batches(feed, step, batch_of):
    for i, (read, batch) in enumerate(real(feed, step, batch_of), step):
      yield read, batch | ({'loss_mask': batch['loss_mask'] * 0} if batch_of(i) == n else {})

  train.train_batches = batches


def clock(jumps: list[list[int]]) -> None:
  real, batches_of, offset = time.time, train.train_batches, 0

  def batches(*args):
    nonlocal offset
    for i, batch in enumerate(batches_of(*args), 1):
      if i in dict(jumps):
        offset = dict(jumps)[i]
        print(f'provoked: the clock is {offset} s off', file=sys.stderr, flush=True)
      yield batch

  train.train_batches, time.time = batches, lambda: real() + offset


def kill_at(place: str) -> None:
  assert place == 'undo'
  real = start.undo

  def undo(checkpoints, skips):
    if skips.rewinds:
      os.kill(os.getpid(), signal.SIGKILL)
    real(checkpoints, skips)

  start.undo = undo


def stop_at(place: str, call: int = 1, process: int = 0) -> None:
  owner, name = PLACES[place]
  real, calls = getattr(owner, name), 0

  def stopping(*args, **kwargs):
    nonlocal calls
    calls += 1
    is_here = calls == call and (process == 0) == hosts.is_first()
    if is_here and place != 'save':
      threading.Timer(0.05, send, (place,)).start()
    result = real(*args, **kwargs)
    if is_here and place == 'save':
      send(place)
    return result

  setattr(owner, name, stopping)


def send(place: str) -> None:
  print(f'provoked: SIGTERM in {place}', file=sys.stderr, flush=True)
  os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  what = json.loads(os.environ['PROVOKE'])
  if 'stop_at' in what:
    stop_at(what.pop('stop_at'), what.pop('call', 1), what.pop('process', 0))
  for name, value in what.items():
    globals()[name](value)
  flags.run(train.main, default_config='configs/quickstart.py')
