"""The cheapest model of a quality, with what it will serve counted (Sardana et al. 2023, arXiv 2401.00448)."""

from dataclasses import dataclass

import numpy as np
import scipy.optimize

from maxlm.scaling.chinchilla import Chinchilla


@dataclass(frozen=True, slots=True)
class Cost:
  """N (train D + serve). train: of a parameter and a training token (6 FLOPs); serve: of a parameter over all that is
  served (2 FLOPs a token)."""
  serve: float
  train: float = 6.0

  def of(self, n, d):
    return n * (self.train * d + self.serve)


def dollars(*, prompt: float, output: float, train_hour: float, train_peak: float, serve_hour: float, serve_peak: float,
            train_mfu: float = .5, prompt_mfu: float = .5, output_mfu: float = .01) -> Cost:
  """Cost in dollars: prompt, output: tokens served over the model's life; *_hour: dollars an hour of a chip; *_peak: its
  operations a second (int8's where one serves int8); the utilisations are those of the paper (section 6)."""
  train, serve = train_hour / 3600 / train_peak, serve_hour / 3600 / serve_peak
  return Cost(serve=2 * serve * (prompt / prompt_mfu + output / output_mfu), train=6 * train / train_mfu)


@dataclass(frozen=True, slots=True)
class Choice:
  """n parameters, d tokens: the cheapest of that loss. cost: its own; saving: the share of what the model that is best by
  training alone would cost; advice: '' or why not to trust it."""
  n: float
  d: float
  cost: float
  saving: float
  advice: str


def cheapest(law: Chinchilla, loss: float, cost: Cost, most_tokens_per_param: float | None = None) -> Choice:
  """Where alpha A N^-alpha / (beta B D^-beta) = 1 + serve / (train D), at L(N, D) = loss. q = 1.

  most_tokens_per_param: of the runs that the law was fitted to; the exponents move with it (their table 1).
  """
  if law.q != 1:
    raise ValueError('the inference-aware optimum is that of a law with q = 1: fit the Chinchilla form')
  if not loss > law.E:
    raise ValueError(f'a loss of {loss:g} is not above E = {law.E:.4g}: no model of this law has it')

  def slope(x):
    d = tokens_for(law, np.exp(x), loss)
    pull = np.log(law.alpha * law.A / (law.beta * law.B)) - law.alpha * x + law.beta * np.log(d)
    return pull - np.log1p(cost.serve / (cost.train * d))

  least = np.log(law.A / (loss - law.E)) / law.alpha  # with endless tokens
  n = float(np.exp(scipy.optimize.brentq(slope, least + 1e-9, least + 60, xtol=1e-12)))
  d = float(tokens_for(law, n, loss))
  plain = law.optimum(law.flops_of(loss))
  too_far = most_tokens_per_param is not None and d / n > most_tokens_per_param
  advice = f'{d / n:.0f} tokens a parameter; the law was fitted to {most_tokens_per_param:.0f} at most' if too_far else ''
  return Choice(n=n, d=d, cost=cost.of(n, d), saving=1 - cost.of(n, d) / float(cost.of(*plain[:2])), advice=advice)


def tokens_for(law: Chinchilla, n, loss) -> np.ndarray:
  """Tokens that bring n parameters to that loss; infinite where none do."""
  left = np.maximum(loss - law.E - law.A * np.asarray(n, np.float64) ** -law.alpha, 0)
  with np.errstate(divide='ignore'):
    return (law.B / left) ** (1 / law.beta)
