"""The outcome table of docs/reliability.md: what goes wrong, how the run ends, and that the same command then goes on to the
losses and the bits of a run that nothing disturbed. Real processes; what goes wrong inside one, provoked.py does.

Elsewhere: a process or the coordinator dies, SIGTERM during steps of two processes (tests/test_hosts.py); SIGTERM during the
corpus build, compile, data wait, steps, evaluation, finish of one (tests/test_train.py); kills at random (campaign.py).
"""

import json
import os
import re
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
from tests.jobs import ROOT, Job, batches, free_port, has_saved, losses, record

N_STEPS = 24
SHORT = ('--config.model.n_layers=1', f'--config.tokens={N_STEPS * 512}', '--config.checkpoint.every_steps=5',
         '--config.evals.every_steps=8', '--config.evals.rows=8')


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
  command = [sys.executable, '-m', 'maxlm.checkpoint', 'verify', workdir]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
  assert line.startswith('error: ') and 'is the only one, and it is not set aside: put a good one beside it, or' in line
  assert {path: path.read_bytes() for path in before} == before
  shutil.rmtree(run / 'checkpoints' / '20')
  goes_on(corpus, run, alone)


# -- hangs

HANG = '--config.health.hang_seconds=5', '--config.health.startup_seconds=60'


def stacks(workdir: Path, process: int) -> str:
  path, = workdir.glob(f'stacks-{process}-*.txt')
  return path.read_text()


def test_a_source_of_batches_that_blocks_for_ever_is_an_exit_code_and_stacks(alone, corpus, tmp_path):
  job = provoked(corpus, tmp_path / 'run', *HANG, hang=12)
  job.wait_until(lambda: len(batches_so_far(tmp_path / 'run')) >= 11)
  began = time.monotonic()
  assert job.wait(60) == [124], job.told()
  assert time.monotonic() - began < 15
  assert 'watchdog: process 0 on ' in job.said() and ': data has lasted 5 s, and 5 are allowed' in job.said()
  assert ' in wait_for_ever' in stacks(tmp_path / 'run', 0) and ' in wait_for_ever' in job.said()
  assert ledger.read(tmp_path / 'run' / 'goodput.jsonl').attempts[-1].how.startswith('hung: process 0 on ')
  goes_on(corpus, tmp_path / 'run', alone, *HANG)


def batches_so_far(workdir: Path) -> dict[int, str]:
  try:
    return batches(workdir)
  except (OSError, ValueError):  # not there yet, or a line is half written
    return {}


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1], ids=['the coordinator', 'another'])
def test_a_frozen_process_ends_the_other_within_its_budget(together, corpus, tmp_path, victim):
  """As a host is that swaps, or whose disk hangs: its connections stand."""
  run, seldom = tmp_path / 'run', '--config.checkpoint.every_steps=12'
  job = Job(corpus, run, *SHORT, *HANG, seldom, processes=2, heartbeat=100)
  job.wait_until(lambda: len(batches_so_far(run)) >= 6)
  job.processes[victim].send_signal(signal.SIGSTOP)
  try:
    assert job.processes[1 - victim].wait(100) == 124, job.told()
  finally:
    job.processes[victim].send_signal(signal.SIGCONT)
    time.sleep(0.5)
    job.kill()
  job.wait()
  assert f'watchdog: process {1 - victim} on ' in job.said(1 - victim) and 'are allowed' in job.said(1 - victim)
  assert ' in train' in stacks(run, 1 - victim)
  goes_on(corpus, run, together, *HANG, seldom, processes=2)


# -- losses that are no numbers


def error_of(job: Job) -> str:
  assert job.wait() == [2], job.told()
  return job.said().splitlines()[-1]


def trouble(workdir: Path, step: int) -> dict:
  return json.loads((workdir / f'trouble-{step}.json').read_text())


def as_json(value):
  return json.loads(json.dumps(value))


def row_ids(corpus: Path, batch: int) -> list:
  schedule = loader.MixtureSchedule(stages=((None, {'stories': 3, 'inventories': 1}),))
  return loader.row_ids(loader.open_corpus(corpus, 64), schedule, seed=0, batch_size=8, step=batch)


@pytest.mark.slow
@pytest.mark.parametrize('rewinds', [0, 1])
def test_a_run_whose_losses_are_no_numbers_ends_after_so_many_rewinds(alone, corpus, tmp_path, rewinds):
  run = tmp_path / 'run'
  absurd = ('--config.optim.peak_lr=1e18', '--config.checkpoint.every_steps=1', f'--config.spikes.max_rewinds={rewinds}')
  line = error_of(Job(corpus, run, *SHORT, *absurd))
  at = max(int(path.stem.partition('-')[2]) for path in run.glob('trouble-*.json'))
  assert line.startswith(f'error: step {at}: ') and f' is nan, after {rewinds} rewinds: lower --config.optim.peak_lr' in line
  said = trouble(run, at)
  assert said['rows'] == as_json(row_ids(corpus, said['batch'])) and said['values']['loss'] in ('nan', 'inf')
  if rewinds:
    of_list = json.loads((run / 'rewinds.json').read_text())
    assert len(of_list) == 1 and Checkpoints(run / 'checkpoints').meta(steps(run)[-1])['skips'] in ([], of_list)
  else:
    assert not (run / 'rewinds.json').exists()


@pytest.fixture(scope='module')
def rewound(corpus, tmp_path_factory) -> Path:
  """The workdir of a run with a batch without targets, which went back by itself and ended."""
  job = provoked(corpus, tmp_path_factory.mktemp('rewound') / 'run', *REWIND, empty=12)
  assert job.wait() == [0], job.told()
  return job.workdir


REWIND = '--config.spikes.rewind_steps=5', '--config.spikes.jump_steps=3'


@pytest.mark.slow
def test_a_rewind_leaves_out_what_it_says_and_the_run_ends_by_itself(alone, rewound, corpus):
  """Batch 12, of step 13, has a loss of 0 / 0: back to step 5, past checkpoint 10, and on with batch 16."""
  expected = [{'at': 13, 'to': 5, 'batches': [5, 16]}]
  assert json.loads((rewound / 'rewinds.json').read_text()) == expected
  assert {step: Checkpoints(rewound / 'checkpoints').meta(step)['skips'] for step in steps(rewound)} == {
    5: [], 15: expected, 20: expected, 24: expected}  # the first is kept because it was verified
  assert Checkpoints(rewound / 'checkpoints').meta(24)['cursor'] == (24 + 11) * 8
  assert trouble(rewound, 13)['batch'] == 12 and trouble(rewound, 13)['rows'] == as_json(row_ids(corpus, 12))
  of_step, usual = batches(rewound), batches(alone)
  assert [of_step[step] for step in range(1, 6)] == [usual[step] for step in range(1, 6)]
  assert [of_step[step] for step in range(6, 14)] == [usual[step] for step in range(17, 25)]  # step s takes batch s - 1
  assert not {usual[step] for step in range(6, 17)} & {*of_step.values()} and len(of_step) == N_STEPS
  assert trouble(rewound, 13)['batch_digest'] not in of_step.values()
  assert [event['event'] for event in ledger.read(rewound / 'goodput.jsonl').events] == ['rewind']


@pytest.mark.slow
def test_killed_between_the_list_of_rewinds_and_the_removal_it_goes_on_from_the_right_step(rewound, corpus, tmp_path):
  run = tmp_path / 'run'
  job = provoked(corpus, run, *REWIND, empty=12, kill_at='undo')
  assert job.wait() == [-signal.SIGKILL], job.told()
  assert (run / 'rewinds.json').read_bytes() == (rewound / 'rewinds.json').read_bytes()
  assert steps(run) == [5, 10]  # the second is of steps that are undone
  job = goes_on(corpus, run, rewound, *REWIND)
  assert 'resumed  at step 5 from' in job.said()


# -- kill -9, and the ledger


@pytest.mark.slow
def test_after_three_kills_the_ledger_has_the_wall_time_and_what_was_done_again(corpus, tmp_path):
  run, redone = tmp_path / 'run', 0.0
  long = '--config.tokens=4096000', '--config.checkpoint.every_steps=2000', '--config.evals.every_steps=1500'
  optimised = {'XLA_FLAGS': ''}  # thousands of steps: without the flags of tests they take 40 % of the time
  began = time.time()
  for to in (3600, 5600, 7600):
    job = Job(corpus, run, *SHORT, *long, env=optimised)
    while steps_so_far(run) < to and job.processes[0].poll() is None:
      time.sleep(0.25)
    job.kill()
    assert job.wait() == [-signal.SIGKILL], job.told()
    known, times = ledger.read(run / 'goodput.jsonl').attempts[-1].done, times_of_steps(run)
    assert steps(run)[-1] == to - 1600 < known
    redone += times[min(known, max(times))] - times[to - 1600]
  job = Job(corpus, run, *SHORT, *long, env=optimised)
  assert job.wait() == [0], job.told()
  wall, account = time.time() - began, ledger.read(run / 'goodput.jsonl')
  print(f'{wall:.2f} s by the clock, {account.wall:.2f} s in the ledger: {account.seconds}; {redone:.1f} s were done again')
  assert abs(sum(account.seconds.values()) - wall) < 0.01 * wall
  assert [attempt.how for attempt in account.attempts] == [None, None, None, 'finished']
  assert [attempt.resumed for attempt in account.attempts] == [0, 2000, 4000, 6000]
  stepping = account.seconds['step'] + account.seconds['lost']  # between two steps there are also data, evaluations, saves
  share = stepping / (stepping + sum(account.seconds[phase] for phase in ('data', 'evaluation', 'checkpoint')))
  assert account.seconds['lost'] == pytest.approx(redone * share, rel=0.15, abs=1) and redone > 1


def times_of_steps(workdir: Path) -> dict[int, float]:
  return {line['step']: line['time'] for line in map(json.loads, whole_lines(workdir)) if 'batch' in line}


def steps_so_far(workdir: Path) -> int:
  return json.loads(whole_lines(workdir)[-1])['step'] if (workdir / 'metrics.jsonl').exists() and whole_lines(workdir) else 0


def whole_lines(workdir: Path) -> list[str]:
  return (workdir / 'metrics.jsonl').read_text().rpartition('\n')[0].splitlines()


# -- a disk that cannot be written to


class OnADisk:
  """A job in a mount namespace of its own, where its workdir is on a small disk; `inside` is that disk as seen from here."""

  def __init__(self, corpus: Path, tmp_path: Path, *arguments: str):
    disk, self.kept = tmp_path / 'disk', tmp_path / 'kept'
    disk.mkdir()
    script = ('mount -t tmpfs -o size=16m tmpfs "$1" || exit 99; disk=$1; kept=$2; shift 2; '
              'setpriv --pdeathsig KILL "$@"; code=$?; cp -r "$disk" "$kept"; exit $code')
    wrap = ['unshare', '-rm', 'sh', '-c', script, 'sh', disk, self.kept]
    self.job = Job(corpus, disk / 'run', *SHORT, *arguments, wrap=wrap)
    self.pid = self.job.processes[0].pid
    self.inside = Path(f'/proc/{self.pid}/root{disk}')
    self.disk = disk

  def in_it(self, *command) -> None:
    """Runs a command where the job is."""
    subprocess.run(['nsenter', '-t', str(self.pid), '-U', '-m', '--preserve-credentials', *command], check=True)

  def fill(self) -> None:
    """Leaves some kilobytes, for lines of the record, and none for a checkpoint."""
    free = shutil.disk_usage(self.inside).free
    (self.inside / 'others').write_bytes(bytes(free - 300_000))

  def make_room(self) -> None:
    (self.inside / 'others').unlink()

  def make_read_only(self) -> None:
    checkpoints = self.disk / 'run' / 'checkpoints'
    self.in_it('mount', '--bind', checkpoints, checkpoints)
    self.in_it('mount', '-o', 'remount,bind,ro', checkpoints)

  def make_writable(self) -> None:
    self.in_it('umount', '-l', self.disk / 'run' / 'checkpoints')


@pytest.fixture
def on_a_disk(tmp_path):
  tools = all(shutil.which(tool) for tool in ('unshare', 'nsenter', 'setpriv'))
  if not tools or subprocess.run(['unshare', '-rm', 'true'], check=False).returncode:
    pytest.skip('this machine lets no user mount a small disk')
  return tmp_path


FAULTS = {'full': (OnADisk.fill, OnADisk.make_room, 'the disk is full: free space, or keep fewer of them'),
          'read-only': (OnADisk.make_read_only, OnADisk.make_writable, 'Read-only file system')}
# Short steps: so many failures are a matter of seconds here.
LONG = '--config.tokens=2048000', '--config.evals.every_steps=0', '--config.checkpoint.every_steps=50'


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_saves_that_fail_are_told_tried_again_and_end_the_run(corpus, on_a_disk, fault):
  break_it, _, words = FAULTS[fault]
  run = OnADisk(corpus, on_a_disk, *LONG)
  run.job.wait_until(has_saved(run.inside / 'run', 50))
  break_it(run)
  assert run.job.wait(120) == [2], run.job.told()
  told = [line for line in run.job.said().splitlines() if 'was not written to' in line]
  print('\n'.join(told))
  assert len(told) == 3 and all(f'to {run.disk}/run/checkpoints: ' in line and words in line for line in told)
  assert [line.partition('  ')[0] for line in told[:2]] == ['warning'] * 2
  assert told[2].startswith('error: the checkpoint of step ')
  assert [f'failure {n} in a row, 3 end the run: trying again' in told[n - 1] for n in (1, 2)] == [True] * 2
  assert run.job.said().splitlines()[-1] == told[2]
  events = ledger.read(run.kept / 'run' / 'goodput.jsonl').events
  assert [event['event'] for event in events] == ['save failed'] * 3


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_when_it_can_be_written_to_again_the_run_goes_on_without_a_restart(corpus, on_a_disk, fault):
  break_it, mend_it, words = FAULTS[fault]
  short = '--config.tokens=409600', *LONG[1:], '--config.checkpoint.max_failures=100000'
  undisturbed = Job(corpus, on_a_disk / 'undisturbed', *SHORT, *short)
  assert undisturbed.wait() == [0], undisturbed.told()
  run = OnADisk(corpus, on_a_disk, *short)
  run.job.wait_until(has_saved(run.inside / 'run', 50))
  break_it(run)
  run.job.wait_until(lambda: 'failure 2 in a row' in run.job.said())
  mend_it(run)
  assert run.job.wait(300) == [0], run.job.told()
  assert words in run.job.said() and (run.kept / 'run' / 'DONE').exists()
  assert record(run.kept / 'run') == record(undisturbed.workdir)
  digests = [Checkpoints(workdir / 'checkpoints').digests(800) for workdir in (run.kept / 'run', undisturbed.workdir)]
  assert digests[0] == digests[1]


# -- the clock


@pytest.mark.slow
def test_a_clock_that_is_set_back_and_forward_changes_nothing_but_the_times(alone, corpus, tmp_path):
  run = tmp_path / 'run'
  began = time.monotonic()
  job = provoked(corpus, run, clock=[[6, -7200], [12, 10800]], stop_at='save', call=3)
  assert job.wait() == [75], job.told()
  assert 'the clock is -7200 s off' in job.said() and 'the clock is 10800 s off' in job.said()
  middle = time.monotonic()
  account = ledger.read(run / 'goodput.jsonl')
  assert 0 < account.wall < middle - began and account.seconds['idle'] == 0
  # Orbax waits by the wall clock: the save of step 10, where it is still under way, has failed for it and is done again at
  # once, which may be the third.
  reached = re.search(r'SIGTERM after (\d+) steps, all saved', job.said())[1]
  assert 10 < int(reached) < N_STEPS, job.said()
  job = goes_on(corpus, run, alone)  # hours before the end of the attempt before, by the clock
  assert f'resumed  at step {reached} ' in job.said(), job.said()
  account = ledger.read(run / 'goodput.jsonl')
  assert account.wall < time.monotonic() - began and min(account.seconds.values()) >= 0
  assert [attempt.how for attempt in account.attempts] == ['stopped', 'finished']


# -- SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize('place', ['restore', 'save'])
def test_sigterm_to_one_process(alone, corpus, tmp_path, place):
  run = as_if_killed(alone, tmp_path / 'run', '20', '24') if place == 'restore' else tmp_path / 'run'
  job = provoked(corpus, run, stop_at=place, call=1)
  assert job.wait(60) == [75], job.told()
  assert f'provoked: SIGTERM in {place}\n' in job.said()
  last = job.said().splitlines()[-1]
  if place == 'restore':
    assert 'compile' not in job.said().partition('provoked')[2]
    assert last.startswith('stopped  by SIGTERM before a step was taken')
  else:
    assert last.startswith('stopped  by SIGTERM after 5 steps, all saved') and steps(run) == [5]
  goes_on(corpus, run, alone)


@pytest.mark.slow
@pytest.mark.parametrize('place, victims', [('compile', [0, 1]), ('compile', [1]), ('evaluation', [0]), ('evaluation', [1]),
                                           ('save', [0]), ('save', [1])])
def test_sigterm_to_two_processes(together, corpus, tmp_path, place, victims):
  """All of them stop at the same step, whoever got it."""
  run = tmp_path / 'run'
  if place == 'compile':
    job = Job(corpus, run, *SHORT, processes=2)
    job.wait_until(lambda: 'compile  …' in job.said())
    for victim in victims:
      job.terminate(victim)
  else:
    # It takes a second or two until all have heard of it, in which these steps would be over.
    job = provoked(corpus, run, processes=2, stop_at=place, call=2, process=victims[0], slow=0.5)
  assert job.wait(120) == [75, 75], job.told()
  last = job.said().splitlines()[-1]
  print(place, victims, last)
  when = f'after {steps(run)[-1]} steps' if steps(run) else 'before a step'
  assert last.startswith(f'stopped  by SIGTERM {when}')
  goes_on(corpus, run, together, processes=2)


# -- who may connect

JOINS = """
import sys
from maxlm import hosts
hosts.START_SECONDS = 15
hosts.connect(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]))
print('agreed on', hosts.agree('x', lambda: 42))
hosts.shutdown()
"""


def openssl(*words) -> None:
  subprocess.run(['openssl', *map(str, words)], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path) -> dict[str, dict[str, str]]:
  """The variables of JAX for a process of the job, and for a stranger with a certificate of his own."""
  if not shutil.which('openssl'):
    pytest.skip('this machine has no openssl')
  key = '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', 2
  names = 'subjectAltName=IP:127.0.0.1'
  openssl('req', '-x509', *key, '-keyout', tmp_path / 'ca.key', '-out', tmp_path / 'ca.pem', '-subj', '/CN=ca')
  openssl('req', *key[:-2], '-keyout', tmp_path / 'host.key', '-out', tmp_path / 'host.csr', '-subj', '/CN=host')
  (tmp_path / 'names').write_text(f'{names}\nextendedKeyUsage=serverAuth,clientAuth\n')
  openssl('x509', '-req', '-in', tmp_path / 'host.csr', '-CA', tmp_path / 'ca.pem', '-CAkey', tmp_path / 'ca.key',
          '-CAcreateserial', '-days', 2, '-extfile', tmp_path / 'names', '-out', tmp_path / 'host.pem')
  openssl('req', '-x509', *key, '-keyout', tmp_path / 'stranger.key', '-out', tmp_path / 'stranger.pem', '-subj', '/CN=host',
          '-addext', names)
  return {who: {'JAX_MTLS_CERT_FILE': f'{tmp_path}/{who}.pem', 'JAX_MTLS_KEY_FILE': f'{tmp_path}/{who}.key',
                'JAX_MTLS_CA_FILE': f'{tmp_path}/ca.pem'} for who in ('host', 'stranger')} | {'nobody': {}}


@pytest.mark.slow
@pytest.mark.parametrize('who', ['host', 'stranger', 'nobody'])
def test_a_coordinator_with_certificates_lets_in_who_has_one_of_the_same_authority(certificates, who):
  port = free_port()
  processes = [subprocess.Popen([sys.executable, '-c', JOINS, str(port), str(i)], text=True, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | certificates[of])
               for i, of in enumerate(('host', who))]
  said = [process.communicate(timeout=120)[0] for process in processes]
  joined = who == 'host'
  assert [process.returncode for process in processes] == ([0, 0] if joined else [-signal.SIGABRT] * 2)
  assert said == ['agreed on 42\n' * joined] * 2
