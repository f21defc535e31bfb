"""Compiles the real steps of a config for a TPU slice, on any CPU machine, and reports: python -m maxlm.plan

    python -m maxlm.plan --config=configs/llama3_8b.py --topology=v5p:4x4x4 [--slices=N] [--json=F] [--hlo=F]

Memory, FLOPs, collectives by mesh axis, kernels, and the time of a step in three estimates. Nothing is run or measured.
"""

import os

# A compiler needs no chip: nothing is looked for, on this machine or beside it, and several may compile at once.
os.environ |= {'JAX_PLATFORMS': 'cpu'}

import concurrent.futures
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from maxlm import flags

TOPOLOGY = flags.DEFINE_string('topology', '', "the slice, such as v5p:4x4x4 or v5e:16x16 (default: the config's pod)")
SLICES = flags.DEFINE_integer('slices', 1, 'slices of that shape, connected by the data-centre network')
STAGE = flags.DEFINE_string('stage', '', 'of a config with stages, the one to plan (default: the first)')
PRICE = flags.DEFINE_float('price', None, 'dollars for a chip and an hour; with it, the cost of 1T tokens')
PLOT = flags.DEFINE_string('plot', '', 'file for a timeline of the training step: .html or .svg')
SEARCH = flags.DEFINE_bool('search', False, 'try meshes, microbatches and remat policies, and print the best few')
COMPILES = flags.DEFINE_integer('search_compiles', 6, 'candidates that a search compiles: each takes as long as a plan does')
JSON = flags.DEFINE_string('json', '', 'file for all the figures')
HLO = flags.DEFINE_string('hlo', '', 'file for the compiled training step; the evaluation step goes beside it')


def main(config) -> int:
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError("planning needs the TPU compiler: pip install 'maxlm[plan]'")
  from maxlm import stages
  from maxlm.plan import program, report, topology
  if PLOT.value and not PLOT.value.endswith(('.html', '.svg')):
    raise ValueError(f'--plot={PLOT.value}: a picture is .html or .svg')
  if not (TOPOLOGY.value or config.pod):
    raise ValueError('this config names no pod: give --topology=v5p:4x4x4, or another slice')
  known = [stage.name for stage in config.stages]
  if STAGE.value and STAGE.value not in known:
    raise ValueError(f'--stage={STAGE.value}: this config has {", ".join(known) or "no stages"}')
  if known:
    config = stages.flat(config, known.index(STAGE.value) if STAGE.value else 0)
  where = topology.parse(TOPOLOGY.value or config.pod, SLICES.value)
  if SEARCH.value:
    from maxlm.plan import search
    plan = search.search(config, where, COMPILES.value)
    print(search.page(config, where, plan))
  else:
    try:
      plan = planned(config, where)
    except program.Refused as refusal:
      print('error:', refusal, file=sys.stderr)
      return 1
    print(report.page(plan))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(plan, indent=2) + '\n')
  return 0


def planned(config, where) -> dict[str, Any]:
  """Compiles and reads both steps of the config."""
  from maxlm import typed_json
  from maxlm.compiler import options
  from maxlm.config import Experiment
  from maxlm.plan import program, report, timeline
  from maxlm.plan.network import network_of
  mesh = program.mesh_for(config, where)
  network = network_of(where, mesh)
  with concurrent.futures.ThreadPoolExecutor() as pool:  # a compile takes one core
    compiled = list(pool.map(lambda step: step(config, where, mesh), (program.compile_train, program.compile_eval)))
  steps = []
  for step, suffix in zip(compiled, ('', '.eval')):
    if HLO.value:
      Path(HLO.value + suffix).write_text(step.text)
    found = report.read(step.text, step.name, network, step.filled)
    steps.append(report.figures(step, found, config, network, PRICE.value))
    if PLOT.value and not suffix:
      draw = timeline.svg if PLOT.value.endswith('.svg') else timeline.page
      Path(PLOT.value).write_text(draw(found.span, f'{config.name} on {where.name}, {step.name}'))
  return {
    'config': config.name, 'topology': where.name, 'chips': where.n_chips, 'devices': len(network.places),
    'mesh': ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or 'one device',
    'compiler_options': options(where.chip.device_kind), 'programs': steps,
    'experiment': typed_json.encode(config, Experiment),
  }


if __name__ == '__main__':
  flags.run(main, default_config='configs/llama3_8b.py')
