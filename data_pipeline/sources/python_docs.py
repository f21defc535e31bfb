"""Sources that every machine has: the documentation that ships inside Python. No network, no package manager."""

import ast
import dataclasses
import pathlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator

from data_pipeline.recipe import Input, Raw
from data_pipeline.sources.text import html_to_text

_STDLIB = pathlib.Path(sysconfig.get_path('stdlib'))
_TESTS = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}


def library_files(*suffixes: str) -> list[pathlib.Path]:
  """Files of the standard library with these suffixes, without its tests, in a fixed order."""
  return [path for path in sorted(_STDLIB.rglob('*'))
          if path.suffix in suffixes and path.is_file() and not _TESTS.intersection(path.relative_to(_STDLIB).parts)]


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class PythonReference:
  """The language reference that `help()` shows, what the built-in types and functions say of themselves, and text files."""

  name: str = 'python-reference'

  def state(self) -> str:
    return platform.python_version()

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return [Input(paths=(), lineage=f'Python {platform.python_version()}')]

  def read(self, unit: Input) -> Iterator[Raw]:
    from pydoc_data.topics import topics  # 0.5 MB of text, wanted only here
    for topic, text in sorted(topics.items()):
      yield Raw(f'python:topic/{topic}', text)
    for module_name in sorted(set(sys.builtin_module_names) - {'__main__'}):
      yield Raw(f'python:builtin/{module_name}', '\n\n'.join(_describe_builtin(module_name)))
    for path in library_files('.txt', '.rst', '.html'):
      data = path.read_bytes()
      text = html_to_text(data) if path.suffix == '.html' else data.decode('utf-8', errors='replace')
      yield Raw(f'python:file/{path.relative_to(_STDLIB).as_posix()}', text)


def _describe_builtin(module_name: str) -> Iterator[str]:
  """Docstrings of a module compiled into the interpreter, of its functions, and of its classes and their methods."""
  module = __import__(module_name)
  yield f'{module_name}\n\n{module.__doc__ or ""}'
  for name, member in sorted(vars(module).items()):
    if callable(member) and isinstance(member.__doc__, str):
      yield f'{module_name}.{name}\n{member.__doc__}'
      if isinstance(member, type):
        methods = sorted((key, value.__doc__) for key, value in vars(member).items() if callable(value))
        yield from (f'{name}.{key}\n{text}' for key, text in methods if isinstance(text, str) and not key.startswith('__'))


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class PythonLibrary:
  """The docstrings of the standard library with the signatures that they describe: a document a module.

  Read from the source, not from imported modules: importing runs code, and some modules are not for this machine.
  """

  name: str = 'python-library'

  def state(self) -> str:
    return platform.python_version()

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return [Input(paths=tuple(str(path) for path in library_files('.py')), lineage=f'Python {platform.python_version()}')]

  def read(self, unit: Input) -> Iterator[Raw]:
    for name in unit.paths:
      path = pathlib.Path(name)
      if path.parent.name == 'pydoc_data':
        continue  # PythonReference has it
      try:
        with warnings.catch_warnings(action='ignore', category=SyntaxWarning):
          tree = ast.parse(path.read_bytes())
      except SyntaxError:
        continue  # the library ships a few files that are wrong on purpose
      module = '.'.join(path.relative_to(_STDLIB).with_suffix('').parts).removesuffix('.__init__')
      text = f'module {module}\n\n' + '\n\n'.join(_docstrings(tree, indent=''))
      if ast.get_docstring(tree) or text.count('\n\n') > 1:
        yield Raw(f'python:library/{module}', text)


def _docstrings(node: ast.AST, indent: str) -> Iterator[str]:
  """The docstring of a module, class or function, then those of what is defined in it."""
  if text := ast.get_docstring(node):
    yield '\n'.join(indent + line if line else '' for line in text.split('\n'))
  for child in node.body:
    if isinstance(child, ast.ClassDef):
      bases = ', '.join(ast.unparse(base) for base in child.bases)
      members = list(_docstrings(child, indent + '    '))
      if members:
        yield f'{indent}class {child.name}({bases}):\n' + '\n\n'.join(members)
    elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(child)):
      yield '\n'.join([f'{indent}def {child.name}({ast.unparse(child.args)}):',
                       *(f'{indent}    {line}' if line else '' for line in text.split('\n'))])
