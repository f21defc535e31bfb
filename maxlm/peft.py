"""Adapters in the format of the library PEFT, and models with their adapters merged.

    python -m maxlm.peft merge RUN DIR               the adapters of a LoRA run become part of the weights: DIR is a workdir
    python -m maxlm.peft export RUN PEFT_DIR         for PeftModel.from_pretrained(the model that RUN starts from, PEFT_DIR)
    python -m maxlm.peft import PEFT_DIR BASE DIR    PEFT's adapters for the model in the workdir BASE: DIR is a workdir

Which modules of theirs our weights are is known from the tables of the family (`maxlm.hf`), as for whole models.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm import flags, lora, start, typed_json
from maxlm.checkpoint import Checkpoints, find
from maxlm.hf.convert import config_for, parameters_of, read_json
from maxlm.hf.mapping import Layout, Tensor, choose, letters_of
from maxlm.hf.tensors import ToWrite, open_file, write_file
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.ops.einsum import in_and_out
from maxlm.restore import COMPANIONS, load_params, lora_of, model_of
from maxlm.sharding import MeshConfig, make_mesh

FAMILY = flags.DEFINE_string('family', '', 'export, import: the family whose names are used (default: that of the import)')

PREFIX = 'base_model.model.'  # of every name in PEFT's files
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# Keys of adapter_config.json that do not change what an adapter computes here; others must be null, false or empty.
INERT = {'base_model_name_or_path', 'fan_in_fan_out', 'inference_mode', 'init_lora_weights', 'lora_dropout', 'peft_type',
         'peft_version', 'revision', 'target_modules', 'task_type', 'auto_mapping', 'layers_to_transform', 'layers_pattern',
         'exclude_modules', 'megatron_core', 'qalora_group_size', 'runtime_config', 'eva_config', 'corda_config',
         'r', 'lora_alpha', 'use_dora', 'use_rslora'}


def main(words: list[str]) -> int:
  lengths = {'merge': 3, 'export': 3, 'import': 4}
  if not words or len(words) != lengths.get(words[0]):
    raise ValueError('say `merge RUN DIR`, `export RUN PEFT_DIR` or `import PEFT_DIR BASE DIR`; --help tells more')
  command, *names, target = words
  if Path(target).exists() and any(Path(target).iterdir()):
    raise FileExistsError(f'{target} exists and is not empty: give a new directory')
  jax.set_mesh(make_mesh(MeshConfig()))
  {'merge': merge, 'export': export_adapters, 'import': import_adapters}[command](*names, Path(target))
  print(f'{target}: done')
  return 0


def merge(run: str, target: Path) -> None:
  """Writes the model of a LoRA run, its adapters merged, as a workdir with parameters only."""
  checkpoints, step = find(run)
  parent = start.Parent(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step))
  adapters_of(parent)
  write_workdir(target, parent, load_params(checkpoints, step), {})


def export_adapters(run: str, target: Path) -> None:
  """Writes the adapters of a run as PEFT does. ValueError, naming a weight, for what PEFT cannot express."""
  checkpoints, step = find(run)
  parent = start.Parent(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step))
  config, model = adapters_of(parent), model_of(parent.meta)
  leaves = checkpoints.restore_params(step, lora.adapters(like_of(model, config)))
  entries, slots = table(model, parent.meta), parameters_of(model)[1]
  tensors, modules = [], []
  for name, slot in slots.items():
    if f'{slot.parameter}.lora_a' in leaves:
      if name not in entries:
        raise ValueError(f'{name} shares a module of theirs with other weights, which an adapter of PEFT cannot tell apart: '
                         'merge the adapters instead')
      modules.append(entries[name].name.removesuffix('.weight'))
      for leaf, tensor in parts(entries[name], config.dora).items():
        tensors.append(to_write(tensor, leaves[f'{slot.parameter}.{leaf}'][slot.row]))
  target.mkdir(parents=True, exist_ok=True)
  write_file(target / WEIGHTS, tensors)
  plain = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': None, 'inference_mode': True,
           'r': config.rank, 'lora_alpha': config.alpha, 'use_dora': config.dora, 'lora_dropout': 0.0, 'bias': 'none',
           'fan_in_fan_out': False, 'target_modules': short_names(modules, entries)}
  start.write_atomically(target / CONFIG, json.dumps(plain, indent=2) + '\n')


def import_adapters(source: str, base: str, target: Path) -> None:
  """Writes a workdir with PEFT's adapters for the model of `base`. ValueError, naming it, for a key or tensor of no use."""
  checkpoints, step = find(base)
  parent = start.Parent(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step))
  model, plain, stored = model_of(parent.meta), read_json(Path(source) / CONFIG), open_file(Path(source) / WEIGHTS)
  rank, alpha, dora = read_settings(plain, Path(source) / CONFIG)
  slots, used, leaves, filled = parameters_of(model)[1], set(), {}, {}
  for name, entry in table(model, parent.meta).items():
    mine = parts(entry, dora)
    if mine['lora_a'].name in stored:
      sizes = dict(zip(letters_of(name), slots[name].shape)) | {'A': rank}
      slot, layers = slots[name], sum(other.parameter == slots[name].parameter for other in slots.values())
      filled[slot.parameter] = filled.get(slot.parameter, 0) + 1
      for leaf, tensor in mine.items():
        layout = Layout(tensor, [tuple(sizes[letter] for letter in letters_of(tensor.ours))])
        if tensor.name not in stored or stored[tensor.name].shape != layout.shape:
          raise ValueError(f'{source}: {tensor.name} is missing or not of shape {layout.shape}')
        values = layout.read(stored[tensor.name].array(), 0)
        whole = leaves.setdefault(f'{slot.parameter}.{leaf}', np.zeros((layers, *values.shape), np.float32))
        whole[slot.row] = values
        used.add(tensor.name)
  if unused := sorted(stored.keys() - used):
    raise ValueError(f'{source}: this model has no place for {", ".join(unused[:3])}{", …" if len(unused) > 3 else ""}')
  config = lora.LoraConfig(rank=rank, alpha=alpha, dora=dora, targets=tuple(sorted(filled)))
  for name, leaf in leaves.items():
    if dora and filled[name.rpartition('.')[0]] < len(leaf):
      raise ValueError(f'{source}: only some layers have {name}: with DoRA all layers of a kind must, or none')
  like = lora.adapters(like_of(model, config))
  params = {name: jax.device_put(leaf, like[name].sharding.spec) for name, leaf in leaves.items()}
  write_workdir(target, parent, params, {'lora': typed_json.encode(config, lora.LoraConfig)})


def adapters_of(parent: start.Parent) -> lora.LoraConfig:
  """How the adapters of a checkpoint were made. ValueError if it has none."""
  config = lora_of(parent.meta)
  if config is None:
    raise ValueError(f'{parent.workdir} holds a whole model and no adapters: python -m maxlm.hf export writes that')
  return config


def like_of(model: DecoderConfig, config: lora.LoraConfig) -> Decoder:
  return jax.eval_shape(lambda: lora.adapt(Decoder(model, jax.random.key(0)), config, jax.random.key(0)))


def table(model: DecoderConfig, meta: dict[str, Any]) -> dict[str, Tensor]:
  """{our weight: their tensor} for the matrices that have a tensor of their own, which is what adapters of PEFT are for."""
  family, _ = config_for(model, meta, FAMILY.value or None)
  return {entry.ours: entry for entry in choose(family.tensors(model)) if isinstance(entry, Tensor) and
          '.w_' in entry.ours and ' | ' not in entry.ours and 'E' not in letters_of(entry.ours) and
          entry.name.endswith('.weight') and len(entry.layout.split()) == 2}


def parts(entry: Tensor, dora: bool) -> dict[str, Tensor]:
  """The tensors of PEFT's adapter for that weight, by the leaf of ours that each is."""
  ins, outs = in_and_out(letters_of(entry.ours))
  apart = {letter: letters for letter, letters in entry.where.items() if isinstance(letters, str)}
  theirs = {frozenset(dim): dim for dim in entry.layout.split()}
  seen = [theirs[frozenset(''.join(apart.get(letter, letter) for letter in letters))] for letters in (ins, outs)]
  module = PREFIX + entry.name.removesuffix('.weight')

  def tensor(name, layout, ours):
    return Tensor(f'{module}.{name}', layout, f'{entry.ours}.{ours}', entry.where)

  return {'lora_a': tensor('lora_A.weight', f'A {seen[0]}', f'lora_a_{ins}A'),
          'lora_b': tensor('lora_B.weight', f'{seen[1]} A', f'lora_b_A{outs}'),
          **({'lora_magnitude': tensor('lora_magnitude_vector', seen[1], f'lora_magnitude_{outs}')} if dora else {})}


def to_write(tensor: Tensor, ours: jax.Array) -> ToWrite:
  layout = Layout(tensor, [ours.shape])

  def make():
    theirs = np.empty(layout.shape, np.float32)
    layout.write(theirs, 0, np.asarray(ours))
    return theirs

  return ToWrite(tensor.name, np.dtype('float32'), layout.shape, make)


def short_names(modules: list[str], entries: dict[str, Tensor]) -> list[str]:
  """Last names of modules, as PEFT's users write them, where these mean the same modules; else whole names."""
  last = sorted({module.rpartition('.')[2] for module in modules})
  meant = [entry.name.removesuffix('.weight') for entry in entries.values()]
  return last if {module for module in meant if module.rpartition('.')[2] in last} == set(modules) else modules


def read_settings(plain: dict[str, Any], path: Path) -> tuple[int, float, bool]:
  """(rank, alpha, dora) of an adapter_config.json. ValueError, naming the key, for what we do not compute."""
  if plain.get('peft_type') != 'LORA' or not isinstance(plain.get('r'), int) or plain['r'] < 1:
    raise ValueError(f'{path}: peft_type={plain.get("peft_type")!r} and r={plain.get("r")!r}: adapters here are LORA')
  for key, value in plain.items():
    if key not in INERT and value and (key, value) != ('bias', 'none'):
      raise ValueError(f'{path}: {key}={json.dumps(value)[:60]} is not known here and may change what the adapters compute')
  rank, alpha = plain['r'], float(plain.get('lora_alpha', 8))
  return rank, alpha * rank**0.5 if plain.get('use_rslora') else alpha, bool(plain.get('use_dora'))


def write_workdir(target: Path, parent: start.Parent, params: Any, facts: dict[str, Any]) -> None:
  """A workdir of parameters alone, with what belongs to the model of the parent."""
  target.mkdir(parents=True, exist_ok=True)
  for name in ('tokenizer.json', *COMPANIONS):
    if (parent.workdir / name).is_file():
      shutil.copyfile(parent.workdir / name, target / name)
  kept = {name: parent.meta[name] for name in ('config', 'tokenizer', 'bos', 'eot') if name in parent.meta}
  if 'config' in kept:
    kept['config'] = kept['config'] | {'lora': None}
  meta = {'step': 0, 'model': typed_json.encode(model_of(parent.meta), DecoderConfig), **kept, **facts,
          **start.inheritance(parent, target)}
  checkpoints = Checkpoints(target / 'checkpoints')
  checkpoints.save(0, params=params, opt=None, meta=meta)
  checkpoints.close()


if __name__ == '__main__':
  flags.run(main, words=True)
