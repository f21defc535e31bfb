"""How far a fit is to be trusted: resampled runs, redrawn noise, and intervals of what they say at a budget.

Every resample is fitted by the solver of the fit itself, with its tolerances: a bootstrap that stops early gives
intervals that are far too narrow (Besiroglu et al., arXiv 2404.10102, on Hoffmann et al.).
"""

from collections.abc import Callable

import numpy as np

from maxlm.scaling.chinchilla import Chinchilla, Fit


def bootstrap(fit_function: Callable[..., Fit], n, d, loss, *, clusters=None, samples: int = 1000, seed: int = 0
              ) -> list[Chinchilla]:
  """Laws of fit_function(n, d, loss) on `samples` resamples with replacement: of points, or of whole clusters ([M] labels;
  checkpoints and cool-downs of one trunk share their noise). Let fit_function start from the fit of all points."""
  n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
  _, label = np.unique(np.arange(len(n)) if clusters is None else clusters, return_inverse=True)
  members = [np.flatnonzero(label == g) for g in range(label.max() + 1)]
  rng, laws = np.random.default_rng(seed), []
  for _ in range(samples):
    chosen = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
    laws.append(fit_function(n[chosen], d[chosen], loss[chosen]).law)
  return laws


def with_seed_noise(fit_function: Callable[..., Fit], n, d, loss, sd, *, samples: int = 1000, seed: int = 0
                    ) -> list[Chinchilla]:
  """Parametric bootstrap: laws of the losses that the fit predicts plus normal noise of sd (one or [M], units of loss):
  what another set of seeds would have said. `seed_sd` gives an sd where there are no repeated runs."""
  n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
  predicted = fit_function(n, d, loss).law.loss(n, d)
  rng = np.random.default_rng(seed)
  return [fit_function(n, d, predicted + sd * rng.standard_normal(len(loss))).law for _ in range(samples)]


def seed_sd(loss) -> np.ndarray:
  """Standard deviation over seeds of a loss in nats a token: log-linear from .005 at 3 to .1 at 6 (Porian et al., arXiv
  2406.19146, appendix)."""
  return .005 * 20 ** ((np.asarray(loss, np.float64) - 3) / 3)


def interval(values, level: float = .8) -> tuple[float, float]:
  """The central interval that holds `level` of values."""
  low, high = np.quantile(np.asarray(values, np.float64), [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def optima(laws: list[Chinchilla], budget: float, *, level: float = .8, flops_per_nd: float = 6.0
           ) -> dict[str, tuple[float, float]]:
  """Intervals of 'N*' parameters, 'D*' tokens, 'D/N' and 'L*' at budget FLOPs."""
  n, d, loss = np.array([law.optimum(budget, flops_per_nd) for law in laws], np.float64).T
  return {name: interval(values, level) for name, values in (('N*', n), ('D*', d), ('D/N', d / n), ('L*', loss))}
