"""Who does the work: `run(function, tasks)` with a process pool on this machine. A task is a shard, named by small values.

Every task commits its own shard, so a runner keeps no state: after any death a rerun does what is not yet recorded.
"""

import concurrent.futures
import multiprocessing
import os
import threading
from concurrent.futures.process import BrokenProcessPool


class LocalRunner:
  """Runs tasks in `workers` processes (default: one a core), or in this process where one is enough."""

  def __init__(self, workers: int | None = None):
    if workers is not None and workers < 1:
      raise ValueError(f'{workers} workers cannot build anything: give at least 1')
    self.workers = workers or os.cpu_count() or 1

  def run(self, function, tasks: list[tuple]):
    """Yields function(*task) as tasks finish. The first error ends the run: tasks that have begun finish, no other begins."""
    n_workers = min(self.workers, len(tasks))
    if n_workers <= 1:
      for task in tasks:
        yield function(*task)
      return
    # Not fork: the caller may hold JAX and its threads.
    context = multiprocessing.get_context('forkserver')
    with concurrent.futures.ProcessPoolExecutor(n_workers, context, initializer=_end_with_parent) as pool:
      futures = [pool.submit(function, *task) for task in tasks]
      try:
        for future in concurrent.futures.as_completed(futures):
          yield future.result()
      except BrokenProcessPool as error:
        raise OSError('a worker process died (killed, or out of memory): run the same command again, '
                      'with fewer workers if memory was short') from error
      finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
  """A worker whose parent was killed would wait for tasks for ever: it watches the parent and ends."""
  parent = multiprocessing.parent_process()

  def watch():
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
