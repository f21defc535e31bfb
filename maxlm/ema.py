"""A running mean of the weights: e <- e + (1 - decay) * (w - e), a step at a time, from the weights a run begins with.

It costs one more fp32 copy of what is trained, and stands for the weights that a decayed learning rate would lead to: of a
run at a constant rate it is the model to evaluate, to average and to release (Marin 8B: decay 0.995).
"""

import jax

from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.optim import OptimConfig
from maxlm.trained import not_frozen, put, take


def begin(optim: OptimConfig, model: DecoderConfig, params: Decoder) -> dict[str, jax.Array] | None:
  """Copies of what changes in a run, selection biases included, by name. None: no mean is asked for."""
  if not optim.ema:
    return None
  return {name: w.copy() for name, w in take(params, not_frozen(optim, model, params)).items()}


def step(optim: OptimConfig, model: DecoderConfig, mean: dict[str, jax.Array] | None,
         params: Decoder) -> dict[str, jax.Array] | None:
  """The mean after a step that gave these parameters."""
  if mean is None:
    return None
  with jax.named_scope('ema'):
    weights = take(params, not_frozen(optim, model, params))
    return {name: e + (1 - optim.ema) * (weights[name] - e) for name, e in mean.items()}


def in_place(optim: OptimConfig, model: DecoderConfig, params: Decoder, mean: dict[str, jax.Array]) -> Decoder:
  """The parameters with the mean in the place of what it is the mean of."""
  return put(params, not_frozen(optim, model, params), mean)
