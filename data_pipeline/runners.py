"""Who does the work: `run(function, tasks)` with a process pool on this machine. A task is a shard, named by small values.

Every task commits its own shard, so a runner keeps no state: after any death a rerun does what is not yet recorded.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool


class LocalRunner:
  """Runs tasks in `workers` processes (default: one a core), or in this process where one is enough."""

  def __init__(self, workers: int | None = None):
    if workers is not None and workers < 1:
      raise ValueError(f'{workers} workers cannot build anything: give at least 1')
    self.workers = workers or os.cpu_count() or 1

  def run(self, function, tasks: list[tuple]):
    """Yields function(*task) as tasks finish. After an error tasks that have begun finish and no other begins."""
    n_workers = min(self.workers, len(tasks))
    if n_workers <= 1:
      for task in tasks:
        yield function(*task)
      return
    # Not fork: the caller may hold JAX and its threads.
    context = multiprocessing.get_context('forkserver')
    with concurrent.futures.ProcessPoolExecutor(n_workers, context, _start_worker, (n_workers,)) as pool:
      futures = [pool.submit(function, *task) for task in tasks]
      try:
        for future in concurrent.futures.as_completed(futures):
          yield future.result()
      except BrokenProcessPool as error:
        raise OSError('a worker process died (killed, or out of memory): run the same command again, '
                      'with fewer workers if memory was short') from error
      finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(n_workers: int) -> None:
  """What a worker is told before its first task."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets running tasks finish
  # Threads of the Rust libraries: two a worker, so that the last tasks of a stage have the cores to themselves.
  os.environ['RAYON_NUM_THREADS'] = str(max(1, 2 * (os.cpu_count() or 1) // n_workers))
  parent = multiprocessing.parent_process()

  def end_with_parent():  # a worker whose parent was killed would wait for tasks for ever
    parent.join()
    os._exit(1)

  threading.Thread(target=end_with_parent, daemon=True).start()
