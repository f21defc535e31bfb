"""What an instruction of a scheduled program does: multiplications, bytes of HBM, and which parts of it are free.

Products are `convolution` or `dot`, mostly inside fusions. A fusion reads of a parameter only what it slices out of it,
and writes of an updated buffer only the update. What lies in VMEM (`S(1)` in a shape) costs no HBM.
"""

import functools
import math
import re

import numpy as np

from maxlm.plan.hlo import HOST, VMEM, Array, Computation, Instruction, Module

FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id', 'replica-id',
        'opt-barrier', 'domain', 'add-dependency'}
FREE_CALLS = {'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding', 'AsyncCollectiveStart',
              'AsyncCollectiveDone'}
SLICES = ('dynamic-slice', 'gather', 'slice')
# In a fusion that an asynchronous collective continues through, its buffers are passed on, and filled at the links' rate.
PASSED_ON = ('parameter', 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


def target(instruction: Instruction) -> str:
  """Of a custom call."""
  return instruction.attributes.get('custom_call_target', '').strip('"')


def is_free(instruction: Instruction) -> bool:
  return instruction.opcode in FREE or (instruction.opcode == 'custom-call' and target(instruction) in FREE_CALLS)


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
  """Of the products in it, at two a multiply-add; loops are not multiplied out."""
  if instruction.opcode == 'convolution':
    return _convolution(computation, instruction)
  if instruction.opcode == 'dot':
    return _dot(computation, instruction)
  if instruction.opcode in ('fusion', 'call'):
    return sum(flops(module, called, inner) for called in module.called(instruction) for inner in called)
  return 0


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
  """That it reads from HBM and writes to it."""
  operands = [computation.instructions[name] for name in instruction.operands]
  if instruction.opcode == 'fusion' and (called := module.called(instruction)):
    body = called[0]
    written = _written(body, instruction)
    return sum(_read(module, body, body.parameter(i), operand.shape) for i, operand in enumerate(operands)) + written
  if instruction.opcode in SLICES:
    return 2 * _in_hbm(instruction.shape)
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * _in_hbm(operands[1].shape)
  return sum(_in_hbm(operand.shape) for operand in operands) + _in_hbm(instruction.shape)


def moved_bytes(instruction: Instruction) -> tuple[int, bool]:
  """Of a copy or a slice between memories: bytes, and whether the host's memory is at one end."""
  arrays = [a for a in instruction.shape if a.size > 1] or list(instruction.shape)
  smallest = min((a.padded_bytes for a in arrays[:2]), default=0)
  return smallest, any(a.space == HOST for a in arrays)


def _in_hbm(shape: tuple[Array, ...]) -> int:
  return sum(array.padded_bytes for array in shape if array.space == 0)


def _read(module: Module, body: Computation, parameter: Instruction, operand: tuple[Array, ...]) -> int:
  """Of a parameter of a fusion; only its slices where nothing else is used of it, nothing where it is only written to."""
  whole = _in_hbm(operand)
  if not whole:
    return 0
  total, same = 0, _same(body, parameter.name)
  for user in _users(body, parameter.name):
    if user.opcode in SLICES and user.operands[0] in same:
      total += user.shape[0].padded_bytes
    elif user.opcode == 'fusion' and (inner := module.called(user)):
      total += sum(_read(module, inner[0], inner[0].parameter(i), operand)
                   for i, name in enumerate(user.operands) if name in same)
    elif not (user.opcode in ('dynamic-update-slice', 'scatter') and user.operands[0] in same or
              user is body.root and user.opcode == 'tuple' or user.opcode in PASSED_ON):
      return whole
  return min(whole, total)


def _users(body: Computation, name: str) -> list[Instruction]:
  """Who uses a value, bitcasts passed through."""
  found = []
  for user in body:
    if name in user.operands:
      found += _users(body, user.name) if user.opcode == 'bitcast' else [user]
  return found


def _same(body: Computation, name: str) -> set[str]:
  """The value and its bitcasts."""
  return {name}.union(*(_same(body, user.name) for user in body if user.opcode == 'bitcast' and name in user.operands))


def _written(body: Computation, fusion: Instruction) -> int:
  """Of its results; of one that is an updated operand, the update."""
  root = body.root
  parts = [body.instructions[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  total = 0
  for part, array in zip(parts, fusion.shape):
    while part.opcode == 'bitcast':
      part = body.instructions[part.operands[0]]
    if part.opcode == 'dynamic-update-slice':
      total += _in_hbm((array,)) and body.instructions[part.operands[1]].shape[0].padded_bytes
    elif part.opcode not in PASSED_ON:
      total += _in_hbm((array,))
  return total


def _dot(computation: Computation, instruction: Instruction) -> int:
  left = computation.instructions[instruction.operands[0]].shape[0].dims
  contracted = re.findall(r'\d+', instruction.attributes.get('lhs_contracting_dims', ''))
  return 2 * instruction.shape[0].size * math.prod(left[int(i)] for i in contracted)


def _convolution(computation: Computation, instruction: Instruction) -> int:
  """2 x outputs x inputs that meet in each: batch dims of a product are spatial dims of which most positions are padding."""
  labels = re.match(r'(\w+)_(\w+)->(\w+)', instruction.attributes['dim_labels'])
  left, right = (computation.instructions[name].shape[0].dims for name in instruction.operands[:2])
  kernel, out = labels[2], labels[3]
  size = instruction.shape[0].dims
  total = size[out.index('b')] * size[out.index('f')] * right[kernel.index('i')]
  window = dict(re.findall(r'(\w+)=([\w\-]+)', instruction.attributes.get('window', '')))
  for d in range(sum(c.isdigit() for c in kernel)):
    at = lambda key, default: (window[key].split('x') if key in window else [default] * (d + 1))[d]
    low, high = (int(n) for n in at('pad', '0_0').split('_'))
    total *= _meetings(left[labels[1].index(str(d))], int(at('size', '1')), size[out.index(str(d))], int(at('stride', '1')),
                       low, int(at('lhs_dilate', '1')), int(at('rhs_dilate', '1')))
  return 2 * total // int(instruction.attributes.get('batch_group_count', '1'))


@functools.lru_cache
def _meetings(length: int, size: int, outputs: int, stride: int, low: int, dilate: int, spread: int) -> int:
  """Pairs (output position, window position) that fall on an element of the input, not on padding or between elements."""
  count, last = 0, (length - 1) * dilate
  few, many = (size, outputs) if size <= outputs else (outputs, size)
  for i in range(few):
    other = np.arange(many)
    at = (other * stride + i * spread if size <= outputs else i * stride + other * spread) - low
    count += int(((at >= 0) & (at <= last) & (at % dilate == 0)).sum())
  return count


def space_of(instruction: Instruction) -> str:
  """'vmem', 'hbm' or 'host' of its first array."""
  return {0: 'hbm', VMEM: 'vmem', HOST: 'host'}.get(instruction.shape[0].space, 'scalar') if instruction.shape else 'none'
