"""Optimizers: what is done with a gradient. The learning rate is of `maxlm.schedule`."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from maxlm.models.decoder import DecoderConfig
from maxlm.muon import is_matrix, scale_by_muon
from maxlm.parametrisation import in_units_of_base
from maxlm.schedule import Schedule


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig(Schedule):
  """optimizer: 'adamw' (Loshchilov & Hutter 2019, arXiv 1711.05101); 'muon' (`maxlm.muon`) for the matrices of layers and
  AdamW for the rest; 'ademamix' (Pagliardini et al. 2024, arXiv 2409.03137), AdamW with a second, slow mean of gradients.
  The decay of each is multiplied by the learning rate, which is that of the `Schedule`; stages of a run (`maxlm.stages`)
  have schedules of their own.

  weight_decay: on matrices only, not on embeddings, norms, biases, sinks or adapters. clip_norm: of the global gradient.
  freeze: patterns of names of weights that are not trained, such as 'embed_VD' or 'stacks.*.mixer.*'. freeze_layers: nor is
  anything of the first layers.

  cautious: of an update, only what points the way of the step's own gradient is kept, and made larger by as much (Liang et
  al. 2024, arXiv 2411.16085). b3, slow_weight: decay of AdEMAMix's slow mean a step, and how many times it counts (its
  alpha); both rise over slow_warmup_steps, which in the paper are all. ema: decay a step of a running mean of the weights,
  which begins as the weights and is evaluated beside them (0: none).

  qk_clip: the largest logit of a head of attention; a head that has exceeded it in a step's batch has its queries and keys
  made smaller after the step's update (`maxlm.qk_clip`; None: logits are as large as they get).

  base: the model that learning rate and eps are for, of which this one is a wider or deeper one (`maxlm.parametrisation`;
  None: they are for this one).
  """

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  freeze: tuple[str, ...] = ()
  freeze_layers: int = 0
  optimizer: Literal['adamw', 'muon', 'ademamix'] = 'adamw'
  cautious: bool = False
  b3: float = 0.9999
  slow_weight: float = 8.0
  slow_warmup_steps: int = 0
  ema: float = 0.0
  qk_clip: float | None = None
  base: DecoderConfig | None = None

  def check(self, total_tokens: int) -> None:
    """ValueError for what has no meaning in a run, or stage, of that many tokens."""
    self.check_schedule(total_tokens)
    if self.freeze_layers < 0:
      raise ValueError(f'optim.freeze_layers={self.freeze_layers} must be 0 or more')
    self.check_optimizer()
    if self.qk_clip is not None and (self.freeze or self.freeze_layers):
      raise ValueError('optim.qk_clip changes queries and keys of every layer: leave optim.freeze and freeze_layers out, or '
                       'qk_clip')
    if self.base is not None and (self.freeze or self.freeze_layers):
      raise ValueError('optim.base is for a model that is trained whole: leave optim.freeze and freeze_layers out, or base')

  def check_optimizer(self) -> None:
    """ValueError for what has no meaning."""
    if self.optimizer not in ('adamw', 'muon', 'ademamix'):
      raise ValueError(f'optim.optimizer={self.optimizer!r} is none of adamw, muon, ademamix')
    if self.optimizer == 'ademamix' and not (0 < self.b1 <= self.b3 < 1 and self.slow_weight >= 0):
      raise ValueError(f'optim: AdEMAMix needs 0 < b1={self.b1} <= b3={self.b3} < 1 and slow_weight={self.slow_weight} >= 0')
    if self.slow_warmup_steps and (self.optimizer != 'ademamix' or self.slow_warmup_steps < 0):
      raise ValueError(f'optim.slow_warmup_steps={self.slow_warmup_steps}: 0 or more, and only AdEMAMix has it: set it to 0')
    if not 0 <= self.ema < 1:
      raise ValueError(f'optim.ema={self.ema} is a decay a step: 0 (no mean of the weights), or less than 1, such as 0.999')
    if self.qk_clip is not None and self.qk_clip <= 0:
      raise ValueError(f'optim.qk_clip={self.qk_clip} is the largest logit of a head: more than 0, such as 100, or None')


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clipping, the optimizer and decay: updates of unit learning rate, to be *subtracted* times `learning_rate`.

  Of trees {name: array}, as `trained.take` gives them.
  """
  rule = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.optimizer == 'muon':
    rule = scale_by_muon(rule)
  if config.optimizer == 'ademamix':
    b3, weight = slow_schedules(config)
    rule = optax.contrib.scale_by_ademamix(b1=config.b1, b2=config.b2, b3=b3, alpha=weight, eps=config.eps)
  if config.base is not None:
    rule = in_units_of_base(rule, config.base, orthogonal=is_matrix if config.optimizer == 'muon' else lambda name: False)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), cautious(rule) if config.cautious else rule,
                     optax.add_decayed_weights(config.weight_decay, mask=decayed))


def slow_schedules(config: OptimConfig):
  """AdEMAMix's b3 and weight as functions of the steps done (arXiv 2409.03137, section 3): over slow_warmup_steps the weight
  rises linearly from 0, and the half-life of the slow mean from that of b1."""
  def part(done):
    return jnp.minimum((done + 1) / max(config.slow_warmup_steps, 1), 1.0)

  def b3(done):
    fast, slow = math.log(config.b1), math.log(config.b3)
    return jnp.exp(fast * slow / ((1 - part(done)) * slow + part(done) * fast))

  return b3, lambda done: config.slow_weight * part(done)


def cautious(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """The rule's updates where their sign is the gradient's and 0 elsewhere, over the share of a layer's weight that is left
  (arXiv 2411.16085, algorithm 2; at least a thousandth, as in the authors' code)."""
  def update(grads, state, weights=None):
    def masked(name, u, g):
      kept = (u * g > 0).astype(u.dtype)
      share = jnp.mean(kept, axis=range(int(name.startswith('stacks.')), u.ndim), keepdims=True)
      return u * kept / jnp.maximum(share, 1e-3)

    updates, state = rule.update(grads, state, weights)
    return {name: masked(name, u, grads[name]) for name, u in updates.items()}, state

  return optax.GradientTransformation(rule.init, update)


def decayed(weights: dict[str, jax.Array]) -> dict[str, bool]:
  """True for the matrices `w_*` and the head; False for embeddings, norm scales, biases and sinks. By dotted names."""
  return {name: name.rpartition('.')[2].startswith(('w_', 'unembed')) for name in weights}
