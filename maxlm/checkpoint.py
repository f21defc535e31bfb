"""Checkpoints of a run: what is saved, under which names, and what is trusted.

    checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=3, keep_every=5000)
    checkpoints.save(step, params=params, opt=opt, meta=meta)   # returns at once; buffers may be donated right after
    checkpoints.poll()                                          # every step: raises if the save in flight has failed
    params, opt = checkpoints.restore(checkpoints.latest(), params_like, opt_like)

A thin layer over Orbax v1. DIRECTORY/STEP/ holds `params` and `opt` (arrays under plain dotted names such as
`stacks.0.mixer.w_q_DNH`, so that no file depends on a class of Flax or optax, nor on the mesh) and `meta` (JSON).
A step counts only with its commit_success.txt, on every kind of storage: what a kill or a half-finished copy leaves
behind is neither listed, nor loaded, nor counted among those to keep, and a later save of that step replaces it.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import jax
from etils import epath

COMMITTED = 'commit_success.txt'  # Orbax writes it last


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  """every_steps: steps between checkpoints (the last step is always saved). keep_last: newest ones kept.
  keep_every: those of each multiple of so many steps are kept too (None: no others)."""

  every_steps: int = 1000
  keep_last: int = 3
  keep_every: int | None = None


class Checkpoints:
  """The checkpoints in a directory. Every process of the job makes the same calls, from its main thread."""

  def __init__(self, directory: str | Path, *, keep_last: int = 3, keep_every: int | None = None,
               transfer_bytes: int | None = None):
    """transfer_bytes: a save takes so much off the devices at a time, and returns when all is off (None: all at once)."""
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
      raise ValueError(f'checkpoint.keep_last={keep_last} and keep_every={keep_every}: they are at least 1')
    path = epath.Path(directory)
    self.directory = path if '://' in str(path) else path.absolute()  # Orbax refuses relative ones
    self._keep_last, self._keep_every, self._transfer_bytes = keep_last, keep_every, transfer_bytes
    self._checkpointer = None  # Orbax's; made by the first save, for it creates the directory
    self._saving = None  # (step, response) of the save in flight

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    if not self.directory.exists():
      return []
    found = [path for path in self.directory.iterdir() if path.name.isdecimal() and (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in found)

  def latest(self) -> int | None:
    """The newest committed step, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, *, params, opt, meta: dict[str, Any]) -> None:
    """Starts to save, and returns when the arrays have left the device; waits for an earlier save to end first.

    opt: None where there are parameters only. A step that is committed is not saved again. OSError with the reason if the
    earlier save failed, or if this one cannot be started.
    """
    self.wait()
    if step in self.steps():
      return
    items = {'params': named_leaves(params), 'opt': named_leaves(opt), 'meta': meta}  # None has no leaves
    with self._failures_of(step):
      if self._checkpointer is None:
        self._checkpointer = _checkpointer(self.directory, self._keep_last, self._keep_every, self._transfer_bytes)
      present = {name: item for name, item in items.items() if item}  # Orbax refuses empty ones: the state of plain SGD
      self._saving = step, self._checkpointer.save_checkpointables_async(step, present, force=True)

  def poll(self) -> None:
    """OSError with the reason if the save in flight has failed; costs nothing. For every step of the loop."""
    if self._saving is not None and not self._checkpointer.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until the save in flight, if any, is committed. OSError with the reason if it failed."""
    if self._saving is None:
      return
    (step, response), self._saving = self._saving, None
    with self._failures_of(step):
      response.result()

  def close(self) -> None:
    """Ends the save in flight, as `wait` does, and Orbax's threads."""
    self.wait()
    if self._checkpointer is not None:
      self._checkpointer.close()
      self._checkpointer = None

  @contextlib.contextmanager
  def _failures_of(self, step: int):
    """Failures to write a step, told as one OSError. Orbax's checkpointer is given up: it would tell them again."""
    try:
      yield
    except (OSError, ValueError) as error:  # of the file system, and of tensorstore
      self._checkpointer = None
      reason = ' '.join(str(error).split())
      if 'No space left' in reason:
        reason = 'the disk is full: free space, or keep fewer of them (--config.checkpoint.keep_last)'
      raise OSError(f'the checkpoint of step {step} was not written to {self.directory}: {reason}') from error

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON that was saved with the step."""
    return self._load(step, {'meta': None})['meta']

  def dtypes(self, step: int) -> dict[str, Any]:
    """The dtype that each parameter of a step is stored in."""
    return {name: saved.dtype for name, saved in self._saved(step, 'params').items()}

  def restore_params(self, step: int, like):
    """The parameters of a step, as a tree like `like`: see `restore`."""
    return self._restore(step, {'params': like})['params']

  def restore(self, step: int, params_like, opt_like) -> tuple[Any, Any]:
    """(parameters, optimizer state) of a step, on whatever mesh they are wanted.

    The trees `like` give structure, shapes, dtypes (floats are cast where they differ) and shardings; their leaves are
    arrays or jax.ShapeDtypeStruct. ValueError, naming the first parameter that differs, for another architecture.
    """
    restored = self._restore(step, {'params': params_like, 'opt': opt_like})
    return restored['params'], restored['opt']

  def _restore(self, step: int, likes: dict[str, Any]) -> dict[str, Any]:
    targets = {item: {name: _target(leaf) for name, leaf in named_leaves(like).items()} for item, like in likes.items()}
    for item, target in targets.items():
      _check_same_shapes(self.path(step), self._saved(step, item), target)
    loaded = self._load(step, {item: target for item, target in targets.items() if target})
    return {item: jax.tree.unflatten(jax.tree.structure(like), [loaded[item][name] for name in targets[item]])
            for item, like in likes.items()}

  def _saved(self, step: int, item: str) -> dict[str, Any]:
    """Orbax's description of the arrays of 'params' or 'opt': what was empty was not saved."""
    path = self.path(step)
    saved = _orbax().checkpointables_metadata(path).metadata.get(item, {})
    if saved is None:
      raise self._damaged(path, f'the description of its {item} cannot be read')
    return saved

  def _load(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
    path = self.path(step)
    try:
      return _orbax().load_checkpointables(path, targets)
    except (KeyError, ValueError, OSError) as error:  # its NoEntryError is a KeyError; the reason may be its cause
      raise self._damaged(path, error.__cause__ or error) from error

  def _damaged(self, path: epath.Path, reason) -> ValueError:
    others = [step for step in self.steps() if str(step) != path.name]
    advice = f'there are also {", ".join(map(str, others))}' if others else 'there is no other'
    return ValueError(f'checkpoint {path} is damaged ({advice}): {" ".join(str(reason).split())[:300]}')

  def path(self, step: int) -> epath.Path:
    """The directory of a step. FileNotFoundError, naming those there are, if it is not there or not committed."""
    if step not in self.steps():
      found = f'it has {", ".join(map(str, self.steps()))}' if self.steps() else 'it has none'
      raise FileNotFoundError(f'no checkpoint of step {step} in {self.directory}: {found}')
    return self.directory / str(step)


def find(argument: str) -> tuple[Checkpoints, int]:
  """The checkpoint a user means by 'WORKDIR' (its newest) or 'WORKDIR@STEP'. FileNotFoundError if there is none."""
  workdir, step = parse(argument)
  checkpoints = Checkpoints(epath.Path(workdir) / 'checkpoints')
  if not checkpoints.steps() and any(epath.Path(workdir).glob('*.safetensors')):
    raise FileNotFoundError(f'{workdir} is a Hugging Face model: import it first, `python -m maxlm.hf import {workdir} DIR`')
  if step is None and not checkpoints.steps():
    raise FileNotFoundError(f'no checkpoint in {checkpoints.directory}: give the workdir of a run, or WORKDIR@STEP')
  step = checkpoints.latest() if step is None else step
  checkpoints.path(step)
  return checkpoints, step


def parse(argument: str) -> tuple[str, int | None]:
  """parse('runs/a@100') == ('runs/a', 100);  parse('runs/a') == ('runs/a', None)."""
  workdir, at, step = argument.rpartition('@')
  return (workdir, int(step)) if at and step.isdecimal() else (argument, None)


def lineage(parent: dict[str, Any] | None = None) -> dict[str, Any]:
  """Where a run comes from, for `meta`: a new id, the code, JAX, and its parent ({'run': id, 'step': n}) or None."""
  return {'run': uuid.uuid4().hex, 'parent': parent, 'code': code_version(),
          'jax': jax.__version__, 'jaxlib': importlib.metadata.version('jaxlib')}


def code_version() -> str:
  """The git commit of this code, with '-dirty' if it was changed; outside of a clone, the version of the package."""
  root = Path(__file__).parents[1]
  if (root / '.git').exists() and shutil.which('git'):
    describe = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    described = subprocess.run(describe, cwd=root, capture_output=True, text=True, check=False)
    if described.returncode == 0:
      return described.stdout.strip()
  try:
    return importlib.metadata.version('maxlm')
  except importlib.metadata.PackageNotFoundError:
    return 'unknown'


def named_leaves(tree) -> dict[str, Any]:
  """{'stacks.0.mixer.w_q_DNH': leaf}: the leaves under their dotted paths, in the tree's order."""
  named = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    parts = [str(getattr(key, 'name', getattr(key, 'key', getattr(key, 'idx', None)))) for key in path]
    name = '.'.join(parts[:-1] if parts[-1] == 'value' else parts)  # nnx.Param keeps its array in `.value`
    assert name not in named, f'two leaves are named {name}'
    named[name] = leaf
  return named


def with_leaves(tree, leaves: dict[str, Any]):
  """The tree with these leaves, by the names of `named_leaves`, in the place of its own."""
  named = named_leaves(tree)
  assert leaves.keys() <= named.keys(), f'no leaf is named {min(leaves.keys() - named.keys())}'
  return jax.tree.unflatten(jax.tree.structure(tree), list((named | leaves).values()))


def _target(leaf) -> jax.ShapeDtypeStruct:
  """What Orbax is asked for. jax.eval_shape gives a sharding on an abstract mesh, or none: the mesh set is meant."""
  sharding, mesh = leaf.sharding, jax.sharding.get_mesh()
  if sharding is None and mesh.empty:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  elif sharding is None:
    sharding = jax.NamedSharding(mesh, jax.P())
  elif isinstance(sharding, jax.NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
    sharding = jax.NamedSharding(mesh, sharding.spec)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_same_shapes(path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  for name in [*wanted, *saved]:
    there = tuple(saved[name].shape) if name in saved else None
    here = _stored_shape(wanted[name]) if name in wanted else None
    if there != here:
      there, here = ('absent' if shape is None else f'of shape {shape}' for shape in (there, here))
      raise ValueError(f'checkpoint {path} is of another architecture: {name} is {there} there, {here} in this config')


def _stored_shape(leaf) -> tuple[int, ...]:
  """The shape on disk: a random key is stored as the integers it consists of."""
  is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.eval_shape(jax.random.key_data, leaf).shape if is_key else leaf.shape


def _checkpointer(directory: epath.Path, keep_last: int, keep_every: int | None, transfer_bytes: int | None):
  ocp = _orbax()
  policies = ocp.training.preservation_policies
  keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
  return ocp.training.Checkpointer(directory, context=_context(ocp, transfer_bytes),
                                   preservation_policy=policies.AnyPreservationPolicy(keep))


def _context(ocp, transfer_bytes: int | None):
  context = ocp.Context()
  # Its default on a local disk trusts the name of a directory, and lists, loads and keeps unfinished ones.
  context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
  context.memory.transfer_concurrent_bytes = transfer_bytes
  context.checkpointables.registry = ocp.handlers.local_registry()
  context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name='meta')  # else: arrays of scalars
  return context


def _orbax():
  """Orbax, imported when it is first needed: it takes a second, and a fresh run has time for it at its first save."""
  from orbax.checkpoint import v1

  # Each of its threads logs the traceback of a failed save, hundreds of lines; we raise the reason ourselves.
  logging.getLogger('absl').addFilter(_is_not_a_traceback_of_orbax)
  return v1


def _is_not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
  return not (record.exc_info and 'orbax' in record.pathname)
