"""What is known to be wrong before a chip is asked for: a step does not fit, a bucket is elsewhere, a right is missing."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable

from launch import gcloud
from launch.request import Launch

BUCKET_ROLES = ('roles/storage.objectUser', 'roles/storage.objectAdmin', 'roles/storage.admin')
MULTI = {'US': 'us-', 'EU': 'europe-', 'ASIA': 'asia-'}


def check(launch: Launch, say: Callable[[str], None], plan: bool = True) -> None:
  """Says what it finds, a line each. ValueError, in one line that names the fix, at the first that does not do."""
  for zone in launch.zones:
    _zone(launch, zone, say)
  _bucket(launch, say)
  _account(launch, say)
  for variable, name in launch.secrets.items():
    _asked(['secrets', 'describe', name.partition(':')[0], f'--project={launch.project}', '--format=json'],
           f'--secret={variable}={name}: there is none, or it is not for you to see')
    say(f'secret   {variable} from {name.partition(":")[0]}')
  if plan:
    _plan(launch, say)


def _asked(argv: list[str], wrong: str):
  try:
    return gcloud.read_json(argv)
  except gcloud.Failed as error:
    raise ValueError(f'{wrong} ({error})') from None


def _zone(launch: Launch, zone: str, say) -> None:
  kind = launch.slice.accelerator_type
  _asked(['compute', 'tpus', 'accelerator-types', 'describe', kind, f'--project={launch.project}', f'--zone={zone}',
          '--format=json'], f'--zones={zone}: {kind} is not to be had there, or the TPU API is not for you to use')
  chips = launch.slice.chips * launch.slices
  say(f'zone     {zone} has {kind}; quota: {chips} {"preemptible " if launch.spot else ""}chips of '
      f'{launch.slice.generation.name} are needed (IAM & Admin, Quotas, TPU API)')


def _bucket(launch: Launch, say) -> None:
  name = launch.bucket.removeprefix('gs://').partition('/')[0]
  found = _asked(['storage', 'buckets', 'describe', f'gs://{name}', '--format=json'],
                 f'--bucket={launch.bucket}: there is none')
  location = found.get('location', '').upper()
  far = [zone for zone in launch.zones if not zone.startswith(MULTI.get(location, location.lower()))]
  if far:
    raise ValueError(f'--bucket={launch.bucket} is in {location}, not in the region of {", ".join(far)}: checkpoints would '
                     'be slow and cost by the byte; take a bucket there, or other --zones')
  say(f'bucket   gs://{name} in {location}')
  if launch.service_account:
    policy = _asked(['storage', 'buckets', 'get-iam-policy', f'gs://{name}', '--format=json'],
                    f'--bucket={launch.bucket}: its permissions are not for you to see')
    member = f'serviceAccount:{launch.service_account}'
    if not any(member in bound['members'] and bound['role'] in BUCKET_ROLES for bound in policy.get('bindings', ())):
      say(f'warning  {launch.service_account} has none of {", ".join(BUCKET_ROLES)} on gs://{name} itself: it needs one, '
          'there or on the project')


def _account(launch: Launch, say) -> None:
  if not launch.service_account:
    say('warning  no --service_account: machines run as the default one, which may often change all of the project')
    return
  _asked(['iam', 'service-accounts', 'describe', launch.service_account, f'--project={launch.project}', '--format=json'],
         f'--service_account={launch.service_account}: there is none, or you may not use it')
  say(f'account  {launch.service_account}')


def _plan(launch: Launch, say) -> None:
  """Compiles the config for the slice, and reads how much of the memory it takes."""
  with tempfile.TemporaryDirectory() as folder:
    figures = os.path.join(folder, 'plan.json')
    flags = [word for word in launch.train if word.startswith('--config')]
    done = subprocess.run([sys.executable, '-m', 'maxlm.plan', *flags, f'--topology={launch.slice.topology}',
                           f'--slices={launch.slices}', f'--json={figures}'], capture_output=True, text=True)
    if done.returncode:
      last = (done.stderr.strip() or '?').splitlines()[-1]
      raise ValueError(f'the step does not compile for {launch.slice.topology}: {last}')
    with open(figures) as file:
      step = json.load(file)['programs'][0]
  say(f'plan     {launch.slice.topology} x {launch.slices}: {step["memory"]["peak"] / 2**30:.1f} of '
      f'{step["memory"]["capacity"] / 2**30:.1f} GiB a device')
