"""TPU slices by their users' names: 'v5p:4x4x4' -> devices without hardware, and the torus they are wired as.

The compiler must be told all of it: without `wrap` a 64-way gather on v5p is compiled to an all-reduce of a padded buffer.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re

from maxlm.plan.hardware import CHIPS, Chip

FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')  # every slice of v5e and v6e
SMALL = ('1x1x1', '2x2x1', '2x2x2', '2x2x4', '2x4x4')  # slices within a cube of v4, v5p and tpu7x; others are made of cubes
RING = 16  # chips along an axis of v5e and v6e that is closed to a ring
CUBE = 4  # chips along an edge of a cube, whose faces are switched to each other

# What libtpu is told before it is loaded: there is no machine to ask and no chip to lock, and nobody reads its log.
COMPILE_ONLY = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_ACCELERATOR_TYPE': 'v5p-8',
                'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_STDERR_LOG_LEVEL': '3', 'TPU_MIN_LOG_LEVEL': '3'}


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
  """chip: its generation. extents: chips along each of three axes of the torus of a slice. slices: connected by DCN."""

  chip: Chip
  extents: tuple[int, int, int]
  slices: int = 1

  @property
  def name(self) -> str:
    shape = 'x'.join(str(n) for n in self.extents[:self.chip.dims])
    return f'{self.chip.name}:{shape}' + (f' x {self.slices} slices' if self.slices > 1 else '')

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Which axes are rings: those of 16 on v5e and v6e; all where a slice is made of whole cubes; else none."""
    if self.chip.dims == 2:
      return tuple(n == RING for n in self.extents)
    return (all(n % CUBE == 0 for n in self.extents),) * 3

  @property
  def n_chips(self) -> int:
    return math.prod(self.extents) * self.slices

  def devices(self) -> list:
    """The slice's devices as JAX sees them, with coordinates, for compiling only. ImportError without libtpu."""
    os.environ.update(COMPILE_ONLY)
    from jax.experimental import topologies
    host = tuple(min(n, 2) for n in self.extents[:2]) + (1,)
    options = {'chip_config_name': 'megacore'} if self.chip.megacore else {}
    shape = 'x'.join(str(n) for n in self.extents[:self.chip.dims])
    return list(topologies.get_topology_desc(
      platform='tpu', topology_name=f'{self.chip.name}:{shape}', chips_per_host_bounds=host, num_slices=self.slices,
      wrap=self.wrap, **options).devices)


def parse(name: str, slices: int = 1) -> Topology:
  """'v5e:16x16' -> Topology. ValueError, in one line that names near ones, for what is no slice."""
  matched = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', name.strip().lower())
  if slices < 1:
    raise ValueError(f'--slices={slices}: at least 1')
  if matched is None or matched[1] not in CHIPS:
    raise ValueError(f'topology {name!r} is none: {_near_generation(name)}')
  chip, shape = CHIPS[matched[1]], matched[2]
  extents = tuple(int(n) for n in shape.split('x'))
  if not _is_slice(chip, shape, extents):
    raise ValueError(f'topology {name!r}: {chip.name} has no such slice; near it are {", ".join(_near(chip, extents))}')
  return Topology(chip, (*extents, 1, 1)[:3], slices)


def _is_slice(chip: Chip, shape: str, extents: tuple[int, ...]) -> bool:
  if chip.dims == 2:
    return shape in FLAT
  cubes = len(extents) == 3 and all(n and n % CUBE == 0 for n in extents) and tuple(sorted(extents)) == extents
  return shape in SMALL or cubes


def _near(chip: Chip, extents: tuple[int, ...], most: int = 3) -> list[str]:
  """Slices of that generation with about as many chips."""
  if chip.dims == 2:
    shapes = [tuple(int(n) for n in shape.split('x')) for shape in FLAT]
  else:
    cubes = range(CUBE, 25, CUBE)
    shapes = [tuple(int(n) for n in shape.split('x')) for shape in SMALL]
    shapes += [shape for shape in itertools.product(cubes, repeat=3) if tuple(sorted(shape)) == shape]
  wanted = tuple(sorted(max(1, n) for n in extents))

  def distance(shape):
    chips = abs(math.log(math.prod(shape) / math.prod(wanted)))
    return chips, sum(abs(a - b) for a, b in itertools.zip_longest(shape, wanted, fillvalue=1))

  return [f'{chip.name}:{"x".join(map(str, shape))}' for shape in sorted(shapes, key=distance)[:most]]


def _near_generation(name: str) -> str:
  """What somebody who wrote `name` may have meant."""
  word, number = re.match(r'([a-z0-9]*)[^a-z0-9]*(\d*)', name.strip().lower()).groups()
  alias = {'v5': 'v5p', 'v5litepod': 'v5e', 'v5lite': 'v5e', 'v6': 'v6e', 'v7': 'tpu7x', 'v7x': 'tpu7x', 'tpu7': 'tpu7x',
           'ironwood': 'tpu7x', 'trillium': 'v6e'}.get(word, word)
  close = [alias] if alias in CHIPS else difflib.get_close_matches(alias, CHIPS, n=1)
  if not close:
    return 'a slice is generation:chips x chips, such as v5p:4x4x4, v5e:16x16, v6e:16x16, v4:4x4x4 or tpu7x:4x4x4'
  chip = CHIPS[close[0]]
  cores = 2 if chip.megacore or chip.devices == 2 else 1  # accelerator types of these count the cores: v5p-128
  shape = re.search(r'\d+(?:x\d+)+', name)
  if shape:
    near = _near(chip, tuple(int(n) for n in shape[0].split('x')))
  else:
    near = _near(chip, (max(1, int(number) // cores),) if number else (64,))
  return f'did you mean {", ".join(near[:-1])} or {near[-1]}?'
