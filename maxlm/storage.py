"""Orbax as our checkpoints use it: what is set, kept and caught."""

import contextlib
import logging
from collections.abc import Callable

import jax
from etils import epath

UNREADABLE = (KeyError, ValueError, OSError)  # what Orbax and tensorstore raise over damaged files, among other things
UNREACHABLE = (PermissionError, ConnectionError, TimeoutError)
UNREACHABLE_STATUS = ('PERMISSION_DENIED', 'UNAUTHENTICATED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED')


def checkpointer(directory: epath.Path, keep_last: int, keep_every: int | None, keep_steps: frozenset[int],
                 transfer_bytes: int | None, newest_verified: Callable[[], int | None]):
  """Orbax's Checkpointer, which writes a step and removes those that are not to be kept. Kept is also the newest step of
  which is known that it can be read: the last ones may all be damaged the same way."""
  ocp = orbax()
  policies = ocp.training.preservation_policies
  keep = [policies.LatestN(keep_last), _Keep(lambda step: step in keep_steps), _Keep(lambda step: step == newest_verified())]
  keep += [policies.EveryNSteps(keep_every)] if keep_every else []
  return ocp.training.Checkpointer(directory, context=_context(ocp, transfer_bytes),
                                   preservation_policy=policies.AnyPreservationPolicy(keep))


class _Keep:
  """Keeps the steps that a function says yes to."""

  def __init__(self, is_kept: Callable[[int], bool]):
    self._is_kept = is_kept

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    return [self._is_kept(saved.step) for saved in checkpoints]


def _context(ocp, transfer_bytes: int | None):
  context = ocp.Context()
  # Its default on a local disk trusts the name of a directory, and lists, loads and keeps unfinished ones.
  context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
  context.memory.transfer_concurrent_bytes = transfer_bytes
  context.checkpointables.registry = ocp.handlers.local_registry()
  for name in ('meta', 'digest'):  # else: arrays of scalars
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
  return context


@contextlib.contextmanager
def reading(partial: bool):
  """Orbax, to read: of an item all its arrays, or (partial) those that are asked for."""
  ocp = orbax()
  context = ocp.Context()
  context.pytree.loading.partial_load = partial
  if jax.process_count() > 1:  # it would wait for the others, and for minutes where one of them has failed
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.barrier_sync_key_prefix = f'reading-{jax.process_index()}'
  with context:
    yield ocp


def orbax():
  """Orbax, imported when it is first needed: it takes a second, and a fresh run has time for it at its first save."""
  from orbax.checkpoint import v1

  # Each of its threads logs the traceback of a failed save, hundreds of lines; we raise the reason ourselves.
  logging.getLogger('absl').addFilter(_is_not_a_traceback_of_orbax)
  logging.getLogger('asyncio').addFilter(_is_not_a_traceback_of_orbax)  # of reads that were given up with the first failure
  return v1


def _is_not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
  return not (record.exc_info and ('orbax' in record.pathname or 'orbax' in record.getMessage()))


def is_unreachable(error: BaseException) -> bool:
  """Whether a failure to read says nothing about the files, but of the way to them."""
  return isinstance(error, UNREACHABLE) or str(error).startswith(UNREACHABLE_STATUS)
