"""Published weights of 8 and 4 bits, as the numbers they stand for. Nothing is written in these formats.

fp8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): `x.weight` in e4m3 and `x.weight_scale_inv`, a factor for each block of
`weight_block_size` = [rows, columns]. mxfp4 (OCP Microscaling v1.0; gpt-oss): `x_blocks` uint8 [E, rows, blocks, 16], two
e2m1 numbers a byte, the low half first, and `x_scales` uint8 [E, rows, blocks], the exponent of two of each block.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from maxlm.hf.tensors import Stored

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
PAIRS = np.stack(np.meshgrid(*[np.concatenate([E2M1, -E2M1])] * 2, indexing='ij')[::-1], axis=-1).reshape(256, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class BlockFp8:
  """dtype: what it is kept in; `array` is fp32, for a product of two such numbers may need more bits."""

  weight: Stored
  scale: Stored
  block: tuple[int, int]
  dtype: np.dtype = BFLOAT16

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def nbytes(self) -> int:
    return self.weight.nbytes + self.scale.nbytes

  def array(self) -> np.ndarray:
    scale = self.scale.array().astype(np.float32)
    for axis, (size, block) in enumerate(zip(self.shape, self.block)):
      scale = np.repeat(scale, block, axis).take(np.arange(size), axis)
    return self.weight.array().astype(np.float32) * scale


@dataclasses.dataclass(frozen=True, slots=True)
class Mxfp4:
  """A stack of matrices [E, columns, rows], that is, with the last two dims the other way round than they are stored."""

  blocks: Stored
  scales: Stored
  dtype: np.dtype = BFLOAT16

  @property
  def shape(self) -> tuple[int, ...]:
    experts, rows, blocks, _ = self.blocks.shape
    return experts, blocks * 32, rows

  @property
  def nbytes(self) -> int:
    return self.blocks.nbytes + self.scales.nbytes

  def array(self) -> np.ndarray:
    """bfloat16, which holds all of these numbers."""
    experts, columns, rows = self.shape
    out = np.empty((experts, rows, columns // 32, 16, 2), BFLOAT16)
    for e in range(experts):  # a temporary array of one matrix
      powers = np.ldexp(np.float32(1), self.scales.array()[e].astype(np.int32) - 127)
      out[e] = PAIRS[self.blocks.array()[e]] * powers[..., None, None]
    return out.reshape(experts, rows, columns).swapaxes(1, 2)


def dequantized(stored: dict[str, Stored], config: dict[str, Any]) -> dict[str, Stored]:
  """The tensors, those of `config['quantization_config']` under the names they had before it.

  ValueError for another method, and for scales that do not go with their weights.
  """
  quantization = config.get('quantization_config') or {}
  if not isinstance(quantization, dict):
    raise ValueError(f'config.json: quantization_config={quantization!r} is not an object')
  plain = dict(stored)
  match method := quantization.get('quant_method'):
    case None if not quantization:
      pass
    case 'fp8' if _is_pair(block := quantization.get('weight_block_size')):
      for name in [name for name in stored if name + '_scale_inv' in stored]:
        weight, scale = stored[name], plain.pop(name + '_scale_inv')
        _check(name, weight, 'float8_e4m3fn', scale, ('float32', 'bfloat16'),
               len(weight.shape) == 2 and scale.shape == tuple(-(-n // size) for n, size in zip(weight.shape, block)))
        plain[name] = BlockFp8(weight, scale, tuple(block))
    case 'mxfp4':
      for name in [name.removesuffix('_blocks') for name in stored if name.endswith('_blocks')]:
        blocks, scales = plain.pop(f'{name}_blocks'), plain.pop(f'{name}_scales', None)
        if scales is None or name in stored:
          raise ValueError(f'{name}_blocks: {name}_scales is missing' if scales is None else f'{name} is there twice')
        _check(name, blocks, 'uint8', scales, ('uint8',),
               len(blocks.shape) == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3])
        plain[name] = Mxfp4(blocks, scales)
    case _:
      raise ValueError(f'config.json: quantization_config with quant_method={method!r} is not read; fp8 with '
                       'weight_block_size and mxfp4 are. Save the model without it, with transformers')
  return plain


def _is_pair(block) -> bool:
  return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _check(name: str, weight: Stored, dtype: str, scale: Stored, scale_dtypes: tuple[str, ...], fits: bool) -> None:
  if not fits or weight.dtype.name != dtype or scale.dtype.name not in scale_dtypes:
    raise ValueError(f'{name}: {weight.dtype.name} {weight.shape} with scales {scale.dtype.name} {scale.shape} is not what '
                     'quantization_config says')
