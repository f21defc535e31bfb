"""A cloud in a directory: gcloud, and what machines of it have, as far as launch/ uses them. One file, many names:

    python fake_gcloud.py gcloud compute tpus queued-resources list …      # the directory is $FAKE_CLOUD

Queued resources pass through the states that scenario.json says, one entry each time that they are looked at; ACTIVE boots
machines (fake_machine.py), which run the startup script that the request had. Objects of the bucket are files, whose time of
change is their generation. Every command, request and change of state is written to events.jsonl.

scenario.json: {"attempts": {"1": ["WAITING_FOR_RESOURCES", "ACTIVE", "step>=5", "node0=PREEMPTED"], "else": ["ACTIVE"]},
"faults": {"create": ["RESOURCE_EXHAUSTED: Quota", null]}, "slow_delete": 3, "processes": 1, "secrets": {…}}
Entries: a state; FAILED:message; boot, machines before they are READY; step>=N waits for the run, whose trainers are frozen
there until the entry after it is done; nodeI=STATE; notice, of a
preemption; killI, the trainer of machine I with kill -9; stopI, its agent; look N waits for N looks.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CLOUD = Path(os.environ['FAKE_CLOUD'])
HERE = Path(__file__).parent


def main(name: str, argv: list[str]) -> int:
  if name != 'gcloud':
    return {'gcsfuse': gcsfuse, 'mountpoint': mountpoint, 'systemctl': systemctl}[name](argv)
  with open(CLOUD / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    log(command=argv)
    return gcloud(argv)


def gcloud(argv: list[str]) -> int:
  words = [word for word in argv if not word.startswith('--')]
  flags = dict(word[2:].partition('=')[::2] for word in argv if word.startswith('--'))
  if words[:3] == ['compute', 'tpus', 'queued-resources']:
    return resources(words[3], words[4:], flags)
  if words[:4] == ['compute', 'tpus', 'tpu-vm', 'describe']:
    print(next((one['nodes'][words[4]] for one in load().values() if words[4] in one['nodes']), ''))
    return 0
  if words == ['compute', 'tpus', 'tpu-vm', 'list']:
    return show([{'name': f'projects/p/locations/{flags["zone"]}/nodes/{node}', 'state': state}
                 for one in load().values() if one['zone'] == flags['zone'] for node, state in one['nodes'].items()])
  if words[0] == 'storage':
    return storage(words[1:], flags)
  if words[:3] == ['secrets', 'versions', 'access']:
    print(scenario()['secrets'][flags['secret']])
    return 0
  if words[:3] in (['iam', 'service-accounts', 'describe'], ['compute', 'tpus', 'accelerator-types']) or words[:2] == [
      'secrets', 'describe']:
    return show({'name': words[-1]})
  if words[:2] == ['config', 'get-value']:
    print('p')
    return 0
  return fail(f'invalid choice: {" ".join(words)}', 2)


def fail(text: str, code: int = 1) -> int:
  print(f'ERROR: (gcloud) {text}', file=sys.stderr)
  return code


def show(plain) -> int:
  print(json.dumps(plain))
  return 0


def log(**what) -> None:
  with open(CLOUD / 'events.jsonl', 'a') as events:
    events.write(json.dumps({'time': time.time(), **what}) + '\n')


def scenario() -> dict:
  return json.loads((CLOUD / 'scenario.json').read_text())


def load() -> dict[str, dict]:
  path = CLOUD / 'resources.json'
  return json.loads(path.read_text()) if path.exists() else {}


def save(them: dict) -> None:
  (CLOUD / 'resources.json.new').write_text(json.dumps(them, indent=1))
  os.replace(CLOUD / 'resources.json.new', CLOUD / 'resources.json')


def fault(verb: str) -> str | None:
  """What this call of a verb is to fail with."""
  path = CLOUD / 'faults.json'
  left = json.loads(path.read_text()) if path.exists() else scenario().get('faults', {})
  found = left.get(verb, []).pop(0) if left.get(verb) else None
  path.write_text(json.dumps(left))
  return found


# -- queued resources


def resources(verb: str, words: list[str], flags: dict) -> int:
  them = load()
  failed = fault(verb)
  if failed:
    return fail(failed, 255 if verb == 'ssh' else 1)
  if verb == 'list':
    for one in them.values():
      if one['zone'] == flags['zone']:
        look(one)
    them = {name: one for name, one in them.items() if one['state'] != 'GONE'}
    save(them)
    return show([described(one) for one in them.values() if one['zone'] == flags['zone']])
  name = words[0]
  if verb == 'create':
    if name in them:
      return fail(f'ALREADY_EXISTS: Resource {name} already exists')
    log(created=name, besides=sorted(other for other in them))
    count = int(flags.get('node-count', 1))
    labels = dict(pair.split('=') for pair in flags['labels'].split(','))
    script = Path(flags['metadata-from-file'].partition('=')[2]).read_text()
    them[name] = {'name': name, 'zone': flags['zone'], 'state': 'ACCEPTED', 'error': '', 'nodes': {}, 'at': 0,
                  'labels': labels, 'script': script, 'leaves': 0, 'port': free_port(),
                  'names': [f'{name}-{i}' for i in range(count)] if count > 1 else [name]}
    save(them)
    return 0
  if name not in them or them[name]['zone'] != flags['zone']:
    return fail(f'NOT_FOUND: Resource {name} was not found')
  one = them[name]
  if verb == 'delete':
    if one['state'] != 'DELETING':
      log(deleting=name)
      change(one, 'DELETING')
      one['leaves'] = scenario().get('slow_delete', 0)
      save(them)
    return 0
  if verb == 'describe':
    look(one)
    if one['state'] == 'GONE':
      del them[name]
    save(them)
    return show(described(one)) if name in them else fail(f'NOT_FOUND: Resource {name} was not found')
  if verb == 'ssh':
    print(f'[{name}] {flags.get("command", "")}')
    return 0
  return fail(f'invalid choice: {verb}', 2)


def described(one: dict) -> dict:
  spec = {'node': {'labels': one['labels'], 'metadata': {'startup-script': one['script']}}}
  return {'name': f'projects/p/locations/{one["zone"]}/queuedResources/{one["name"]}', 'tpu': {'nodeSpec': [spec]},
          'state': {'state': one['state'], **({'failedData': {'error': {'message': one['error']}}} if one['error'] else {})}}


def look(one: dict) -> None:
  """The next entry of its script, if it is time for it."""
  if one['state'] == 'DELETING':
    one['leaves'] -= 1
    if one['leaves'] < 0:
      change(one, 'GONE')
    return
  attempts = scenario()['attempts']
  script = attempts.get(one['name'].rpartition('-a')[2], attempts['else'])
  if one['at'] >= len(script):
    return
  entry = script[one['at']]
  if entry.startswith('step>='):
    if step_of(one) < int(entry[6:]):
      return
  elif entry.startswith('look'):
    one['looks'] = one.get('looks', 0) + 1
    if one['looks'] < int(entry.split()[1]):
      return
    one['looks'] = 0
  elif entry == 'boot':
    boot(one, 'CREATING')
  elif entry == 'notice':
    for machine in machines(one['name']):
      (machine / 'metadata' / 'preempted').write_text('TRUE')
  elif re.fullmatch(r'(kill|stop)\d+', entry):
    machine = machines(one['name'])[int(entry[4:])]
    wanted = 'maxlm.train' if entry.startswith('kill') else 'launch.worker'
    victims = [pid for pid, words in processes(machine) if f' -m {wanted} ' in words]
    if not victims:
      return
    for pid in victims:
      os.kill(pid, signal.SIGKILL)
  elif entry.startswith('node'):
    which, state = entry[4:].split('=')
    node = one['names'][int(which)]
    one['nodes'][node] = state
    (start if state == 'READY' else kill)(one, node)
  else:
    state, _, one['error'] = entry.partition(':')
    change(one, state)
  log(entry=entry, of=one['name'])
  one['at'] += 1
  if not entry.startswith('step>='):
    thaw(one, script)


def thaw(one: dict, script: list[str]) -> None:
  """Trainers go on, to where they are to be frozen next."""
  place = next((int(entry[6:]) for entry in script[one['at']:] if entry.startswith('step>=')), None)
  for machine in machines(one['name']):
    (machine / 'freeze').write_text('' if place is None else str(place))
    for pid, _ in processes(machine):
      os.kill(pid, signal.SIGCONT)


def change(one: dict, state: str) -> None:
  log(state=state, of=one['name'])
  one['state'] = state
  if state == 'ACTIVE':
    boot(one, 'READY')
  if state in ('SUSPENDING', 'SUSPENDED', 'FAILED', 'DELETING', 'GONE'):
    for node in list(one['nodes']):
      kill(one, node)
      one['nodes'].pop(node)


def boot(one: dict, state: str) -> None:
  for node in one['names']:
    if node not in one['nodes']:
      start(one, node)
    if one['nodes'].get(node) in (None, 'CREATING'):
      one['nodes'][node] = state


def step_of(one: dict) -> int:
  found = list((CLOUD / 'bucket').glob(f'*/*/runs/{one["labels"]["maxlm-run"]}/metrics.jsonl'))
  steps = re.findall(r'"step": (\d+)', found[0].read_text()) if found else []
  return int(steps[-1]) if steps else 0


# -- machines


def machines(name: str) -> list[Path]:
  return sorted(path for path in (CLOUD / 'machines').glob(f'{name}*') if re.fullmatch(name + r'(-\d+)?-w\d+', path.name))


def start(one: dict, node: str) -> None:
  """Boots the machines of a node, from an empty disk. They know nothing of whoever asked for them."""
  per_node = scenario().get('hosts', 1)
  for worker in range(per_node):
    machine = CLOUD / 'machines' / f'{node}-w{worker}'
    shutil.rmtree(machine, ignore_errors=True)
    (machine / 'metadata').mkdir(parents=True)
    (machine / 'startup').write_text(one['script'])
    (machine / 'metadata' / 'tpu-env').write_text(f"NODE_ID: '{node}'\nMEGASCALE_SLICE_ID: '{one['names'].index(node)}'\n")
    (machine / 'metadata' / 'agent-worker-number').write_text(str(worker))
    place = {'coordinator': f'127.0.0.1:{one["port"]}', 'processes': len(one['names']) * per_node,
             'process': one['names'].index(node) * per_node + worker}
    (machine / 'place.json').write_text(json.dumps(place))
    # XLA_FLAGS: other flags are another program, and its bits are compared with those of runs outside the cloud.
    passed = 'PATH', 'FAKE_CLOUD', 'JAX_COMPILATION_CACHE_DIR', 'XLA_FLAGS'
    env = {name: os.environ[name] for name in passed if name in os.environ}
    with open(machine / 'console', 'w') as console:
      process = subprocess.Popen([sys.executable, '-IS', str(HERE / 'fake_machine.py'), str(machine)], env=env,
                                 start_new_session=True, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    (machine / 'pid').write_text(str(process.pid))


def kill(one: dict, node: str) -> None:
  """The plug is pulled: kill -9 of everything on the node's machines."""
  for machine in machines(node):
    for pid, _ in processes(machine):
      try:
        os.kill(pid, signal.SIGKILL)
      except ProcessLookupError:
        pass


def processes(machine: Path) -> list[tuple[int, str]]:
  """(pid, command line) of all that runs on it: of its session."""
  session, found = int((machine / 'pid').read_text()), []
  for path in Path('/proc').glob('[0-9]*'):
    try:
      pid = int(path.name)
      if os.getsid(pid) == session:
        found.append((pid, (path / 'cmdline').read_bytes().replace(b'\0', b' ').decode()))
    except (OSError, ProcessLookupError):
      pass
  return found


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


# -- the bucket


def storage(words: list[str], flags: dict) -> int:
  verb = words[0]
  failed = fault(verb)
  if failed:
    return fail(failed)
  if verb in ('buckets', 'objects'):
    path = file_of(words[-1])
    if words[1] == 'get-iam-policy':
      return show({'bindings': []})
    if not path.exists():
      return fail(f'{words[-1]} not found: 404.')
    return show({'generation': str(path.stat().st_mtime_ns), 'location': 'US-EAST5'})
  if verb == 'ls':
    found = matching(words[1])
    print('\n'.join(found))
    return 0 if found else fail('One or more URLs matched no objects.')
  if verb == 'cat':
    url, _, generation = words[1].partition('#')
    found = [file_of(one) for one in matching(url)]
    if not found or (generation and str(found[0].stat().st_mtime_ns) != generation):
      return fail('The following URLs matched no objects or files')
    for path in found:
      sys.stdout.write(path.read_text())
    return 0
  if verb == 'cp':
    source, target = words[1:]
    if not target.startswith('gs://'):
      if not file_of(source).exists():
        return fail('The following URLs matched no objects or files')
      shutil.copy(file_of(source), target)
      return 0
    path = file_of(target)
    generation = path.stat().st_mtime_ns if path.exists() else 0
    if flags.get('if-generation-match', str(generation)) != str(generation):
      return fail('HTTPError 412: At least one of the pre-conditions you specified did not hold.')
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f'.{path.name}.new')
    new.write_bytes(sys.stdin.buffer.read() if source == '-' else Path(source).read_bytes())
    while new.stat().st_mtime_ns <= generation:
      os.utime(new)
    os.replace(new, path)
    print(f'Created: {target}#{path.stat().st_mtime_ns}', file=sys.stderr)
    return 0
  return fail(f'invalid choice: {verb}', 2)


def file_of(url: str) -> Path:
  return CLOUD / 'bucket' / url.removeprefix('gs://')


def matching(pattern: str) -> list[str]:
  root = CLOUD / 'bucket'
  return sorted(f'gs://{path.relative_to(root)}' for path in root.glob(pattern.removeprefix('gs://')) if path.is_file())


# -- what else a machine has


def gcsfuse(argv: list[str]) -> int:
  *flags, bucket, mount = argv
  below = next((flag.partition('=')[2] for flag in flags if flag.startswith('--only-dir=')), '')
  Path(mount).rmdir()
  Path(mount).symlink_to(CLOUD / 'bucket' / bucket / below)
  return 0


def mountpoint(argv: list[str]) -> int:
  return 0 if Path(argv[-1]).is_symlink() else 1


def systemctl(argv: list[str]) -> int:
  if argv[0] == 'start':
    Path(os.environ['ROOT'], 'started').touch()
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1], sys.argv[2:]))
