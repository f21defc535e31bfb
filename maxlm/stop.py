"""SIGTERM and Ctrl-C, acted on where nothing is lost."""

import os
import signal
import sys

import jax
from jax.experimental import multihost_utils


class StopSignal:
  """SIGTERM, or Ctrl-C, while the context lasts: remembered, and acted on where nothing is lost. A second Ctrl-C kills.

  Alone, a process acts on it at once wherever it may be interrupted. One of several may not leave the others in the middle
  of a program that they run together: JAX's preemption service takes the signal, whoever gets it, and has all of them stop
  before the same program (`reached`).
  """

  def __enter__(self):
    self.requested = ''  # the signal's name
    self._alone, self._interrupts, self._programs = jax.process_count() == 1, False, 0
    # The service has a handler of its own for SIGTERM, from before, which one of Python's would replace.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM) if self._alone else (signal.SIGINT,)
    self._handlers = {number: signal.signal(number, self._handle) for number in numbers}
    self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
    return self

  def __exit__(self, *_):
    sys.unraisablehook = self._hook
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def reached(self) -> bool:
    """Whether to stop here: to be asked before each program that all processes run, and answered alike on all of them."""
    self._programs += 1
    if not self._alone and multihost_utils.reached_preemption_sync_point(self._programs):
      self.requested = 'SIGTERM'
    return bool(self.requested)

  def interruptible(self, function, *args):
    """function(*args), or None where a stop was asked for before it returned: then it is left where it was."""
    try:
      self._interrupts = self._alone
      result = None if self.requested else function(*args)
      return None if self.requested else result
    except KeyboardInterrupt:
      return None
    finally:
      if self._alone:
        self._interrupts = False
        signal.setitimer(signal.ITIMER_REAL, 0)

  def _handle(self, number, frame):
    if number != signal.SIGALRM:
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      if self._alone:
        self.requested = signal.Signals(number).name
      else:
        os.kill(os.getpid(), signal.SIGTERM)
    if self._interrupts:
      raise KeyboardInterrupt

  def _lost(self, unraisable):
    """An interrupt that hits a callback, as JAX has one in the garbage collector, ends there: it comes again."""
    if self._interrupts and unraisable.exc_type is KeyboardInterrupt:
      signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
      self._hook(unraisable)
