"""The command line of every command: plain flags, a typed config with overrides, help, and errors of one line.

    python -m maxlm.train --config=configs/x.py:arg --config.model.n_layers=4 '--config.model.pattern[0].window=none'

A command defines its own flags with `flags.DEFINE_string(…)` at module level (they are absl's) and ends with

    if __name__ == '__main__':
      flags.run(main, default_config='configs/quickstart.py')

which calls `main(config)`, or `main()` where there is no default_config, and exits with what it returns. A config is
a Python file with `get_config(arg: str = '')` that returns a tree of dataclasses; it is executed: run your own.
Keys follow ml_collections' config_flags; values are checked here, against the annotations (its own parsers know
neither None nor the items of a tuple).

What a user can mend is one line on stderr, `error: …`, and exit code 2: a bad flag, key or value, an OSError (missing
file, full disk, no permission) and a ValueError that our own code raises. Anything else, a ValueError out of a library
too, is a bug and keeps its traceback. --traceback shows it always. Secrets are left out of both (`maxlm.redact`).
"""

import ast
import dataclasses
import difflib
import dis
import errno
import functools
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags import config_path

from maxlm import typed_json
from maxlm.redact import redact

OURS = ('__main__', 'maxlm', 'data_pipeline', 'launch', 'configs', 'config')  # packages whose ValueErrors are for users
WORDS = {'true': True, 'false': False, 'none': None}  # beside Python's spelling

# A name may be defined by several commands: one process can import them all.
DEFINE_bool, DEFINE_enum, DEFINE_float, DEFINE_integer, DEFINE_list, DEFINE_string = (
  functools.partial(getattr(flags, f'DEFINE_{kind}'), allow_override=True)
  for kind in ('bool', 'enum', 'float', 'integer', 'list', 'string'))


def run(main: Callable[..., int | None], *, default_config: str | None = None, words: bool = False) -> typing.NoReturn:
  """Parses sys.argv, calls main and exits. default_config: the file loaded where --config is not given. words: main gets
  the list of arguments that are no flags, which are refused otherwise."""
  sys.excepthook = _show_traceback
  command, args = sys.argv[0], [arg for arg in sys.argv[1:] if arg != '--traceback']
  try:
    config_name, overrides, plain = default_config, [], args
    if default_config is not None:
      config_name, overrides, plain = split_args(args, default_config)
    own = _own_flags(main, command)
    if asks_help := any(arg in ('--help', '-help', '-h', '--helpfull') for arg in plain):
      plain = []
    rest = _parse_plain(command, plain, own, has_config=default_config is not None, words=words)
    configs = [] if default_config is None else [load_config(config_name, overrides)]
    if asks_help:
      print(usage(main, own, config_name, *configs))
      sys.exit(0)
    sys.exit(main(*configs, *([rest] if words else [])))
  except (ValueError, OSError) as error:
    if '--traceback' in sys.argv or not is_for_user(error):
      raise
    full = '; free space, then run the same command again' * (getattr(error, 'errno', None) == errno.ENOSPC)
    print('error:', redact(' '.join(str(error).split())) + full, file=sys.stderr)
    sys.exit(2)


def load_config(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Any:
  """The config of 'configs/x.py' or 'configs/x.py:arg', with overrides such as ('model.n_layers', '4') applied.

  FileNotFoundError if there is no such file, ValueError where a value does not fit its annotation. No two fields share
  an object: an override of pattern[0] does not reach pattern[1] where the file repeats one layer.
  """
  path, _, arg = name.partition(':')
  get_config = getattr(module_of(path), 'get_config', None)
  if get_config is None:
    raise ValueError(f'{path}: has no get_config(arg)')
  if arg and not inspect.signature(get_config).parameters:
    raise ValueError(f'{path}: its get_config() takes no argument, got {arg!r}')
  config = get_config(arg) if arg else get_config()
  if not dataclasses.is_dataclass(config):
    raise ValueError(f'{path}: get_config() must return a dataclass, not {type(config).__name__}')
  config = typed_json.decode(typed_json.encode(config, type(config)), type(config))
  for key, text in overrides:
    override(config, key, text)
  return config


def module_of(path: str) -> types.ModuleType:
  """A Python file that the user names, executed. FileNotFoundError or ValueError if it is none."""
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no config file {path!r}')
  spec = importlib.util.spec_from_file_location('config.' + os.path.basename(path).removesuffix('.py'), path)
  if spec is None:
    raise ValueError(f'{path}: a config is a .py file')
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def override(config, key: str, text: str) -> None:
  """Sets config's `key` ('model.pattern[0].window') to what `text` means for the type of that field."""
  try:
    annotation = config_path.get_type(key, config, normalize=False)
  except (KeyError, IndexError, TypeError, ValueError):
    hint = nearest(key, [known for known, *_ in walk(config)])
    hint = f'did you mean --config.{hint}?' if hint else '--help lists them'
    raise ValueError(f'--config.{key}: no such key; {hint}') from None
  config_path.set_value(key, config, _parse(text, annotation, key))


def nearest(key: str, known: Sequence[str]) -> str | None:
  """The known dotted key most like `key`: by its last name among its siblings, then anywhere, then by the whole."""
  parent, _, name = key.rpartition('.')
  siblings = [path for path in known if path.rpartition('.')[0] == parent]
  for pool in (siblings, known):
    names = [path.rpartition('.')[2] for path in pool]
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
      alike = [path for path in pool if path.rpartition('.')[2] == close[0]]
      return max(alike, key=lambda path: difflib.SequenceMatcher(None, key, path).ratio())
  return next(iter(difflib.get_close_matches(key, known, n=1)), None)


def walk(config, prefix: str = '') -> Iterator[tuple[str, Any, Any, str]]:
  """Each key of a tree of dataclasses: (dotted key, annotation, value, what the docstring says of it)."""
  hints, texts = typing.get_type_hints(type(config)), _field_texts(type(config))
  for field in dataclasses.fields(config):
    key, value = prefix + field.name, getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from walk(value, key + '.')
    elif isinstance(value, (tuple, list)) and value and all(map(dataclasses.is_dataclass, value)):
      for i, item in enumerate(value):
        yield from walk(item, f'{key}[{i}].')
    else:
      yield key, hints[field.name], value, texts.get(field.name, '')


def split_args(args: Sequence[str], default: str) -> tuple[str, list[tuple[str, str]], list[str]]:
  """(name of the config, its overrides, the other arguments) of --config=FILE and --config.key=value.

  The value may also be the next argument; without any it is 'true'.
  """
  name, overrides, plain = default, [], []
  args = list(args)
  while args:
    arg = args.pop(0)
    matched = re.fullmatch(r'--?config(?:\.([^=]+))?(?:=(.*))?', arg, re.DOTALL)
    if matched is None:
      plain.append(arg)
      continue
    key, text = matched.groups()
    if text is None:
      text = args.pop(0) if args and not args[0].startswith('--') else 'true' if key else ''
    if key:
      overrides.append((key, text))
    elif text:
      name = text
    else:
      raise ValueError('--config needs a file: --config=configs/x.py')
  return name, overrides, plain


def usage(main: Callable, own: Sequence[flags.Flag], config_name: str | None = None, config=None) -> str:
  """The help text: what the command says of itself, its flags, and every key of the config with its value."""
  rows = [('--help', 'this text'), ('--traceback', 'show where an error comes from')]
  if config is not None:
    rows.insert(0, (f'--config={config_name}', 'the run: a Python file with get_config(), and :arg for its argument'))
  for flag in own:
    default = '' if flag.default is None else f'={flag.default_as_str.strip(chr(39))}'
    rows.append((f'--{flag.name}{default}', flag.help or ''))
  lines = [inspect.cleandoc(sys.modules[main.__module__].__doc__ or ''), '', 'flags:', *_columns(rows)]
  if config is not None:
    lines += ['', 'keys of the config, each one a flag (of a list: [0], and where the others differ from it):']
    lines += _columns(_key_rows(config))
  return '\n'.join(lines)


def is_for_user(error: BaseException) -> bool:
  """An OSError, or a ValueError that comes from a `raise` in our own code (and not out of a library it called)."""
  if isinstance(error, OSError):
    return True
  step = error.__traceback__
  while step.tb_next is not None:
    step = step.tb_next
  code = step.tb_frame.f_code.co_code
  # The instruction is looked at because JAX cuts its own frames out of tracebacks: the last one left is a call of ours.
  raised = code[step.tb_lasti] == dis.opmap['RAISE_VARARGS']
  return isinstance(error, ValueError) and raised and step.tb_frame.f_globals['__name__'].split('.')[0] in OURS


def _show_traceback(kind, error, trace) -> None:
  sys.stderr.write(redact(''.join(traceback.format_exception(kind, error, trace))))


def _parse(text: str, annotation, key: str):
  """The value that `text` stands for: Python's spelling of it, or a plain word."""
  try:
    value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  readings = [value, text]
  if isinstance(value, float) and value.is_integer():
    readings.insert(1, int(value))  # 2e9 tokens
  for reading in readings:
    try:
      return typed_json.decode(reading, annotation)
    except ValueError:
      continue
  raise ValueError(f'--config.{key}={text}: expected {typed_json.type_name(annotation)}')


def _own_flags(main: Callable, command: str) -> list[flags.Flag]:
  """The flags that main's module defines: libraries add dozens of theirs to absl's list."""
  module = command if main.__module__ == '__main__' else main.__module__
  return list(flags.FLAGS.flags_by_module_dict().get(module, ()))


def _parse_plain(command: str, args: list[str], own: Sequence[flags.Flag], *, has_config: bool, words: bool) -> list[str]:
  """Sets the flags; the words that are none, if the command takes words."""
  names = [flag.name for flag in own] + ['help', 'traceback'] + ['config'] * has_config
  try:
    rest = flags.FLAGS([command, *args])[1:]
  except flags.UnrecognizedFlagError as error:
    name = error.flagname
    hint = 'config.' + name if has_config and '.' in name else nearest(name, names)
    hint = f'did you mean --{hint}?' if hint else '--help lists them'
    raise ValueError(f'--{name}: no such flag; {hint}') from None
  except flags.Error as error:
    raise ValueError(str(error)) from None
  if rest and not words:
    hint = f'; did you mean --config={rest[0]}?' if has_config and rest[0].partition(':')[0].endswith('.py') else ''
    raise ValueError(f'unexpected argument {rest[0]!r}{hint}')
  return rest


def _field_texts(cls: type) -> dict[str, str]:
  """What the docstring of a dataclass says of its fields, each as `name: text`."""
  names = '|'.join(field.name for field in dataclasses.fields(cls))
  text = ' '.join((cls.__doc__ or '').split())
  if text.startswith(cls.__name__ + '('):  # what dataclasses write where nobody did
    return {}
  _, *pieces = re.split(rf'\b({names}): ', text)
  return {name: text.strip() for name, text in zip(pieces[::2], pieces[1::2], strict=True)}


def _key_rows(config) -> list[tuple[str, str]]:
  """What help shows of each key. Items of a list are shown where they differ from the first, for most are alike."""
  values = {key: value for key, _, value, _ in walk(config)}
  rows = []
  for key, annotation, value, text in walk(config):
    first = re.sub(r'\[\d+\]', '[0]', key)
    if key == first or values.get(first) != value:
      rows.append((f'--config.{key}={value}', f'({typed_json.type_name(annotation)}) {text}'))
  return rows


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
  """Two columns, the right one wrapped; a left side that is too wide has a line of its own."""
  width = min(48, max(len(left) for left, _ in rows)) + 4
  lines = []
  for left, right in rows:
    first, *more = textwrap.wrap(right, 110 - width) or ['']
    lines += [f'  {left}'.ljust(width) + first] if len(left) + 4 <= width else [f'  {left}', ' ' * width + first]
    lines += [' ' * width + line for line in more]
  return [line.rstrip() for line in lines if line.strip()]
