"""The families are the files of this folder that have MODEL_TYPES: there is no table to edit.

A family has MODEL_TYPES, read_config(Keys) -> DecoderConfig, write_config(DecoderConfig) -> dict, and
tensors(DecoderConfig) -> entries (`maxlm.hf.mapping`); and constants(DecoderConfig, config) -> more entries, if some depend
on keys that a DecoderConfig does not have; and EXPORTED_AS, {'kimi_k2': 'deepseek_v3'}, if transformers does not know all
MODEL_TYPES. docs/hf.md says how to write one.
"""

import importlib
import math
import pkgutil
from types import ModuleType
from typing import Any

import maxlm.hf
from maxlm import typed_json
from maxlm.hf.keys import Keys
from maxlm.models.decoder import DecoderConfig, LayerSpec

# A difference in rounding below fp32 is none: whether a norm's factor is applied before the cast to bfloat16 or after.
ROUNDING = ('norm.cast',)


def families() -> dict[str, ModuleType]:
  """{'llama': module, …} in the order of their names."""
  modules = {info.name: importlib.import_module(f'maxlm.hf.{info.name}') for info in pkgutil.iter_modules(maxlm.hf.__path__)
             if not info.name.startswith('_')}
  return {name: module for name, module in sorted(modules.items()) if hasattr(module, 'MODEL_TYPES')}


def family_of(model_type: str) -> ModuleType:
  """The family of a config.json. ValueError, naming what there is, if no file has it."""
  known = {known: family for family in families().values() for known in family.MODEL_TYPES}
  if model_type not in known:
    raise ValueError(f'model_type {model_type!r} is of no family here; there are {", ".join(sorted(known))}')
  return known[model_type]


def read_config(plain: dict[str, Any]) -> tuple[ModuleType, DecoderConfig, list[str]]:
  """(family, model, notes for the user) of a config.json. ValueError, naming the key, for what cannot be honoured."""
  keys = Keys(plain)
  family = family_of(keys.str('model_type'))
  model = family.read_config(keys)
  keys.done()
  for i, layer in enumerate(model.pattern):
    for name, part in layer.parts.items():
      part.check(f'config.json: {name} of layer {i}')
  return family, model, keys.notes


def write_config(family: ModuleType, model: DecoderConfig) -> dict[str, Any]:
  """The config.json of a model in that family. ValueError that names the fields which the family cannot express."""
  config, different = _written(family, model)
  if different:
    more = f' and {len(different) - 3} more' if len(different) > 3 else ''
    raise ValueError(f'{name_of(family)} cannot express {", ".join(different[:3])}{more}')
  return config


def choose_family(model: DecoderConfig, first: ModuleType | None) -> tuple[ModuleType, dict[str, Any]]:
  """(family, config.json): `first` if it can express the model, else any. ValueError with the nearest ones' reasons."""
  fails = []
  for family in [first] * (first is not None) + list(families().values()):
    try:
      config, different = _written(family, model)
    except ValueError:
      continue  # its layers are of other kinds
    if not different:
      return family, config
    fails.append((len(different), f'{name_of(family)} cannot express {different[0]}'))
  reasons = '; '.join(reason for _, reason in sorted(set(fails))[:3]) or 'none has layers of its kinds'
  raise ValueError(f'no family can express this model: {reasons}')


def name_of(family: ModuleType) -> str:
  return family.__name__.rpartition('.')[2]


def _written(family: ModuleType, model: DecoderConfig) -> tuple[dict[str, Any], list[str]]:
  """(config.json, what a reader of it would make otherwise, roundings excepted)."""
  config = family.write_config(model)
  _, again, _ = read_config({'max_position_embeddings': 2**20} | config)
  return config, [text for text in differences(model, again) if text.partition('=')[0] not in ROUNDING]


def differences(model: DecoderConfig, other: DecoderConfig) -> list[str]:
  """'layers[3].mixer.window=64 (not None)', … for what differs, however the layers are grouped in patterns."""
  mine, others = _flat(model), _flat(other)
  return [f'{path}={mine.get(path)} (not {others.get(path)})' for path in {**mine, **others}
          if not _equal(mine.get(path), others.get(path))]


def _flat(model: DecoderConfig) -> dict[str, Any]:
  plain = typed_json.encode(model, DecoderConfig)
  del plain['pattern']
  plain['layers'] = [typed_json.encode(layer, LayerSpec) for layer in model.layers]
  return typed_json.flat(plain)


def _equal(a, b) -> bool:
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
