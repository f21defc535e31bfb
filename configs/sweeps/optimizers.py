"""AdamW, Muon and AdEMAMix on the quickstart, each over a grid of learning rates and decays.

    python -m maxlm.sweep --sweep=configs/sweeps/optimizers.py --workdir=runs/optimizers

An optimizer is compared at its own best learning rate and decay, by the held-out loss at the end of the run: neither its
rank in the middle nor that at another's rate says which is better (Wen et al. 2025, arXiv 2509.02046). `:tiny` is a third
of the tokens. The table has an optimizer's runs as a group, whose best is marked.
"""

import dataclasses

from configs import quickstart
from maxlm.config import Experiment
from maxlm.sweep import Run, member_of

OPTIMIZERS = ('adamw', 'muon', 'ademamix')
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
DECAYS = (0.1,)
SEEDS = (0,)


def get_sweep(arg: str = '') -> list[Run]:
  if arg not in ('', 'tiny'):
    raise ValueError(f'optimizers.py:{arg}: after the colon say tiny, or nothing')
  plain, part, runs = quickstart.get_config(), 3 if arg else 1, []
  tokens = plain.tokens // part
  for optimizer in OPTIMIZERS:
    # AdEMAMix: a mean over 1,000 steps, of runs that have hundreds, which comes in over the first quarter.
    own = {'b3': 0.999, 'slow_warmup_steps': tokens // (4 * plain.tokens_per_step)} if optimizer == 'ademamix' else {}
    for lr in RATES:
      for decay in DECAYS:
        for seed in SEEDS:
          optim = dataclasses.replace(plain.optim, optimizer=optimizer, peak_lr=lr, weight_decay=decay, **own,
                                      warmup_tokens=tokens // 20, decay_tokens=tokens // 2)
          runs.append(Run(experiment=dataclasses.replace(plain, name=f'{optimizer}-lr{lr:g}-wd{decay:g}-seed{seed}',
                                                         optim=optim, tokens=tokens, seed=seed), group=optimizer))
  return runs


def get_config(name: str = '') -> Experiment:
  return member_of(get_sweep, name)
