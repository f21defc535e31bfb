"""From a config to a finished run on Cloud TPU: python -m launch.tpu COMMAND [NAME] [--flags] [-- flags of maxlm.train]

    python -m launch.tpu up --config=configs/llama3_8b.py --tpu=v5p-128 --zones=us-east5-a --bucket=gs://B [-- --config.x=v]
    python -m launch.tpu status | logs | ssh | supervise | down NAME --bucket=gs://B

up        checks, asks for slices, runs, mends, and takes all down at the end; --dry_run shows what it would ask for
supervise takes up the mending of a run that `up --detach`, or a supervisor that is gone, has left
status    the runs of a bucket, or one of them and its machines;   logs  what its machines said, -f as they say it
ssh       a shell on its machines;   down  takes a run down;   gc  slices that no run of the bucket has any more
bundle    packs the code of this clone as the machines get it
"""

import argparse
import collections
import dataclasses
import json
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from launch import bootstrap, gcloud, preflight, request, supervise
from launch.request import Launch
from launch.states import Record

COMMANDS = ('up', 'supervise', 'status', 'logs', 'ssh', 'down', 'gc', 'bundle')
ROOT = Path.cwd()


def parser() -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(prog='python -m launch.tpu', description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument('command', choices=COMMANDS)
  made.add_argument('name', nargs='?', default='', help='of the run (for up: --name)')
  made.add_argument('--bucket', default='', help='gs://NAME[/PREFIX]: runs, code and state of the launcher lie there')
  made.add_argument('--project', default='', help="of Google Cloud (default: gcloud's own)")
  made.add_argument('--config', default='', help='as of maxlm.train: configs/x.py[:arg]')
  made.add_argument('--name', dest='named', default='', help="of the run (default: the config's file)")
  made.add_argument('--tpu', default='', help='of one slice: v6e-64, v5p-128, v5p:4x4x4 (docs/launch.md has all)')
  made.add_argument('--slices', type=int, default=1, help='of that size, connected by the data-centre network')
  made.add_argument('--spot', action='store_true', help='capacity that may be taken away')
  made.add_argument('--reserved', action='store_true', help='capacity of a reservation of the project')
  made.add_argument('--zones', default='', help='with commas: the first is asked, then the next')
  made.add_argument('--service_account', default='', help='that machines run as')
  made.add_argument('--network', default='default')
  made.add_argument('--subnetwork', default='default')
  made.add_argument('--external_ips', action='store_true', help='machines can be reached from the internet')
  made.add_argument('--secret', action='append', default=[], help='VARIABLE=NAME[:VERSION] of Secret Manager')
  made.add_argument('--max_hours', type=float, default=24.0, help='that slices may be held, all attempts together')
  made.add_argument('--price', type=float, default=0.0, help='dollars for a chip and an hour (default: list, on demand)')
  made.add_argument('--queue_hours', type=float, default=6.0, help='that a request waits, until the next zone is asked')
  made.add_argument('--pause_seconds', type=float, default=30.0, help='before an attempt is repeated; doubles')
  made.add_argument('--tick_seconds', type=float, default=supervise.TICK, help='between looks at the run')
  made.add_argument('--bundle', default='', help='archive of `bundle` (default: it is made)')
  made.add_argument('--extra', default='tpu', help='bundle: extra of pyproject.toml that it has')
  made.add_argument('--python', default='', help='bundle: folder of a standalone CPython 3.12')
  made.add_argument('--gcsfuse', default='', help='bundle: .deb of gcsfuse')
  made.add_argument('--batch', default='', help='up: file of launches, as `maxlm.sweep --emit=launch` writes it')
  made.add_argument('--noplan', action='store_true', help='up: does not compile the step beforehand')
  made.add_argument('--detach', action='store_true', help='up: leaves the rest to `supervise`, elsewhere')
  made.add_argument('--dry_run', action='store_true', help='up: prints every command and the request')
  made.add_argument('--follow', '-f', action='store_true', help='logs: goes on')
  made.add_argument('--node', default='all', help='ssh: which slice, from 0')
  made.add_argument('--worker', default='all', help='ssh: which of its machines, from 0')
  made.add_argument('--run', default='', help='ssh: a command for them (default: a shell)')
  made.add_argument('--delete', action='store_true', help='gc: removes what it finds')
  return made


def main(argv: list[str]) -> int:
  split = argv.index('--') if '--' in argv else len(argv)
  asked, train = parser().parse_args(argv[:split]), argv[split + 1:]
  if asked.command == 'bundle':
    print(pack(asked))
    return 0
  if not asked.bucket:
    raise ValueError('give --bucket=gs://NAME: all that is known of runs lies there')
  if asked.command == 'up':
    return batch(argv[:split], asked, train) if asked.batch else up(asked, train)
  if asked.command == 'gc':
    return gc(asked)
  if asked.command == 'status':
    return status(asked)
  if not asked.name:
    raise ValueError(f'{asked.command}: name the run; python -m launch.tpu status --bucket={asked.bucket} lists them')
  folder = f'{asked.bucket}/runs/{asked.name}'
  if asked.command == 'down':
    supervise.change(folder, lambda record: dataclasses.replace(record, desired='down'))
    try:
      return supervise.supervise(folder, asked.tick_seconds)
    except supervise.Lost as lost:
      print(f'{lost}, which takes it down', file=sys.stderr)
      return 0
  if asked.command == 'supervise':
    return supervise.supervise(folder, asked.tick_seconds)
  return logs(folder, asked) if asked.command == 'logs' else ssh(folder, asked)


# -- up


def up(asked: argparse.Namespace, train: list[str]) -> int:
  launch = launch_of(asked, train)
  if asked.dry_run:
    print(dry_run(launch))
    return 0
  record, generation = supervise.read(launch.folder)
  if record is not None and same(record.launch, launch) and record.desired == 'up':
    if record.status == 'finished':
      print(f'{launch.run}: {record.reason}')
      return 0
    if not record.ended:
      return supervise.supervise(launch.folder, asked.tick_seconds)
  if record is not None and not record.ended:
    raise ValueError(f'{launch.run} is up, launched otherwise: take it down first, or give another --name')
  preflight.check(launch, lambda line: print(line, file=sys.stderr), plan=not asked.noplan)
  launch.bundle = bootstrap.upload(Path(asked.bundle) if asked.bundle else pack(asked), launch.bucket)
  fresh = Record(launch=launch, zone=launch.zones[0], since=time.time())
  if record is not None:  # a run that failed or was taken down goes on, under numbers that were not used
    fresh = dataclasses.replace(fresh, attempt=record.attempt + 1, step=record.step)
  supervise.write(launch.folder, fresh, generation)
  if asked.detach:
    print(f'python -m launch.tpu supervise {launch.run} --bucket={launch.bucket}')
    return 0
  return supervise.supervise(launch.folder, asked.tick_seconds)


def same(one: Launch, other: Launch) -> bool:
  return dataclasses.replace(one, bundle='') == dataclasses.replace(other, bundle='')


def launch_of(asked: argparse.Namespace, train: list[str]) -> Launch:
  """ValueError where a flag is missing or wrong, or a secret is on the command line or in the config."""
  if not asked.config or not asked.tpu:
    raise ValueError('up needs --config=configs/x.py and --tpu=v6e-64')
  path = Path(asked.config.partition('.py')[0] + '.py')
  if path.is_absolute() or path.parts[0] != 'configs' or not path.exists():
    raise ValueError(f'--config={asked.config}: machines get the files in configs/ of this clone: it is to lie there')
  bootstrap.refuse_secrets(path.read_text(), str(path))
  bootstrap.refuse_secrets('\n'.join(word for word in sys.argv[1:] if not word.startswith('--secret')), 'the command line')
  secrets = dict(word.split('=', 1) for word in asked.secret if '=' in word)
  if len(secrets) != len(asked.secret):
    raise ValueError('--secret is VARIABLE=NAME of a secret in Secret Manager')
  project = asked.project or gcloud.run(['config', 'get-value', 'project'])[0].strip()
  return Launch(
    run=asked.named or asked.name or path.stem.replace('_', '-'), project=project,
    zones=[zone for zone in asked.zones.split(',') if zone], tpu=asked.tpu, bucket=asked.bucket.rstrip('/'), bundle='',
    train=[f'--config={asked.config}', *train], slices=asked.slices, spot=asked.spot,
    reserved=asked.reserved, service_account=asked.service_account, network=asked.network,
    subnetwork=asked.subnetwork, external_ips=asked.external_ips, secrets=secrets, max_hours=asked.max_hours,
    dollars=asked.price, queue_hours=asked.queue_hours, pause_seconds=asked.pause_seconds)


def dry_run(launch: Launch) -> str:
  """All that would be asked for, of the first zone; without the hash of a bundle that is not made."""
  launch.bundle = launch.bundle or 'SHA256-OF-THE-BUNDLE'
  asked = request.Request(launch=launch, attempt=1, zone=launch.zones[0], script=bootstrap.script(launch, 1))
  commands = [asked.argv('STARTUP_SCRIPT'), request.list_argv(launch.project, asked.zone),
              request.nodes_argv(launch.project, asked.zone), request.delete_argv(launch.project, asked.zone, asked.name)]
  price = f'{launch.hosts} hosts, {launch.slice.chips * launch.slices} chips'
  if launch.dollars_per_hour:
    price += (f', ${launch.dollars_per_hour:,.2f} an hour, at most '
              f'${launch.dollars_per_hour * launch.max_hours:,.0f} in --max_hours={launch.max_hours:g}')
  lines = [f'# {price}', *(shlex.join(['gcloud', *argv]) for argv in commands), '# the request of the first']
  return '\n'.join([*lines, json.dumps(asked.body(), indent=1)])


def pack(asked: argparse.Namespace) -> Path:
  return bootstrap.bundle(ROOT, ROOT / 'dist' / 'bundles', asked.extra, asked.python, asked.gcsfuse)


def batch(flags: list[str], asked: argparse.Namespace, train: list[str]) -> int:
  """Launches of a file, some at a time: {"max_running": N}, then {"name": …, "args": […]} a line. 1 where one has failed.

  A launch that is finished ends at once, so that the same command goes on with the rest.
  """
  first, *lines = [json.loads(line) for line in Path(asked.batch).read_text().splitlines() if line.strip()]
  given = [word for word in flags if not word.startswith('--batch')]
  if not asked.bundle and not asked.dry_run:
    given += [f'--bundle={pack(asked)}']
  waiting, running, failed = collections.deque(lines), {}, []
  while waiting or running:
    while waiting and len(running) < first['max_running']:
      line = waiting.popleft()
      own, more = (line['args'], []) if '--' not in line['args'] else (
        line['args'][:line['args'].index('--')], line['args'][line['args'].index('--') + 1:])
      command = [sys.executable, '-m', 'launch.tpu', *given, f'--name={line["name"]}', *own, '--', *more, *train]
      running[line['name']] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
      threading.Thread(target=_prefixed, args=(line['name'], running[line['name']].stderr), daemon=True).start()
    time.sleep(0.2)
    for name in [name for name, child in running.items() if child.poll() is not None]:
      failed += [name] if running.pop(name).returncode else []
  if failed:
    print(f'failed: {", ".join(failed)}', file=sys.stderr)
  return 1 if failed else 0


def _prefixed(name: str, stream) -> None:
  for line in stream:
    print(f'[{name}] {line}', end='', file=sys.stderr, flush=True)


# -- looks


def status(asked: argparse.Namespace) -> int:
  pattern = f'{asked.bucket}/runs/{asked.name or "*"}/launch/record.json'
  records = [supervise.read(url.removesuffix('/launch/record.json'))[0] for url in gcloud.names(pattern)]
  rows = [['run', 'status', 'attempt', 'zone', 'seen', 'step', 'hours', '$', 'supervisor', 'last']]
  for record in records:
    last = record.reason or (record.failures[-1].reason if record.failures else '')
    spent = record.spent(time.time())
    rows.append([record.launch.run, record.status, str(record.attempt), record.zone, record.sight, f'{record.step:,}',
                 f'{spent:.2f}', f'{spent * record.launch.dollars_per_hour:,.2f}', record.holder or 'none', last[:60]])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  print('\n'.join('  '.join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows))
  if asked.name:
    for record in records:
      for failure in record.failures:
        print(f'a{failure.attempt}  {failure.kind} at step {failure.step:,}: {failure.reason}')
      for report in supervise.reports(record.launch.folder, record.attempt):
        print(f'{report.worker}  {report.phase}, {time.time() - report.time:.0f} s ago, step {report.step:,}, start '
              f'{report.starts}{f", ended with {report.code}: {report.line}" if report.code is not None else ""}')
  return 0


def logs(folder: str, asked: argparse.Namespace) -> int:
  """Parts of all machines and attempts, each line with its machine in front."""
  shown = set()
  while True:
    record, _ = supervise.read(folder)
    for url in gcloud.names(f'{folder}/launch/*/*.log'):
      if url not in shown:
        shown.add(url)
        attempt, part = url.split('/')[-2:]
        for line in gcloud.cat(url).splitlines():
          print(f'[{attempt} {part.split(".")[0]}] {line}', flush=True)
    if not asked.follow or record is None or record.ended:
      return 0
    time.sleep(asked.tick_seconds)


def ssh(folder: str, asked: argparse.Namespace) -> int:
  record, _ = supervise.read(folder)
  if record is None or record.ended or not record.active:
    raise ValueError(f'{asked.name} has no machines now: python -m launch.tpu status {asked.name} --bucket={asked.bucket}')
  of = record.launch
  return gcloud.show(request.ssh_argv(of.project, record.zone, record.name, asked.run, asked.node, asked.worker))


def gc(asked: argparse.Namespace) -> int:
  """Slices that were launched with this bucket, and that no run of it has any more. 1 where some are left."""
  zones = [zone for zone in asked.zones.split(',') if zone]
  if not zones:
    raise ValueError('gc needs --zones: where slices may be')
  project = asked.project or gcloud.run(['config', 'get-value', 'project'])[0].strip()
  left = 0
  for zone in zones:
    for plain in gcloud.read_json(request.list_argv(project, zone)) or ():
      labels = plain.get('tpu', {}).get('nodeSpec', [{}])[0].get('node', {}).get('labels', {})
      run, name = labels.get('maxlm-run', ''), plain['name'].rpartition('/')[2]
      folder = f'{asked.bucket.rstrip("/")}/runs/{run}'
      if not run or request.folder_id(folder) != labels.get('maxlm-id'):
        continue
      record, _ = supervise.read(folder)
      if record is not None and not record.ended and record.name == name:
        continue
      print(f'{name} in {zone}: {plain["state"]["state"]}')
      if asked.delete:
        gcloud.run(request.delete_argv(project, zone, name))
      else:
        left += 1
  if left:
    print('gc --delete removes them', file=sys.stderr)
  return 1 if left else 0


if __name__ == '__main__':
  try:
    sys.exit(main(sys.argv[1:]))
  except (ValueError, gcloud.Failed, supervise.Lost) as error:
    print('error:', error, file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    sys.exit(75)
