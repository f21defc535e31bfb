"""A Hugging Face directory -> a MaxLM workdir, and back, tensor by tensor.

Import maps the files into memory and puts each device's part of each parameter onto that device, reading just what the
part needs; export takes one tensor after the other off the devices. At no time does the host hold a second copy of the
model. Every tensor is used once and every parameter is filled once, or the names are told.
"""

import collections
import dataclasses
import functools
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from data_pipeline.tokenizer import END_OF_TEXT
from maxlm import typed_json
from maxlm.checkpoint import Checkpoints, find, lineage, named_leaves
from maxlm.hf.families import choose_family, differences, families, family_of, name_of, read_config, write_config
from maxlm.hf.mapping import Constant, Copy, Entry, Given, Layout, LeftOut, Tensor, choose
from maxlm.hf.quantized import dequantized
from maxlm.hf.tensors import Stored, ToWrite, open_directory, read_json, write_directory
from maxlm.models.decoder import Decoder, DecoderConfig, stack_of_layer
from maxlm.restore import COMPANIONS, load_params, lora_of, model_of

BUFFERS = LeftOut(r'(.*\.)?rotary_emb\.inv_freq', 'angles of the rotary positions, which follow from the config')
WEIGHT_DTYPES = ('float64', 'float32', 'float16', 'bfloat16')
DTYPE_CHOICES = ('keep', 'float32', 'bfloat16')
TRANSFER_BYTES = 4 * 10**9  # of parameters on their way from the devices to the checkpoint


class Slot(NamedTuple):
  """Where a weight of ours is: in a parameter, or in a row of a stacked one. shape: of the weight, without L."""

  parameter: str
  row: int | None
  shape: tuple[int, ...]


@dataclasses.dataclass(slots=True)
class Bound:
  """A tensor of theirs with the weights of ours that it holds."""

  layout: Layout
  slots: list[Slot]


@dataclasses.dataclass(kw_only=True, slots=True)
class Report:
  """What was converted: shown to the user."""

  family: str
  n_tensors: int
  n_bytes: int
  n_parameters: int
  dtypes: list[str]
  seconds: float
  notes: list[str]


def parameters_of(model: DecoderConfig) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Slot]]:
  """(parameters by name, weights by name): a stack 'stacks.0.mlp.w_up_DF' holds 'layers.3.mlp.w_up_DF' and others."""
  like = named_leaves(jax.eval_shape(lambda: Decoder(model, jax.random.key(0))))
  layers_of = collections.defaultdict(list)
  for layer, stack in enumerate(stack_of_layer(model)):
    layers_of[str(stack)].append(layer)
  slots = {}
  for name, leaf in like.items():
    if name.startswith('stacks.'):
      _, stack, rest = name.split('.', 2)
      for row, layer in enumerate(layers_of[stack]):
        slots[f'layers.{layer}.{rest}'] = Slot(name, row, leaf.shape[1:])
    else:
      slots[name] = Slot(name, None, leaf.shape)
  return like, slots


def bind(entries: list[Entry], slots: dict[str, Slot]) -> tuple[list[Bound], list[tuple[Given, Slot]]]:
  """The entries for weights that the model has. ValueError unless each weight and each tensor is in exactly one."""
  bound, given, uses = [], [], collections.defaultdict(list)
  for entry in entries:
    if isinstance(entry, Given) and entry.ours in slots:
      given.append((entry, slots[entry.ours]))
      uses[entry.ours].append('a given value')
    if not isinstance(entry, Tensor) or not any(part in slots for part in entry.parts):
      continue
    if absent := [part for part in entry.parts if part not in slots]:
      raise ValueError(f'{entry.name} holds {absent[0]}, which this model does not have')
    mine = [slots[part] for part in entry.parts]
    bound.append(Bound(Layout(entry, [slot.shape for slot in mine]), mine))
    for part in entry.parts:
      uses[part].append(entry.name)
  if unfilled := [name for name in slots if name not in uses]:
    raise ValueError(f'the family has no tensor for {_listed(unfilled)}')
  if twice := [f'{name} ({" and ".join(where)})' for name, where in uses.items() if len(where) > 1]:
    raise ValueError(f'the family has several tensors for {_listed(twice)}')
  names = collections.Counter(name for b in bound for name in b.layout.names)
  if twice := [name for name, n in names.items() if n > 1]:
    raise ValueError(f'the family has several weights for {_listed(twice)}')
  return bound, given


def import_directory(source: Path, target: Path, dtype: str = 'keep') -> Report:
  """Writes the workdir `target` from the Hugging Face directory `source`, over the devices of the current mesh.

  dtype: of the parameters in the checkpoint; 'keep' leaves each in that of the file (quantised ones: bfloat16).
  ValueError, naming tensors or keys, for what does not fit; FileExistsError if `target` has a model already.
  """
  start = time.monotonic()
  config = read_json(source / 'config.json')
  family, model, notes = read_config(config)
  checkpoints = Checkpoints(target / 'checkpoints', transfer_bytes=TRANSFER_BYTES)
  if checkpoints.steps() or (target / 'config.json').exists():
    raise FileExistsError(f'{target} has a model already: give a new directory')
  stored = dequantized(open_directory(source), config)
  model = with_vocabulary_of(stored, family, model, notes)
  entries = choose(family.tensors(model), stored) + constants_of(family, model, config)
  like, slots = parameters_of(model)
  bound, given = bind(entries, slots)
  check(source, stored, entries, bound, notes)
  params = load_parameters(stored, bound, given, like, dtype)
  target.mkdir(parents=True, exist_ok=True)
  for name in ('tokenizer.json', *COMPANIONS):
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)
  meta = {'step': 0, 'model': typed_json.encode(model, DecoderConfig), 'lineage': lineage(), 'hf': {'config': config}}
  checkpoints.save(0, params=params, opt=None, meta=meta)
  checkpoints.close()
  return Report(family=name_of(family), n_tensors=sum(len(b.layout.names) for b in bound),
                n_bytes=sum(stored[name].nbytes for b in bound for name in b.layout.names), notes=notes,
                n_parameters=sum(leaf.size for leaf in params.values()), seconds=time.monotonic() - start,
                dtypes=sorted({leaf.dtype.name for leaf in params.values()}))


def with_vocabulary_of(stored: dict[str, Stored], family, model: DecoderConfig, notes: list[str]) -> DecoderConfig:
  """The model with as many rows of embeddings as the file has: some files are padded beyond what the config says."""
  for entry in choose(family.tensors(model), stored):
    if isinstance(entry, Tensor) and entry.ours == 'embed_VD' and entry.name in stored:
      shape, dims = stored[entry.name].shape, entry.layout.split()
      rows = shape[dims.index('V')] if len(shape) == len(dims) else model.vocab_size
      if rows > model.vocab_size:
        notes.append(f'{entry.name} has {rows:,} rows for a vocabulary of {model.vocab_size:,}: all are kept')
        return dataclasses.replace(model, vocab_size=rows)
  return model


def check(source: Path, stored: dict[str, Stored], entries: list[Entry], bound: list[Bound], notes: list[str]) -> None:
  """ValueError, naming them, for tensors that are missing, not used, of another shape or dtype, or not what they must be."""
  shapes = {name: b.layout.shape for b in bound for name in b.layout.names}
  constants = {entry.name: entry for entry in entries if isinstance(entry, Constant)}
  shapes |= {name: constant.shape for name, constant in constants.items()}
  copies = {entry.name: entry.of for entry in entries if isinstance(entry, Copy) and entry.name in stored}
  left_out = [entry for entry in entries if isinstance(entry, LeftOut)] + [BUFFERS]
  extra = [name for name in stored if name not in shapes and name not in copies]
  for entry in left_out:
    if matching := [name for name in extra if re.fullmatch(entry.pattern, name)]:
      notes.append(f'left out {_listed(matching, 1)}: {entry.why}')
      extra = [name for name in extra if not re.fullmatch(entry.pattern, name)]
  problems = {'missing': [name for name in shapes if name not in stored and name not in constants], 'not used': extra}
  here = {name: shape for name, shape in shapes.items() if name in stored}
  problems['of another shape'] = [f'{name} {stored[name].shape}, where the config says {shape}'
                                  for name, shape in here.items() if stored[name].shape != shape]
  problems['of a dtype that weights do not have'] = [f'{name} {stored[name].dtype.name}' for name in here
                                                     if stored[name].dtype.name not in WEIGHT_DTYPES]
  if not any(problems.values()):
    problems['not a copy'] = [f'{name} of {of}' for name, of in copies.items() if not _equal(stored[name], stored[of])]
    problems['another constant'] = [name for name, c in constants.items()
                                    if name in stored and not holds(stored[name], c)]
  if any(problems.values()):
    raise ValueError(f'{source}: ' + '; '.join(f'{kind}: {_listed(names)}' for kind, names in problems.items() if names))


def holds(tensor: Stored, constant: Constant) -> bool:
  """Whether these are the constant's values, up to how the dtype and an exponential function round."""
  finfo = jnp.finfo(tensor.dtype)
  return np.allclose(tensor.array().astype(np.float64), constant.values(), rtol=4 * float(finfo.eps), atol=1e-7)


def constants_of(family, model: DecoderConfig, config: dict[str, Any]) -> list[Entry]:
  """The tensors that depend on keys of the config which have no effect on what a model computes."""
  return list(family.constants(model, config)) if hasattr(family, 'constants') else []


def _equal(one: Stored, other: Stored) -> bool:
  return one.shape == other.shape and bool((one.array() == other.array()).all())


def load_parameters(stored: dict[str, Stored], bound: list[Bound], given: list[tuple[Given, Slot]],
                    like: dict[str, jax.ShapeDtypeStruct], dtype: str) -> dict[str, jax.Array]:
  """The parameters on the current mesh, one after the other, of each device its part."""
  sources = collections.defaultdict(list)  # parameter -> (row, function that fills an array with a part of the row)
  files, as_stored = collections.defaultdict(set), set()  # dtypes of a parameter's tensors; parameters not to cast
  for b in bound:
    for part, slot in enumerate(b.slots):
      sources[slot.parameter].append((slot.row, functools.partial(fill, stored, b.layout, part)))
      files[slot.parameter] |= {stored[name].dtype.name for name in b.layout.names}
      as_stored |= {slot.parameter} if b.layout.fp32 else set()
  for entry, slot in given:
    sources[slot.parameter].append((slot.row, lambda to, index, values=entry.values: np.copyto(to, values[index])))
    as_stored.add(slot.parameter)
  params = {}
  for name, leaf in like.items():
    kept = next(iter(files[name])) if len(files[name]) == 1 else 'float32'
    kept = 'float32' if kept == 'float64' else kept
    params[name] = on_devices(leaf, jnp.dtype(kept if dtype == 'keep' or name in as_stored else dtype), sources[name])
  return params


def on_devices(leaf: jax.ShapeDtypeStruct, dtype, sources: list) -> jax.Array:
  """A parameter on the current mesh. The host holds the part of one device at a time."""
  sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec)
  devices_of = collections.defaultdict(list)  # several devices may hold the same part
  for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
    devices_of[tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, leaf.shape))].append(device)
  arrays = []
  for index, devices in devices_of.items():
    part = np.empty([i.stop - i.start for i in index], dtype)
    for row, fill_row in sources:
      if row is None:
        fill_row(part, index)
      elif index[0].start <= row < index[0].stop:
        fill_row(part[row - index[0].start, ...], index[1:])
    arrays += [jax.device_put(part, device) for device in devices]
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def fill(stored: dict[str, Stored], layout: Layout, part: int, to: np.ndarray, index: tuple[slice, ...]) -> None:
  """Sets `to` to the slices `index` of a weight, from the tensor or the tensors that hold it. Reads nothing else."""
  if layout.each is None:
    to[...] = layout.read(stored[layout.names[0]].array(), part)[index]
    return
  each, rest = index[layout.each], index[:layout.each] + index[layout.each + 1:]
  for expert, to_expert in zip(range(each.start, each.stop), np.moveaxis(to, layout.each, 0)):
    to_expert[...] = layout.read(stored[layout.names[expert]].array(), part)[rest]


def export_directory(checkpoint: str, target: Path, dtype: str = 'keep', family: str | None = None,
                     max_shard_bytes: int = 5 * 10**9) -> Report:
  """Writes a checkpoint (WORKDIR or WORKDIR@STEP) as the new Hugging Face directory `target`.

  family: the file of maxlm/hf to use; None: the one it was imported from, or whichever can express the model.
  ValueError that names what cannot be expressed.
  """
  start = time.monotonic()
  target = target.absolute()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise FileExistsError(f'{target} exists and is not an empty directory: give a new one')
  checkpoints, step = find(checkpoint)
  workdir, meta = Path(checkpoints.directory).parent, checkpoints.meta(step)
  whole = model_of(meta)
  if whole.mask_token is not None:
    raise ValueError(f'{checkpoint} is a model of masked diffusion (mask_token={whole.mask_token}), which no family here '
                     'can hold: use it with maxlm.generate and maxlm.evaluate')
  model = dataclasses.replace(whole, mtp_depth=0)  # the formats have no place for what predicts further ahead
  module, config = config_for(model, meta, family)
  like, slots = parameters_of(model)
  entries = choose(module.tensors(model)) + constants_of(module, model, config)
  bound, given = bind(entries, slots)
  casts = {slot.parameter: dtype for b in bound for slot in b.slots if dtype != 'keep' and not b.layout.fp32}
  params = parameters_in(checkpoints, step, parameters_of(whole)[0], casts)
  params = {name: params[name] for name in like}
  for entry, slot in given:
    if not np.allclose(off_devices(params, slot), entry.values, rtol=1e-6):
      raise ValueError(f'{entry.ours} has other values than the family gives it')
  tensors = [tensor for b in bound for tensor in to_write(b, params)]
  tensors += [constant_to_write(entry, tensors) for entry in entries if isinstance(entry, Constant)]
  common = max({t.dtype for t in tensors}, key=lambda d: sum(t.nbytes for t in tensors if t.dtype == d)).name
  config['dtype' if 'dtype' in config else 'torch_dtype'] = common
  scratch = target.with_name(f'.{target.name}.partial')
  scratch.mkdir(parents=True)
  try:
    config |= companions(workdir, scratch, model, config)
    write_directory(scratch, tensors, max_shard_bytes)
    (scratch / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    scratch.replace(target)  # all of it or nothing
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  notes = ['the layers that predict further ahead (mtp_depth) are left out'] if whole.mtp_depth else []
  notes += [f'in bfloat16 transformers rounds elsewhere: {text}' for text in differences(model, read_config(config)[1])]
  return Report(family=name_of(module), n_tensors=len(tensors), notes=notes,
                n_bytes=sum(t.nbytes for t in tensors), n_parameters=sum(leaf.size for leaf in params.values()),
                dtypes=sorted({t.dtype.name for t in tensors}), seconds=time.monotonic() - start)


def parameters_in(checkpoints: Checkpoints, step: int, like: dict[str, jax.ShapeDtypeStruct],
                  casts: dict[str, str]) -> dict[str, jax.Array]:
  """The parameters of a checkpoint by name, in the dtypes `casts`, the others as they are stored. Adapters are merged, in
  fp32, into the model that they are for."""
  if lora_of(checkpoints.meta(step)) is not None:
    merged = named_leaves(load_params(checkpoints, step))
    return {name: leaf.astype(casts.get(name, leaf.dtype)) for name, leaf in merged.items()}
  dtypes = checkpoints.dtypes(step) | casts
  return checkpoints.restore_params(step, {
    name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name], sharding=leaf.sharding) for name, leaf in like.items()})


def config_for(model: DecoderConfig, meta: dict[str, Any], family: str | None) -> tuple[Any, dict[str, Any]]:
  """(family, config.json). An imported model that was not changed has the one it came with."""
  original = meta.get('hf', {}).get('config', {})
  if family is None and original and 'text_config' not in original:
    module, as_imported, _ = read_config(original)
    if as_imported == model:
      known_as = getattr(module, 'EXPORTED_AS', {}).get(original['model_type'], original['model_type'])
      stays_behind = 'quantization_config', 'auto_map'  # the second names files with code
      return module, {key: value for key, value in original.items() if key not in stays_behind} | {'model_type': known_as}
  if family is None:
    module, config = choose_family(model, family_of(original['model_type']) if original else None)
  elif family in families():
    module, config = families()[family], write_config(families()[family], model)
  else:
    raise ValueError(f'--family={family}: there are {", ".join(families())}')
  text = original | original.get('text_config', {})
  length = text.get('max_position_embeddings') or meta.get('config', {}).get('data', {}).get('seq_len')
  # Not known is null: what transformers takes where a token is missing is the id of another vocabulary.
  tokens = {key: text.get(key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
  return module, tokens | ({'max_position_embeddings': length} if length else {}) | config


def to_write(b: Bound, params: dict[str, jax.Array]) -> list[ToWrite]:
  """The tensors of theirs that a `Bound` stands for, made when they are written."""
  dtype = jnp.result_type(*(params[slot.parameter].dtype for slot in b.slots))
  weights: list[np.ndarray] = []  # off the devices once, for all experts

  def make(i: int) -> np.ndarray:
    if not weights:
      weights.extend(off_devices(params, slot) for slot in b.slots)
    theirs = np.empty(b.layout.shape, dtype)
    for part, ours in enumerate(weights):
      b.layout.write(theirs, part, ours if b.layout.each is None else ours.take(i, axis=b.layout.each))
    if i == len(b.layout.names) - 1:
      weights.clear()
    return theirs

  return [ToWrite(name, dtype, b.layout.shape, lambda i=i: make(i)) for i, name in enumerate(b.layout.names)]


def off_devices(params: dict[str, jax.Array], slot: Slot) -> np.ndarray:
  return np.asarray(params[slot.parameter] if slot.row is None else params[slot.parameter][slot.row])


def constant_to_write(entry: Constant, others: list[ToWrite]) -> ToWrite:
  """A tensor of one value, in the dtype that most of the others have, or one of several, in fp32."""
  common = max({t.dtype for t in others}, key=lambda d: sum(t.dtype == d for t in others))
  dtype = np.dtype(np.float32) if callable(entry.value) else common
  return ToWrite(entry.name, dtype, entry.shape, lambda: np.broadcast_to(entry.values(), entry.shape).astype(dtype))


def companions(workdir: Path, target: Path, model: DecoderConfig, config: dict[str, Any]) -> dict[str, Any]:
  """Copies the tokenizer and what goes with it; of a model trained here, writes what transformers wants besides.

  Returns keys for config.json. ValueError if the tokenizer has more tokens than the model.
  """
  for name in ('tokenizer.json', *COMPANIONS):
    if (workdir / name).is_file():
      shutil.copyfile(workdir / name, target / name)
  if not (target / 'tokenizer.json').exists():
    return {}
  tokenizer = tokenizers.Tokenizer.from_file(str(target / 'tokenizer.json'))
  if tokenizer.get_vocab_size() > model.vocab_size:
    raise ValueError(f'the tokenizer in {workdir} has {tokenizer.get_vocab_size():,} tokens, the model {model.vocab_size:,}')
  if (target / 'tokenizer_config.json').exists() or tokenizer.token_to_id(END_OF_TEXT) is None:
    return {}
  eot = tokenizer.token_to_id(END_OF_TEXT)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(  # documents begin with it, as in training
    single=f'{END_OF_TEXT} $A', pair=f'{END_OF_TEXT} $A {END_OF_TEXT} $B', special_tokens=[(END_OF_TEXT, eot)])
  tokenizer.save(str(target / 'tokenizer.json'))
  ids = {'bos_token_id': eot, 'eos_token_id': eot}
  text = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': END_OF_TEXT, 'eos_token': END_OF_TEXT,
          'clean_up_tokenization_spaces': False, 'model_max_length': config.get('max_position_embeddings')}
  (target / 'tokenizer_config.json').write_text(json.dumps(text, indent=2) + '\n')
  (target / 'generation_config.json').write_text(json.dumps(ids, indent=2) + '\n')
  return ids


def _listed(names: list[str], most: int = 12) -> str:
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
