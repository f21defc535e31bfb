"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353): a few weights beside the many.

An adapted weight W of [inputs, outputs] is used as W + s A B, with A [inputs, rank], B [rank, outputs] and s = alpha / rank.
B begins at zero, so a model begins as what it was. With DoRA each column of the sum has a learned length, which begins as
that of W's. Products never make the sum: `ops.einsum` has them. Nothing but A, B and these lengths is trained.

Any matrix `w_*` of a layer that goes through `ops.einsum` can be adapted. Not experts and routers, whose products are made
elsewhere, nor what is no matrix: embeddings, which are looked up, and the convolutions of recurrent layers.

L layers  A rank
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.layers.param import constant, normal
from maxlm.models.decoder import Decoder
from maxlm.ops.einsum import Adapted, column_lengths, in_and_out
from maxlm.sharding import spec
from maxlm.trained import is_adapter, matching


@dataclasses.dataclass(kw_only=True, slots=True)
class LoraConfig:
  """rank: of A and B. alpha: A B counts alpha / rank times. targets: patterns of the names of weights that are adapted, such
  as '*.mixer.w_q_*' (empty: all that can be). dora: learn the lengths of columns too."""

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = ()
  dora: bool = False

  def check(self) -> None:
    """ValueError for what has no meaning. `adapt` checks the targets, where the weights are known."""
    if self.rank < 1 or self.alpha <= 0:
      raise ValueError(f'lora.rank={self.rank} must be at least 1, and lora.alpha={self.alpha} more than 0')


class AdaptedWeight(nnx.Module):
  """A stack of weights [L, …] and their adapters, in the place of the weights."""

  def __init__(self, base: nnx.Param, dims: str, config: LoraConfig, rngs: nnx.Rngs):
    """dims: of one layer's weight."""
    ins, outs = in_and_out(dims)
    sizes = dict(zip('L' + dims, base.shape)) | {'A': config.rank}
    shape = lambda letters: tuple(sizes[letter] for letter in letters)
    self.base = base
    self.lora_a = normal(rngs, f'L{ins}A', shape(f'L{ins}A'), math.prod(shape(ins))**-0.5)
    self.lora_b = constant(f'LA{outs}', shape(f'LA{outs}'), 0.0)
    self.scale = config.alpha / config.rank
    self.lora_magnitude = nnx.Param(self.lengths(dims)) if config.dora else None

  def __getitem__(self, index) -> Adapted:
    """What `ops.einsum` is given, as a weight without adapters is: w[...]."""
    assert index is Ellipsis
    magnitude = None if self.lora_magnitude is None else self.lora_magnitude[...]
    return Adapted(self.base[...], self.lora_a[...], self.lora_b[...], self.scale, magnitude)

  def lengths(self, dims: str) -> jax.Array:
    """[L, outputs]: of the columns of W + s A B."""
    return jax.vmap(functools.partial(column_lengths, dims, scale=self.scale))(
      self.base[...], self.lora_a[...], self.lora_b[...])

  def merged(self, dims: str) -> nnx.Param:
    """The weights that do the same without adapters: fp32 [L, …]."""
    ins, outs = in_and_out(dims)
    weight = self.base[...] + self.scale * jnp.einsum(
      f'L{ins}A,LA{outs}->L{dims}', self.lora_a[...], self.lora_b[...], precision='highest', out_sharding=spec(f'L{dims}'))
    if self.lora_magnitude is not None:
      factor = self.lora_magnitude[...] / self.lengths(dims)
      weight *= jnp.expand_dims(factor, range(1, 1 + len(ins)))
    return nnx.Param(weight)


def adapt(params: Decoder, config: LoraConfig, key: jax.Array) -> Decoder:
  """The model with adapters drawn from `key`, which compute nothing yet. ValueError for targets that cannot be adapted."""
  params = jax.tree.map(lambda w: w, params)  # the caller's modules stay what they are
  for i, name in enumerate(targets(list(named_leaves(params)), config)):
    module, attribute = _place(params, name)
    weight = AdaptedWeight(getattr(module, attribute), _dims(name), config, nnx.Rngs(jax.random.fold_in(key, i)))
    setattr(module, attribute, weight)
  return params


def targets(names: list[str], config: LoraConfig) -> list[str]:
  """Those of the names of weights that are adapted. ValueError, in one line, for a pattern that reaches others."""
  able = [name for name in names if can_be_adapted(name)]
  for pattern in config.targets:
    if unable := [name for name in matching(names, pattern, 'lora.targets') if name not in able]:
      raise ValueError(f'lora.targets: {pattern!r} matches {unable[0]}, which cannot have an adapter: only the matrices w_* '
                       'of layers can, and not those of experts and routers; narrow the pattern')
  wanted = {name for pattern in config.targets for name in matching(names, pattern, 'lora.targets')}
  return [name for name in able if name in wanted] if config.targets else able


def can_be_adapted(name: str) -> bool:
  dims = _dims(name)
  return name.startswith('stacks.') and name.rpartition('.')[2].startswith('w_') and len(dims) > 1 and 'E' not in dims


def merge(params: Decoder) -> Decoder:
  """The model without adapters that computes the same."""
  names = [name.removesuffix('.base') for name in named_leaves(params) if name.endswith('.base')]
  params = jax.tree.map(lambda w: w, params)
  for name in names:
    module, attribute = _place(params, name)
    setattr(module, attribute, getattr(module, attribute).merged(_dims(name)))
  return params


def adapters(params: Decoder) -> dict[str, jax.Array]:
  """The leaves that training changes and a checkpoint holds, by name."""
  return {name: leaf for name, leaf in named_leaves(params).items() if is_adapter(name)}


def assemble(like: Decoder, base: Decoder, trained: dict[str, jax.Array]) -> Decoder:
  """A model with adapters from one without and their leaves. like: of its structure."""
  whole = named_leaves(base)
  return with_leaves(like, {name: trained[name] if is_adapter(name) else whole[name.removesuffix('.base')]
                            for name in named_leaves(like)})


def _place(params: Decoder, name: str) -> tuple[nnx.Module, str]:
  """(module, attribute) of a weight: 'stacks.0.mixer.w_q_DNH' is the attribute w_q_DNH of params.stacks[0].mixer."""
  *path, attribute = name.split('.')
  step = lambda module, part: module[int(part)] if part.isdecimal() else getattr(module, part)
  return functools.reduce(step, path, params), attribute


def _dims(name: str) -> str:
  return name.rpartition('_')[2]
