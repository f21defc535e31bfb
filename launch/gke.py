"""A run on Google Kubernetes Engine, the only way to tpu7x: writes a JobSet, for kubectl to apply.

    python -m launch.gke render --config=configs/x.py --tpu=tpu7x-128 --image=IMAGE --bucket=gs://B > run.json
    kubectl apply -f run.json

One job a slice, one pod a machine; all start again when one ends, but for the exit code 2, which needs a person
(docs/reliability.md). The bucket is mounted by the CSI driver of gcsfuse. Labels and fields: the pages on TPUs of
cloud.google.com/kubernetes-engine, and jobset.sigs.k8s.io v1alpha2. JSON is YAML.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch import accelerators, bootstrap
from launch.request import NAME

MOUNT = '/mnt/maxlm'
COORDINATOR = 8476


def jobset(slice_: accelerators.Slice, run: str, image: str, bucket: str, train: list[str], slices: int = 1,
           spot: bool = False, service_account: str = 'default', max_restarts: int = 100) -> dict[str, Any]:
  """bucket: gs://NAME[/PREFIX], in which the run lies in runs/RUN. service_account: of Kubernetes, bound to one of IAM."""
  name, _, prefix = bucket.removeprefix('gs://').partition('/')
  selector = {'cloud.google.com/gke-tpu-accelerator': slice_.generation.gke,
              'cloud.google.com/gke-tpu-topology': slice_.shape}
  tpus = {'google.com/tpu': slice_.chips_per_host}
  options = 'implicit-dirs,metadata-cache:ttl-secs:0' + (f',only-dir={prefix}' if prefix else '')
  pod = {
    'restartPolicy': 'Never', 'terminationGracePeriodSeconds': 60, 'serviceAccountName': service_account,
    'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet',
    'nodeSelector': selector | ({'cloud.google.com/gke-spot': 'true'} if spot else {}),
    'tolerations': [{'key': key, 'operator': 'Exists', 'effect': 'NoSchedule'}
                    for key in ('google.com/tpu', *(['cloud.google.com/gke-spot'] if spot else []))],
    'containers': [{
      'name': 'trainer', 'image': image, 'ports': [{'containerPort': COORDINATOR, 'protocol': 'TCP'}],
      'command': ['python3.12', '-m', 'maxlm.train', *(word.replace(f'{bucket}/', f'{MOUNT}/') for word in train),
                  f'--workdir={MOUNT}/runs/{run}'],
      'resources': {'limits': tpus, 'requests': tpus}, 'volumeMounts': [{'name': 'bucket', 'mountPath': MOUNT}]}],
    'volumes': [{'name': 'bucket', 'csi': {'driver': 'gcsfuse.csi.storage.gke.io', 'volumeAttributes': {
      'bucketName': name, 'mountOptions': options}}}]}
  job = {
    'parallelism': slice_.hosts, 'completions': slice_.hosts, 'completionMode': 'Indexed', 'backoffLimit': 0,
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
      'containerName': 'trainer', 'operator': 'In', 'values': [2]}}]},
    'template': {'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}}, 'spec': pod}}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
    'metadata': {'name': run, 'labels': {'maxlm-run': run},
                 'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}},
    'spec': {
      'failurePolicy': {'maxRestarts': max_restarts, 'rules': [
        {'name': 'mistake', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
      'replicatedJobs': [{'name': 'slice', 'replicas': slices, 'template': {'spec': job}}]}}


def main(argv: list[str]) -> None:
  split = argv.index('--') if '--' in argv else len(argv)
  parser = argparse.ArgumentParser(prog='python -m launch.gke', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('command', choices=('render',))
  parser.add_argument('--config', required=True, help='as of maxlm.train')
  parser.add_argument('--tpu', required=True, help='of one slice: tpu7x-128 or tpu7x:4x4x4; also other generations')
  parser.add_argument('--image', required=True, help='container with MaxLM, its configs and jax[tpu]')
  parser.add_argument('--bucket', required=True, help='gs://NAME[/PREFIX]')
  parser.add_argument('--name', default='', help="of the run (default: the config's file)")
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--spot', action='store_true')
  parser.add_argument('--service_account', default='default', help='of Kubernetes')
  parser.add_argument('--max_restarts', type=int, default=100)
  asked, train = parser.parse_args(argv[:split]), argv[split + 1:]
  bootstrap.refuse_secrets('\n'.join(argv), 'the command line')
  run = asked.name or Path(asked.config.partition('.py')[0]).name.replace('_', '-')
  if not NAME.fullmatch(run) or not asked.bucket.startswith('gs://'):
    raise ValueError(f'--name={run}: up to 40 of a-z, 0-9 and -; --bucket={asked.bucket}: gs://NAME or gs://NAME/PREFIX')
  print(json.dumps(jobset(accelerators.parse(asked.tpu), run, asked.image, asked.bucket.rstrip('/'),
                          [f'--config={asked.config}', *train], asked.slices, asked.spot, asked.service_account,
                          asked.max_restarts), indent=1))


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except ValueError as error:
    print('error:', error, file=sys.stderr)
    sys.exit(2)
