"""Approaches 1 and 2 of Hoffmann et al. (arXiv 2203.15556): checks beside the parametric fit, which is the default.

Both read optima off the data and fit powers of compute to them. Approach 2 is biased where the law is not symmetric
(alpha not beta, or sizes not centred): a parabola is not the law. Noise-free points of the Chinchilla surface, ±16× about
the optimum, give a D* that is 5 % low (Czech et al., arXiv 2603.22339).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Power:
  """y = coefficient C^exponent, by least squares of logarithms."""
  coefficient: float
  exponent: float

  def __call__(self, flops) -> np.ndarray:
    return self.coefficient * np.power(flops, self.exponent, dtype=np.float64)


def power(flops, y) -> Power:
  """Fits y [K] at flops [K]."""
  exponent, intercept = np.polyfit(np.log(flops), np.log(y), 1)
  return Power(float(np.exp(intercept)), float(exponent))


@dataclass(frozen=True, slots=True)
class Parabola:
  """A budget and the optimum of its runs. n, d, loss: at the minimum of loss against log N (d: against log D). left,
  right: runs on each side of it. width: largest over smallest N. centre: the geometric mean of the N that were run.
  coefficients: of loss = c0 x² + c1 x + c2, x = log N. problem: '' or why this optimum is none."""
  budget: float
  n: float
  d: float
  loss: float
  left: int
  right: int
  width: float
  centre: float
  coefficients: tuple[float, float, float]
  problem: str


def parabolas(n, d, loss, budget) -> list[Parabola]:
  """A quadratic in log N and one in log D for each budget [M] with at least three sizes (approach 2)."""
  n, d, loss, budget = (np.asarray(x, np.float64) for x in (n, d, loss, budget))
  found = []
  for level in np.unique(budget):
    group = budget == level
    x, y = np.log(n[group]), loss[group]
    if len(np.unique(x)) < 3:
      continue
    (at, low, curve), (at_d, _, curve_d) = _vertex(x, y), _vertex(np.log(d[group]), y)
    bad = 'the curve opens downwards' if curve[0] <= 0 or curve_d[0] <= 0 else \
      f'the optimum lies at the edge of the sizes, or beyond: run {"larger" if at > x.mean() else "smaller"} ones' \
      if not np.sort(x)[1] <= at <= np.sort(x)[-2] else ''
    found.append(Parabola(budget=float(level), n=_exp(at), d=_exp(at_d), loss=low, left=int((x < at).sum()),
                          right=int((x > at).sum()), width=float(np.exp(np.ptp(x))), centre=float(np.exp(x.mean())),
                          coefficients=curve, problem=bad))
  return found


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, tuple[float, float, float]]:
  middle = x.mean()  # uncentred, x² and x are nearly parallel
  p, q, r = np.polyfit(x - middle, y, 2)
  at = -q / (2 * p) if p else np.inf
  return float(middle + at), float(r - q * q / (4 * p)) if p else np.nan, \
    (float(p), float(q - 2 * p * middle), float(r - q * middle + p * middle ** 2))


def _exp(x: float) -> float:
  return float(np.exp(np.clip(x, -700, 700)))


def envelope(n, d, loss, flops, *, steps: int = 1500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Approach 1: (flops [K], N [K], D [K]) where a size has the least loss of all, over `steps` budgets.

  Sizes need runs at several D (whole schedules, or cool-downs of a trunk: a point of a running schedule is no optimum).
  Loss is interpolated in log-log; a budget counts where at least three sizes reach it and the best is neither the
  smallest nor the largest of them. Empty where there are fewer than three sizes with two lengths.
  """
  n, d, loss, flops = (np.asarray(x, np.float64) for x in (n, d, loss, flops))
  order = np.argsort(n, kind='stable')
  size = np.empty(len(n), int)
  size[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(n[order])) > .02)])
  grid = np.geomspace(flops.min(), flops.max(), steps)
  curves, tokens, sizes = [], [], []
  for s in np.unique(size):
    c, at = np.unique(flops[size == s], return_index=True)
    if len(c) > 1:
      each = [np.interp(np.log(grid), np.log(c), np.log(y[size == s][at]), left=np.inf, right=np.inf) for y in (loss, d)]
      curves.append(each[0])
      tokens.append(np.exp(each[1]))
      sizes.append(n[size == s].mean())
  if len(sizes) < 3:
    return np.empty(0), np.empty(0), np.empty(0)
  curves, k = np.array(curves), np.arange(steps)
  best, reach = np.argmin(curves, axis=0), np.isfinite(curves)
  first, last = np.argmax(reach, axis=0), len(sizes) - 1 - np.argmax(reach[::-1], axis=0)
  keep = (reach.sum(axis=0) >= 3) & (best > first) & (best < last)
  return grid[keep], np.array(sizes)[best[keep]], np.array(tokens)[best, k][keep]
