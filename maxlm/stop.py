"""SIGTERM and Ctrl-C, acted on where nothing is lost."""

import signal


class StopSignal:
  """SIGTERM, or Ctrl-C, while the context lasts: remembered, and acted on where nothing is lost. A second Ctrl-C kills."""

  def __enter__(self):
    self.requested = ''  # the signal's name
    self._interrupts = False
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGALRM
    self._before = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
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
      signal.setitimer(signal.ITIMER_REAL, 2)  # and again: JAX's callback of the garbage collector may swallow this one
      raise KeyboardInterrupt
