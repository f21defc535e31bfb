"""The little language in which a family says which tensors of theirs hold which weights of ours.

    Tensor('model.layers.3.self_attn.q_proj.weight', 'NH D', 'layers.3.mixer.w_q_DNH')

says that the tensor has a row for each (head, dim of a head) and a column for each dim of the width. That is all there is
to say: `views` makes of their array a view with the dims of ours, import reads through it and export writes through it, so
no family has code for a direction.

A **layout** is their dims, separated by blanks. A dim is the letters it runs over, the outermost first ('NH' has N * H
entries), or 1. It may hold several weights, in brackets, in the order in which the names of ours stand:

    '(NH|KH|KH) D'   queries, keys and values one after the other along the rows (Phi-3)
    'N(H|H) D'       for each head its query and its gate (Qwen3-Next)
    'E D F(1|1)'     for each hidden dim the column of the gate and that of up (gpt-oss)

**Ours** is one name, or several separated by ' | '. Their letters, and through them all sizes, come from the weights
themselves. A name may be of a weight that this model does not have (a bias, an expert of a dense layer): the entry then
says nothing, so that one table serves all layers of a family. Where their order of entries takes a dim of ours apart,
`where` says so: where={'N': 'KG', 'K': 4} makes of our N = 4 * G heads the letters K and G, wherever N would stand.

**{E}** in a name stands for 0, 1, …: one tensor for each expert. The letter is then missing in the layout:

    Tensor('mlp.experts.{E}.up_proj.weight', 'F D', 'mlp.w_up_EDF')
"""

import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
  """A tensor (or one for each of {E}) that holds weights of ours. fp32: a cast to fewer bits by --dtype leaves it alone."""

  name: str
  layout: str
  ours: str
  where: Mapping[str, str | int] = dataclasses.field(default_factory=dict)
  fp32: bool = False

  @property
  def parts(self) -> list[str]:
    return self.ours.split(' | ')


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
  """A tensor that may be there, equal to another one: a head beside the embeddings it is tied to. It is not written."""

  name: str
  of: str


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
  """A tensor that may be there and is written, which our weights do not have because it is part of what a layer computes.
  value: that of all its entries, or a function that makes the array."""

  name: str
  shape: tuple[int, ...]
  value: float | Callable[[], np.ndarray]

  def values(self) -> np.ndarray:
    return np.asarray(self.value() if callable(self.value) else self.value)


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
  """A weight of ours that no tensor holds, because it follows from the config: its values, fp32 [as the weight]. A model
  that has others cannot be exported."""

  ours: str
  values: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class LeftOut:
  """Tensors that may be there and are not imported, by a regular expression of their whole name, and why."""

  pattern: str
  why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Either:
  """Several ways to store the same weights: an import takes the one whose names are there, an export writes the first."""

  ways: tuple[tuple['Entry', ...], ...]

  def __init__(self, *ways: Iterable['Entry']):
    object.__setattr__(self, 'ways', tuple(tuple(way) for way in ways))


Entry = Tensor | Copy | Constant | Given | LeftOut | Either


def within(theirs: str, ours: str, entries: Iterable[Entry]) -> Iterator[Entry]:
  """The entries with these prefixes before their names and before ours: within('model.layers.3.', 'layers.3.', LAYER)."""
  for entry in entries:
    match entry:
      case Tensor():
        yield dataclasses.replace(entry, name=theirs + entry.name, ours=' | '.join(ours + part for part in entry.parts))
      case Copy():
        yield Copy(theirs + entry.name, theirs + entry.of)
      case Constant():
        yield dataclasses.replace(entry, name=theirs + entry.name)
      case Given():
        yield dataclasses.replace(entry, ours=ours + entry.ours)
      case LeftOut():
        yield dataclasses.replace(entry, pattern=re.escape(theirs) + entry.pattern)
      case Either():
        yield Either(*(within(theirs, ours, way) for way in entry.ways))


def choose(entries: Iterable[Entry], names: Container[str] | None = None) -> list[Entry]:
  """The entries without alternatives: of each `Either` the way that has most of the names (None: always the first)."""
  chosen = []
  for entry in entries:
    if isinstance(entry, Either):
      ways = [choose(way, names) for way in entry.ways]
      chosen += ways[0] if names is None else max(ways, key=lambda way: _hits(way, names))
    else:
      chosen.append(entry)
  return chosen


def _hits(way: list[Entry], names: Container[str]) -> int:
  return sum(entry.name.replace('{E}', '0') in names for entry in way if isinstance(entry, Tensor))


def letters_of(name: str) -> str:
  """'layers.3.mixer.w_q_DNH' -> 'DNH'; a name that does not end in capitals is of one number: ''."""
  last = name.rpartition('.')[2].rpartition('_')[2]
  return last if last.isupper() else ''


class Layout:
  """A `Tensor` whose sizes are known.

  names: of their tensors, several where the name has {E}. shape: of each. each: the position of E in our dims, or None.
  fp32: as of the tensor.
  """

  def __init__(self, tensor: Tensor, shapes: list[tuple[int, ...]]):
    """shapes: of our weights, one a part, without L. ValueError, naming the tensor, if they do not fit together in it."""
    letters = [letters_of(part) for part in tensor.parts]
    dims = [_parse(dim, len(letters)) for dim in tensor.layout.split()]
    self.fp32, self.each = tensor.fp32, letters[0].index('E') if '{E}' in tensor.name else None
    self.names = [tensor.name] if self.each is None else [
      tensor.name.replace('{E}', str(i)) for i in range(shapes[0][self.each])]
    self._shapes = [tuple(n for i, n in enumerate(shape) if i != self.each) for shape in shapes]
    seen = [''.join(outer + (inner[part] if inner else '') for outer, inner in dims).replace('1', '')
            for part in range(len(letters))]
    ours = [''.join(_expanded(tensor, letter) for i, letter in enumerate(mine) if i != self.each) for mine in letters]
    for part, a, b in zip(tensor.parts, seen, ours):
      assert sorted(a) == sorted(b) and len(set(b)) == len(b), f'{tensor.name}: {tensor.layout!r} has {a}, {part} has {b}'
    sizes = [_sizes(tensor, mine, shape) for mine, shape in zip(letters, shapes)]
    # A part is seen in three steps: their array with each letter a dim of its own, and each bracket one; the part cut out of
    # the brackets; its letters there as dims of their own, in the order of ours. All are views: dims are only ever split.
    self.shape, self._whole, self._cuts = (), [], [[] for _ in letters]
    for outer, inner in dims:
      lengths = [_agreed(tensor, sizes, letter) for letter in outer]
      widths = [math.prod(size[letter] for letter in mine) for mine, size in zip(inner, sizes)]
      bracket = [slice(sum(widths[:part]), sum(widths[:part + 1])) for part in range(len(widths))]
      self.shape += (math.prod(lengths) * (sum(widths) if inner else 1),)
      self._whole += lengths + [sum(widths)] * bool(inner)
      for part, cut in enumerate(self._cuts):
        cut += [slice(None)] * len(outer) + bracket[part:part + 1]
    self._splits = [[size[letter] for letter in a] for size, a in zip(sizes, seen)]
    self._orders = [[a.index(letter) for letter in b] for a, b in zip(seen, ours)]

  def read(self, theirs: np.ndarray, part: int) -> np.ndarray:
    """The values in one of their arrays of a weight of ours; a view of it unless `where` took a dim apart."""
    return self._view(theirs, part).reshape(self._shapes[part])

  def write(self, theirs: np.ndarray, part: int, ours: np.ndarray) -> None:
    """Sets in one of their arrays the values of a weight of ours."""
    view = self._view(theirs, part)
    view[...] = ours.reshape(view.shape)

  def _view(self, theirs: np.ndarray, part: int) -> np.ndarray:
    whole = theirs.reshape(self._whole)
    return whole[*self._cuts[part], ...].reshape(self._splits[part]).transpose(self._orders[part])


def _parse(dim: str, n_parts: int) -> tuple[str, list[str]]:
  """'N(H|GP)' -> ('N', ['H', 'GP']);  'NH' -> ('NH', []);  '1' -> ('', [])."""
  parsed = re.fullmatch(r'([A-Z]*)(?:\(([A-Z1|]+)\))?|1', dim)
  assert parsed, f'the dim {dim!r} of a layout is neither letters, nor letters with brackets, nor 1'
  outer, inner = parsed[1] or '', parsed[2].split('|') if parsed[2] else []
  assert len(inner) in (0, n_parts), f'the dim {dim!r} of a layout holds {len(inner)} weights, ours are {n_parts}'
  return outer, inner


def _expanded(tensor: Tensor, letter: str) -> str:
  """The letters that a letter of ours stands for, which are itself unless `where` takes it apart."""
  apart = tensor.where.get(letter)
  return apart if isinstance(apart, str) else letter


def _sizes(tensor: Tensor, letters: str, shape: tuple[int, ...]) -> dict[str, int]:
  """The size of each letter of one of our weights, those of `where` included."""
  assert len(letters) == len(shape), f'{tensor.name}: {tensor.ours} has the letters {letters} and the shape {shape}'
  sizes = {'1': 1}
  for letter, size in zip(letters, shape):
    apart = _expanded(tensor, letter)
    known = {a: tensor.where[a] for a in apart if isinstance(tensor.where.get(a), int)}
    unknown = [a for a in apart if a not in known]
    assert len(unknown) <= 1, f'{tensor.name}: `where` gives no size to {" and ".join(unknown)}'
    rest, remainder = divmod(size, math.prod(known.values()))
    if remainder or (not unknown and rest != 1):
      raise ValueError(f'{tensor.name}: {letter}={size} does not split into {known}')
    sizes |= known | dict.fromkeys(unknown, rest) | {letter: size}
  return sizes


def _agreed(tensor: Tensor, sizes: list[dict[str, int]], letter: str) -> int:
  """The size of a letter that all parts have in common."""
  found = {size[letter] for size in sizes}
  if len(found) > 1:
    raise ValueError(f'{tensor.name}: its weights have the sizes {sorted(found)} for {letter}')
  return found.pop()
