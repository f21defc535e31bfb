"""SIGTERM and Ctrl-C, acted on where nothing is lost."""

import signal
import sys

NUMBERS = signal.SIGTERM, signal.SIGINT, signal.SIGALRM


class StopSignal:
  """SIGTERM, or Ctrl-C, while the context lasts: remembered, and acted on where nothing is lost. A second Ctrl-C kills."""

  def __enter__(self):
    self.requested = ''  # the signal's name
    self._interrupts = False
    self._handlers = [signal.signal(number, self._handle) for number in NUMBERS]
    self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
    return self

  def __exit__(self, *_):
    sys.unraisablehook = self._hook
    for number, handler in zip(NUMBERS, self._handlers):
      signal.signal(number, handler)

  def interruptible(self, function, *args):
    """function(*args), or None where a stop was asked for before it returned: then it is left where it was."""
    try:
      self._interrupts = True
      result = None if self.requested else function(*args)
      return None if self.requested else result
    except KeyboardInterrupt:
      return None
    finally:
      self._interrupts = False
      signal.setitimer(signal.ITIMER_REAL, 0)

  def _handle(self, number, frame):
    if number != signal.SIGALRM:
      self.requested = signal.Signals(number).name
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    if self._interrupts:
      raise KeyboardInterrupt

  def _lost(self, unraisable):
    """An interrupt that hits a callback, as JAX has one in the garbage collector, ends there: it comes again."""
    if self._interrupts and unraisable.exc_type is KeyboardInterrupt:
      signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
      self._hook(unraisable)
