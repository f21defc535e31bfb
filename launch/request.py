"""What is asked of Cloud TPU: a queued resource, as arguments of gcloud and as the JSON that the service gets of them.

Both are made of one `Request`; a test reads the JSON with Google's message types, and compares it with what gcloud sends.
Flags: cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create; GA ones, no alpha component is needed.
"""

import dataclasses
import hashlib
import re
from typing import Any

from launch import accelerators

NAME = re.compile(r'[a-z][a-z0-9-]{0,38}[a-z0-9]')  # so that RUN-a123-15 is one of a node


@dataclasses.dataclass(kw_only=True, slots=True)
class Launch:
  """What a run was launched with; it does not change on the way. bucket: gs://NAME[/PREFIX], under which everything of ours
  lies. bundle: SHA-256 of the code that the machines run. train: arguments of maxlm.train. secrets: environment variable ->
  name in Secret Manager. max_hours: that slices may be held, of all attempts together. dollars: of a chip and an hour.
  queue_hours: that a request waits before the next zone is tried. pause_seconds: before the first retry; doubles."""

  run: str
  project: str
  zones: list[str]
  tpu: str
  bucket: str
  bundle: str
  train: list[str]
  slices: int = 1
  spot: bool = False
  reserved: bool = False
  service_account: str = ''
  network: str = 'default'
  subnetwork: str = 'default'
  external_ips: bool = False
  secrets: dict[str, str] = dataclasses.field(default_factory=dict)
  max_hours: float = 24.0
  dollars: float = 0.0
  queue_hours: float = 6.0
  pause_seconds: float = 30.0

  def __post_init__(self):
    if not NAME.fullmatch(self.run):
      raise ValueError(f'--name={self.run}: a name has up to 40 of a-z, 0-9 and -, and begins with a letter')
    if not re.fullmatch(r'gs://[a-z0-9][a-z0-9._-]+(/[\w.-]+)*', self.bucket):
      raise ValueError(f'--bucket={self.bucket}: it is gs://NAME or gs://NAME/PREFIX')
    if self.slices < 1 or not self.zones or not self.project:
      raise ValueError('a launch needs --project, --zones and at least one of --slices')
    if self.spot and self.reserved:
      raise ValueError('--spot and --reserved: capacity is one or the other')
    if not self.slice.generation.runtime:
      raise ValueError(f'--tpu={self.tpu}: Cloud TPU has no queued resources for {self.slice.generation.name}, it is used '
                       'through GKE: python -m launch.gke render')

  @property
  def slice(self) -> accelerators.Slice:
    return accelerators.parse(self.tpu)

  @property
  def hosts(self) -> int:
    return self.slice.hosts * self.slices

  @property
  def dollars_per_hour(self) -> float:
    return self.slice.chips * self.slices * (self.dollars or self.slice.generation.dollars)

  @property
  def folder(self) -> str:
    """Of the run in the bucket."""
    return f'{self.bucket}/runs/{self.run}'

  @property
  def id(self) -> str:
    """Tells this run from one of the same name that keeps its state in another bucket."""
    return folder_id(self.folder)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
  """A queued resource for one attempt of a launch. script: what its machines run whenever they boot."""

  launch: Launch
  attempt: int
  zone: str
  script: str

  @property
  def name(self) -> str:
    return name_of(self.launch.run, self.attempt)

  @property
  def labels(self) -> dict[str, str]:
    return {'maxlm-attempt': str(self.attempt), 'maxlm-id': self.launch.id, 'maxlm-run': self.launch.run}

  def argv(self, script_file: str) -> list[str]:
    """Of gcloud, without 'gcloud'. script_file: where the script lies: it is no argument, for all to see."""
    of, slice_ = self.launch, self.launch.slice
    nodes = [f'--node-count={of.slices}', f'--node-prefix={self.name}'] if of.slices > 1 else [f'--node-id={self.name}']
    return [
      'compute', 'tpus', 'queued-resources', 'create', self.name, *nodes, *where(of.project, self.zone),
      f'--accelerator-type={slice_.accelerator_type}', f'--runtime-version={slice_.generation.runtime}',
      *(['--spot'] if of.spot else []), *(['--reserved'] if of.reserved else []),
      f'--valid-until-duration={round(of.queue_hours * 3600)}s', f'--network={of.network}', f'--subnetwork={of.subnetwork}',
      *([] if of.external_ips else ['--internal-ips']),
      *([f'--service-account={of.service_account}'] if of.service_account else []), '--scopes=cloud-platform',
      '--labels=' + ','.join(f'{key}={value}' for key, value in self.labels.items()),
      f'--metadata-from-file=startup-script={script_file}', '--async', '--quiet']

  def body(self) -> dict[str, Any]:
    """As google.cloud.tpu.v2.QueuedResource in JSON."""
    of, slice_ = self.launch, self.launch.slice
    account = {'email': of.service_account} if of.service_account else {}
    node = {
      'acceleratorType': slice_.accelerator_type, 'runtimeVersion': slice_.generation.runtime, 'labels': self.labels,
      'metadata': {'startup-script': self.script}, 'serviceAccount': account | {'scope': ['cloud-platform']},
      'networkConfig': {'network': of.network, 'subnetwork': of.subnetwork, 'enableExternalIps': of.external_ips}}
    named = {'multisliceParams': {'nodeCount': of.slices, 'nodeIdPrefix': self.name}} if of.slices > 1 else {
      'nodeId': self.name}
    spec = {'parent': f'projects/{of.project}/locations/{self.zone}', **named, 'node': node}
    return {'tpu': {'nodeSpec': [spec]}, **({'spot': {}} if of.spot else {}),
            **({'reservationName': f'projects/{of.project}/locations/{self.zone}/reservations/-'} if of.reserved else {}),
            'queueingPolicy': {'validUntilDuration': f'{round(of.queue_hours * 3600)}s'}}


def folder_id(folder: str) -> str:
  return hashlib.sha256(folder.encode()).hexdigest()[:8]


def name_of(run: str, attempt: int) -> str:
  return f'{run}-a{attempt}'


def where(project: str, zone: str) -> list[str]:
  return [f'--project={project}', f'--zone={zone}']


def list_argv(project: str, zone: str) -> list[str]:
  return ['compute', 'tpus', 'queued-resources', 'list', *where(project, zone), '--format=json']


def nodes_argv(project: str, zone: str) -> list[str]:
  return ['compute', 'tpus', 'tpu-vm', 'list', *where(project, zone), '--format=json']


def delete_argv(project: str, zone: str, name: str) -> list[str]:
  return ['compute', 'tpus', 'queued-resources', 'delete', name, *where(project, zone), '--force', '--async', '--quiet']


def ssh_argv(project: str, zone: str, name: str, command: str, node: str = 'all', worker: str = 'all') -> list[str]:
  return ['compute', 'tpus', 'queued-resources', 'ssh', name, *where(project, zone), f'--node={node}', f'--worker={worker}',
          '--tunnel-through-iap', *([f'--command={command}'] if command else [])]
