"""AdamW and the learning rate as a function of tokens."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(kw_only=True, slots=True)
class OptimConfig:
  """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with the decay multiplied by the learning rate.

  peak_lr: highest learning rate. schedule: after a linear warm-up over warmup_tokens, 'wsd' stays at the peak and falls
  linearly over the last decay_tokens, 'cosine' and 'linear' fall all the way; each ends at final_lr_frac * peak_lr.
  weight_decay: on matrices only, not on embeddings, norms, biases, sinks or adapters. clip_norm: of the global gradient.
  freeze: patterns of names of weights that are not trained, such as 'embed_VD' or 'stacks.*.mixer.*'. freeze_layers: nor is
  anything of the first layers.
  """

  peak_lr: float
  schedule: Literal['wsd', 'cosine', 'linear'] = 'wsd'
  warmup_tokens: int = 0
  decay_tokens: int = 0
  final_lr_frac: float = 0.0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  freeze: tuple[str, ...] = ()
  freeze_layers: int = 0

  def check(self, total_tokens: int) -> None:
    """ValueError if the schedule does not fit in a run of that many tokens."""
    decay = self.decay_tokens if self.schedule == 'wsd' else 0
    if self.warmup_tokens + decay > total_tokens:
      raise ValueError(f'optim: warmup_tokens={self.warmup_tokens} + decay_tokens={decay} is more than the '
                       f'{total_tokens} tokens of the run')
    if self.freeze_layers < 0:
      raise ValueError(f'optim.freeze_layers={self.freeze_layers} must be 0 or more')
    if self.schedule != 'wsd' and self.decay_tokens:
      raise ValueError(f'optim.decay_tokens={self.decay_tokens} has no meaning for schedule={self.schedule!r}, which '
                       'decays from the end of the warm-up: set it to 0')


def learning_rate(config: OptimConfig, tokens: jax.Array, total_tokens: int) -> jax.Array:
  """fp32 learning rate for the step that brings the run to `tokens` (fp32) of `total_tokens`."""
  rise = float(config.warmup_tokens)  # floats: as integers JAX would take them for int32
  fall = float(config.decay_tokens if config.schedule == 'wsd' else total_tokens - config.warmup_tokens)
  warm = jnp.minimum(tokens / rise, 1.0) if rise else 1.0
  left = jnp.clip((float(total_tokens) - tokens) / fall, 0.0, 1.0) if fall else 1.0  # exactly 0 at the end
  shape = 0.5 * (1 - jnp.cos(jnp.pi * left)) if config.schedule == 'cosine' else left
  return config.peak_lr * warm * (config.final_lr_frac + (1 - config.final_lr_frac) * shape)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clipping, Adam and decay: updates of unit learning rate, to be *subtracted* times `learning_rate`."""
  return optax.chain(optax.clip_by_global_norm(config.clip_norm),
                     optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
                     optax.add_decayed_weights(config.weight_decay, mask=decayed))


def decayed(weights: dict[str, jax.Array]) -> dict[str, bool]:
  """True for the matrices `w_*` and the head; False for embeddings, norm scales, biases and sinks. By dotted names."""
  return {name: name.rpartition('.')[2].startswith(('w_', 'unembed')) for name in weights}
