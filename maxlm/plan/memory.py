"""What a compiled step needs of a chip's memory, and one line where it is more than there is."""

import dataclasses
import math
import re
from typing import Any

from maxlm.config import Experiment
from maxlm.plan.flops import inner_jaxprs
from maxlm.plan.hardware import GiB
from maxlm.plan.topology import Topology


@dataclasses.dataclass(kw_only=True, slots=True)
class Memory:
  """Bytes of HBM of one device. arguments: state and batch. outputs: those that are not `aliased` with donated arguments.
  temporaries: at the moment when most are needed. code: the program. peak: of all of them together."""

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  peak: int
  host: int


def memory_of(compiled) -> Memory:
  """From the compiler's buffer assignment. Its `temp_size` adds up what is never alive together; the peak does not."""
  stats = compiled.memory_analysis()
  arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
  code = stats.generated_code_size_in_bytes
  peak = getattr(stats, 'peak_memory_in_bytes', 0) or arguments + outputs + stats.temp_size_in_bytes
  return Memory(arguments=arguments, outputs=outputs, aliased=stats.alias_size_in_bytes, code=code, peak=peak + code,
                temporaries=max(0, peak - arguments - outputs),
                host=stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes)


def does_not_fit(text: str, name: str, config: Experiment, topology: Topology, jaxpr: Any, sizes: dict[str, int]) -> str:
  """One line for what the compiler says when it gives up. Where it is not memory: its own first line.

  jaxpr, sizes: the traced step and its mesh, for the largest buffers where the compiler names none.
  """
  used = (re.search(r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm', text)
          or re.search(r'required for [\w ]+ \(([\d.]+[KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)', text))
  if used is None:
    first = next((line for line in text.splitlines() if line.strip()), 'no reason given')
    return f'the compiler refuses the {name} for {topology.name}: {first.strip()}'
  largest = allocations(text)[:3] or [(f'{n_bytes / GiB:.2f}G', what) for n_bytes, what in kept_by_loops(jaxpr, sizes)[:3]]
  return (f'the {name} does not fit {topology.name}: it needs {used[1]} of {used[2]} a device; largest: '
          f'{"; ".join(" ".join(entry) for entry in largest)}. {advice(config)}')


def kept_by_loops(jaxpr: Any, sizes: dict[str, int]) -> list[tuple[int, str]]:
  """(bytes of a device, what) of the arrays that loops stack up, the largest first: what layers keep for backward."""
  found = set()
  for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns:
    if equation.primitive.name == 'scan':
      rounds = equation.params['jaxpr'].jaxpr.outvars
      for aval in (v.aval for v, of_round in zip(equation.outvars, rounds) if v.aval.ndim > of_round.aval.ndim):
        parts = [axis for entry in aval.sharding.spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        n_bytes = aval.size * aval.dtype.itemsize // math.prod(sizes[axis] for axis in parts)
        found.add((n_bytes, f'{aval.dtype.name}{list(aval.shape)}, split {math.prod(sizes[axis] for axis in parts)} ways'))
    for inner in inner_jaxprs(equation.params) if equation.primitive.name != 'shard_map' else ():
      found |= set(kept_by_loops(inner, sizes))
  return sorted(found, reverse=True)


def allocations(text: str) -> list[tuple[str, str]]:
  """(size, shape and where it was made) of the largest buffers that the compiler's text lists, without repeats."""
  found = []
  for part in re.split(r'\n\s*\d+\. Size: ', text)[1:]:
    size = part.split()[0]
    shape = re.search(r'Shape: ([^\s{]+)', part)
    op = re.search(r'op_name="([^"]*)"', part)
    where = '/'.join(op[1].split('/')[-2:]) if op else ''
    entry = (size, ' '.join(filter(None, (shape and shape[1], where))))
    if entry not in found:
      found.append(entry)
  return found


def advice(config: Experiment) -> str:
  """What to change, cheapest first."""
  steps = []
  policies = ('none', 'products', 'attention', 'full')  # each keeps less than the one before
  if config.compute.remat != policies[-1]:
    steps.append(f'--config.compute.remat={policies[policies.index(config.compute.remat) + 1]}')
  rows = config.data.batch_size // config.microbatches
  if rows > 1:
    steps.append(f'--config.microbatches={config.microbatches * 2}')
  steps.append('more of --config.mesh.fsdp' if config.mesh.data > 1 else 'a larger slice')
  return 'Try ' + ', then '.join(steps) + '; --search tries them'
