"""The launcher in a fake cloud (tests/launch/), whose machines run real trainers: what goes wrong, and that the run ends
with the losses and the bits of one that nothing disturbed, and with nothing left. The table is in docs/reliability.md."""


import pytest

from launch import bootstrap
from tests.chaos.test_faults import assert_same
from tests.jobs import ROOT, Job
from tests.launch.cloud import BUCKET, SHORT, Cloud, attempts


@pytest.fixture(scope='session')
def bundle(tmp_path_factory):
  return bootstrap.bundle(ROOT, tmp_path_factory.mktemp('bundle'), extra='')


@pytest.fixture(scope='module')
def alone(corpus, tmp_path_factory):
  job = Job(corpus, tmp_path_factory.mktemp('alone') / 'run', *SHORT)
  assert job.wait() == [0], job.told()
  return job.workdir


@pytest.fixture
def cloud(tmp_path, corpus, bundle):
  made = Cloud(tmp_path / 'cloud' if (tmp_path / 'cloud').mkdir() is None else tmp_path, corpus, bundle)
  yield made
  made.stop()


def finishes(cloud, alone, *flags, wanted=('small-a1',), **up):
  ran = cloud.run(cloud.up_argv(*flags, **up))
  assert ran.returncode == 0, f'{ran.stderr}\n{cloud.told()}'
  assert_same(cloud.workdir(), alone)
  assert tuple(attempts(cloud)) == tuple(wanted)
  assert cloud.record()['status'] == 'finished'
  cloud.assert_never_two()
  cloud.assert_nothing_left()
  return ran


# What the cloud does, the slices that are asked for, and how often a trainer goes on from a checkpoint.
SCENARIOS = {
  'every state on the way up': (
    {'1': ['CREATING', 'ACCEPTED', 'WAITING_FOR_RESOURCES', 'look 2', 'PROVISIONING', 'boot', 'ACTIVE']}, {},
    ['small-a1'], 0),
  'SUSPENDED': ({'1': ['ACTIVE', 'step>=8', 'SUSPENDING', 'SUSPENDED']}, {}, ['small-a1', 'small-a2'], 1),
  'a node PREEMPTED, a slow deletion': (
    {'1': ['ACTIVE', 'step>=8', 'node0=PREEMPTED']}, {'slow_delete': 6}, ['small-a1', 'small-a2'], 1),
  'notice of a preemption': (
    {'1': ['ACTIVE', 'step>=6', 'notice', 'look 12', 'node0=PREEMPTED']}, {}, ['small-a1', 'small-a2'], 1),
  'preemption during bootstrap': (
    {'1': ['PROVISIONING', 'boot', 'node0=PREEMPTED', 'ACTIVE']}, {}, ['small-a1', 'small-a2'], 0),
  'ACTIVE with a node REPAIRING': (
    {'1': ['ACTIVE', 'step>=8', 'node0=REPAIRING', 'look 4', 'node0=READY']}, {}, ['small-a1'], 1),
  'quota, then the request expires': (
    {'2': ['WAITING_FOR_RESOURCES', 'FAILED:The request has expired']},
    {'faults': {'create': ['RESOURCE_EXHAUSTED: Quota']}}, ['small-a2', 'small-a3'], 0),
  'the name is still held': (
    {}, {'faults': {'create': ['ALREADY_EXISTS: small-a1 already exists'] * 3}}, ['small-a1'], 0),
  'gcloud does not answer': (
    {}, {'faults': {'list': ['UNAVAILABLE: x'] * 5, 'cp': ['HTTPError 503'], 'delete': ['DEADLINE_EXCEEDED']}},
    ['small-a1'], 0),
  'the trainer is killed': ({'1': ['ACTIVE', 'step>=8', 'kill0']}, {}, ['small-a1'], 1),
  'the agent on the machine is killed': ({'1': ['ACTIVE', 'step>=8', 'stop0']}, {}, ['small-a1'], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', SCENARIOS)
def test_the_run_ends_as_one_that_nothing_disturbed(name, cloud, alone):
  script, more, wanted, resumed = SCENARIOS[name]
  cloud.scenario(script, **more)
  finishes(cloud, alone, wanted=wanted)
  said = ''.join(path.read_text() for path in sorted(cloud.workdir().glob('launch/a*/*.log')))
  assert said.count('\nresumed') + said.startswith('resumed') == resumed or name.startswith('the agent'), said


def shared_corpus(cloud) -> str:
  """Machines of the fake cloud have their mounts in different places, and a gang refuses configs that differ."""
  return f'--config.data.corpus={cloud.directory}/bucket/bkt/x/corpora/tiny'


@pytest.mark.slow
def test_one_of_two_machines_fails(cloud, corpus, tmp_path):
  together = Job(corpus, tmp_path / 'together', *SHORT, processes=2)
  assert together.wait() == [0, 0], together.told()
  cloud.scenario({'1': ['ACTIVE', 'step>=8', 'kill1']}, hosts=2)
  finishes(cloud, together.workdir, tpu='v4-16', train=(*SHORT, shared_corpus(cloud)))
  shown = cloud.run(cloud.command('logs', 'small', f'--bucket={BUCKET}')).stdout
  assert '[a1 s0w0] ' in shown and '[a1 s0w1] ' in shown


@pytest.mark.slow
def test_two_slices(cloud, corpus, tmp_path):
  together = Job(corpus, tmp_path / 'together', *SHORT, processes=2)
  assert together.wait() == [0, 0], together.told()
  cloud.scenario({'1': ['ACTIVE', 'step>=8', 'node1=PREEMPTED']})
  finishes(cloud, together.workdir, '--slices=2', '--spot', wanted=['small-a1', 'small-a2'],
           train=(*SHORT, shared_corpus(cloud)))


@pytest.mark.slow
def test_a_mistake_ends_it_and_leaves_nothing(cloud):
  ran = cloud.run(cloud.up_argv(train=('--config.data.mixture.stories=-1',)))
  assert ran.returncode == 1 and 'failed' in ran.stderr and 'mixture' in ran.stderr, ran.stderr
  cloud.assert_nothing_left()
