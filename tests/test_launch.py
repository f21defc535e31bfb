"""What launch/ asks for and decides: the table beside libtpu, requests beside Google's message types and gcloud, and every
order of states through the pure function. tests/test_launch_runs.py has the processes."""

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch import accelerators, bootstrap, gcloud, gke, preflight, request, states, supervise
from launch.request import Launch, Request
from launch.states import Record, Report, Resource, Seen
from tests.jobs import ROOT

GOLDEN = Path(__file__).parent / 'golden' / 'launch'


def launch(**changes) -> Launch:
  return Launch(**dict(run='small', project='p', zones=['us-east5-a', 'us-east5-b'], tpu='v6e-64', bucket='gs://bkt/x',
                       bundle='0' * 64, train=['--config=configs/tiny.py']) | changes)


# -- the table


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_hosts_and_names_agree_with_libtpu():
  code = """if True:
    import json, os
    from maxlm.plan import topology
    os.environ.update(topology.COMPILE_ONLY)
    from jax.experimental import topologies
    from launch.accelerators import slices
    found = {}
    for one in slices():
      wanted = topology.parse(one.topology)  # the planner knows it by the same name
      host = [2, 4, 1] if one.chips_per_host == 8 else [1, 1, 1] if one.chips == 1 else [2, 2, 1]
      devices = topologies.get_topology_desc(
        platform='tpu', topology_name=one.topology, chips_per_host_bounds=host, num_slices=1, wrap=wanted.wrap,
        **({'chip_config_name': 'megacore'} if wanted.chip.megacore else {})).devices
      found[one.topology] = [len({tuple(d.coords) for d in devices}), len({d.process_index for d in devices})]
    print(json.dumps(found))"""
  told = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300,
                        env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert told.returncode == 0, told.stderr[-2000:]
  found = json.loads(told.stdout.splitlines()[-1])
  assert found == {one.topology: [one.chips, one.hosts] for one in accelerators.slices()} and len(found) == 49


def test_names_of_slices():
  assert accelerators.parse('v5p-128') is not None and accelerators.parse('v5p-128').chips == 64
  assert accelerators.parse('v5e-16') == accelerators.parse('v5litepod-16') == accelerators.parse('v5e:4x4')
  assert [accelerators.parse(name).hosts for name in ('v6e-8', 'v6e-16', 'v4-8', 'v4-16')] == [1, 4, 1, 2]
  with pytest.raises(ValueError, match='near it are v6e-64'):
    accelerators.parse('v6e-63')


def test_table_of_the_page_is_that_of_the_code():
  assert accelerators.table() in (ROOT / 'docs' / 'launch.md').read_text()


# -- requests

REQUESTS = {
  'spot_two_slices': launch(slices=2, spot=True, service_account='trainer@p.iam.gserviceaccount.com'),
  'reserved': launch(tpu='v5p-128', reserved=True, secrets={'WANDB_API_KEY': 'wandb'}, queue_hours=24),
  'plain': launch(tpu='v5litepod-8', external_ips=True, train=['--config=configs/tiny.py:a b', "--config.name='x'"]),
}


def requested(of: Launch) -> Request:
  return Request(launch=of, attempt=3, zone='us-east5-a', script='#!/bin/bash\necho a "b" $c\n')


@pytest.mark.parametrize('name', REQUESTS)
def test_request_is_what_the_service_takes(name):
  tpu_v2 = pytest.importorskip('google.cloud.tpu_v2')
  body = requested(REQUESTS[name]).body()
  parsed = tpu_v2.QueuedResource.from_json(json.dumps(body), ignore_unknown_fields=False)
  back = tpu_v2.QueuedResource.to_json(parsed, always_print_fields_with_no_presence=False)
  assert json.loads(back) == without_defaults(body)
  body['tpu']['nodeSpec'][0]['nodes'] = 2
  with pytest.raises(Exception, match='no field named "nodes"'):
    tpu_v2.QueuedResource.from_json(json.dumps(body), ignore_unknown_fields=False)


def without_defaults(plain):
  """Protocol buffers do not tell False from nothing."""
  if isinstance(plain, dict):
    return {key: without_defaults(value) for key, value in plain.items() if value is not False}
  return [without_defaults(value) for value in plain] if isinstance(plain, list) else plain


@pytest.mark.parametrize('name', REQUESTS)
def test_request_is_the_golden_one(name):
  of = REQUESTS[name]
  asked = Request(launch=of, attempt=3, zone='us-east5-a', script=bootstrap.script(of, 3).splitlines()[0])
  shown = json.dumps({'argv': asked.argv('STARTUP_SCRIPT'), 'body': asked.body()}, indent=1) + '\n'
  assert shown == (GOLDEN / f'{name}.json').read_text(), shown


@pytest.fixture
def real_gcloud(monkeypatch, tmp_path):
  """gcloud itself, speaking to a server of ours instead of the TPU service: the requests that it has made."""
  if shutil.which('gcloud') is None:
    pytest.skip('gcloud is not installed')
  asked = []

  class Service(http.server.BaseHTTPRequestHandler):
    def answer(self):
      body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
      asked.append((self.command, self.path, json.loads(body or 'null')))
      said = json.dumps({'name': 'projects/p/locations/us-east5-a/operations/o', 'done': True, 'response': {}}).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(said)))
      self.end_headers()
      self.wfile.write(said)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Service)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  for name, value in {
      'CONFIG': str(tmp_path), 'CORE_CHECK_GCE_METADATA': 'false', 'AUTH_DISABLE_CREDENTIALS': 'true',
      'CORE_DISABLE_PROMPTS': '1', 'CORE_DISABLE_USAGE_REPORTING': 'true', 'COMPONENT_MANAGER_DISABLE_UPDATE_CHECK': 'true',
      'API_ENDPOINT_OVERRIDES_TPU': f'http://127.0.0.1:{server.server_port}/'}.items():
    monkeypatch.setenv(f'CLOUDSDK_{name}', value)
  yield asked
  server.shutdown()


@pytest.mark.parametrize('name', REQUESTS)
def test_gcloud_sends_the_request(name, real_gcloud, tmp_path):
  asked = requested(REQUESTS[name])
  script = tmp_path / 'script'
  script.write_text(asked.script)
  gcloud.run(asked.argv(str(script)))
  (verb, path, body), = real_gcloud
  assert (verb, path.partition('?')[0]) == ('POST', '/v2/projects/p/locations/us-east5-a/queuedResources')
  assert f'queuedResourceId={asked.name}' in path and body == asked.body()


def test_gcloud_knows_the_other_commands(real_gcloud):
  gcloud.run(request.delete_argv('p', 'us-east5-a', 'small-a1'))
  for argv in (request.list_argv, request.nodes_argv):
    assert gcloud.read_json(argv('p', 'us-east5-a')) == []
  assert [(verb, path.rpartition('/')[2].partition('?')[0]) for verb, path, _ in real_gcloud] == [
    ('DELETE', 'small-a1'), ('GET', 'queuedResources'), ('GET', 'nodes')]


@pytest.mark.parametrize('changes, words', [
  ({'run': 'Big_Run'}, 'up to 40 of a-z'), ({'bucket': 's3://x'}, 'gs://NAME'), ({'zones': []}, 'a launch needs'),
  ({'spot': True, 'reserved': True}, 'one or the other'), ({'tpu': 'tpu7x-128'}, 'launch.gke render'),
  ({'tpu': 'v9-8'}, 'no such slice')])
def test_launches_that_cannot_be_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    launch(**changes)


# -- what gcloud says, and secrets


@pytest.mark.parametrize('code, text, kind', [
  (255, 'Connection refused', 'passing'), (1, 'ERROR: (gcloud.x) ALREADY_EXISTS: Resource', 'exists'),
  (1, 'ERROR: (gcloud.x) NOT_FOUND: Resource was not found', 'missing'), (1, 'RESOURCE_EXHAUSTED: Quota', 'quota'),
  (1, 'There is no more capacity in the zone', 'capacity'), (1, 'PERMISSION_DENIED: no', 'fatal'),
  (1, 'HTTPError 412: At least one of the pre-conditions you specified did not hold.', 'conflict'),
  (1, 'HTTPError 503: try again', 'passing'), (2, 'unrecognized arguments: --x', 'fatal'), (1, 'whatever', 'unknown')])
def test_failures_are_told_apart(code, text, kind):
  assert gcloud.kind_of(code, text) == kind


@pytest.mark.parametrize('line', [
  'export HF_TOKEN=hf_' + 'a' * 30, "x = 'ghp_" + 'A' * 36 + "'", 'api_key: "abcdefgh"', "{'wandb_token': 'abcdefghij'}",
  '--config.name=sk-' + 'b' * 40, 'password=correcthorse', '-----BEGIN RSA PRIVATE KEY-----'])
def test_secrets_are_refused_and_not_shown(line):
  with pytest.raises(ValueError, match='line 2, looks like a secret') as refused:
    bootstrap.refuse_secrets(f'plain\n{line}', 'configs/x.py')
  assert line[-8:] not in str(refused.value)


def test_configs_are_no_secrets():
  for path in (ROOT / 'configs').rglob('*.py'):
    bootstrap.refuse_secrets(path.read_text(), str(path))
  bootstrap.refuse_secrets('--config.data.tokenizer=x/tokenizer.json --config.tokens=10 bos_token=1 token=', 'words')


# -- the next action


def record(**changes) -> Record:
  return Record(launch=launch(**changes.pop('launch', {})), zone='us-east5-a', **changes)


def resource(state='ACTIVE', name='small-a1', **changes) -> Resource:
  return Resource(**dict(name=name, zone='us-east5-a', state=state) | changes)


def report(code=None, **changes) -> Report:
  phase = 'running' if code is None else 'ended'
  return Report(**dict(worker='w0', attempt=1, phase=phase, time=1000.0, code=code) | changes)


def step(of: Record, *resources: Resource, reports=(), now=1000.0):
  return states.decide(of, Seen(resources=list(resources), reports=list(reports)), now)


def test_first_there_is_a_request_and_then_patience():
  of, action = step(record())
  assert (action.kind, action.name, of.created) == ('create', 'small-a1', False)
  for state in ('ACCEPTED', 'WAITING_FOR_RESOURCES', 'CREATING', 'PROVISIONING'):
    of, action = step(of, resource(state))
    assert action.kind == 'wait' and state in action.line and of.created and not of.active
  of, action = step(of, resource('ACTIVE', nodes={'small-a1': 'READY'}), now=2000.0)
  assert action.kind == 'wait' and of.active == 2000.0


@pytest.mark.parametrize('gone, kind', [
  (resource('SUSPENDED'), 'suspended'), (resource('SUSPENDING'), 'suspended'),
  (resource('FAILED', error='Quota exceeded'), 'quota'), (resource('FAILED', error='The request has expired'), 'expired'),
  (resource('FAILED', error='internal'), 'failed'),
  (resource(nodes={'small-a1-0': 'READY', 'small-a1-1': 'PREEMPTED'}), 'preempted'),
  (resource(nodes={'small-a1': 'TERMINATED'}), 'preempted'), (None, 'preempted')])
def test_what_is_lost_goes_before_the_next_is_asked_for(gone, kind):
  of, action = step(record(created=True, active=500.0), *([gone] if gone else []))
  assert (action.kind, action.name, of.retiring, of.failures[-1].kind) == ('delete', 'small-a1', kind, kind)
  of, action = step(of, resource('DELETING'))
  assert action.kind == 'wait' and of.attempt == 1  # a slow deletion is waited for
  of, action = step(of)
  assert action.kind == 'delete' and of.attempt == 1  # not to see it is not enough: the service has to say so
  of = states.deleted(of, 1000.0)
  assert (of.attempt, of.zone, of.created, of.retiring, of.active) == (2, 'us-east5-b', False, '', 0.0)
  assert of.hours == pytest.approx(500 / 3600)
  of, action = step(of, now=of.not_before)
  assert (action.kind, action.name, action.zone) == ('create', 'small-a2', 'us-east5-b')


def test_a_repair_is_waited_for_but_not_for_ever():
  sick = resource(nodes={'small-a1': 'REPAIRING'})
  of, action = step(record(created=True), sick)
  assert action.kind == 'wait' and 'REPAIRING' in action.line
  again, action = step(of, resource(nodes={'small-a1': 'READY'}), now=1500.0)
  assert action.kind == 'wait' and not again.retiring
  of, action = step(of, sick, now=1001.0 + states.REPAIR)
  assert action.kind == 'delete' and of.retiring == 'hardware'


@pytest.mark.parametrize('code, kind', [(124, 'hang'), (70, 'hardware'), (1, 'crash'), (134, 'crash'), (-9, 'crash')])
def test_a_machine_that_gave_up_makes_another_attempt(code, kind):
  of, action = step(record(created=True, active=900.0), resource(), reports=[report(code, step=7)])
  assert (action.kind, of.retiring, of.failures[-1].step, of.failures[-1].code) == ('delete', kind, 7, code)


def test_a_mistake_calls_a_person_and_leaves_nothing():
  of, action = step(record(created=True, active=900.0), resource(), reports=[report(2, line='error: no such corpus')])
  assert (of.status, action.kind) == ('failed', 'delete') and 'no such corpus' in of.reason
  assert states.deleted(of, 1000.0).attempt == 1


def test_all_machines_have_finished():
  of = record(created=True, active=900.0, launch={'tpu': 'v4-16'})
  one = report(0, worker='w0')
  assert step(of, resource(), reports=[one, report(worker='w1')])[0].status == 'running'
  of, action = step(of, resource(), reports=[one, report(0, worker='w1', step=60)])
  assert (of.status, action.kind) == ('finished', 'delete') and '60 steps' in of.reason


def test_silence_and_machines_that_do_not_come():
  of = record(created=True, active=1000.0, launch={'tpu': 'v4-16'})
  assert step(of, resource(), reports=[report()], now=1100.0)[1].kind == 'wait'
  assert step(of, resource(), reports=[report(time=2700.0)], now=1001 + states.BOOTSTRAP)[0].retiring == 'bootstrap'
  both = [report(), report(worker='w1', time=2000.0)]
  of, _ = step(of, resource(), reports=both, now=1001 + states.SILENCE)
  assert of.failures[-1].reason.startswith('w0 has said nothing')


def test_the_same_crash_again_and_again_calls_a_person():
  of = record()
  for attempt in range(1, 4):
    assert of.status == 'running' and of.attempt == attempt
    of, _ = step(of, resource(name=of.name), reports=[report(1, step=5, line='Traceback')])
    of = states.deleted(of, 1000.0)
  assert of.status == 'failed' and '3 times the same at step 5' in of.reason
  of = record()
  for n in range(1, 6):  # with progress between, it goes on
    of, _ = step(of, resource(name=of.name), reports=[report(1, step=5 * n)])
    of = states.deleted(of, 1000.0)
  assert of.status == 'running'
  of = record()
  for _ in range(20):  # and preemptions come as often as they like, with growing pauses
    of, _ = step(of, resource('SUSPENDED', name=of.name))
    of = states.deleted(of, 1000.0)
  assert of.status == 'running' and of.not_before - 1000.0 == states.LONGEST_PAUSE


def test_requests_that_are_refused():
  assert states.refused(record(), 'fatal', 'PERMISSION_DENIED', 0.0).status == 'failed'
  of = states.refused(record(), 'quota', 'RESOURCE_EXHAUSTED', 1000.0)
  assert of.retiring == 'quota' and states.deleted(of, 1000.0).zone == 'us-east5-b'
  of = states.refused(record(), 'exists', 'ALREADY_EXISTS', 1000.0)  # still being deleted: the same again, later
  assert step(of, now=1001.0)[1].kind == 'wait' and step(of, now=of.not_before)[1].name == 'small-a1'
  of, action = step(record(), resource(ours=False))
  assert of.status == 'failed' and action.kind == 'end' and 'not of this launch' in of.reason


def test_strays_go_first_and_those_of_others_stay():
  of, action = step(record(attempt=3), resource(name='small-a2', zone='us-east5-b'), resource(name='small-a9', ours=False))
  assert (action.kind, action.name, action.zone) == ('delete', 'small-a2', 'us-east5-b')
  assert step(record(attempt=3), resource(name='small-a9', ours=False))[1].kind == 'create'


def test_down_and_the_guard_of_spending():
  of, action = step(record(created=True, desired='down'), resource())
  assert (of.status, action.kind) == ('down', 'delete')
  of, action = step(record(created=True, active=1.0, hours=23.0), resource(nodes={'small-a1': 'READY'}), now=3700.0)
  assert (of.status, action.kind) == ('failed', 'delete') and '--max_hours' in of.reason


def test_a_record_is_what_was_written():
  of = states.retire(record(step=3, holder='h:1'), 'hang', 'why', 5.0, 124)
  assert states.from_json(json.loads(json.dumps(states.to_json(of)))) == of


def test_only_our_slices_are_seen():
  plain = {'name': 'projects/p/locations/z/queuedResources/small-a1', 'state': {'state': 'FAILED', 'failedData': {
    'error': {'message': 'no'}}}, 'tpu': {'nodeSpec': [{'node': {'labels': {'maxlm-id': 'abc'}}}]}}
  seen = supervise.resource_of(plain, 'z', 'small', 'abc')
  assert (seen.state, seen.error, seen.ours) == ('FAILED', 'no', True)
  assert not supervise.resource_of(plain, 'z', 'small', 'other').ours
  assert supervise.resource_of(plain, 'z', 'smaller', 'abc') is None


# -- GKE


@pytest.mark.parametrize('tpu, spot', [('tpu7x-128', False), ('v6e-8', True)])
def test_jobset_is_of_the_schema(tpu, spot):
  models = pytest.importorskip('kubeflow_trainer_api.models')
  slice_ = accelerators.parse(tpu)
  made = gke.jobset(slice_, 'small', 'image', 'gs://bkt/x', ['--config=configs/tiny.py', '--config.data.corpus=gs://bkt/x/c'],
                    slices=2, spot=spot)
  # The model drops what it does not know, and refuses what lacks something: all of ours is there and known.
  assert json.loads(models.JobsetV1alpha2JobSet.from_dict(made).to_json()) == made
  made['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['nodeSelektor'] = {}
  assert json.loads(models.JobsetV1alpha2JobSet.from_dict(made).to_json()) != made
  job = made['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completions'] == slice_.hosts and '--config.data.corpus=/mnt/maxlm/c' in str(job)


def test_jobset_is_the_golden_one():
  shown = subprocess.run([sys.executable, '-m', 'launch.gke', 'render', '--config=configs/tiny.py', '--tpu=tpu7x:4x4x4',
                          '--image=docker/image', '--bucket=gs://bkt/x', '--slices=2', '--', '--config.optim.peak_lr=1'],
                         cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
  assert shown == (GOLDEN / 'jobset.json').read_text(), shown


# -- preflight


def test_preflight_names_what_does_not_do(monkeypatch):
  said = {'accelerator-types': {}, 'service-accounts': {}, 'buckets': {'location': 'US-EAST5'}, 'secrets': {}}
  answer = lambda argv: said[next(word for word in argv if word in said)] if 'get-iam-policy' not in argv else {'bindings': [
    {'role': 'roles/storage.objectUser', 'members': ['serviceAccount:a@p.iam.gserviceaccount.com']}]}
  monkeypatch.setattr(gcloud, 'read_json', answer)
  lines = []
  fine = launch(service_account='a@p.iam.gserviceaccount.com', secrets={'A': 'b:3'})
  preflight.check(fine, lines.append, plan=False)
  assert [line.split()[0] for line in lines] == ['zone', 'zone', 'bucket', 'account', 'secret']
  preflight.check(launch(service_account='b@p.iam.gserviceaccount.com'), lines.append, plan=False)
  assert any('has none of roles/storage.objectUser' in line for line in lines)
  with pytest.raises(ValueError, match='not in the region of europe-west4-a'):
    preflight.check(launch(zones=['us-east5-a', 'europe-west4-a']), lines.append, plan=False)

  def refuses(argv):
    raise gcloud.Failed('fatal', 'PERMISSION_DENIED')

  monkeypatch.setattr(gcloud, 'read_json', refuses)
  with pytest.raises(ValueError, match='v6e-64 is not to be had there.*PERMISSION_DENIED'):
    preflight.check(fine, lines.append, plan=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_preflight_compiles_the_step(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  lines, fits = [], ['--config=configs/tiny.py', '--config.compute.kernel=chunked']
  preflight._plan(launch(tpu='v5litepod-8', train=fits), lines.append)
  assert lines[0].startswith('plan     v5e:2x4 x 1: 0.') and lines[0].endswith('of 15.8 GiB a device')
  with pytest.raises(ValueError, match="does not compile for v5e:2x4: .*needs a sequence in multiples of 128"):
    preflight._plan(launch(tpu='v5litepod-8', train=fits[:1]), lines.append)
