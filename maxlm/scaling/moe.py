"""Laws of mixtures of experts: published forms with their constants, and the fit of one.

N parameters, N_active those that a token uses, E experts, G granularity (how many experts a dense MLP was cut into), S
sparsity (share of experts that a token does not use), D tokens; losses in nats a token of the authors' data and tokenizer:
take shapes from them (which E, G or S is better by how much), not losses.
"""

from dataclasses import dataclass

import numpy as np

from maxlm.scaling import solve
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.columns import columns


def saturated(experts, start: float, most: float) -> np.ndarray:
  """E^: experts as they count, from `start` for one to `most` for endlessly many (Clark et al. 2022)."""
  return 1 / (1 / (np.asarray(experts, np.float64) - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


@dataclass(frozen=True, slots=True)
class Clark:
  """log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d (Clark et al. 2022, arXiv 2202.01169, equation 1), after 130B
  tokens; N of the dense model that is routed."""
  a: float
  b: float
  c: float
  d: float
  start: float
  most: float

  def loss(self, n, experts) -> np.ndarray:
    n, e = np.log10(n), np.log10(saturated(experts, self.start, self.most))
    return 10 ** (self.a * n + self.b * e + self.c * n * e + self.d)


CLARK = {'S-BASE': Clark(-.082, -.108, .009, 1.104, 1.847, 314.478),  # table 3
         'RL-R': Clark(-.083, -.126, .012, 1.111, 1.880, 469.982),
         'HASH': Clark(-.087, -.136, .012, 1.157, 4.175, 477.741)}


@dataclass(frozen=True, slots=True)
class Krajewski:
  """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, arXiv 2402.07871), with 64 times
  the MLP weights of the dense model."""
  c: float
  g: float
  gamma: float
  a: float
  alpha: float
  b: float
  beta: float

  def at(self, granularity: float) -> Chinchilla:
    """The law of that granularity, with its optimum."""
    return Chinchilla(E=self.c, A=self.g / granularity**self.gamma + self.a, B=self.b, alpha=self.alpha, beta=self.beta)

  def loss(self, n, d, granularity) -> np.ndarray:
    n, d, granularity = (np.asarray(x, np.float64) for x in (n, d, granularity))
    return self.c + (self.g / granularity**self.gamma + self.a) * n**-self.alpha + self.b * d**-self.beta


KRAJEWSKI = Krajewski(c=.47, g=2.1, gamma=.58, a=18.1, alpha=.115, b=30.8, beta=.147)


def fit_krajewski(n, d, granularity, loss, objective: solve.Objective = solve.HUBER) -> Krajewski:
  """From [M] runs, at least 8, by log(predicted) - log(measured)."""
  n, d, granularity, loss = columns(8, n, d, granularity, loss)
  if len(np.unique(granularity)) < 3:
    raise ValueError(f'{len(np.unique(granularity))} granularities: g and gamma need 3 at least')
  log_n, log_d, log_g = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean(), np.log(granularity)

  def residuals(x):
    e, cut, gamma, whole, alpha, b, beta = x
    terms = np.stack([e + 0 * log_n, cut - gamma * log_g - alpha * log_n, whole - alpha * log_n, b - beta * log_d])
    predicted = np.logaddexp.reduce(terms)
    w = np.exp(terms - predicted)
    slopes = w[0], w[1], -w[1] * log_g, w[2], -(w[1] + w[2]) * log_n, w[3], -w[3] * log_d
    return predicted - np.log(loss), np.stack(slopes, axis=1)

  low = np.log(loss.min())
  starts = [(low - 1, low - cut, gamma, low - 1, alpha, low - 1, alpha)
            for cut in (2, 4) for gamma in (.3, 1) for alpha in (.05, .15, .4)]
  bounds = [(low - 14, low), (low - 14, low + 4), (.01, 4), (low - 14, low + 4), (.005, 2), (low - 14, low + 4), (.005, 2)]
  e, cut, gamma, whole, alpha, b, beta = map(float, solve.least(residuals, objective, starts, bounds).x)
  scale = float(np.exp(alpha * np.log(n).mean()))
  return Krajewski(c=float(np.exp(e)), g=float(np.exp(cut)) * scale, gamma=gamma, a=float(np.exp(whole)) * scale,
                   alpha=alpha, b=float(np.exp(b + beta * np.log(d).mean())), beta=beta)


def abnar(n, d, sparsity) -> np.ndarray:
  """Loss from all parameters, tokens and S (Abnar et al. 2025, arXiv 2501.12370, equation 6, table 3). It explains 99 % of
  what it was fitted to and 68 % of what was held out (S = .98)."""
  n, d, dense = np.asarray(n, np.float64), np.asarray(d, np.float64), 1 - np.asarray(sparsity)
  return 16612.50 * n**-.5962 + 5455.67 * d**-.3954 + .4598 * dense**.1666 + 17.26 * dense**-.1603 * n**-.1595 + .94


def joint(experts: float) -> Chinchilla:
  """Of active parameters, at so many experts; one is the dense model (Ludziejewski et al. 2025, arXiv 2502.05172, equation
  6, table 3): L = a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c."""
  e = float(saturated(experts, 2.0732, 290.4521))
  log_e = float(np.log(e))
  return Chinchilla(E=1.3637, A=35.91 * e**-.2285, B=35.98 * e**.5529,
                    alpha=.1889 - .0098 * log_e, beta=.1775 + .0259 * log_e)
