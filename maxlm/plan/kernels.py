"""What our Mosaic kernels cost. The compiler sees them as closed boxes: no cycles, and no FLOPs for splash.

From shapes and tile tables: tiles that are visited x FLOPs of a tile / (peak x EFFICIENCY). Splash visits, for a block of
queries, the blocks of keys up to the diagonal, or as many as the window's tables are wide; a tile on the diagonal costs as
much as a full one. The efficiencies are assumptions, not measurements: docs/plan.md says where they come from.
"""

import dataclasses
import math
import re

from maxlm.plan.hardware import Chip
from maxlm.plan.hlo import Array, Computation, Instruction

# Share of the peak in full tiles. Attention: exponentials and running maxima beside the products.
EFFICIENCY = {'attention': 0.65, 'grouped': 0.80}
# FLOPs of a tile of queries x keys, in units of 2 x queries x keys x head_dim: scores and values; then scores, dP, dQ;
# scores, dP, dK, dV; and all five at once where the backward pass is one kernel.
PRODUCTS = {'fwd': 2, 'dq': 3, 'dkv': 4, 'fused': 5}


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
  """flops, hbm_bytes: of one call. seconds: the larger of compute at the stated efficiency and memory at its full rate.
  known: False where only memory is accounted for, because the kernel is not one that this file knows."""

  name: str
  flops: float
  hbm_bytes: float
  seconds: float
  known: bool


def kernel_of(computation: Computation, call: Instruction, chip: Chip, filled: float = 1.0) -> Kernel:
  """The cost of a `tpu_custom_call`."""
  inputs = [a for name in call.operands for a in computation.instructions[name].shape]
  return kernel(name_of(call), inputs, list(call.shape), str(call.attributes.get('frontend_attributes', '')), chip, filled)


def kernel(name: str, inputs: list[Array], outputs: list[Array], notes: str, chip: Chip, filled: float = 1.0) -> Kernel:
  """The same from shapes. notes: the tile sizes that splash leaves in the program. filled: of experts' buffers, the share of
  rows that have tokens: the rest is skipped."""
  n_bytes = sum(a.padded_bytes for a in (*inputs, *outputs) if a.space == 0)
  known, efficiency, flops = True, 1.0, 0.0
  if 'splash' in name or 'flash' in name:
    flops, head_dim = _attention(name, inputs, outputs, notes)
    # A product that is narrower than the matrix unit leaves part of it idle: scores sum over head_dim, values are as wide.
    efficiency = EFFICIENCY['attention'] * min(1.0, head_dim / chip.mxu)
  elif re.search(r'gmm|ragged|grouped', name):
    flops, efficiency = _grouped(inputs, outputs) * filled, EFFICIENCY['grouped']
    n_bytes = sum(a.padded_bytes * (filled if len(a.dims) == 2 else 1) for a in (*inputs, *outputs) if a.space == 0)
  else:
    known = False
  return Kernel(name, flops, n_bytes, max(flops / (chip.flops * efficiency), n_bytes / chip.hbm_rate), known)


def name_of(call: Instruction) -> str:
  """'splash_mha_dq' of the path '…/splash_mha_dq_segmented_no_residuals/pallas_call', or of the instruction's name."""
  found = re.search(r'([\w.\-]+)/pallas_call', call.op_name)
  name = found[1] if found else re.sub(r'[.\d]+$', '', call.name)
  return re.sub(r'_(segmented|no_residuals|residuals)', '', name)


def _attention(name: str, inputs: list[Array], outputs: list[Array], notes: str) -> tuple[float, int]:
  """FLOPs, and the dims of a head. Inputs: tables [heads, blocks of queries, of keys], q [.., N, T, H] or, with time in the
  lanes, [.., N, H, T], k [.., K, S, H]. A backward kernel with three outputs is the one of all three gradients."""
  tables = [a for a in inputs if a.dtype in ('s8', 's16', 's32') and len(a.dims) == 3]
  floats = [a for a in inputs if len(a.dims) >= 3 and a.dtype in ('bf16', 'f32', 'f16')]
  q, k = floats[0].dims, floats[1].dims
  kind = 'dkv' if 'dkv' in name else 'dq' if 'dq' in name else 'fwd'
  fused = kind == 'dkv' and len(outputs) == 3
  T, H = reversed(q[-2:]) if re.search(r'q_layout\W+2', notes) else q[-2:]
  S = k[-2]
  rows = math.prod(q[:-2])  # heads of all examples
  suffix = {'fwd': '', 'dq': '_dq', 'dkv': '_dkv'}[kind]
  sizes = {key: int(n) for key, n in re.findall(r'(block_\w+)\W+(\d+)', notes)}
  block_q, block_k = sizes.get(f'block_q{suffix}', 512), sizes.get(f'block_kv{suffix}', 512)
  n_q, n_k = math.ceil(T / block_q), math.ceil(S / block_k)
  steps_q, steps_k = tables[0].dims[-2:] if tables else (n_q, n_k)
  if T == S:  # queries and keys of the same tokens: each block of queries meets what is before it
    visited = sum(min(steps_k, math.ceil((i + 1) * block_q / block_k)) for i in range(n_q))
    if kind == 'dkv':
      visited = sum(min(steps_q, n_q - j * block_k // block_q) for j in range(n_k))
  elif steps_k < n_k or steps_q < n_q:  # some of the queries, a window of keys: as many steps as the tables have
    visited = n_q * steps_k if kind != 'dkv' else n_k * steps_q
  else:  # some of the queries, all keys: with zigzag order every device sees half of them
    visited = n_q * (n_k + 1) / 2
  return rows * visited * 2.0 * block_q * block_k * H * PRODUCTS['fused' if fused else kind], H


def _grouped(inputs: list[Array], outputs: list[Array]) -> float:
  """2 x rows x inputs x outputs of products of rows with the matrix of their group, added up, or of the gradient to the
  matrices."""
  matrices = [a.dims[1:] for a in (*inputs, *outputs) if len(a.dims) == 3 and a.dims[1] > 1 and a.dtype in ('bf16', 'f32')]
  rows = [a.dims for a in inputs if len(a.dims) == 2 and a.dtype in ('bf16', 'f32')]
  if not matrices or not rows:
    return 0.0
  n_rows = max(dims[0] if dims[1] in matrices[0] else dims[1] for dims in rows)
  return 2.0 * n_rows * sum(math.prod(matrix) for matrix in matrices)
