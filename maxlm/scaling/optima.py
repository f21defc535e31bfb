"""Power laws through the optima of budgets, and how sure an optimum is (Porian et al. 2024, arXiv 2406.19146)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.interpolate

from maxlm.scaling.columns import columns


@dataclass(frozen=True, slots=True)
class PowerLaw:
  """y = coefficient * x1^e1 * x2^e2 …; sd: standard errors of the exponents; r2: of log y, without weights."""
  coefficient: float
  exponents: tuple[float, ...]
  sd: tuple[float, ...]
  r2: float

  def at(self, *x) -> np.ndarray:
    return self.coefficient * np.prod([np.power(np.asarray(v, np.float64), e) for v, e in zip(x, self.exponents)], axis=0)


def fit_power(x, y, sd=None) -> PowerLaw:
  """Linear regression of log y [M] on the logs of x [K, M]; sd [M]: of log y, a point weighs 1 / sd²."""
  *x, y = columns(len(x) + 1, *x, y)
  terms = np.stack([np.ones_like(y), *np.log(x)], axis=1)
  middle = terms.mean(0) * [0, *[1] * len(x)]
  root = np.ones_like(y) if sd is None else 1 / columns(len(y), sd, y)[0]
  design = (terms - middle) * root[:, None]
  if np.linalg.matrix_rank(design) < design.shape[1]:
    raise ValueError('the points differ in too few directions for these exponents: vary each of the variables on its own')
  found = np.linalg.lstsq(design, np.log(y) * root)[0]
  r = np.log(y) - (terms - middle) @ found
  noise = (r * root) @ (r * root) / max(len(y) - design.shape[1], 1)
  errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * noise)
  return PowerLaw(coefficient=float(np.exp(found[0] - middle @ found)), exponents=tuple(map(float, found[1:])),
                  sd=tuple(map(float, errors[1:])), r2=float(1 - r @ r / np.square(np.log(y) - np.log(y).mean()).sum()))


@dataclass(frozen=True, slots=True)
class NoisyOptimum:
  """x: median of the best x over draws of noise; sd: of log x; inside: share of draws whose best x is not at an end."""
  x: float
  sd: float
  inside: float


def seed_noise(loss) -> np.ndarray:
  """Standard deviation of a loss over seeds: log-linear from .005 at 3 nats to .1 at 6 (Porian et al., appendix)."""
  return np.exp(np.interp(loss, [3, 6], np.log([.005, .1])))


def noisy_optimum(x, loss, *, noise: Callable = seed_noise, samples: int = 1000, seed: int = 0) -> NoisyOptimum:
  """The best x (parameters or tokens) of an isoFLOP curve, x and loss [M].

  Each draw adds noise(loss) to the losses and takes the lowest place of Akima's interpolation of log loss over log x; sd is
  no less than a third of the grid's step, and grows by what is lost at the ends. ValueError if most draws have their best
  there: the grid does not hold the optimum.
  """
  x, loss = columns(3, x, loss)
  order = np.argsort(x)
  x, loss = np.log(x[order]), loss[order]
  if np.any(np.diff(x) <= 0):
    raise ValueError('a size stands twice in an isoFLOP curve: keep the better run, or their mean')
  draws = np.random.default_rng(seed).normal(loss, noise(loss), (samples, len(loss)))
  fine = np.linspace(x[0], x[-1], 25 * (len(x) - 1))
  lowest = scipy.interpolate.Akima1DInterpolator(x, np.log(draws), axis=1)(fine).argmin(1)
  inner = lowest[(lowest > 0) & (lowest < len(fine) - 1)]
  if 2 * len(inner) < samples:
    raise ValueError(f'the best size is at an end of the grid in {1 - len(inner) / samples:.0%} of draws: extend the grid')
  sd = max(fine[inner].std(), np.diff(x).mean() / 3) * samples / len(inner)
  return NoisyOptimum(x=float(np.exp(np.median(fine[inner]))), sd=float(sd), inside=len(inner) / samples)
