"""A run as a page of plots, or several beside each other: loss, rates, scores by source and length, where the time went.

    python -m maxlm.report WORKDIR… [--out=F.html] [--json]

One file without a script and with nothing from elsewhere. It reads what a run writes, so it works while the run goes on;
docs/report.md says what is on it.
"""

import json
import math
from pathlib import Path
from typing import Any

from maxlm import flags
from maxlm.report import page, record, scores
from maxlm.report.record import Run

OUT = flags.DEFINE_string('out', '', 'file for the page (default: WORKDIR/report.html; of several runs report.html here)')
JSON = flags.DEFINE_bool('json', False, 'print the numbers as one JSON object instead of writing a page')


def main(words: list[str]) -> int:
  if not words:
    raise ValueError('say which run: python -m maxlm.report WORKDIR…')
  if OUT.value and not OUT.value.endswith('.html'):
    raise ValueError(f'--out={OUT.value}: the page is .html')
  if len({Path(word).resolve() for word in words}) < len(words):
    raise ValueError('the same workdir is named twice')
  runs = record.read_all(words)
  if JSON.value:
    print(json.dumps(figures(runs), allow_nan=False))
    return 0
  out = Path(OUT.value or (Path(words[0]) / 'report.html' if len(words) == 1 else 'report.html'))
  page.write_page(runs, out)
  for run in runs:
    for note in run.notes:
      print(f'note: {run.name}: {note}')
  print(f'{out}: {out.stat().st_size / 1e3:,.0f} kB; open it in a browser')
  return 0


def figures(runs: list[Run]) -> dict[str, Any]:
  """What the page says, but for the curves, which are in metrics.jsonl. NaN is None."""
  return {'runs': [_figures(run) for run in runs],
          'config_differences': record.config_differences(runs)}


def _figures(run: Run) -> dict[str, Any]:
  columns, values = scores.stage_scores(run)
  last = {name: _number(series.values[-1]) for name, series in run.series.items() if not name.startswith('eval/')}
  evaluations = {name: [[int(step), _number(value)] for step, value in zip(run.series[f'eval/{name}'].steps,
                                                                           run.series[f'eval/{name}'].values)]
                 for name in run.names('eval/')}
  return {'workdir': run.workdir, 'facts': page.facts(run), 'step': run.last_step, 'last': last,
          'stages': [{'name': span.name, 'first_step': span.first, 'last_step': span.last} for span in run.stages],
          'scores': {'columns': columns, 'values': {name: [*map(_number, row)] for name, row in values.items()}},
          'evaluations': evaluations, 'goodput': run.shares, 'skipped': run.skipped, 'not_finite': run.not_finite,
          'recorded_twice': run.redone, 'events': run.account.events if run.account else [],
          'lineage': run.meta.get('lineage'), 'notes': run.notes}


def _number(value: float | None) -> float | None:
  return None if value is None or not math.isfinite(value) else float(value)


if __name__ == '__main__':
  flags.run(main, words=True)
