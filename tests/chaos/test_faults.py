"""The outcome table of docs/reliability.md: what goes wrong, how the run ends, and that the same command then goes on to the
losses and the bits of a run that nothing disturbed. Real processes; what goes wrong inside one, tests/chaos/provoked.py does.

Elsewhere: a process or the coordinator dies, SIGTERM during steps of two processes (tests/test_hosts.py); SIGTERM during the
corpus build, compile, data wait, steps, evaluation, finish of one (tests/test_train.py); kills at random (campaign.py).
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline import loader
from maxlm import ledger
from maxlm.checkpoint import Checkpoints
from tests.jobs import ROOT, Job, batches, has_saved, losses, record
from tests.make_corpus import make_corpus

N_STEPS = 24
SHORT = ('--config.model.n_layers=1', f'--config.tokens={N_STEPS * 512}', '--config.checkpoint.every_steps=5',
         '--config.evals.every_steps=8', '--config.evals.rows=8')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('corpus') / 'tiny'
  make_corpus(path)
  return path


@pytest.fixture(scope='module')
def alone(corpus, tmp_path_factory) -> Path:
  """The workdir of a run that nothing disturbed: checkpoints 15, 20 and 24."""
  job = Job(corpus, tmp_path_factory.mktemp('alone') / 'run', *SHORT)
  assert job.wait() == [0], job.told()
  return job.workdir


@pytest.fixture(scope='module')
def together(corpus, tmp_path_factory) -> Path:
  """The same on two processes."""
  job = Job(corpus, tmp_path_factory.mktemp('together') / 'run', *SHORT, processes=2)
  assert job.wait() == [0, 0], job.told()
  return job.workdir


def provoked(corpus: Path, workdir: Path, *arguments: str, processes: int = 1, **what) -> Job:
  return Job(corpus, workdir, *SHORT, *arguments, processes=processes, module='tests.chaos.provoked',
             env={'PROVOKE': json.dumps(what)})


def goes_on(corpus: Path, workdir: Path, as_in: Path, *arguments: str, processes: int = 1) -> Job:
  """The same command, undisturbed, ends with the record and the bits of that run."""
  job = Job(corpus, workdir, *SHORT, *arguments, processes=processes)
  assert job.wait() == [0] * processes, job.told()
  assert_same(workdir, as_in)
  return job


def assert_same(workdir: Path, other: Path) -> None:
  assert record(workdir) == record(other) and len(losses(other)) == N_STEPS
  digests = [Checkpoints(run / 'checkpoints').digests(N_STEPS) for run in (workdir, other)]
  assert digests[0] == digests[1] and len(digests[0]['opt']) > 10


def steps(workdir: Path) -> list[int]:
  return Checkpoints(workdir / 'checkpoints').steps()


def as_if_killed(run: Path, workdir: Path, *without: str) -> Path:
  """A copy of a finished run, without its end and these checkpoints."""
  shutil.copytree(run, workdir, ignore=shutil.ignore_patterns('DONE', *without))
  return workdir


# -- damage


def flip(workdir: Path, step: int) -> None:
  """One bit in the middle of the largest file of the arrays, as a disk would."""
  path = max((workdir / 'checkpoints' / str(step)).rglob('*/d/*'), key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def verify(workdir: Path) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', 'maxlm.checkpoint', 'verify', workdir], cwd=ROOT, capture_output=True, text=True)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_serves(alone, corpus, tmp_path):
  run = as_if_killed(alone, tmp_path / 'run', '24')
  flip(run, 20)
  job = goes_on(corpus, run, alone)
  lines = job.said().splitlines()
  told, = [line for line in lines if line.startswith('DAMAGED')]
  assert f'{run}/checkpoints/20 is damaged (there are also 15): ' in told and 'is not what was saved' in told
  assert f'resumed  at step 15 from {run}' in lines
  assert (run / 'checkpoints' / 'damaged-20' / 'REASON').read_text() in told + '\n' and steps(run) == [15, 20, 24]


@pytest.mark.slow
def test_where_it_is_the_only_one_the_run_does_not_begin_anew_unasked(alone, corpus, tmp_path):
  run = as_if_killed(alone, tmp_path / 'run', '24', '15')
  flip(run, 20)
  found = verify(run)
  assert found.returncode == 1 and '20 is damaged (there is no other)' in found.stdout
  before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
  job = Job(corpus, run, *SHORT)
  assert job.wait() == [2], job.told()
  line = job.said().splitlines()[-1]
  assert line.startswith('error: ') and 'is the only one, and it is not set aside: put a good one beside it, or remove it' in line
  assert {path: path.read_bytes() for path in before} == before
  shutil.rmtree(run / 'checkpoints' / '20')
  goes_on(corpus, run, alone)
