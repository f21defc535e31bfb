"""Where documents become text: a process beside the worker, with limits, that may crash or hang at the cost of one document.

Parsers of HTML and PDF are large programs in C++ that meet hostile input. One process extracts many documents and is
replaced after `_DOCUMENTS`, so that what a library leaks is given back; what kills it is the reason why the document that it
was at is left out: 'crashed', 'out of time', 'out of memory'.
"""

import multiprocessing
import resource
import signal

from data_pipeline.recipe import Limits, Raw, Reject

_DOCUMENTS = 2000  # that one process extracts
_START_SECONDS = 300


class Sandbox:
  """extract(raw) of a source, in a process of its own that is started when it is needed. A context manager."""

  def __init__(self, source, limits: Limits):
    self.source, self.limits = source, limits
    self._process = self._connection = None
    self._left = 0

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._end()

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    """(text, counts) of the source, or Reject."""
    if not self._left:
      self._end()
      self._begin()
    self._left -= 1
    try:
      self._connection.send(raw)
      if not self._connection.poll(self.limits.wall_seconds):
        self._end()
        raise Reject('out of time')
      text, counts, reason = self._connection.recv()
    except (EOFError, ConnectionError) as error:
      self._process.join()
      code = self._process.exitcode
      self._end()
      raise Reject('out of time' if code == -signal.SIGPROF else 'crashed') from error
    if isinstance(reason, OSError):
      raise reason
    if reason:
      raise Reject(reason)
    return text, counts

  def _begin(self) -> None:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'data_pipeline.documents', type(self.source).__module__])
    self._connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, self.source, self.limits), daemon=True)
    process.start()
    self._process = process
    theirs.close()
    try:
      if not self._connection.poll(_START_SECONDS):  # imports are not the document's time
        raise OSError(f'a process to extract documents in did not start within {_START_SECONDS} seconds')
      self._connection.recv()
    except EOFError as error:
      raise OSError('a process to extract documents in cannot start: Limits.memory_bytes may be too small') from error
    self._left = _DOCUMENTS

  def _end(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._connection.close()
      self._process, self._left = None, 0


def _serve(connection, source, limits: Limits) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, wherever it is
  resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  connection.send('ready')
  while True:
    try:
      raw = connection.recv()
    except EOFError:
      return
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    try:
      answer = (*source.extract(raw), '')
    except Reject as reject:
      answer = ('', {}, str(reject))
    except OSError as error:  # no fault of the document's: a program or an endpoint is out of order. It ends the build
      answer = ('', {}, error)
    except MemoryError:
      answer = ('', {}, 'out of memory')
    except RecursionError:
      answer = ('', {}, 'nested too deeply')
    signal.setitimer(signal.ITIMER_PROF, 0)
    connection.send(answer)
