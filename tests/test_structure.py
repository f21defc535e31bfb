"""The house rules of docs/style.md that a machine can hold: who imports whom, which names are not used, how long a file is.

Each rule is a function from source text to complaints, so that a test below can also show it a line that breaks the rule.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ('maxlm', 'data_pipeline', 'launch', 'configs')
SOURCES = {str(path.relative_to(ROOT)): path.read_text()
           for room in ROOMS for path in sorted((ROOT / room).rglob('*.py'))}

TESTS = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / 'tests').rglob('*.py'))}

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 80

# A module of maxlm imports only from lines above its own. A package (ops, layers, models, hf, plan, scaling) is one name.
LAYERS = (
  ('sharding',),
  ('ops',),
  ('layers',),
  ('models',),
  ('muon', 'parametrisation'),
  ('losses', 'optim', 'spikes', 'data', 'schedule', 'checkpoint', 'metrics', 'flops', 'decode', 'diffusion'),
  ('trained',),
  ('lora', 'ema', 'qk_clip'),
  ('step',),
  ('continuations',),
  ('tasks',),
  ('evals',),
  ('config',),
  ('stages',),
  ('restore', 'summary', 'saving'),
  ('start',),
  ('steplog', 'dry_run', 'report'),
  ('train',),
)
# The first may import the second.
WITHIN_A_LAYER = {('metrics', 'flops'), ('optim', 'schedule'), ('diffusion', 'decode')}
# These import nothing of ours but each other; anyone may import them.
LEAVES = ('compiler', 'digest', 'flags', 'health', 'hosts', 'ledger', 'redact', 'stop', 'storage', 'stragglers',
          'typed_json', 'watchdog')
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

FORBIDDEN_IMPORTS = {
  'data_pipeline': ('jax', 'flax', 'optax', 'orbax', 'maxlm', 'configs', 'launch'),
  'maxlm': ('configs', 'launch'),
  'configs': ('launch',),
  'launch': ('jax', 'flax', 'maxlm', 'data_pipeline', 'configs'),
}
NEVER_IMPORTED = {'pickle', 'cloudpickle', 'dill', 'shelve', 'marshal', 'joblib', 'yaml', 'torch', 'transformers'}
IMPORTED_WHERE_USED = {'jinja2', 'tokamax', 'libtpu', 'ray'}  # heavy and optional: inside the function that needs them
# No file that is read may run code: neither what unpickles nor what unpacks to paths that an archive names.
RUNS_FILES = {'pickle', 'cloudpickle', 'dill', 'shelve', 'marshal', 'joblib', 'yaml', 'runpy', 'serialize_executable'}
CALLS_THAT_RUN = {'exec_module', 'spec_from_file_location', 'import_module', '__import__', 'load_module', 'read_pickle',
                  'to_pickle', 'extractall', 'unpack_archive', 'system', 'popen'}
RUNS_WHAT_IS_NAMED = {
  'maxlm/flags.py': 'the config of --config, a Python file that the user names',
  'data_pipeline/recipe.py': 'the recipe of --recipe, the same',
  'data_pipeline/sources/python_docs.py': 'modules of the standard library, by a list in it',
  'maxlm/hf/families.py': 'the modules of its own package',
}
NNX = {'Module', 'Param', 'Rngs', 'List'}
ENVIRONMENT = ('launch/', 'maxlm/plan/', 'data_pipeline/runners.py')  # may touch environment variables
AXIS_WORDS = {'fsdp', 'tensor', 'expert'}  # never another thing's name
AXIS_TAKERS = {'P', 'PartitionSpec', 'NamedSharding', 'psum', 'pmax', 'pmin', 'pmean', 'ppermute', 'psum_scatter',
               'all_gather', 'all_to_all', 'axis_index', 'axis_size', 'make_mesh', 'Mesh', 'AbstractMesh', 'shard_map'}


def parts(path: str) -> list[str]:
  """'maxlm/ops/xent.py' -> ['maxlm', 'ops', 'xent'];  'maxlm/ops/__init__.py' -> ['maxlm', 'ops']."""
  return [part for part in path.removesuffix('.py').split('/') if part != '__init__']


def imports(source: str) -> list[tuple[int, str, bool]]:
  """(line, dotted module, at the top level of the file) of each import. `from a import b` counts as a and as a.b."""
  tree = ast.parse(source)
  inside = {id(node) for function in ast.walk(tree) if isinstance(function, FUNCTION) for node in ast.walk(function)}
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name, id(node) not in inside) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: relative import; write the whole name'
      found += [(node.lineno, f'{node.module}.{alias.name}', id(node) not in inside) for alias in node.names]
  return found


def check_imports(path: str, source: str) -> list[str]:
  """Rooms do not import rooms they must not know; heavy optional packages wait until they are used."""
  room = parts(path)[0]
  complaints = []
  for line, module, top in imports(source):
    package = module.split('.')[0]
    if package in FORBIDDEN_IMPORTS[room] or package in NEVER_IMPORTED:
      complaints.append(f'{path}:{line}: {room} must not import {package}')
    if package in IMPORTED_WHERE_USED and top:
      complaints.append(f'{path}:{line}: import {package} inside the function that uses it')
  return complaints


def check_layers(path: str, source: str) -> list[str]:
  """Inside maxlm, imports point down the layers only."""
  room, *inner = parts(path)
  if room != 'maxlm' or not inner:
    return []
  me, complaints = inner[0], []
  for line, module, _ in imports(source):
    if not module.startswith('maxlm.'):
      continue
    other = module.split('.')[1]
    if other == me or other in LEAVES:
      continue
    if me in LEAVES:
      complaints.append(f'{path}:{line}: {me} is a leaf: it imports no other module of maxlm')
    elif me in LEVEL and other not in LEVEL:
      complaints.append(f'{path}:{line}: the core does not import {other}, which stands on top of it '
                        '(if it is part of the core, give it a line in LAYERS of tests/test_structure.py)')
    elif me in LEVEL and LEVEL[other] >= LEVEL[me] and (me, other) not in WITHIN_A_LAYER:
      complaints.append(f'{path}:{line}: {me} must not import {other}: it is not on a lower layer (docs/style.md)')
  return complaints


def check_axes(path: str, source: str) -> list[str]:
  """Only sharding.py names mesh axes: code says spec('BTD') and axes('V').

  'fsdp', 'tensor' and 'expert' as whole strings are always axes. 'data' and 'context' are words like any other, so they
  count only where an axis is taken: an argument of P(…), psum(…) and their like, `axis_name=`, or mesh.shape['data'].
  """
  if not path.startswith('maxlm/') or path == 'maxlm/sharding.py':
    return []
  tree, found = ast.parse(source), set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Constant) and node.value in AXIS_WORDS:
      found.add((node.lineno, node.value))
    taken = []
    if isinstance(node, ast.Call):
      name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
      taken = [*node.args, *(k.value for k in node.keywords)] if name in AXIS_TAKERS else []
      taken += [k.value for k in node.keywords if k.arg in ('axis_name', 'axis_names', 'axes')]
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == 'shape':
      taken = [node.slice]
    found |= {(n.lineno, n.value) for t in taken for n in ast.walk(t)
              if isinstance(n, ast.Constant) and n.value in ('data', 'context')}
  return [f"{path}:{line}: mesh axis '{axis}' named outside maxlm/sharding.py: use spec() or axes() with letters"
          for line, axis in sorted(found)]


def check_names(path: str, source: str) -> list[str]:
  """No nnx beyond a pytree, no side channels, no code from data, no swallowed errors, no environment variables."""
  complaints = []

  def complain(node, text):
    complaints.append(f'{path}:{node.lineno}: {text}')

  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Attribute):
      if isinstance(node.value, ast.Name) and node.value.id == 'nnx' and node.attr not in NNX:
        complain(node, f'nnx.{node.attr}: of nnx only {", ".join(sorted(NNX))} (transforms are jax.*)')
      if node.attr == 'sow':
        complain(node, 'sow: auxiliary values are return values')
      if isinstance(node.value, ast.Name) and node.value.id == 'os' and node.attr in ('environ', 'getenv', 'putenv'):
        if not path.startswith(ENVIRONMENT):
          complain(node, f'os.{node.attr}: what a run does is in its config, not in the environment')
    elif isinstance(node, ast.ImportFrom) and node.module == 'flax.nnx':
      complain(node, 'write `from flax import nnx` and nnx.Module, so that a reader and this test see what is used')
    elif isinstance(node, ast.ImportFrom) and node.module == 'os':
      complain(node, 'write `import os`, so that a reader and this test see what is used')
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ('eval', 'exec'):
      complain(node, f'{node.func.id}() runs text as code')
    elif isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
      if not (isinstance(node.value, ast.Constant) and node.value.value is False):
        complain(node.value, 'allow_pickle: a file must not be able to run code')
    elif isinstance(node, ast.ExceptHandler):
      caught = [n for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else []
      if node.type is None or {'Exception', 'BaseException'} & {n.id for n in caught}:
        complain(node, 'catches everything: name the errors that are expected')
  return complaints


def check_security(path: str, source: str) -> list[str]:
  """Nothing that is read can run code or write to a path of its choice. Of rooms and tests alike."""
  complaints = [f'{path}:{line}: {module}: a file must not be able to run code'
                for line, module, _ in imports(source) if RUNS_FILES & {*module.split('.')}]
  archives = any(module.split('.')[0] in ('tarfile', 'zipfile') for _, module, _ in imports(source))
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.keyword) and node.arg in ('shell', 'trust_remote_code', 'allow_pickle'):
      if not (isinstance(node.value, ast.Constant) and node.value.value is False):
        complaints.append(f'{path}:{node.value.lineno}: {node.arg} runs text as code')
    elif isinstance(node, ast.Call):
      is_method = isinstance(node.func, ast.Attribute)
      of, name = (node.func.value, node.func.attr) if is_method else (None, getattr(node.func, 'id', ''))
      if name in CALLS_THAT_RUN and path not in RUNS_WHAT_IS_NAMED or archives and name == 'extract':
        complaints.append(f'{path}:{node.lineno}: {name}() runs code, or writes where a file says')
      if name == 'load' and isinstance(of, ast.Name) and of.id == 'torch':
        complaints.append(f'{path}:{node.lineno}: torch.load() reads a pickle: use safetensors')
  return complaints


def check_length(path: str, source: str) -> list[str]:
  """A file past 500 lines or a function past 80 usually hides two."""
  n = len(source.splitlines())
  complaints = [f'{path}: {n} lines, at most {MAX_FILE_LINES}: it probably hides two files'] if n > MAX_FILE_LINES else []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, FUNCTION):
      n = node.end_lineno - node.lineno + 1
      if n > MAX_FUNCTION_LINES:
        complaints.append(f'{path}:{node.lineno}: {node.name} has {n} lines, at most {MAX_FUNCTION_LINES}')
  return complaints


RULES = (check_imports, check_layers, check_axes, check_names, check_length)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__.removeprefix('check_'))
def test_sources_keep_the_rule(rule):
  assert any(path.startswith('maxlm/') for path in SOURCES)
  complaints = [complaint for path, source in SOURCES.items() for complaint in rule(path, source)]
  assert not complaints, '\n' + '\n'.join(complaints)


def test_nothing_that_is_read_can_run_code():
  assert 'tests/test_structure.py' in TESTS and {*RUNS_WHAT_IS_NAMED} <= {*SOURCES}
  complaints = [complaint for path, source in (SOURCES | TESTS).items() for complaint in check_security(path, source)]
  assert not complaints, '\n' + '\n'.join(complaints)


BREAKS = [
  (check_imports, 'data_pipeline/pack.py', 'import jax.numpy as jnp'),
  (check_imports, 'data_pipeline/pack.py', 'from maxlm import sharding'),
  (check_imports, 'data_pipeline/pack.py', 'def f():\n  import orbax.checkpoint'),
  (check_imports, 'maxlm/train.py', 'from configs import quickstart'),
  (check_imports, 'maxlm/hf/llama.py', 'import torch'),
  (check_imports, 'maxlm/step.py', 'import pickle'),
  (check_imports, 'maxlm/config.py', 'import yaml'),
  (check_imports, 'maxlm/ops/attention.py', 'import tokamax'),
  (check_imports, 'launch/tpu.py', 'import maxlm.config'),
  (check_layers, 'maxlm/sharding.py', 'from maxlm.ops import einsum'),
  (check_layers, 'maxlm/ops/xent.py', 'from maxlm.layers.norm import Norm'),
  (check_layers, 'maxlm/losses.py', 'from maxlm.optim import optimizer'),
  (check_layers, 'maxlm/flops.py', 'from maxlm import metrics'),
  (check_layers, 'maxlm/step.py', 'def f():\n  from maxlm import train'),
  (check_layers, 'maxlm/train.py', 'from maxlm.plan import topology'),
  (check_layers, 'maxlm/train.py', 'import maxlm.generate'),
  (check_layers, 'maxlm/typed_json.py', 'from maxlm import config'),
  (check_axes, 'maxlm/optim.py', "y = jax.lax.psum(x, 'data')"),
  (check_axes, 'maxlm/optim.py', "s = P(('data', 'fsdp'), None)"),
  (check_axes, 'maxlm/optim.py', "s = PartitionSpec('context')"),
  (check_axes, 'maxlm/optim.py', "n = mesh.shape['data']"),
  (check_axes, 'maxlm/optim.py', "y = all_gather(x, axis_name='context')"),
  (check_axes, 'maxlm/optim.py', "axis = 'tensor'"),
  (check_names, 'maxlm/step.py', 'step = nnx.jit(step)'),
  (check_names, 'maxlm/step.py', 'from flax.nnx import Optimizer'),
  (check_names, 'maxlm/step.py', "self.sow('intermediates', 'loss', x)"),
  (check_names, 'maxlm/step.py', "x = np.load('x.npy', allow_pickle=True)"),
  (check_names, 'maxlm/step.py', "x = eval('1 + 1')"),
  (check_names, 'maxlm/step.py', "exec('x = 1')"),
  (check_names, 'maxlm/step.py', "x = os.environ['X']"),
  (check_names, 'maxlm/step.py', "x = os.getenv('X')"),
  (check_names, 'maxlm/step.py', 'from os import environ'),
  (check_names, 'maxlm/step.py', 'try:\n  f()\nexcept Exception:\n  pass'),
  (check_names, 'maxlm/step.py', 'try:\n  f()\nexcept (OSError, BaseException) as error:\n  pass'),
  (check_names, 'maxlm/step.py', 'try:\n  f()\nexcept:\n  pass'),
  *((check_security, 'tests/rows.py', source) for source in (
    'def f():\n  import pickle', 'from jax.experimental import serialize_executable', 'import yaml', 'import runpy',
    'subprocess.run(command, shell=True)', 'subprocess.run(command, shell=shell)', "os.system('ls')", "os.popen('ls')",
    'AutoModel.from_pretrained(x, trust_remote_code=True)', 'np.load(x, allow_pickle=True)', 'torch.load(x)',
    'torch.load(x, weights_only=True)', 'pd.read_pickle(x)', "__import__('x')", 'importlib.import_module(x)',
    'import tarfile\ntarfile.open(x).extractall(y)', 'import zipfile\nzipfile.ZipFile(x).extract(y)',
    'shutil.unpack_archive(x)', 'spec.loader.exec_module(module)')),
  (check_length, 'maxlm/step.py', 'x = 1\n' * (MAX_FILE_LINES + 1)),
  (check_length, 'maxlm/step.py', 'def f():\n' + '  x = 1\n' * MAX_FUNCTION_LINES),
]


@pytest.mark.parametrize('rule, path, source', BREAKS, ids=lambda value: getattr(value, '__name__', None))
def test_rule_finds_what_breaks_it(rule, path, source):
  assert rule(path, source)


KEEPS = [
  (check_imports, 'maxlm/ops/attention.py', 'def kernel():\n  import tokamax'),
  (check_layers, 'maxlm/layers/attention.py', 'from maxlm.layers.norm import Norm\nfrom maxlm.ops import xent'),
  (check_layers, 'maxlm/metrics.py', 'from maxlm import flops, typed_json'),
  (check_layers, 'maxlm/generate.py', 'from maxlm import decode, train\nfrom maxlm.plan import topology'),
  (check_axes, 'maxlm/train.py', "log['data'] = config.data; name = checkpoint_name(x, 'context')"),
  (check_axes, 'maxlm/train.py', "def f():\n  'Split over fsdp.'\n  return spec('BTD'), f'--config.mesh.tensor'"),
  (check_names, 'maxlm/step.py', "class A(nnx.Module):\n  x = np.load('x.npy', allow_pickle=False); y = evals.eval(x)"),
  (check_names, 'launch/tpu.py', "x = os.environ['HOME']"),
  (check_names, 'maxlm/step.py', 'try:\n  f()\nexcept (OSError, ValueError) as error:\n  raise'),
  (check_security, 'maxlm/step.py', 'x = np.load(y, allow_pickle=False); z = re.search(x).extract(y); json.load(f)'),
  (check_security, 'data_pipeline/x.py', 'import tarfile\nfor member in tarfile.open(x):\n  subprocess.run(y, shell=False)'),
  (check_security, 'maxlm/flags.py', 'spec.loader.exec_module(module)'),
]


@pytest.mark.parametrize('rule, path, source', KEEPS, ids=lambda value: getattr(value, '__name__', None))
def test_rule_lets_ordinary_code_be(rule, path, source):
  assert rule(path, source) == []


@pytest.mark.parametrize('package', ['maxlm', 'data_pipeline', 'launch'])
def test_import_is_empty_and_light(package):
  heavy = ('jax', 'numpy', 'flax', 'tokamax', 'ray', 'torch', 'tensorflow')
  code = f'import sys, {package}; print(*(name for name in {heavy} if name in sys.modules))'
  loaded = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
  assert loaded.stdout.strip() == ''


def test_tree_does_not_name_the_machine_it_was_written_on():
  """A path of one machine, a registry's address or a lock file that records one works for nobody else."""
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
  files = [name for name in listed.stdout.splitlines() if (ROOT / name).suffix in ('.py', '.md', '.toml', '.txt', '.sh', '')]
  pattern = re.compile(r'/wor[k]/|/roo[t]/|/hom[e]/\w|pypi\.or[g]|pythonhoste[d]')
  assert [name for name in files if (ROOT / name).is_file() and pattern.search((ROOT / name).read_text())] == []
  assert 'uv.lock' not in files
