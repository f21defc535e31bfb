"""The mean of the weights of several checkpoints, as a checkpoint that every command takes.

    python -m maxlm.average DIR@A DIR@B … --out=DIR [--weights=1,2]      of these
    python -m maxlm.average DIR --last=4 --out=DIR                       of the last four that a run has
    python -m maxlm.average DIR@A --ema --out=DIR                        of `optim.ema`: the running mean of the run itself

They are of one architecture and one tokenizer, of one run or of several. docs/report.md says what it is good for.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm import flags
from maxlm.checkpoint import Checkpoints, find, lineage, parse
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.restore import COMPANIONS, load_params, lora_of, model_of
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.start import differences, write_atomically, writing_to

OUT = flags.DEFINE_string('out', '', 'directory for the mean: a workdir with one checkpoint')
WEIGHTS = flags.DEFINE_list('weights', [], 'what each checkpoint counts, in their order: 1,2,1 (default: all the same)')
LAST = flags.DEFINE_integer('last', 1, 'where a DIR is named without a step: its newest so many checkpoints')
EMA = flags.DEFINE_bool('ema', False, 'take the running mean that each run has kept (optim.ema) for its weights')


@dataclasses.dataclass(kw_only=True, slots=True)
class Member:
  """A checkpoint that the mean is of. weight: its part, all of which sum to 1."""

  checkpoints: Checkpoints
  step: int
  meta: dict[str, Any]
  weight: float

  @property
  def workdir(self) -> Path:
    return Path(self.checkpoints.directory).parent

  @property
  def name(self) -> str:
    return f'{self.workdir}@{self.step}'


def main(words: list[str]) -> int:
  if not words or not OUT.value:
    raise ValueError('say which checkpoints, and where the mean goes: python -m maxlm.average DIR@A DIR@B … --out=DIR')
  members = find_members(words, LAST.value, WEIGHTS.value)
  step = write(members, Path(OUT.value), EMA.value)
  for member in members:
    print(f'  {member.weight:.4g} x {member.name}' + ', its running mean' * EMA.value)
  print(f'{OUT.value}: their mean, as step {step:,}')
  return 0


def find_members(words: list[str], last: int, weights: list[str]) -> list[Member]:
  """The checkpoints that are named. FileNotFoundError or ValueError, in one line, for what is not there or does not belong
  together."""
  if last < 1:
    raise ValueError(f'--last={last} must be at least 1')
  named = []
  for word in words:
    checkpoints, step = find(word)
    steps = [step] if parse(word)[1] is not None else checkpoints.steps()[-last:]
    if parse(word)[1] is None and len(steps) < last:
      raise ValueError(f'{word} has {len(steps)} checkpoints, fewer than --last={last}: the run keeps more with '
                       '--config.checkpoint.keep_last or keep_every')
    named += [(checkpoints, step) for step in steps]
  parts = numbers(weights, len(named))
  members = [Member(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step), weight=part)
             for (checkpoints, step), part in zip(named, parts)]
  for i, member in enumerate(members):
    if member.name in [other.name for other in members[:i]]:
      raise ValueError(f'{member.name} is named twice: say what it counts with --weights')
    check_same_kind(members[0], member)
  return members


def numbers(weights: list[str], n: int) -> list[float]:
  """Shares that sum to 1. ValueError unless there are n positive numbers, or none."""
  try:
    values = [float(weight) for weight in weights] or [1.0] * n
  except ValueError:
    raise ValueError(f'--weights={",".join(weights)}: numbers, one for each checkpoint') from None
  if len(values) != n:
    raise ValueError(f'--weights={",".join(weights)} are {len(values)} numbers for {n} checkpoints')
  if not all(0 < value < float('inf') for value in values):
    raise ValueError(f'--weights={",".join(weights)} must all be above 0')
  return [value / sum(values) for value in values]


def check_same_kind(first: Member, other: Member) -> None:
  """ValueError where their weights do not mean the same."""
  for member in (first, other):
    if lora_of(member.meta) is not None:
      raise ValueError(f'{member.name} holds adapters, whose products the mean of A and of B is not: merge each with its '
                       f'model first, `python -m maxlm.hf export {member.name} HF_DIR` and `import HF_DIR DIR`')
  for key, one, two in differences(model_of(first.meta), model_of(other.meta), DecoderConfig):
    raise ValueError(f'{other.name} is another model than {first.name}: model.{key} is {two}, not {one}')
  if tokenizer_of(first) != tokenizer_of(other):
    raise ValueError(f'{other.name} has another tokenizer.json than {first.name}: their embeddings are of other tokens')
  for key in ('bos', 'eot'):
    one, two = first.meta.get(key), other.meta.get(key)
    if None not in (one, two) and one != two:
      raise ValueError(f'{other.name} has another {key} than {first.name}: {two}, not {one}')


def tokenizer_of(member: Member) -> bytes | None:
  path = member.workdir / 'tokenizer.json'
  return path.read_bytes() if path.is_file() else None


def write(members: list[Member], out: Path, ema: bool) -> int:
  """Writes the workdir `out`, over all devices of this machine; returns the step of its checkpoint: that of the newest
  member, whose config, stage, tokens and place in the data the mean has too. FileExistsError if a model is there."""
  checkpoints = Checkpoints(out / 'checkpoints')
  if len(members) == 1 and not ema:
    raise ValueError(f'{members[0].name} alone has no mean: name others, DIR@A DIR@B …, or give --last')
  if checkpoints.steps() or (out / 'metrics.jsonl').exists():
    raise FileExistsError(f'{out} is the workdir of a model already: give a new --out')
  newest = max(members, key=lambda member: (member.meta.get('tokens', 0), member.step))
  with jax.set_mesh(make_mesh(MeshConfig())):
    params = mean(members, ema)
    with writing_to(out):
      out.mkdir(parents=True, exist_ok=True)
      for name in ('tokenizer.json', *COMPANIONS):
        if (newest.workdir / name).is_file():
          shutil.copyfile(newest.workdir / name, out / name)
      if 'config' in newest.meta:
        write_atomically(out / 'config.json', json.dumps(newest.meta['config'], indent=2, allow_nan=False) + '\n')
    checkpoints.save(newest.step, params=params, meta={**newest.meta, 'lineage': heritage(members, newest, out, ema)})
    checkpoints.close()
  return newest.step


def mean(members: list[Member], ema: bool) -> Decoder:
  """The weighted mean of their weights in fp32, one checkpoint after the other: two models are held at a time.

  m <- m + w / W (x - m), with W the sum of the weights so far: of equal values the mean is these, bit for bit.
  """
  total, so_far = None, 0.0
  for member in members:
    params = load_params(member.checkpoints, member.step, ema=ema)
    so_far += member.weight
    total = params if total is None else moved(total, params, member.weight / so_far)
    del params
  return total


@jax.jit(donate_argnums=0)
def moved(total: Decoder, params: Decoder, share: jax.Array) -> Decoder:
  """`total` a share of the way towards `params`. What is equal stays: -0 + 0 would be 0."""
  return jax.tree.map(lambda m, x: jnp.where(x == m, m, m + share * (x - m)), total, params)


def heritage(members: list[Member], newest: Member, out: Path, ema: bool) -> dict[str, Any]:
  """The lineage of a mean: a run of its own, whose parent is the newest member, and `parents` all of them."""
  def of(member):
    return {'run': member.meta['lineage']['run'], 'step': member.step, 'path': str(member.workdir.absolute()),
            'from_here': os.path.relpath(member.workdir, out)}

  parents = [{**of(member), 'weight': member.weight, 'ema': ema} for member in members]
  return {**lineage(of(newest)), 'parents': parents}


if __name__ == '__main__':
  flags.run(main, words=True)
