"""Writes tests/golden/hf/<name>/: tiny random models of the open families, and what transformers computes with them.

  python3.11 -m venv hf && hf/bin/pip install torch==2.13.0 transformers==5.23.0     # CPU builds; a throw-away environment
  hf/bin/python tests/golden/make_hf_goldens.py                     # all fixtures; --only NAME for some
  hf/bin/python tests/golden/make_hf_goldens.py --check DIR...      # what MaxLM exported, against the fixture's logits

A fixture is what `save_pretrained` writes of a bf16 model, its tensors under the hub's names (config.json,
generation_config.json, model.safetensors or shards and an index), and
  config.hub.json  the same model's configuration as published ones are spelled, where transformers 5 spells it otherwise
  golden.npz       tokens [2, T] int32, logits [2, T, V] of the fp32 model (the bf16 weights are fp32 numbers),
                   prompts [2, P] int32 and continuations [2, 12] int32, greedy; note, a text, not empty where the
                   continuation is not what transformers generates with its cache

No weight is left at its default, nor any constant: norms, biases, sinks, router biases and decays are drawn like matrices.
All are drawn from the fixture's name alone, with the first seed for which
  * each greedy token has a margin over the next;
  * a change of 1e-6 in every weight moves the logits little: no expert is chosen by a rounding error.
A fixture is refused unless
  * reloaded from its files it computes the same logits, and from config.hub.json too;
  * greedy decoding with the cache gives the tokens of the full forward;
  * every switch that it is there for, turned off, moves the logits a lot (`off` of hf_models.py).
Attention and experts run in plain torch ('eager'); optional kernels are not installed, so recurrences do too.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch
import transformers
from hf_models import GONE, MODELS, Golden
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / 'hf'
EAGER = {'dtype': torch.float32, 'attn_implementation': 'eager', 'experts_implementation': 'eager'}
NEW_TOKENS = 12
MARGIN = 5e-3  # of the best token over the next, in standard deviations of the logits
SENSITIVITY = 200  # max |Δlogit| / std(logits) of a relative change of 1e-6 in every weight, over 1e-6
EFFECT = 1e-2  # max |Δlogit| / std(logits) that a switch turned off must have


def build(config: dict) -> torch.nn.Module:
  """A model of that configuration, fp32, in evaluation mode."""
  torch.manual_seed(0)
  config = copy.deepcopy(config)
  return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop('model_type'), **config), **EAGER).eval()


def load(folder: Path) -> torch.nn.Module:
  """The model of a folder in fp32; ValueError unless its files hold exactly the model's tensors."""
  model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **EAGER)
  problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
  if problems:
    raise ValueError(f'{folder}: {problems}')
  return model.eval()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
  """Parameters and persistent buffers by name, tied ones once."""
  saved = model.state_dict()
  return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in saved}


def draw(model: torch.nn.Module, golden: Golden, name: str, seed: int) -> None:
  """Draws every weight, numbers that bf16 holds: vectors around their initial value, matrices so that outputs have the scale
  of inputs, the unembedding so that logits have a standard deviation of about two."""
  tied, d = model.config.tie_word_embeddings, model.config.hidden_size
  with torch.no_grad():
    for key, weight in weights(model).items():
      if any(part in key for part in golden.fixed):
        continue
      rng = np.random.default_rng([zlib.crc32(text.encode()) for text in (name, key)] + [seed])
      noise = torch.from_numpy(rng.standard_normal(tuple(weight.shape))).float()
      centre, scale = 0.0, None
      for part, (mean, std) in golden.draw.items():
        if part in key:
          centre, scale = mean, std
      if scale is None and weight.ndim < 2:
        centre, scale = weight.float().mean() if weight.numel() else 0.0, 0.3
      elif scale is None and weight is model.get_output_embeddings().weight:
        scale = 2 / d**0.5
      elif scale is None and weight is model.get_input_embeddings().weight:
        scale = 2 / d**0.5 if tied else 1.0
      elif scale is None:
        fan_in = weight.shape[-2 if any(part in key for part in golden.in_out) else -1]
        scale = 1.3 / fan_in**0.5
      weight.copy_((centre + scale * noise).to(torch.bfloat16))
      constant = weight.numel() > 1 and weight.min() == weight.max() or weight.numel() == 1 and weight in (0, 1)
      assert not constant, f'{name}: {key} is constant'


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
  with torch.no_grad():
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()


def greedy(model: torch.nn.Module, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, str]:
  """(continuations [2, 12], margins [2, 12] of the best token's logit over the next, note). By the full forward each time;
  the note says where the cache gives something else."""
  tokens, margins = prompts, []
  for _ in range(NEW_TOKENS):
    best = logits_of(model, tokens)[:, -1].topk(2)
    tokens = torch.cat([tokens, best.indices[:, :1]], dim=1)
    margins.append(best.values[:, 0] - best.values[:, 1])
  plain = tokens[:, prompts.shape[1]:]
  settings = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)  # no end of text
  model.generation_config, saved = settings, model.generation_config
  cached = model.generate(prompts, attention_mask=torch.ones_like(prompts))[:, prompts.shape[1]:]
  model.generation_config = saved
  note = '' if torch.equal(cached, plain) else f'with its cache, transformers generates {cached.tolist()}'
  return plain, torch.stack(margins, dim=1), note


def sensitivity(model: torch.nn.Module, tokens: torch.Tensor, logits: torch.Tensor) -> float:
  """max |Δlogit| / std(logits) over the relative change of every weight that caused it, for the worst of four changes."""
  worst = 0.0
  for seed in range(4):
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
      for weight in weights(moved).values():
        weight *= 1 + 1e-6 * torch.randn(weight.shape, generator=generator)
    worst = max(worst, ((logits_of(moved, tokens) - logits).abs().max() / logits.std() / 1e-6).item())
  return worst


def changed(config: dict, overrides: dict) -> dict:
  """config with some fields replaced: a dict replaces fields of the dict there, GONE removes one."""
  config = copy.deepcopy(config)
  for field, value in overrides.items():
    if value is GONE:
      config.pop(field, None)
    elif isinstance(value, dict) and isinstance(config.get(field), dict):
      config[field] = changed(config[field], value)
    else:
      config[field] = value
  return config


def effects(model: torch.nn.Module, golden: Golden, tokens: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
  """max |Δlogit| / std(logits) of each switch turned off, the weights unchanged."""
  found = {}
  for overrides in golden.off:
    other = build(changed(golden.config, overrides))
    other.load_state_dict(model.state_dict())
    moved = logits_of(other, tokens)
    found[json.dumps(overrides, default=str)] = ((moved - logits).abs().max() / logits.std()).item()
  return found


def check_hub_config(folder: Path, golden: Golden, tokens: torch.Tensor, logits: torch.Tensor) -> None:
  """Writes config.hub.json; it must make the same model."""
  config = changed(json.loads((folder / 'config.json').read_text()), golden.hub)
  config['torch_dtype'] = config.pop('dtype')
  (folder / 'config.hub.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
  if golden.hub_model_type:  # transformers knows the family under another name
    config['model_type'] = golden.config['model_type']
  with tempfile.TemporaryDirectory() as scratch:
    shutil.copytree(folder, scratch, dirs_exist_ok=True)
    (Path(scratch) / 'config.json').write_text(json.dumps(config))
    assert torch.equal(logits_of(load(Path(scratch)), tokens), logits), f'{folder.name}: config.hub.json is another model'


def make(name: str, golden: Golden) -> str:
  """Writes the fixture; a line about it."""
  for seed in range(20):
    model = build(golden.config)
    draw(model, golden, name, seed)
    rng = np.random.default_rng([zlib.crc32(name.encode()), seed])
    tokens = torch.from_numpy(rng.integers(3, golden.config['vocab_size'] - 3, (2, golden.length)))
    logits, prompts = logits_of(model, tokens), tokens[:, :golden.length - NEW_TOKENS]
    continuations, margins, note = greedy(model, prompts)
    margin, sensitive = margins.min().item() / logits.std().item(), sensitivity(model, tokens, logits)
    if margin > MARGIN and sensitive < SENSITIVITY:
      break
  off = effects(model, golden, tokens, logits)
  line = (f'{name:20} seed {seed:2}  logits {logits.std():4.2f}  margin {margin:.4f}  sensitivity {sensitive:4.0f}  '
          f'least effect {min(off.values(), default=float("nan")):.3f}  {note}')
  assert margin > MARGIN and sensitive < SENSITIVITY and 0.7 < logits.std() < 4, line
  assert all(effect > EFFECT for effect in off.values()), f'{line}\n{off}'
  assert bool(note) == golden.cache_differs, line

  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  saved = copy.deepcopy(model).to(torch.bfloat16)
  for key, buffer in model.named_buffers():
    if any(part in key for part in golden.fixed):
      module, _, attribute = key.rpartition('.')
      setattr(saved.get_submodule(module), attribute, buffer)
  saved.save_pretrained(folder, max_shard_size=golden.max_shard_size)
  for path in folder.glob('*.safetensors'):
    tensors = load_file(path)
    if (published := golden.files(tensors)) is not tensors:
      save_file(published, path, metadata={'format': 'pt'})
  assert torch.equal(logits_of(load(folder), tokens), logits), f'{name}: reloaded, it has other logits'
  if golden.hub:
    check_hub_config(folder, golden, tokens, logits)
  np.savez(folder / 'golden.npz', tokens=tokens.numpy().astype(np.int32), logits=logits.numpy(), note=note,
           prompts=prompts.numpy().astype(np.int32), continuations=continuations.numpy().astype(np.int32))
  return f'{sum(path.stat().st_size for path in folder.iterdir()) / 1024:5.0f} KiB  {line}'


def check(folders: list[Path]) -> bool:
  """Prints max |Δlogit| of each folder against its golden.npz, or that of the fixture of its name; whether all are equal."""
  good = True
  for folder in folders:
    golden = folder / 'golden.npz' if (folder / 'golden.npz').exists() else HERE / folder.name / 'golden.npz'
    stored = np.load(golden)
    try:
      logits = logits_of(load(folder), torch.from_numpy(stored['tokens']).long()).numpy()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
      good, result = False, f'{type(error).__name__}: {error}'
    else:
      difference = np.abs(logits - stored['logits']).max() if logits.shape == stored['logits'].shape else np.inf
      relative = difference / np.abs(stored['logits']).max()
      good, result = good and relative <= 2e-4, f'{difference:10.2e}  {relative:10.2e}'
    print(f'{folder.name:24} {result}', flush=True)
  return good


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', nargs='+', metavar='NAME', default=list(MODELS), choices=list(MODELS))
  parser.add_argument('--check', nargs='+', metavar='DIR', type=Path)
  flags = parser.parse_args()
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  if flags.check:
    transformers.logging.set_verbosity_warning()  # its report of a file that it refuses
    print(f'{"folder":24} {"max |Δ|":>10}  {"relative":>10}')
    sys.exit(0 if check(flags.check) else 'not all are equal')
  for name in flags.only:
    print(make(name, MODELS[name]), flush=True)


if __name__ == '__main__':
  main()
