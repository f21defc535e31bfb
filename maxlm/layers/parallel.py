"""Mixers side by side: each sees the same input, and their outputs are added (Falcon-H1, arXiv 2507.22448)."""

import dataclasses

import jax
from flax import nnx

from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rows import Past, Rows


@dataclasses.dataclass(kw_only=True, slots=True)
class ParallelSpec:
  """mixers: at least two."""

  mixers: tuple[AttentionSpec | Mamba2Spec, ...]

  def check(self, where: str) -> None:
    """ValueError, beginning with `where`, for what has no meaning."""
    if len(self.mixers) < 2:
      raise ValueError(f'{where}.mixers: {len(self.mixers)} of them; side by side there are two or more')
    for i, mixer in enumerate(self.mixers):
      mixer.check(f'{where}.mixers[{i}]')

  def split_dims(self) -> dict[str, tuple[str, int]]:
    return {f'mixers[{i}].{field}': split
            for i, mixer in enumerate(self.mixers) for field, split in mixer.split_dims().items()}

  def matmul_params(self, d_model: int) -> int:
    return sum(mixer.matmul_params(d_model) for mixer in self.mixers)

  def mixing_flops(self, tokens: int, pairs) -> float:
    return sum(mixer.mixing_flops(tokens, pairs) for mixer in self.mixers)

  def build(self, d_model: int, norm: NormSpec, rngs: nnx.Rngs) -> 'Parallel':
    return Parallel(self, d_model, norm, rngs)

  def empty_cache(self, batch: int, length: int, dtype) -> tuple:
    return tuple(mixer.empty_cache(batch, length, dtype) for mixer in self.mixers)


class Parallel(nnx.Module):
  """Weights of the mixers, in their order: mixers.0, mixers.1, …"""

  def __init__(self, spec: ParallelSpec, d_model: int, norm: NormSpec, rngs: nnx.Rngs):
    self.mixers = nnx.List([mixer.build(d_model, norm, rngs) for mixer in spec.mixers])

  def __call__(self, spec: ParallelSpec, x_BTD: jax.Array, rows: Rows) -> jax.Array:
    return sum(mixer(part, x_BTD, rows) for mixer, part in zip(self.mixers, spec.mixers))

  def observed(self, spec: ParallelSpec, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The same, and the largest logit of each head, [N], of the mixers that are attention: {'.mixers.0': …}."""
    done = [mixer.observed(part, x_BTD, rows) if isinstance(part, AttentionSpec) else (mixer(part, x_BTD, rows), {})
            for mixer, part in zip(self.mixers, spec.mixers)]
    tops = {f'.mixers.{i}{name}': top_N for i, (_, tops) in enumerate(done) for name, top_N in tops.items()}
    return sum(y_BTD for y_BTD, _ in done), tops

  def extend(self, spec: ParallelSpec, x_BTD: jax.Array, rows: Rows, cache: tuple, past: Past) -> tuple[jax.Array, tuple]:
    """As `__call__` for new tokens that continue those in the caches."""
    done = [mixer.extend(part, x_BTD, rows, c, past) for mixer, part, c in zip(self.mixers, spec.mixers, cache)]
    return sum(y_BTD for y_BTD, _ in done), tuple(cache for _, cache in done)
