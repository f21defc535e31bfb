"""The fake cloud for tests: `Cloud(...).up('--slices=2')` runs the launcher in it, with real trainers on its machines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.jobs import ROOT

FAKE = ROOT / 'tests' / 'launch' / 'fake_gcloud.py'
SHORT = ('--config.model.n_layers=1', '--config.model.d_model=256', f'--config.tokens={24 * 512}',
         '--config.checkpoint.every_steps=5', '--config.evals.every_steps=8', '--config.evals.rows=8')
BUCKET = 'gs://bkt/x'


class Cloud:
  """In `directory`, which is to be empty. scenario: as of fake_gcloud.py. bundle: an archive of this tree's code."""

  def __init__(self, directory: Path, corpus: Path | None = None, bundle: Path | None = None, **scenario):
    self.directory, self.bundle = directory, bundle
    self.scenario(**scenario)
    stubs = directory / 'bin'
    (directory / 'machines').mkdir()
    (directory / 'bucket' / 'bkt' / 'x').mkdir(parents=True)
    stubs.mkdir()
    for name in ('gcloud', 'gcsfuse', 'mountpoint', 'systemctl'):
      (stubs / name).write_text(f'#!/bin/sh\nexec {sys.executable} -IS {FAKE} {name} "$@"\n')
    (stubs / 'python3.12').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for stub in stubs.iterdir():
      stub.chmod(0o755)
    if corpus is not None:
      (directory / 'bucket/bkt/x/corpora').mkdir()
      (directory / 'bucket/bkt/x/corpora/tiny').symlink_to(corpus)
    self.env = os.environ | {'FAKE_CLOUD': str(directory), 'PATH': f'{stubs}:{os.environ["PATH"]}', 'PYTHONPATH': str(ROOT)}
    self.env.pop('JAX_NUM_CPU_DEVICES', None)

  def scenario(self, attempts=None, **more) -> None:
    (self.directory / 'scenario.json').write_text(json.dumps({'attempts': {'else': ['ACTIVE']} | (attempts or {}), **more}))

  def command(self, *argv: str, module: str = 'launch.tpu') -> list[str]:
    return [sys.executable, '-m', module, *argv]

  def up_argv(self, *flags: str, train=SHORT, name: str = 'small', tpu: str = 'v6e-8') -> list[str]:
    return self.command(
      'up', f'--name={name}', '--config=configs/tiny.py', f'--tpu={tpu}', '--zones=us-east5-a,us-east5-b',
      f'--bucket={BUCKET}', f'--bundle={self.bundle}', '--noplan', '--tick_seconds=0.3', '--pause_seconds=0.2', *flags, '--',
      f'--config.data.corpus={BUCKET}/corpora/tiny', *train)

  def run(self, argv: list[str], seconds: float = 400, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(argv, cwd=ROOT, env=self.env | kwargs.pop('env', {}), capture_output=True, text=True,
                          timeout=seconds, **kwargs)

  def start(self, argv: list[str], **kwargs) -> subprocess.Popen:
    return subprocess.Popen(argv, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            **kwargs)

  def workdir(self, name: str = 'small') -> Path:
    return self.directory / 'bucket/bkt/x/runs' / name

  def record(self, name: str = 'small') -> dict:
    return json.loads((self.workdir(name) / 'launch/record.json').read_text())

  def events(self) -> list[dict]:
    path = self.directory / 'events.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def resources(self) -> dict:
    path = self.directory / 'resources.json'
    return json.loads(path.read_text()) if path.exists() else {}

  def sessions(self) -> set[int]:
    """Of machines on which something still runs."""
    ours = {int(path.read_text()) for path in self.directory.glob('machines/*/pid')}
    found = set()
    for path in Path('/proc').glob('[0-9]*'):
      try:
        found.add(os.getsid(int(path.name)))
      except (ProcessLookupError, PermissionError):
        pass
    return ours & found

  def stop(self) -> None:
    """Ends what is left of the machines."""
    for session in self.sessions():
      for path in Path('/proc').glob('[0-9]*'):
        try:
          if os.getsid(int(path.name)) == session:
            os.kill(int(path.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
          pass

  def assert_never_two(self) -> None:
    """No slice was asked for while there was another of its run."""
    for event in self.events():
      if 'created' in event:
        run = event['created'].rpartition('-a')[0]
        assert [other for other in event['besides'] if other.rpartition('-a')[0] == run] == [], event

  def assert_nothing_left(self) -> None:
    assert self.resources() == {}, self.resources()
    until = time.monotonic() + 10
    while self.sessions() and time.monotonic() < until:
      time.sleep(0.1)
    assert self.sessions() == set()

  def told(self) -> str:
    """For the message of a test that failed."""
    parts = [f'{path}\n{path.read_text()[-2500:]}' for pattern in ('console', 'root/opt/maxlm/*.log')
             for path in sorted(self.directory.glob(f'machines/*/{pattern}'))]
    shown = [json.dumps(event) for event in self.events() if 'command' not in event]
    return '\n'.join([*shown, *parts])


def attempts(cloud: Cloud) -> list[str]:
  """Names of the slices that were asked for, in order."""
  return [event['created'] for event in cloud.events() if 'created' in event]

