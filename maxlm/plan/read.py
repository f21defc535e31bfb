"""Judges a compiled program that is not ours by the same walk: python -m maxlm.plan.read F.hlo --topology=v5p:4x4x4

    python -m maxlm.plan.read F.hlo [more.hlo …] --topology=v5p:4x4x4 [--slices=N] [--mesh=fsdp=16,tensor=4] [--json=F]

F.hlo is what `compiled.as_text()` of JAX gave for that slice. Shown are its FLOPs, collectives by mesh axis, kernels and
three estimates of its time. Nothing is run or measured.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import json
import math
import re
from pathlib import Path
from typing import Any

from maxlm import flags

TOPOLOGY = flags.DEFINE_string('topology', '', 'the slice that it was compiled for, such as v5p:4x4x4')
SLICES = flags.DEFINE_integer('slices', 1, 'slices of that shape')
MESH = flags.DEFINE_string('mesh', '', 'axes and sizes, outermost first: a=4,b=16 (default: the mesh that the text names)')
TOKENS = flags.DEFINE_integer('tokens', 0, 'tokens of a step, for tokens a second')
FLOPS = flags.DEFINE_float('model_flops', 0.0, "the model's FLOPs of a step on all chips, for MFU")
JSON = flags.DEFINE_string('json', '', 'file for all the figures, one entry a program')


def main(files: list[str]) -> int:
  from maxlm.plan import report, topology
  if not files or not TOPOLOGY.value:
    raise ValueError('give HLO files, and --topology=v5p:4x4x4 or what they were compiled for')
  where, found = topology.parse(TOPOLOGY.value, SLICES.value), []
  for name in files:
    found.append(read_text(Path(name).read_text(), name, where, MESH.value, TOKENS.value, FLOPS.value))
    print('\n'.join([f'{name} on {where.name}, mesh {found[-1]["mesh"]}', report.walk_flops(found[-1]),
                     *report.walk_lines(found[-1]), '']))
  print(report.FOOTNOTE)
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(found, indent=2) + '\n')
  return 0


def read_text(text: str, name: str, where, mesh: str = '', tokens: int = 0, model_flops: float = 0.0) -> dict[str, Any]:
  """The figures of a compiled program's text. where: a Topology. mesh: 'a=4,b=16', or '' for the one that the text names."""
  import jax
  import numpy as np
  from jax.experimental import mesh_utils

  from maxlm.plan import report
  from maxlm.plan.network import network_of
  devices = where.devices()
  sizes = mesh_sizes(mesh, text, len(devices))
  shape = tuple(sizes.values())
  array = np.array(devices).reshape(shape)
  if where.slices == 1:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  network = network_of(where, jax.sharding.Mesh(array, tuple(sizes)))
  figures = report.walk_figures(report.read(text, name, network), network, tokens, model_flops / len(devices))
  return {'mesh': ' '.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1) or 'one device', **figures}


def mesh_sizes(mesh: str, text: str, n_devices: int) -> dict[str, int]:
  """Axis -> size, from the flag or from the program. ValueError where they are not those of the slice."""
  if mesh:
    pairs = [part.partition('=') for part in mesh.split(',')]
    if not all(name and size.isdigit() for name, _, size in pairs):
      raise ValueError(f'--mesh={mesh}: axes and sizes, such as a=4,b=16')
    sizes = {name: int(size) for name, _, size in pairs}
  else:
    named = [dict(re.findall(r"'([^']+)'=(\d+)", found)) for found in set(re.findall(r'mesh\[([^\]]*)\]', text))]
    named = [sizes for sizes in named if not any(axis.startswith('axis_') for axis in sizes)]
    sizes = {axis: int(size) for axis, size in max(named, key=len, default={'devices': n_devices}).items()}
  if math.prod(sizes.values()) != n_devices:
    raise ValueError(f'mesh {sizes} is of {math.prod(sizes.values())} devices, and the slice has {n_devices}: give --mesh')
  return sizes


if __name__ == '__main__':
  flags.run(main, words=True)
