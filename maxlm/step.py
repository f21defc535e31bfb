"""One training step and one evaluation step: pure functions, used by train, plan and tests alike.

Everything that decides the next step is in `TrainState`, on device. Tokens seen are a function of the step and the
config, so they are not state.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from maxlm import diffusion, digest, ema, lora, qk_clip, spikes
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.losses import LossConfig, next_token_loss, observed_loss, router_metrics
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, expert_layers, stack_of_layer
from maxlm.optim import OptimConfig, optimizer
from maxlm.schedule import learning_rate
from maxlm.sharding import spec
from maxlm.trained import BALANCED, first_rows, not_frozen, put, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  step: jax.Array  # int32: steps done
  params: Decoder  # fp32 master weights
  opt: optax.OptState  # of what is trained (`maxlm.trained`)
  recent: spikes.Recent  # the last losses and gradient norms, which decide whether a step is taken
  ema: dict[str, jax.Array] | None = None  # the running mean of the weights, by name (`maxlm.ema`)


@dataclasses.dataclass(kw_only=True, slots=True)
class StepConfig:
  """What a step needs to know. `compute` is resolved; n_sources: sources in the mixture, for the loss of each. total_tokens:
  what the learning rate's schedule is laid over. first_step: of the steps with this config; tokens_before: of their stage,
  that are done before it. seed: of what a step masks, where it does."""

  model: DecoderConfig
  lora: lora.LoraConfig | None
  compute: ComputeConfig
  optim: OptimConfig
  loss: LossConfig
  spikes: spikes.SpikeConfig
  tokens_per_step: int
  total_tokens: int
  microbatches: int
  n_sources: int
  first_step: int = 0
  tokens_before: int = 0
  seed: int = 0


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
  """Fresh state; the weights depend on the key only, not on the mesh."""
  return begin(config, Decoder(config.model, key), key)


def begin(config: StepConfig, params: Decoder, key: jax.Array) -> TrainState:
  """The state before the first step from these parameters; `key` is for adapters, if there are any."""
  if config.lora is not None:
    params = lora.adapt(params, config.lora, jax.random.fold_in(key, 1))
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=new_optimizer(config, params),
                    recent=spikes.no_steps(config.spikes), ema=ema.begin(config.optim, config.model, params))


def new_optimizer(config: StepConfig, params: Decoder) -> optax.OptState:
  """The state of the optimizer before its first step."""
  return optimizer(config.optim).init(take(params, first_rows(config.optim, config.model, params)))


def begin_stage(config: StepConfig, state: TrainState, fresh: bool) -> TrainState:
  """The state before the first step of another stage. fresh: with a new optimizer."""
  return dataclasses.replace(state, recent=spikes.no_steps(config.spikes),
                             opt=new_optimizer(config, state.params) if fresh else state.opt)


def train_step(config: StepConfig, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
  """(next state, metrics) for one batch: the fields of `data_pipeline.pack`, int32 [B, T], and source int32 [B].

  The loss is the mean over the batch's targets that count, however many microbatches it is computed in; of a model with a
  mask token, the estimate of its bound (`maxlm.diffusion`) from masks that are a function of seed and step. A step that
  `spikes.judge` does not take leaves parameters, their mean, selection biases and optimizer state bit for bit as they are;
  the learning rate goes on, for it follows the tokens.

  Metrics are fp32 device arrays: loss and loss_by_source (mean nll, nats a token), grad_norm, learning_rate, of layers with
  experts `losses.router_metrics`, ahead, a list of the mean nll of each prediction further ahead, and of `optim.qk_clip`
  attention, {'max_logit': the largest of the batch}; int32:
  tokens_by_source, skipped and spike (sustained), 0 or 1; and batch_digest.
  """
  n_tokens = jnp.sum(batch['loss_mask']).astype(jnp.float32)
  seen = batch
  if config.model.mask_token is not None:
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    seen = diffusion.corrupted(config.model.mask_token, batch, jax.random.fold_in(key, state.step))
  grads, sums = gradients(config, state.params, seen, n_tokens)
  loss, grad_norm = jnp.sum(sums['nll_by_source']) / n_tokens, optax.tree.norm(grads)
  taken, spike, recent = spikes.judge(config.spikes, state.recent, loss, grad_norm)
  tokens = (state.step + 1 - config.first_step).astype(jnp.float32) * config.tokens_per_step + float(config.tokens_before)
  lr = learning_rate(config.optim, tokens, config.total_tokens)
  rows = first_rows(config.optim, config.model, state.params)

  def updated(params, opt, mean):
    trained = take(params, rows)
    with jax.named_scope('optimizer'):
      updates, opt = optimizer(config.optim).update(grads, opt, trained)
      params = put(params, rows, jax.tree.map(lambda w, u: w - lr * u, trained, updates))
    params = balanced(config, params, sums['routers'])
    if config.optim.qk_clip is not None:
      params = qk_clip.clipped(config.optim.qk_clip, params, sums['max_logits'])
    return params, opt, ema.step(config.optim, config.model, mean, params)

  # A branch, for it writes in place: to select between the old and the new moments costs a copy of both.
  before = state.params, state.opt, state.ema
  params, opt, mean = (jax.lax.cond(taken, updated, lambda *state: state, *before) if config.spikes.sigmas else
                       updated(*before))
  metrics = {
    'loss': loss,
    'loss_by_source': sums['nll_by_source'] / jnp.maximum(sums['tokens_by_source'], 1),
    'tokens_by_source': sums['tokens_by_source'],
    'grad_norm': grad_norm,
    'learning_rate': lr,
    'skipped': (~taken).astype(jnp.int32),
    'spike': spike.astype(jnp.int32),
    'batch_digest': batch_digest(batch),
    'routers': router_metrics(config.model, sums['routers'], n_real(batch)),
    'ahead': [said['nll'] / jnp.maximum(said['tokens'], 1) for said in sums['routers'][len(expert_layers(config.model)):]],
    'attention': qk_clip.metrics(sums['max_logits']),
  }
  return TrainState(step=state.step + 1, params=params, opt=opt, recent=recent, ema=mean), metrics


def batch_digest(batch: dict) -> jax.Array:
  """uint32 [2] of what a step learns from, the same under any sharding: `digest.words` of the fields, one beside another."""
  fields = [batch[name] for name in ('tokens', 'targets', 'segment_ids', 'loss_mask')]
  source_BT = jnp.zeros_like(batch['tokens']) + batch['source'][:, None]
  return digest.words(jnp.stack([*fields, source_BT]))


def gradients(config: StepConfig, params: Decoder, batch: dict, n_tokens: jax.Array) -> tuple[dict, dict]:
  """Gradient of the batch's mean loss to what is trained, by name, and sums over the batch, in fp32 over microbatches; of
  max_logits, which `optim.qk_clip` asks for (`Decoder.observed`), the largest."""
  rows = first_rows(config.optim, config.model, params)

  def loss_fn(trained, part):
    loss_sum, nll_BT, routers, max_logits = observed_loss(
      put(params, rows, trained), config.model, config.compute, config.loss, part,
      max_logits=config.optim.qk_clip is not None)
    loss = loss_sum / n_tokens
    for sums in routers:
      loss += sums['loss'] / n_real(batch)
    return loss, {**sums_by_source(nll_BT, part, config.n_sources), 'routers': routers, 'max_logits': max_logits}

  def gradient(part):
    return jax.grad(loss_fn, has_aux=True)(take(params, rows), part)

  if config.microbatches == 1:
    return gradient(batch)
  parts = jax.tree.map(lambda a: interleave(a, config.microbatches), batch)
  shapes = jax.eval_shape(gradient, jax.tree.map(lambda a: a[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)
  zeros[1]['max_logits'] = jax.tree.map(lambda top_LN: top_LN - jnp.inf, zeros[1]['max_logits'])

  def add(total, part):
    grads, sums = gradient(part)
    largest = jax.tree.map(jnp.maximum, total[1]['max_logits'], sums['max_logits'])
    grads, sums = jax.tree.map(jnp.add, total, (grads, sums))
    return (grads, sums | {'max_logits': largest}), None

  return jax.lax.scan(add, zeros, parts)[0]


def n_real(batch: dict) -> jax.Array:
  """Tokens of a batch that are not padding, fp32."""
  return jnp.maximum(jnp.sum(batch['segment_ids'] > 0), 1).astype(jnp.float32)


def balanced(config: StepConfig, params: Decoder, routers: list[dict[str, jax.Array]]) -> Decoder:
  """The parameters with each selection bias a step of `loss.bias_rate` towards the experts that got less than the mean of
  the whole batch (arXiv 2408.15664, algorithm 1), where it is not frozen. routers: `losses.router_sums` of the batch."""
  free = not_frozen(config.optim, config.model, params)
  rows = {name: first for name, first in free.items() if name.endswith(BALANCED)}
  leaves, moved, stack_of = named_leaves(params), {}, stack_of_layer(config.model)
  for name, first in rows.items():
    if name.startswith('mtp.'):
      load_E = routers[len(expert_layers(config.model)) + int(name.split('.')[1])]['load_LE'][0]
      step_E = config.loss.bias_rate * jnp.sign(jnp.mean(load_E) - load_E)
      moved[name] = leaves[name] + jax.reshard(step_E, jax.typeof(leaves[name]).sharding.spec)
      continue
    stack = [i for i, s in enumerate(stack_of) if s == int(name.split('.')[1])]
    kinds = [(layers, sums['load_LE']) for (_, layers), sums in zip(expert_layers(config.model), routers)
             if {*layers} & {*stack}]
    known = [i for layers, _ in kinds for i in layers]
    load_LE = jnp.concatenate([load_LE for _, load_LE in kinds])[jnp.array([known.index(i) for i in stack])]
    step_LE = config.loss.bias_rate * jnp.sign(jnp.mean(load_LE, axis=1, keepdims=True) - load_LE)
    step_LE = jnp.where(jnp.arange(len(stack))[:, None] < first, 0, step_LE)
    moved[name] = leaves[name] + jax.reshard(step_LE, jax.typeof(leaves[name]).sharding.spec)
  return with_leaves(params, leaves | moved) if moved else params


def interleave(array: jax.Array, n: int) -> jax.Array:
  """[B, …] -> [n, B/n, …]: microbatch m takes rows m, m+n, … so that every device keeps the rows it has."""
  dims = 'BT'[:array.ndim]
  split = array.reshape(array.shape[0] // n, n, *array.shape[1:], out_sharding=jax.P(*spec(dims)[:1], None, *spec(dims)[1:]))
  return jnp.swapaxes(split, 0, 1)


def sums_by_source(nll_BT: jax.Array, batch: dict, n_sources: int) -> dict[str, jax.Array]:
  """Sums of nll (fp32) and of targets that count (int32, exact) in the rows of each source: [n_sources], on all devices."""
  is_of_BX = batch['source'][:, None] == jnp.arange(n_sources)
  def by_source(row_B):
    return jnp.einsum('B,BX->X', row_B, is_of_BX.astype(row_B.dtype), out_sharding=jax.P(None), precision='highest')
  counted_B = jnp.sum(batch['loss_mask'], axis=1)
  return {'nll_by_source': by_source(jnp.sum(nll_BT, axis=1)), 'tokens_by_source': by_source(counted_B)}


def eval_step(model: DecoderConfig, compute: ComputeConfig, params: Decoder, batch: dict) -> dict[str, jax.Array]:
  """Sums over the targets of a batch that count: nll (nats), tokens, and bytes of the text they stand for.

  compute: resolved. batch: as of `train_step`, and target_bytes int32 [B, T], 0 where a target does not count. Of a model
  with a mask token, nll is an estimate of its upper bound from `diffusion.DRAWS` masks that are always the same ones.
  """
  def nll(batch):
    return jnp.sum(next_token_loss(params, model, compute, LossConfig(), batch)[1])

  if model.mask_token is None:
    total = nll(batch)
  else:
    total = jnp.mean(jax.lax.map(nll, diffusion.draws(model.mask_token, batch, diffusion.DRAWS)))
  return {'nll': total, 'tokens': jnp.sum(batch['loss_mask']), 'bytes': jnp.sum(batch['target_bytes'])}
