"""On each machine of a slice, under systemd: keeps the trainer running, and says in the bucket how it fares.

    python -m launch.worker /opt/maxlm/worker.json /mnt/maxlm

It starts `python -m maxlm.train` again after whatever a start may help with (docs/reliability.md, exit codes), tells it of a
preemption, and kills it where a later attempt has begun: two gangs never write one run. It always ends with 0:
systemd starts it again only where it is killed itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

BEAT = 15.0  # seconds between reports, at most
POLL = 0.5
STOP_SECONDS = 25  # from the notice of a preemption, 30 s, to the end
MAX_STARTS = 5  # without a step between
FINAL = (0, 2, 70)  # finished; a person is needed; another machine is needed
LOG_BYTES = 4 << 20  # of one part of a log


class Worker:
  """One attempt on one machine."""

  def __init__(self, spec: dict, home: Path, mount: Path):
    """home: where it keeps what the trainer says."""
    self.spec = spec
    self.folder = mount / 'runs' / spec['run'] / 'launch'
    self.mine = self.folder / f'a{spec["attempt"]}'
    of_slice = re.search(r"MEGASCALE_SLICE_ID: '(\d+)'", metadata('tpu-env'))  # where JAX looks too
    self.name = f's{of_slice[1] if of_slice else 0}w{metadata("agent-worker-number") or 0}'
    self.workdir = mount / spec['workdir']
    self.argv = [word.replace(f'{spec["bucket"]}/', f'{mount}/') for word in spec['train']]  # the trainer reads files
    self.log = home / f'{spec["run"]}-a{spec["attempt"]}.log'
    self.sent, self.parts, self.starts, self.code, self.stopping, self.fenced = 0, 0, 0, None, False, False
    self.secrets, self.beat = {}, min(BEAT, spec['pause_seconds'])
    signal.signal(signal.SIGTERM, self._stop)

  def _stop(self, *_) -> None:
    self.stopping = True

  def run(self) -> None:
    """Until the run is finished, a person or another machine is needed, the machine goes, or another attempt has come."""
    self.mine.mkdir(parents=True, exist_ok=True)
    self.parts = len(list(self.mine.glob(f'{self.name}.*.log')))
    self.sent = self.log.stat().st_size if self.log.exists() else 0
    fruitless, step = 0, self.step()
    while not self.is_fenced():
      self.report('running')
      self.code = self.train()
      self.send_log()
      fruitless, step = (0 if self.step() > step else fruitless + 1), self.step()
      if self.fenced or self.stopping or self.code in FINAL or fruitless >= MAX_STARTS:
        break
      time.sleep(min(60, self.spec['pause_seconds'] * fruitless))
    if not self.fenced:
      self.report('ended')

  def train(self) -> int:
    """One life of the trainer; its exit code."""
    self.starts += 1
    with open(self.log, 'ab') as log:
      os.chmod(self.log, 0o600)
      try:
        self.secrets = {variable: secret(name) for variable, name in self.spec['secrets'].items()}
      except ValueError as error:
        log.write(f'error: {error}\n'.encode())
        return 1
      child = subprocess.Popen([sys.executable, '-m', 'maxlm.train', *self.argv, f'--workdir={self.workdir}'],
                               stdout=log, stderr=subprocess.STDOUT, env=os.environ | self.secrets)
    beat, told = time.monotonic(), None
    while child.poll() is None:
      time.sleep(POLL)
      if told is None and (self.stopping or metadata('preempted', 'instance') == 'TRUE'):
        self.stopping, told = True, time.monotonic()
        child.terminate()
      if told is not None and time.monotonic() - told > STOP_SECONDS:
        child.kill()
      if time.monotonic() - beat > self.beat:
        beat = time.monotonic()
        self.report('running')
        self.send_log()
        if self.is_fenced():
          child.kill()  # it must not write another word
    return child.wait()

  def is_fenced(self) -> bool:
    """Whether a later attempt has begun. A bucket that does not answer says nothing."""
    try:
      self.fenced = int((self.folder / 'fence').read_text()) != self.spec['attempt']
    except (OSError, ValueError):
      pass
    return self.fenced

  def step(self) -> int:
    """The last step in the run's record."""
    try:
      with open(self.workdir / 'metrics.jsonl', 'rb') as record:
        record.seek(max(0, record.seek(0, os.SEEK_END) - 20_000))
        steps = re.findall(rb'"step": (\d+)', record.read())
    except OSError:
      return 0
    return int(steps[-1]) if steps else 0

  def report(self, phase: str) -> None:
    said = {'worker': self.name, 'attempt': self.spec['attempt'], 'phase': phase, 'time': time.time(), 'code': self.code,
            'step': self.step(), 'starts': self.starts, 'line': self.clean(self.last_line())}
    self.place(self.mine / f'{self.name}.json', json.dumps(said) + '\n')

  def last_line(self) -> str:
    """What the trainer last said was wrong."""
    if self.code in (None, 0) or not self.log.exists():
      return ''
    with open(self.log, 'rb') as log:
      log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
      lines = [line for line in log.read().decode(errors='replace').splitlines() if line.strip()]
    return next((line for line in reversed(lines) if 'error' in line.lower()), lines[-1] if lines else '')[:300]

  def send_log(self) -> None:
    """What was said since, as another part: objects of a bucket do not grow. Whole lines, or what the end left of one."""
    while True:
      with open(self.log, 'rb') as log:
        log.seek(self.sent)
        new = log.read(LOG_BYTES)
      new = new[:new.rfind(b'\n') + 1] or new
      if not new:
        return
      self.place(self.mine / f'{self.name}.{self.parts:05d}.log', self.clean(new.decode(errors='replace')))
      self.sent, self.parts = self.sent + len(new), self.parts + 1

  def clean(self, text: str) -> str:
    for variable, value in self.secrets.items():
      text = text.replace(value, f'[{variable}]') if value else text
    return text

  def place(self, path: Path, text: str) -> None:
    """Writes a file as a whole. Where the bucket does not answer the trainer says so better than we do."""
    try:
      path.write_text(text)
    except OSError as error:
      print(f'cannot write {path}: {error}', file=sys.stderr)


def metadata(key: str, under: str = 'instance/attributes') -> str:
  """Of the machine; '' where there is none."""
  host = os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')
  asked = urllib.request.Request(f'http://{host}/computeMetadata/v1/{under}/{key}', headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(asked, timeout=2) as answer:
      return answer.read().decode().strip()
  except (urllib.error.URLError, TimeoutError, OSError):
    return ''


def secret(name: str) -> str:
  """From Secret Manager, as the machine's service account: 'projects/P/secrets/S/versions/V', 'S' or 'S:V'."""
  name, _, version = name.partition(':')
  said = subprocess.run(['gcloud', 'secrets', 'versions', 'access', version or 'latest', f'--secret={name}'],
                        capture_output=True, text=True, timeout=120)
  if said.returncode:
    raise ValueError(f'secret {name}: {said.stderr.strip()[-300:]}')
  return said.stdout.strip()


if __name__ == '__main__':
  Worker(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent, Path(sys.argv[2])).run()
