"""Several processes: one run on one, two and again one of them; stops, disagreement and death of one."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from maxlm import hosts, train
from maxlm.checkpoint import Checkpoints
from tests.jobs import Job, batches, has_saved, losses

SHORT = ('--config.model.n_layers=2', '--config.tokens=12288', '--config.checkpoint.every_steps=6',
         '--config.evals.every_steps=8')
N_STEPS = 24


@pytest.fixture(scope='module')
def alone(corpus, tmp_path_factory) -> Path:
  """The workdir of an undisturbed run of one process with two devices."""
  job = Job(corpus, tmp_path_factory.mktemp('alone') / 'run', *SHORT, devices=2)
  assert job.wait() == [0], job.told()
  return job.workdir


def digests(workdir: Path, step: int) -> dict:
  return Checkpoints(workdir / 'checkpoints').digests(step)


def test_two_processes_train_what_one_does_and_one_of_them_speaks(corpus, alone, tmp_path):
  job = Job(corpus, tmp_path / 'run', *SHORT, processes=2)
  assert job.wait() == [0, 0], job.told()
  assert batches(job.workdir) == batches(alone) and len(batches(alone)) == N_STEPS
  np.testing.assert_allclose(losses(job.workdir), losses(alone), rtol=3e-6)
  assert 'Finished in' in (job.workdir.parent.glob('*-0.stdout').__next__()).read_text()
  assert 'Finished in' not in (job.workdir.parent.glob('*-1.stdout').__next__()).read_text()
  assert 'step ' in job.said(0) and 'step ' not in job.said(1)


def test_one_run_on_two_processes_then_one_then_two_on_other_meshes(corpus, alone, tmp_path):
  """The same batches at every step, and after each restore the state that was saved: restore verifies every array."""
  def on_mesh(**sizes: int) -> list[str]:
    return [f'--config.mesh.{axis}={size}' for axis, size in ({'fsdp': 1} | sizes).items()]

  workdir = tmp_path / 'run'
  parts = {6: (2, 1, on_mesh(fsdp=2)), 12: (1, 1, on_mesh()), 18: (2, 2, on_mesh(fsdp=2, tensor=2))}
  for step, (processes, devices, mesh) in parts.items():
    job = Job(corpus, workdir, *SHORT, *mesh, processes=processes, devices=devices)
    job.wait_until(has_saved(workdir, step))
    job.kill()
    job.wait()
    assert 'resumed' in job.said() or step == 6
  job = Job(corpus, workdir, *SHORT, *on_mesh(data=2, context=2), devices=4)
  assert job.wait() == [0], job.told()
  assert batches(workdir) == batches(alone)
  np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)


@pytest.mark.parametrize('victim', [0, 1])
def test_sigterm_to_one_process_stops_all_at_the_same_step(corpus, alone, tmp_path, victim):
  slow = ('--config.tokens=1228800', '--config.checkpoint.every_steps=1000000', '--config.evals.every_steps=0')
  job = Job(corpus, tmp_path / 'run', *SHORT, *slow, processes=2)
  job.wait_until(lambda: (tmp_path / 'run' / 'metrics.jsonl').exists() and len(batches(tmp_path / 'run')) > 5)
  job.terminate(victim)
  assert job.wait(60) == [train.EXIT_PREEMPTED] * 2, job.told()
  step = Checkpoints(tmp_path / 'run' / 'checkpoints').latest()
  assert len(losses(tmp_path / 'run')) == step > 5
  assert f'stopped  by SIGTERM after {step} steps, all saved' in job.said()


def test_hosts_that_do_not_run_the_same_are_told_before_the_first_step(corpus, tmp_path):
  job = Job(corpus, tmp_path / 'run', *SHORT, processes=2,
            of_process=lambda i: [f'--config.optim.peak_lr={1e-3 * (i + 1)}'])
  assert job.wait(120) == [2, 2], job.told()
  for i in range(2):
    assert 'the hosts do not run the same: the config is' in job.said(i)
  assert not (tmp_path / 'run' / 'checkpoints').exists()


@pytest.mark.parametrize('victim', [0, 1], ids=['the coordinator', 'another'])
def test_when_one_dies_the_others_end_and_the_same_command_goes_on(corpus, alone, tmp_path, victim):
  job = Job(corpus, tmp_path / 'run', *SHORT, processes=2)
  job.wait_until(has_saved(tmp_path / 'run', 6))
  job.kill(victim)
  codes = job.wait(90)
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, None), job.told()
  job = Job(corpus, tmp_path / 'run', *SHORT, processes=2)
  assert job.wait() == [0, 0], job.told()
  assert batches(tmp_path / 'run') == batches(alone)


def test_a_second_run_in_a_workdir_is_refused(corpus, tmp_path):
  first = Job(corpus, tmp_path / 'run', *SHORT, '--config.tokens=1228800')
  first.wait_until(has_saved(tmp_path / 'run', 6))
  second = Job(corpus, tmp_path / 'run', *SHORT, '--config.tokens=1228800')
  assert second.wait(60) == [2] and 'another process is running in' in second.said(), second.told()
  first.terminate()
  assert first.wait(60) == [train.EXIT_PREEMPTED], first.told()


def test_a_corpus_with_other_rows_is_refused_on_resume(corpus, alone, tmp_path):
  shutil.copytree(corpus, tmp_path / 'corpus')
  manifest = json.loads((corpus / 'manifest.json').read_text())
  for entry in manifest['rows']:
    entry['xxh3'] = '0' * 32  # as if it had been built of other documents
  (tmp_path / 'corpus' / 'manifest.json').write_text(json.dumps(manifest))
  shutil.copytree(alone, tmp_path / 'run', ignore=shutil.ignore_patterns('DONE'))
  job = Job(tmp_path / 'corpus', tmp_path / 'run', *SHORT, '--config.tokens=20480')
  assert job.wait(60) == [2] and 'was begun with other rows than' in job.said(), job.told()


@pytest.mark.parametrize('arguments, words', [
  ((dict(processes=2),), '--processes and --process need --coordinator'),
  ((dict(coordinator='h:1', processes=2, process=2),), '--process=2 of --processes=2'),
  ((dict(coordinator='h', processes=2, process=1),), 'it is HOST:PORT')], ids=['no coordinator', 'numbers', 'no port'])
def test_what_does_not_fit_is_refused(arguments, words):
  with pytest.raises(ValueError, match=words):
    hosts.connect(**arguments[0])


def test_alone_a_process_agrees_with_itself():
  assert hosts.agree('x', lambda: {'a': 1}) == {'a': 1} and hosts.any_of('y', True) and not hosts.any_of('y', False)
  hosts.barrier('z')
  hosts.check_equal(lambda: pytest.fail('nobody else is there to ask'))
  assert hosts.is_first() and len(hosts.fingerprint('a text')) == 12
