"""The multi-power law: the loss curve of a model under any learning-rate schedule (Luo et al. 2025, arXiv 2503.12811).

One trunk and a few cool-downs tell where cool-downs that nobody has run would end. rates [T]: the learning rate of each step
from the first (warm-up included). steps [M]: which of them the losses [M] were measured at, 0 to T - 1, ascending.
"""

from dataclasses import dataclass

import numpy as np

from maxlm.scaling import solve
from maxlm.scaling.columns import columns
from maxlm.scaling.solve import HUBER, Objective


@dataclass(frozen=True, slots=True)
class MultiPower:
  """L(t) = L0 + A S1^-alpha + B sum_k (eta_k - eta_k-1) (1 - (1 + C eta_k^-gamma S_k)^-beta), k = 1 to t, with S_k the sum
  of rates from step k to t, and S1 from the first step. A drop of the rate lowers the loss, the more the more is trained
  after it. Nats a token; B and C are in units of the rates."""
  L0: float
  A: float
  alpha: float
  B: float
  C: float
  beta: float
  gamma: float

  def loss(self, rates, steps) -> np.ndarray:
    rates, steps = curve(rates, steps)
    total, gaps = np.cumsum(rates), np.diff(rates, prepend=rates[0])
    changes = np.flatnonzero(gaps)
    losses = self.L0 + self.A * total[steps] ** -self.alpha
    for i, step in enumerate(steps):
      k = changes[:np.searchsorted(changes, step, side='right')]
      losses[i] += self.B * gaps[k] @ self._response(rates[k], total[step] - total[k - 1])
    return losses

  def _response(self, rates: np.ndarray, after: np.ndarray) -> np.ndarray:
    power = np.power(rates, -self.gamma, out=np.zeros_like(rates), where=rates > 0)  # at rate 0 nothing is trained after
    return 1 - (1 + self.C * power * after) ** -self.beta


def fit(curves, *, objective: Objective = HUBER) -> MultiPower:
  """Fits (rates, steps, losses) of one model, by log(predicted) - log(measured).

  At least one curve must have a rate that falls: a constant rate says nothing of B, C, beta and gamma.
  """
  parts = [_summary(rates, steps, losses) for rates, steps, losses in curves]
  log_loss = np.concatenate([np.log(part[-1]) for part in parts])
  fallen = np.concatenate([part[1].min(1) for part in parts])
  if not np.any(fallen < 0):
    raise ValueError('no learning rate falls before a measured step: give at least one curve with a cool-down')

  def residuals(x):
    found = [_curve(x, *part[:-1]) for part in parts]
    predicted = np.concatenate([values for values, _ in found])
    return np.log(predicted) - log_loss, np.concatenate([slopes for _, slopes in found]) / predicted[:, None]

  low = np.exp(log_loss.min())
  starts = [[.8 * low, np.log(.2 * low), .45, np.log(200), .7, beta, .5] for beta in (.3, .7)]
  bounds = [(0, low), (-12, 8), (.02, 3), (-10, 14), (-12, 12), (.02, 4), (0, 1.5)]
  x = solve.least(residuals, objective, starts, bounds).x
  return MultiPower(L0=float(x[0]), A=float(np.exp(x[1])), alpha=float(x[2]), B=float(np.exp(x[3])), C=float(np.exp(x[4])),
                    beta=float(x[5]), gamma=float(x[6]))


def curve(rates, steps) -> tuple[np.ndarray, np.ndarray]:
  rates, steps = np.asarray(rates, np.float64), np.atleast_1d(np.asarray(steps, np.int64))
  if not len(steps) or np.any(np.diff(steps) <= 0) or steps[0] < 0 or steps[-1] >= len(rates):
    raise ValueError(f'steps must ascend within 0 to {len(rates) - 1}, those that a learning rate is given of')
  if not np.all(np.isfinite(rates) & (rates >= 0)) or not rates[:steps[0] + 1].any():
    raise ValueError('learning rates must be finite and not negative, and not all 0 up to the first step asked for')
  return rates, steps


def _summary(rates, steps, losses) -> tuple[np.ndarray, ...]:
  """(S1 [M], gaps [M, K], log rates [K], sums after [M, K], losses [M]). Changes of the rate between two measurements and
  within 1/256 of the run are taken as one: a hundred times faster, and within 3e-4 nats on published curves."""
  rates, steps = curve(rates, steps)
  _, losses = columns(2, steps + 1, losses)
  total, gaps = np.cumsum(rates), np.diff(rates, prepend=rates[0])
  ends = np.unique(np.concatenate([np.linspace(0, steps[-1], 257)[1:].astype(int), steps]))
  groups = [k for k in np.split(np.arange(1, steps[-1] + 1), ends[:-1]) if gaps[k].any()]
  size = [np.abs(gaps[k]) / np.abs(gaps[k]).sum() for k in groups]
  change = np.array([gaps[k].sum() for k in groups])
  log_rate = np.array([np.log(np.maximum(rates[k], 1e-12)) @ w for k, w in zip(groups, size)])
  before = np.array([total[k - 1] @ w for k, w in zip(groups, size)])
  seen = np.array([k[-1] for k in groups]) <= steps[:, None]
  return total[steps], np.where(seen, change, 0), log_rate, np.where(seen, total[steps][:, None] - before, 0), losses


def _curve(x, total, gaps, log_rate, after) -> tuple[np.ndarray, np.ndarray]:
  """Loss [M] and its derivatives [M, 7] in x = (L0, log A, alpha, log B, log C, beta, gamma)."""
  _, log_a, alpha, log_b, log_c, beta, gamma = x
  trunk = np.exp(log_a - alpha * np.log(total))
  u = np.exp(log_c - gamma * log_rate) * after
  left = (1 + u) ** -beta
  slope = beta * left * u / (1 + u)  # of the response in log u
  b = np.exp(log_b)
  drop = b * (gaps * (1 - left)).sum(1)
  return x[0] + trunk + drop, np.stack([
    np.ones_like(total), trunk, -trunk * np.log(total), drop, b * (gaps * slope).sum(1),
    b * (gaps * left * np.log1p(u)).sum(1), b * (gaps * slope) @ -log_rate], axis=1)
