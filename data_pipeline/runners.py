"""Who does the work: `run(function, tasks)` with processes of this machine, or on a Ray cluster. A task is a shard, named by
small values.

Every task commits its own shard, so a runner keeps no state: after any death a rerun does what is not yet recorded.
"""

import concurrent.futures
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

_DEATHS = 3  # of workers, one after the other with no task finished between, before we give up


class LocalRunner:
  """Runs tasks in `workers` processes (default: one a core), or in this process where one is enough.

  A context manager, which ends them. What a worker was at when it died (killed, out of memory) is given to another; a task
  that kills every one ends the build.
  """

  def __init__(self, workers: int | None = None):
    if workers is not None and workers < 1:
      raise ValueError(f'{workers} workers cannot build anything: give at least 1')
    self.workers = workers or os.cpu_count() or 1
    self._pool = None

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    if self._pool is not None:
      self._pool.shutdown(cancel_futures=True)
      self._pool = None

  def run(self, function, tasks: list[tuple]) -> Iterator:
    """Yields function(*task) as tasks finish. After an error tasks that have begun finish and no other begins."""
    if min(self.workers, len(tasks)) <= 1:
      for task in tasks:
        yield function(*task)
      return
    left, deaths = dict(enumerate(tasks)), 0
    while left:
      try:
        for index, result in self._run_once(function, dict(left)):
          del left[index]
          deaths = 0
          yield result
      except BrokenProcessPool as error:
        self.__exit__()
        deaths += 1
        if deaths == _DEATHS:
          raise OSError('a worker process died (killed, or out of memory), and so did those that took its place: run the '
                        'same command again, with fewer workers if memory was short') from error

  def _run_once(self, function, tasks: dict[int, tuple]) -> Iterator[tuple]:
    if self._pool is None:
      # Not fork: the caller may hold JAX and its threads.
      context = multiprocessing.get_context('forkserver')
      context.set_forkserver_preload(['data_pipeline.documents'])
      self._pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _start_worker, (self.workers,))
    futures = {self._pool.submit(function, *task): index for index, task in tasks.items()}
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    finally:
      for future in futures:
        future.cancel()
      concurrent.futures.wait(futures)


class RayRunner:
  """Runs tasks on the Ray cluster at `address` ('local': one started here for the while, 'auto': the one of this machine).

  Every machine of it sees the corpus's directory under the same path and has this program installed. Nothing is kept in
  Ray: a cluster that is lost costs the shards that were being made.
  """

  def __init__(self, address: str = 'auto', workers: int | None = None):
    import ray
    self._ray = ray
    local = address == 'local'
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[1]), *filter(None, [os.environ.get('PYTHONPATH')])])
    host, _, port = address.removeprefix('ray://').rpartition(':')
    try:
      if host:
        socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would go on trying for minutes
      ray.init(address, num_cpus=workers if local else None, include_dashboard=False if local else None, log_to_driver=False,
               configure_logging=False, runtime_env={'env_vars': {'PYTHONPATH': path}})
    except (ConnectionError, TimeoutError) as error:
      raise OSError(f'there is no Ray cluster at {address!r}: `ray start --head` starts one on this machine') from error
    self.workers = int(ray.cluster_resources().get('CPU', 1))

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._ray.shutdown()

  def run(self, function, tasks: list[tuple]) -> Iterator:
    """Yields function(*task) as tasks finish; a lost worker's tasks are done by another, `_DEATHS` times."""
    remote = self._ray.remote(num_cpus=1, max_retries=_DEATHS)(_in_ray)
    running, todo = set(), iter(tasks)
    try:
      while True:
        while len(running) < 2 * self.workers and (task := next(todo, None)) is not None:
          running.add(remote.remote(function, *task))
        if not running:
          return
        (done,), rest = self._ray.wait(list(running))
        running = set(rest)
        yield self._ray.get(done)
    except self._ray.exceptions.RayTaskError as error:
      raise error.cause from error
    except self._ray.exceptions.RayError as error:
      raise OSError(f'Ray lost a worker and those that took its place ({str(error).splitlines()[0]}): run the same command '
                    'again') from error
    finally:
      for reference in running:
        self._ray.cancel(reference, force=True)


def _in_ray(function, *task):
  vars(sys.modules['__main__']).pop('__file__', None)  # processes that a task starts would import it, and with it Ray
  return function(*task)


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
