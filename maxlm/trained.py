"""Which weights are trained. The others have neither gradients nor optimizer state.

What is trained is a leaf of the parameters under its dotted name ('stacks.0.mixer.w_q_DNH'), or, where the first layers
are frozen, the rows of a stack that belong to the other layers.
"""

import difflib
import fnmatch
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.models.decoder import Decoder, DecoderConfig, stack_of_layer
from maxlm.optim import OptimConfig

BALANCED = 'select_bias_E'  # no gradient trains it: `step.balanced` moves it
ADAPTERS = ('lora_a', 'lora_b', 'lora_magnitude')  # leaves of `maxlm.lora`: where there are any, they alone are trained


def is_adapter(name: str) -> bool:
  return name.rpartition('.')[2] in ADAPTERS


def first_rows(optim: OptimConfig, model: DecoderConfig, params: Decoder) -> dict[str, int]:
  """Of each leaf that is trained by gradients: name -> the row of its stack from which on it is (0: all of it).

  ValueError for a pattern of `optim.freeze` that no weight matches, and where nothing is left to train.
  """
  rows = {name: first for name, first in not_frozen(optim, model, params).items() if not name.endswith(BALANCED)}
  if not rows:
    raise ValueError(f'optim.freeze={optim.freeze} and optim.freeze_layers={optim.freeze_layers} leave nothing to train')
  return rows


def not_frozen(optim: OptimConfig, model: DecoderConfig, params: Decoder) -> dict[str, int]:
  """The same of each leaf that may change at all. ValueError for a pattern that no weight matches."""
  names = list(named_leaves(params))
  frozen = {name for pattern in optim.freeze for name in matching(names, pattern, 'optim.freeze')}
  if any(map(is_adapter, names)):
    frozen |= {name for name in names if not is_adapter(name)}
  stack_of, rows = stack_of_layer(model), {}
  for name in names:
    if name not in frozen:
      stack = int(name.split('.')[1]) if name.startswith('stacks.') else None
      rows[name] = stack_of[:optim.freeze_layers].count(stack)
      if stack is not None and rows[name] == stack_of.count(stack):
        del rows[name]
  return rows


def matching(names: Sequence[str], pattern: str, key: str) -> list[str]:
  """The names that a pattern with * and ? matches. ValueError, with names like it, if there are none. key: of the config."""
  found = fnmatch.filter(names, pattern)
  if not found:
    near = difflib.get_close_matches(pattern.rpartition('.')[2].strip('*'), {name.rpartition('.')[2] for name in names}, n=3)
    known = near or [name.rpartition('.')[2] for name in names[:3]] + ['…']
    raise ValueError(f'{key}: no weight matches {pattern!r}; there are {", ".join(known)}; names are whole ones, '
                     f'such as {names[-1]!r}, and * stands for any part')
  return found


def take(params: Decoder, rows: dict[str, int]) -> dict[str, jax.Array]:
  """What is trained of the parameters, by name."""
  leaves = named_leaves(params)
  return {name: leaves[name][first:] if first else leaves[name] for name, first in rows.items()}


def put(params: Decoder, rows: dict[str, int], trained: dict[str, jax.Array]) -> Decoder:
  """The parameters with that in its place."""
  leaves = named_leaves(params)
  return with_leaves(params, {name: jnp.concatenate([leaves[name][:first], trained[name]]) if first else trained[name]
                              for name, first in rows.items()})
