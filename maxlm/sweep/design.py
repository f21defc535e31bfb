"""Which sizes and token counts a sweep should have. Plain functions for configs/sweeps/*.py."""

import math
from collections.abc import Callable, Sequence

from maxlm.config import Experiment
from maxlm.flops import matmul_params
from maxlm.sweep.count import total_flops, total_tokens
from maxlm.sweep.runs import Run

WIDEST = 4.0  # a parabola in log N is one only near its minimum: further out it moves it (arXiv 2603.22339, section 4)


def tokens_per_parameter(ratio: float) -> Callable[[float], float]:
  """FLOPs -> the parameters that are best where the best run has that many tokens for each, by C = 6 N D."""
  return lambda budget: math.sqrt(budget / (6 * ratio))


def isoflop(member: Callable[..., Experiment], sizes: Sequence[int], budgets: Sequence[float],
            best: Callable[[float], float], *, per_budget: int = 5, within: float = WIDEST, seeds: int = 2) -> list[Run]:
  """For each budget so many sizes within that many times of the forecast, spread evenly in log N as far as the family has
  them, each with the tokens that its exact FLOPs leave (attention counted, in whole steps); the nearest one with more seeds.

  member(size, tokens, name=…, seed=…): the family. best: FLOPs -> parameters that multiply a token (`params_active`): say
  `tokens_per_parameter(20)`, or `lambda budget: law.optimum(budget)[0]` of a law fitted to that count. ValueError where the
  family has fewer than three sizes there.
  """
  shortest = {size: member(size, 1) for size in sizes}
  params, runs = {size: matmul_params(shortest[size].model) for size in sizes}, []
  for budget in budgets:
    centre = best(budget)
    off = {size: math.log(params[size] / centre, within) for size in sizes}
    near = sorted((size for size in sizes if abs(off[size]) <= 1), key=lambda size: abs(off[size]))
    if len(near) < 3:
      raise ValueError(f'at {budget:.3g} FLOPs {centre:,.0f} parameters are forecast and the family has {len(near)} sizes '
                       f'within {within:g} times of them, between {min(params.values()):,} and {max(params.values()):,}')
    spread = {min(near, key=lambda size: abs(off[size] - (2 * i / (per_budget - 1) - 1))) for i in range(per_budget)}
    for size in sorted([*spread, *(size for size in near if size not in spread)][:per_budget]):
      tokens = budget * total_tokens(shortest[size]) / total_flops(shortest[size])
      step = member(size, round(tokens)).tokens_per_step
      for seed in range(seeds if size == near[0] else 1):
        name = f'c{budget:.3g}-d{size}'.replace('+', '').replace('.', 'p') + f'-seed{seed}' * (seed > 0)
        experiment = member(size, max(1, round(tokens / step)) * step, name=name, seed=seed)
        runs.append(Run(experiment=experiment, group=f'isoflop-{budget:.3g}'))
  return runs


def advice(runs: list[Run]) -> list[str]:
  """What a fit of the runs whose groups are named isoflop… will lack."""
  groups, said = {}, []
  for run in runs:
    if run.group.startswith('isoflop'):
      groups.setdefault(run.group, []).append(run.experiment)
  for group, members in groups.items():
    params = sorted({matmul_params(member.model) for member in members})
    if len(params) < 5:
      said.append(f'{group} has {len(params)} sizes: five or more show where its minimum is')
    if params[-1] > WIDEST**2 * params[0]:
      said.append(f'{group} reaches over {params[-1] / params[0]:.0f} times in size: a parabola fits within {WIDEST:g} '
                  'times of the forecast on both sides')
  budgets = [total_flops(members[0]) for members in groups.values()]
  if groups and max(budgets) < 98 * min(budgets):
    said.append(f'the budgets reach over {max(budgets) / min(budgets):.1f} times: an exponent wants two decades or more')
  if groups and len({run.experiment.seed for run in runs}) < 2:
    said.append('all runs have one seed: a second one at one size of each budget says how large the noise is')
  return said
