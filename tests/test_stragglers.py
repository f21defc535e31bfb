"""A machine that slows the others down is named, on real processes; noise, and what costs nothing, is not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from maxlm.stragglers import KEY, ROUNDS, Stragglers, _Probe
from tests.jobs import free_port

ROOT = Path(__file__).parents[1]


def report(loop: float = 1.0, devices: tuple[float, ...] = (0.01, 0.01), **seconds: float) -> dict:
  return {'host': 'h', 'loop': loop, 'data': 0.001, 'checkpoint': 0.0, 'cpu': 0.01, **seconds,
          'devices': {f'chip{i}': value for i, value in enumerate(devices)}}


def judged(*rounds: dict[int, dict]) -> list[list[str]]:
  stragglers = Stragglers(1)
  return [stragglers.judge(reports) for reports in rounds]


def test_a_slow_chip_is_named_after_three_rounds_in_a_row_and_once():
  slow = {0: report(), 1: report(devices=(0.01, 0.012)), 2: report()}
  fine = {0: report(), 1: report(devices=(0.01, 0.0114)), 2: report(devices=(0.009, 0.01))}
  said = judged(slow, slow, fine, slow, slow, slow, slow, fine, *[slow] * ROUNDS)
  assert [len(lines) for lines in said] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
  assert 'device chip1 of process 1 (host h) takes 1.20 x the median of 6 devices' in said[5][0]


@pytest.mark.parametrize('what, words', [
  ('data', 'waits for data 0.3 s'), ('checkpoint', 'hands over checkpoints for 0.3 s'),
  ('cpu', 'computes on its processor for 0.3 s')])
def test_a_host_that_loses_time_is_named(what, words):
  reports = {process: report(**({what: 0.3} if process == 5 else {})) for process in range(8)}
  assert words in judged(*[reports] * 3)[-1][0] and 'process 5 ' in judged(*[reports] * 3)[-1][0]


def test_what_costs_a_step_next_to_nothing_is_not_told():
  """The first process alone writes the record: that is many times what the others do, and a millisecond."""
  reports = {process: report(cpu=0.03 if process == 0 else 0.001) for process in range(4)}
  assert judged(*[reports] * 5) == [[]] * 5


def test_of_two_the_faster_is_the_measure():
  assert judged(*[{0: report(), 1: report(data=0.1)}] * 3)[-1]


def test_a_round_begins_with_the_first_step_and_again_after_a_rewind():
  stragglers, reports = Stragglers(3), []
  stragglers._exchange = lambda report: reports.append(report) or []
  for step in [1, 2, 3, 4, 5, 2, 3, 4, 5]:
    stragglers.enter('data')
    time.sleep(0.02)
    stragglers.enter('step')
    stragglers.step(step)
  assert len(reports) == 2 and all(0.02 <= report['data'] < 0.05 <= 0.05 + report['loop'] for report in reports)
  assert len(reports[0]['devices']) == 8
  assert not any(Stragglers(0).step(step) for step in range(100))


def test_the_probe_takes_the_time_of_its_own_product(mesh_of):
  """Not that of what its device had to do before it; and under the mesh of a run, which has other devices."""
  with mesh_of(8):
    probe = _Probe(jax.local_devices()[3])
    alone = probe.seconds()
  big = jax.device_put(jnp.ones((1024, 1024)), jax.local_devices()[3])
  busy = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x, x))
  busy(big).block_until_ready()
  began = time.perf_counter()
  waiting = busy(big)
  seconds = probe.seconds()
  took = time.perf_counter() - began
  waiting.block_until_ready()
  assert took > 10 * seconds and seconds < 5 * alone


TOGETHER = f"""
import sys, time
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from maxlm import hosts
from maxlm.stragglers import Stragglers
port, process = sys.argv[1], int(sys.argv[2])
hosts.connect(f'127.0.0.1:{{port}}', 2, process)
mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,))
jax.set_mesh(mesh)
x = jax.make_array_from_callback((2,), jax.NamedSharding(mesh, jax.P('x')), lambda i: np.ones(1, np.float32))
add = jax.jit(lambda x: x + jnp.sum(x))
stragglers = Stragglers(4)
for step in range(1, 30):
  stragglers.enter('data')
  time.sleep(0.15 if process == 1 else 0.01)
  stragglers.enter('step')
  add(x).block_until_ready()
  for line in stragglers.step(step):
    print(line, flush=True)
hosts.barrier('end')
if process == 0:
  print(len(distributed.global_state.client.key_value_dir_get('{KEY}')), flush=True)
hosts.shutdown()
"""


def test_the_first_of_two_processes_names_the_one_whose_data_is_slow():
  port = free_port()
  processes = [subprocess.Popen([sys.executable, '-c', TOGETHER, str(port), str(i)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
               for i in range(2)]
  try:
    (first, error), (second, _) = [process.communicate(timeout=90) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], error
  *lines, left = first.splitlines()
  told, = [line for line in lines if 'data' in line]
  assert 'process 1 (host ' in told and 'waits for data 0.15' in told and 'data' not in second, (first, error)
  assert int(left) <= 2  # the keys of rounds that were read are gone


def test_a_report_is_json(mesh_of):
  stragglers = Stragglers(1)
  assert stragglers.step(1) == []
  stragglers.enter('step')
  assert set(json.loads(json.dumps(stragglers._report(2)))) == {'host', 'loop', 'data', 'checkpoint', 'cpu', 'devices'}
