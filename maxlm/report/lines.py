"""What the parts of the page have in common: how values are said, the axis of tokens with its marks, lines of runs."""

import functools

import numpy as np

from data_pipeline.pages import escape
from maxlm.report import say
from maxlm.report.charts import Line, Mark, chart, legend
from maxlm.report.record import Run, Series

MOST = 16  # lines in a chart, small charts of a kind


class Axis:
  """The horizontal axis of most charts: tokens, or steps where a run does not say how many; and what is marked on it."""

  def __init__(self, runs: list[Run]):
    self.is_tokens = all(run.has_tokens for run in runs)
    self.label = lambda x: f'{say.count(x)} tokens' if self.is_tokens else f'step {x:,.0f}'
    self.short = (lambda x: say.count(x)) if self.is_tokens else (lambda x: f'{x:,.0f}')
    self.unit = 'tokens' if self.is_tokens else 'steps'
    self.lines = self._stages(runs)
    self.signs = [*self.lines, *(mark for run in runs for mark in self._of(run, f'{run.name}: ' * (len(runs) > 1)))]

  def __call__(self, run: Run, steps) -> np.ndarray:
    return run.tokens(steps) if self.is_tokens else np.asarray(steps, np.float64)

  def at(self, run: Run, step: int) -> float:
    return float(self(run, np.array([step]))[0])

  def _stages(self, runs: list[Run]) -> list[Mark]:
    """Where stages begin; those of the same name at the same place together."""
    whose = {}
    for run in runs:
      for span in run.stages:
        whose.setdefault((self.at(run, span.first - 1), span.name), []).append(run.name)
    return [Mark(x=x, text=name if len(names) == len(runs) else f'{", ".join(names)}: {name}', kind='line')
            for (x, name), names in whose.items()]

  def _of(self, run: Run, whose: str) -> list[Mark]:
    """Resumes, rewinds and skipped steps of a run."""
    marks, at = [], functools.partial(self.at, run)
    for step in run.skipped:
      marks.append(Mark(x=at(step), text=f'{whose}update of step {step:,} skipped', kind='below', bad=True))
    for event in run.account.events if run.account else ():
      if event['event'] == 'rewind' and type(event.get('at')) is int:
        text = f'{whose}rewind from step {event["at"]:,} to {event.get("to")}'
        marks.append(Mark(x=at(event['at']), text=text, kind='below', bad=True))
    for attempt in run.account.attempts[1:] if run.account else ():
      if attempt.resumed:
        marks.append(Mark(x=at(attempt.resumed), text=f'{whose}resumed at step {attempt.resumed:,}', kind='below'))
    return marks

  def line(self, run: Run, series: Series, name: str, **more) -> Line:
    left_out = np.isin(series.steps, run.skipped) if run.skipped else None
    return Line(name=name, x=self(run, series.steps), y=series.values, left_out=left_out, **more)


def each_run(runs: list[Run], axis: Axis, name: str, **more) -> list[Line]:
  """A line for each run that has the series."""
  return [axis.line(run, run.series[name], run.name if len(runs) > 1 else '', colour=i, **more)
          for i, run in enumerate(runs) if name in run.series]


def legend_of(runs: list[Run]) -> str:
  return legend([run.name for run in runs])


def by_source(runs: list[Run], axis: Axis, prefix: str, title: str, **how) -> str:
  """Series of sources: of one run in one chart, of several a chart for each source."""
  names = list(dict.fromkeys(name for run in runs for name in run.names(prefix)))
  names = [*(['all'] if 'all' in names else []), *(name for name in names if name != 'all')]
  if len(runs) == 1 and len(names) > 1:
    most = names[:MOST]
    lines = [axis.line(runs[0], runs[0].series[prefix + name], name, colour=i, **how) for i, name in enumerate(most)]
    left = f' <small>and {len(names) - MOST} others</small>' * (len(names) > MOST)
    drawn = chart(f'<b>{escape(title)}</b>{left}', lines, x_label=axis.short, y_label=say.value, marks=axis.lines, tall=True)
    return legend(most) + drawn if drawn else ''
  drawn = [chart(f'<b>{escape(title)}</b> of {escape(name)}', each_run(runs, axis, prefix + name, **how), x_label=axis.short,
                 y_label=say.value, marks=axis.lines) for name in names[:MOST]]
  left = f'<p class="soft">and {len(names) - MOST} others</p>' * (len(names) > MOST)
  return f'{legend_of(runs)}<div class="grid">{"".join(drawn)}</div>{left}' if any(drawn) else ''


def typical(run: Run, name: str) -> float | None:
  values = run.series[name].values if name in run.series else np.array([])
  values = values[np.isfinite(values)]
  return float(np.median(values)) if values.size else None


def last_of(run: Run, name: str) -> str:
  return say.value(run.series[name].values[-1]) if name in run.series else ''
