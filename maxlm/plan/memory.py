"""What a compiled step needs of a chip's memory, and one line where it is more than there is."""

import dataclasses
import re

from maxlm.config import Experiment
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


def does_not_fit(text: str, name: str, config: Experiment, topology: Topology) -> str:
  """One line for what the compiler says when it gives up. Where it is not memory: its own first line."""
  used = re.search(r'Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm', text)
  if used is None:
    first = next((line for line in text.splitlines() if line.strip()), 'no reason given')
    return f'the compiler refuses the {name} for {topology.name}: {first.strip()}'
  largest = [f'{size} {op}' for size, op in allocations(text)[:3]]
  return (f'the {name} does not fit {topology.name}: {used[1]} of {used[2]} of HBM a device; largest: {"; ".join(largest)}. '
          f'{advice(config)}')


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
  if config.compute.remat != 'full':
    steps.append(f'--config.compute.remat={"attention" if config.compute.remat == "none" else "full"}')
  rows = config.data.batch_size // config.microbatches
  if rows > 1:
    steps.append(f'--config.microbatches={config.microbatches * 2}')
  steps.append('more of --config.mesh.fsdp' if config.mesh.data > 1 else 'a larger slice')
  return 'Try ' + ', then '.join(steps) + '; --search tries them'
