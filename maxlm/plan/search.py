"""Tries meshes, microbatches and remat policies for a config and a slice: `python -m maxlm.plan --search`.

All that the config's checks admit are ranked by arithmetic alone: memory, FLOPs with what is recomputed, bytes over links.
The best few are compiled, and what the compiler says of them is what is printed. A candidate that it refuses is said to be.
"""

import copy
import dataclasses
import itertools
import math
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import jax

from maxlm.config import Experiment, validate
from maxlm.hosts import say
from maxlm.layers.moe import MoeSpec
from maxlm.plan import program, report
from maxlm.plan.hardware import GiB
from maxlm.plan.network import network_of
from maxlm.plan.topology import Topology
from maxlm.sharding import AXES, MeshConfig, abstract_mesh
from maxlm.step import init_state

POLICIES = ('none', 'products', 'experts', 'attention', 'full')
# Passes of the model's FLOPs that a step takes
RECOMPUTED = {'none': 3.0, 'products': 3.1, 'experts': 3.4, 'attention': 3.9, 'full': 4.0}
EFFICIENCY = 0.65  # of the peak, that products and attention together are guessed to reach
HIDDEN, OPEN = 0.8, 0.2  # communication is guessed to hide behind this share of the compute; this share of it never does
MOST_MICROBATCHES = 16
PER_MESH = 2  # candidates of one mesh that are compiled at most, so that a search sees several


@dataclasses.dataclass(kw_only=True, slots=True)
class Candidate:
  """A config and what arithmetic says of it: bytes and seconds of a device and a step."""

  config: Experiment
  memory: float
  seconds: float

  @property
  def flags(self) -> str:
    """To set it on the command line."""
    mesh = ' '.join(f'--config.mesh.{axis}={size}' for axis, size in zip(AXES, sizes_of(self.config.mesh)))
    return f'{mesh} --config.microbatches={self.config.microbatches} --config.compute.remat={self.config.compute.remat}'

  @property
  def name(self) -> str:
    mesh = ' '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes_of(self.config.mesh)) if size > 1)
    return f'{mesh or "one device"}, {self.config.microbatches} microbatches, remat {self.config.compute.remat}'


def search(config: Experiment, topology: Topology, n_compiles: int) -> list[dict[str, Any]]:
  """Compiles the training step of the most promising candidates: their figures, the fastest first, refusals last."""
  ranked = candidates(config, topology)
  fitting = [c for c in ranked if c.memory <= topology.chip.hbm_bytes]
  if not fitting:
    least = min(ranked, key=lambda c: c.memory, default=None)
    need = f'the leanest, {least.name}, needs about {least.memory / GiB:.0f} GiB a device' if least else 'none is valid'
    raise ValueError(f'no mesh of {topology.name} holds this config: {need}; take a larger slice or smaller batches')
  chosen = choose(fitting, n_compiles)
  say(f'search   {len(ranked)} candidates are valid, {len(fitting)} fit by arithmetic; compiling {len(chosen)}')
  found = []
  for i, candidate in enumerate(chosen):
    say(f'search   {i + 1} of {len(chosen)}: {candidate.name}')
    entry = {'name': candidate.name, 'flags': candidate.flags, 'guessed_seconds': candidate.seconds,
             'guessed_memory': candidate.memory}
    try:
      mesh = program.mesh_for(candidate.config, topology)
      step = program.compile_train(candidate.config, topology, mesh)
    except program.Refused as refusal:
      found.append({**entry, 'refused': str(refusal)})
      continue
    network = network_of(topology, mesh)
    read = report.read(step.text, step.name, network, step.filled)
    found.append({**entry, **report.figures(step, read, candidate.config, network, None)})
  return sorted(found, key=lambda f: f['estimates']['scheduled']['seconds'] if 'estimates' in f else math.inf)


def choose(ranked: list[Candidate], n: int) -> list[Candidate]:
  """The first n, but not more than PER_MESH of one mesh as long as there are others."""
  chosen, later, taken = [], [], {}
  for candidate in ranked:
    mesh = sizes_of(candidate.config.mesh)
    taken[mesh] = taken.get(mesh, 0) + 1
    (chosen if taken[mesh] <= PER_MESH else later).append(candidate)
  return (chosen + later)[:n]


def candidates(config: Experiment, topology: Topology) -> list[Candidate]:
  """All that the config's checks admit on the slice, the fastest by arithmetic first."""
  n_devices = topology.n_chips * topology.chip.devices
  parameters, forward = count_parameters(config), report.model_flops(config, config.data.batch_size, 1.0)
  found = []
  for mesh in meshes(n_devices, config, topology.slices):
    for microbatches in (2**i for i in range(int(math.log2(MOST_MICROBATCHES)) + 1)):
      trial = with_choices(config, mesh, microbatches, POLICIES[0])
      try:
        validate(trial, 'tpu', n_devices)
      except ValueError:
        continue
      for policy in (p for p in POLICIES if p != 'experts' or has_experts(config)):
        trial = with_choices(config, mesh, microbatches, policy)
        found.append(Candidate(config=trial, memory=memory(trial, mesh, parameters),
                               seconds=seconds(trial, mesh, topology, parameters, forward)))
  return sorted(found, key=lambda c: c.seconds)


def meshes(n_devices: int, config: Experiment, slices: int) -> Iterator[MeshConfig]:
  """All factorisations of the devices over the axes, in whole divisors; validity is the config's to check."""
  divisors = [d for d in range(1, n_devices + 1) if n_devices % d == 0]
  for data, expert, context, tensor in itertools.product(divisors, repeat=4):
    used = data * expert * context * tensor
    if n_devices % used or data % slices or (expert > 1 and not has_experts(config)) or tensor > 16:
      continue
    yield MeshConfig(data=data, fsdp=n_devices // used, expert=expert, context=context, tensor=tensor)


def has_experts(config: Experiment) -> bool:
  return any(isinstance(layer.mlp, MoeSpec) for layer in config.model.layers)


def with_choices(config: Experiment, mesh: MeshConfig, microbatches: int, policy: str) -> Experiment:
  config = copy.deepcopy(config)
  config.mesh, config.microbatches, config.compute.remat = mesh, microbatches, policy
  return config


def sizes_of(mesh: MeshConfig) -> tuple[int, ...]:
  return tuple(getattr(mesh, axis) for axis in AXES)


def count_parameters(config: Experiment) -> tuple[int, int]:
  """(of experts, of everything else)."""
  with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(), 1)):
    state = jax.eval_shape(lambda: init_state(config.step_config('tpu', 1), jax.random.key(0)))
  leaves = [(jax.tree_util.keystr(path), leaf.size) for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)]
  routed = sum(size for name, size in leaves if re.search(r'_E[A-Z]', name))  # w_up_EDF
  return routed, sum(size for _, size in leaves) - routed


# -- arithmetic


def tokens_of(config: Experiment, mesh: MeshConfig) -> float:
  """That a device has at a time."""
  return config.tokens_per_step / (mesh.data * mesh.fsdp * mesh.expert * mesh.context * config.microbatches)


def memory(config: Experiment, mesh: MeshConfig, parameters: tuple[int, int]) -> float:
  """Bytes of a device, roughly: fp32 weights, two moments and gradients; what layers keep; one layer at work; the head."""
  routed, others = parameters
  model, tokens = config.model, tokens_of(config, mesh)
  state = 16 * (routed / mesh.expert + others) / (mesh.fsdp * mesh.tensor)
  kept = work = 0.0
  for layer in model.layers:
    parts = layer.parts.values()
    D = model.d_model
    width = sum(part.matmul_params(D) for part in parts) / D / mesh.tensor  # of what products give, of all of them
    keeps = {'none': 6 * D + 4 * width, 'products': D + width, 'experts': 2.5 * D + 0.6 * width, 'attention': 2.5 * D,
             'full': D}[config.compute.remat]
    kept += 2 * tokens * keeps
    weights = sum(part.matmul_params(D) for part in parts) / mesh.tensor
    work = max(work, 2 * tokens * (6 * D + 3 * width) + 6 * weights)
  head = 4 * model.d_model * model.vocab_size / mesh.tensor
  return state + kept + work + head


def seconds(config: Experiment, mesh: MeshConfig, topology: Topology, parameters: tuple[int, int], forward: float) -> float:
  """Of a step, roughly: compute, and the communication that does not hide behind it. forward: FLOPs of one pass."""
  chip, model = topology.chip, config.model
  n_devices = topology.n_chips * chip.devices
  routed, others = parameters
  flops = forward * RECOMPUTED[config.compute.remat] / n_devices * (1 + 0.01 * (config.microbatches - 1))
  narrow = [size for layer in model.layers for part in layer.parts.values() for _, (dim, size) in part.split_dims().items()
            if dim == 'F' and mesh.tensor > 1 and size / mesh.tensor < 4 * chip.mxu]
  compute = flops / (chip.flops * EFFICIENCY) * (1.1 if narrow else 1.0)
  ring = 2 * chip.link_rate / chip.devices  # bytes a second of one dimension
  dims = chip.dims if mesh.fsdp == n_devices else max(1, chip.dims - 1)
  gathered = 2 * (routed / mesh.expert + others) / mesh.tensor * config.microbatches
  links = 3 * gathered / (dims * ring) if mesh.fsdp > 1 else 0.0
  tokens = tokens_of(config, mesh) * config.microbatches
  stream = 2 * tokens * model.d_model  # bytes of the residual stream of a device
  if mesh.tensor > 1:
    links += 3 * 4 * len(model.layers) * stream * (mesh.tensor - 1) / ring
  if mesh.expert > 1:
    links += 3 * 2 * sum(isinstance(layer.mlp, MoeSpec) for layer in model.layers) * stream * (mesh.expert - 1) / ring
  if mesh.context > 1:
    links += 3 * len(model.layers) * stream * (mesh.context - 1) / 4 / ring
  if mesh.data > 1:
    shard = 4 * (routed / mesh.expert + others) / (mesh.fsdp * mesh.tensor)
    links += 2 * shard / (chip.dcn_rate if topology.slices > 1 else ring)
  return compute + max(OPEN * links, links - HIDDEN * compute)


# -- the page


def page(config: Experiment, topology: Topology, found: list[dict[str, Any]]) -> str:
  """The candidates that were compiled, the fastest first, each with the flags to set."""
  rows = [('compiler-estimated', 'GiB', 'step', 'MFU', 'exposed')]
  for f in found:
    if 'refused' in f:
      continue
    e = f['estimates']['scheduled']
    exposed = sum(c['exposed_seconds'] for c in f['collectives'])
    rows.append((f['name'], f'{f["memory"]["peak"] / GiB:.1f}', f'{e["seconds"]:.3f} s', f'{e["mfu"]:.1%}',
                 f'{exposed * 1e3:.0f} ms'))
  lines = [f'{config.name} on {topology.name}: {len(found)} candidates compiled', *report.table(rows, (62, 7, 11, 8, 12))]
  lines += [line for f in found if 'refused' in f for line in report.wrapped('refused', [f'{f["name"]}: {f["refused"]}'])]
  if best := next((f for f in found if 'refused' not in f), None):
    lines += ['', 'the first of them:', ' \\\n'.join(f'  {line}' for line in textwrap.wrap(best['flags'], report.WIDTH - 4))]
  return '\n'.join([*lines, '', report.FOOTNOTE])
