"""What a user types: values of the right type arrive, and anything else is one line that says what to type instead."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from maxlm import flags

ROOT = Path(__file__).parents[1]

WORKDIR = flags.DEFINE_string('workdir_of_test_flags', 'runs/x', 'where the run is kept')
STEPS = flags.DEFINE_integer('steps_of_test_flags', None, 'how many steps')

CONFIG = '''
import dataclasses
from typing import Literal

@dataclasses.dataclass(kw_only=True, slots=True)
class Attention:
  """n_heads: query heads. window: positions a token sees, itself included
  (None: all)."""
  n_heads: int = 4
  window: int | None = None

@dataclasses.dataclass(kw_only=True, slots=True)
class Layer:
  attention: Attention
  kind: Literal['gated', 'plain'] = 'gated'

@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
  d_model: int = 64
  n_layers: int = 4
  pattern: tuple[Layer, ...] = ()

@dataclasses.dataclass(kw_only=True, slots=True)
class Optim:
  peak_lr: float = 3e-4
  betas: tuple[float, float] = (0.9, 0.95)

@dataclasses.dataclass(kw_only=True, slots=True)
class Experiment:
  name: str
  model: Model
  optim: Optim
  mixture: dict[str, int]
  tokens: int = 1000
  tied: bool = False

def get_config(arg=''):
  if arg == 'refused':
    raise ValueError('there is no variant refused')
  layer = Layer(attention=Attention())
  return Experiment(name='x' + arg, model=Model(pattern=(layer, layer)), optim=Optim(), mixture={'web': 3})
'''


@pytest.fixture
def file(tmp_path) -> str:
  (tmp_path / 'x.py').write_text(CONFIG)
  return str(tmp_path / 'x.py')


def load(file, *args):
  name, overrides, rest = flags.split_args(args, file)
  assert not rest
  return flags.load_config(name, overrides)


def value(config, key):
  return dict((known, found) for known, _, found, _ in flags.walk(config))[key]


@pytest.mark.parametrize('arg, key, expected', [
  ('--config.model.n_layers=2', 'model.n_layers', 2),
  ('--config.tokens=2e9', 'tokens', 2_000_000_000),
  ('--config.optim.peak_lr=1', 'optim.peak_lr', 1.0),
  ('--config.optim.betas=(0.5, 1)', 'optim.betas', (0.5, 1.0)),
  ('--config.optim.betas=0.5,1', 'optim.betas', (0.5, 1.0)),
  ('--config.model.pattern[1].attention.window=128', 'model.pattern[1].attention.window', 128),
  ('--config.model.pattern[0].kind=plain', 'model.pattern[0].kind', 'plain'),
  ('--config.name=123', 'name', '123'),
  ('--config.name=none', 'name', 'none'),
  ('--config.name=', 'name', ''),
  ('--config.name=a=b', 'name', 'a=b'),
  ('--config.tied', 'tied', True),
  ('--config.tied=True', 'tied', True),
  ('--config.tied=false', 'tied', False),
  ('--config.mixture.web=4', 'mixture', {'web': 4}),
  ("--config.mixture={'web': 1, 'books': 2}", 'mixture', {'web': 1, 'books': 2}),
  ('-config.model.n_layers=2', 'model.n_layers', 2),
])
def test_a_value_arrives_with_the_type_of_its_field(file, arg, key, expected):
  found = value(load(file, arg), key)
  assert found == expected and type(found) is type(expected)


def test_none_unsets_what_may_be_none(file):
  args = ['--config.model.pattern[0].attention.window=128', '--config.model.pattern[0].attention.window=none']
  assert value(load(file, args[0]), 'model.pattern[0].attention.window') == 128
  assert value(load(file, *args), 'model.pattern[0].attention.window') is None  # the last one counts


def test_a_value_may_be_the_next_argument(file):
  config = load('nowhere.py', '--config', file + ':y', '--config.model.n_layers', '2', '--config.optim.peak_lr', '-1')
  assert (config.name, config.model.n_layers, config.optim.peak_lr) == ('xy', 2, -1.0)


def test_an_override_reaches_one_layer_though_the_file_repeats_an_object(file):
  config = load(file, '--config.model.pattern[0].attention.window=128')
  assert [layer.attention.window for layer in config.model.pattern] == [128, None]


def test_each_load_is_a_config_of_its_own(file, tmp_path):
  load(file).mixture['web'] = 99
  assert load(file).mixture == {'web': 3}
  (tmp_path / 'y').mkdir()
  (tmp_path / 'y' / 'x.py').write_text('x = 1')
  with pytest.raises(ValueError, match=r'y/x.py: has no get_config'):  # and not that of the other x.py
    load(str(tmp_path / 'y' / 'x.py'))


def main(config):
  assert dataclasses.is_dataclass(config)
  if WORKDIR.value == 'refused':
    raise ValueError('the mesh\nis wrong')
  if WORKDIR.value == 'bug':
    int('two')
  if WORKDIR.value == 'missing':
    open('/no/such/file')
  return 75


@pytest.fixture
def run(file, monkeypatch, capsys):
  """run(*args) -> (exit code, stdout, stderr) of the command `main` above."""

  def call(*args):
    monkeypatch.setattr(sys, 'argv', ['command', *args])
    monkeypatch.setattr(flags, 'OURS', (*flags.OURS, __name__.split('.')[0]))
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
      absl_flags.FLAGS.unparse_flags()
      flags.run(main, default_config=file)
    return stopped.value.code, *capsys.readouterr()

  return call


def test_main_gets_the_config_and_its_result_is_the_exit_code(run):
  assert run() == (75, '', '')
  assert run('--workdir_of_test_flags=y', '--config.tied', '--steps_of_test_flags', '3') == (75, '', '')


@pytest.mark.parametrize('arg, line', [
  ('--config.model.n_layer=2', '--config.model.n_layer: no such key; did you mean --config.model.n_layers?'),
  ('--config.n_layers=2', '--config.n_layers: no such key; did you mean --config.model.n_layers?'),
  ('--config.modl.n_layers=2', '--config.modl.n_layers: no such key; did you mean --config.model.n_layers?'),
  ('--config.optim.lr=2', '--config.optim.lr: no such key; did you mean --config.optim.peak_lr?'),
  ('--config.window=2', '--config.window: no such key; did you mean --config.model.pattern[0].attention.window?'),
  ('--config.model.pattern[1].attention.windw=2',
   '--config.model.pattern[1].attention.windw: no such key; did you mean --config.model.pattern[1].attention.window?'),
  ('--config.model.pattern[2].kind=plain',
   '--config.model.pattern[2].kind: no such key; did you mean --config.model.pattern[0].kind?'),
  ('--config.name.x=2', '--config.name.x: no such key; did you mean --config.name?'),
  ('--config.qqqq=2', '--config.qqqq: no such key; --help lists them'),
  ('--config.model.n_layers=two', '--config.model.n_layers=two: expected int'),
  ('--config.model.n_layers=2.5', '--config.model.n_layers=2.5: expected int'),
  ('--config.model.n_layers', '--config.model.n_layers=true: expected int'),
  ('--config.model.n_layers=none', '--config.model.n_layers=none: expected int'),
  ('--config.optim.peak_lr=nan', '--config.optim.peak_lr=nan: expected float'),
  ('--config.optim.betas=0.9', '--config.optim.betas=0.9: expected tuple[float, float]'),
  ('--config.tied=maybe', '--config.tied=maybe: expected bool'),
  ('--config.model.pattern[0].kind=gate', "--config.model.pattern[0].kind=gate: expected 'gated' or 'plain'"),
  ('--config.model.pattern[0].attention.window=wide',
   '--config.model.pattern[0].attention.window=wide: expected int or None'),
  ('--config=nowhere.py', "no config file 'nowhere.py'"),
  ('--config=', '--config needs a file: --config=configs/x.py'),
  ('--config', '--config needs a file: --config=configs/x.py'),
  ('--workdirr_of_test_flags=x', '--workdirr_of_test_flags: no such flag; did you mean --workdir_of_test_flags?'),
  ('--model.n_layers=2', '--model.n_layers: no such flag; did you mean --config.model.n_layers?'),
  ('--qqqq=2', '--qqqq: no such flag; --help lists them'),
  ('configs/x.py', "unexpected argument 'configs/x.py'; did you mean --config=configs/x.py?"),
  ('train', "unexpected argument 'train'"),
  ('--workdir_of_test_flags=refused', 'the mesh is wrong'),
  ('--workdir_of_test_flags=missing', "[Errno 2] No such file or directory: '/no/such/file'"),
])
def test_what_a_user_can_mend_is_one_line(run, arg, line):
  assert run(arg) == (2, '', f'error: {line}\n')


def test_an_ill_typed_plain_flag_is_one_line_that_names_it(run):
  code, out, err = run('--steps_of_test_flags=two')
  assert (code, out) == (2, '') and err.startswith('error: flag --steps_of_test_flags=two:') and err.count('\n') == 1


@pytest.mark.parametrize('text, line', [
  ('x = 1', 'has no get_config(arg)'),
  ('def get_config(): return 1', 'get_config() must return a dataclass, not int'),
  (CONFIG.replace('n_layers: int = 4', "n_layers: int = '4'"), "model.n_layers: expected int, got '4'"),
])
def test_a_config_file_that_is_wrong_is_one_line(run, file, text, line):
  Path(file).write_text(text)
  code, out, err = run()
  assert (code, out) == (2, '') and line in err and err.count('\n') == 1


def test_an_argument_of_a_config_that_is_refused_or_not_taken_is_one_line(run, file):
  assert run(f'--config={file}:refused') == (2, '', 'error: there is no variant refused\n')
  Path(file).write_text('def get_config(): return 1')
  assert run(f'--config={file}:x') == (2, '', f"error: {file}: its get_config() takes no argument, got 'x'\n")


def test_a_bug_keeps_its_traceback(run):
  with pytest.raises(ValueError, match='invalid literal'):  # of a library, or of Python: not told by our own code
    run('--workdir_of_test_flags=bug')


def test_traceback_shows_where_an_error_comes_from(run):
  with pytest.raises(ValueError, match='the mesh'):
    run('--workdir_of_test_flags=refused', '--traceback')


def test_help_shows_the_commands_own_flags_and_every_key_with_its_value(run, file):
  absl_flags.DEFINE_string('flag_of_a_library', None, 'none of ours', module_name='library')
  overrides = ['--config.model.n_layers=2', '--config.model.pattern[1].kind=plain']
  code, out, err = run('--help', f'--config={file}:y', *overrides)
  assert (code, err) == (0, '')
  assert out.startswith(__doc__.split('\n')[0])
  lines = [' '.join(line.split()) for line in out.splitlines()]
  assert '--workdir_of_test_flags=runs/x where the run is kept' in lines
  assert '--steps_of_test_flags how many steps' in lines
  assert '--config.name=xy (str)' in lines
  assert '--config.model.n_layers=2 (int)' in lines
  assert '--config.model.pattern[0].attention.n_heads=4 (int) query heads.' in lines
  assert "--config.model.pattern[1].kind=plain ('gated' or 'plain')" in lines
  assert not any('pattern[1].attention' in line for line in lines)  # as pattern[0]
  assert '(int or None) positions a token sees, itself included (None: all).' in ' '.join(lines)
  assert not any('flag_of_a_library' in line for line in lines)
  assert max(map(len, out.splitlines())) <= 120


def test_help_of_a_command_without_config_shows_its_flags(run, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['command', '--help'])
  with pytest.raises(SystemExit) as stopped:
    flags.run(main)
  out = capsys.readouterr().out
  assert stopped.value.code == 0 and '--workdir_of_test_flags' in out and '--config' not in out


def test_commands_may_share_names_of_flags_and_a_process():
  both = absl_flags.FlagValues()
  for command in ('evaluate', 'generate'):
    flags.DEFINE_string('checkpoint', command, '', flag_values=both, module_name=command)
  assert both.find_module_defining_flag('checkpoint')


def test_a_typo_is_told_fast_and_without_importing_jax(tmp_path):
  command = tmp_path / 'command.py'
  command.write_text('"""A command."""\nfrom maxlm import flags\nWORKDIR = flags.DEFINE_string("workdir", "", "")\n'
                     'def main(config): pass\nflags.run(main, default_config="x.py")\n')
  started = time.monotonic()
  stopped = subprocess.run([sys.executable, '-X', 'importtime', command, '--workdirr=x'], cwd=ROOT,
                           env={'PYTHONPATH': str(ROOT)}, capture_output=True, text=True)
  assert time.monotonic() - started < 5  # 0.3 s, on a machine with nothing else to do
  *imports, last = stopped.stderr.splitlines()
  assert (stopped.returncode, last) == (2, 'error: --workdirr: no such flag; did you mean --workdir?')
  assert not {'jax', 'numpy', 'orbax'} & {line.split('|')[-1].strip() for line in imports}


def test_the_training_command_suggests_the_key_that_was_meant():
  command = [sys.executable, '-m', 'maxlm.train', '--config=configs/llama3_8b.py', '--config.model.n_layer=2']
  stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert (stopped.returncode, stopped.stdout) == (2, '')
  assert stopped.stderr == 'error: --config.model.n_layer: no such key; did you mean --config.model.n_layers?\n'
