"""The law of loss in parameters and tokens: its frontier, and its fit (Hoffmann et al., arXiv 2203.15556, approach 3).

    fit = chinchilla.fit(n, d, loss)                 # [M] parameters, tokens, nats a token (or bits per byte)
    n, d, loss = fit.law.optimum(1e22)               # FLOPs

Residuals are log(predicted) - log(measured). The fit is global by construction: for each (alpha, beta) of a grid the
best E, A, B is a non-negative linear problem (variable projection: Golub and Pereyra 1973; Czech et al., arXiv
2603.22339), and the lowest places of that grid are the starts of the descent in log-sum-exp form.
"""

from dataclasses import dataclass, field

import numpy as np
import scipy.optimize

from maxlm.scaling import solve
from maxlm.scaling.solve import HUBER, Objective

EXPONENTS = np.geomspace(.03, 1.6, 20)  # of the grid
RANGE = .005, 4  # of an exponent in the descent
STARTS = 6
KAPLAN = .04, .08, .15, .3  # starts of the exponents in that form
NAMES = 'E', 'A', 'B', 'alpha', 'beta', 'q'
FREE = {'chinchilla': (0, 1, 2, 3, 4), 'nesting': (0, 1, 2, 3, 4, 5), 'kaplan': (1, 2, 3, 4)}  # of NAMES, by form


@dataclass(frozen=True, slots=True)
class Chinchilla:
  """L = E + [(A N^-alpha)^(1/q) + (B D^-beta)^(1/q)]^q; q = 1 is Hoffmann's law, E = 0 and q = beta that of Kaplan et al.
  (arXiv 2001.08361, equation 1.5). N parameters, D tokens; L in the units of the losses that it was fitted to."""
  E: float
  A: float
  B: float
  alpha: float
  beta: float
  q: float = 1.0

  def loss(self, n, d) -> np.ndarray:
    """L at n parameters and d tokens (broadcast)."""
    terms = self.A * np.power(n, -self.alpha, dtype=np.float64), self.B * np.power(d, -self.beta, dtype=np.float64)
    return self.E + (terms[0] ** (1 / self.q) + terms[1] ** (1 / self.q)) ** self.q

  def optimum(self, flops, flops_per_nd: float = 6.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N*, D*, L*): the least loss where flops = flops_per_nd N D. Arrays like flops."""
    nd = np.asarray(flops, np.float64) / flops_per_nd
    ratio = self.alpha / self.beta * (self.A / self.B) ** (1 / self.q)
    g = ratio ** (self.q / (self.alpha + self.beta))
    n = g * nd ** (self.beta / (self.alpha + self.beta))
    return n, nd / n, self.loss(n, nd / n)

  def flops_of(self, loss, flops_per_nd: float = 6.0) -> np.ndarray:
    """The FLOPs whose optimum has this loss: the inverse of L*(C). Infinite at and below E."""
    at_one = self.optimum(1.0, flops_per_nd)[2] - self.E  # (L* - E) is a power of C
    over = np.maximum(np.asarray(loss, np.float64) - self.E, 0)
    with np.errstate(divide='ignore'):
      return (at_one / over) ** ((self.alpha + self.beta) / (self.alpha * self.beta))


@dataclass(frozen=True, slots=True)
class Fit:
  """A law and how far it is to be trusted.

  value: of the objective, a sum over points. residuals: [M], log(predicted / measured). delta_over_mad: the objective's
  delta over the median |residual - median| (far below 1: nearly least absolute; far above: nearly least squares). basins:
  (best, second-best value or None, spread over starts). bound_hits: parameters that ended on a bound, E too where it is
  nothing. condition: of the Gauss-Newton matrix with unit columns, logarithms centred. max_correlation: the greatest
  |correlation| of two fitted parameters in that matrix, not centred.
  """
  law: Chinchilla
  form: str
  objective: Objective
  value: float
  residuals: np.ndarray = field(repr=False)
  delta_over_mad: float
  basins: tuple[float, float | None, float]
  bound_hits: tuple[str, ...]
  condition: float
  max_correlation: float


def fit(n, d, loss, *, objective: Objective = HUBER, starts: list[Chinchilla] | None = None,
        form: str = 'chinchilla') -> Fit:
  """Fits n, d, loss [M]. form: 'chinchilla' (q = 1), 'nesting' (q free) or 'kaplan' (E = 0, q = beta). starts: laws to
  descend from, in place of the grid (a bootstrap starts from the fit of all points)."""
  n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
  if form not in FREE:
    raise ValueError(f"form {form!r}: 'chinchilla', 'nesting' or 'kaplan'")
  if not all(np.all(np.isfinite(x) & (x > 0)) for x in (n, d, loss)):
    raise ValueError('parameters, tokens and losses must be finite and positive: drop the rows that are not')
  if len(loss) < 6:
    raise ValueError(f'{len(loss)} points cannot hold 5 parameters: 6 are the least')
  log_n, log_d, log_loss = np.log(n), np.log(d), np.log(loss)
  centre = log_n.mean(), log_d.mean()

  def residuals(x):
    predicted, jacobian = _log_loss(x, log_n - centre[0], log_d - centre[1])
    if form == 'kaplan':
      jacobian[:, 4] += jacobian[:, 5]
      jacobian[:, 5] = 0
    return predicted - log_loss, jacobian

  low, high = log_loss.min(), log_loss.max()
  bounds = np.array([(low - 14, high), (low - 14, high + 4), (low - 14, high + 4), RANGE, RANGE, (1, 1)])
  if form == 'nesting':
    bounds[5] = .05, 5
  if form == 'kaplan':
    bounds[0], bounds[5] = -700, RANGE  # exp(-700) is nothing, and yet a number
  if starts:
    points = [_pack(law, centre) for law in starts]
  elif form == 'kaplan':  # terms of one size at the centre: where one rules everywhere, the other has no gradient
    points = [(-700, log_loss.mean(), log_loss.mean(), alpha, beta, beta) for alpha in KAPLAN for beta in KAPLAN]
  else:
    points = [_pack(law, centre) for law in _grid_starts(n, d, loss, objective)]
  if form == 'nesting' and not starts:
    points = [(*x[:5], q) for x in points[:2] for q in (.2, .5, 1, 2)]
  tied = (lambda x: np.append(x[:5], x[4])) if form == 'kaplan' else (lambda x: x)
  solution = solve.least(lambda x: residuals(tied(x)), objective, points, bounds)
  x = tied(solution.x)
  r, jacobian = residuals(x)
  # A term that is nothing stops before its bound: all is flat there.
  hits = {*solution.at_bound} | {i for i in (0, 1, 2) if x[i] < low - 7}
  mad = np.median(np.abs(r - np.median(r)))
  free = list(FREE[form])
  condition, correlation = _identifiability(jacobian, centre, free)
  return Fit(law=_unpack(x, centre), form=form, objective=objective, value=solution.value, residuals=r,
             delta_over_mad=float(objective.delta / mad) if mad else np.inf,
             basins=(solution.value, solution.second, solution.spread),
             bound_hits=tuple(NAMES[i] for i in free if i in hits), condition=condition, max_correlation=correlation)


def _identifiability(jacobian: np.ndarray, centre, free: list[int]) -> tuple[float, float]:
  """(condition, max_correlation) of a Fit, of jacobian [M, 6] of centred logarithms."""
  raw = jacobian.copy()  # of the parameters as they are named: log A = a + alpha * centre
  raw[:, 3] -= centre[0] * jacobian[:, 1]
  raw[:, 4] -= centre[1] * jacobian[:, 2]
  centred, raw = (x[:, free] / np.maximum(np.linalg.norm(x[:, free], axis=0), 1e-300) for x in (jacobian, raw))
  covariance = np.linalg.pinv(raw.T @ raw, rcond=1e-15)
  sd = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
  correlation = np.abs(covariance / np.outer(sd, sd))[~np.eye(len(free), dtype=bool)].max()
  return float(np.linalg.cond(centred) ** 2), float(min(correlation, 1))


def _log_loss(x: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """log L [M] and its derivatives [M, 6] in x = (log E, log A, log B, alpha, beta, q), at n and d: centred logarithms."""
  e, a, b, alpha, beta, q = x
  u, v = (a - alpha * n) / q, (b - beta * d) / q
  both = np.logaddexp(u, v)
  predicted = np.logaddexp(e, q * both)
  weight_e, weight = np.exp(e - predicted), np.exp(q * both - predicted)
  weight_n, weight_d = weight * np.exp(u - both), weight * np.exp(v - both)
  jacobian = np.stack([weight_e, weight_n, weight_d, -weight_n * n, -weight_d * d,
                       weight * both - weight_n * u - weight_d * v], axis=1)
  return predicted, jacobian


def _pack(law: Chinchilla, centre) -> np.ndarray:
  tiny = 1e-300
  return np.array([np.log(max(law.E, tiny)), np.log(max(law.A, tiny)) - law.alpha * centre[0],
                   np.log(max(law.B, tiny)) - law.beta * centre[1], law.alpha, law.beta, law.q])


def _unpack(x: np.ndarray, centre) -> Chinchilla:
  e, a, b, alpha, beta, q = (float(value) for value in x)
  return Chinchilla(E=float(np.exp(e)) if e > -600 else 0.0, A=float(np.exp(a + alpha * centre[0])),
                    B=float(np.exp(b + beta * centre[1])), alpha=alpha, beta=beta, q=q)


def profile(n, d, loss, alphas, betas, *, objective: Objective = HUBER, steps: int = 30
            ) -> tuple[np.ndarray, np.ndarray]:
  """(values [P, Q], coefficients [P, Q, 3] of E, A, B): the least objective for each alphas [P] and betas [Q], E, A, B >= 0.

  Iteratively reweighted: log(predicted / measured) is linearised about the last prediction, which leaves a non-negative
  linear problem.
  """
  n, d, loss = (np.asarray(x, np.float64) for x in (n, d, loss))
  log_n, log_d = np.log(n), np.log(d)
  values, coefficients = np.empty((len(alphas), len(betas))), np.empty((len(alphas), len(betas), 3))
  for i, alpha in enumerate(alphas):
    for j, beta in enumerate(betas):
      scale = np.exp([0, alpha * log_n.mean(), beta * log_d.mean()])
      terms = np.stack([np.ones_like(n), np.exp(-alpha * log_n), np.exp(-beta * log_d)], axis=1) * scale
      predicted, weight, best = loss, 1.0, np.inf
      for _ in range(steps):
        root = np.sqrt(weight)
        found, _ = scipy.optimize.nnls(terms * (root / predicted)[:, None], root * (1 - np.log(predicted / loss)))
        predicted = np.maximum(terms @ found, loss * 1e-6)
        r = np.log(predicted / loss)
        value = objective.value(r)
        if value < best:
          gain, best, values[i, j], coefficients[i, j] = (best - value) / value, value, value, found * scale
          if gain < 1e-9:
            break
        size = np.maximum(np.abs(r), 1e-12)
        weight = np.abs(objective.slope(r)) / size
        weight = weight / weight.max()
  return values, coefficients


def _grid_starts(n, d, loss, objective: Objective) -> list[Chinchilla]:
  """The lowest places of the profile over a grid: first those lower than their neighbours, then the next lowest."""
  values, coefficients = profile(n, d, loss, EXPONENTS, EXPONENTS, objective=objective, steps=5)
  edge = np.pad(values, 1, constant_values=np.inf)
  around = [edge[1 + i:edge.shape[0] - 1 + i, 1 + j:edge.shape[1] - 1 + j]
            for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
  rank = np.where(values < np.min(around, axis=0), values, values + values.max())
  places = np.argsort(rank, axis=None)[:STARTS]
  return [Chinchilla(*(float(c) for c in coefficients[i, j]), alpha=float(EXPONENTS[i]), beta=float(EXPONENTS[j]))
          for i, j in zip(*np.unravel_index(places, values.shape))]
