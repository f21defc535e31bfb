"""Compiles the real steps of a config for a slice that is not here: the same functions that `maxlm.train` runs."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from data_pipeline.pack import FIELDS
from maxlm.compiler import options
from maxlm.config import Experiment, validate
from maxlm.hosts import say
from maxlm.layers.moe import MoeSpec
from maxlm.ops.exchange import round_rows
from maxlm.plan.memory import Memory, does_not_fit, memory_of
from maxlm.plan.topology import Topology
from maxlm.sharding import axis_size, make_mesh, spec
from maxlm.start import write_atomically
from maxlm.step import TrainState, eval_step, init_state, train_step

IMBALANCE = 1.2  # tokens of the fullest device's experts over the mean, that a balanced router is assumed to leave


class Refused(ValueError):
  """The compiler does not make this program for that slice; says in one line why, and what to change."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Program:
  """One compiled step. text: the scheduled HLO of one device. jaxpr: what was traced. seconds: to trace and to compile.
  filled: the share of rows of the experts' buffers that are assumed to have tokens."""

  name: str
  text: str
  memory: Memory
  jaxpr: Any
  tokens: int
  seconds: tuple[float, float]
  filled: float


def compile_train(config: Experiment, topology: Topology, mesh: Mesh) -> Program:
  """The training step with its state donated. Refused where it does not fit."""
  with jax.set_mesh(mesh):
    step_config = config.step_config('tpu', n_sources(config))
    state = abstract_state(config, mesh)
    step = jax.jit(functools.partial(train_step, step_config), donate_argnums=0)
    return _compile('train step', step, (state, abstract_batch(config.data.batch_size, config.data.seq_len)),
                    config, topology)


def compile_eval(config: Experiment, topology: Topology, mesh: Mesh) -> Program:
  """The evaluation step on as many rows as a microbatch has, as `maxlm.train` makes it."""
  with jax.set_mesh(mesh):
    step_config = config.step_config('tpu', n_sources(config))
    params = abstract_state(config, mesh).params
    step = jax.jit(functools.partial(eval_step, step_config.model, step_config.compute))
    rows = config.data.batch_size // config.microbatches
    batch = abstract_batch(rows, config.data.seq_len, ('target_bytes',))
    return _compile('eval step', step, (params, batch), config, topology)


def mesh_for(config: Experiment, topology: Topology) -> Mesh:
  """The config's mesh over the slice, after everything else that `maxlm.train` checks. ValueError with the fix."""
  if config.model is None:
    raise ValueError('this config takes its model from the run it starts from: plan a config that has a model')
  devices = topology.devices()
  validate(config, 'tpu', len(devices))
  return make_mesh(config.mesh, devices)


def abstract_state(config: Experiment, mesh: Mesh) -> TrainState:
  """Shapes and shardings of the training state; the mesh is the current one."""
  step_config = config.step_config('tpu', n_sources(config))
  state = jax.eval_shape(lambda: init_state(step_config, jax.random.key(config.seed)))
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=NamedSharding(mesh, s.sharding.spec if s.sharding is not None else jax.P())), state)


def abstract_batch(rows: int, length: int, more: tuple[str, ...] = ()) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and shardings of a batch of packed rows on the current mesh."""
  mesh = jax.sharding.get_mesh()
  shapes = {name: (rows, length) for name in (*FIELDS, *more)} | {'source': (rows,)}
  return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec('BT'[:len(shape)])))
          for name, shape in shapes.items()}


def filled_rows(config: Experiment) -> float:
  """The share of the rows of the experts' buffers that have tokens, on the fullest device; 1.0 without experts.

  The current mesh is that of the program. Only the first of the rounds is counted (`ops.exchange.ROUND`).
  """
  moe = next((layer.mlp for layer in config.model.layers if isinstance(layer.mlp, MoeSpec)), None)
  if moe is None:
    return 1.0
  devices, tokens = axis_size('E'), 1000
  rows = round_rows(tokens, moe.k, devices, moe.n_experts // devices, config.compute.capacity)
  return min(1.0, tokens * moe.k * (IMBALANCE if devices > 1 else 1.0) / rows)


def n_sources(config: Experiment) -> int:
  """Of the mixture; a config that takes every source of its corpus is planned with one."""
  return max(1, len(config.data.mixture))


def _compile(name: str, step: Callable, args: tuple, config: Experiment, topology: Topology) -> Program:
  started = time.time()
  traced = step.trace(*args)
  lowered = traced.lower()
  traced_at = time.time()
  say(f'traced   {name}, {traced_at - started:.1f} s; compiling for {topology.name} …')
  kept = _kept(lowered, topology)
  if kept is not None and kept.exists():
    say(f'read     {name}, compiled before, from {kept}')
    text, memory = json.loads(kept.read_text())
    memory = Memory(**memory)
  else:
    with _one_line(name, config, topology, traced.jaxpr), warnings.catch_warnings():
      warnings.filterwarnings('ignore', message='Error reading persistent compilation cache')  # as below
      compiled = lowered.compile(compiler_options=options(topology.chip.device_kind))
    text, memory = compiled.as_text(), memory_of(compiled)
    if kept is not None:
      kept.parent.mkdir(parents=True, exist_ok=True)
      write_atomically(kept, json.dumps([text, dataclasses.asdict(memory)]))
    say(f'compiled {name}, {time.time() - traced_at:.1f} s')
  seconds = time.time() - traced_at
  tokens = args[1]['tokens'].size
  return Program(name=name, text=text, memory=memory, jaxpr=traced.jaxpr, tokens=tokens,
                 seconds=(traced_at - started, seconds), filled=filled_rows(config))


def _kept(lowered, topology: Topology) -> Path | None:
  """Where a compiled program is kept for the next time, if JAX was told a place: its own cache cannot read back what was
  compiled without a device."""
  if not jax.config.jax_compilation_cache_dir:
    return None
  versions = [importlib.metadata.version(name) for name in ('jaxlib', 'libtpu')]
  key = json.dumps([lowered.as_text(), topology.name, options(topology.chip.device_kind), versions])
  return Path(jax.config.jax_compilation_cache_dir) / f'maxlm-plan-{hashlib.sha256(key.encode()).hexdigest()}.json'


@contextlib.contextmanager
def _one_line(name: str, config: Experiment, topology: Topology, jaxpr: Any) -> Iterator[None]:
  """Turns the compiler's pages on running out of memory into one line."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    raise Refused(does_not_fit(str(error), name, config, topology, jaxpr, dict(jax.sharding.get_mesh().shape))) from error
