"""From compiled programs to numbers, and from numbers to a page of text. Everything here is compiler-estimated."""

import dataclasses
import math
from typing import Any

import numpy as np

from maxlm import flops
from maxlm.config import Experiment
from maxlm.plan import hlo, schedule
from maxlm.plan.buffers import Buffer, peak, where
from maxlm.plan.flops import traced_flops
from maxlm.plan.hardware import GiB
from maxlm.plan.network import Network
from maxlm.plan.program import Program
from maxlm.plan.schedule import Span, walk

WIDTH, LARGEST = 100, 5
FOOTNOTE = 'All times are compiler-estimated (docs/plan.md says how, and how far off): nothing was measured.'
PASSES = {'train step': 3.0, 'eval step': 1.0}  # of the model's FLOPs forward: backward is two more


@dataclasses.dataclass(kw_only=True, slots=True)
class Read:
  """A program that was read. span: its walk. bounds: seconds that each resource needs at its full rate.
  peak: bytes of HBM by the live ranges of the schedule. largest: the buffers alive then."""

  name: str
  span: Span
  bounds: dict[str, float]
  n_instructions: int
  peak: int
  largest: list[Buffer]

  @property
  def lower_bound(self) -> float:
    return max(self.bounds.values())


def read(text: str, name: str, network: Network, filled: float = 1.0) -> Read:
  """Reads a compiled program's text. filled: as of `schedule.walk`. ValueError where it is no scheduled HLO."""
  module = hlo.parse(text)
  span = walk(module, network, filled)
  chip = network.chip
  bounds = {'products': span.flops / chip.flops, 'HBM': span.hbm_bytes / chip.hbm_rate}
  bounds |= {f'wires {wire}': float(seconds) for wire, seconds in sorted(span.busy.items())}
  n_instructions = sum(len(computation.instructions) for computation in module.computations.values())
  most, alive = peak(module)
  return Read(name=name, span=span, bounds=bounds, n_instructions=n_instructions, peak=most, largest=alive)


def model_flops(config: Experiment, rows: int, passes: float) -> float:
  """Of the model on that many rows, each one document: nothing is recomputed, and tokens see what the mask lets them."""
  length = config.data.seq_len
  row = {'positions': np.arange(length)[None], 'segment_ids': np.ones((1, length), int)}
  return flops.train_flops(config.model, row) / 3.0 * passes * rows


def figures(program: Program, found: Read, config: Experiment, network: Network, price: float | None) -> dict[str, Any]:
  """Everything that is reported of a step of a config, as JSON takes it. Bytes and FLOPs are of one device and one step."""
  chip, n_devices, span = network.chip, len(network.places), found.span
  model = model_flops(config, program.tokens // config.data.seq_len, PASSES[program.name]) / n_devices
  traced = traced_flops(program.jaxpr, chip, program.filled) / n_devices
  walked = walk_figures(found, network, program.tokens, model, price)
  return {
    'name': program.name, 'basis': 'compiler-estimated', 'tokens': program.tokens,
    'trace_seconds': program.seconds[0], 'compile_seconds': program.seconds[1],
    'memory': {**dataclasses.asdict(program.memory), 'capacity': chip.hbm_bytes,
               'margin': 1 - program.memory.peak / chip.hbm_bytes, 'walked_peak': found.peak,
               'largest': [{'bytes': buffer.bytes, 'what': where(buffer)} for buffer in found.largest[:LARGEST]]},
    **walked,
    'flops': {'model': model, 'traced': traced, **walked['flops'],
              'program_over_traced': span.flops / traced if traced else math.nan, 'program_over_model': span.flops / model},
  }


def walk_figures(found: Read, network: Network, tokens: int = 0, model: float = 0.0,
                 price: float | None = None) -> dict[str, Any]:
  """What the walk alone says. model: FLOPs of the model on one device; without tokens or model no rate is given."""
  chip, n_devices, span = network.chip, len(network.places), found.span
  n_chips = n_devices // chip.devices
  times = {'lower_bound': found.lower_bound, 'scheduled': float(span.seconds), 'serial': float(span.serial)}
  estimates = {}
  for name, seconds in times.items():
    estimates[name] = {'seconds': seconds}
    if tokens:
      estimates[name] |= {'tokens_per_second': tokens / seconds, 'tokens_per_second_per_chip': tokens / seconds / n_chips}
      if price is not None:
        estimates[name]['dollars_per_1e12_tokens'] = 1e12 / tokens * seconds * n_chips * price / 3600
    if model:
      estimates[name]['mfu'] = model / seconds / chip.flops
  return {
    'flops': {'program': float(span.flops), 'products': float(span.product_flops)},
    'hbm_bytes': float(span.hbm_bytes),
    'collectives': [{'axes': axes, 'kind': kind, 'count': t.count, 'bytes': float(t.received), 'seconds': float(t.seconds),
                     'exposed_seconds': float(t.exposed), 'hidden_seconds': float(max(0.0, t.seconds - t.exposed))}
                    for (axes, kind), t in sorted(span.traffic.items(), key=lambda item: -item[1].seconds)],
    'kernels': [{'name': name, 'count': int(count), 'seconds': float(seconds), 'flops': float(n_flops)}
                for name, (count, seconds, n_flops) in span.calls.items()],
    'estimates': estimates, 'bounds': found.bounds,
    'sources': {name: float(span.sources[name]) for name in schedule.SOURCES if span.sources[name]},
    'parts': {name: float(seconds) for name, seconds in span.parts.most_common()},
    'instructions': found.n_instructions, 'notes': sorted(span.notes),
  }


# -- the page


def page(plan: dict[str, Any]) -> str:
  """The report of all programs, at most WIDTH columns."""
  head = [f'{plan["config"]} on {plan["topology"]}: {plan["chips"]} chips, {plan["devices"]} devices',
          f'mesh     {plan["mesh"]}']
  return '\n'.join([*head, *(line for program in plan['programs'] for line in section(program)), '', FOOTNOTE])


def section(f: dict[str, Any]) -> list[str]:
  """Lines of one program."""
  return [
    '', f'{f["name"].upper()}  {f["tokens"]:,} tokens; traced in {f["trace_seconds"]:.0f} s, compiled in '
    f'{f["compile_seconds"]:.0f} s', *_memory(f['memory']), *_flops(f), *walk_lines(f)]


def walk_flops(f: dict[str, Any]) -> str:
  """FLOPs of `walk_figures` in a line."""
  return f'FLOPs    {f["flops"]["program"] / 1e12:,.1f} T a device, of which products {f["flops"]["products"] / 1e12:,.1f} T'


def walk_lines(f: dict[str, Any]) -> list[str]:
  """Collectives, kernels and times of `walk_figures`."""
  return [*_traffic(f), *_kernels(f), *_times(f), *(f'note     {note}' for note in f['notes'])]


def _memory(m: dict[str, Any]) -> list[str]:
  gib = lambda n: f'{n / GiB:.2f}'
  largest = wrapped('largest', [f'{gib(b["bytes"])} {b["what"]}' for b in m['largest']])
  return [f'memory   {gib(m["peak"])} of {gib(m["capacity"])} GiB a device, {m["margin"]:.0%} left: arguments '
          f'{gib(m["arguments"])}, outputs {gib(m["outputs"])}, aliased {gib(m["aliased"])},',
          f'         temporaries {gib(m["temporaries"])}, code {gib(m["code"])}'
          + (f', host {gib(m["host"])}' if m['host'] else ''), *largest]


def _flops(f: dict[str, Any]) -> list[str]:
  n = f['flops']
  tera = lambda key: f'{n[key] / 1e12:,.1f} T'
  return [f'FLOPs    model {tera("model")} a device, traced {tera("traced")}, program {tera("program")}, of which products '
          f'{tera("products")}',
          f'         program / traced {n["program_over_traced"]:.3f}; program / model {n["program_over_model"]:.3f} '
          '(recomputed, or masked in tiles)']


def _traffic(f: dict[str, Any]) -> list[str]:
  """Collectives by mesh axes and kind."""
  rows = [('collectives', 'axes', 'count', 'GB in', 'ms', 'exposed', 'hidden')]
  for c in f['collectives']:
    rows.append((f'  {c["kind"]}', c['axes'], f'{c["count"]:,}', f'{c["bytes"] / 1e9:.3f}', f'{c["seconds"] * 1e3:.2f}',
                 f'{c["exposed_seconds"] * 1e3:.2f}', f'{c["hidden_seconds"] * 1e3:.2f}'))
  if len(rows) > 1:
    count, n_bytes, seconds, exposed = (sum(c[key] for c in f['collectives'])
                                        for key in ('count', 'bytes', 'seconds', 'exposed_seconds'))
    rows.append(('  all', '', f'{count:,}', f'{n_bytes / 1e9:.3f}', f'{seconds * 1e3:.2f}', f'{exposed * 1e3:.2f}',
                 f'{max(0.0, seconds - exposed) * 1e3:.2f}'))
  return table(rows, (22, 30, 8, 10, 9, 9, 9))


def _kernels(f: dict[str, Any]) -> list[str]:
  rows = [('kernels', 'calls', 'ms', 'TFLOPs')]
  for k in f['kernels']:
    rows.append((f'  {k["name"]}', f'{k["count"]:,}', f'{k["seconds"] * 1e3:.2f}', f'{k["flops"] / 1e12:,.1f}'))
  return table(rows, (52, 8, 10, 10)) if len(rows) > 1 else ['kernels  none']


def _times(f: dict[str, Any]) -> list[str]:
  """The three estimates, and what the middle one rests on."""
  texts = {'lower_bound': f'  lower bound, by {max(f["bounds"], key=f["bounds"].get)}', 'scheduled': '  scheduled',
           'serial': '  all serial'}
  columns = {'tokens_per_second': ('tokens/s', ',.0f'), 'tokens_per_second_per_chip': ('/s/chip', ',.0f'),
             'mfu': ('MFU', '.1%'), 'dollars_per_1e12_tokens': ('$ / 1T tokens', ',.0f')}
  columns = {key: column for key, column in columns.items() if key in f['estimates']['scheduled']}
  rows = [('step, compiler-estimated', 'seconds', *(name for name, _ in columns.values()))]
  for name, text in texts.items():
    e = f['estimates'][name]
    seconds = f'{e["seconds"]:.3f}' if e['seconds'] >= 1 else f'{e["seconds"] * 1e3:.2f} ms'
    rows.append((text, seconds, *(format(e[key], form) for key, (_, form) in columns.items())))
  total = f['estimates']['scheduled']['seconds']
  shares = [f'{name} {seconds / total:.1%}' for name, seconds in sorted(f['sources'].items(), key=lambda s: -s[1])]
  parts = [f'{name} {seconds / total:.1%}' for name, seconds in list(f['parts'].items())[:8]]
  return [*table(rows, (30, 11, 15, 13, 8, 16)), *wrapped('rests on', shares), *wrapped('goes to', parts)]


def table(rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> list[str]:
  """The first column to the left, numbers to the right."""
  left = 2 if rows[0][1:2] == ('axes',) else 1
  return [''.join(cell[:width].ljust(width) if i < left else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def wrapped(head: str, items: list[str]) -> list[str]:
  """'head     a; b; c', broken at WIDTH."""
  lines, line = [], head.ljust(9)
  for i, item in enumerate(items):
    text = item + ('; ' if i + 1 < len(items) else '')
    if len(line) + len(text) > WIDTH:
      lines.append(line.rstrip())
      line = ' ' * 9
    line += text
  return [*lines, line.rstrip()]
