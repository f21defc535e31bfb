"""The wires: which mesh axes and which dimensions of the torus a collective runs along, and how long it takes.

A dimension that is closed to a ring carries W = two links' worth into each chip; a line carries one, for that is all its
end has. Bandwidths of the dimensions that an algorithm uses at once add up (scaling book, part 3; perf formulas in
docs/plan.md). Each message also takes a microsecond a hop.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from maxlm.plan.hardware import DCN_HOP, HOP
from maxlm.plan.topology import Topology

DIMS = 'xyzc'  # of the torus; c: the two cores of a chip that shows as two devices
ON_CHIP = 6.0  # rate between these, in links


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
  """axes: of the mesh, joined by +. size: devices of a group. wires: what is in use, as 'x+', 'x-' or 'dcn'.
  seconds: how long it takes. received: bytes that come in at a device."""

  axes: str
  size: int
  wires: tuple[str, ...]
  seconds: float
  received: float


class Network:
  """The devices of a mesh and the wires between them.

  mesh: axis -> size, outermost first. places: [devices, 5] of x, y, z, core and slice, in the order of the mesh.
  """

  def __init__(self, topology: Topology, mesh: dict[str, int], places: np.ndarray):
    self.topology, self.chip, self.mesh, self.places = topology, topology.chip, mesh, places
    self.link = self.chip.link_rate / self.chip.devices
    self.extents = (*topology.extents, self.chip.devices)
    self.wrap = (*topology.wrap, False)
    self.coordinates = np.stack(np.unravel_index(np.arange(len(places)), tuple(mesh.values())), axis=1)
    self.gather = functools.lru_cache(self._gather)
    self.permute = functools.lru_cache(self._permute)

  def axes(self, group: tuple[int, ...]) -> str:
    """The mesh axes along which the members of a group differ; '(part)' where it is not all of them."""
    coordinates = self.coordinates[list(group)]
    varying = [i for i in range(len(self.mesh)) if len(set(coordinates[:, i])) > 1]
    names = '+'.join(list(self.mesh)[i] for i in varying) or 'none'
    whole = math.prod(tuple(self.mesh.values())[i] for i in varying) == len(group)
    return names if whole else f'{names} (part)'

  def _gather(self, kind: str, group: tuple[int, ...], n_bytes: int, n_dims: int | None) -> Route:
    """A collective of everybody in a group. n_bytes: of the whole array, before a scatter or after a gather; of a device's
    input for an all-to-all. n_dims: dimensions that the compiler's algorithm uses at once (None: all there are)."""
    size = len(group)
    moved = n_bytes * (size - 1) / size * (2 if kind == 'all-reduce' else 1)
    rings = self._rings(group)
    if size == 1:
      return Route('none', 1, (), 0.0, 0.0)
    slices = len(set(self.places[list(group), 4]))
    inside = size // slices
    rings = sorted(rings, key=lambda ring: -ring[2])[:n_dims]
    seconds, twice = 0.0, 2 if kind == 'all-reduce' else 1
    if rings and kind.endswith('all-to-all'):
      seconds = max(n_bytes * extent / (4 * rate) for _, extent, rate, _ in rings)
    elif rings:
      seconds = twice * n_bytes * (inside - 1) / inside / sum(rate for _, _, rate, _ in rings)
    hops = sum(extent // 2 if closed else extent - 1 for _, extent, _, closed in rings)
    seconds += twice * hops * HOP
    if slices > 1:
      seconds += twice * n_bytes / inside * (slices - 1) / slices / self.chip.dcn_rate + twice * DCN_HOP
    wires = tuple(f'{DIMS[dim]}{sign}' for dim, *_ in rings for sign in '+-') + (('dcn',) if slices > 1 else ())
    return Route(self.axes(group), size, wires, seconds, moved)

  def between_slices(self, kind: str, n_bytes: int) -> Route:
    """What every device does with its peers in the other slices, with n_bytes of its own."""
    slices = len(set(self.places[:, 4]))
    moved = n_bytes * (slices - 1) / slices * (2 if kind == 'all-reduce' else 1)
    coordinates, of_slice = self.coordinates, self.places[:, 4]
    crossing = [name for i, name in enumerate(self.mesh)  # axes along which a step changes the slice
                if len(set(of_slice[(np.delete(coordinates, i, 1) == np.delete(coordinates[0], i)).all(axis=1)])) > 1]
    return Route('+'.join(crossing) or 'none', slices, ('dcn',), moved / self.chip.dcn_rate + DCN_HOP, moved)

  def _rings(self, group: tuple[int, ...]) -> list[tuple[int, int, float, bool]]:
    """(dimension, members along it, bytes a second into a device, closed) of each dimension in which a group extends."""
    rings = []
    for dim in range(4):
      along = sorted(set(self.places[list(group), dim]))
      if len(along) == 1:
        continue
      closed = self.wrap[dim] and len(along) > 2 and self.extents[dim] % len(along) == 0
      stride = min(b - a for a, b in itertools.pairwise(along))
      closed = closed and stride * len(along) == self.extents[dim]
      link = self.link * ON_CHIP if DIMS[dim] == 'c' else self.link
      rings.append((dim, len(along), link * (2 if closed else 1) / stride, closed))
    return rings

  def _permute(self, pairs: tuple[tuple[int, int], ...], n_bytes: int) -> Route:
    """Messages of n_bytes each, routed along x, then y, then z, the shorter way round; the fullest wire decides."""
    load, hops, wires, between = {}, 0, set(), 0
    for source, target in pairs:
      here, there = self.places[source].copy(), self.places[target]
      between += here[4] != there[4]
      steps = 0
      for dim in range(4):
        while here[dim] != there[dim]:
          extent = self.extents[dim]
          ahead = (there[dim] - here[dim]) % extent
          forward = ahead <= extent - ahead if self.wrap[dim] else there[dim] > here[dim]
          wire = (tuple(here), dim, forward)
          load[wire] = load.get(wire, 0) + (1 / ON_CHIP if DIMS[dim] == 'c' else 1)
          wires.add(f'{DIMS[dim]}{"+" if forward else "-"}')
          here[dim] = (here[dim] + (1 if forward else -1)) % extent
          steps += 1
      hops = max(hops, steps)
    seconds = n_bytes * max(load.values(), default=0.0) / self.link + hops * HOP
    if between:
      seconds, wires = max(seconds, n_bytes / self.chip.dcn_rate + DCN_HOP), wires | {'dcn'}
    moving = np.array([self.coordinates[a] != self.coordinates[b] for a, b in pairs if a != b])
    axes = '+'.join(name for name, moves in zip(self.mesh, moving.any(axis=0)) if moves) if len(moving) else 'none'
    size = max((self.mesh[name] for name in axes.split('+') if name in self.mesh), default=1)
    return Route(axes, size, tuple(sorted(wires)), seconds, n_bytes if len(moving) else 0.0)


def network_of(topology: Topology, mesh) -> Network:
  """The network under a mesh of a topology's devices."""
  places = np.array([(*d.coords, d.core_on_chip, getattr(d, 'slice_index', None) or 0) for d in mesh.devices.flat])
  return Network(topology, dict(mesh.shape), places)
