"""Reads the text of a compiled, scheduled HLO module: computations, instructions, shapes with their tiles, loops.

The order of a computation's instructions is the order in which the core runs them. What is read is the text that
`compiled.as_text()` gives; its grammar: openxla.org/xla/operation_semantics and hlo_text_syntax.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator
from typing import Any

BITS = {'pred': 8, 'bf16': 16, 'token': 0, 'opaque': 0, 's1': 1, 'u1': 1, 'c64': 64, 'c128': 128} | {
  f'{kind}{bits}': bits for kind in 'su' for bits in (2, 4, 8, 16, 32, 64)} | {f'f{bits}': bits for bits in (16, 32, 64)}
VMEM, HOST = 1, 5  # memory spaces S(n); 0 is HBM, others are semaphores and scalars

_ARRAY = re.compile(r'([a-z]\w*)\[([0-9,<=?]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'\s*(ROOT )?%?([^\s=]+) = ')
_COMPUTATION = re.compile(r'(ENTRY )?%?([^\s(]+) \(.*\{\s*$')
_END = re.compile(r'\}(, execution_thread="[^"]*")?\s*$')
_NAME = re.compile(r'%([^\s,(){}]+)')
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][(){},]')


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
  """One array. order: dims from minor to major, () if unknown. tiles: of the minor dims, as T(8,128)(2,1). space: S(n)."""

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()
  tiles: tuple[tuple[int, ...], ...] = ()
  space: int = 0

  @property
  def bits(self) -> int:
    return 8 if self.dtype.startswith('f8') else 4 if self.dtype.startswith('f4') else BITS[self.dtype]

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    """Of its elements alone."""
    return -(-self.size * self.bits // 8)

  @property
  def padded_bytes(self) -> int:
    """As it lies in memory, the minor dims rounded up to whole tiles."""
    if not self.tiles or not self.order:
      return self.bytes
    dims = [self.dims[i] for i in self.order]  # minor first
    for i, tile in enumerate(reversed(self.tiles[0])):
      if i < len(dims):
        dims[i] = -(-dims[i] // tile) * tile
    return -(-math.prod(dims) * self.bits // 8)


@dataclasses.dataclass(slots=True, eq=False)
class Instruction:
  """shape: its arrays, those of a tuple one after another. attributes: as written. text: what stands in the parentheses."""

  name: str
  opcode: str
  shape: tuple[Array, ...]
  is_tuple: bool
  operands: tuple[str, ...]
  text: str
  attributes: dict[str, str]
  is_root: bool

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.shape)

  @property
  def op_name(self) -> str:
    """Where the program made it: 'jit(train_step)/jvp()/while/body/mixer/BTD,DNH->BTNH/dot_general'."""
    found = re.search(r'op_name="([^"]*)"', self.attributes.get('metadata', ''))
    return found[1] if found else ''

  @property
  def called(self) -> list[str]:
    """Names of the computations it calls; a condition and a body in this order."""
    keys = ('calls', 'to_apply', 'condition', 'body', 'true_computation', 'false_computation', 'branch_computations',
            'called_computations')
    return [name for key in keys for name in _names(self.attributes.get(key, ''))]

  @property
  def config(self) -> dict[str, Any]:
    """What the compiler noted: cycles, emitters, trip counts."""
    text = self.attributes.get('backend_config', '')
    return json.loads(text) if text.startswith('{') else {}

  @property
  def cycles(self) -> int | None:
    """The compiler's own estimate, of the core that runs it; None where it has none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes.get('backend_config', ''))
    cycles = int(found[1]) if found else 0
    return cycles if 0 < cycles < 2**62 else None  # INT64_MAX stands for 'cannot say'

  @property
  def aliases(self) -> dict[int, int]:
    """Of a fusion: output index -> the operand whose buffer it is."""
    pairs = re.findall(r'\{(\d*)\}: \((\d+),', self.attributes.get('output_to_operand_aliasing', ''))
    return {int(out or 0): int(operand) for out, operand in pairs}

  def number(self, key: str) -> int | None:
    return int(self.attributes[key]) if key in self.attributes else None


@dataclasses.dataclass(slots=True, eq=False)
class Computation:
  """instructions: by name, in the order of the schedule."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    return next(i for i in reversed(self.instructions.values()) if i.is_root)

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  def parameter(self, number: int) -> Instruction:
    return next(i for i in self if i.opcode == 'parameter' and int(i.text) == number)


@dataclasses.dataclass(slots=True, eq=False)
class Module:
  """A program of one device."""

  name: str
  scheduled: bool
  computations: dict[str, Computation]
  entry: Computation

  def called(self, instruction: Instruction) -> list[Computation]:
    return [self.computations[name] for name in instruction.called if name in self.computations]

  def inside(self, instruction: Instruction) -> Iterator[Instruction]:
    """All instructions of the computations that it calls, and of those that they call."""
    for computation in self.called(instruction):
      for inner in computation:
        yield inner
        yield from self.inside(inner)


def parse(text: str) -> Module:
  """ValueError where the text is no HLO module."""
  header = re.match(r'\s*HloModule ([^\s,]+)(.*)', text)
  if header is None:
    raise ValueError('this is no HLO text: it does not begin with HloModule (compiled.as_text() of JAX writes it)')
  computations, entry, name, lines = {}, None, None, []
  for line in text.splitlines()[1:]:
    if name is None:
      if matched := _COMPUTATION.match(line):
        name, lines = matched[2], []
        entry = name if matched[1] else entry
    elif _END.match(line):
      computations[name] = Computation(name, {i.name: i for i in map(_instruction, lines)})
      name = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
    elif lines:
      lines[-1] += line  # metadata of a kernel goes over several lines
  if entry is None:
    raise ValueError('this HLO text has no ENTRY computation: it is not whole')
  return Module(header[1], 'is_scheduled=true' in header[2], computations, computations[entry])


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a shape as it is written, '(f32[2,3]{1,0:T(8,128)}, s32[])' has two."""
  return tuple(_array(*found) for found in _ARRAY.findall(text))


@functools.lru_cache(maxsize=1 << 16)
def _array(dtype: str, dims: str, layout: str) -> Array:
  order, _, rest = layout.partition(':')
  tiles = re.match(r'T((?:\([0-9,*]+\))+)', rest)
  tiles = tuple(tuple(int(n) for n in tile.split(',')) for tile in re.findall(r'\(([0-9,]+)\)', tiles[1])) if tiles else ()
  space = re.search(r'S\((\d+)\)', rest)
  return Array(dtype, tuple(int(n.strip('<=')) for n in dims.split(',') if n and n != '?'),
               tuple(int(n) for n in order.split(',') if n), tiles, int(space[1]) if space else 0)


def _instruction(line: str) -> Instruction:
  head = _INSTRUCTION.match(line)
  start = head.end()
  stop = _closing(line, start) if line[start] == '(' else line.index(' ', start)
  shape = line[start:stop]
  opening = line.index('(', stop)
  closing = _closing(line, opening)
  inner = line[opening + 1:closing - 1]
  opcode = line[stop:opening].strip()
  operands = () if opcode in ('parameter', 'constant') else tuple(_NAME.findall(inner))
  return Instruction(head[2], opcode, arrays(shape), shape.startswith('('), operands, inner, _attributes(line[closing:]),
                     bool(head[1]))


def _closing(text: str, start: int) -> int:
  """The position after the bracket that closes the one at `start`."""
  depth = 0
  for mark in _MARKS.finditer(text, start):
    if mark[0] in '([{':
      depth += 1
    elif mark[0] in ')]}':
      depth -= 1
      if not depth:
        return mark.end()
  raise ValueError(f'brackets do not close in {text[:80]!r}')


def _attributes(text: str) -> dict[str, str]:
  """', channel_id=1, metadata={op_name="x"}' -> its keys and values."""
  found, depth, start = {}, 0, 0
  for mark in [*_MARKS.finditer(text), None]:
    if mark is not None and mark[0] in ('(', '[', '{'):
      depth += 1
    elif mark is not None and mark[0] in (')', ']', '}'):
      depth -= 1
    elif mark is None or (mark[0] == ',' and not depth):
      key, equals, value = text[start:mark.start() if mark else len(text)].strip().partition('=')
      if equals:
        found[key] = value
      elif key and found:  # replica_groups=mesh[...] {...} has no comma; a list without brackets has
        last = next(reversed(found))
        found[last] += f', {key}'
      start = mark.end() if mark else len(text)
  return found


def _names(text: str) -> list[str]:
  return _NAME.findall(text + ' ') if '%' in text else [name.strip() for name in text.strip('{}').split(',') if name.strip()]
