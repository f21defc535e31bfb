"""All that a fit of a sweep's runs says, in the order that a reader needs it: held-out error first."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.scaling import alarms, approaches, chinchilla, held_out, intervals
from maxlm.scaling.approaches import Parabola, Power
from maxlm.scaling.chinchilla import Chinchilla, Fit
from maxlm.scaling.held_out import Row
from maxlm.scaling.points import Points
from maxlm.scaling.solve import HUBER, Objective


@dataclass(frozen=True, slots=True)
class Analysis:
  """budget: FLOPs of the optimum; laws: of the bootstrap (by trunk where runs share one); rows: held-out budgets;
  parabolas and isoflop (N*, D*): approach 2; envelope (N*, D*): approach 1, None where the runs hold none."""
  points: Points
  fit: Fit
  budget: float
  level: float
  laws: list[Chinchilla]
  rows: list[Row]
  parabolas: list[Parabola]
  isoflop: tuple[Power, Power] | None
  envelope: tuple[Power, Power] | None
  alarms: list[str]

  @property
  def optimum(self) -> dict[str, float]:
    """'N*', 'D*', 'D/N', 'L*' at the budget."""
    n, d, loss = (float(x) for x in self.fit.law.optimum(self.budget, self.points.flops_per_nd))
    return {'N*': n, 'D*': d, 'D/N': d / n, 'L*': loss}

  @property
  def optimum_intervals(self) -> dict[str, tuple[float, float]]:
    return intervals.optima(self.laws, self.budget, level=self.level, flops_per_nd=self.points.flops_per_nd)


def analyse(points: Points, *, budget: float | None = None, objective: Objective = HUBER, form: str = 'chinchilla',
            samples: int = 1000, level: float = .8, seed: int = 0) -> Analysis:
  """Checks the points, fits them and judges the fit. budget: FLOPs (default: ten times the largest of the runs)."""
  alarms.check(points)
  budget = budget or 10 * float(points.flops.max())
  runs = points.n, points.d, points.loss

  def fit_function(*runs):
    return chinchilla.fit(*runs, objective=objective, form=form)

  fit = fit_function(*runs)
  laws = intervals.bootstrap(lambda *runs: chinchilla.fit(*runs, objective=objective, form=form, starts=[fit.law]), *runs,
                             clusters=points.cluster, samples=samples, seed=seed)
  rows = held_out.rolling(*runs, points.flops, fit_function=fit_function, budget=points.budget,
                          flops_per_nd=points.flops_per_nd)
  parabolas = approaches.parabolas(*runs, points.budget) if points.isoflop else []
  good = [p for p in parabolas if not p.problem]
  c, n, d = approaches.envelope(*runs, points.flops)
  return Analysis(
    points=points, fit=fit, budget=budget, level=level, laws=laws, rows=rows, parabolas=parabolas,
    isoflop=_powers([p.budget for p in good], [p.n for p in good], [p.d for p in good], least=2),
    envelope=_powers(c, n, d, least=3), alarms=alarms.alarms(fit, points, laws=laws, rows=rows, parabolas=parabolas,
                                                        budget=budget))


def _powers(c, n, d, least: int) -> tuple[Power, Power] | None:
  return (approaches.power(c, n), approaches.power(c, d)) if len(set(n)) >= least else None


def figures(a: Analysis) -> dict[str, Any]:
  """All that `text` says, for JSON: every number in full (an exponent rounded to two digits is another law)."""
  names = [name for name in chinchilla.NAMES if name != 'q' or a.fit.form != 'chinchilla']
  return {'points': len(a.points.n), 'left_out': a.points.left_out, 'clusters': len(set(a.points.cluster)),
          'target': a.points.target, 'held_out': [dataclasses.asdict(row) for row in a.rows],
          'law': dataclasses.asdict(a.fit.law), 'form': a.fit.form, 'objective': str(a.fit.objective), 'value': a.fit.value,
          'delta_over_mad': a.fit.delta_over_mad if np.isfinite(a.fit.delta_over_mad) else None, 'basins': a.fit.basins,
          'condition': a.fit.condition, 'max_correlation': a.fit.max_correlation, 'level': a.level, 'samples': len(a.laws),
          'intervals': {name: intervals.interval([getattr(law, name) for law in a.laws], a.level) for name in names},
          'budget': a.budget, 'flops_per_nd': a.points.flops_per_nd, 'optimum': a.optimum,
          'optimum_intervals': a.optimum_intervals, 'exponents': _exponents(a), 'alarms': a.alarms}


def _exponents(a: Analysis) -> dict[str, dict[str, float]]:
  """By approach: the exponents of C in N* and D*, and N* and D* at the budget."""
  law, best = a.fit.law, a.optimum
  share = law.beta / (law.alpha + law.beta)
  found = {'3, fit': {'N': share, 'D': 1 - share, 'N*': best['N*'], 'D*': best['D*']}}
  for name, powers in (('2, parabolas', a.isoflop), ('1, envelope', a.envelope)):
    if powers:
      n, d = powers
      found[name] = {'N': n.exponent, 'D': d.exponent, 'N*': float(n(a.budget)), 'D*': float(d(a.budget))}
  return found


def text(a: Analysis) -> str:
  """What a person reads."""
  p, law, told = a.points, a.fit.law, figures(a)
  lines = [f'{told["points"]} runs of {told["clusters"]} trunks, {p.flops.min():.3g} to {p.flops.max():.3g} FLOPs, '
           + p.target + f'; {p.left_out} left out (not finished, or trunks)' * (p.left_out > 0), '',
           'held out: fitted to the budgets before, scored on the next',
           '  fitted to     runs  scored on     runs    error    worst  N* for it  deadweight compute']
  lines += [f'  <= {row.up_to:<10.3g}{row.fitted:>5}  {row.budget:<12.3g}{row.scored:>5}  {row.error:>+6.2f} % '
            f'{row.worst:>+6.2f} %  {row.n:<9.3g}  {row.deadweight:.2g} %' for row in a.rows]
  lines += ['  too few budgets: nothing was held out'] * (not a.rows)
  lines += ['', f'law: L = {law.E:.6g} + {law.A:.6g} N^-{law.alpha:.6g} + {law.B:.6g} D^-{law.beta:.6g}'
            + f' (form {a.fit.form}, q = {law.q:.6g})' * (a.fit.form != 'chinchilla'),
            f'objective: {a.fit.objective}, {a.fit.value:.9g}; median |residual| '
            f'{100 * np.median(np.abs(a.fit.residuals)):.3g} %, delta is {a.fit.delta_over_mad:.3g} times that',
            f'condition {a.fit.condition:.3g}, greatest correlation {a.fit.max_correlation:.4f}, starts end '
            f'{a.fit.basins[2]:.1g} apart', '', f'intervals, {a.level:.0%}, of {len(a.laws)} resamples']
  lines += [f'  {name:<6} {getattr(law, name):<12.5g} {low:.5g} to {high:.5g}'
            for name, (low, high) in told['intervals'].items()]
  for one, other in (('A', 'alpha'), ('B', 'beta')):
    cloud = np.array([(np.log(getattr(each, one)), getattr(each, other)) for each in a.laws])
    lines.append(f'  log {one} and {other}: correlation {np.corrcoef(cloud.T)[0, 1]:.4f}')
  lines += ['', f'optimum at {a.budget:.4g} FLOPs, {p.flops_per_nd:.3g} FLOPs a parameter and token']
  lines += [f'  {name:<6} {value:<12.5g} {low:.5g} to {high:.5g}'
            for (name, value), (low, high) in zip(a.optimum.items(), a.optimum_intervals.values())]
  if a.fit.form != 'kaplan':
    ends = np.array([(each.E, each.optimum(a.budget, p.flops_per_nd)[2]) for each in a.laws])
    lines.append(f'  L* moves by {np.polyfit(*ends.T, 1)[0]:.2f} for each unit that E does')
  lines += ['', 'approach        N* as C^  D* as C^  N*         D*']
  lines += [f'  {name:<13} {each["N"]:<9.4f} {each["D"]:<9.4f} {each["N*"]:<10.4g} {each["D*"]:.4g}'
            for name, each in told['exponents'].items()]
  return '\n'.join(lines + [''] * bool(a.alarms) + [f'ALARM {line}' for line in a.alarms])
