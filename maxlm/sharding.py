"""Mesh axes, and dimension letters -> PartitionSpecs.  The only file that names mesh axes.

One capital letter is the einsum index, the suffix of the array's name and the row of `RULES`:
`w_up_DF` has `spec('DF') == P(FSDP, 'tensor')`.  The letters are listed in docs/dims.md.
The mesh is explicit (`AxisType.Explicit`): a sharding is part of an array's type, so a missing annotation is an
error while tracing, on a laptop, and not a slow gather on a pod.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

# What a config sets. Outermost first: neighbours on the last axes are neighbours on the machine. `data` may cross slices.
AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')

# The mesh has an fsdp axis for each dimension of a pod's torus where the compiler makes a reduce-scatter of a sum over one
# dimension after another, but an all-reduce, or one long ring, of a sum over all of them at once. On other machines the
# first axis has all: v6e and TPU7x reduce and scatter over all links of a torus at once (with `maxlm.compiler`'s options).
ONE_DIMENSION_AT_A_TIME = ('TPU v4', 'TPU v5')
FSDP = ('fsdp_x', 'fsdp_y', 'fsdp_z')
MESH_AXES = ('data', *FSDP, 'expert', 'context', 'tensor')

# Order is priority. A mesh axis is used at most once in an array: the first letter that claims it wins, so `D` is
# split over fsdp in weights only (activations have `B`, which takes fsdp first).
RULES = {
  'B': ('data', 'fsdp', 'expert'),  # rows of the batch
  'T': ('context',),  # time of queries
  'U': ('context', 'tensor'),  # time between sublayers
  'S': ('context',),  # time of keys
  'E': ('expert',),  # experts
  'Z': ('expert', 'fsdp'),  # experts whose weights are stored whole (`maxlm.layers.moe`)
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

  def with_whole_rows(self, n_devices: int) -> 'MeshConfig':
    """The same for decoding, where there is a token at a time: devices that shared rows have rows of their own."""
    sizes = dict(zip(AXES, self.shape(n_devices)))
    return MeshConfig(**sizes | {'data': sizes['data'] * sizes['context'], 'context': 1})


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """The mesh over `devices` (default: all of the job), each axis along the machine's links; `data` crosses slices.

  ValueError if the devices are of several slices and `data` is not a multiple of them.
  """
  devices = jax.devices() if devices is None else devices
  data, *within = config.shape(len(devices))
  slices = {getattr(device, 'slice_index', None) or 0 for device in devices}
  if data % len(slices):
    raise ValueError(f'mesh.data={data}: the {len(slices)} slices are connected by a network that only the sum of gradients '
                     f'should cross: use a multiple of {len(slices)}')
  one_slice = [device for device in devices if (getattr(device, 'slice_index', None) or 0) == min(slices)]
  shape = mesh_shape((data // len(slices), *within), torus(one_slice))
  if len(slices) > 1:
    array = mesh_utils.create_hybrid_device_mesh(shape, (len(slices), *(1,) * (len(shape) - 1)), devices,
                                                 allow_split_physical_axes=True)
  else:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig, n_devices: int) -> AbstractMesh:
  """The same mesh with no devices behind it: enough to trace and type-check a program for a pod."""
  shape = mesh_shape(config.shape(n_devices), ())
  return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def torus(devices) -> tuple[int, ...]:
  """Extents of the torus of one slice's devices, cores of a chip last; () where fsdp is not factored along it."""
  if not all(device.device_kind.startswith(ONE_DIMENSION_AT_A_TIME) for device in devices):
    return ()
  places = np.array([(*device.coords, device.core_on_chip) for device in devices])
  extents = tuple(int(n) for n in places.max(axis=0) - places.min(axis=0) + 1)
  return extents if math.prod(extents) == len(devices) else ()


def mesh_shape(sizes: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, ...]:
  """Sizes of MESH_AXES from those of AXES: fsdp is factored into what the other axes leave of the torus."""
  data, fsdp, *others = sizes
  left = list(extents)
  for size in sorted((data, *others), reverse=True):  # each takes a dimension of its size, or parts of some
    while size > 1 and left:
      i = left.index(size) if size in left else max(range(len(left)), key=lambda i: math.gcd(size, left[i]))
      part = math.gcd(size, left[i])
      if part == 1:
        break
      size, left[i] = size // part, left[i] // part
  factors = sorted((n for n in left if n > 1), reverse=True)
  if math.prod(factors) != fsdp:
    factors = [fsdp]
  while len(factors) > len(FSDP):
    factors = [*factors[:-2], factors[-2] * factors[-1]]
  return (data, *factors, *(1,) * (len(FSDP) - len(factors)), *others)


def spec(dims: str, *, gathered: bool = False) -> P:
  """spec('DF') == P(FSDP, 'tensor');  spec('BTF') == P(('data', *FSDP, 'expert'), 'context', 'tensor').

  gathered: leave D whole, as a weight is while it is used. A vector over D is always whole: it costs nothing to
  replicate and would cost a gather a layer to split. Letters without a rule (H, G, L …) are never split.
  """
  taken, split = set(), {}
  for dim in RULES:
    if dim in dims and not (dim == 'D' and (gathered or dims == 'D')):
      free = tuple(axis for axis in axes(dim) if axis not in taken)
      taken.update(free)
      split[dim] = free[0] if len(free) == 1 else free or None
  return P(*(split.get(dim) for dim in dims))


def axes(dims: str) -> tuple[str, ...]:
  """Mesh axes over which these letters are split, for collectives: `jax.lax.psum(x, axes('V'))`."""
  return tuple(dict.fromkeys(mesh_axis for dim in dims for axis in RULES.get(dim, ())
                             for mesh_axis in (FSDP if axis == 'fsdp' else (axis,))))


def axis_size(dims: str) -> int:
  """Into how many parts the current mesh splits these letters."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape[axis] for axis in axes(dims))


def device_kind() -> str:
  """What the devices of the current mesh are called: those that the program is for, which need not be there."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind
