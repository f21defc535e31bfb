"""A fit as a page of plots: isoFLOP curves, frontier, residuals, held-out budgets, the objective's profile, the bootstrap.

Looks and safety are of `data_pipeline.pages`: one file, no script. A colour is a budget, from the smallest to the largest.
"""

from pathlib import Path

import numpy as np

from data_pipeline.pages import document, escape, table
from maxlm.report import charts, say, scatter
from maxlm.report.scatter import Curve, Dots, ramp
from maxlm.scaling import chinchilla
from maxlm.scaling.analysis import Analysis
from maxlm.scaling.approaches import Parabola, parabolas
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.intervals import interval
from maxlm.scaling.points import Points
from maxlm.start import write_atomically

ALONG = 61  # places of a curve
CELLS = 25  # a side of the profile's map
STYLE = """
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px 28px; }
.wide + p { margin-top: 28px; }
"""


def write(a: Analysis, out: Path, title: str, count: str) -> None:
  """Writes the page; ValueError where `out` is no .html. count: which parameters N are."""
  if out.suffix != '.html':
    raise ValueError(f'--plot={out}: the page is .html')
  out.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(out, page(a, title, count))


def page(a: Analysis, title: str, count: str) -> str:
  held = held_out(a)
  body = [f'<h1>{escape(title)}</h1>', _headline(a, held, count), _alarms(a), _isoflop(a), _frontier(a), _held(a, held),
          _residuals(a), _certainty(a), _tables(a)]
  return document(title, body, charts.STYLE + scatter.STYLE + STYLE)


def held_out(a: Analysis) -> list[tuple[float, np.ndarray, np.ndarray]]:
  """(budget, its runs, their losses by the law of the smaller budgets) of each row of the analysis."""
  p, found = a.points, []
  for row in a.rows:
    seen, at = p.budget <= row.up_to, np.flatnonzero(p.budget == row.budget)
    law = chinchilla.fit(p.n[seen], p.d[seen], p.loss[seen], objective=a.fit.objective, form=a.fit.form).law
    found.append((row.budget, at, law.loss(p.n[at], p.d[at])))
  return found


# -- from above


def _headline(a: Analysis, held, count: str) -> str:
  texts = (f'{_words(count)}, N*', 'tokens, D*', 'tokens a parameter', f'{_words(a.points.target)}, L*')
  tiles = [(say.value(value), f'{text}<br>{_both(ends)}')
           for text, value, ends in zip(texts, a.optimum.values(), a.optimum_intervals.values())]
  if held:
    errors = np.concatenate([said / a.points.loss[at] - 1 for _, at, said in held])
    tiles.insert(0, (f'{100 * np.median(np.abs(errors)):.2g} %', 'median error of the loss of budgets that were held out'))
  law, p = a.fit.law, a.points
  form = f'L = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}'
  said = ''.join(f'<div><b>{one}</b><span>{text}</span></div>' for one, text in tiles)
  return (f'<p>{form}{f", form {a.fit.form} with q = {law.q:.4g}" * (law.q != 1)}</p><p class="soft">{len(p.n):,} runs, '
          f'{_power(p.flops.min())} to {_power(p.flops.max())} FLOPs; {escape(a.fit.objective)}. Below: the best run of '
          f'{_power(a.budget)} FLOPs, with intervals of {a.level:.0%}.</p><div class="tiles">{said}</div>')


def _words(column: str) -> str:
  """'params_non_embedding' as words."""
  return escape(column.replace('params', 'parameters').replace('_', ' '))


def _both(ends: tuple[float, float]) -> str:
  return f'{say.value(ends[0])} to {say.value(ends[1])}'


def _alarms(a: Analysis) -> str:
  if not a.alarms:
    return ''
  items = ''.join(f'<li>{escape(text)}</li>' for text in a.alarms)
  return f'<div class="alarms" role="alert"><span class="bad">Look at this first</span><ul>{items}</ul></div>'


# -- the data and the frontier


def _budgets(a: Analysis) -> list[tuple[float, np.ndarray, str]]:
  """(budget, its points, colour), from the smallest."""
  budgets = np.unique(a.points.budget)
  return [(float(budget), np.flatnonzero(a.points.budget == budget), ramp(i, len(budgets)))
          for i, budget in enumerate(budgets)]


def _dots(a: Analysis, x: np.ndarray, y: np.ndarray, say_y=lambda v: f'{v:.4g}') -> list[Dots]:
  return [Dots(x=x[at], y=y[at], colour=colour, tips=[_tip(a.points, i, say_y(y[i])) for i in at])
          for _, at, colour in _budgets(a)]


def _tip(points: Points, i: int, value: str) -> str:
  return (f'{points.name[i]}\n{value}\nN {say.count(points.n[i])}, D {say.count(points.d[i])}, C {_power(points.flops[i])}\n'
          f'loss {points.loss[i]:.4f}')


def _ring(x: float, y: float, colour: str, tip: str) -> Dots:
  return Dots(x=np.array([x]), y=np.array([y]), colour=colour, ring=True, tips=[tip])


def _legend(a: Analysis) -> str:
  items = ''.join(f'<li><i class="{colour}"></i>{_power(budget)}</li>' for budget, _, colour in _budgets(a))
  return f'<ul class="legend lines"><li>FLOPs</li>{items}</ul>'


def _parabolas(a: Analysis) -> list[tuple[Parabola, str]]:
  """Each with its colour; also those of budgets that are half decades, to look at."""
  colours = {budget: colour for budget, _, colour in _budgets(a)}
  return [(one, colours[one.budget]) for one in parabolas(a.points.n, a.points.d, a.points.loss, a.points.budget)]


def _isoflop(a: Analysis) -> str:
  p, curves, rings = a.points, [], []
  for one, colour in _parabolas(a):
    of = p.n[p.budget == one.budget]
    n = np.geomspace(of.min(), of.max(), ALONG)
    curves.append(Curve(x=n, y=np.polyval(one.coefficients, np.log(n)), colour=colour))
    if not one.problem:
      tip = f'minimum at {_power(one.budget)} FLOPs\nN {say.count(one.n)}, loss {one.loss:.4f}'
      rings.append(_ring(one.n, one.loss, colour, tip))
  shown = scatter.scatter(f'<b>{_words(p.target)}</b> against parameters', [*_dots(a, p.n, p.loss), *rings], curves,
                          x_label=say.count, y_label=say.value, log_x=True, tall=True)
  of = 'of each budget' if p.isoflop else 'of each half decade of compute, for these runs have no budgets in common'
  return _section('Runs of equal compute', f'A parabola in log N through the runs {of}; a ring is its minimum, where it '
                  'lies among them.', shown, legend=_legend(a))


def _frontier(a: Analysis) -> str:
  p = a.points
  flops = np.geomspace(min(p.flops.min(), a.budget), max(p.flops.max(), a.budget), ALONG)
  (middle, low, high), goal, inside = _optima(a, flops), _optima(a, a.budget)[0], flops <= p.flops.max()
  found = [(one.budget, (one.n, one.d, one.d / one.n, one.loss), colour) for one, colour in _parabolas(a) if not one.problem]
  figures = []
  for i, (title, label) in enumerate((('<b>N*</b>, parameters', say.count), ('<b>D*</b>, tokens', say.count),
                                      ('<b>D* / N*</b>, tokens a parameter', say.tick),
                                      (f'<b>L*</b>, {_words(p.target)}', say.value))):
    parts = [Curve(x=flops[where], y=middle[i][where], low=low[i][where], high=high[i][where], colour=colour)
             for where, colour in ((inside, 'c0'), (flops >= flops[inside][-1], 'c0 far')) if where.sum() > 1]
    dots = [_ring(c, values[i], colour, f'minimum at {_power(c)} FLOPs\n{label(values[i])}') for c, values, colour in found]
    dots.append(Dots(x=np.array([a.budget]), y=goal[i:i + 1],
                     tips=[f'forecast at {_power(a.budget)} FLOPs\n{label(float(goal[i]))}']))
    figures.append(scatter.scatter(title, dots, parts, x_label=_power, y_label=label, log_x=True, log_y=i < 3))
  return _section('Frontier', f'Against FLOPs: the law, with the band that {a.level:.0%} of the resampled fits leave; '
                  'dashed beyond the data. Rings: minima of the parabolas above. Dot: the forecast.', *figures)


def _optima(a: Analysis, flops) -> np.ndarray:
  """[3, 4, …]: what the law says of flops […], and the lower and upper ends of intervals: N*, D*, D*/N*, L*."""
  def of(law: Chinchilla) -> np.ndarray:
    n, d, loss = law.optimum(flops, a.points.flops_per_nd)
    return np.array([n, d, d / n, loss])
  return np.array([of(a.fit.law), *np.quantile([of(law) for law in a.laws], [(1 - a.level) / 2, (1 + a.level) / 2], axis=0)])


# -- how far to trust it


def _held(a: Analysis, held) -> str:
  """Predicted against actual: what the law says of the runs it was fitted to, and laws of smaller budgets of the next."""
  p, fitted = a.points, a.fit.law.loss(a.points.n, a.points.d)
  tips = [_tip(p, i, f'fit {v:.4f}, {_percent(v / p.loss[i] - 1)}') for i, v in enumerate(fitted)]
  dots, signed = [Dots(x=p.loss, y=fitted, colour='c7', tips=tips)], []
  colours = {budget: colour for budget, _, colour in _budgets(a)}
  for budget, at, said in held:
    error = said / p.loss[at] - 1
    tips = [_tip(p, i, f'held out: forecast {v:.4f}, {_percent(e)}') for i, v, e in zip(at, said, error)]
    dots.append(Dots(x=p.loss[at], y=said, colour=colours[budget], ring=True, tips=tips))
    signed.append(Dots(x=p.flops[at], y=100 * error, colour=colours[budget], ring=True, tips=tips))
  both = np.array([p.loss.min(), p.loss.max()])
  shown = [scatter.scatter('<b>predicted</b> against actual', dots, [Curve(x=both, y=both, colour='faint')],
                           x_label=say.value, y_label=say.value, tall=True)]
  if signed:
    shown.append(scatter.scatter('<b>error of the held-out forecasts</b>, %, against FLOPs', signed, [_zero(p.flops)],
                                 x_label=_power, y_label=say.tick, log_x=True, tall=True))
  return _section('Predicted and actual', 'Grey: runs, and the law that is fitted to all of them. Rings: runs of a budget, '
                  'and the law of the smaller budgets.', *shown, legend=_legend(a))


def _residuals(a: Analysis) -> str:
  p, off = a.points, 100 * np.expm1(-a.fit.residuals)
  axes = (('parameters', p.n, say.count), ('tokens', p.d, say.count), ('FLOPs', p.flops, _power),
          ('tokens a parameter', p.d / p.n, say.tick))
  figures = [scatter.scatter(f'against <b>{title}</b>', _dots(a, x, off, lambda v: f'{v:+.2f} %'), [_zero(x)], x_label=label,
                             y_label=say.tick, log_x=True) for title, x, label in axes]
  return _section('Residuals', 'Loss over that of the law, less 1, in %. A trend is something the law does not have.',
                  *figures, legend=_legend(a))


def _zero(x: np.ndarray) -> Curve:
  return Curve(x=np.array([x.min(), x.max()]), y=np.zeros(2), colour='faint')


def _certainty(a: Analysis) -> str:
  p, law = a.points, a.fit.law
  at = np.array([law.optimum(a.budget, p.flops_per_nd) for law in a.laws])
  low, high = np.quantile(at, [0.005, 0.995], axis=0)  # one fit in a hundred would take the whole chart
  at = at[((low <= at) & (at <= high)).all(axis=1)]
  n, d, loss = (float(v) for v in law.optimum(a.budget, p.flops_per_nd))
  tip = f'the fit: N {say.count(n)}, D {say.count(d)}, loss {loss:.4f}'
  cloud = scatter.scatter(f'<b>L*</b> against N* at {_power(a.budget)} FLOPs', [
    Dots(x=at[:, 0], y=at[:, 2]), _ring(n, loss, 'c1', tip)], x_label=say.count, y_label=say.value, log_x=True, tall=True)
  return _section('How certain', f'Dots: fits to {len(a.laws):,} resamples of the runs; the ring is the fit. The stronger '
                  'the colour behind them, the better exponents fit.', *[_profile(a)] * (a.fit.form == 'chinchilla'), cloud)


def _profile(a: Analysis) -> str:
  of, law = np.array([[law.alpha, law.beta] for law in a.laws]), a.fit.law
  middle = np.array([law.alpha, law.beta])
  reach = np.minimum(1.15 * np.quantile(np.abs(of - middle), 0.98, axis=0), 0.9 * middle) + 1e-3
  alphas, betas = (np.linspace(m - r, m + r, CELLS) for m, r in zip(middle, reach))
  values, _ = chinchilla.profile(a.points.n, a.points.d, a.points.loss, alphas, betas, objective=a.fit.objective)
  shown = of[(np.abs(of - middle) <= reach).all(axis=1)]
  dots = [Dots(x=shown[:, 0], y=shown[:, 1], colour='c1'),
          _ring(law.alpha, law.beta, 'c1', f'the fit: alpha {law.alpha:.4f}, beta {law.beta:.4f}')]
  above = np.maximum(values.T / min(a.fit.value, values.min()) - 1, 1e-3)
  return scatter.heat('<b>objective</b>, least over E, A and B: beta against alpha', alphas, betas, above, dots,
                      x_label=say.tick, y_label=say.tick, say=lambda v: f'{_percent(v)} above the least')


def _tables(a: Analysis) -> str:
  fit, rows = a.fit, []
  for name in ('E', 'A', 'B', 'alpha', 'beta', *['q'] * (fit.form == 'nesting')):
    low, high = interval([getattr(law, name) for law in a.laws], a.level)
    rows.append([name, f'{getattr(fit.law, name):.6g}', f'{low:.5g}', f'{high:.5g}'])
  of_law = table(['', 'fit', 'from', 'to'], rows, f'The law, with intervals of {a.level:.0%}')
  rows = [[_power(budget), *(f'{say.value(value)}<small>{_both(ends)}</small>' for value, *ends in _optima(a, budget).T)]
          for budget in sorted({*np.unique(a.points.budget).tolist(), a.budget})]
  of_budgets = table(['FLOPs', 'N*', 'D*', 'D* / N*', 'L*'], rows, 'Optima by the law')
  told = (f'{fit.objective}: {fit.value:.8g}; its delta is {fit.delta_over_mad:.3g} of the residuals\' median absolute '
          f'deviation; condition number {fit.condition:.3g}')
  return f'<section><h2>Figures</h2><p class="soft">{escape(told)}</p>{of_law}{of_budgets}</section>'


def _section(title: str, told: str, *figures: str, legend: str = '') -> str:
  """One figure is as wide as the page, more stand two in a row."""
  shown = f'<div class="two">{"".join(figures)}</div>' if len(figures) > 1 else figures[0]
  return f'<section><h2>{title}</h2><p class="soft">{told}</p>{legend}{shown}</section>'


def _percent(share: float) -> str:
  return f'{100 * share:+.2f} %'


def _power(v: float) -> str:
  return f'{v:.3g}'.replace('e+', 'e')
