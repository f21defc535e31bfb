"""The processes of a job: one a host of a TPU slice, all running the same program.

    hosts.connect('10.0.0.2:8476', 16, 3)      # elsewhere than on TPU VMs, which find each other
    step = hosts.agree('step', checkpoints.latest)
    hosts.barrier('compiled')
    hosts.shutdown()

What is said here goes through the coordinator, a small server in the first process, and not over the accelerators' network:
it works while they are busy, and hosts wait for each other as long as it takes. All functions are for the main thread, and
every process calls them in the same order; alone, a process agrees with itself.
"""

import hashlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # its key-value store and barriers have no public name

from maxlm.redact import redact

START_SECONDS = 1800  # hosts of a gang come up minutes apart
HEARTBEAT_SECONDS = 100  # without one for so long, a host is dead, and JAX ends the others (SIGABRT)
BARRIER_SECONDS = 3600  # the slowest compile, the largest corpus


def connect(coordinator: str = '', processes: int = 0, process: int = 0, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
  """Joins the job: before anything else of JAX. Alone it does nothing.

  coordinator: HOST:PORT of the first process; '' for one process, and on TPU VMs, whose metadata say all of it.
  ValueError for numbers that do not fit. A host that does not come within half an hour ends the job.
  """
  if not coordinator and (processes or process):
    raise ValueError('--processes and --process need --coordinator=HOST:PORT, the same for all of them')
  if coordinator and not 0 <= process < processes:
    raise ValueError(f'--process={process} of --processes={processes}: they count from 0 to one less than there are')
  if coordinator and not coordinator.rpartition(':')[2].isdecimal():
    raise ValueError(f'--coordinator={coordinator}: it is HOST:PORT of the first process')
  waits = dict(initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=heartbeat_seconds)
  if coordinator:
    jax.distributed.initialize(coordinator, processes, process, cluster_detection_method='deactivate', **waits)
  elif on_tpu_vm():
    jax.distributed.initialize(**waits)


def on_tpu_vm() -> bool:
  """Whether this machine has TPUs of its own, and JAX is to use them."""
  platforms = jax.config.jax_platforms or 'tpu'
  chips = [*pathlib.Path('/dev').glob('accel[0-9]*'), *pathlib.Path('/dev/vfio').glob('[0-9]*')]
  return 'tpu' in platforms and bool(chips) and importlib.util.find_spec('libtpu') is not None


def is_first() -> bool:
  """Whether this is the process that writes the run's files and speaks for all."""
  return jax.process_index() == 0


def say(text: str) -> None:
  """A line for people, on stderr of the first process."""
  if is_first():
    print(redact(text), file=sys.stderr, flush=True)


def barrier(name: str) -> None:
  """Returns when every process has come here."""
  if distributed.global_state.client is not None:
    distributed.global_state.client.wait_at_barrier(f'maxlm/{_unique(name)}', BARRIER_SECONDS * 1000)


def agree(name: str, function: Callable[[], Any]) -> Any:
  """What function() is on the first process, a JSON value, on all of them. Its ValueError or OSError is raised on all."""
  if jax.process_count() == 1:
    return function()
  key, client = f'maxlm/agreed/{_unique(name)}', distributed.global_state.client
  if not is_first():
    said = json.loads(client.blocking_key_value_get(key, BARRIER_SECONDS * 1000))
    if 'error' in said:
      raise (OSError if said['is_os'] else ValueError)(f'on the first host: {said["error"]}')
    return said['value']
  try:
    value = function()
  except (ValueError, OSError) as error:
    client.key_value_set(key, json.dumps({'error': str(error), 'is_os': isinstance(error, OSError)}))
    raise
  client.key_value_set(key, json.dumps({'value': value}))
  return value


def check_equal(of_mine: Callable[[], dict[str, str]]) -> None:
  """ValueError on every process where one of the facts that of_mine() says differs between them; it names the fact and the
  processes. Alone, a process does not ask.

  A gang of unequal programs does not fail: it hangs, or trains on something nobody asked for.
  """
  if jax.process_count() == 1:
    return
  facts, client, name = of_mine(), distributed.global_state.client, f'maxlm/facts/{_unique("facts")}'
  client.key_value_set(f'{name}/{jax.process_index()}', json.dumps(facts))
  barrier('facts')
  of_all = {int(key.rpartition('/')[2]): json.loads(value) for key, value in client.key_value_dir_get(name)}
  for fact in facts:
    others = sorted(process for process, said in of_all.items() if said[fact] != of_all[0][fact])
    if others:
      value = of_all[others[0]][fact]
      raise ValueError(f'the hosts do not run the same: {fact} is {of_all[0][fact]!r} on process 0 and {value!r} on '
                       f'{", ".join(map(str, others[:8]))}{" …" if len(others) > 8 else ""}')


def any_of(name: str, mine: bool) -> bool:
  """Whether it is so on any process: all of them know."""
  if jax.process_count() == 1:
    return mine
  client, key = distributed.global_state.client, f'maxlm/any/{_unique(name)}'
  client.key_value_set(f'{key}/{jax.process_index()}', str(int(mine)))
  barrier(name)
  return any(value == '1' for _, value in client.key_value_dir_get(key))


def fingerprint(text: str) -> str:
  """Twelve hex digits of a long text, for `check_equal`."""
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def shutdown() -> None:
  """Leaves the job, when all others do: a process that ends without it takes the others for dead, and they it."""
  if distributed.global_state.client is not None:
    jax.distributed.shutdown()


_calls: dict[str, int] = {}


def _unique(name: str) -> str:
  """A name of its own for each call: a barrier and a key serve once."""
  _calls[name] = _calls.get(name, 0) + 1
  return f'{name}/{_calls[name]}'
