"""A forecast that is written down before its run is trained, and the grade of that run.

`register` writes DIR/NAME.py, the config of the member of a sweep's family that spends the budget best, and DIR/NAME.json:
the forecast of its loss with an interval, what it was made from, and a SHA-256 over all of that, so that a later edit shows.
`score` compares a finished run with it, and refuses one that is not the run that was registered.
"""

import datetime
import functools
import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maxlm import flags, start
from maxlm.checkpoint import code_version
from maxlm.config import Experiment
from maxlm.report import record as run_record
from maxlm.scaling.analysis import Analysis
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.intervals import interval, optima
from maxlm.scaling.points import COUNTS
from maxlm.scaling.source import config_file
from maxlm.stages import segments
from maxlm.start import write_atomically
from maxlm.sweep import runs, table
from maxlm.sweep.count import parameters, total_flops, total_tokens

MOST = 1.05  # of the budget: a member that spends more of it in its steps is too large
MAY_DIFFER = (*table.MAY_DIFFER, 'name', 'pod')  # keys of a config that change nothing of what is trained


class Choice(NamedTuple):
  """A member of a family. n: parameters, as the law counts them; d: tokens; flops: exact, of all its steps."""
  experiment: Experiment
  n: float
  d: float
  flops: float


def choose(sweep: str, law: Chinchilla, budget: float, count: str) -> Choice:
  """The member of the sweep's family with the least forecast loss, of those that spend the budget, by their exact FLOPs.

  The file has `member(size, tokens) -> Experiment`, which grows with its size: the widths of its runs are sizes, and so are
  multiples of their greatest common divisor above the least of them. ValueError where there is no such member.
  """
  member = getattr(flags.module_of(sweep.partition(':')[0]), 'member', None)
  if member is None:
    raise ValueError(f'{sweep}: has no member(size, tokens), the family that a forecast is for')
  widths = [run.experiment.model.d_model for run in runs.load(sweep)]
  unit = math.gcd(*widths)

  @functools.cache
  def spent(units: int) -> Choice:
    any_length = member(size=units * unit, tokens=10**9)
    tokens, step = int(budget * total_tokens(any_length) / total_flops(any_length)), any_length.tokens_per_step
    chosen = member(size=units * unit, tokens=max(step, tokens - tokens % step))
    n = parameters(chosen.model)[COUNTS.index(count)]
    return Choice(chosen, float(n), float(total_tokens(chosen)), total_flops(chosen))

  def loss(units: int) -> float:
    if units * unit < min(widths) or spent(units).flops > MOST * budget:
      return math.inf
    return float(law.loss(spent(units).n, spent(units).d))

  best = min(widths) // unit
  if loss(best) == math.inf:
    raise ValueError(f'{sweep}: its smallest member spends more than {budget:.3g} FLOPs in a step: raise --budget')
  while loss(2 * best) < loss(best):
    best *= 2
  step = best // 2
  while step:
    nearer = min(best, best - step, best + step, key=loss)
    best, step = nearer, step if nearer != best else step // 2
  return spent(best)


def register(a: Analysis, *, sweep: str, count: str, out: Path) -> tuple[Path, dict[str, Any]]:
  """Writes the config and the record of the run to make; returns the record's path and what it says.

  The interval is for that very run: laws of resamples at its N and D, each with a residual of the fit drawn at random.
  FileExistsError where there is such a registration: it is never written over.
  """
  points, fit, budget, level = a.points, a.fit, a.budget, a.level
  choice = choose(sweep, fit.law, budget, count)
  name = f'forecast-{budget:.3g}'.replace('+', '')
  config, path = replace(choice.experiment, name=name), out / f'{name}.json'
  for taken in (path, path.with_suffix('.py')):
    if taken.exists():
      raise FileExistsError(f'{taken} is there already, and a registration is not written over: give another --out')
  per_nd = choice.flops / choice.n / choice.d
  n, d, loss = (float(v) for v in fit.law.optimum(budget, per_nd))
  draws = np.array([law.loss(choice.n, choice.d) for law in a.laws])
  draws *= np.exp(-np.random.default_rng(0).choice(fit.residuals, len(draws)))
  low, high = interval(draws, level)
  data = b''.join([*(values.tobytes() for values in (points.n, points.d, points.loss, points.flops)),
                   '\n'.join(points.name).encode()])
  record = {
    'name': name, 'date': datetime.datetime.now(datetime.UTC).isoformat(), 'git': code_version(), 'sweep': sweep,
    'target': points.target, 'forecast': float(fit.law.loss(choice.n, choice.d)), 'low': low, 'high': high, 'level': level,
    'budget': budget, 'params': choice.n, 'count': count, 'tokens': choice.d, 'flops': choice.flops,
    'steps': segments(config)[-1].stop, 'times_the_largest_run': choice.flops / float(points.flops.max()),
    'optimum': {'flops_per_nd': per_nd, 'N*': n, 'D*': d, 'D/N': d / n, 'L*': loss,
                'intervals': optima(a.laws, budget, level=level, flops_per_nd=per_nd)},
    'law': asdict(fit.law), 'objective': str(fit.objective), 'objective_value': fit.value, 'resamples': len(a.laws),
    'alarms': a.alarms, 'runs': len(points.n), 'data_sha256': hashlib.sha256(data).hexdigest(),
    'tokenizer': str(points.tokenizer[0]) if len(set(points.tokenizer)) == 1 else '',
    'config_hash': table.config_hash(config), 'config': start.as_saved(config)}
  lines = text(record).replace('\n', '\n    ')
  told = (f'A run that a forecast was made for, of the family of {sweep}.\n\n'
          f'    python -m maxlm.train --config={path.with_suffix(".py")}\n'
          f'    python -m maxlm.scaling score {path} runs/{name}\n\n    {lines}\n')
  out.mkdir(parents=True, exist_ok=True)
  write_atomically(path.with_suffix('.py'), config_file(config, told))
  assert table.config_hash(flags.load_config(str(path.with_suffix('.py')))) == record['config_hash']
  write_atomically(path, json.dumps({**record, 'sha256': sha256(record)}, indent=1, allow_nan=False) + '\n')
  return path, record


def text(record: dict[str, Any]) -> str:
  """What a person reads of a registration."""
  best = record['optimum']
  lines = [f'optimum at {record["budget"]:.4g} FLOPs, {best["flops_per_nd"]:.3g} FLOPs a parameter and token']
  lines += [f'  {name:<6} {best[name]:<12.5g} {low:.5g} to {high:.5g}' for name, (low, high) in best['intervals'].items()]
  return '\n'.join([
    *lines, f'{record["name"]}, {record["times_the_largest_run"]:.3g} times the largest run',
    f'  {record["params"]:.5g} {record["count"]}, {record["tokens"]:.5g} tokens, {record["flops"]:.5g} FLOPs',
    f'  {record["target"]} {record["forecast"]:.4f}, {record["low"]:.4f} to {record["high"]:.4f} ({record["level"]:.0%})'])


def sha256(record: dict[str, Any]) -> str:
  """Of the record, without the hash that it may have."""
  rest = {key: value for key, value in record.items() if key != 'sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(',', ':')).encode()).hexdigest()


def score(path: Path, workdir: Path) -> dict[str, Any]:
  """How the finished run did: 'actual', 'error' (100 (forecast / actual - 1)), 'inside' the interval, and 'deadweight', the
  part of its FLOPs, in percent, that the best run of the same loss would not need, by the law (None: a loss below its E).

  ValueError for a record that was edited, and for a run that is not the registered one, was begun before, or goes on.
  """
  record = json.loads(path.read_text())
  if record.get('sha256') != sha256(record):
    raise ValueError(f'{path}: its SHA-256 does not hold: it was edited after it was registered, and grades nothing')
  saved, done = (run_record.read_json(workdir / name, []) for name in ('config.json', 'DONE'))
  if not (saved and done):
    raise ValueError(f'{workdir} is no finished run: train {path.with_suffix(".py")} to its end first')
  for key, before, after in start.differences(record['config'], saved, Experiment):
    if not key.startswith(MAY_DIFFER):
      raise ValueError(f'{workdir} was trained with {key}={after} and {path} registers {before}: it is another run')
  if done['steps'] != record['steps']:
    raise ValueError(f'{workdir} has ended after {done["steps"]:,} steps and {path} registers {record["steps"]:,}')
  account = run_record.read(workdir).account
  if account is None or account.attempts[0].start < datetime.datetime.fromisoformat(record['date']).timestamp():
    raise ValueError(f'{workdir} was begun before the forecast of {record["date"]}, which is none then: train it again in '
                     'another --workdir')
  results = table.results(workdir, done['steps'])
  if results['tokenizer'] != record['tokenizer'] and record['tokenizer']:
    raise ValueError(f'{workdir} has another tokenizer than the runs of the fit: their losses cannot be compared')
  actual = results.get(record['target'])
  if actual is None:
    raise ValueError(f'{workdir} has no {record["target"]} of held-out rows at its end')
  law = Chinchilla(**record['law'])
  needed = float(law.flops_of(actual, record['optimum']['flops_per_nd']))
  return {name: record[name] for name in ('target', 'forecast', 'low', 'high', 'level')} | {
    'actual': actual, 'error': 100 * (record['forecast'] / actual - 1), 'inside': record['low'] <= actual <= record['high'],
    'deadweight': 100 * (1 - needed / record['flops']) if math.isfinite(needed) else None}
