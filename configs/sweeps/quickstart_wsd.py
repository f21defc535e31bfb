"""Many lengths for little more than one: a trunk for each size at a constant rate, cool-downs that leave it at four places.

    python -m maxlm.sweep --sweep=configs/sweeps/quickstart_wsd.py --workdir=runs/wsd --jobs=2

A run of D tokens is the trunk's first 4/5 D and a decay over the last fifth, 1 - sqrt, to 0 (Hägele et al. 2024, arXiv
2405.18392): four lengths cost what the longest does and half as much again. The row of a trunk is one at a constant rate:
what is fitted is the group `wsd`.
"""

import dataclasses

from configs.sweeps import quickstart_isoflop
from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment, Stage
from maxlm.schedule import Schedule
from maxlm.sweep import Run, member_of

SIZES = quickstart_isoflop.SIZES
TAKEN = (32, 48, 64, 96)
STEPS = (200, 400, 800, 1600)  # of a trunk, after which a run leaves it for a quarter as many
STEP_TOKENS = 1024


def trunk(size: int, steps: int) -> Experiment:
  """The family of quickstart_isoflop at a constant rate, after a warm-up that is as long at every length."""
  plain = quickstart_isoflop.member(size, steps * STEP_TOKENS, name=f'd{size}-trunk')
  lr = Schedule(peak_lr=plain.optim.peak_lr, warmup_tokens=20 * STEP_TOKENS)
  return dataclasses.replace(
    plain, tokens=0, optim=dataclasses.replace(plain.optim, peak_lr=0.0, schedule='wsd', warmup_tokens=0),
    checkpoint=CheckpointConfig(keep_every=min(STEPS)), stages=(Stage(name='stable', tokens=plain.tokens, lr=lr),))


def get_sweep(arg: str = '') -> list[Run]:
  runs = []
  for size in TAKEN:
    whole = trunk(size, max(STEPS))
    runs.append(Run(experiment=whole, group='trunk'))
    for steps in STEPS:
      tokens = steps * STEP_TOKENS // 4
      lr = Schedule(peak_lr=whole.stages[0].lr.peak_lr, decay_tokens=tokens, decay_shape='sqrt')
      branch = dataclasses.replace(whole, name=f'd{size}-s{steps}', checkpoint=CheckpointConfig(),
                                   stages=(*whole.stages, Stage(name='anneal', tokens=tokens, lr=lr)))
      runs.append(Run(experiment=branch, branch=(whole.name, steps), stages=('anneal',), group='wsd'))
  return runs


def get_config(name: str = '') -> Experiment:
  return member_of(get_sweep, name)
