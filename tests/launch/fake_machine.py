"""A machine of the fake cloud, in a directory: runs its startup script, then what that handed to systemd, as systemd would.

What differs from a TPU VM: systemd is the few lines below (ExecStart, Environment, Restart=on-failure; KillMode=mixed is
a kill of what the unit leaves behind); gcsfuse is a symbolic link; Python and the packages that MaxLM needs are this
machine's, MaxLM itself is the wheel of the bundle; and processes find each other by flags, which sitecustomize.py adds,
because there is no TPU to ask. Root's directories are under `root`. Trainers are frozen at the step in the file `freeze`,
where the scenario does something, once a checkpoint is written.
"""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

machine = Path(sys.argv[1])
root = machine / 'root'


class Metadata(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    path = machine / 'metadata' / self.path.rpartition('/')[2]
    said = path.read_bytes() if path.exists() else b''
    self.send_response(200 if path.exists() else 404)
    self.send_header('Content-Length', str(len(said)))
    self.end_headers()
    self.wfile.write(said)

  def log_message(self, *_):
    pass


def unit() -> tuple[list[str], dict[str, str], str]:
  """Command, environment and directory of the unit that the startup script has written."""
  lines = (root / 'etc/systemd/system/maxlm.service').read_text().splitlines()
  of = lambda key: [line.partition('=')[2] for line in lines if line.startswith(f'{key}=')]
  return of('ExecStart')[0].split(), dict(word.split('=', 1) for words in of('Environment') for word in words.split()), of(
    'WorkingDirectory')[0]


def freezes() -> None:
  bucket = Path(os.environ['FAKE_CLOUD'], 'bucket')
  while True:
    time.sleep(0.01)
    wanted = (machine / 'freeze').read_text() if (machine / 'freeze').exists() else ''
    run = next((line[4:] for line in (machine / 'startup').read_text().splitlines() if line.startswith('RUN=')), '')
    said = ''.join(path.read_text() for path in bucket.glob(f'*/*/runs/{run}/metrics.jsonl')) if wanted else ''
    saves = [*bucket.glob(f'*/*/runs/{run}/checkpoints')]
    if saves and not any(saves[0].glob('*/commit_success.txt')):
      continue
    if any(int(step) >= int(wanted) for step in re.findall(r'"step": (\d+)', said)):
      for path in Path('/proc').glob('[0-9]*'):
        try:
          if os.getsid(int(path.name)) == os.getpid() and b'maxlm.train' in (path / 'cmdline').read_bytes():
            os.kill(int(path.name), signal.SIGSTOP)
        except OSError:
          pass


def main() -> None:
  threading.Thread(target=freezes, daemon=True).start()
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  os.environ |= {'ROOT': str(root), 'GCE_METADATA_HOST': f'127.0.0.1:{server.server_port}', 'HOME': str(machine),
                 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': '1', 'JAX_NUM_CPU_DEVICES': '1'}
  os.umask(0o022)
  (machine / 'startup').chmod(0o700)
  script = subprocess.run(['bash', str(machine / 'startup')])
  print('startup script:', script.returncode, flush=True)
  if not (root / 'started').exists():
    return
  command, environment, folder = unit()
  place = json.loads((machine / 'place.json').read_text())
  if place['processes'] > 1:
    flags = [f'--{name}={value}' for name, value in place.items()] + ['--heartbeat_seconds=10']
    Path(environment['PYTHONPATH'], 'sitecustomize.py').write_text(
      f'import sys\nif "maxlm.train" in sys.orig_argv:\n  sys.argv += {flags}\n')
  environment['JAX_COMPILATION_CACHE_DIR'] = os.environ['JAX_COMPILATION_CACHE_DIR']  # else each compiles anew, for seconds
  while True:
    main_process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, process_group=0)
    code = main_process.wait()
    print('unit ended:', code, flush=True)
    try:
      os.killpg(main_process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
    if code == 0:
      return
    time.sleep(0.2)


main()
