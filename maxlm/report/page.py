"""Draws one run, or several beside each other, as a page of HTML: see `data_pipeline.pages`, whose looks it has.

Of one run a colour is a source, a task's length or an evaluation; of several it is a run.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from data_pipeline.pages import document, escape, percent, table
from maxlm.metrics import duration
from maxlm.report import charts, record, say
from maxlm.report.charts import chart
from maxlm.report.lines import MOST, Axis, by_source, each_run, last_of, legend_of, typical
from maxlm.report.record import Run, config_differences
from maxlm.report.scores import held_out, tasks

SHOWN = 100  # events, and keys of the config
CATEGORIES = {'step': 'kept', 'lost': 's3', 'data': 's1', 'checkpoint': 's2', 'evaluation': 's4', 'compile': 's6',
              'restore': 's5', 'init': 's7', 'finish': 'held', 'idle': 's0'}
OWN = ('loss', 'grad_norm', 'learning_rate', 'tokens_per_second', 'mfu', 'time', 'tokens', 'skipped')  # have a place
STYLE = """
.quiet { color: var(--soft); }
.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 9em; text-align: left; }
.facts th { text-align: left; }
td small { white-space: nowrap; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px 28px; }
h2 small { margin-left: 8px; }
"""


def page(runs: list[Run]) -> str:
  """runs: one or more, as `record.read` gives them."""
  title = runs[0].name if len(runs) == 1 else f'{len(runs)} runs, compared'
  body = [f'<h1>{escape(title)}</h1>', _headline(runs), _notes(runs), _loss(runs), held_out(runs), tasks(runs),
          _sources(runs), _rates(runs), _time(runs), _events(runs), _facts(runs), _differences(runs)]
  return document(title, body, charts.STYLE + STYLE)


def write(workdir: Path) -> Path:
  """Writes WORKDIR/report.html, for a run at its end; returns its path. OSError where it cannot."""
  return write_page([record.read(workdir)], workdir / 'report.html')


def write_page(runs: list[Run], out: Path) -> Path:
  partial = out.with_name(out.name + '.partial')
  partial.write_text(page(runs), encoding='utf-8')
  partial.replace(out)
  return out


# -- from above


def _headline(runs: list[Run]) -> str:
  if len(runs) > 1:
    return legend_of(runs)
  run, series = runs[0], runs[0].series
  last = lambda name: series[name].values[-1] if name in series else None
  seen = float(run.tokens(np.array([run.last_step]))[0])
  goal = f', {percent(seen, run.goal)} of {say.count(run.goal)}' if run.goal and seen <= run.goal else ''
  tiles = [(say.count(seen), 'tokens' + goal) if run.has_tokens else (f'{run.last_step:,}', 'steps')]
  tiles.append((say.value(last_loss(run)), 'training loss, smoothed'))
  if (bits := last('eval/bits_per_byte/all')) is not None:
    tiles.append((say.value(bits), 'held-out bits per byte'))
  if (speed := typical(run, 'tokens_per_second')) is not None:
    tiles.append((say.count(speed), 'tokens a second, median'))
  if (mfu := typical(run, 'mfu')) is not None:
    tiles.append((say.share(mfu), 'MFU, median'))
  if 'step' in run.shares:
    tiles.append((percent(run.shares['step'], 1), 'goodput'))
  tiles.append((duration(float(run.seconds(np.array([run.last_step]))[0])), escape(run.state)))
  return '<div class="tiles">' + ''.join(f'<div><b>{one}</b><span>{text}</span></div>' for one, text in tiles) + '</div>'


def last_loss(run: Run) -> float:
  loss = run.series['loss']
  return float(charts.smoothed(loss.values, np.isin(loss.steps, run.skipped))[-1])


def _notes(runs: list[Run]) -> str:
  """What a reader should know before the figures."""
  said = []
  for run in runs:
    whose = f'{run.name}: ' * (len(runs) > 1)
    if bad := run.not_finite:
      steps = f'{len(bad):,} steps, first at {bad[0]:,}' if len(bad) > 1 else f'step {bad[0]:,}'
      said.append(f'{whose}the loss or the gradient is no number at {steps}')
    said += [whose + note for note in run.notes]
  if not said:
    return ''
  return ('<div class="alarms" role="alert"><span class="bad">Look at this first</span><ul>'
          + ''.join(f'<li>{escape(text)}</li>' for text in said) + '</ul></div>')


def _loss(runs: list[Run]) -> str:
  axis = Axis(runs)
  told = ('The line is an average over about 1 % of the steps, without skipped ones; the band behind it goes from the '
          'lowest to the highest single step.' + ' Dashed: a stage begins.' * any(run.stages for run in runs)
          + ' <b class="quiet">▲</b> resumed,' * any('resumed' in mark.text for mark in axis.signs)
          + ' <b class="bad">▲</b> an update was skipped, or a rewind,' * any(mark.bad for mark in axis.signs)).rstrip(',')
  against_tokens = chart(f'<b>loss</b> against {axis.unit}', each_run(runs, axis, 'loss', band=True), x_label=axis.short,
                         y_label=say.value, marks=axis.signs, tall=True)
  timed = [dataclasses.replace(line, x=run.seconds(run.series['loss'].steps))
           for run, line in zip(runs, each_run(runs, axis, 'loss', band=True))]
  against_time = chart('<b>loss</b> against time, without idle time', timed, x_label=say.clock, y_label=say.value,
                       x_ticks=say.time_ticks(max(line.x[-1] for line in timed)))
  others = [chart(f'<b>{title}</b>', each_run(runs, axis, name, **how), x_label=axis.short, y_label=say.tick,
                  marks=axis.lines, **more) for name, title, how, more in (
              ('learning_rate', 'learning rate', {}, {'floor': 0.0}),
              ('grad_norm', 'gradient norm', {'band': True}, {'log': True}))]
  return (f'<section><h2>Training</h2><p class="soft">{told}</p>{against_tokens}'
          f'<div class="grid">{against_time}{"".join(others)}</div></section>')


# -- sources, rates, time


def _sources(runs: list[Run]) -> str:
  axis = Axis(runs)
  names = list(dict.fromkeys(name for run in runs for name in run.names('loss/')))
  if len(names) < 2 and len(runs) == 1:
    return ''
  drawn = by_source(runs, axis, 'loss/', 'training loss', smooth=True, band=len(runs) > 1)
  return f'<section><h2>Training loss by source</h2>{drawn}</section>' if drawn else ''


def _rates(runs: list[Run]) -> str:
  axis = Axis(runs)
  drawn = [chart(f'<b>{title}</b>', each_run(runs, axis, name, band=True), x_label=axis.short, y_label=label,
                 marks=axis.signs, floor=0.0)
           for name, title, label in (('tokens_per_second', 'tokens a second', say.count), ('mfu', 'MFU', say.share))]
  others = dict.fromkeys(name for run in runs for name in run.series if name not in OWN and (
    '/' not in name or re.fullmatch(r'moe/\w+', name)))
  drawn += [chart(f'<b>{escape(say.name_of(name))}</b>', each_run(runs, axis, name, band=True), x_label=axis.short,
                  y_label=say.tick, marks=axis.lines) for name in [*others][:MOST]]
  return f'<section><h2>Rates</h2>{legend_of(runs)}<div class="grid">{"".join(drawn)}</div></section>' if any(drawn) else ''


def _time(runs: list[Run]) -> str:
  """Of each run a bar of where its time went."""
  known = [run for run in runs if run.shares]
  if not known:
    return ''
  bars, rows = [], []
  for run in known:
    parts = [(kind, of, name) for name, kind in CATEGORIES.items() if (of := run.shares.get(name, 0.0)) > 0]
    pieces = ''.join(f'<i class="{kind}" style="width:{100 * of:.3f}%" title="{name}: {percent(of, 1)}"></i>'
                     for kind, of, name in parts)
    told = ', '.join(f'{name} {percent(of, 1)}' for _, of, name in parts)
    bars.append(f'<span>{escape(run.name)}</span><div class="stack" role="img" aria-label="{escape(told)}">{pieces}</div>')
    rows.append([escape(run.name), duration(run.account.wall) if run.account else '',
                 *(percent(run.shares.get(name, 0.0), 1) for name in CATEGORIES)])
  keys = ''.join(f'<li><i class="{kind}"></i>{name}</li>' for name, kind in CATEGORIES.items()
                 if any(run.shares.get(name) for run in known))
  return (f'<section><h2>Where the time went</h2><ul class="legend">{keys}</ul><div class="fate">{"".join(bars)}</div>'
          + table(['run', 'in all', *CATEGORIES], rows, 'Shares of the wall time; step: training that stands')
          + '</section>')


# -- tables


def _events(runs: list[Run]) -> str:
  lines = []
  for run in runs:
    events = [(event['at'], str(event['event']), ', '.join(
      f'{key} {one}' for key, one in event.items() if key not in ('kind', 'attempt', 'time', 'event') and not (
        key == 'at' and event['event'] != 'rewind'))) for event in (run.account.events if run.account else ())]
    for i, attempt in enumerate(run.account.attempts if run.account else ()):
      from_step = '' if attempt.resumed is None else f'at step {attempt.resumed:,}'
      is_last = i == len(run.account.attempts) - 1
      ended = attempt.how or ('goes on, or was killed' if is_last else 'killed')
      done = '' if attempt.done is None else f', to step {attempt.done:,}'
      events.append((attempt.start, 'resumed' if i else 'began', f'{from_step}{done}: {ended}'))
    lines += [[escape(say.moment(at)), escape(what), escape(text), *[escape(run.name)] * (len(runs) > 1)]
              for at, what, text in sorted(events)]
  if not lines:
    return ''
  left = f'The first {SHOWN} of {len(lines):,}' * (len(lines) > SHOWN)
  return ('<section><h2>Events</h2>'
          + table(['when', '\twhat', '\t', *['\trun'] * (len(runs) > 1)], lines[:SHOWN], left) + '</section>')


def facts(run: Run) -> dict[str, str]:
  """What there is to say of a run in a word each."""
  series, lineage = run.series, run.meta.get('lineage', {})
  last = np.array([run.last_step])
  parents = lineage.get('parents') or ([lineage['parent']] if lineage.get('parent') else [])
  said = {
    'workdir': run.workdir,
    'state': run.state,
    'began': say.moment(run.account.attempts[0].start if run.account and run.account.attempts else series['time'].values[0]),
    'last record': say.moment(series['time'].values[-1]),
    'time, without idle': duration(float(run.seconds(last)[0])),
    'attempts': f'{len(run.account.attempts):,}' if run.account else '',
    'steps': f'{run.last_step:,}',
    'tokens': (f'{run.tokens(last)[0]:,.0f}' + (f' of {run.goal:,}' if run.goal else '')) if run.has_tokens else '',
    'parameters in a checkpoint': f'{run.n_parameters:,}' if run.n_parameters else '',
    'stages': ' → '.join(span.name for span in run.stages),
    'training loss, smoothed': say.value(last_loss(run)),
    'held-out bits per byte': last_of(run, 'eval/bits_per_byte/all'),
    'tokens a second, median': say.count(speed) if (speed := typical(run, 'tokens_per_second')) is not None else '',
    'MFU, median': say.share(mfu) if (mfu := typical(run, 'mfu')) is not None else '',
    'goodput': percent(run.shares['step'], 1) if 'step' in run.shares else '',
    'updates skipped': f'{len(run.skipped):,}' if 'skipped' in series else '',
    'steps without a number': f'{len(run.not_finite):,}',
    'steps recorded twice': f'{run.redone:,}' if run.redone else '',
    'run': lineage.get('run', ''),
    'from': ', '.join(f'step {parent.get("step")} of {parent.get("path") or parent.get("run")}' for parent in parents),
    'code': lineage.get('code', ''),
    'jax': lineage.get('jax', ''),
  }
  return {name: str(text) for name, text in said.items()}


def _facts(runs: list[Run]) -> str:
  of = [facts(run) for run in runs]
  rows = [[name, *(escape(one[name]) for one in of)] for name in of[0] if any(one[name] for one in of)]
  head = ['', *(escape(run.name) for run in runs)]
  return f'<section class="facts"><h2>Facts</h2>{table(head, rows)}</section>'


def _differences(runs: list[Run]) -> str:
  """Of one run its config, of several the keys in which they differ."""
  said = lambda v: v if v == 'absent' else json.dumps(v)
  if len(runs) == 1:
    if not runs[0].config:
      return ''
    text = json.dumps(runs[0].config, indent=1)
    return f'<section><h2>Config</h2><details><summary>config.json</summary><pre>{escape(text)}</pre></details></section>'
  found = config_differences(runs)
  if not found:
    return '<section><h2>Configs</h2><p>They do not differ.</p></section>'
  rows = [[f'<code>{escape(key)}</code>', *(escape(said(v)) for v in values)] for key, values in [*found.items()][:SHOWN]]
  left = f'The first {SHOWN} of {len(found):,} keys that differ' * (len(found) > SHOWN)
  return (f'<section class="facts"><h2>Configs differ in</h2>'
          f'{table(["key", *(escape(run.name) for run in runs)], rows, left)}</section>')
