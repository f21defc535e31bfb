"""Walks a scheduled program as the chip would: one core in order, wires and copy engines beside it.

A synchronous instruction takes the core's time. One that starts something occupies its wires from when they are free; its
`done` waits for what is left of it: that is exposed, the rest is hidden. A loop takes its body's time x its trips.
"""

import collections
import dataclasses
import re

from maxlm.plan import collectives, kernels, work
from maxlm.plan.collectives import Collective, collective_of
from maxlm.plan.hlo import Computation, Instruction, Module
from maxlm.plan.loops import trip_count
from maxlm.plan.network import Network

PRODUCTS, OTHERS, ROOFLINE, KERNELS = 'compiler cycles, products', 'compiler cycles, other', 'roofline', 'kernels, analytic'
LINKS, COPIES = 'exposed communication', 'waiting for copies'
SOURCES = (PRODUCTS, OTHERS, ROOFLINE, KERNELS, LINKS, COPIES)
SPARSE_CORE_SHARE = 0.8  # of HBM's rate, that gathers on the sparse cores reach: the compiler's own figure


@dataclasses.dataclass(slots=True)
class Bar:
  """A piece of the timeline. lane: 'core', 'kernel', 'copies', 'sparse core', or wires. body: of a loop, and its trips."""

  name: str
  part: str
  lane: str
  start: float
  seconds: float
  body: 'Span | None' = None
  trips: int = 1


@dataclasses.dataclass(slots=True)
class Traffic:
  """All runs of collectives of one kind along the same axes. received: bytes into a device. seconds: on the wires."""

  count: int = 0
  received: float = 0.0
  seconds: float = 0.0
  exposed: float = 0.0

  def add(self, other: 'Traffic', times: int = 1) -> None:
    for field in ('count', 'received', 'seconds', 'exposed'):
      setattr(self, field, getattr(self, field) + times * getattr(other, field))


@dataclasses.dataclass(slots=True)
class Span:
  """What a computation does, loops multiplied out; `bars` are of one round.

  sources: seconds of the core by where the number comes from. parts: the same by part of the model. busy: seconds of each
  wire. traffic: by (axes, kind). calls: by kernel: count, seconds, flops. flops: of products and kernels.
  """

  seconds: float = 0.0
  serial: float = 0.0
  flops: float = 0.0
  product_flops: float = 0.0
  hbm_bytes: float = 0.0
  sources: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  parts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  busy: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  calls: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  traffic: dict[tuple[str, str], Traffic] = dataclasses.field(default_factory=dict)
  bars: list[Bar] = dataclasses.field(default_factory=list)
  notes: set[str] = dataclasses.field(default_factory=set)

  def add(self, other: 'Span', times: int = 1) -> None:
    """Everything but the time and the bars of another span, that often."""
    for field in ('serial', 'flops', 'product_flops', 'hbm_bytes'):
      setattr(self, field, getattr(self, field) + times * getattr(other, field))
    for field in ('sources', 'parts', 'busy'):
      for key, value in getattr(other, field).items():
        getattr(self, field)[key] += times * value
    for name, numbers in other.calls.items():
      mine = self.calls.setdefault(name, [0, 0.0, 0.0])
      self.calls[name] = [a + times * b for a, b in zip(mine, numbers)]
    for key, traffic in other.traffic.items():
      self.traffic.setdefault(key, Traffic()).add(traffic, times)
    self.notes |= other.notes


@dataclasses.dataclass(slots=True, eq=False)
class Flight:
  """Something that was started. left: seconds of it still to go, alone on its wires. ended: when it was over, or None.
  steps: it goes on only while fusions that carry it run (continuation fusions)."""

  name: str
  part: str
  begin: float
  left: float
  wires: tuple[str, ...]
  collective: Collective | None
  steps: bool = False
  ended: float | None = None

  @property
  def lane(self) -> str:
    return ' '.join(sorted({wire.strip('+-') for wire in self.wires})) or 'none'


OVER = 1e-12  # seconds left of what is over: more than the step from one float to the next after an hour


class Air:
  """Flights that share wires share their rate: one that meets n - 1 others on its fullest wire goes at 1/n."""

  def __init__(self):
    self.now, self.flights = 0.0, []

  def advance(self, until: float) -> None:
    """Lets time pass."""
    while self.flights:
      on = collections.Counter(wire for flight in self.flights for wire in flight.wires)
      rates = [1 / max((on[wire] for wire in flight.wires), default=1) for flight in self.flights]
      soonest = min(flight.left / rate for flight, rate in zip(self.flights, rates))
      passed = min(soonest, until - self.now)
      for flight, rate in zip(self.flights, rates):
        flight.left -= passed * rate
      self.now += passed
      for flight in self.flights:
        if flight.left <= OVER:
          flight.ended = self.now
      if passed < soonest:
        break
      self.flights = [flight for flight in self.flights if flight.ended is None]
    self.now = max(self.now, until)

  def finish(self, flight: Flight) -> float:
    """Lets time pass until that one is over; returns when it was."""
    while flight.ended is None:
      self.advance(self.now + flight.left)
    return flight.ended


def walk(module: Module, network: Network, filled: float = 1.0, computation: Computation | None = None) -> Span:
  """The span of a computation, by default the entry. ValueError if the module is not scheduled.

  filled: the share of rows of the experts' buffers that have tokens.
  """
  if not module.scheduled:
    raise ValueError('this HLO is not scheduled (is_scheduled=true): take the text of the compiled program')
  return _Walk(module, network, filled, computation or module.entry).run()


class _Walk:
  """One pass over one computation."""

  def __init__(self, module: Module, network: Network, filled: float, computation: Computation):
    self.filled, self.crossings = filled, {}
    self.module, self.network, self.chip, self.computation = module, network, network.chip, computation
    self.now, self.air, self.carries, self.prepared, self.span = 0.0, Air(), {}, {}, Span()

  def run(self) -> Span:
    for instruction in self.computation:
      self._step(instruction)
    self.span.seconds = self.now
    return self.span

  def _step(self, i: Instruction) -> None:
    self._carry(i)
    if work.is_free(i):
      return
    if i.opcode == 'while':
      return self._loop(i)
    if i.opcode in ('call', 'conditional'):
      spans = [walk(self.module, self.network, self.filled, called) for called in self.module.called(i)]
      return self._inline(i, max(spans, key=lambda span: span.seconds), 1)
    if i.opcode in ('send', 'recv', 'send-done', 'recv-done'):
      return self._cross(i)
    if i.opcode.endswith('-done') or collectives.is_done_fusion(self.module, i):
      return self._finish(i)
    if i.opcode.endswith(('-update', '-start')) or collectives.is_start_fusion(self.module, i):
      return self._begin(i)
    collective = collective_of(self.module, i, self.network)
    if collective is not None:
      return self._land(self._fly(i, collective))
    if work.target(i) == 'tpu_custom_call':
      return self._kernel(i)
    self._compute(i)

  def _compute(self, i: Instruction) -> None:
    n_flops = work.flops(self.module, self.computation, i)
    n_bytes = work.hbm_bytes(self.module, self.computation, i)
    bound = max(n_flops / self.chip.flops, n_bytes / self.chip.hbm_rate)
    seconds, source = bound, ROOFLINE
    if i.cycles is not None and i.cycles / self.chip.clock >= bound:
      seconds, source = i.cycles / self.chip.clock, PRODUCTS if n_flops else OTHERS
    for flight in {id(f): f for f in (self.carries.get(name) for name in i.operands) if f and f.steps}.values():
      flight.left = max(0.0, flight.left - seconds)
    self._take(i, seconds, source, 'core')
    self.span.flops += n_flops
    self.span.product_flops += n_flops
    self.span.hbm_bytes += n_bytes

  def _kernel(self, i: Instruction) -> None:
    kernel = kernels.kernel_of(self.computation, i, self.chip, self.filled)
    calls = self.span.calls.setdefault(kernel.name, [0, 0.0, 0.0])
    self.span.calls[kernel.name] = [calls[0] + 1, calls[1] + kernel.seconds, calls[2] + kernel.flops]
    if not kernel.known:
      self.span.notes.add(f'kernel {kernel.name} is not known: only its memory traffic is counted')
    self._take(i, kernel.seconds, KERNELS, 'kernel')
    if kernel.seconds:
      self.span.bars[-1].name = kernel.name
    self.span.flops += kernel.flops
    self.span.hbm_bytes += kernel.hbm_bytes

  def _take(self, i: Instruction, seconds: float, source: str, lane: str) -> None:
    """The core is busy."""
    part = part_of(i.op_name)
    if seconds:
      self.span.bars.append(Bar(i.name, part, lane, self.now, seconds))
    self.now += seconds
    self.span.serial += seconds
    self.span.sources[source] += seconds
    self.span.parts[part] += seconds

  def _loop(self, i: Instruction) -> None:
    trips = trip_count(self.module, self.computation, i)
    if 'more_rounds' in i.op_name:
      trips = 0  # of `ops.exchange`: where a device's experts have more than ROUND times the mean
    if trips is None:
      self.span.notes.add(f'the trip count of {i.name} cannot be read: it is counted once')
    body = walk(self.module, self.network, self.filled, self.module.called(i)[1])
    self._inline(i, body, 1 if trips is None else trips)

  def _inline(self, i: Instruction, body: Span, trips: int) -> None:
    self.span.add(body, trips)
    self.span.bars.append(Bar(i.name, part_of(i.op_name), 'loop', self.now, body.seconds * trips, body, trips))
    self.now += body.seconds * trips

  # -- what runs beside the core

  def _begin(self, i: Instruction) -> None:
    """Starts a collective, a copy between memories, or work on the sparse cores."""
    if i.opcode.endswith('-start') and not i.operands:
      self.prepared[i.name] = i  # its program is loaded; what it is to do comes with an update
      return
    start = i
    if i.opcode.endswith('-update'):
      if i.operands[0] not in self.prepared:
        self.carries[i.name] = self.carries[i.operands[0]]
        return
      start = self.prepared[i.operands[0]]
    collective = collective_of(self.module, start, self.network)
    if collective is not None:
      self.carries[i.name] = self._fly(i, collective, steps=i.opcode == 'fusion')
      return
    if i.opcode in ('copy-start', 'slice-start', 'dynamic-slice-start'):
      n_bytes, to_host = work.moved_bytes(i)
      lane, rate = ('host', self.chip.host_rate) if to_host else ('copies', self.chip.hbm_rate)
    else:
      n_bytes = sum(a.padded_bytes for a in i.shape if a.space == 0)  # its operands come first in the tuple
      lane, rate = 'sparse core', self.chip.hbm_rate * SPARSE_CORE_SHARE
    self.span.hbm_bytes += n_bytes
    self.carries[i.name] = self._launch(Flight(i.name, part_of(i.op_name), self.now, n_bytes / rate, (lane,), None))

  def _cross(self, i: Instruction) -> None:
    """Transfers between slices: under way from their `send` on, needed at their `recv-done`."""
    collective = collectives.crossing_of(i, self.network) if i.opcode == 'send' else None
    if collective is not None:
      self.crossings[collectives.rendezvous(i)] = self._fly(i, collective)
    elif i.opcode == 'recv-done':
      received = collectives.rendezvous(self.computation.instructions[i.operands[0]])
      if received in self.crossings:
        self._land(self.crossings[received])

  def _fly(self, i: Instruction, collective: Collective, steps: bool = False) -> Flight:
    route = collective.route
    for wire in route.wires:
      self.span.busy[wire] += route.seconds
    traffic = self.span.traffic.setdefault((route.axes, collective.kind), Traffic())
    traffic.add(Traffic(1, route.received, route.seconds, 0.0))
    part = f'{collective.kind} {route.axes}, {part_of(collective.op_name)}'
    return self._launch(Flight(i.name, part, self.now, route.seconds, route.wires, collective, steps))

  def _launch(self, flight: Flight) -> Flight:
    self.span.serial += flight.left
    if not flight.steps:
      self.air.advance(self.now)
      self.air.flights.append(flight)
    return flight

  def _finish(self, i: Instruction) -> None:
    flight = self._flight(i)
    if flight is None:
      self.span.notes.add(f'{i.name} finishes something that was started elsewhere: it is taken as finished')
      return
    self._land(flight)

  def _land(self, flight: Flight) -> None:
    """The core goes on when the flight is over; it waits for that, if it is still to come."""
    if flight.steps:
      flight.ended = flight.ended or self.now + flight.left
    else:
      self.air.advance(self.now)
      self.air.finish(flight)
    if flight.ended > flight.begin:
      self.span.bars.append(Bar(flight.name, flight.part, flight.lane, flight.begin, flight.ended - flight.begin))
    waited = max(0.0, flight.ended - self.now)
    self.now += waited
    if flight.collective is None:
      self.span.sources[COPIES] += waited
      self.span.parts['copies'] += waited
    else:
      self.span.sources[LINKS] += waited
      self.span.parts[part_of(flight.collective.op_name)] += waited
      self.span.traffic[flight.collective.route.axes, flight.collective.kind].exposed += waited

  def _flight(self, i: Instruction) -> Flight | None:
    """What an instruction goes on with or finishes."""
    for name in i.operands:
      if name in self.carries:
        return self.carries[name]
    return None

  def _carry(self, i: Instruction) -> None:
    """Follows a flight through tuples and through the fusions that carry it along as buffers of theirs."""
    if i.opcode == 'get-tuple-element' and i.operands[0] in self.carries:
      flight = self.carries[i.operands[0]]
      source = self.computation.instructions[i.operands[0]]
      if not flight.steps or source.name == flight.name or i.number('index') in self._carried(source):
        self.carries[i.name] = flight
    elif i.opcode == 'fusion' and (operands := [name for name in i.operands if name in self.carries]):
      if self.carries[operands[0]].steps and i.aliases:
        self.carries[i.name] = self.carries[operands[0]]

  def _carried(self, fusion: Instruction) -> set[int]:
    return {out for out, operand in fusion.aliases.items() if fusion.operands[operand] in self.carries}


GENERIC = ('', 'while', 'body', 'cond', 'branch_0_fun', 'branch_1_fun', 'eval_jaxpr', 'checkpoint', 'rematted_computation',
           'shard_map', 'closed_call', 'custom_vjp_call', 'remat')


def part_of(op_name: str) -> str:
  """'mlp, backward' of 'jit(train_step)/transpose(jvp())/while/body/eval_jaxpr/checkpoint/mlp/BTF,FD->BTD/dot_general'."""
  if not op_name:
    return 'other'
  phase = ', recomputed' if 'rematted' in op_name else ', backward' if 'transpose(' in op_name else ''
  path = op_name.split('/')
  path = path[:-3] if path[-1] == 'pallas_call' else path[:-1]  # the name of a kernel comes twice
  path = [re.sub(r'^(transpose\(|jvp\()+|\)+$', '', name) for name in path if not name.startswith(('jit(', 'vmap('))]
  names = [name for name in path if name not in GENERIC]
  return (names[0] if names and '->' not in names[0] else 'other') + phase
