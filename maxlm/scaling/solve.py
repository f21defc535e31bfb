"""The one solver of every scaling law: named objectives over residuals, and a descent that does not stop early.

L-BFGS-B compares an improvement with max(|f|, 1), so on a sum of 1e-3 its relative tolerance is an absolute one, and it
stops far from the optimum: that is how the exponents of Hoffmann et al. (arXiv 2203.15556, approach 3) came about
(Besiroglu et al., arXiv 2404.10102). Here f is divided by its own value, again and again, until nothing is gained;
gradients are analytic and all is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.optimize

ROUNDS = 40
GAIN = 1e-13  # a round that gains less than this part of the value is the last
LADDER = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # deltas
SAME = 1e-6  # ends whose values differ by less than this part lie in one basin
NOTHING = 1e-12  # a value below this is an exact fit


@dataclass(frozen=True, slots=True)
class Huber:
  """Sum of r²/2 where |r| <= delta, and of delta (|r| - delta/2) beyond."""
  delta: float = 1e-3

  def value(self, r: np.ndarray) -> float:
    size = np.abs(r)
    return float(np.where(size <= self.delta, r * r / 2, self.delta * (size - self.delta / 2)).sum())

  def slope(self, r: np.ndarray) -> np.ndarray:
    return np.clip(r, -self.delta, self.delta)

  def __str__(self) -> str:
    return f'Huber, delta {self.delta:g}'


@dataclass(frozen=True, slots=True)
class Squares:
  """Sum of r²/2."""
  delta: ClassVar[float] = np.inf

  def value(self, r: np.ndarray) -> float:
    return float(r @ r) / 2

  def slope(self, r: np.ndarray) -> np.ndarray:
    return r

  def __str__(self) -> str:
    return 'squares'


@dataclass(frozen=True, slots=True)
class Absolute:
  """Sum of |r|. It has kinks: `least` comes to it, as to a small delta, through Hubers of ever smaller delta."""
  delta: ClassVar[float] = 0.0

  def value(self, r: np.ndarray) -> float:
    return float(np.abs(r).sum())

  def slope(self, r: np.ndarray) -> np.ndarray:
    return np.sign(r)

  def __str__(self) -> str:
    return 'absolute'


Objective = Huber | Squares | Absolute
HUBER = Huber(1e-3)  # the delta of Hoffmann et al.: comparable, and nearly least absolute where residuals are 5e-3


@dataclass(frozen=True, slots=True)
class Solution:
  """x: [P] the best end; value: there; values: [S] where each start ended, ascending; at_bound: x that lie on a bound."""
  x: np.ndarray
  value: float
  values: np.ndarray
  at_bound: tuple[int, ...]

  @property
  def second(self) -> float | None:
    """Value of the second-best basin that a start fell into; None if all fell into one."""
    others = self.values[self.values > self.value + SAME * abs(self.value) + NOTHING]
    return float(others[0]) if others.size else None

  @property
  def spread(self) -> float:
    """How far apart the starts ended: (worst - best) / best."""
    return float((self.values[-1] - self.value) / max(abs(self.value), NOTHING))


def minimise(fun: Callable[[np.ndarray], tuple[float, np.ndarray]], starts, bounds=None) -> Solution:
  """Minimises fun(x [P]) -> (value, gradient [P]) from each of starts [S, P] within bounds [P, 2] (two equal ends hold an
  x fixed). Bring x to order 1 (centre logarithms): the solver scales the value, not the variables. Raises ValueError if
  no start has a finite value.
  """
  return _best([fun], starts, bounds)


def least(residuals: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], objective: Objective, starts,
          bounds=None) -> Solution:
  """Minimises the objective over residuals(x [P]) -> (r [M], dr/dx [M, P]), as `minimise` does."""
  def of(objective):
    def fun(x):
      r, jacobian = residuals(x)
      return objective.value(r), objective.slope(r) @ jacobian
    return fun
  # Kinks stop a quasi-Newton method: a narrow Huber is come to through wider ones.
  wider = [Huber(delta) for delta in LADDER if objective.delta < delta] if objective.delta < HUBER.delta else []
  return _best([of(step) for step in (*wider, objective)], starts, bounds)


def _best(funs: list, starts, bounds) -> Solution:
  """From each start through all funs, each from where the one before ended; the last is what counts."""
  starts = np.atleast_2d(np.asarray(starts, np.float64))
  if bounds is None:
    bounds = np.tile([-np.inf, np.inf], (starts.shape[1], 1))
  bounds = np.asarray(bounds, np.float64)
  ends = []
  for x in np.clip(starts, *bounds.T):
    for fun in funs:
      x, value = _descend(fun, x, bounds)
    if np.isfinite(value):
      ends.append((value, x))
  if not ends:
    raise ValueError('the objective is not finite at any start: check the data for zeros, and the bounds')
  ends.sort(key=lambda end: end[0])
  value, x = ends[0]
  slack = 1e-6 * np.maximum(1, np.abs(x))
  held = (bounds[:, 0] < bounds[:, 1]) & ((x - bounds[:, 0] <= slack) | (bounds[:, 1] - x <= slack))
  return Solution(x, value, np.array([end[0] for end in ends]), tuple(int(i) for i in np.flatnonzero(held)))


def _descend(fun, x: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
  value = fun(x)[0]
  for _ in range(ROUNDS):
    if not np.isfinite(value) or value == 0:
      break
    scale = 1 / abs(value)

    def scaled(x, scale=scale):
      value, gradient = fun(x)
      return value * scale, gradient * scale

    found = scipy.optimize.minimize(scaled, x, jac=True, method='L-BFGS-B', bounds=bounds, options={
      'maxcor': 30, 'ftol': 1e-15, 'gtol': 1e-11, 'maxiter': 2000, 'maxfun': 10_000, 'maxls': 60})
    new = found.fun / scale
    if not new < value:
      break
    gain, x, value = (value - new) / abs(value), found.x, new
    if gain < GAIN:
      break
  return x, float(value)
