"""Secrets stay where they are, and what is read beside a checkpoint is data: no file of it is run. (What no source may
contain is in test_structure.py, hostile safetensors files in test_hf_files.py, templates in test_chat.py.)"""

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm import typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.config import Experiment
from maxlm.models.decoder import Decoder
from maxlm.redact import GONE, is_secret, redact, redact_json
from maxlm.restore import lora_of, model_of
from tests.make_corpus import make_corpus

ROOT = Path(__file__).parents[1]

# Put together here, so that no scanner takes this file for a leak.
DIGITS = 'a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8'
HEX = '0123456789abcdef' * 2 + '01234567'
FORMS = {
  'Hugging Face': 'hf' + '_' + DIGITS, 'GitHub': 'ghp' + '_' + DIGITS, 'GitHub, of an app': 'ghs' + '_' + DIGITS,
  'GitHub, fine-grained': 'github' + '_pat_' + '11ABC_' + DIGITS, 'Google': 'AI' + 'za' + DIGITS[:35],
  'Google, OAuth': 'ya' + '29.' + DIGITS, 'OpenAI': 'sk' + '-proj-' + DIGITS, 'Anthropic': 'sk' + '-ant-api03-' + DIGITS,
  'Slack': 'xox' + 'b-123456789012-' + DIGITS, 'Amazon': 'AK' + 'IA' + 'ABCDEFGH12345678',
  'wandb': 'wandb' + '_v1_' + DIGITS,
  'a JSON web token': 'ey' + 'JhbGciOiJIUzI1NiJ9.' + 'ey' + 'JzdWIiOiIxMjM0NTY3ODkwIn0.' + DIGITS,
  'a private key': '-----BEGIN ' + 'RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n0123\n-----END RSA ' + 'PRIVATE KEY-----',
  'half a private key': '-----BEGIN ' + 'PRIVATE KEY-----\nMIIEpAIBAAKCAQEA 0123'}
CANARY = 'can4ry+of/a=test'  # of no form: only its name tells
NAMED = [
  'HF_TOKEN={}', 'WANDB_API_KEY={}', 'password={}', "password='{}'", 'db.password = {}', '--config.hf_token={}',
  '--password {} --x', '--api-key={}', "{{'apiKey': '{}', 'x': 1}}", '{{"client_secret": "{}"}}',
  'AWS_SECRET_ACCESS_KEY=>{}', 'accessToken={}', "environ['GITHUB_TOKEN'] = '{}'", 'https://host/x?a=1&token={}&b=2', 'https://user:{}@host/x',
  'gs:/a:{}@bucket',
  'gs://:{}@bucket', 'postgres://a:{}@h/b', '--config.data.corpus=gs://b?password={}', 'Credentials(secret={!r}, n=1)',
  'my_credential={}', 'x: passphrase="{}"', "curl -H 'Authorization: Bearer {}'", 'PRIVATE_KEY={}']
ORDINARY = [
  'tokens=2e9', '--config.tokens=2e9', 'tokenizer.json', 'tokenizer=gpt2', 'tokens_per_second=12345.6', 'tokens/stories=17',
  'VERIFY_CREDENTIALS=true', '`--verify_credentials=False`, or', 'token=None',
  'token=5', "bos_token='<s>'", 'eos_token=</s>', '"pad_token": "<pad>"', 'token_id=7', 'loss per token=0.31',
  'unknown token: foo', 'n_token=x', 'sort_key=name', 'key=value', 'PRNGKey', 'primary_keys=a', 'sha256 ' + HEX + HEX[:24],
  'commit ' + HEX, 'run 4f2a' + HEX[:28], 'https://host:8080/path@5', 'user@host:/path', 'runs/a@100',
  'a task-of-some-length-that-has-1-digit', 'risk-0123456789012345678901', 'hf_models_of_some_length_here',
  'sk-learn-is-a-library-for-learning', 'the secret is out', 'no password is needed: go on', 'Bearer of news', 'AKIA',
  'wandb 0.17.1', 'secretary=Ann', 'author=Ann', 'stacks.0.mixer.w_q_DNH', '{"type": "MlaSpec", "window": null}',
]


# -- what is a secret


@pytest.mark.parametrize('secret', FORMS.values(), ids=FORMS)
def test_a_key_of_a_known_form_is_redacted_wherever_it_stands(secret):
  for text in ('{}', 'cannot open {}: no', 'x={}', '"{}"', 'https://{}@host/', '({},', 'a/{}/b'):
    got = redact(text.format(secret))
    assert GONE in got and not any(line in got for line in secret.split('\n')[1:] or [secret]), got
    assert redact(got) == got
  assert redact_json({'a': [{'b': f'see {secret}'}]}) == {'a': [{'b': f'see {GONE}'}]}


@pytest.mark.parametrize('text', NAMED)
def test_a_value_whose_name_says_that_it_is_secret_is_redacted(text):
  canary = 'can4ry-of-a-test' if ':/' in text else CANARY  # as it must be written there
  got = redact(f'before {text.format(canary)} after')
  assert GONE in got and 'can4ry' not in got and 'test' not in got
  assert got.startswith('before ') and got.endswith(' after') and redact(got) == got


def test_a_secret_with_quotes_and_spaces_in_it_goes_as_a_whole():
  plain = {'password': 'one "two" \\ three\nfour', 'steps': 3}
  for text in (json.dumps(plain), json.dumps(plain, indent=2), repr(plain)):
    assert not [word for word in ('one', 'two', 'three', 'four') if word in redact(text)]
  assert json.loads(redact(json.dumps(plain))) == {'password': GONE, 'steps': 3}


def test_the_key_of_wandb_is_known_by_what_stands_before_it():
  assert redact(f'wandb login {HEX}') == f'wandb login {GONE}'
  assert redact(f'api.wandb.ai login me {HEX}\ncommit {HEX}') == f'api.wandb.ai login me {GONE}\ncommit {HEX}'


@pytest.mark.parametrize('text', ORDINARY)
def test_ordinary_words_stay(text):
  assert redact(text) == text and redact_json({'a': text}) == {'a': text}


def test_the_documentation_and_every_config_stay():
  texts = '*.md', 'docs/*.md', 'configs/**/*.py', 'tests/golden/**/*.json'
  for path in [path for pattern in texts for path in ROOT.glob(pattern)]:
    text = path.read_text()
    assert redact(text) == text, path
  plain = typed_json.encode(tiny.get_config(), Experiment)
  assert redact_json(plain) == plain


def test_a_json_tree_keeps_its_keys_and_numbers():
  plain = {'hf_token': 'x', 'tokens': 5, 'secrets': {'a': 'x', 'b': ['x', 3, None]}, 'password': '', 'bos_token': '1'}
  assert redact_json(plain) == plain | {'hf_token': GONE, 'secrets': {'a': GONE, 'b': [GONE, 3, None]}}
  assert is_secret('hfToken') and is_secret('X-Api-Key') and not is_secret('max_tokens') and not is_secret('key')


@pytest.mark.parametrize('text', [
  'password=' * 50_000, 'a' * 500_000, '-----BEGIN ' + 'PRIVATE KEY-----' * 20_000, '"' * 300_000, 'token="' * 50_000,
  '://' * 100_000, '://a:' * 60_000, 'wandb' * 60_000, 'eyJ' * 100_000, "'password': '" + '\\' * 300_000,
  '--password ' * 30_000, 'sk-' * 100_000, 'eyJ-' * 100_000, 'ya29.' * 60_000, 'bearer ' * 60_000],
  ids=lambda text: text[:12])
def test_no_text_takes_long(text):
  started = time.monotonic()
  redact(text)
  assert time.monotonic() - started < 5  # 0.1 s


# -- what a run says and writes


def run(module: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', f'maxlm.{module}', *flags], cwd=cwd, capture_output=True, text=True,
                        timeout=300, env=os.environ | {'PYTHONPATH': str(ROOT)} | environment)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  return make_corpus(tmp_path_factory.mktemp('security') / 'corpus')


@pytest.fixture(scope='module')
def told(corpus) -> tuple[Path, str]:
  """A run of two steps that was told secrets: (its workdir, all that it said)."""
  workdir = corpus.parent / 'told'
  done = run('train', '--config=configs/tiny.py', f'--config.data.corpus={corpus}', f'--workdir={workdir}',
             '--config.tokens=1024', '--config.optim.warmup_tokens=0', '--config.model.n_layers=1',
             '--config.name=run of ' + FORMS['Hugging Face'],
             HF_TOKEN=CANARY, WANDB_API_KEY=HEX, MY_PASSWORD='can4ry of the environment')
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout + done.stderr


def leaks(workdir: Path, secret: str) -> list[str]:
  """The files of a workdir with the secret in them."""
  files = [path for path in workdir.rglob('*') if path.is_file()]
  assert {'config.json', 'metrics.jsonl', 'commit_success.txt'} <= {path.name for path in files}
  assert all(any(part in path.parts for path in files) for part in ('tensorboard', 'meta'))
  return [str(path.relative_to(workdir)) for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize('secret', [CANARY, HEX, 'can4ry of the environment'])
def test_what_the_environment_holds_is_neither_said_nor_written(told, secret):
  workdir, said = told
  assert secret not in said and leaks(workdir, secret) == []


def test_a_secret_in_a_config_value_is_neither_said_nor_written(told):
  workdir, said = told
  assert FORMS['Hugging Face'] not in said and leaks(workdir, FORMS['Hugging Face']) == []
  assert json.loads((workdir / 'config.json').read_text())['name'] == f'run of {GONE}'


def test_an_error_of_one_line_leaves_the_secret_out(tmp_path):
  secret = FORMS['GitHub']
  for flags, kept in ((['--config.data.corpus=gs://user:can4ry@bucket/corpus'], 'bucket/corpus'),
                      ([f'--config.seed={secret}'], 'config.seed'), ([f'--config.data.corpus={secret}'], 'corpus'),
                      (['--config=password=can4ry.py'], 'no config file')):
    done = run('train', '--config=configs/tiny.py', f'--workdir={tmp_path}/run', *flags)
    assert done.returncode == 2 and done.stdout == '' and kept in done.stderr, done.stderr
    assert 'can4ry' not in done.stderr and secret not in done.stderr and GONE in done.stderr


@pytest.mark.parametrize('flags', [[], ['--traceback']])
def test_a_traceback_leaves_the_secret_out_and_keeps_the_rest(tmp_path, flags):
  config = tmp_path / 'broken.py'
  config.write_text(f'def get_config():\n  open_bucket("{FORMS["Google"]}")\n\n\ndef open_bucket(key):\n'
                    '  raise RuntimeError(f"refused: password={"can4ry"} for {key}")\n')
  done = run('train', f'--config={config}', *flags)
  assert done.returncode == 1 and 'Traceback (most recent call last)' in done.stderr
  assert f'File "{config}", line 6, in open_bucket' in done.stderr
  assert done.stderr.splitlines()[-1] == f'RuntimeError: refused: password={GONE} for {GONE}'
  assert FORMS['Google'] not in done.stderr and 'can4ry' not in done.stderr.splitlines()[-1]


# -- what is read beside a checkpoint

# Tells of each file of the workdir that is opened, and of each name that a pickle looks up, by whatever library.
AUDIT = '''import sys
def hook(event, args):
  if event == 'pickle.find_class' or event in ('open', 'exec') and {workdir!r} in str(args[0]):
    runs = event != 'open' or str(args[0]).endswith(('.py', '.pyc', '.pth', '.so', '.pkl', '.bin'))
    sys.stderr.write(f'AUDIT {{"RUN" if runs else "read"}} {{event}} {{args}}\\n')
sys.addaudithook(hook)
'''


@pytest.fixture(scope='module')
def trapped(corpus, mesh_of) -> Path:
  """The workdir of a checkpoint; files beside and in it, under names that loaders look for, tell when they are run."""
  workdir = corpus.parent / 'trapped'
  config = tiny.get_config()
  config.data.corpus, config.model.n_layers, config.tokens = str(corpus), 1, 1024
  checkpoints = Checkpoints(workdir / 'checkpoints')
  with mesh_of(1):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    checkpoints.save(1, params=params, opt={}, meta={'step': 1, 'cursor': 8, 'lineage': lineage(),
                                                     'config': json.loads(typed_json.dumps(config))})
    checkpoints.close()
  (workdir / 'tokenizer.json').write_bytes((corpus / 'tokenizer.json').read_bytes())
  trap = f'open({str(workdir.with_name("sprung"))!r}, "w").close()\n'
  for folder in (workdir, workdir / 'checkpoints', workdir / 'checkpoints' / '1'):
    for name in ('config', 'sitecustomize', 'conftest', '__init__', 'tokenizer', 'modeling', 'json'):
      (folder / f'{name}.py').write_text(trap + 'def get_config(arg=""): pass\n')
    for name in ('config.pkl', 'pytorch_model.bin', 'tokenizer.pkl'):
      (folder / name).write_bytes(b'cbuiltins\nexec\n(V' + trap.encode() + b'tR.')  # a pickle that runs it
  hostile = {'auto_map': {'AutoConfig': 'modeling.Config'}, 'type': 'os.system', 'model': 7}
  (workdir / 'config.json').write_text(json.dumps(hostile))
  return workdir


@pytest.mark.parametrize('command', ['generate', 'score', 'evaluate', 'train'])
def test_no_file_beside_a_checkpoint_is_run(trapped, tmp_path, command):
  np.save(tmp_path / 'in.npy', np.arange(20)[None])
  flags = {'generate': [f'--checkpoint={trapped}', '--prompt=The', '--max_tokens=2'],
           'score': [f'--checkpoint={trapped}', f'--tokens={tmp_path}/in.npy', f'--out={tmp_path}/out.npz'],
           'evaluate': [f'--checkpoint={trapped}@1', '--rows=2'],
           'train': [f'--config={ROOT}/configs/tiny.py', f'--config.init_from={trapped}', f'--workdir={tmp_path}/run',
                     f'--config.data.corpus={trapped.parent}/corpus', '--config.model.n_layers=1',
                     '--config.tokens=512', '--config.optim.warmup_tokens=0']}[command]
  (tmp_path / 'sitecustomize.py').write_text(AUDIT.format(workdir=str(trapped)))
  done = run(command, *flags, cwd=tmp_path, PYTHONPATH=f'{tmp_path}:{ROOT}')
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('AUDIT')]
  assert any(line.startswith('AUDIT read') for line in lines)  # the hook is at work
  assert [line for line in lines if line.startswith('AUDIT RUN')] == []
  assert not trapped.with_name('sprung').exists()


UNEXPECTED = [None, True, -1, 10**400, 1e308, '', 'os.system', '__import__("os").system("x")', [], [[]], {}, '../../x', '\0',
              {'type': 'os.system'}, {'type': ['x']}, {'__class__': 'os', 'type': {}}]


def test_unexpected_types_in_a_saved_config_are_refused_by_name_or_fit():
  """Each leaf of it replaced by each of these: an Experiment of the annotated types, or a ValueError of one line."""
  plain = typed_json.encode(tiny.get_config(), Experiment)
  refused = accepted = 0

  def spoilt(tree, path=()):
    for key in (tree if isinstance(tree, dict) else range(len(tree))):
      for value in UNEXPECTED:
        changed = copy.deepcopy(plain)
        inner = changed
        for step in path:
          inner = inner[step]
        inner[key] = value
        yield key, changed
      if isinstance(tree[key], (dict, list)):
        yield from spoilt(tree[key], (*path, key))

  for key, changed in spoilt(plain):
    try:
      again = typed_json.encode(typed_json.decode(changed, Experiment), Experiment)
      assert typed_json.decode(again, Experiment) is not None
      accepted += 1
    except ValueError as error:
      assert '\n' not in str(error) and (str(key) in str(error) or 'type' in str(error)), (key, error)
      refused += 1
  assert refused > 500 and accepted > 100


@pytest.mark.parametrize('meta', [{'config': {'model': 'os.system'}}, {'model': {'type': 'subprocess.Popen', 'args': ['x']}},
                                  {'model': []}, {'config': {'model': None, 'lora': 'x'}}, {'model': {'pattern': {'a': 1}}}])
def test_a_hostile_meta_names_no_class(meta):
  with pytest.raises(ValueError, match='model|lora'):
    model_of(meta), lora_of(meta)
