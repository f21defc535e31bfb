"""Models out of checkpoints: of a run, of an import, and of adapters together with the model that they were trained on.

A checkpoint of a LoRA run holds the adapters alone. Where its model is, its lineage says: {'run': id, 'step': n, 'path':
workdir, 'from_here': the same seen from its own workdir, so that both can be moved together}.
"""

import functools
import os
from typing import Any

import jax
from etils import epath

from maxlm import ema as running_mean
from maxlm import lora, typed_json
from maxlm.checkpoint import Checkpoints
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.optim import OptimConfig

# What belongs to a model besides its weights and its tokenizer.json: files of its workdir, under the names that Hugging
# Face gives them. They go along with it, from import to fine-tuning to export.
COMPANIONS = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'tokenizer.model', 'vocab.json',
              'merges.txt', 'chat_template.jinja', 'chat_template.json', 'generation_config.json')


def model_of(meta: dict[str, Any]) -> DecoderConfig:
  """The architecture of a checkpoint, a run's or an import's."""
  plain = meta['model'] if 'model' in meta else meta['config']['model']
  return typed_json.decode(plain, DecoderConfig, 'model')


def lora_of(meta: dict[str, Any]) -> lora.LoraConfig | None:
  """How the adapters of a checkpoint were made, if it holds adapters."""
  return typed_json.decode(meta.get('lora') or meta.get('config', {}).get('lora'), lora.LoraConfig | None, 'lora')


def load_params(checkpoints: Checkpoints, step: int, model: DecoderConfig | None = None, *, ema: bool = False) -> Decoder:
  """The parameters of a checkpoint in fp32 on the current mesh; adapters are merged into the model they are for.

  model: the architecture (None: the one that was saved). ema: with the running mean of the weights in their place.
  ValueError, naming a parameter, if shapes differ; and where the run kept no mean.
  """
  meta = checkpoints.meta(step)
  model, adapters = model or model_of(meta), lora_of(meta)
  if adapters is None:
    params = checkpoints.restore_params(step, jax.eval_shape(lambda: Decoder(model, jax.random.key(0))))
    return _with_mean(checkpoints, step, meta, params) if ema else params
  like = jax.eval_shape(lambda: lora.adapt(Decoder(model, jax.random.key(0)), adapters, jax.random.key(0)))
  trained = checkpoints.restore_params(step, lora.adapters(like))
  params = lora.assemble(like, load_params(*base_of(checkpoints, meta), model), trained)
  return jax.jit(lora.merge)(_with_mean(checkpoints, step, meta, params) if ema else params)


def _with_mean(checkpoints: Checkpoints, step: int, meta: dict[str, Any], params: Decoder) -> Decoder:
  optim = typed_json.decode(meta['config']['optim'], OptimConfig, 'optim') if 'config' in meta else None
  if optim is None or not optim.ema:
    raise ValueError(f'{checkpoints.directory.parent} keeps no running mean of weights: a run with --config.optim.ema does')
  mean = jax.eval_shape(functools.partial(running_mean.begin, optim, model_of(meta)), params)
  return running_mean.in_place(optim, model_of(meta), params, checkpoints.restore_item(step, 'ema', mean))


def base_of(checkpoints: Checkpoints, meta: dict[str, Any]) -> tuple[Checkpoints, int]:
  """The checkpoint that adapters were trained on. ValueError if it is not where it was."""
  parent = meta['lineage']['parent']
  for path in (parent['path'], os.path.join(checkpoints.directory.parent, parent['from_here'])):
    base = Checkpoints(epath.Path(path) / 'checkpoints')
    if parent['step'] in base.steps() and base.meta(parent['step'])['lineage']['run'] == parent['run']:
      return base, parent['step']
  raise ValueError(f'{checkpoints.directory.parent} holds adapters for step {parent["step"]} of the run that was in '
                   f'{parent["path"]}, and it is not there any more: put it back')
