"""A process that hangs says where and exits 124, wherever it hangs, and its peers with it; a slow one does not."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm.watchdog import Watchdog
from tests.jobs import free_port

ROOT = Path(__file__).parents[1]

HEAD = """
import sys, time
from maxlm.watchdog import Watchdog
where = sys.argv[1]
"""


def begin(code: str, where: Path, *arguments: object, devices: int = 1) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-c', HEAD + code, str(where), *map(str, arguments)], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(devices)})


HANGS = {
  'read': 'sys.stdin.read()',
  'python': 'while True: pass',
  'callback': """
import jax
jax.jit(lambda x: jax.pure_callback(lambda y: time.sleep(1000) or y, x, x))(1.0).block_until_ready()""",
  'lock': """
import threading
lock = threading.Lock()
lock.acquire()
lock.acquire()""",
}


@pytest.mark.parametrize('kind', HANGS)
def test_a_process_that_hangs_says_where_and_exits_124(tmp_path, kind):
  hang = '\n'.join('  ' + line for line in HANGS[kind].strip().splitlines())
  process = begin(f"""
def where_it_hangs():
{hang}
watchdog = Watchdog(1, 2, where, last_words=lambda why: open(where + '/why', 'w').write(why))
watchdog.enter('compile')
where_it_hangs()
""", tmp_path)
  began = time.monotonic()
  assert process.wait(60) == 124
  assert time.monotonic() - began > 2
  stderr = process.stderr.read()
  line, = [line for line in stderr.splitlines() if line.startswith('watchdog:')]
  assert re.search(r'compile has lasted [2-4] s, and 2 are allowed', line) and 'process 0' in line
  stacks, = tmp_path.glob('stacks-0-*.txt')
  for text in stderr, stacks.read_text():
    assert 'in where_it_hangs' in text or kind == 'callback' and 'pure_callback' in text
  assert (tmp_path / 'why').read_text().startswith('hung: process 0')


def test_a_step_that_takes_much_longer_than_others_is_a_hang_though_the_start_may_take_longer(tmp_path):
  process = begin("""
with Watchdog(0.5, 1000, where) as watchdog:
  watchdog.enter('compile')
  time.sleep(1)
  for step in range(20):
    watchdog.enter('data')
    watchdog.enter('step')
    time.sleep(0.5 if step == 0 else 0.1)
  print(watchdog.budget('step'), watchdog.budget('data'), watchdog.budget('checkpoint'), flush=True)
  watchdog.enter('data')
  watchdog.enter('step')
  time.sleep(1000)
""", tmp_path)
  assert process.wait(60) == 124
  step, data, checkpoint = map(float, process.stdout.readline().split())
  assert 2.5 <= step <= 4 and (data, checkpoint) == (0.5, 1000)
  assert 'step has lasted' in process.stderr.read()


def test_a_run_that_is_slow_and_one_that_stopped_watching_are_left_alone(tmp_path):
  process = begin("""
with Watchdog(0.5, 1, where) as watchdog:
  for step in range(8):
    watchdog.enter('data')
    watchdog.enter('step')
    time.sleep(0.4)
  watchdog.enter('step')
  time.sleep(1.2)  # under five times what they took
  watchdog.enter('finish')
time.sleep(3)
Watchdog(0.5, 1, where).stop()
time.sleep(3)
""", tmp_path)
  assert process.wait(60) == 0, process.stderr.read()
  assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_stopped_for_a_while_did_not_hang(tmp_path):
  process = begin("""
with Watchdog(1, 3, where) as watchdog:
  watchdog.enter('compile')
  print('ready', flush=True)
  time.sleep(5)  # of which it is stopped for four
""", tmp_path)
  assert process.stdout.readline() == 'ready\n'
  time.sleep(0.5)
  process.send_signal(signal.SIGSTOP)
  time.sleep(4)  # longer than allowed, not so long as the last resort waits
  process.send_signal(signal.SIGCONT)
  assert process.wait(60) == 0, process.stderr.read()


def test_native_code_that_holds_the_interpreter_is_ended_too(tmp_path):
  process = begin("""
import ctypes
watchdog = Watchdog(1, 2, where)
watchdog.enter('compile')
time.sleep(1)
ctypes.PyDLL(None).sleep(1000)
""", tmp_path)
  assert process.wait(60) == 1
  assert 'Timeout (0:00:04)!' in process.stderr.read()


def test_a_disk_that_takes_nothing_does_not_keep_it_from_ending(tmp_path):
  process = begin("""
watchdog = Watchdog(1, 2, where + '/not/there')
watchdog.enter('compile')
time.sleep(1000)
""", tmp_path)
  assert process.wait(60) == 124
  assert 'No such file' in process.stderr.read()


TOGETHER = """
import jax
import jax.numpy as jnp
from maxlm import hosts
process, port, who = int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
hosts.connect(f'127.0.0.1:{port}', 2, process)
mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.make_array_from_callback((2,), jax.NamedSharding(mesh, jax.P('x')), lambda i: jnp.ones(1))
add = jax.jit(lambda x: x + jnp.sum(x))
def train():
  for step in range(1000):
    watchdog.enter('data')
    if process == who and step == 20:
      watchdog.enter('checkpoint')  # this one has time, and does not trip by itself
      time.sleep(1000)
    watchdog.enter('step')
    add(x).block_until_ready()
watchdog = Watchdog(3, 1000, where)
train()
"""


@pytest.mark.parametrize('who', [0, 1])
def test_when_one_host_hangs_all_say_where_they_are_and_exit_124(tmp_path, who):
  """One sleeps, the other waits for it in a collective and trips: the first learns of it from the store."""
  port = free_port()
  processes = [begin(TOGETHER, tmp_path, i, port, who) for i in range(2)]
  try:
    codes = [process.wait(90) for process in processes]
  finally:
    for process in processes:
      process.kill()
  said = [process.stderr.read() for process in processes]
  assert codes == [124, 124], said
  assert all(f'watchdog: process {1 - who} on ' in text and 'step has lasted 3 s' in text for text in said)
  assert all('in train' in text for text in said)
  assert sorted(path.name.split('-')[1] for path in tmp_path.glob('stacks-*.txt')) == ['0', '1']


def test_a_phase_change_costs_microseconds(tmp_path):
  with Watchdog(60, 60, tmp_path) as watchdog:
    began = time.perf_counter()
    for _ in range(20_000):
      watchdog.enter('data')
      watchdog.enter('step')
    assert (time.perf_counter() - began) / 40_000 < 20e-6
