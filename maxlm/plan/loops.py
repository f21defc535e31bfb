"""How often a loop of a compiled program goes round."""

import math

from maxlm.plan.hlo import Computation, Instruction, Module


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
  """Of a `while`: the compiler's own number, or what its condition `counter < limit` says; None where it says neither."""
  known = loop.config.get('known_trip_count', {}).get('n')
  if known is not None:
    return int(known)
  condition, body = module.called(loop)[:2]
  root, where, bound = condition.root, condition, {}
  if root.opcode == 'fusion':
    where = module.called(root)[0]
    bound = {where.parameter(i).name: name for i, name in enumerate(root.operands)}
    root = where.root
  if root.opcode != 'compare' or len(root.operands) != 2:
    return None

  def side(name: str) -> tuple[str, int] | None:
    """('index', i) of the loop's tuple, or ('value', n)."""
    here, instruction = where, where.instructions[name]
    while True:
      if here is where and instruction.name in bound:
        here, instruction = condition, condition.instructions[bound[instruction.name]]
      elif instruction.opcode in ('copy', 'bitcast', 'convert', 'reshape'):
        instruction = here.instructions[instruction.operands[0]]
      elif instruction.opcode == 'constant':
        return ('value', int(instruction.text)) if instruction.text.lstrip('-').isdigit() else None
      elif instruction.opcode == 'get-tuple-element':
        return 'index', instruction.number('index')
      else:
        return None

  sides = [side(name) for name in root.operands]
  direction = root.attributes.get('direction')
  if direction in ('GT', 'GE'):
    sides, direction = sides[::-1], {'GT': 'LT', 'GE': 'LE'}[direction]
  counter, limit = sides
  if counter is None or limit is None or counter[0] != 'index' or direction not in ('LT', 'LE', 'NE'):
    return None
  start = _initial(computation, loop, counter[1])
  stop = limit[1] if limit[0] == 'value' else _initial(computation, loop, limit[1])
  if start is None or stop is None:
    return None
  return max(0, math.ceil((stop - start + (direction == 'LE')) / _step(body, counter[1])))


def _initial(computation: Computation, loop: Instruction, index: int) -> int | None:
  """The constant with which element `index` of the loop's tuple begins."""
  init = computation.instructions[loop.operands[0]]
  if init.opcode != 'tuple':
    return None
  value = computation.instructions[init.operands[index]]
  while value.opcode in ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start'):
    value = computation.instructions[value.operands[0]]
  return int(value.text) if value.opcode == 'constant' and value.text.lstrip('-').isdigit() else None


def _step(body: Computation, index: int) -> int:
  """By how much a round adds to element `index`; 1 where it cannot be read."""
  root = body.root
  value = body.instructions[root.operands[index]] if root.opcode == 'tuple' else root
  if value.opcode == 'add':
    for name in value.operands:
      constant = body.instructions[name]
      if constant.opcode == 'constant' and constant.text.isdigit():
        return max(1, int(constant.text))
  return 1
