"""Laws of learning rate and batch, from the optima of grids (as Step Law is: Li et al. 2025, arXiv 2503.04715)."""

from dataclasses import dataclass

import numpy as np
import scipy.stats

from maxlm.scaling.columns import columns
from maxlm.scaling.optima import PowerLaw, fit_power


@dataclass(frozen=True, slots=True)
class Optimum:
  """The lowest place of a quadratic in logs, and the loss there. batch: None where the grid has one; rejected: '' or why it
  is not to be used."""
  learning_rate: float
  batch: float | None
  loss: float
  rejected: str


def optimum(learning_rate, loss, batch=None, *, within: float = .05, confidence: float = .95) -> Optimum:
  """Of a grid of runs [M] of one model and length. Runs that diverged (loss not finite) are left out, and those worse than
  the best by more than the share `within`: far from it a loss is no quadratic.

  Rejected: a best run at the edge of the grid, a lowest place outside it, a curvature that may be 0 at that confidence.
  ValueError if the runs that are left are no more than the coefficients of the quadratic: 3, with batches 6.
  """
  loss = np.asarray(loss, np.float64)
  use = np.isfinite(loss)
  use &= loss <= loss[use].min(initial=np.inf) * (1 + within)
  names = ['learning rate', 'batch']
  varied = batch is not None and len(np.unique(batch)) > 1
  grid = [np.asarray(x, np.float64) for x in (learning_rate, batch)[:1 + varied]]
  least = 7 if varied else 4
  if use.sum() < least or min(len(np.unique(x[use])) for x in grid) < 3:
    raise ValueError(f'{use.sum()} runs are within {within:.0%} of the best: a quadratic needs {least}, at three learning '
                     f'rates{" and three batches" * varied} or more')
  loss, *kept = columns(least, loss[use], *(x[use] for x in grid))
  middle = np.log(kept).mean(1)
  z = np.log(kept) - middle[:, None]
  pairs = [(i, j) for i in range(len(z)) for j in range(i, len(z))]
  design = np.stack([np.ones_like(loss), *z, *(z[i] * z[j] for i, j in pairs)], axis=1)
  found = np.linalg.lstsq(design, loss)[0]
  r, free = loss - design @ found, len(loss) - design.shape[1]
  covariance = np.linalg.pinv(design.T @ design) * (r @ r) / free
  hessian = np.zeros((len(z), len(z)))
  for (i, j), value in zip(pairs, found[1 + len(z):]):
    hessian[i, j] += value
    hessian[j, i] += value
  curvatures, directions = np.linalg.eigh(hessian)
  weights = np.array([2 * directions[i] * directions[j] for i, j in pairs])  # of the coefficients, in each curvature
  error = np.sqrt(np.diag(weights.T @ covariance[1 + len(z):, 1 + len(z):] @ weights))
  sure = curvatures > scipy.stats.t.ppf((1 + confidence) / 2, free) * error
  best = -np.linalg.solve(hessian, found[1:1 + len(z)])
  place = np.exp(best + middle)
  reasons = [f'curvature {c:.2g} +- {e:.1g} may be 0' for c, e, s in zip(curvatures, error, sure) if not s]
  for name, x, value in zip(names, grid, place):
    lowest = x[use][loss.argmin()]
    if lowest in (x.min(), x.max()):
      reasons.append(f'the best run is at the edge of the grid, {name} {lowest:.3g}')
    elif not x.min() < value < x.max():
      reasons.append(f'the lowest place, {name} {value:.3g}, is outside the grid')
  return Optimum(learning_rate=float(place[0]), batch=float(place[1]) if len(z) == 2 else None,
                 loss=float(found[0] + found[1:1 + len(z)] @ best / 2), rejected='; '.join(reasons))


def laws(optima: list[Optimum], params, tokens) -> tuple[PowerLaw, PowerLaw | None]:
  """(learning rate, batch) = k N^a D^b of grids [M], with their params and tokens; None for a batch not varied."""
  kept = [(o, n, d) for o, n, d in zip(optima, params, tokens, strict=True) if not o.rejected]
  if len(kept) < 4:
    raise ValueError(f'{len(kept)} of {len(optima)} optima are to be trusted, and a law needs 4: '
                     + '; '.join(dict.fromkeys(o.rejected for o in optima if o.rejected)))
  best, n, d = zip(*kept)
  rate = fit_power([n, d], [o.learning_rate for o in best])
  return rate, fit_power([n, d], [o.batch for o in best]) if all(o.batch for o in best) else None
