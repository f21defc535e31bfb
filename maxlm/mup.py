"""Coordinate check: `python -m maxlm.mup --config=F.py --widths=64,128,256` or `--depths=4,8,16`.

What is learned should not depend on size: in µP no activation grows or vanishes with the width, not at first and not after
some steps, and what it has changed by does neither (Yang et al. 2022, arXiv 2203.03466, appendix D.1); in CompleteP the same
with depth. The config's model is made at each size, trained for some steps on one batch at the config's peak learning rate,
once as it is (SP) and once with the smallest size as its base (`maxlm.parametrisation`). For each kind of activation the
table has the slope of log mean |x| against log size, and of the change since the first step. µP promises 0, and nothing that
grows. Two slopes are below 0 in small models: what is random in the logits averages out as width^-0.5 until what is learned
is more, and so does, as depth^-0.5, what fresh layers add to the stream.
"""

import dataclasses
import functools
import json
import time

import jax
import numpy as np

from maxlm import flags
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.config import Experiment
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, rows_for, stack_of_layer, stack_sizes, unstack
from maxlm.optim import OptimConfig, optimizer
from maxlm.parametrisation import parametrised
from maxlm.sharding import MeshConfig, make_mesh

WIDTHS = flags.DEFINE_list('widths', [], 'of the models, such as 64,128,256; the smallest is the base')
DEPTHS = flags.DEFINE_list('depths', [], 'layers of the models instead, such as 4,8,16')
STEPS = flags.DEFINE_integer('steps', 5, 'updates before the activations are looked at again')
SEEDS = flags.DEFINE_integer('seeds', 2, 'models of each size, whose logarithms are averaged')
AS_JSON = flags.DEFINE_bool('json', False, 'one JSON object instead of a table')

ROWS, LENGTH = 4, 64  # of the batch, the same in all steps and sizes: random tokens, as frequent as words are (Zipf)
GROWING = {  # what a wider model has more of; heads stay as wide as they are
  AttentionSpec: ('n_heads', 'n_kv_heads'), MlaSpec: ('n_heads', 'q_rank', 'kv_rank'), Mamba2Spec: ('n_heads',),
  DeltaSpec: ('n_heads', 'n_key_heads'), LightningSpec: ('n_heads',), ParallelSpec: (), MlpSpec: ('d_ff',),
  MoeSpec: ('latent',)}
PARTS = {MoeSpec: ('experts', 'shared'), ParallelSpec: ('mixers',)}


def main(config: Experiment) -> int:
  if bool(WIDTHS.value) == bool(DEPTHS.value):
    raise ValueError('give either --widths=64,128,256 or --depths=4,8,16')
  if config.model is None:
    raise ValueError('the config takes its model from a run: coordinate checks start from fresh weights of its own model')
  what, given = ('width', WIDTHS) if WIDTHS.value else ('depth', DEPTHS)
  if not all(size.isdecimal() and int(size) for size in given.value) or len(set(given.value)) < 2:
    raise ValueError(f'--{given.name}={",".join(given.value)}: give two or more different sizes, each at least 1')
  if STEPS.value < 1 or SEEDS.value < 1:
    raise ValueError(f'--steps={STEPS.value} and --seeds={SEEDS.value} must be at least 1')
  started = time.time()
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    found = check(config, what, sorted(map(int, given.value)), STEPS.value, SEEDS.value)
  print(json.dumps(found) if AS_JSON.value else table(found, time.time() - started))
  return 0


def check(config: Experiment, what: str, sizes: list[int], steps: int, seeds: int) -> dict:
  """{'sp': {activation: {'first', 'last', 'change': slope}}, 'mup': the same, 'sizes': …, 'values': what was fitted}.

  what: 'width' or 'depth'. ValueError for a size that the model cannot have.
  """
  models = [scaled(config.model, d_model=size) if what == 'width' else dataclasses.replace(config.model, n_layers=size)
            for size in sizes]
  compute = dataclasses.replace(config.resolved(jax.default_backend()), dtype='float32')
  optim = dataclasses.replace(config.optim, base=None, freeze=(), freeze_layers=0)
  found = {'what': what, 'sizes': sizes, 'steps': steps, 'learning_rate': optim.peak_lr, 'values': {}}
  for kind, base in (('sp', None), ('mup', models[0])):
    logs = []
    for model in models:
      model = model if base is None else parametrised(model, base)
      logs.append(coordinates(model, compute, dataclasses.replace(optim, base=base), steps, seeds))
    found['values'][kind] = {name: {part: [float(np.exp(log[name][part])) for log in logs] for part in log}
                             for name, log in logs[0].items()}
    found[kind] = {name: {part: slope(sizes, [log[name][part] for log in logs]) for part in log}
                   for name, log in logs[0].items()}
  return found


def slope(sizes: list[int], logs: list[float]) -> float:
  """Of a line through (log size, log)."""
  return float(np.polyfit(np.log(sizes), logs, 1)[0])


def table(found: dict, seconds: float) -> str:
  lines = [f'slope of log mean |x| against log {found["what"]}, {", ".join(map(str, found["sizes"]))}: at first, after '
           f'{found["steps"]} steps of learning rate {found["learning_rate"]:g}, and of the change', '',
           f'{"":34}{"SP: first":>10}{"last":>8}{"change":>8}{"µP: first":>12}{"last":>8}{"change":>8}']
  for name, sp in found['sp'].items():
    mup = found['mup'][name]
    lines.append(f'{name:34}{sp["first"]:10.2f}{sp["last"]:8.2f}{sp["change"]:8.2f}'
                 f'{mup["first"]:12.2f}{mup["last"]:8.2f}{mup["change"]:8.2f}')
  most = {kind: max((s[part], name) for name, s in found[kind].items() for part in ('last', 'change'))
          for kind in ('sp', 'mup')}
  return '\n'.join([*lines, '', f'grows most: SP {most["sp"][0]:.2f} ({most["sp"][1]}), µP {most["mup"][0]:.2f} '
                                f'({most["mup"][1]}); {seconds:.0f} s'])


def coordinates(model: DecoderConfig, compute: ComputeConfig, optim: OptimConfig, steps: int, seeds: int
                ) -> dict[str, dict[str, float]]:
  """Of each kind of activation the logarithm of mean |x|: 'first', with fresh weights, 'last', after so many steps, and of
  the 'change'. Averaged over seeds."""
  rank_V = np.arange(1, model.vocab_size + 1)
  tokens_BT = np.random.default_rng(0).choice(model.vocab_size, (ROWS, LENGTH + 1), p=1 / rank_V / np.sum(1 / rank_V))
  tokens_BT = tokens_BT.astype(np.int32)
  ones_BT = np.ones((ROWS, LENGTH), np.int32)
  batch = to_device({'tokens': tokens_BT[:, :-1], 'targets': tokens_BT[:, 1:], 'segment_ids': ones_BT, 'loss_mask': ones_BT,
                     'positions': ones_BT * np.arange(LENGTH, dtype=np.int32), 'source': np.zeros(ROWS, np.int32)})

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    params, opt = state

    def loss(weights):
      total, _, routers = next_token_loss(with_leaves(params, weights), model, compute, LossConfig(), batch)
      return sum((sums['loss'] for sums in routers), total) / ones_BT.size

    weights = named_leaves(params)
    updates, opt = optimizer(optim).update(jax.grad(loss)(weights), opt, weights)
    return with_leaves(params, jax.tree.map(lambda w, u: w - optim.peak_lr * u, weights, updates)), opt

  def begin(seed):
    params = Decoder(model, jax.random.key(seed))
    return params, optimizer(optim).init(named_leaves(params))

  through, logs = layer_program(model, compute), []
  for seed in range(seeds):
    state = jax.jit(begin)(seed)
    first = activations(through, state[0], model, compute, batch)
    for _ in range(steps):
      state = step(state)
    last = activations(through, state[0], model, compute, batch)
    logs.append({name: {'first': _log(first[name]), 'last': _log(last[name]), 'change': _log(last[name] - first[name])}
                 for name in first})
  return jax.tree.map(lambda *values: float(np.mean(values)), *logs)


def _log(x: np.ndarray) -> float:
  return float(np.log(np.mean(np.abs(x)) + 1e-30))


def layer_program(model: DecoderConfig, compute: ComputeConfig):
  """(kind, layer, x, segment ids, positions) -> (what the layer's sublayers make, the stream after it). kind: its place in
  the pattern; each is compiled once."""
  def through(kind, layer, x_BTD, segment_ids_BT, positions_BT):
    rows, spec, made = rows_for(model, compute, segment_ids_BT, positions_BT), model.pattern[kind], {}
    for name, part in spec.parts.items():
      norm = getattr(layer, f'{name}_pre_norm')
      h_BTD = x_BTD if norm is None else norm(model.norm, x_BTD)
      y_BTD = getattr(layer, name)(part, h_BTD, *(() if isinstance(part, MlpSpec) else (rows,)))
      made[name] = y_BTD[0] if isinstance(part, MoeSpec) else y_BTD
      x_BTD, *_ = layer(dataclasses.replace(spec, **{'mlp' if name == 'mixer' else 'mixer': None}), x_BTD, rows)
    return made, x_BTD

  return jax.jit(through, static_argnums=0)


def activations(through, params: Decoder, model: DecoderConfig, compute: ComputeConfig, batch) -> dict[str, np.ndarray]:
  """By kind: embeddings, what each sublayer of the pattern makes (of its layers, stacked), the residual stream at the end,
  and logits. through: `layer_program` of the model."""
  x_BTD = params.embed(model, compute, batch['tokens'], batch['positions'])
  weights = [iter(unstack(stack, count)) for stack, count in zip(params.stacks, stack_sizes(model))]
  found = {'embedding': [x_BTD]}
  for i, stack in enumerate(stack_of_layer(model)):
    kind = i % len(model.pattern)
    made, x_BTD = through(kind, next(weights[stack]), x_BTD, batch['segment_ids'], batch['positions'])
    for name, part in model.pattern[kind].parts.items():
      label = f'{name} of pattern[{kind}], {type(part).__name__.removesuffix("Spec").lower()}'
      found.setdefault(label, []).append(made[name])
  final_BTD = params.final_norm(model.norm, x_BTD) * model.logits_scale
  found |= {'residual stream': [x_BTD], 'logits': [params.logits(model, final_BTD)]}
  return {name: np.stack([np.asarray(x) for x in parts]) for name, parts in found.items()}


def scaled(model: DecoderConfig, d_model: int) -> DecoderConfig:
  """The model at another width: with as many more heads, hidden units and ranks. ValueError where these are not whole."""
  def grown(part, where):
    changes = {}
    for name in GROWING[type(part)]:
      value = getattr(part, name)
      if value is not None:
        if value * d_model % model.d_model:
          raise ValueError(f'{where}.{name}={value} at width {model.d_model} is {value * d_model / model.d_model:g} at '
                           f'width {d_model}: take widths that are multiples of {model.d_model}, or other parts of it')
        changes[name] = value * d_model // model.d_model
    for name in PARTS.get(type(part), ()):
      value = getattr(part, name)
      if isinstance(value, tuple):
        changes[name] = tuple(grown(item, f'{where}.{name}[{i}]') for i, item in enumerate(value))
      elif value is not None:
        changes[name] = grown(value, f'{where}.{name}')
    return dataclasses.replace(part, **changes)

  pattern = tuple(dataclasses.replace(layer, **{name: grown(part, f'model.pattern[{i}].{name}')
                                                for name, part in layer.parts.items()})
                  for i, layer in enumerate(model.pattern))
  return dataclasses.replace(model, d_model=d_model, pattern=pattern)


if __name__ == '__main__':
  flags.run(main, default_config='configs/quickstart.py')
