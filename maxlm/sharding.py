"""Mesh axes, and dimension letters -> PartitionSpecs.  The only file that names mesh axes.

One capital letter is the einsum index, the suffix of the array's name and the row of `RULES`:
`w_up_DF` has `spec('DF') == P('fsdp', 'tensor')`.  The letters are listed in docs/dims.md.
The mesh is explicit (`AxisType.Explicit`): a sharding is part of an array's type, so a missing annotation is an
error while tracing, on a laptop, and not a slow gather on a pod.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

# Outermost first: neighbours on the last axes are neighbours on the machine. `data` may cross slices.
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

# Order is priority. A mesh axis is used at most once in an array: the first letter that claims it wins, so `D` is
# split over fsdp in weights only (activations have `B`, which takes fsdp first).
RULES = {
  'B': ('data', 'fsdp', 'expert'),  # rows of the batch
  'T': ('context',),  # time of queries
  'S': ('context',),  # time of keys
  'E': ('expert',),  # experts
  'N': ('tensor',),  # query heads
  'K': ('tensor',),  # key-value heads
  'F': ('tensor',),  # hidden width of the MLP
  'V': ('tensor',),  # vocabulary
  'D': ('fsdp',),  # width of the model
}


@dataclasses.dataclass(kw_only=True, slots=True)
class MeshConfig:
  """Devices on each axis. One axis may be -1: it takes all devices that are left."""

  data: int = 1
  fsdp: int = -1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  def shape(self, n_devices: int) -> tuple[int, ...]:
    """Sizes in the order of AXES for that many devices. ValueError if they do not fit."""
    sizes = [getattr(self, axis) for axis in AXES]
    named = ', '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(f'mesh ({named}): sizes are positive, and at most one axis may be -1 (the rest)')
    known = math.prod(size for size in sizes if size != -1)
    if n_devices % known or (-1 not in sizes and known != n_devices):
      raise ValueError(f'mesh ({named}) needs {"a multiple of " if -1 in sizes else ""}{known} devices, '
                       f'and this machine has {n_devices}: change --config.mesh.<axis>')
    return tuple(n_devices // known if size == -1 else size for size in sizes)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The mesh over `devices` (default: all of the job), neighbours laid out along the machine's links."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(config.shape(len(devices)), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def abstract_mesh(config: MeshConfig, n_devices: int) -> AbstractMesh:
  """The same mesh with no devices behind it: enough to trace and type-check a program for a pod."""
  return AbstractMesh(config.shape(n_devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def spec(dims: str, *, gathered: bool = False) -> P:
  """spec('DF') == P('fsdp', 'tensor');  spec('BTF') == P(('data', 'fsdp', 'expert'), 'context', 'tensor').

  gathered: leave D whole, as a weight is while it is used. A vector over D is always whole: it costs nothing to
  replicate and would cost a gather a layer to split. Letters without a rule (H, G, L …) are never split.
  """
  taken, split = set(), {}
  for dim, axes in RULES.items():
    if dim in dims and not (dim == 'D' and (gathered or dims == 'D')):
      free = tuple(axis for axis in axes if axis not in taken)
      taken.update(free)
      split[dim] = free[0] if len(free) == 1 else free or None
  return P(*(split.get(dim) for dim in dims))


def axes(dims: str) -> tuple[str, ...]:
  """Mesh axes over which these letters are split, for collectives: `jax.lax.psum(x, axes('V'))`."""
  return tuple(axis for dim in dims for axis in RULES[dim])


def axis_size(dims: str) -> int:
  """Into how many parts the current mesh splits these letters."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in axes(dims))
