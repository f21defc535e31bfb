"""Fits scaling laws to the runs of a sweep: python -m maxlm.scaling fit RUNS (docs/scaling.md).

    python -m maxlm.scaling fit RUNS [--budget=1e22] [--count=params] [--target=loss] [--json=F] [--plot=F.html]
    python -m maxlm.scaling predict RUNS --sweep=configs/sweeps/x.py --budget=1e22 --out=DIR
    python -m maxlm.scaling score DIR/forecast-1e22.json WORKDIR [--json=F]

RUNS is the directory of a sweep, its runs.csv or runs.parquet, or any CSV whose columns --columns names.
"""

import json
from pathlib import Path

from maxlm import flags

BUDGET = flags.DEFINE_float('budget', None, 'FLOPs of the optimum that is asked for (default: ten times the largest run)')
COUNT = flags.DEFINE_enum('count', 'params', ['params', 'params_non_embedding', 'params_active'], 'which parameters are N')
TARGET = flags.DEFINE_string('target', 'loss', 'column of the loss: loss, bits_per_byte, loss/SOURCE, train_loss')
COLUMNS = flags.DEFINE_list('columns', [], "names in a CSV not of ours: 'params=Model Size,flops=Training FLOP'")
OBJECTIVE = flags.DEFINE_enum('objective', 'huber', ['huber', 'absolute', 'squares'], 'of log(predicted / measured)')
DELTA = flags.DEFINE_float('delta', 1e-3, 'of the Huber objective', lower_bound=1e-9)
FORM = flags.DEFINE_enum('form', 'chinchilla', ['chinchilla', 'nesting', 'kaplan'], 'of the law: docs/scaling.md')
SAMPLES = flags.DEFINE_integer('samples', 1000, 'resamples of the bootstrap', lower_bound=20)
LEVEL = flags.DEFINE_float('level', .8, 'of the intervals', lower_bound=.01, upper_bound=.999)
JSON = flags.DEFINE_string('json', '', 'file for all the figures, in full precision')
PLOT = flags.DEFINE_string('plot', '', 'file for the page of plots, .html')
SWEEP = flags.DEFINE_string('sweep', '', 'of a prediction: the Python file with the family, member(size, tokens)')
OUT = flags.DEFINE_string('out', 'forecasts', 'of a prediction: directory of the config and of the registration')


def main(words: list[str]) -> int:
  command, rest = words[0] if words else '', words[1:]
  if command == 'fit' and len(rest) == 1:
    return fit(rest[0])
  if command == 'predict' and len(rest) == 1:
    return predict(rest[0])
  if command == 'score' and len(rest) == 2:
    return score(Path(rest[0]), Path(rest[1]))
  raise ValueError('say what to do: python -m maxlm.scaling fit RUNS, predict RUNS --sweep=F.py, score REGISTRATION WORKDIR')


def fit(runs: str) -> int:
  from maxlm.scaling import analysis
  found = analysed(runs)
  print(analysis.text(found))
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(analysis.figures(found), indent=2) + '\n')
  if PLOT.value:
    from maxlm.scaling import page
    page.write(found, Path(PLOT.value), f'Scaling of {Path(runs).name}', COUNT.value)
    print(f'\n{PLOT.value}: open it in a browser')
  return 0


def predict(runs: str) -> int:
  import jax

  from maxlm.scaling import registration
  if not SWEEP.value:
    raise ValueError('say of which family: --sweep=configs/sweeps/x.py')
  jax.config.update('jax_platforms', 'cpu')  # nothing is trained here
  found = analysed(runs)
  path, record = registration.register(found, sweep=SWEEP.value, count=COUNT.value, out=Path(OUT.value))
  print('\n'.join([registration.text(record), *(f'ALARM {line}' for line in found.alarms),
                   f'registered in {path}, SHA-256 {registration.sha256(record)}',
                   f'to train it: python -m maxlm.train --config={path.with_suffix(".py")}']))
  return 0


def score(path: Path, workdir: Path) -> int:
  from maxlm.scaling import registration
  grade = registration.score(path, workdir)
  if JSON.value:
    Path(JSON.value).write_text(json.dumps(grade, indent=2) + '\n')
  print(f'actual {grade["actual"]:.4f}, forecast {grade["forecast"]:.4f}: {grade["error"]:+.2f} %, '
        f'{"inside" if grade["inside"] else "OUTSIDE"} {grade["low"]:.4f} to {grade["high"]:.4f} ({grade["level"]:.0%})')
  waste = grade['deadweight']
  print('deadweight compute ' + ('unknown: a loss below E of the law' if waste is None else f'{waste:+.1f} %'))
  return 0


def analysed(runs: str):
  """The Analysis of RUNS by the flags."""
  from maxlm.scaling import analysis, points
  from maxlm.scaling.solve import Absolute, Huber, Squares
  if not all('=' in pair for pair in COLUMNS.value):
    raise ValueError(f'--columns={",".join(COLUMNS.value)}: write ours=theirs, ours=theirs')
  columns = dict(pair.split('=', 1) for pair in COLUMNS.value)
  objective = {'huber': Huber(DELTA.value), 'absolute': Absolute(), 'squares': Squares()}[OBJECTIVE.value]
  return analysis.analyse(points.read(runs, COUNT.value, TARGET.value, columns), budget=BUDGET.value, objective=objective,
                          form=FORM.value, samples=SAMPLES.value, level=LEVEL.value)


if __name__ == '__main__':
  flags.run(main, words=True)
