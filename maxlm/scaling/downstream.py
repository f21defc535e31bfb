"""Accuracy of a task in two steps: parameters and tokens -> the task's loss -> its accuracy (arXiv 2412.04403).

The first step is Chinchilla's law of the task's loss (bits per byte of the right answers); the second is here.
"""

from dataclasses import dataclass

import numpy as np

from maxlm.scaling import solve
from maxlm.scaling.columns import columns


@dataclass(frozen=True, slots=True)
class Curve:
  """accuracy = b + a / (1 + e^(-k (L - L0))): 0 to 1; a is negative, b is what a loss of 0 comes to, a + b chance."""
  a: float
  middle: float
  k: float
  b: float

  def accuracy(self, loss) -> np.ndarray:
    return self.b + self.a / (1 + np.exp(-self.k * (np.asarray(loss, np.float64) - self.middle)))


def pooled(runs, *, window: int = 5, skip: float = .1) -> tuple[np.ndarray, np.ndarray]:
  """(losses, accuracies) of the checkpoints of all runs, [(losses, accuracies) in order of training]: moving averages over
  `window`, without the first share `skip` of each run."""
  smooth = [[np.convolve(values, np.ones(window) / window, 'valid') for values in columns(window, *run)] for run in runs]
  late = [[values[int(np.ceil(skip * len(values))):] for values in run] for run in smooth]
  return np.concatenate([loss for loss, _ in late]), np.concatenate([accuracy for _, accuracy in late])


def fit(loss, accuracy) -> Curve:
  """Least squares of [M] checkpoints and of the point (0, 1), with a in [-1, 0] and b in [0, 1]."""
  loss, accuracy = columns(5, loss, accuracy)
  if accuracy.max() > 1:
    raise ValueError(f'an accuracy of {accuracy.max():g}: give shares, 0 to 1')
  x, y = np.append(loss, 0), np.append(accuracy, 1)

  def residuals(p):
    a, middle, k, b = p
    s = 1 / (1 + np.exp(-k * (x - middle)))
    return b + a * s - y, np.stack([s, -a * k * s * (1 - s), a * (x - middle) * s * (1 - s), np.ones_like(s)], axis=1)

  starts = [(-.7, middle, k / loss.mean(), b) for middle in np.quantile(loss, [0, .5, 1])
            for k in (2, 5, 10) for b in (.9, 1.)]
  bounds = [(-1, 0), (0, 4 * loss.max()), (0, 60 / loss.mean()), (0, 1)]
  return Curve(*map(float, solve.least(residuals, solve.Squares(), starts, bounds).x))


def wander(accuracy, last: int = 10) -> float:
  """Standard deviation over a run's last checkpoints: a task that wanders by more than its trend cannot be forecast."""
  return float(np.std(np.asarray(accuracy, np.float64)[-last:]))
