"""The part of the page that says what a model can do: held-out text by source, tasks by length, before and after stages."""

import math

import numpy as np

from data_pipeline.pages import escape, table
from maxlm.report import say
from maxlm.report.charts import Line, chart, legend
from maxlm.report.lines import Axis, by_source, last_of, legend_of
from maxlm.report.record import Evaluation, Run, Series, Span

EVALUATIONS = 5  # of a task, drawn against length


def _kinds(runs: list[Run]) -> list[str]:
  """Of evaluations by source: bits_per_byte, loss, and others there are."""
  found = dict.fromkeys(name.split('/')[0] for run in runs for name in run.names('eval/') if '/' in name)
  first = [kind for kind in ('bits_per_byte', 'loss') if kind in found]
  return first + sorted(kind for kind in found if kind not in (*first, 'tasks', 'chance'))


def held_out(runs: list[Run]) -> str:
  axis, kinds = Axis(runs), _kinds(runs)
  if not kinds:
    return ''
  drawn = {kind: by_source(runs, axis, f'eval/{kind}/', say.name_of(kind), dots=True) for kind in kinds}
  first, *others = drawn
  more = ''.join(f'<h4>{escape(say.name_of(kind))}</h4>{drawn[kind]}' for kind in others if drawn[kind])
  more = f'<details><summary>{escape(", ".join(map(say.name_of, others)))}</summary>{more}</details>' * bool(more)
  return f'<section><h2>Held-out text</h2>{drawn[first]}{_score_table(runs, first)}{more}</section>'


def _score_table(runs: list[Run], kind: str) -> str:
  """What each source has come to."""
  names = list(dict.fromkeys(name for run in runs for name in run.names(f'eval/{kind}/')))
  if len(runs) > 1:
    rows = [[escape(name), *(last_of(run, f'eval/{kind}/{name}') for run in runs)] for name in names]
    return table(['source', *(escape(run.name) for run in runs)], rows,
                 f'The last held-out {escape(say.name_of(kind))} of each')
  run = runs[0]
  compared = run.done.get('baselines', {}) if run.done and kind == 'bits_per_byte' else {}
  columns = [column for column in ('gzip', 'unigram') if any(column in of for of in compared.values())]
  rows = []
  for name in names:
    values = run.series[f'eval/{kind}/{name}'].values
    finite = values[np.isfinite(values)]
    rows.append([escape(name), say.value(values[0]), say.value(finite.min()) if finite.size else '', say.value(values[-1]),
                 *(say.value(compared.get(name, {}).get(column, math.nan)) for column in columns)])
  heads = {'gzip': 'gzip −9', 'unigram': 'unigram model'}
  return table(['source', 'first', 'best', 'last', *(heads[column] for column in columns)], rows,
               f'Held-out {escape(say.name_of(kind))}')


# -- tasks, and what stages did to scores


def tasks_of(run: Run) -> dict[str, list[str]]:
  """The lengths of each task, the shortest first; 'all' is among them where there is no other."""
  found = {}
  for name in run.names('eval/tasks/'):
    task, _, length = name.rpartition('/')
    found.setdefault(task, []).append(length)
  return {task: sorted(filter(str.isdecimal, lengths), key=int) or lengths for task, lengths in found.items()}


def tasks(runs: list[Run]) -> str:
  axis = Axis(runs)
  lengths = {}
  for run in runs:
    for task, of in tasks_of(run).items():
      lengths[task] = sorted({*lengths.get(task, ()), *of}, key=by_length)
  tables = _before_and_after(runs)
  if not lengths:
    return f'<section><h2>What the stages did</h2>{tables}</section>' if any(run.stages for run in runs) else ''
  growing = [_against_length(runs, task, of) for task, of in lengths.items() if sum(map(str.isdecimal, of)) > 1]
  growing = ''.join(growing)
  names, key = _which_evaluations(runs)
  growing = f'<h3>Right answers against length</h3><p class="soft">{key} Dotted: chance.</p>{names}' \
            f'<div class="grid">{growing}</div>' * bool(growing)
  over = _over_tokens(runs, axis, lengths)
  return (f'<section><h2>Tasks</h2>{growing}<h3>Right answers in the course of training</h3>{over}'
          f'<h3>Before and after</h3>{tables}</section>')


def _told(run: Run) -> list[Evaluation]:
  """Evaluations of tasks that are drawn against length: the first and the last, and those at the ends of stages, or some
  between."""
  found = [one for one in run.evaluations if any(name.startswith('tasks/') for name in one.values)]
  ends = [last for span in run.stages if (last := _after(found, span)) is not None]
  if len(ends) < 2:
    ends = [found[round(i * (len(found) - 1) / (EVALUATIONS - 1))] for i in range(EVALUATIONS)]
  return [one for one in found if one in (found[0], *ends, found[-1])]


def _after(evaluations: list[Evaluation], span: Span) -> Evaluation | None:
  """The last one of a stage, of those after a step of it."""
  of = [one for one in evaluations if one.stage == span.name and span.first <= one.step <= span.last]
  return of[-1] if of else None


def _before(evaluations: list[Evaluation], span: Span) -> Evaluation | None:
  """What a stage begins with, if it was evaluated as that stage."""
  return next((one for one in evaluations if one.stage == span.name and one.step == span.first - 1), None)


def _which_evaluations(runs: list[Run]) -> tuple[str, str]:
  """(legend, sentence) of the charts against length."""
  if len(runs) > 1:
    return legend_of(runs), 'The last evaluation of each run.'
  said, axis = [], Axis(runs)
  for one in _told(runs[0]):
    stage = f', {one.stage}' * bool(runs[0].stages)
    said.append(f'after {axis.label(axis.at(runs[0], one.step))}{stage}')
  return legend(said), 'The first evaluation, the last, and some between; where there are stages, those at their ends.'


def _against_length(runs: list[Run], task: str, lengths: list[str]) -> str:
  lengths = [length for length in lengths if length.isdecimal()]
  x = np.array([float(length) for length in lengths])

  def at(one, kind):
    return np.array([one.values.get(f'{kind}/{task}/{length}', math.nan) for length in lengths])

  told = [(run.name, one) for run in runs for one in _told(run)[-1:]] if len(runs) > 1 else [
    (f'after step {one.step:,}:', one) for one in _told(runs[0])]
  lines = [Line(name=name, x=x, y=at(one, 'tasks'), colour=i, dots=True) for i, (name, one) in enumerate(told)]
  chance = next((y for _, one in told if np.isfinite(y := at(one, 'chance')).any()), None)
  if chance is not None:
    lines.append(Line(name='chance', x=x, y=chance, faint=True))
  ticks = x.tolist() if len(x) <= 5 else [x[0], x[len(x) // 2], x[-1]]
  return chart(f'<b>{escape(say.name_of(task))}</b>, by length in tokens', lines, x_label=lambda v: f'{v:,.0f}',
               y_label=say.share, floor=0.0, top=1.0, x_ticks=ticks, log_x=True)


def _over_tokens(runs: list[Run], axis: Axis, lengths: dict[str, list[str]]) -> str:
  """A chart for each task: of one run a line for each length, of several the mean of all lengths."""
  how, drawn = dict(x_label=axis.short, y_label=say.share, marks=axis.lines, floor=0.0, top=1.0), []
  all_lengths = sorted({length for of in lengths.values() for length in of}, key=by_length)
  for task, of in lengths.items():
    title = f'<b>{escape(say.name_of(task))}</b>' + ', mean of its lengths' * (len(runs) > 1 and len(of) > 1)
    if len(runs) == 1:
      lines = [axis.line(runs[0], runs[0].series[f'eval/tasks/{task}/{length}'], length, colour=all_lengths.index(length),
                         dots=True) for length in of]
    else:
      means = [_mean(run, [f'tasks/{task}/{length}' for length in of]) for run in runs]
      lines = [axis.line(run, mean, run.name, colour=i, dots=True)
               for i, (run, mean) in enumerate(zip(runs, means)) if mean.steps.size]
    drawn.append(chart(title, lines, **how))
  return (legend(all_lengths) if len(runs) == 1 else legend_of(runs)) + f'<div class="grid">{"".join(drawn)}</div>'


def _mean(run: Run, names: list[str]) -> Series:
  """Of the evaluations that have all these values."""
  of = [one for one in run.evaluations if names and one.values.keys() >= {*names}]
  values = [sum(one.values[name] for name in names) / len(names) for one in of]
  return Series(np.array([one.step for one in of], np.int64), np.array(values, np.float64))


def by_length(length: str) -> tuple[bool, int]:
  """A key to sort with: numbers rise, words come after them."""
  return (False, int(length)) if length.isdecimal() else (True, 0)


def stage_scores(run: Run) -> tuple[list[str], dict[str, list[float | None]]]:
  """(columns, {name of an evaluation: its value in each}): before and after each stage, of the last as it is so far; without
  stages the first evaluation and the last."""
  of = run.evaluations
  if run.stages:
    found = [(f'{when} {span.name}', one) for span in run.stages
             for when, one in (('before', _before(of, span)), ('after', _after(of, span))) if one is not None]
  else:
    found = [(f'step {one.step:,}', one) for one in of[:1] + of[1:][-1:]]
  names = [name for kind in ('bits_per_byte/', 'tasks/') for name in dict.fromkeys(
    name for _, one in found for name in one.values) if name.startswith(kind)]
  return [column for column, _ in found], {name: [one.values.get(name) for _, one in found] for name in names}


def _before_and_after(runs: list[Run]) -> str:
  tables = []
  for run in runs:
    columns, values = stage_scores(run)
    if len(columns) < 2 and len(runs) == 1 or not values:
      continue
    rows = []
    for name, row in values.items():
      kind, _, what = name.partition('/')
      said = say.share if kind == 'tasks' else say.value
      cells = []
      for i, v in enumerate(row):
        before = row[i - 1] if i else None
        change = '' if v is None or before is None else f'<small>{_change(v - before, kind)}</small>'
        cells.append('' if v is None else said(v) + change)
      what, of = (say.name_of(what), 'right') if kind == 'tasks' else (what, say.name_of(kind))
      rows.append([f'{escape(what)} <small>{escape(of)}</small>', *cells])
    caption = f'{escape(run.name)}: ' * (len(runs) > 1) + 'and the change from the column before'
    tables.append(table(['', *map(escape, columns)], rows, caption))
  return ''.join(tables)


def _change(by: float, kind: str) -> str:
  text = f'{100 * by:+.1f} %' if kind == 'tasks' else f'{by:+.3f}'
  return text.replace('-', '−')
