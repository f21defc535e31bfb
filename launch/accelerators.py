"""TPU slices by the names that users know: 'v6e-64' or 'v5p:4x4x4' -> chips, hosts, memory, and what gcloud calls it.

    python -m launch.accelerators        # the table of docs/launch.md

Shapes, chips of a host and how an accelerator type counts: cloud.google.com/tpu/docs, the page of each generation; hosts
and shapes are compared with libtpu's own description by a test. Prices: the list for us regions on demand, 2026-11; spot is
cheaper and moves, so that a guard that counts with them stops early rather than late.
"""

import dataclasses
import difflib
import math
import re

FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
SMALL = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')  # within a cube; others are made of cubes of 4x4x4
CUBES = ('4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16', '16x16x24')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
  """prefix: of accelerator types; counts: 'chips' or 'cores', two a chip, that the number behind it counts. runtime: the VM
  image, '' where the service has none. hbm_gib: of a chip. single_host: chips of the largest slice that is one machine;
  larger ones have 4 chips a machine. dollars: of a chip and an hour, 0 where we know no list price. gke, machine: labels of
  node pools."""

  name: str
  prefix: str
  counts: str
  runtime: str
  hbm_gib: int
  shapes: tuple[str, ...]
  single_host: int
  dollars: float
  gke: str
  machine: str


GENERATIONS = {g.name: g for g in (
  Generation(name='v4', prefix='v4', counts='cores', runtime='tpu-ubuntu2204-base', hbm_gib=32,
             shapes=SMALL + CUBES[:6], single_host=4, dollars=3.22, gke='tpu-v4-podslice', machine='ct4p-hightpu-4t'),
  Generation(name='v5e', prefix='v5litepod', counts='chips', runtime='v2-alpha-tpuv5-lite', hbm_gib=16,
             shapes=FLAT, single_host=8, dollars=1.20, gke='tpu-v5-lite-podslice', machine='ct5lp-hightpu-4t'),
  Generation(name='v5p', prefix='v5p', counts='cores', runtime='v2-alpha-tpuv5', hbm_gib=95,
             shapes=SMALL + CUBES, single_host=4, dollars=4.20, gke='tpu-v5p-slice', machine='ct5p-hightpu-4t'),
  Generation(name='v6e', prefix='v6e', counts='chips', runtime='v2-alpha-tpuv6e', hbm_gib=32,
             shapes=FLAT, single_host=8, dollars=2.70, gke='tpu-v6e-slice', machine='ct6e-standard-4t'),
  Generation(name='tpu7x', prefix='tpu7x', counts='cores', runtime='', hbm_gib=192,
             shapes=SMALL + CUBES[:7], single_host=4, dollars=0.0, gke='tpu7x', machine='tpu7x-standard-4t'),
)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
  """One slice: a generation and a shape, '8x8'."""

  generation: Generation
  shape: str

  @property
  def chips(self) -> int:
    return math.prod(int(n) for n in self.shape.split('x'))

  @property
  def hosts(self) -> int:
    return 1 if self.chips <= self.generation.single_host else self.chips // 4

  @property
  def chips_per_host(self) -> int:
    return self.chips // self.hosts

  @property
  def accelerator_type(self) -> str:
    """As gcloud's --accelerator-type: v6e-64, and v5p-128 of 64 chips."""
    return f'{self.generation.prefix}-{self.chips * (2 if self.generation.counts == "cores" else 1)}'

  @property
  def topology(self) -> str:
    """As `maxlm.plan --topology`."""
    return f'{self.generation.name}:{self.shape}'


def slices() -> list[Slice]:
  return [Slice(generation=g, shape=shape) for g in GENERATIONS.values() for shape in g.shapes]


def parse(name: str) -> Slice:
  """'v6e-64', 'v5litepod-16' (also 'v5e-16') or 'v5p:4x4x4'. ValueError, with near ones, for what is none."""
  known = {slice_.accelerator_type: slice_ for slice_ in slices()} | {slice_.topology: slice_ for slice_ in slices()}
  wanted = re.sub(r'^v5e-', 'v5litepod-', name.strip().lower())
  if wanted in known:
    return known[wanted]
  like = [other for other in known if other.partition('-')[0].partition(':')[0] == re.split('[-:]', wanted)[0]]
  near = difflib.get_close_matches(wanted, like or known, n=3, cutoff=0.0)
  raise ValueError(f'--tpu={name}: there is no such slice; near it are {", ".join(near)}')


def table() -> str:
  """Of docs/launch.md."""
  lines = ['| `--tpu` | or | chips | hosts | HBM, GiB | runtime version | $ an hour |', '|---|---|---|---|---|---|---|']
  for slice_ in slices():
    of = slice_.generation
    lines.append(f'| `{slice_.accelerator_type}` | `{slice_.topology}` | {slice_.chips:,} | {slice_.hosts:,} | '
                 f'{slice_.chips * of.hbm_gib:,} | {f"`{of.runtime}`" if of.runtime else "GKE only"} | '
                 f'{f"{slice_.chips * of.dollars:,.2f}" if of.dollars else "ask"} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  print(table())
