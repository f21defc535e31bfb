"""Runs of configs/tiny.py as users start them: `python -m maxlm.train` in a process of its own, or several together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from maxlm.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
HEARTBEAT = 10  # seconds until the others notice that a process is gone


class Job:
  """Processes that train together in a workdir. What process i says is in said(i); it goes to files beside the workdir."""

  def __init__(self, corpus: Path, workdir: Path, *arguments: str, processes: int = 1, devices: int = 1, env=None,
               of_process=lambda process: (), module: str = 'maxlm.train', heartbeat: int = HEARTBEAT, wrap=()):
    """devices: of each process. of_process: arguments of one of them alone. wrap: words before the command."""
    name, port = f'{workdir.name}-{time.time_ns()}', free_port()
    together = [f'--coordinator=127.0.0.1:{port}', f'--processes={processes}', f'--heartbeat_seconds={heartbeat}']
    self.workdir, self._said, self.processes = workdir, [], []
    for i in range(processes):
      command = [*wrap, sys.executable, '-m', module, f'--config={ROOT}/configs/tiny.py', f'--config.data.corpus={corpus}',
                 f'--workdir={workdir}', *arguments, *of_process(i)]
      command += [*together, f'--process={i}'] if processes > 1 else []
      self._said.append(workdir.with_name(f'{name}-{i}.stderr'))
      with open(self._said[-1], 'w') as stderr, open(workdir.with_name(f'{name}-{i}.stdout'), 'w') as stdout:
        self.processes.append(subprocess.Popen(
          command, cwd=workdir.parent, stdout=stdout, stderr=stderr,
          env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': str(devices)} | (env or {})))

  def said(self, process: int = 0) -> str:
    return self._said[process].read_text()

  def told(self) -> str:
    """All of them, for the message of a failed test."""
    return '\n'.join(f'-- process {i}: {p.poll()}\n{self.said(i)[-3000:]}' for i, p in enumerate(self.processes))

  def wait(self, seconds: float = 300) -> list[int]:
    """Exit codes. Whoever is left after so long is killed, and the test fails."""
    until = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      raise AssertionError(f'not ended after {seconds} s:\n{self.told()}') from None

  def wait_until(self, condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
      assert all(process.poll() is None for process in self.processes), f'it ended before:\n{self.told()}'
      assert time.monotonic() < until, f'it did not come to that:\n{self.told()}'
      time.sleep(0.005)

  def kill(self, *which: int) -> None:
    """kill -9 of these processes, or of all, and no other word."""
    for process in [self.processes[i] for i in which] or self.processes:
      if process.poll() is None:
        process.send_signal(signal.SIGKILL)

  def terminate(self, process: int = 0) -> None:
    self.processes[process].terminate()


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def has_saved(workdir: Path, step: int):
  return lambda: (Checkpoints(workdir / 'checkpoints').latest() or 0) >= step


def record(workdir: Path) -> list[dict]:
  """metrics.jsonl without what depends on the clock."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{name: value for name, value in line.items() if name not in ('time', 'tokens_per_second', 'mfu')} for line in lines
          if not any(name.startswith('goodput/') for name in line)]


def batches(workdir: Path) -> dict[int, str]:
  """The digest of each step's batch."""
  return {line['step']: line['batch'] for line in record(workdir) if 'batch' in line}


def losses(workdir: Path) -> list[float]:
  return [line['loss'] for line in record(workdir) if 'loss' in line]
