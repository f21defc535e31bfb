"""An experiment as a config file that people read and train: `--config=FILE.py`."""

import dataclasses
from collections import defaultdict

from maxlm.config import Experiment

WIDTH = 110
IN_SIGHT = {'batch_size', 'seq_len', 'peak_lr', 'schedule', 'warmup_tokens', 'decay_tokens', 'weight_decay', 'optimizer',
            'seed'}  # are written where they are as usual too


def config_file(config: Experiment, told: str) -> str:
  """Python text with a `get_config` that returns the experiment. told: its docstring. What is as usual is left out, but for
  what a reader wants to see."""
  used = defaultdict(set)
  body = _expression(config, 2, used)
  imports = ''.join(f'from {module} import {", ".join(sorted(names))}\n' for module, names in sorted(used.items()))
  return f'"""{told}"""\n\n{imports}\n\ndef get_config(arg: str = \'\') -> Experiment:\n  return {body}\n'


def _expression(value, indent: int, used: dict[str, set[str]]) -> str:
  inner = indent + 2
  if dataclasses.is_dataclass(value):
    used[type(value).__module__].add(type(value).__name__)
    fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    given = [f'{field.name}={_expression(one, inner, used)}' for field, one in fields
             if not _is_default(field, one) or field.name in IN_SIGHT and one is not None]
    return _joined(f'{type(value).__name__}(', given, ')', indent)
  if isinstance(value, tuple | list):
    opened, closed = '()' if isinstance(value, tuple) else '[]'
    closed = ',)' if isinstance(value, tuple) and len(value) == 1 else closed
    return _joined(opened, [_expression(one, inner, used) for one in value], closed, indent)
  if isinstance(value, dict):
    return _joined('{', [f'{key!r}: {_expression(one, inner, used)}' for key, one in value.items()], '}', indent)
  return f'{value:_}' if type(value) is int else repr(value)


def _is_default(field: dataclasses.Field, value) -> bool:
  if field.default_factory is not dataclasses.MISSING:
    return value == field.default_factory()
  return field.default is not dataclasses.MISSING and value == field.default


def _joined(opened: str, parts: list[str], closed: str, indent: int) -> str:
  line = opened + ', '.join(parts) + closed
  if '\n' not in line and indent + len(line) <= WIDTH:
    return line
  space = '\n' + ' ' * (indent + 2)
  return opened + ''.join(f'{space}{part},' for part in parts) + '\n' + ' ' * indent + closed.lstrip(',')
