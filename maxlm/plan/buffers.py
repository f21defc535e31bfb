"""Which buffers are alive when most memory is needed: live ranges read off the schedule.

The compiler gives the size of the peak but not what it is made of. A buffer lives from the instruction that makes it to the
last that uses it; tuples, bitcasts, loops and updates in place pass buffers on. What a loop's body needs beside the loop's
own buffers is added while the loop runs.
"""

import collections
import dataclasses

from maxlm.plan.hlo import Computation, Instruction, Module
from maxlm.plan.schedule import part_of

IN_PLACE = ('dynamic-update-slice', 'scatter')


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
  """bytes: in HBM, padded. what: dtype and dims. op_name: where it was made. argument: lives all the time."""

  bytes: int
  what: str
  op_name: str
  argument: bool


def peak(module: Module) -> tuple[int, list[Buffer]]:
  """Bytes at the peak, and the buffers that are alive then, the largest first."""
  total, alive = _peak(module, module.entry, None)
  return total, sorted(alive, key=lambda buffer: -buffer.bytes)


def _peak(module: Module, computation: Computation, given: list[list] | None) -> tuple[int, list[Buffer]]:
  """given: for each parameter the buffers that it is, which somebody else counts; None: the entry's, counted here."""
  made: dict[str, list] = {}  # instruction -> a buffer, or None for what is not in HBM, for each array of its shape
  for i in computation:
    made[i.name] = _buffers(module, i, made, given)
  order = list(computation)
  last = {}
  for at, i in enumerate(order):
    for name in (*i.operands, i.name):
      for buffer in made[name]:
        if buffer is not None:
          last[id(buffer)] = at if name != i.name else last.get(id(buffer), at)
  outside = {id(b) for buffers in given or () for b in buffers if b is not None}
  for buffer in made[computation.root.name]:
    if buffer is not None:
      last[id(buffer)] = len(order)
  alive, best, now = {}, (0, []), 0
  expiring = collections.defaultdict(list)
  for key, at in last.items():
    expiring[at].append(key)
  for at, i in enumerate(order):
    for buffer in made[i.name]:
      if buffer is not None and id(buffer) not in alive and id(buffer) not in outside:
        alive[id(buffer)] = buffer
        now += buffer.bytes
    inner = (0, [])
    if i.opcode == 'while' and len(called := module.called(i)) == 2:
      inner = _peak(module, called[1], [made[i.name]])
    elif i.opcode in ('call', 'conditional'):
      inner = max((_peak(module, c, [made[name] for name in i.operands]) for c in module.called(i)), key=lambda p: p[0])
    if now + inner[0] > best[0]:
      best = now + inner[0], [*alive.values(), *inner[1]]
    for key in expiring[at]:
      if key in alive and not alive[key].argument:
        now -= alive.pop(key).bytes
  return best


def _buffers(module: Module, i: Instruction, made: dict[str, list], given: list[list] | None) -> list:
  """The buffers of each array that an instruction makes; those of its operands where it only passes them on."""
  operands = [made[name] for name in i.operands]
  if i.opcode == 'parameter':
    if given is not None:
      return given[int(i.text)] if int(i.text) < len(given) else [None] * len(i.shape)
    return [Buffer(a.padded_bytes, f'{a.dtype}{list(a.dims)}', i.name, True) if a.space == 0 else None for a in i.shape]
  if i.opcode == 'tuple':
    return [buffer for buffers in operands for buffer in buffers]
  if i.opcode == 'get-tuple-element':
    index = i.number('index')
    return [operands[0][index] if index < len(operands[0]) else None]
  if i.opcode in ('bitcast', 'opt-barrier', 'while', 'copy-done', 'call-update') or i.opcode.endswith('-done'):
    return (operands[0] + [None] * len(i.shape))[:len(i.shape)] if operands else [None] * len(i.shape)
  if i.opcode in IN_PLACE:
    return operands[0]
  fresh = [Buffer(a.padded_bytes, f'{a.dtype}{list(a.dims)}', i.op_name or i.name, False)
           if a.space == 0 and a.size > 1 else None for a in i.shape]
  if i.opcode == 'copy-start':
    return [fresh[0], operands[0][0] if operands[0] else None, None]
  if i.opcode.endswith('-start'):  # its tuple begins with the operands
    given_on = [buffer for buffers in operands for buffer in buffers]
    return given_on + fresh[len(given_on):]
  if i.opcode == 'fusion':
    for out, operand in (i.aliases | _updated(module, i)).items():
      if out < len(fresh) and fresh[out] is not None and operands[operand] and operands[operand][0] is not None:
        fresh[out] = operands[operand][0]
  return fresh


def _updated(module: Module, fusion: Instruction) -> dict[int, int]:
  """Outputs of a fusion that are one of its operands with a part written over."""
  body, found = module.called(fusion)[0], {}
  root = body.root
  parts = [body.instructions[name] for name in root.operands] if root.opcode == 'tuple' else [root]
  for out, part in enumerate(parts):
    while part.opcode in ('bitcast', *IN_PLACE) and part.operands:
      changed = part.opcode in IN_PLACE
      part = body.instructions[part.operands[0]]
      if changed and part.opcode == 'parameter':
        found[out] = int(part.text)
  return found


def where(buffer: Buffer) -> str:
  """'f32[8,8192,4096] mlp, backward' for the report."""
  return f'{buffer.what} {"argument" if buffer.argument else part_of(buffer.op_name)}'


