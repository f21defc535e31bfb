"""Training on repeated data: what an epoch is worth (Muennighoff et al. 2023, arXiv 2305.16264)."""

import dataclasses

import numpy as np
import scipy.optimize

from maxlm.scaling import solve
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.columns import columns


@dataclasses.dataclass(frozen=True, slots=True)
class Repeated:
  """Chinchilla's law (q = 1) at effective tokens D' = U + U R* (1 - e^(-R / R*)), where U unique tokens are repeated
  R = D / U - 1 times, and at effective parameters, the same beyond those that U is best used with (their equations 5, 6)."""
  law: Chinchilla
  data_decay: float = 15.387756  # R*_D: repeats after which 1 - 1/e of all that repeating can give is had
  params_decay: float = 5.309743  # R*_N

  def effective(self, n, d, unique) -> tuple[np.ndarray, np.ndarray]:
    """(N', D') of n parameters and d tokens of training over `unique` tokens (broadcast)."""
    n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
    unique = np.minimum(unique, d)
    ratio = (self.law.alpha * self.law.A / (self.law.beta * self.law.B)) ** (1 / (self.law.alpha + self.law.beta))
    enough = np.minimum((unique * ratio) ** (self.law.beta / self.law.alpha) * ratio, n)
    return _decayed(enough, n, self.params_decay), _decayed(unique, d, self.data_decay)

  def loss(self, n, d, unique) -> np.ndarray:
    return self.law.loss(*self.effective(n, d, unique))

  def optimum(self, flops: float, unique: float, flops_per_nd: float = 6.0) -> tuple[float, float, float]:
    """(N*, D*, L*) for a budget: more epochs and fewer parameters than the law of fresh data says."""
    nd = flops / flops_per_nd

    def value(x):
      return self.loss(np.exp(x), nd / np.exp(x), unique)

    # The law has a kink where parameters begin to decay: look everywhere first.
    grid = np.log(self.law.optimum(flops, flops_per_nd)[0]) + np.linspace(-12, 12, 481)
    best = grid[value(grid).argmin()]
    found = scipy.optimize.minimize_scalar(value, bounds=(best - .05, best + .05), options={'xatol': 1e-10})
    n = float(np.exp(found.x))
    return n, nd / n, float(found.fun)


# C4, appendix A
MUENNIGHOFF = Repeated(Chinchilla(*map(float, np.exp([.6254804, 6.255414, 7.3049974])), .3526596, .3526596))


def fit(law: Chinchilla, n, d, unique, loss, objective: solve.Objective = solve.HUBER) -> Repeated:
  """The two decays from [M] runs, the law of fresh data given. It only levels off: drop runs that repeating made worse."""
  n, d, unique, loss = columns(3, n, d, unique, loss)
  if not np.any(d > 1.5 * unique):
    raise ValueError('no run repeats its data by more than a half: these runs say nothing of repeats')

  def law_of(x):
    return Repeated(law, *np.exp(x))

  def residuals(x):
    at, step = np.log(law_of(x).loss(n, d, unique)), 1e-5
    ahead = [np.log(law_of(x + h).loss(n, d, unique)) - np.log(law_of(x - h).loss(n, d, unique)) for h in np.eye(2) * step]
    return at - np.log(loss), np.stack(ahead, axis=1) / (2 * step)  # central differences: good to 1e-10

  solution = solve.least(residuals, objective, [(np.log(a), np.log(b)) for a in (2, 10, 40) for b in (2, 10, 40)],
                         [(-3, 8), (-3, 8)])
  if solution.at_bound:
    raise ValueError('a decay ran to its bound: these runs do not hold it, add runs of more epochs or of more parameters')
  return Repeated(law, *map(float, np.exp(solution.x)))


def _decayed(fresh: np.ndarray, total: np.ndarray, decay: float) -> np.ndarray:
  return fresh + fresh * decay * -np.expm1(-(total / fresh - 1) / decay)
