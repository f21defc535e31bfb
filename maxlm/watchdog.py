"""Ends a process that hangs, and says where: a collective that one host never joined waits for ever, and costs the pod.

Each process has a thread that knows the phase the main thread is in, and how long it may take. On a trip it tells the other
processes, over the coordinator's key-value store, so that the stacks of every host are written while they are still those of
the hang; then all exit 124, and whoever supervises them starts again.
"""

import collections
import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jax._src import distributed  # its key-value store has no public name

EXIT_HUNG = 124  # as of timeout(1)
LEARNT = ('data', 'step', 'evaluation')  # last about as long each time; a save may have to wait for the one before it
SEEN = 5  # times, before what was seen is a measure: the first steps of a pipelined loop wait for nothing
OF_SLOW = 5  # times the 99th percentile
POLL_SECONDS, STORE_SECONDS = 0.5, 5.0  # between looks at the phase, and at the store
LAST_SECONDS = 20.0  # to say what is to be said: disk, pipe and network may be what hangs
TRIPPED, DUMPED = 'maxlm/watchdog/tripped', 'maxlm/watchdog/dumped'


class Watchdog:
  """Knows the phase by `enter`, and exits the process with 124 when one lasts too long. A context manager, or `stop`.

  floor_seconds: what a step, its data, or an evaluation may take at least, and more where the slow ones of the last 200
  take more than a fifth of that. startup_seconds: what any other phase may take, and those as long as few were seen.
  dump_to: directory for stacks-PROCESS-TIME.txt. last_words: is told why, for a record, before the exit.
  A pause of the whole process (SIGSTOP, a frozen virtual machine) is not taken for a hang. Where native code holds the
  interpreter's lock, not even the thread can run: then the stacks come after twice startup_seconds, and the exit code is 1.
  """

  def __init__(self, floor_seconds: float, startup_seconds: float, dump_to: str | Path,
               last_words: Callable[[str], None] | None = None):
    self._floor, self._startup = floor_seconds, startup_seconds
    self._dump_to, self._last_words = Path(dump_to), last_words
    self._seen = {phase: collections.deque(maxlen=200) for phase in LEARNT}
    self._phase = 'init', time.monotonic()
    self._stopped, self._ending = threading.Event(), threading.Lock()
    self._threads = [threading.Thread(target=self._watch, name='watchdog', daemon=True),
                     threading.Thread(target=self._listen, name='watchdog listens', daemon=True)]
    for thread in self._threads:
      thread.start()

  def enter(self, phase: str) -> None:
    """The phase before ends, and this one begins; entering the running one again starts its time anew. Microseconds."""
    now = time.monotonic()
    before, since = self._phase
    self._phase = phase, now
    if before in LEARNT:
      self._seen[before].append(now - since)

  def stop(self) -> None:
    """Ends the threads; nothing fires after it."""
    self._stopped.set()
    faulthandler.cancel_dump_traceback_later()
    for thread in self._threads:
      if threading.current_thread() is not thread:
        thread.join(LAST_SECONDS)

  def __enter__(self) -> 'Watchdog':
    return self

  def __exit__(self, *_) -> None:
    self.stop()

  def budget(self, phase: str) -> float:
    """Seconds that the phase may take."""
    seen = sorted(self._seen.get(phase, ()))
    if len(seen) < SEEN:
      return max(self._startup, self._floor)
    return max(OF_SLOW * seen[math.ceil(0.99 * len(seen)) - 1], self._floor)

  def _watch(self) -> None:
    poll = min(POLL_SECONDS, self._floor / 4)
    looking_at, age = None, 0.0
    last = looked = -math.inf
    while not self._stopped.wait(poll):
      now, phase = time.monotonic(), self._phase
      # What this thread has seen pass, and not the clock's difference, which a frozen process has too.
      age = age + min(now - last, 2 * poll) if phase is looking_at else 0.0
      looking_at, last = phase, now
      if age > self.budget(phase[0]):
        self._end(f'{phase[0]} has lasted {age:.0f} s, and {self.budget(phase[0]):.0f} are allowed', tell=True)
      if now - looked > min(STORE_SECONDS, self._floor):
        looked = now
        # For where even this thread cannot run any more, because native code holds the interpreter's lock.
        faulthandler.dump_traceback_later(2 * max(self._startup, self._floor), exit=True)

  def _listen(self) -> None:
    """Ends with the others. In a thread of its own: where the coordinator hangs, the store never answers."""
    while not self._stopped.wait(min(STORE_SECONDS, self._floor)):
      if reason := _tripped():
        self._end(reason, tell=False)

  def _end(self, reason: str, *, tell: bool) -> None:
    """Says what there is to say, for so long as it takes, but not longer; then the process ends."""
    if self._stopped.is_set() or not self._ending.acquire(blocking=False):
      return
    speaker = threading.Thread(target=self._speak, args=(reason, tell), name='watchdog speaks', daemon=True)
    speaker.start()
    speaker.join(LAST_SECONDS)
    if not self._stopped.is_set():
      os._exit(EXIT_HUNG)

  def _speak(self, reason: str, tell: bool) -> None:
    process, client = distributed.global_state.process_id, distributed.global_state.client
    if tell:
      reason = f'process {process} on {socket.gethostname()}: {reason}'
    teller = threading.Thread(target=_set, args=(client, f'{TRIPPED}/{process}', reason), daemon=True)
    if tell:  # beside the stacks: neither waits for the other
      teller.start()
    path = self._dump_to / f'stacks-{process}-{time.strftime("%Y%m%d-%H%M%S")}.txt'
    print(f'watchdog: {reason}; the stacks follow, and are in {path}; exit {EXIT_HUNG}', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    try:
      with open(path, 'w') as file:
        print(reason, file=file, flush=True)
        faulthandler.dump_traceback(file=file, all_threads=True)
    except OSError as error:
      print(f'watchdog: {path}: {error.strerror}', file=sys.stderr, flush=True)
    if self._last_words is not None:
      self._last_words(f'hung: {reason}')
    if tell:
      teller.join()
    _set(client, f'{DUMPED}/{process}', '')
    if client is not None:
      # With the first process ends the store, and with that, at once, every process that has not come to its stacks.
      while process == 0 and len(client.key_value_dir_get(DUMPED)) < distributed.global_state.num_processes:
        time.sleep(POLL_SECONDS)


def _tripped() -> str | None:
  """Why a process has tripped, if one has."""
  client = distributed.global_state.client
  try:
    found = client.key_value_dir_get(TRIPPED) if client is not None else []
  except RuntimeError:  # the coordinator is gone: JAX ends this process itself
    return None
  return found[0][1] if found else None


def _set(client, key: str, value: str) -> None:
  try:
    if client is not None:
      client.key_value_set(key, value)
  except RuntimeError as error:  # the coordinator is gone: nobody can be told
    print(f'watchdog: {str(error).splitlines()[0]}', file=sys.stderr, flush=True)
