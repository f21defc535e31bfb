"""Experiment: everything a run is, as one typed value.

Each dataclass lives beside the part it configures; here they are composed and checked against each other.
`configs/*.py` return one from `get_config(arg)`; every key can be overridden on the command line
(`--config.model.n_layers=4`), and what was run is written to `config.json` in the workdir.
"""

import collections
import dataclasses
import functools
import math
from typing import Literal

import jax

from maxlm import diffusion, parametrisation, qk_clip
from maxlm.checkpoint import CheckpointConfig
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.health import HealthConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.rope import Scaling
from maxlm.lora import LoraConfig
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, attentions, expert_layers
from maxlm.ops.attention import check_attention, has_halo
from maxlm.ops.exchange import exchange_for
from maxlm.ops.grouped_matmul import check_grouped_matmul
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.sharding import AXES, RULES, MeshConfig
from maxlm.spikes import SpikeConfig
from maxlm.step import StepConfig


@dataclasses.dataclass(kw_only=True, slots=True)
class Stretch:
  """What a stage changes in attention layers of a kind; None leaves it. theta, scaling: of their rotary positions. window:
  keys a query sees."""

  theta: float | None = None
  scaling: Scaling | None = None
  window: int | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Ramp:
  """rows a step, until so many tokens of the stage are done."""

  rows: int
  until_tokens: int


@dataclasses.dataclass(kw_only=True, slots=True)
class Stage:
  """One part of a run; what is None is as in the run's config.

  name: of letters, digits, - and _. tokens: of the stage, padding included. lr: its learning rate. corpus, mixture, seq_len,
  batch_size, mask, mesh, compute, microbatches, evals: as in the config. ramp: smaller batches that it begins with. full,
  sliding: what becomes of attention layers without and with a window. optimizer: 'keep' goes on with the state that the
  stage before has left, 'fresh' begins with an empty one.
  """

  name: str
  tokens: int
  lr: Schedule
  corpus: str | None = None
  mixture: dict[str, int] | None = None
  seq_len: int | None = None
  batch_size: int | None = None
  ramp: tuple[Ramp, ...] = ()
  mask: Literal['document', 'row'] | None = None
  mesh: MeshConfig | None = None
  compute: ComputeConfig | None = None
  microbatches: int | None = None
  evals: EvalConfig | None = None
  full: Stretch | None = None
  sliding: Stretch | None = None
  optimizer: Literal['keep', 'fresh'] = 'keep'


@dataclasses.dataclass(kw_only=True, slots=True)
class Experiment:
  """name: of the run; its default workdir is runs/<name>. pod: the machine it is meant for, as 'v5p:4x4x4', or '' for
  any. model: None takes that of init_from. tokens: of the whole run, padding included. microbatches: parts a step's batch is
  computed in. seed: of weights and data order. stages: the parts of a run that changes on its way (`maxlm.stages`), which
  then has their tokens and their learning rates.

  init_from: the model whose weights the run starts from: a run's workdir (its newest checkpoint), WORKDIR@STEP or a Hugging
  Face directory. init_optimizer: go on with the state of its optimizer too. lora: train adapters beside the weights.
  """

  name: str
  pod: str = ''
  model: DecoderConfig | None = None
  compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  data: DataConfig
  optim: OptimConfig
  loss: LossConfig = dataclasses.field(default_factory=LossConfig)
  spikes: SpikeConfig = dataclasses.field(default_factory=SpikeConfig)
  evals: EvalConfig = dataclasses.field(default_factory=EvalConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  health: HealthConfig = dataclasses.field(default_factory=HealthConfig)
  tokens: int = 0
  stages: tuple[Stage, ...] = ()
  microbatches: int = 1
  seed: int = 0
  init_from: str = ''
  init_optimizer: bool = False
  lora: LoraConfig | None = None

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.seq_len

  @property
  def n_steps(self) -> int:
    """Of a run without stages; of one with them, `stages.segments` says."""
    return math.ceil(self.tokens / self.tokens_per_step)

  @property
  def pod_devices(self) -> int:
    """Devices of the pod the run is meant for; one for 'any machine'. A chip of tpu7x shows as two."""
    generation, _, extents = self.pod.partition(':')
    return math.prod(int(n) for n in extents.split('x')) * (2 if generation == 'tpu7x' else 1) if self.pod else 1

  def is_evaluated(self, step: int) -> bool:
    """Whether held-out rows are scored after that step; before the first, what a run starts from is."""
    every = self.evals.every_steps
    return bool(self.init_from) if step == 0 else bool(every) and step % every == 0

  def resolved(self, platform: str) -> ComputeConfig:
    """`compute` with the platform's choices made."""
    return self.compute.resolve(platform, self.model, whole_rows=all(getattr(self.mesh, axis) == 1 for axis in RULES['T']))

  def step_config(self, platform: str, n_sources: int) -> StepConfig:
    """What `step.train_step` needs, with the platform's choices made."""
    return StepConfig(model=self.model, lora=self.lora, compute=self.resolved(platform), optim=self.optim,
                      loss=self.loss, spikes=self.spikes, tokens_per_step=self.tokens_per_step,
                      total_tokens=self.optim.horizon_tokens or self.n_steps * self.tokens_per_step,
                      microbatches=self.microbatches, n_sources=n_sources, seed=self.seed)


def validate(config: Experiment, platform: str, n_devices: int) -> None:
  """ValueError, in one line with the fix, for what cannot run on that many devices of that platform. Called once."""
  model, data = config.model, config.data
  positive = {'model.vocab_size': model.vocab_size, 'model.d_model': model.d_model, 'model.n_layers': model.n_layers,
              'data.seq_len': data.seq_len, 'data.batch_size': data.batch_size, 'tokens': config.tokens,
              'microbatches': config.microbatches, 'compute.unroll': config.compute.unroll,
              'checkpoint.every_steps': config.checkpoint.every_steps,
              'checkpoint.max_failures': config.checkpoint.max_failures,
              'health.hang_seconds': config.health.hang_seconds, 'health.startup_seconds': config.health.startup_seconds}
  for name, value in positive.items():
    if value is not None and value < 1:
      raise ValueError(f'{name}={value} must be at least 1')
  if model.mtp_depth < 0 or model.mtp_depth >= data.seq_len:
    raise ValueError(f'model.mtp_depth={model.mtp_depth} must be 0 or more, and less than data.seq_len')
  if not model.pattern:
    raise ValueError('model.pattern is empty: it needs at least one LayerSpec')
  config.optim.check(config.n_steps * config.tokens_per_step)
  config.loss.check()
  config.spikes.check()
  if config.lora is not None:
    config.lora.check()
  if config.optim.qk_clip is not None:
    qk_clip.check(model)
    if config.lora is not None:
      raise ValueError('optim.qk_clip changes weights of queries and keys, and lora trains adapters: leave one of them out')
  if config.optim.base is not None:
    parametrisation.check(model, config.optim.base)
    if config.lora is not None:
      raise ValueError('optim.base is for weights that are trained whole, and lora trains adapters: leave one of them out')
  if not config.init_from and (config.lora is not None or config.init_optimizer):
    needs = 'lora' if config.lora else 'init_optimizer'
    raise ValueError(f'{needs} needs a model to start from: give --config.init_from=WORKDIR')
  if config.init_optimizer and config.lora is not None:
    raise ValueError('init_optimizer=True has no meaning with lora: adapters are new, and so is their optimizer')
  for source, weight in data.mixture.items():
    if weight < 1:
      raise ValueError(f'data.mixture[{source!r}]={weight}: weights are whole numbers from 1; leave a source out to skip it')
  sizes, compute = dict(zip(AXES, config.mesh.shape(n_devices))), config.resolved(platform)
  kernel_check = functools.partial(check_attention, compute.kernel, platform, seq_len=data.seq_len, dtype=compute.dtype,
                                   chunks=_row_chunks(sizes), causal=model.mask_token is None)
  for i, layer in enumerate(model.pattern):
    if not layer.parts:
      raise ValueError(f'model.pattern[{i}] has neither a mixer nor an mlp')
    for name, part in layer.parts.items():
      part.check(f'model.pattern[{i}].{name}')
    for attention in attentions(layer.mixer):
      kernel_check(window=attention.window, softcap=attention.softcap, sinks=attention.sinks, head_dim=attention.head_dim)
    if isinstance(layer.mixer, MlaSpec):
      kernel_check(window=None, softcap=None, sinks=False, head_dim=layer.mixer.nope_dim + layer.mixer.rope_dim)
  diffusion.check(model)
  if model.max_positions is not None and data.seq_len > model.max_positions:
    raise ValueError(f'data.seq_len={data.seq_len} is more than the {model.max_positions} positions of the model')
  _check_mesh(config, sizes)
  _check_experts(config, sizes)
  if expert_layers(model):
    check_grouped_matmul(compute.experts_kernel, platform, compute.dtype)


def _check_mesh(config: Experiment, sizes: dict[str, int]) -> None:
  """ValueError unless every split dimension divides by the mesh axes it is split over."""
  length, chunks = config.data.seq_len, _row_chunks(sizes)
  if length % chunks:
    axis = RULES['T'][0]
    raise ValueError(f'data.seq_len={length} does not divide into {chunks} chunks (2 x mesh.{axis}={sizes[axis]}): use a '
                     f'multiple of {chunks}, such as {-(-length // chunks) * chunks}')
  dims = {'model.vocab_size': ('V', config.model.vocab_size), 'model.d_model': ('D', config.model.d_model)}
  for i, layer in enumerate(config.model.pattern):
    dims |= {f'model.pattern[{i}].{name}.{field}': split
             for name, part in layer.parts.items() for field, split in part.split_dims().items()}
  for name, (dim, size) in dims.items():
    parts = math.prod(sizes[axis] for axis in RULES[dim])
    if size % parts:
      raise ValueError(f'{name}={size} does not divide into {parts} parts ({" x ".join(RULES[dim])} of the mesh): '
                       'change it or the mesh')
  rows, parts = config.data.batch_size, math.prod(sizes[axis] for axis in RULES['B'])
  if rows % (parts * config.microbatches):
    unit = parts * config.microbatches
    raise ValueError(f'data.batch_size={rows} rows do not divide into {config.microbatches} microbatches x {parts} parts '
                     f'({" x ".join(RULES["B"])} of the mesh): use a multiple of {unit}, such as {-(-rows // unit) * unit}')


def _row_chunks(sizes: dict[str, int]) -> int:
  """Into how many chunks a row is cut: two a device where devices share it (`ops.context`)."""
  parts = math.prod(sizes[axis] for axis in RULES['T'])
  return 2 * parts if parts > 1 else 1


def _check_experts(config: Experiment, sizes: dict[str, int]) -> None:
  """ValueError for what has no meaning without experts, or without devices that share them."""
  compute, axis = config.compute, RULES['E'][0]
  shared = f'devices share experts where mesh.{axis} is more than 1, and here it is {sizes[axis]}'
  if sizes[axis] > 1 and not expert_layers(config.model):
    raise ValueError(f'mesh.{axis}={sizes[axis]}: the model has no experts to split; set it to 1 and use fsdp')
  if compute.exchange not in (None, 'gather', 'all_to_all'):
    raise ValueError(f'compute.exchange={compute.exchange!r} is neither gather nor all_to_all')
  if compute.exchange is not None and sizes[axis] == 1:
    raise ValueError(f'compute.exchange={compute.exchange!r}: {shared}; leave it None')
  if compute.capacity is not None and (sizes[axis] == 1 or compute.capacity < 1):
    why = f'{shared}; leave it None' if sizes[axis] == 1 else 'it must be at least 1, the average load of a device'
    raise ValueError(f'compute.capacity={compute.capacity}: {why}')
  if compute.benchmark_routing not in (None, 'balanced'):
    raise ValueError(f"compute.benchmark_routing={compute.benchmark_routing!r} must be None or 'balanced'")
  if compute.benchmark_routing and 'benchmark' not in config.name:
    raise ValueError(f'compute.benchmark_routing={compute.benchmark_routing!r} does not train the routers: set it to None, '
                     'or give the run a name with "benchmark" in it')


def describe(config: Experiment, platform: str, n_steps: int, n_parameters: int) -> str:
  """The lines a run, or a stage of one, starts with: what will be computed, how, and on what."""
  model, compute = config.model, config.resolved(platform)
  kinds = collections.Counter(' + '.join(map(kind_of, layer.parts.values())) for layer in model.layers)
  devices = jax.devices()
  meant = ''
  if config.pod and len(devices) != config.pod_devices:
    meant = f'pod      meant for {config.pod}, {config.pod_devices} devices; this machine has {len(devices)}\n'
  rows, experts = _describe_rows(config), _describe_experts(config, platform)
  if model.mask_token is not None:
    experts += f'loss     masked diffusion (mask token {model.mask_token}): all losses are upper bounds of nats a token\n'
  return (f'{meant}model    {n_parameters / 1e6:,.1f}M parameters: {model.n_layers} layers '
          f'({", ".join(f"{n} x {kind}" for kind, n in kinds.items())}), '
          f'width {model.d_model}, vocabulary {model.vocab_size}\n'
          f'compute  {len(devices)} x {devices[0].device_kind}, {compute.dtype}, attention kernel {compute.kernel}, '
          f'remat {compute.remat}\n{rows}{experts}'
          f'steps    {n_steps:,} of {config.data.batch_size} x {config.data.seq_len} = '
          f'{config.tokens_per_step:,} tokens: {n_steps * config.tokens_per_step:,} tokens in all')


def _describe_rows(config: Experiment) -> str:
  """A line on rows that devices share: what the layers exchange."""
  chunks = _row_chunks(dict(zip(AXES, config.mesh.shape(jax.device_count()))))
  if chunks == 1:
    return ''
  length = config.data.seq_len // chunks
  windows = sorted({spec.window for layer in config.model.pattern for spec in attentions(layer.mixer) if spec.window})
  how = [f'window {w}: {"a halo of " + str(w - 1) if has_halo(w, length) else "longer than a chunk, so whole rows of keys"}'
         for w in windows]
  return f'rows     of {chunks} chunks of {length} tokens, two on a device{"".join("; " + part for part in how)}\n'


def _describe_experts(config: Experiment, platform: str) -> str:
  """A line on how tokens come to their experts, and a loud one where the routers do not decide."""
  lines, kernel = [], config.resolved(platform).experts_kernel
  devices = dict(zip(AXES, config.mesh.shape(jax.device_count())))[RULES['E'][0]]
  for spec, layers in expert_layers(config.model):
    way = 'all on each device, none dropped'
    if devices > 1:
      capacity = config.compute.capacity
      exchange = config.compute.exchange or f'{exchange_for(spec.k, devices)} (of less bytes x links)'
      fits = 'none dropped' if capacity is None else f'at most {capacity} times the average load of a device'
      way = f'on {devices} devices, {exchange}, {fits}'
    lines.append(f'experts  {spec.k} of {spec.n_experts} in {len(layers)} layers: {way}; products by {kernel}')
  if config.compute.benchmark_routing:
    lines.append(f'WARNING  {config.compute.benchmark_routing.upper()} ROUTING, a benchmark: experts in turn, the '
                 'routers do not decide, the model learns nothing of worth')
  return ''.join(f'{line}\n' for line in lines)


def kind_of(part) -> str:
  """A part of a layer in a word or two."""
  match part:
    case AttentionSpec(window=window):
      return 'full attention' if window is None else f'window {window}'
    case MlpSpec(d_ff=d_ff):
      return f'mlp {d_ff}'
    case MoeSpec(n_experts=n_experts, k=k):
      return f'{k} of {n_experts} experts'
  return type(part).__name__.removesuffix('Spec').lower()
