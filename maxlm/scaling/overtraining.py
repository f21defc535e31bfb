"""Loss and error of over-trained models (Gadre et al. 2024, arXiv 2403.08540).

With alpha = beta = 2 eta, runs of one ratio M = D / N lie on L = E + (a M^eta + b M^-eta) C^-eta (their equation 4): the
ratio moves the scale and not the slope, so that five small runs, one of them over-trained, predict large ones.
"""

from dataclasses import dataclass

import numpy as np

from maxlm.scaling import solve
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.columns import columns


@dataclass(frozen=True, slots=True)
class ErrorLaw:
  """Err = epsilon - k e^(-gamma L): mean error over tasks, 0 to 1, from a loss in nats a token (their equation 5)."""
  epsilon: float
  k: float
  gamma: float

  def error(self, loss) -> np.ndarray:
    return self.epsilon - self.k * np.exp(-self.gamma * np.asarray(loss, np.float64))


def fit(n, d, loss) -> Chinchilla:
  """Least squares of the loss in n parameters and d tokens ([M], 4 at least), as the authors fit it: alpha equals beta."""
  n, d, loss = columns(4, n, d, loss)
  log_n, log_d = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()

  def design(exponent):
    terms = np.stack([np.ones_like(n), np.exp(-exponent * log_n), np.exp(-exponent * log_d)], axis=1)
    return terms, terms * np.stack([np.zeros_like(n), -log_n, -log_d], axis=1)

  exponent, (e, a, b) = separable(design, loss, np.geomspace(.02, 1.5, 12))
  return Chinchilla(E=e, A=a * float(np.exp(exponent * np.log(n).mean())), B=b * float(np.exp(exponent * np.log(d).mean())),
                    alpha=exponent, beta=exponent)


def loss_at(law: Chinchilla, flops, tokens_per_param, flops_per_nd: float = 6.0) -> np.ndarray:
  """L(C, M): of the run of that many FLOPs at that ratio D / N."""
  nd = np.asarray(flops, np.float64) / flops_per_nd
  return law.loss(np.sqrt(nd / tokens_per_param), np.sqrt(nd * tokens_per_param))


def fit_error(loss, error) -> ErrorLaw:
  """Least squares of the error ([M], 4 at least). Use tasks that the models do better than chance at, or it is noise."""
  loss, error = columns(4, loss, error)
  middle = loss.mean()

  def design(gamma):
    decay = np.exp(-gamma * (loss - middle))
    return np.stack([np.ones_like(loss), -decay], axis=1), np.stack([np.zeros_like(loss), decay * (loss - middle)], axis=1)

  gamma, (epsilon, k) = separable(design, error, np.geomspace(.05, 10, 12))
  return ErrorLaw(epsilon=epsilon, k=k * float(np.exp(gamma * middle)), gamma=gamma)


def separable(design, y: np.ndarray, starts: np.ndarray) -> tuple[float, list[float]]:
  """(exponent, coefficients) of the least squares y ~ terms @ coefficients, design(exponent) -> (terms [M, P], their
  derivatives): the linear part is solved for each exponent, so what is left has one dimension (variable projection)."""
  def residuals(x):
    terms, slopes = design(x[0])
    coefficients = np.linalg.lstsq(terms, y)[0]
    return terms @ coefficients - y, (slopes @ coefficients)[:, None]  # at the best coefficients only the exponent counts

  solution = solve.least(residuals, solve.Squares(), starts[:, None], [(starts[0] / 4, starts[-1] * 4)])
  if solution.at_bound:
    raise ValueError(f'the exponent ran to {solution.x[0]:.3g}, its bound: add runs of other sizes and ratios')
  return float(solution.x[0]), [float(c) for c in np.linalg.lstsq(design(solution.x[0])[0], y)[0]]
