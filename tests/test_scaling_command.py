"""python -m maxlm.scaling fit: a table of runs in, a judged law out; and the runs that hold no law, a clear line each."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxlm.scaling import alarms, analysis, chinchilla, points
from maxlm.scaling.chinchilla import Chinchilla

ROOT = Path(__file__).parents[1]
LAW = Chinchilla(E=1.8, A=480., B=2100., alpha=.35, beta=.37)


def rows(budgets=(1e17, 3e17, 1e18, 1e19), sizes=7, width=4.0, shift=1.0, noise=2e-3):
  """Rows of a table as maxlm.sweep collects it, of an isoFLOP ladder whose losses follow LAW."""
  rng, table = np.random.default_rng(3), []
  for budget in budgets:
    for i, n in enumerate(LAW.optimum(budget)[0] * shift * np.geomspace(1 / width, width, sizes)):
      d = budget / 6 / n
      loss = float(LAW.loss(n, d) * np.exp(noise * rng.standard_normal()))
      table.append({'name': f'c{budget:.0e}_{i}', 'group': f'{budget:.0e}', 'status': 'finished', 'tokenizer': 'abc',
                    'tokens': d, 'params': n, 'params_non_embedding': n - 200 * n ** .6, 'params_active': n / 2,
                    'flops': budget * (1 + .01 * (i % 2)), 'loss': loss, 'bits_per_byte': loss / 3, 'loss/web': loss + .1,
                    'branch_of': ''})
  return table


def write(directory, table) -> Path:
  with (directory / 'runs.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)
  return directory


def command(*arguments):
  return subprocess.run([sys.executable, '-m', 'maxlm.scaling', *map(str, arguments)], cwd=ROOT, capture_output=True,
                        text=True, timeout=300)


def test_fit_prints_held_out_error_first_and_writes_full_precision(tmp_path):
  table = rows()
  table[3] |= {'status': 'failed', 'loss': ''}
  ran = command('fit', write(tmp_path, table), '--budget=1e21', '--samples=40', f'--json={tmp_path}/f.json')
  assert ran.returncode == 0, ran.stderr
  out = ran.stdout
  places = [out.index(text) for text in ('27 runs', '1 left out', 'held out', 'law: L =', 'delta is', 'intervals, 80%',
                                         'optimum at 1e+21', 'L* moves', '3, fit', '2, parabolas')]
  assert places == sorted(places) and '1, envelope' not in out
  told = json.loads((tmp_path / 'f.json').read_text())
  law = Chinchilla(**told['law'])
  assert f'N^-{law.alpha:.6g}' in out and len(told['held_out']) == 2 and told['clusters'] == 27
  found = analysis.analyse(points.read(tmp_path), budget=1e21, samples=40)
  assert law == found.fit.law and told['optimum'] == found.optimum  # not a digit less than in memory
  low, high = told['optimum_intervals']['L*']
  assert low <= told['optimum']['L*'] <= high and told['optimum']['L*'] == pytest.approx(LAW.optimum(1e21)[2], rel=.03)
  assert told['exponents']['2, parabolas']['N'] == pytest.approx(LAW.beta / (LAW.alpha + LAW.beta), abs=.05)
  nested = command('fit', tmp_path, '--form=nesting', '--objective=squares', '--samples=20', '--level=.9')
  assert nested.returncode == 0 and 'form nesting' in nested.stdout and 'intervals, 90%' in nested.stdout


def test_errors_of_the_command_are_one_line(tmp_path):
  write(tmp_path, rows()[:5])
  for arguments, said in ((('fit', tmp_path), '5 finished runs'), (('guess', 'x'), 'say what to do'),
                          (('fit', tmp_path, '--columns=a'), 'ours=theirs'), (('fit', ROOT / 'docs'), 'has no runs.csv')):
    ran = command(*arguments)
    assert ran.returncode == 2 and said in ran.stderr and ran.stderr.startswith('error: ')
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize('change, said', [
  (lambda table: table[:7], '7 finished runs'),
  (lambda table: [row | {'status': 'failed'} for row in table[7:]] + table[:7], '21 more are not finished'),
  (lambda table: [row | {'flops': 1e18 * (1 + .01 * i % .2)} for i, row in enumerate(table)], 'one budget'),
  (lambda table: [table[0] | {'loss': 'nan'}, table[1] | {'loss': ''}, *table[2:]], '2 finished runs .* c1e.17_0, c1e.17_1'),
  (lambda table: [table[0] | {'tokenizer': 'x'}, *table[1:]], '2 tokenizers.*--target=bits_per_byte'),
  (lambda table: [table[0] | {'tokens': 'many'}, *table[1:]], 'column tokens: .*many'),
  (lambda table: [{'name': 'a', 'tokens': 1}], 'no column params, loss: name it with --columns'),
], ids=['few', 'unfinished', 'one budget', 'nan', 'tokenizers', 'words', 'columns'])
def test_runs_that_hold_no_law_are_refused(tmp_path, change, said):
  with pytest.raises(ValueError, match=said):
    alarms.check(points.read(write(tmp_path, change(rows()))))


def test_bits_per_byte_may_mix_tokenizers(tmp_path):
  table = rows()
  table[0]['tokenizer'] = 'x'
  alarms.check(points.read(write(tmp_path, table), target='bits_per_byte'))


def test_counts_targets_columns_and_trunks(tmp_path):
  table = rows()
  table[1]['branch_of'] = table[2]['branch_of'] = trunk = table[0]['name']
  write(tmp_path, table)
  read = points.read(tmp_path, 'params_active', 'loss/web')
  np.testing.assert_array_equal(read.n, [row['params'] / 2 for row in table[1:]])
  np.testing.assert_array_equal(read.loss, [row['loss/web'] for row in table[1:]])
  assert read.target == 'loss/web' and list(read.cluster[:3]) == [trunk, trunk, table[3]['name']] and read.left_out == 1
  assert read.isoflop and len(set(read.budget)) == 4
  other = points.read(tmp_path / 'runs.csv', columns={'params': 'params_active', 'tokens': 'none'})
  np.testing.assert_allclose(other.d, other.flops / 6 / other.n)


def test_which_parameters_count_moves_the_exponent(tmp_path):
  write(tmp_path, [row for row in rows(noise=0.)])
  fits = {}
  for count in points.COUNTS:
    read = points.read(tmp_path, count)
    law = chinchilla.fit(read.n, read.d, read.loss).law
    fits[count] = law.beta / (law.alpha + law.beta)
  assert fits['params'] == pytest.approx(fits['params_active'], abs=1e-3)  # half of all: the same power
  assert fits['params_non_embedding'] > fits['params'] + .03  # as Kaplan et al. counted


def test_parquet_is_the_same_table(tmp_path):
  pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  table = rows()
  table[0] |= {'status': 'missing', 'loss': None}
  pq.write_table(pa.Table.from_pylist(table), tmp_path / 'runs.parquet')
  parquet = points.read(tmp_path)
  read = points.read(write(tmp_path, table))
  for name in ('n', 'd', 'loss', 'flops', 'name', 'cluster', 'tokenizer'):
    np.testing.assert_array_equal(getattr(parquet, name), getattr(read, name))
  assert parquet.left_out == read.left_out == 1


def test_budgets_of_any_compute_are_half_decades():
  budget, isoflop = points.budgets(np.geomspace(1e18, 1e20, 200))
  assert not isoflop and len(set(budget)) == 5
  budget, isoflop = points.budgets(np.repeat([1e18, 2e18, 4e18], 3) * np.tile([1, 1.1, 1.2], 3))
  assert isoflop and np.allclose(budget[:3], 1e18 * (1.1 * 1.2) ** (1 / 3)) and len(set(budget)) == 3


def alarms_of(tmp_path, table, **kwargs):
  return ' | '.join(analysis.analyse(points.read(write(tmp_path, table)), samples=25, **kwargs).alarms)


def test_a_sound_ladder_raises_no_alarm(tmp_path):
  assert alarms_of(tmp_path, rows(budgets=(1e17, 1e18, 1e19, 1e20), noise=2e-4), budget=1e21) == ''


@pytest.mark.parametrize('table, said', [
  (rows(shift=30., sizes=9), 'at the edge of the sizes, or beyond: run smaller'),
  (rows(shift=1 / 30), 'at the edge of the sizes, or beyond: run larger'),
  (rows(width=16., sizes=9), 'span a factor of 256, over ±8'),
  (rows(sizes=5), 'three on each side'),
  (rows(budgets=(1e18, 3e18, 6e18)), 'decades of compute'),
  (rows(noise=.05), 'the exponent of N. lies anywhere'),
  ([*rows()[:-1], rows()[-1] | {'loss': 4.0}], '1 runs lie over 6 robust standard deviations off .c1e.19_6.: .* without'),
  ([row | {'flops': row['flops'] * (1 + 8e6 / row['params'])} for row in rows()], 'FLOPs a parameter and token go from'),
  ([row for c, shift in ((1e17, 2.), (1e18, 1.), (1e19, .5)) for row in rows((c,), shift=shift, noise=2e-4)], 'drifts by a'),
  ([row | {'loss': row['loss'] * (.97 if row['flops'] > 9e18 else 1)} for row in rows()],
   r'held out, are missed by \+\d.\d\d % on average'),
], ids=['high edge', 'low edge', 'wide', 'few sizes', 'decades', 'noise', 'outlier', 'flops', 'drift', 'bend'])
def test_what_makes_a_fit_doubtful_is_said(tmp_path, table, said):
  assert re.search(said, alarms_of(tmp_path, table))


def test_a_budget_far_beyond_the_runs_is_said(tmp_path):
  said = alarms_of(tmp_path, rows(), budget=1e25)
  assert re.search('990,099 times the largest run', said)
