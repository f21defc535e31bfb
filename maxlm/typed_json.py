"""A tree of dataclasses <-> JSON, strictly: whatever does not fit its annotation is refused by its dotted path.

A key that is missing takes its default: a field added later has the default that means 'as before', so that what was
written before it still reads. The annotations are the schema: bool, int, float, str, None, Literal, tuple, list,
dict[str, …], dataclasses, and unions of these. In a union of several dataclasses an object carries {"type": "ClassName"},
looked up only among the classes of that union: no registry, nothing is imported or executed on behalf of a file.
"""

import dataclasses
import json
import sys
import types
import typing
from typing import Any, Literal, Union


def dumps(config) -> str:
  """JSON of a dataclass, indented, fields in their order. ValueError if a value does not fit its annotation."""
  return json.dumps(encode(config, type(config)), indent=2, allow_nan=False) + '\n'


def loads(text: str, cls: type):
  """The instance of `cls` that `dumps` wrote. ValueError naming the key: unknown, missing or of another type."""
  try:
    plain = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'not JSON: {error}') from None
  return decode(plain, cls)


def encode(value, annotation, path: str = ''):
  """`value` as JSON types (dict, list, str, int, float, bool, None), checked against `annotation`."""
  options = _options(annotation)
  if value is None and type(None) in options:
    return None
  for option in options:
    origin, args = typing.get_origin(option) or option, typing.get_args(option)
    if origin is Literal and any(type(value) is type(arg) and value == arg for arg in args):
      return value
    if origin in (bool, int, str) and type(value) is origin:
      return value
    if origin is float and type(value) in (int, float):
      if not _is_finite(value):
        raise ValueError(f'{path}: {value} is not a finite number')
      return float(value)
    if origin in (tuple, list) and type(value) is origin:
      kinds = _item_types(option, len(value), path)
      items = enumerate(zip(value, kinds, strict=True))
      return [encode(item, kind, f'{path}[{i}]') for i, (item, kind) in items]
    if origin is dict and type(value) is dict and all(type(key) is str for key in value):
      return {key: encode(item, args[1], f'{path}[{key!r}]') for key, item in value.items()}
    if dataclasses.is_dataclass(origin) and type(value) is origin:
      hints = typing.get_type_hints(origin)
      tag = {'type': origin.__name__} if len(_classes(options)) > 1 else {}
      return tag | {f.name: encode(getattr(value, f.name), hints[f.name], _join(path, f.name))
                    for f in dataclasses.fields(origin)}
  raise _mismatch(path, annotation, value)


def decode(plain, annotation, path: str = ''):
  """The value of type `annotation` that JSON types stand for. Every error is a ValueError that begins with the path."""
  options = _options(annotation)
  if plain is None and type(None) in options:
    return None
  for option in options:
    origin, args = typing.get_origin(option) or option, typing.get_args(option)
    if origin is Literal and any(type(plain) is type(arg) and plain == arg for arg in args):
      return plain
    if origin in (bool, int, str) and type(plain) is origin:
      return plain
    if origin is float and type(plain) in (int, float) and _is_finite(plain):
      return float(plain)
    if origin in (tuple, list) and type(plain) in (tuple, list):
      kinds = _item_types(option, len(plain), path)
      items = enumerate(zip(plain, kinds, strict=True))
      return origin(decode(item, kind, f'{path}[{i}]') for i, (item, kind) in items)
    if origin is dict and type(plain) is dict and all(type(key) is str for key in plain):
      return {key: decode(item, args[1], f'{path}[{key!r}]') for key, item in plain.items()}
  if type(plain) is dict and _classes(options):
    return _decode_dataclass(plain, _classes(options), path)
  raise _mismatch(path, annotation, plain)


def flat(plain, path: str = '') -> dict[str, Any]:
  """{'model.pattern[0].norm': 'pre', …}: the leaves of a JSON tree under the keys that the command line gives them."""
  if isinstance(plain, dict) and plain:
    return {k: v for name, child in plain.items() for k, v in flat(child, _join(path, name)).items()}
  if isinstance(plain, list) and plain:
    return {k: v for i, child in enumerate(plain) for k, v in flat(child, f'{path}[{i}]').items()}
  return {path: plain}


def type_name(annotation) -> str:
  """How to say a type to a user: 'int', 'int or None', 'tuple[float, float]', "'full' or 'none'"."""
  names = []
  for option in _options(annotation):
    if typing.get_origin(option) is Literal:
      names += map(repr, typing.get_args(option))
    elif option is type(None):
      names.append('None')
    else:
      names.append(str(option) if typing.get_origin(option) else option.__name__)
  return ' or '.join(names)


def _decode_dataclass(plain: dict[str, Any], classes: list[type], path: str):
  cls, given = classes[0], dict(plain)
  if len(classes) > 1:
    by_name = {cls.__name__: cls for cls in classes}
    name = given.pop('type', None)
    if type(name) is not str or name not in by_name:
      raise ValueError(f'{_join(path, "type")}: expected {" or ".join(map(repr, by_name))}, got {name!r}')
    cls = by_name[name]
  hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
  for name in given:
    if name not in names:
      raise ValueError(f'{_join(path, name)}: unknown key of {cls.__name__}')
  for field in dataclasses.fields(cls):
    if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
      raise ValueError(f'{_join(path, field.name)}: missing key of {cls.__name__}')
  return cls(**{name: decode(given[name], hints[name], _join(path, name)) for name in names if name in given})


def _is_finite(number: int | float) -> bool:
  return abs(number) <= sys.float_info.max  # an int may be larger than any float


def _options(annotation) -> tuple:
  """The alternatives of a union, or the annotation alone."""
  is_union = typing.get_origin(annotation) in (Union, types.UnionType)
  return typing.get_args(annotation) if is_union else (annotation,)


def _classes(options: tuple) -> list[type]:
  return [option for option in options if dataclasses.is_dataclass(option)]


def _item_types(annotation, length: int, path: str) -> tuple:
  """Of each item in a sequence of that length: tuple[int, ...] and list[int] repeat, tuple[int, str] does not."""
  args = typing.get_args(annotation)
  if typing.get_origin(annotation) is list or args[-1] is Ellipsis:
    return (args[0],) * length
  if len(args) != length:
    raise ValueError(f'{path}: expected {type_name(annotation)}, got {length} items')
  return args


def _join(path: str, name: str) -> str:
  return f'{path}.{name}' if path else name


def _mismatch(path: str, annotation, value) -> ValueError:
  return ValueError(f'{path + ": " if path else ""}expected {type_name(annotation)}, got {value!r}')
