"""The learning rate as a function of tokens.

A stage of a run (a run is one stage or several) warms up, stays and falls; the next one begins anew. Tokens are counted from
the beginning of the stage.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(kw_only=True, slots=True)
class Schedule:
  """peak_lr: highest learning rate. schedule: after a linear warm-up over warmup_tokens, which begins at warmup_from_lr,
  'wsd' stays at the peak and falls over the last decay_tokens, 'cosine' and 'linear' fall all the way; each ends at
  final_lr_frac * peak_lr. decay_shape: how 'wsd' falls: 'linear'; 'cosine'; 'half_cosine', the second half of one, for a
  cosine that is stretched on its way; 'sqrt', 1 - sqrt(share of the decay that is over) (Hägele et al. 2024,
  arXiv 2405.18392, section 3.2).

  horizon_tokens: what the schedule is laid over, where that is longer than the stage: a cosine that is cut short. Then
  end_lr has to say what the learning rate is at the end of the stage, and the run is refused if it is not that.
  """

  peak_lr: float = 0.0
  schedule: Literal['wsd', 'cosine', 'linear'] = 'wsd'
  warmup_tokens: int = 0
  warmup_from_lr: float = 0.0
  decay_tokens: int = 0
  decay_shape: Literal['linear', 'cosine', 'half_cosine', 'sqrt'] = 'linear'
  final_lr_frac: float = 0.0
  horizon_tokens: int | None = None
  end_lr: float | None = None

  def check_schedule(self, total_tokens: int, where: str = 'optim') -> None:
    """ValueError if the schedule does not end with a stage of that many tokens. where: the config's key of it."""
    decay, horizon = self.decay_tokens if self.schedule == 'wsd' else 0, self.horizon_tokens or total_tokens
    if min(self.warmup_tokens, self.decay_tokens, self.peak_lr, self.warmup_from_lr, self.final_lr_frac) < 0:
      raise ValueError(f'{where}: a learning rate or a number of tokens is negative')
    for name, unset in (('decay_tokens', 0), ('decay_shape', 'linear')):
      if self.schedule != 'wsd' and getattr(self, name) != unset:
        raise ValueError(f'{where}.{name}={getattr(self, name)} has no meaning for schedule={self.schedule!r}, which decays '
                         f'from the end of the warm-up: set it to {unset}')
    if self.warmup_tokens + decay > horizon:
      raise ValueError(f'{where}: warmup_tokens={self.warmup_tokens} + decay_tokens={decay} is more than the '
                       f'{horizon} tokens of the {"horizon" if self.horizon_tokens else "run or stage"}')
    if self.horizon_tokens is not None and self.horizon_tokens < total_tokens:
      raise ValueError(f'{where}.horizon_tokens={self.horizon_tokens} ends before the {total_tokens:,} tokens of the stage')
    if not self.peak_lr:
      raise ValueError(f'{where}.peak_lr is not set')
    end = rate_at(self, total_tokens, horizon)
    if self.horizon_tokens is not None and self.end_lr is None:
      raise ValueError(f'{where}: the decay is laid over {horizon:,} tokens and the stage has {total_tokens:,}, so it ends '
                       f'at {end:.4g}: leave horizon_tokens out, or say end_lr={end:.4g} if that is meant')
    if self.end_lr is not None and abs(end - self.end_lr) > 0.01 * max(end, self.end_lr):
      raise ValueError(f'{where}: the learning rate ends at {end:.4g} after {total_tokens:,} tokens, not at '
                       f'end_lr={self.end_lr:.4g}: set horizon_tokens (or warm-up, decay and final_lr_frac) so that it does')


def learning_rate(config: Schedule, tokens: jax.Array, total_tokens: int) -> jax.Array:
  """fp32 learning rate of the step that brings a stage to `tokens` (fp32) of the `total_tokens` its schedule is over."""
  rise = float(config.warmup_tokens)  # floats: as integers JAX would take them for int32
  fall = float(config.decay_tokens if config.schedule == 'wsd' else total_tokens - config.warmup_tokens)
  warm = jnp.minimum(tokens / rise, 1.0) if rise else 1.0
  left = jnp.clip((float(total_tokens) - tokens) / fall, 0.0, 1.0) if fall else 1.0  # exactly 0 at the end
  how = config.decay_shape if config.schedule == 'wsd' else config.schedule
  if how == 'cosine':
    left = 0.5 * (1 - jnp.cos(jnp.pi * left))
  if how == 'half_cosine':
    left = 1 - jnp.sin(0.5 * jnp.pi * (1 - left))
  if how == 'sqrt':
    left = 1 - jnp.sqrt(1 - left)
  falling = config.final_lr_frac + (1 - config.final_lr_frac) * left
  if config.warmup_from_lr:
    return (config.warmup_from_lr + (config.peak_lr - config.warmup_from_lr) * warm) * falling
  return config.peak_lr * warm * falling


def rate_at(config: Schedule, tokens: int, total_tokens: int) -> float:
  """The same for people."""
  return float(learning_rate(config, jnp.float32(tokens), total_tokens))
