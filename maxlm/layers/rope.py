"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and the ways to stretch it to longer contexts.

B batch  T time  N heads  H head dim  R rotated dims of a head, the first ones
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(kw_only=True, slots=True)
class LinearScaling:
  """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

  factor: float


@dataclasses.dataclass(kw_only=True, slots=True)
class Llama3Scaling:
  """Divides slow frequencies by `factor`, keeps fast ones, and blends between (Llama 3.1). A frequency is slow if it turns
  less than low_turns times over original_length positions, fast if more than high_turns times."""

  factor: float
  low_turns: float = 1.0
  high_turns: float = 4.0
  original_length: int


@dataclasses.dataclass(kw_only=True, slots=True)
class YarnScaling:
  """YaRN (Peng et al. 2023, arXiv 2309.00071): as Llama 3's, but blended over the index of the frequency between those that
  turn fast_turns and slow_turns times. truncate: that range is widened to whole indices. amplitude: of cos and sin; None
  is the paper's 0.1 ln(factor) + 1."""

  factor: float
  original_length: int
  fast_turns: float = 32.0
  slow_turns: float = 1.0
  truncate: bool = True
  amplitude: float | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class LongRopeScaling:
  """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor for each of the R/2 frequencies; amplitude of cos and sin."""

  divisors: tuple[float, ...]
  amplitude: float = 1.0


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclasses.dataclass(kw_only=True, slots=True)
class RopeSpec:
  """theta: base of the frequencies. fraction: of a head's dims that are rotated, the first ones. interleaved: pairs are
  (2i, 2i + 1) rather than (i, i + R/2)."""

  theta: float = 10_000.0
  fraction: float = 1.0
  interleaved: bool = False
  scaling: Scaling | None = None

  def rotated(self, head_dim: int) -> int:
    """R: dims of a head that are rotated."""
    return int(head_dim * self.fraction)

  def check(self, where: str, head_dim: int) -> None:
    """ValueError if a head of that many dims cannot be rotated so."""
    if not 0 < self.fraction <= 1:
      raise ValueError(f'{where}.fraction={self.fraction} must be more than 0 and at most 1')
    rotated = self.rotated(head_dim)
    if rotated % 2 or not 0 < rotated <= head_dim:
      raise ValueError(f'{where}: {rotated} of {head_dim} dims of a head to rotate: it must be an even number of them')
    if isinstance(self.scaling, LongRopeScaling) and len(self.scaling.divisors) != rotated // 2:
      raise ValueError(f'{where}.scaling.divisors: {len(self.scaling.divisors)} of them for {rotated // 2} frequencies')


def frequencies(spec: RopeSpec, head_dim: int) -> tuple[np.ndarray, float]:
  """(radians a position of each pair, fp32 [R/2]; amplitude of cos and sin)."""
  R = spec.rotated(head_dim)
  frequency_R = np.float32(1.0) / spec.theta ** (np.arange(0, R, 2, dtype=np.float32) / R)
  match spec.scaling:
    case None:
      return frequency_R, 1.0
    case LinearScaling(factor=factor):
      return frequency_R / np.float32(factor), 1.0
    case LongRopeScaling(divisors=divisors, amplitude=amplitude):
      return frequency_R / np.asarray(divisors, np.float32), amplitude
    case Llama3Scaling() as s:
      turns_R = s.original_length * frequency_R / (2 * math.pi)
      keep_R = np.clip((turns_R - s.low_turns) / (s.high_turns - s.low_turns), 0, 1)
      return (keep_R * frequency_R + (1 - keep_R) * frequency_R / s.factor).astype(np.float32), 1.0
    case YarnScaling() as s:
      def index_that_turns(turns):
        return R * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))
      low, high = index_that_turns(s.fast_turns), index_that_turns(s.slow_turns)
      if s.truncate:
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, R - 1)
      stretch_R = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
      amplitude = 0.1 * math.log(s.factor) + 1 if s.amplitude is None else s.amplitude
      return (stretch_R * frequency_R / s.factor + (1 - stretch_R) * frequency_R).astype(np.float32), amplitude


def rope_table(positions_BT: jax.Array, spec: RopeSpec, head_dim: int) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), each fp32 [B, T, 1, R/2], for angles position * frequency."""
  frequency_R, amplitude = frequencies(spec, head_dim)
  angle_BTNR = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_R
  return jnp.cos(angle_BTNR) * amplitude, jnp.sin(angle_BTNR) * amplitude


def rotate(x_BTNH: jax.Array, spec: RopeSpec, table: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotates the pairs of each head by its token's angles, in fp32; result in the dtype of x."""
  cos, sin = table
  R = 2 * cos.shape[-1]
  x_BTNR = x_BTNH[..., :R].astype(jnp.float32)
  if spec.interleaved:
    first, second = x_BTNR[..., 0::2], x_BTNR[..., 1::2]
  else:
    first, second = jnp.split(x_BTNR, 2, axis=-1)
  pair = first * cos - second * sin, second * cos + first * sin
  if spec.interleaved:
    y_BTNR = jnp.stack(pair, axis=-1).reshape(x_BTNR.shape)
  else:
    y_BTNR = jnp.concatenate(pair, axis=-1)
  y_BTNR = y_BTNR.astype(x_BTNH.dtype)
  return y_BTNR if R == x_BTNH.shape[-1] else jnp.concatenate([y_BTNR, x_BTNH[..., R:]], axis=-1)
