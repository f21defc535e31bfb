"""What makes a fit impossible (an error), and what makes it doubtful (a line that a reader sees with the result)."""

import numpy as np

from maxlm.scaling import chinchilla, intervals
from maxlm.scaling.approaches import Parabola
from maxlm.scaling.chinchilla import Chinchilla, Fit
from maxlm.scaling.held_out import Row
from maxlm.scaling.points import Points

LEAST = 8
FAR = 6  # robust standard deviations from the median residual: an outlier


def check(points: Points) -> None:
  """Raises ValueError for runs that hold no law: too few, one budget, values that are none, more than one tokenizer."""
  if len(points.n) < LEAST:
    raise ValueError(f'{len(points.n)} finished runs ({points.left_out} more are not finished, or trunks): a law of 5 '
                     f'parameters needs {LEAST} at the least, over two budgets or more')
  bad = ~np.all([np.isfinite(x) & (x > 0) for x in (points.n, points.d, points.loss, points.flops)], axis=0)
  if bad.any():
    raise ValueError(f'{bad.sum()} finished runs have parameters, tokens, FLOPs or {points.target} that are no positive '
                     f'number: {", ".join(points.name[bad][:5])}: mend or leave out these rows')
  if len(set(points.tokenizer)) > 1 and not points.target.startswith('bits_per_byte'):
    raise ValueError(f'the runs have {len(set(points.tokenizer))} tokenizers, and a loss a token says nothing across them: '
                     'give --target=bits_per_byte')
  if len(np.unique(points.budget)) < 2:
    raise ValueError(f'all runs have one budget, about {points.budget[0]:.3g} FLOPs: a law of compute needs two, better '
                     'four over two decades')


def alarms(fit: Fit, points: Points, *, laws: list[Chinchilla] = (), rows: list[Row] = (),
           parabolas: list[Parabola] = (), budget: float | None = None) -> list[str]:
  """Why this fit may be wrong, a line each. laws: of a bootstrap; rows: held-out budgets; budget: FLOPs that it is asked
  about."""
  said = _of_fit(fit, laws) + _of_outliers(fit, points) + _of_held_out(fit, rows) + _of_sizes(parabolas)
  if np.ptp(np.log10(points.flops)) < 2:
    said.append(f'the runs span {np.ptp(np.log10(points.flops)):.2f} decades of compute: two are the least for an exponent')
  if budget:
    beyond = budget / points.flops.max()
    if beyond > 1000:
      said.append(f'the budget is {beyond:,.0f} times the largest run: published forecasts that held went 300 times')
    n, d, _ = fit.law.optimum(budget, points.flops_per_nd)
    ratio = points.d / points.n
    if not ratio.min() <= d / n <= ratio.max():
      said.append(f'D/N is {d / n:.3g} at the budget, and {ratio.min():.3g} to {ratio.max():.3g} in the runs: laws change '
                  'with D/N')
  each = points.flops / points.n / points.d
  if each.max() > 1.1 * each.min():
    said.append(f'FLOPs a parameter and token go from {each.max():.3g} to {each.min():.3g} (attention, embeddings); optima '
                f'take {points.flops_per_nd:.3g}, that of the largest budget')
  return said


def _of_fit(fit: Fit, laws: list[Chinchilla]) -> list[str]:
  said, (best, second, _) = [], fit.basins
  for name in fit.bound_hits:
    said.append(f'{name} is at its bound ({getattr(fit.law, name):.3g}): the runs do not determine it')
  if second is not None and second < 1.02 * best:
    said.append(f'a second optimum is only {100 * (second / best - 1):.2g} % worse: another law fits as well')
  if fit.condition > 1e5:
    said.append(f'condition number {fit.condition:.1g}: the parameters cannot be told apart; vary N and D independently')
  if laws:
    low, high = intervals.interval([law.beta / (law.alpha + law.beta) for law in laws])
    if high - low > .1:
      said.append(f'the exponent of N* lies anywhere in {low:.2f} to {high:.2f} (80 %): more budgets, or more sizes each')
  return said


def _of_outliers(fit: Fit, points: Points) -> list[str]:
  r = fit.residuals - np.median(fit.residuals)
  sd = 1.4826 * np.median(np.abs(r))
  far = np.abs(r) > FAR * sd
  if not far.any() or (~far).sum() < LEAST or not sd > 1e-9:
    return []
  other = chinchilla.fit(points.n[~far], points.d[~far], points.loss[~far], objective=fit.objective, form=fit.form).law
  return [f'{far.sum()} runs lie over {FAR} robust standard deviations off ({", ".join(points.name[far][:5])}): look at '
          f'each; without them alpha goes from {fit.law.alpha:.3f} to {other.alpha:.3f}, beta from {fit.law.beta:.3f} to '
          f'{other.beta:.3f}']


def _of_held_out(fit: Fit, rows: list[Row]) -> list[str]:
  if not rows:
    return []
  last, sd = rows[-1], 148.26 * np.median(np.abs(fit.residuals - np.median(fit.residuals)))  # in percent, as the error is
  if abs(last.error) <= 2 * sd:
    return []
  return [f'the runs of {last.budget:.3g} FLOPs, held out, are missed by {last.error:+.2f} % on average, and runs scatter '
          f'by {sd:.2f} %: the law bends away from them, which no resampling knows']


def _of_sizes(parabolas: list[Parabola]) -> list[str]:
  said = []
  for p in parabolas:
    at = f'budget {p.budget:.3g}:'
    if p.problem:
      said.append(f'{at} {p.problem}')
    elif min(p.left, p.right) < 3:
      said.append(f'{at} {p.left} sizes below the optimum and {p.right} above: three on each side hold a parabola')
    if p.width > 64 * 1.05:
      said.append(f'{at} sizes span a factor of {p.width:.0f}, over ±8: a parabola is biased there, trust the fit')
  good = [p for p in parabolas if not p.problem]
  if len(good) > 1:
    off = np.array([np.log(p.centre / p.n) for p in good])
    if np.ptp(off) > np.log(3):
      said.append(f'the centre of the sizes drifts by a factor of {np.exp(np.ptp(off)):.1f} against the optimum: that '
                  'biases the exponents of approach 2')
  return said
