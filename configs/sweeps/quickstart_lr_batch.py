"""Learning rate by batch at one size and length: where the best rate is, and how it moves with the batch.

    python -m maxlm.sweep --sweep=configs/sweeps/quickstart_lr_batch.py --workdir=runs/lr_batch --jobs=2

`quickstart_lr_batch.py:96` is the same at that width. A best run at an edge of the grid says that the grid is too small.
"""

import dataclasses

from configs.sweeps import quickstart_isoflop
from maxlm.config import Experiment
from maxlm.sweep import Run, member_of

TOKENS = 512 * 1024
ROWS = (2, 4, 8, 16)  # of 256 tokens
FACTORS = (0.25, 0.5, 1, 2, 4)  # of the rate that the family has


def get_sweep(arg: str = '') -> list[Run]:
  plain, runs = quickstart_isoflop.member(int(arg or 48), TOKENS), []
  for rows in ROWS:
    for factor in FACTORS:
      lr = factor * plain.optim.peak_lr
      runs.append(Run(experiment=dataclasses.replace(
        plain, name=f'd{plain.model.d_model}-b{rows}-lr{lr:.3g}', data=dataclasses.replace(plain.data, batch_size=rows),
        optim=dataclasses.replace(plain.optim, peak_lr=lr)), group=f'lr-b{rows}'))
  return runs


def get_config(name: str = '') -> Experiment:
  return member_of(get_sweep, name)
