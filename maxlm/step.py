"""One training step and one evaluation step: pure functions, used by train, plan and tests alike.

Everything that decides the next step is in `TrainState`, on device. Tokens seen are a function of the step and the
config, so they are not state.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from maxlm import lora
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.optim import OptimConfig, learning_rate, optimizer
from maxlm.sharding import spec
from maxlm.trained import first_rows, put, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  step: jax.Array  # int32: steps done
  params: Decoder  # fp32 master weights
  opt: optax.OptState  # of what is trained (`maxlm.trained`)


@dataclasses.dataclass(kw_only=True, slots=True)
class StepConfig:
  """What a step needs to know. `compute` is resolved; n_sources: sources in the mixture, for the loss of each."""

  model: DecoderConfig
  lora: lora.LoraConfig | None
  compute: ComputeConfig
  optim: OptimConfig
  loss: LossConfig
  tokens_per_step: int
  total_tokens: int
  microbatches: int
  n_sources: int


def init_state(config: StepConfig, key: jax.Array) -> TrainState:
  """Fresh state; the weights depend on the key only, not on the mesh."""
  return begin(config, Decoder(config.model, key), key)


def begin(config: StepConfig, params: Decoder, key: jax.Array) -> TrainState:
  """The state before the first step from these parameters; `key` is for adapters, if there are any."""
  if config.lora is not None:
    params = lora.adapt(params, config.lora, jax.random.fold_in(key, 1))
  rows = first_rows(config.optim, config.model, params)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=optimizer(config.optim).init(take(params, rows)))


def train_step(config: StepConfig, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
  """(next state, metrics) for one batch: the fields of `data_pipeline.pack`, int32 [B, T], and source int32 [B].

  The loss is the mean over the batch's targets that count, however many microbatches it is computed in. Metrics are fp32
  device arrays: loss and loss_by_source (mean nll, nats a token), grad_norm, learning_rate; and tokens_by_source, int32.
  """
  n_tokens = jnp.sum(batch['loss_mask']).astype(jnp.float32)
  grads, sums = gradients(config, state.params, batch, n_tokens)
  lr = learning_rate(config.optim, (state.step + 1).astype(jnp.float32) * config.tokens_per_step, config.total_tokens)
  rows = first_rows(config.optim, config.model, state.params)
  trained = take(state.params, rows)
  updates, opt = optimizer(config.optim).update(grads, state.opt, trained)
  params = put(state.params, rows, jax.tree.map(lambda w, u: w - lr * u, trained, updates))
  metrics = {
    'loss': jnp.sum(sums['nll_by_source']) / n_tokens,
    'loss_by_source': sums['nll_by_source'] / jnp.maximum(sums['tokens_by_source'], 1),
    'tokens_by_source': sums['tokens_by_source'],
    'grad_norm': optax.tree.norm(grads),
    'learning_rate': lr,
  }
  return TrainState(step=state.step + 1, params=params, opt=opt), metrics


def gradients(config: StepConfig, params: Decoder, batch: dict, n_tokens: jax.Array) -> tuple[dict, dict]:
  """Gradient of the batch's mean loss to what is trained, by name, and sums over the batch; in fp32 over microbatches."""
  rows = first_rows(config.optim, config.model, params)

  def loss_fn(trained, part):
    loss_sum, nll_BT = next_token_loss(put(params, rows, trained), config.model, config.compute, config.loss, part)
    return loss_sum / n_tokens, sums_by_source(nll_BT, part, config.n_sources)

  def gradient(part):
    return jax.grad(loss_fn, has_aux=True)(take(params, rows), part)

  if config.microbatches == 1:
    return gradient(batch)
  parts = jax.tree.map(lambda a: interleave(a, config.microbatches), batch)
  shapes = jax.eval_shape(gradient, jax.tree.map(lambda a: a[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)
  total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None), zeros, parts)
  return total


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

  compute: resolved. batch: as of `train_step`, and target_bytes int32 [B, T], 0 where a target does not count.
  """
  _, nll_BT = next_token_loss(params, model, compute, LossConfig(), batch)
  return {'nll': jnp.sum(nll_BT), 'tokens': jnp.sum(batch['loss_mask']), 'bytes': jnp.sum(batch['target_bytes'])}
