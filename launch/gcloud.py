"""The one place that runs gcloud, and what lies in the bucket: what fails is told apart by what helps.

No secret is given to a command here: arguments are for every user of the machine to see.
"""

import json
import os
import subprocess
import tempfile
import time
from typing import Any

TRIES, PAUSE = 4, 1.0  # seconds; doubles
SECONDS = 300  # that one command may take

# The first kind one of whose words is in what gcloud says. conflict: of a generation. exists, missing: the name.
KINDS = (
  ('conflict', ('HTTPError 412', 'conditionNotMet', 'pre-conditions you specified did not hold')),
  ('exists', ('ALREADY_EXISTS', 'already exists', 'HTTPError 409')),
  ('missing', ('NOT_FOUND', 'was not found', 'not found: 404', 'HTTPError 404', 'matched no objects')),
  ('quota', ('RESOURCE_EXHAUSTED', 'QUOTA_EXCEEDED', 'Quota limit', 'quota')),
  ('capacity', ('no more capacity', 'stockout', 'ZONE_RESOURCE_POOL_EXHAUSTED')),
  ('fatal', ('PERMISSION_DENIED', 'INVALID_ARGUMENT', 'UNAUTHENTICATED', 'HTTPError 401', 'HTTPError 403',
             'unrecognized arguments', 'active account', 'Reauthentication', 'invalid choice')),
)
# 255 is ssh's own failure: the keys are still on their way to a machine that has just come up.
PASSING_CODES = (255,)
PASSING = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'INTERNAL', 'HTTPError 5', 'HTTPError 429', 'timed out', 'onnection')


class Failed(Exception):
  """kind: of KINDS, 'passing' (tried several times, and may yet work) or 'unknown'."""

  def __init__(self, kind: str, text: str):
    super().__init__(text)
    self.kind = kind


def kind_of(code: int, text: str) -> str:
  """What sort of failure gcloud's exit code and stderr tell of."""
  if code in PASSING_CODES:
    return 'passing'
  for kind, words in KINDS:
    if any(word in text for word in words):
      return kind
  return 'passing' if any(word in text for word in PASSING) else 'unknown'


def run(argv: list[str], tries: int = TRIES) -> tuple[str, str]:
  """Runs gcloud; (stdout, stderr). What passes by itself is tried again. Failed, in one line, where it does not work."""
  for attempt in range(tries):
    try:
      done = subprocess.run(['gcloud', *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
      raise ValueError('there is no gcloud: install the Google Cloud CLI, and `gcloud auth login`') from None
    except subprocess.TimeoutExpired:
      kind, text = 'passing', f'no answer in {SECONDS} s'
    else:
      if done.returncode == 0:
        return done.stdout, done.stderr
      kind, text = kind_of(done.returncode, done.stderr), _line(done.stderr) or f'exit code {done.returncode}'
    if kind != 'passing' or attempt == tries - 1:
      raise Failed(kind, f'gcloud {" ".join(argv[:4])} …: {text}')
    time.sleep(PAUSE * 2**attempt)
  raise AssertionError('a command is tried at least once')


def show(argv: list[str], tries: int = TRIES) -> int:
  """Runs gcloud for a person, on their terminal; the exit code. ssh that does not get through (255) is tried again."""
  for attempt in range(tries):
    code = subprocess.run(['gcloud', *argv]).returncode
    if code not in PASSING_CODES or attempt == tries - 1:
      return code
    time.sleep(PAUSE * 2**attempt)
  raise AssertionError('a command is tried at least once')


def read_json(argv: list[str]) -> Any:
  return json.loads(run(argv)[0] or 'null')


def _line(text: str) -> str:
  """The line of gcloud's stderr that says what is wrong."""
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return next((line for line in lines if line.startswith('ERROR')), lines[-1] if lines else '')[:500]


# -- the bucket


def get(url: str) -> tuple[str | None, int]:
  """The text of an object and its generation; (None, 0) where there is none."""
  while True:
    try:
      generation = int(read_json(['storage', 'objects', 'describe', url, '--format=json(generation)'])['generation'])
    except Failed as error:
      if error.kind != 'missing':
        raise
      return None, 0
    try:
      return run(['storage', 'cat', f'{url}#{generation}'])[0], generation
    except Failed as error:  # somebody has replaced it meanwhile
      if error.kind != 'missing':
        raise


def put(url: str, text: str, generation: int | None = None) -> int:
  """Writes an object, whose new generation it returns. Failed of kind 'conflict' where it is not of `generation` any more;
  0: where there is one at all."""
  match = [] if generation is None else [f'--if-generation-match={generation}']
  path = private_file(text)  # not stdin: of a process that is killed it would end early, and what came of it be written
  try:
    said = run(['storage', 'cp', path, url, *match, '--print-created-message'])
  finally:
    os.remove(path)
  return int(''.join(said).rpartition('#')[2].split()[0])


def put_file(path: str, url: str) -> None:
  run(['storage', 'cp', path, url, '--quiet'])


def cat(pattern: str) -> str:
  """The texts of all objects of a pattern, one after the other; '' where there is none."""
  try:
    return run(['storage', 'cat', pattern])[0]
  except Failed as error:
    if error.kind != 'missing':
      raise
    return ''


def names(pattern: str) -> list[str]:
  """The addresses of all objects of a pattern, sorted."""
  try:
    return sorted(line for line in run(['storage', 'ls', pattern])[0].split() if line.startswith('gs://'))
  except Failed as error:
    if error.kind != 'missing':
      raise
    return []


def private_file(text: str) -> str:
  """A file that only this user can read, for what gcloud takes from one; the caller removes it."""
  handle, path = tempfile.mkstemp(prefix='maxlm-')
  with os.fdopen(handle, 'w') as file:
    file.write(text)
  return path
