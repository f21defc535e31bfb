"""The engine: tasks that commit their own output, run by a runner, done once.

A task is (record name, key, *arguments). It runs as function(root, record name, key, *arguments) in some process, commits
its files, and ends with `shards.write_record`. A record with the same key and its files in place is never made again,
whoever died in between; so a task must write the same bytes whenever it runs, and take nothing but small values: paths,
hashes, numbers. Text stays in the shards.
"""

import pathlib
import sys
from collections.abc import Callable

import tqdm

from data_pipeline import shards


class Tasks:
  """Runs tasks of one corpus. lasting: the names of the records that are kept when the build ends."""

  def __init__(self, root: pathlib.Path, runner, before_first: Callable[[], None]):
    self.root, self.runner, self.lasting = root, runner, set()
    self._before_first = before_first  # what is done before anything in the corpus changes

  def recorded(self, name: str, key: str) -> dict | None:
    """The record of a task that is done, else None. It is kept."""
    self.lasting.add(name)
    return shards.read_record(self.root, name, key)

  def run(self, what: str, function, tasks: list[tuple], *, lasting: bool = True) -> list[dict]:
    """Records of these tasks, in order; those that are not yet done are run, with a progress bar named `what`.

    lasting=False: what they make only bridges a killed build, and goes when the build ends.
    """
    todo = [(self.root, *task) for task in tasks if shards.read_record(self.root, *task[:2]) is None]
    if lasting:
      self.lasting.update(task[0] for task in tasks)
    if todo:
      self._before_first()
      every = 1 if sys.stderr.isatty() else 30  # seconds
      with tqdm.tqdm(total=len(todo), desc=f'    {what}', unit='shard', file=sys.stderr, leave=False, mininterval=every,
                     delay=2 * every) as bar:
        for _ in self.runner.run(function, todo):
          bar.update()
    return [shards.read_record(self.root, *task[:2]) for task in tasks]
