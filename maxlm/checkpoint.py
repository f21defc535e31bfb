"""Checkpoints of a run: what is saved, under which names, and what is trusted.

    checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=3, keep_every=5000)
    checkpoints.save(step, params=params, opt=opt, meta=meta)   # returns at once; buffers may be donated right after
    checkpoints.poll()                                          # every step: raises if the save in flight has failed
    params, opt = checkpoints.restore(checkpoints.latest(), params_like, opt_like)

    python -m maxlm.checkpoint verify DIR[@STEP] [--json]       # reads all that was saved; 1 where something is damaged

A thin layer over Orbax v1. DIRECTORY/STEP/ holds `params`, `opt` and others (arrays under plain dotted names such as
`stacks.0.mixer.w_q_DNH`, so that no file depends on a class of Flax or optax, nor on the mesh), `meta` (JSON) and `digest`.
A step counts only with its commit_success.txt, on every kind of storage: what a kill or a half-finished copy leaves
behind is neither listed, nor loaded, nor counted among those to keep, and a later save of that step replaces it.

Orbax and tensorstore give back a flipped bit as a wrong weight, without a word. So `digest` says of each array its dtype,
its shape and the digest that it had on the devices before it was saved, of `meta` its SHA-256, and of itself too. What is
restored is digested again where it has arrived: anything else than what was saved is `Damaged`, whatever the reason.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maxlm import digest, flags, hosts, storage
from maxlm.digest import named_leaves

COMMITTED = 'commit_success.txt'  # Orbax writes it last
VERIFIED = 'verified.json'  # {step: SHA-256 of its `digest`}, of steps that were read back whole
VERIFY_BYTES = 1 << 30  # are read at a time by `verify`, or one array


class Damaged(ValueError):
  """A committed checkpoint is not what was saved. (Where it cannot be reached, it may well be: that is an OSError.)"""


@dataclasses.dataclass(kw_only=True, slots=True)
class CheckpointConfig:
  """every_steps: steps between checkpoints (None: as its failures and the price of a save say, `maxlm.saving`; the last step
  is always saved). keep_last: newest ones kept. keep_every: those of each multiple of so many steps are made and kept too
  (None: no others). max_failures: saves in a row that may fail before the run ends."""

  every_steps: int | None = None
  keep_last: int = 3
  keep_every: int | None = None
  max_failures: int = 3


class Checkpoints:
  """The checkpoints in a directory. Every process of the job makes the same calls, from its main thread."""

  def __init__(self, directory: str | Path, *, keep_last: int = 3, keep_every: int | None = None,
               keep_steps: Iterable[int] = (), transfer_bytes: int | None = None):
    """keep_steps: are kept too. transfer_bytes: a save takes so much off the devices at a time, and returns when all is off
    (None: all at once)."""
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
      raise ValueError(f'checkpoint.keep_last={keep_last} and keep_every={keep_every}: they are at least 1')
    path = epath.Path(directory)
    self.directory = path if '://' in str(path) else path.absolute()  # Orbax refuses relative ones
    self._keep_last, self._keep_every, self._transfer_bytes = keep_last, keep_every, transfer_bytes
    self._keep_steps = frozenset(keep_steps)
    self._checkpointer = None  # Orbax's; made by the first save, for it creates the directory
    self._saving = None  # (step, response) of the save in flight
    self._failed = set()  # steps whose save failed

  def steps(self) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    if not self.directory.exists():
      return []
    found = [path for path in self.directory.iterdir() if path.name.isdecimal() and (path / COMMITTED).exists()]
    return sorted(int(path.name) for path in found)

  def latest(self) -> int | None:
    """The newest committed step, or None."""
    return max(self.steps(), default=None)

  def save(self, step: int, *, meta: dict[str, Any], params, opt=None, **more) -> None:
    """Starts to save, and returns when the arrays have left the device; waits for an earlier save to end first.

    opt: None where there are parameters only. more: other trees of arrays. A step that is committed is not saved again.
    OSError with the reason if the earlier save failed, or if this one cannot be started; the object can be used again,
    for the same step too.
    """
    self.wait()
    arrays = {item: named_leaves(tree) for item, tree in {'params': params, 'opt': opt, **more}.items()}
    arrays = {item: leaves for item, leaves in arrays.items() if leaves}  # Orbax refuses empty ones: the state of plain SGD
    with self._failures_of(step):
      if step in self.steps():
        return
      hosts.agree('can be written to', self._check_writable)
      self._remove_failed()
      if self._checkpointer is None:
        self._checkpointer = storage.checkpointer(self.directory, self._keep_last, self._keep_every, self._keep_steps,
                                                 self._transfer_bytes, self.newest_verified)
      present = {**arrays, **({'meta': meta} if meta else {}), 'digest': _record(arrays, meta)}
      self._saving = step, self._checkpointer.save_checkpointables_async(step, present, force=True)

  def _check_writable(self) -> None:
    """OSError where no directory can be made. Orbax then leaves threads that wait for it for minutes, past the exit."""
    probe = self.directory / f'{os.getpid()}.partial'
    probe.mkdir(parents=True, exist_ok=True)
    probe.rmdir()

  @property
  def is_saving(self) -> bool:
    """Whether a save was started that `poll` or `wait` has not seen end."""
    return self._saving is not None

  def remove(self, step: int) -> None:
    """Removes a committed step, by the first process; returns when it is gone, on all of them."""
    def unlink():
      (self.path(step) / COMMITTED).unlink()  # first: what a kill leaves does not count
      (self.directory / str(step)).rmtree()

    hosts.agree('remove', unlink)

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
      self._failed.discard(step)  # it was saved again

  def close(self) -> None:
    """Ends the save in flight, as `wait` does, and Orbax's threads."""
    self.wait()
    if self._checkpointer is not None:
      self._checkpointer.close()
      self._checkpointer = None

  def _remove_failed(self) -> None:
    """Removes what failed saves left: it takes space that the next one may need. Once more at the next save, since the first
    array that fails ends a save, and threads may still be writing the others."""
    if hosts.is_first():
      for step in self._failed.difference(self.steps()):
        shutil.rmtree(self.directory / str(step), ignore_errors=True)

  @contextlib.contextmanager
  def _failures_of(self, step: int):
    """Failures to write a step, told as one OSError. Orbax's checkpointer is given up: it would tell them again."""
    try:
      yield
    except (OSError, ValueError) as error:  # of the file system, and of tensorstore
      self._checkpointer = self._saving = None
      with contextlib.suppress(OSError):
        self._failed.add(step)
        self._remove_failed()
      reason = ' '.join(str(error).split())
      if 'No space left' in reason:
        reason = 'the disk is full: free space, or keep fewer of them (--config.checkpoint.keep_last)'
      raise OSError(f'the checkpoint of step {step} was not written to {self.directory}: {reason}') from error

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON that was saved with the step. Damaged if it is not that any more."""
    record = self._recorded(step)
    if record['meta'] == _sha256({}):
      return {}
    meta = self._json(step, 'meta')
    if _sha256(meta) != record['meta']:
      raise self._damaged(step, 'meta is not what was saved')
    return meta

  def dtypes(self, step: int) -> dict[str, Any]:
    """The dtype that each parameter of a step is stored in."""
    return {name: jnp.dtype(dtype) for name, (dtype, _, _) in self._recorded(step)['arrays']['params'].items()}

  def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a step."""
    return {name: tuple(shape) for name, (_, shape, _) in self._recorded(step)['arrays']['params'].items()}

  def digests(self, step: int) -> dict[str, dict[str, str]]:
    """{'params': {leaf name: 16 hex digits}, 'opt': …}: what was saved, without reading it. Equal for equal bits."""
    return {item: {name: digits for name, (_, _, digits) in leaves.items()}
            for item, leaves in self._recorded(step)['arrays'].items()}

  def restore_params(self, step: int, like):
    """The parameters of a step, as a tree like `like`: see `restore`."""
    return self.restore_item(step, 'params', like)

  def restore_item(self, step: int, item: str, like):
    """A tree of arrays that was saved with a step under that name, as a tree like `like`: see `restore`."""
    return self._restore(step, {item: like})[item]

  def restore(self, step: int, params_like, opt_like, **more_likes) -> tuple[Any, ...]:
    """(parameters, optimizer state, and each of the more, in order) of a step, on whatever mesh they are wanted.

    The trees `like` give structure, shapes, dtypes (floats are cast where they differ) and shardings; their leaves are
    arrays or jax.ShapeDtypeStruct. ValueError, naming the first parameter that differs, for another architecture; Damaged,
    naming the first array that is not what was saved. Where all was restored, the step counts as verified.
    """
    likes = {'params': params_like, 'opt': opt_like, **more_likes}
    restored = self._restore(step, likes)
    if self._recorded(step)['arrays'].keys() <= likes.keys():
      self.meta(step)
      self._remember(step)
    return tuple(restored.values())

  def _restore(self, step: int, likes: dict[str, Any]) -> dict[str, Any]:
    record, wanted = self._recorded(step)['arrays'], {item: named_leaves(like) for item, like in likes.items()}
    for item, leaves in wanted.items():
      if leaves and item not in record:
        raise ValueError(f'checkpoint {self.path(step)} has {", ".join(record)}, and no {item}: start a run from its '
                         'weights, with --config.init_from')
      _check_same_shapes(self.path(step), record.get(item, {}), leaves)
    targets = {item: {name: _target(leaf, record[item][name][0]) for name, leaf in leaves.items()}
               for item, leaves in wanted.items() if leaves}
    loaded = self._verified(step, record, targets)
    return {item: jax.tree.unflatten(jax.tree.structure(like), [
      _cast(loaded[item].pop(name), leaf.dtype) for name, leaf in wanted[item].items()]) for item, like in likes.items()}

  def verify(self, step: int) -> tuple[int, int]:
    """Reads all of a step, a part at a time: (arrays, bytes). Damaged, naming the first array that is not what was saved;
    else the step counts as verified."""
    self.meta(step)
    record, n_bytes = self._recorded(step)['arrays'], 0
    mesh = jax.make_mesh((jax.local_device_count(),), ('all',), devices=jax.local_devices())
    with jax.set_mesh(mesh):
      for item, leaves in record.items():
        part = {}
        for i, (name, (dtype, shape, _)) in enumerate(leaves.items()):
          part[name] = _split_over(mesh, tuple(shape), _dtype(dtype))
          if i == len(leaves) - 1 or sum(leaf.size * leaf.dtype.itemsize for leaf in part.values()) >= VERIFY_BYTES:
            loaded = self._verified(step, record, {item: part}, partial=True)
            n_bytes += sum(leaf.nbytes for leaf in loaded[item].values())
            part, loaded = {}, None
    self._remember(step)
    return sum(map(len, record.values())), n_bytes

  def _verified(self, step: int, record: dict, targets: dict[str, dict], partial: bool = False) -> dict[str, dict]:
    """Arrays of a step that have the digests they were saved with."""
    loaded = self._load(step, targets, partial) if targets else {}
    for item, leaves in loaded.items():
      for name, found in digest.of_tree(leaves).items():
        if found != record[item][name][2]:
          raise self._damaged(step, f'{item}.{name} is not what was saved (digest {found}, it was {record[item][name][2]})')
    return loaded

  def _load(self, step: int, targets: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """What Orbax reads of a step, on all processes or on none."""
    path, loaded, failure = self.path(step), None, None
    try:
      with storage.reading(partial) as ocp:
        loaded = ocp.load_checkpointables(path, targets)
    except storage.UNREADABLE as error:  # its NoEntryError is a KeyError; the reason is its cause
      failure = error.__cause__ or error
    if hosts.any_of('unreachable', failure is not None and storage.is_unreachable(failure)):
      raise OSError(f'checkpoint {path} cannot be reached: {_one_line(failure or "by another host")}') from failure
    if hosts.any_of('unreadable', failure is not None):
      raise self._damaged(step, failure or 'another host cannot read it') from failure
    return loaded

  def _recorded(self, step: int) -> dict[str, Any]:
    """What `_record` said of a step when it was saved."""
    record = self._json(step, 'digest')
    if not isinstance(record, dict) or record.pop('sha256', None) != _sha256(record):
      raise self._damaged(step, 'digest is not what was saved')
    return record

  def _json(self, step: int, item: str) -> Any:
    path = self.path(step) / item / 'data.json'
    try:
      return json.loads(path.read_text())
    except storage.UNREACHABLE:
      raise
    except (OSError, ValueError, RecursionError) as error:
      raise self._damaged(step, f'{item} cannot be read: {error}') from error

  def _damaged(self, step: int, reason) -> Damaged:
    others = [other for other in self.steps() if other != step]
    advice = f'there are also {", ".join(map(str, others))}' if others else 'there is no other'
    return Damaged(f'checkpoint {self.directory / str(step)} is damaged ({advice}): {_one_line(reason)}')

  def newest_verified(self) -> int | None:
    """The newest step that was read back whole, by a restore or by `verify`, since it was saved."""
    return max(self._still_verified(), default=None)

  def _still_verified(self) -> dict[int, str]:
    try:
      noted = json.loads((self.directory / VERIFIED).read_text())
    except (OSError, ValueError):  # there is none yet, or none any more: then nothing is known to be good
      return {}
    return {step: noted[str(step)] for step in self.steps() if str(step) in noted and self._is_still(step, noted[str(step)])}

  def _is_still(self, step: int, sha256: str) -> bool:
    """A step that was saved again after it was set aside is another one."""
    try:
      return _sha256(self._recorded(step)) == sha256
    except Damaged:
      return False

  def _remember(self, step: int) -> None:
    if not hosts.is_first():
      return
    partial = self.directory / f'{VERIFIED}.{os.getpid()}.partial'
    with contextlib.suppress(OSError):  # of a checkpoint that may only be read, nothing is noted
      partial.write_text(json.dumps({**self._still_verified(), step: _sha256(self._recorded(step))}))
      partial.replace(self.directory / VERIFIED)

  def set_aside(self, step: int, reason: str) -> epath.Path:
    """Renames a committed step to damaged-STEP and returns its path: it is neither listed nor kept any more, nor in the way
    of a new save of that step. For all processes. ValueError for the only one: a run must not begin anew unasked."""
    self.close()  # Orbax knows the steps from when it was made
    name = hosts.agree('set aside', lambda: self._set_aside(step, reason))
    hosts.barrier('set aside')
    return self.directory / name

  def _set_aside(self, step: int, reason: str) -> str:
    path = self.path(step)
    if self.steps() == [step]:
      raise ValueError(f'checkpoint {path} is the only one, and it is not set aside: put a good one beside it, or remove it '
                       f'to begin anew ({reason})')
    names = (f'damaged-{step}{suffix}' for suffix in ('', *(f'-{n}' for n in range(2, 1000))))
    aside = next(self.directory / name for name in names if not (self.directory / name).exists())
    path.rename(aside)
    (aside / 'REASON').write_text(f'{reason}\n')
    return aside.name

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


def with_leaves(tree, leaves: dict[str, Any]):
  """The tree with these leaves, by the names of `named_leaves`, in the place of its own."""
  named = named_leaves(tree)
  assert leaves.keys() <= named.keys(), f'no leaf is named {min(leaves.keys() - named.keys())}'
  return jax.tree.unflatten(jax.tree.structure(tree), list((named | leaves).values()))


def _record(arrays: dict[str, dict], meta: dict[str, Any]) -> dict[str, Any]:
  """The `digest` of a step: {'arrays': {item: {name: [dtype, shape, digest]}}, 'meta': SHA-256, 'sha256': of these}."""
  digests = {item: digest.of_tree(leaves) for item, leaves in arrays.items()}
  record = {'meta': _sha256(meta), 'arrays': {item: {
    name: [str(leaf.dtype), list(leaf.shape), digests[item][name]] for name, leaf in leaves.items()}
    for item, leaves in arrays.items()}}
  return {**record, 'sha256': _sha256(record)}


def _sha256(value) -> str:
  """Of a JSON value, whatever the order of its keys and its layout."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _one_line(reason) -> str:
  return ' '.join(str(reason).split())[:300]


def _dtype(name: str):
  """The dtype that str() gave this name."""
  keys = (jax.random.key(0, impl=impl).dtype for impl in ('threefry2x32', 'rbg', 'unsafe_rbg'))
  return {str(key): key for key in keys}[name] if name.startswith('key<') else jnp.dtype(name)


def _target(leaf, stored: str) -> jax.ShapeDtypeStruct:
  """What Orbax is asked for. jax.eval_shape gives a sharding on an abstract mesh, or none: the mesh set is meant."""
  sharding, mesh = leaf.sharding, jax.sharding.get_mesh()
  if sharding is None and mesh.empty:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  elif sharding is None:
    sharding = jax.NamedSharding(mesh, jax.P())
  elif isinstance(sharding, jax.NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
    sharding = jax.NamedSharding(mesh, sharding.spec)
  return jax.ShapeDtypeStruct(leaf.shape, _dtype(stored), sharding=sharding)


def _split_over(mesh, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
  """An array split over the one axis of the mesh along its first dimension that can be; or whole on each device."""
  dim = next((dim for dim, size in enumerate(shape) if size and size % mesh.size == 0), None)
  spec = jax.P() if dim is None else jax.P(*[None] * dim, mesh.axis_names[0])
  return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def _cast(array: jax.Array, dtype) -> jax.Array:
  return array if array.dtype == dtype else array.astype(dtype)


def _check_same_shapes(path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  for name in [*wanted, *saved]:
    there = tuple(saved[name][1]) if name in saved else None
    here = wanted[name].shape if name in wanted else None
    if there != here:
      there, here = ('absent' if shape is None else f'of shape {shape}' for shape in (there, here))
      raise ValueError(f'checkpoint {path} is of another architecture: {name} is {there} there, {here} in this config')


def main(words: list[str]) -> int:
  if len(words) != 2 or words[0] != 'verify':
    raise ValueError('say `verify DIR` or `verify DIR@STEP`; --help tells more')
  checkpoints, newest = find(words[1])
  found = []
  for step in checkpoints.steps() if parse(words[1])[1] is None else [newest]:
    try:
      n_arrays, n_bytes = checkpoints.verify(step)
      found.append({'step': step, 'damage': None, 'arrays': n_arrays, 'bytes': n_bytes})
      line = f'{checkpoints.path(step)}: {n_arrays:,} arrays, {n_bytes:,} bytes: all as saved'
    except Damaged as error:
      found.append({'step': step, 'damage': str(error)})
      line = str(error)
    if not JSON.value:
      print(line, flush=True)
  if JSON.value:
    print(json.dumps(found))
  return int(any(of_step['damage'] for of_step in found))


if __name__ == '__main__':
  JSON = flags.DEFINE_bool('json', False, 'print a list of {step, damage (null: none), arrays, bytes}')
  flags.run(main, words=True)
