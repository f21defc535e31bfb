"""What the machines of a slice run: a bundle with the code and all that it needs, and the script that starts it.

A bundle is one archive, named by its SHA-256: site/ (MaxLM's wheel and its requirements at the versions of constraints.txt),
configs/, python/ (a CPython 3.12 that runs anywhere; the machines' own is older) and gcsfuse.deb. With it a machine installs
nothing from any network, and all machines run the same.
"""

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from launch import gcloud
from launch.request import Launch

PLATFORM, PYTHON = 'x86_64-manylinux_2_31', '3.12'

# A value of such a name, or of such a form, is taken for a secret: it is not to lie in requests, records and archives.
SECRET_NAMES = re.compile(r'(?i)(?<![a-z])(?:secret|passw(?:or)?d|passphrase|credentials?|api_?key|access_key|private_key|'
                          r'(?:hf|wandb|auth|access|bearer|github|api)_?token)["\']?\]?\s*[=:]\s*["\']?(?!["\']?\s*(?:None|\'\'|""))'
                          r'[^\s"\',)]{6,}')
SECRET_FORMS = re.compile(r'-----BEGIN [A-Z ]*PRIVATE KEY|(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|'
                          r'github_pat_\w{20,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|sk-[\w-]{20,}|xox[abp]-[\w-]{10,}|'
                          r'AKIA[0-9A-Z]{16})')


def refuse_secrets(text: str, what: str) -> None:
  """ValueError where a line of the text looks like a secret; the line is named, not shown."""
  for i, line in enumerate(text.splitlines(), 1):
    if SECRET_NAMES.search(line) or SECRET_FORMS.search(line):
      raise ValueError(f'{what}, line {i}, looks like a secret, and would lie where many can read it: keep it in Secret '
                       'Manager and give --secret=VARIABLE=NAME')


def script(launch: Launch, attempt: int) -> str:
  """The startup script of an attempt's machines."""
  folder = f'runs/{launch.run}'
  worker = json.dumps({'run': launch.run, 'attempt': attempt, 'workdir': folder, 'bucket': launch.bucket,
                       'train': launch.train, 'secrets': launch.secrets, 'pause_seconds': launch.pause_seconds})
  values = {'RUN': launch.run, 'ATTEMPT': attempt, 'BUCKET': launch.bucket, 'FOLDER': folder, 'BUNDLE': launch.bundle,
            'WORKER': worker}
  given = ''.join(f'{name}={shlex.quote(str(value))}\n' for name, value in values.items())
  shebang, body = (Path(__file__).parent / 'startup.sh').read_text().split('\n', 1)
  return f'{shebang}\n{given}{body}'


def bundle(root: Path, out: Path, extra: str = 'tpu', python: str = '', gcsfuse: str = '') -> Path:
  """Makes the archive of a clone, OUT/SHA256.tar.gz; returns its path. The same files give the same archive.

  extra: of pyproject.toml; '' takes MaxLM alone. python: folder of a standalone CPython 3.12, as `uv python install
  cpython-3.12-linux-x86_64-gnu` makes it. gcsfuse: its .deb. ValueError where uv is missing or fails.
  """
  if python and not (Path(python) / 'bin' / 'python3.12').exists():
    raise ValueError(f'--python={python}: it has no bin/python3.12; make one: uv python install --install-dir=DIR '
                     'cpython-3.12-linux-x86_64-gnu')
  for config in sorted((root / 'configs').rglob('*.py')):
    refuse_secrets(config.read_text(), str(config.relative_to(root)))
  with tempfile.TemporaryDirectory() as made:
    tree = Path(made) / 'tree'
    (tree / 'site').mkdir(parents=True)
    _uv('build', '--wheel', '--quiet', f'--out-dir={made}', str(root))
    wheel = next(Path(made).glob('*.whl'))
    what = [f'{wheel}[{extra}]', f'--constraints={root / "constraints.txt"}'] if extra else [str(wheel), '--no-deps']
    _uv('pip', 'install', '--quiet', f'--target={tree / "site"}', f'--python-platform={PLATFORM}',
        f'--python-version={PYTHON}', '--no-compile-bytecode', *what)
    shutil.copytree(root / 'configs', tree / 'configs', ignore=shutil.ignore_patterns('__pycache__'))
    if python:
      shutil.copytree(python, tree / 'python', symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    if gcsfuse:
      shutil.copy(gcsfuse, tree / 'gcsfuse.deb')
    (tree / 'bundle.json').write_text(json.dumps({
      'wheel': wheel.name, 'sha256': hashlib.sha256(wheel.read_bytes()).hexdigest(), 'extra': extra}) + '\n')
    packed = Path(made) / 'bundle.tar.gz'
    with (open(packed, 'wb') as raw, gzip.GzipFile('', 'wb', 1, raw, mtime=0) as zipped,
          tarfile.open(None, 'w', zipped) as tar):
      for path in sorted(tree.rglob('*')):
        tar.add(path, path.relative_to(tree), recursive=False, filter=_plain)
    out.mkdir(parents=True, exist_ok=True)
    final = out / f'{digest(packed)}.tar.gz'
    shutil.move(packed, final)
  return final


def digest(path: Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def upload(path: Path, bucket: str) -> str:
  """Puts a bundle where machines look for it, unless it is there; its SHA-256."""
  name = digest(path)
  url = f'{bucket}/bundles/{name}.tar.gz'
  if not gcloud.names(url):
    gcloud.put_file(str(path), url)
  return name


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
  member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, '', ''
  member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
  return member


def _uv(*argv: str) -> None:
  try:
    done = subprocess.run(['uv', *argv], capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != 'VIRTUAL_ENV'})
  except FileNotFoundError:
    raise ValueError('a bundle is made with uv: pip install uv') from None
  if done.returncode:
    raise ValueError(f'uv {" ".join(argv[:2])}: {done.stderr.strip()[-500:]}')
