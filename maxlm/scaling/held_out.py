"""The headline of a fit: what it would have said of the next budget, before that was run.

R² within the sample says nothing about a forecast; a fit with R² > .99 can miss the next budget by 4 %.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from maxlm.scaling.chinchilla import Fit


@dataclass(frozen=True, slots=True)
class Row:
  """A fit of the runs up to a budget, scored on the runs of the next.

  error: mean of 100 (predicted / measured - 1), signed, and worst: the one of largest size; in percent. n: the N* that
  the fit recommends for the scored budget. deadweight: the part of that budget, in percent, that its N* and D* would
  have wasted, by the fit that has seen the budget too.
  """
  up_to: float
  budget: float
  fitted: int
  scored: int
  error: float
  worst: float
  n: float
  deadweight: float


def rolling(n, d, loss, flops, *, fit_function: Callable[..., Fit], budget=None, flops_per_nd: float = 6.0,
            least: int = 8) -> list[Row]:
  """Fits fit_function(n, d, loss) on budgets <= C_i and scores C_{i+1}, for each i with at least two budgets and `least`
  points. budget [M]: the group of each run (default: flops themselves are the budgets)."""
  n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
  budget = np.asarray(flops if budget is None else budget, np.float64)
  levels, rows = np.unique(budget), []
  for i in range(1, len(levels) - 1):
    seen, scored = budget <= levels[i], budget == levels[i + 1]
    if seen.sum() < least:
      continue
    law = fit_function(n[seen], d[seen], loss[seen]).law
    error = 100 * (law.loss(n[scored], d[scored]) / loss[scored] - 1)
    after = fit_function(n[seen | scored], d[seen | scored], loss[seen | scored]).law
    best_n, best_d, _ = law.optimum(levels[i + 1], flops_per_nd)
    needed = after.flops_of(after.loss(best_n, best_d), flops_per_nd)
    rows.append(Row(up_to=float(levels[i]), budget=float(levels[i + 1]), fitted=int(seen.sum()), scored=int(scored.sum()),
                    error=float(error.mean()), worst=float(error[np.argmax(np.abs(error))]), n=float(best_n),
                    deadweight=float(100 * (1 - needed / levels[i + 1]))))
  return rows
