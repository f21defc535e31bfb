"""Finds the machine that slows down all others. The time of a step does not tell: in SPMD every host waits for the slowest
one in each collective, and all measure the same. What each does alone tells: waiting for its own data, handing over its part
of a checkpoint, the processor time of its Python, and a fixed product on each of its chips.
"""

import collections
import json
import socket
import statistics
import time

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name

TOO_SLOW, ROUNDS = 1.15, 3  # times the median, so many rounds in a row: tell
MATTERS = 0.05  # of a step's time: what a host loses beyond the median, to be worth a word
KEY = 'maxlm/stragglers'
DOES = {'data': 'waits for data', 'checkpoint': 'hands over checkpoints for', 'cpu': 'computes on its processor for'}


class Stragglers:
  """Every so many steps the processes put what they measured into the coordinator's store, and the first process compares
  what they put there a round ago: nobody waits for anybody. Alone, a process compares its own devices.

  every_steps: 0 never compares. A round costs four products of some milliseconds on each device, in which it does nothing
  else: 100 steps or more are a good distance.
  """

  def __init__(self, every_steps: int):
    self._every, self._round = every_steps, 0
    self._seconds = collections.Counter()  # by phase, and 'cpu': in this round
    self._phase, self._since = '', time.monotonic()
    self._began = None  # of the round: (step, processor time)
    self._streaks = collections.Counter()  # rounds in a row: (what, who)
    self._probes = None

  def enter(self, phase: str) -> None:
    """Another phase of the loop begins, as `ledger.PHASES` names them."""
    now = time.monotonic()
    self._seconds[self._phase] += now - self._since
    self._phase, self._since = phase, now

  def step(self, done: int) -> list[str]:
    """A step was started. Lines about what is slow, on the first process and where a round ends, each once until it is over.

    Every process calls it after every step, from the main thread.
    """
    if self._began is None or done <= self._began[0]:  # the first steps compile; the run may have been rewound
      self._begin(done)
    elif self._every and done - self._began[0] >= self._every and jax.device_count() > 1:
      self.enter(self._phase)
      report = self._report(done)
      self._begin(done)
      return self._exchange(report)
    return []

  def _begin(self, done: int) -> None:
    self._seconds.clear()
    self._since, self._began = time.monotonic(), (done, time.thread_time())

  def _report(self, done: int) -> dict:
    """What this process measured, in seconds a step; of its devices, seconds of the product."""
    steps = done - self._began[0]
    self._seconds['cpu'] = time.thread_time() - self._began[1]
    self._probes = self._probes or [_Probe(device) for device in jax.local_devices()]
    loop = sum(self._seconds[phase] for phase in ('data', 'step', 'checkpoint'))
    return {'host': socket.gethostname(), 'loop': loop / steps, **{what: self._seconds[what] / steps for what in DOES},
            'devices': {str(probe.device): probe.seconds() for probe in self._probes}}

  def _exchange(self, report: dict) -> list[str]:
    client, process = distributed.global_state.client, distributed.global_state.process_id
    self._round += 1
    if client is None:
      return self.judge({0: report})
    try:
      client.key_value_set(f'{KEY}/{self._round}/{process}', json.dumps(report))
      if process or self._round == 1:
        return []
      before = f'{KEY}/{self._round - 1}/'
      reports = {int(key.rpartition('/')[2]): json.loads(value) for key, value in client.key_value_dir_get(before)}
      client.key_value_delete(before)
      return self.judge(reports)
    except RuntimeError:  # the coordinator does not answer: if it is gone, JAX ends this process itself
      return []

  def judge(self, reports: dict[int, dict]) -> list[str]:
    """Lines about who is slow in the reports, by process, of another round."""
    slow, n = {}, len(reports)
    for what, does in DOES.items():
      median = statistics.median_low(report[what] for report in reports.values())
      for process, report in reports.items():
        if report[what] > TOO_SLOW * median and report[what] - median > MATTERS * report['loop']:
          slow[what, process] = (f'process {process} (host {report["host"]}) {does} {report[what]:.3g} s a step, the median '
                                 f'of {n} processes is {median:.3g} s')
    devices = [(process, *device) for process, report in reports.items() for device in report['devices'].items()]
    median = statistics.median_low(seconds for *_, seconds in devices)
    for process, name, seconds in devices:
      if seconds > TOO_SLOW * median:
        slow['device', process, name] = (f'device {name} of process {process} (host {reports[process]["host"]}) takes '
                                         f'{seconds / median:.2f} x the median of {len(devices)} devices for a product')
    self._streaks = collections.Counter({who: self._streaks[who] + 1 for who in slow})
    return [f'{line}, {ROUNDS} rounds in a row' for who, line in slow.items() if self._streaks[who] == ROUNDS]


class _Probe:
  """A chain of products on one device, without collectives: about 1 TFLOP, on a CPU 0.5 GFLOP."""

  def __init__(self, device: jax.Device):
    self.device = device
    size, rounds = (256, 16) if device.platform == 'cpu' else (2048, 64)
    self._x = jax.device_put(np.full((size, size), 1 / size, np.float32 if device.platform == 'cpu' else jax.numpy.bfloat16),
                             device)
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):  # the mesh of the run has other devices
      chain = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, y: y @ x, x))
      self._chain = chain.lower(self._x).compile()

  def seconds(self) -> float:
    """Of the fastest of three, after one that waits for what the device has to do before."""
    times = []
    for _ in range(4):
      began = time.perf_counter()
      self._chain(self._x).block_until_ready()
      times.append(time.perf_counter() - began)
    return min(times[1:])
