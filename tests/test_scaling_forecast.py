"""Forecasts that are written down before their runs, the grades of these, and the page of plots of a fit."""

import csv
import dataclasses
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maxlm import flags, typed_json
from maxlm.report import charts, record, scatter
from maxlm.report.scatter import Curve, Dots
from maxlm.scaling import analysis, page, points, registration
from maxlm.scaling.chinchilla import Chinchilla
from maxlm.scaling.source import config_file
from maxlm.sweep.count import parameters, total_flops, total_tokens
from tests.test_data_report import Reader

ROOT = Path(__file__).parents[1]
PUBLIC = Path('shared/scaling_data/chinchilla_epoch/svg_extracted_data.csv')  # beside the repository, where it is
CHINCHILLA = next((path / PUBLIC for path in ROOT.parents if (path / PUBLIC).exists()), None)
LAW = Chinchilla(E=0.6, A=14.0, B=14.0, alpha=0.35, beta=0.35)  # of the made-up runs: N* is about D*
BUDGET = 6e9
FAMILY = """
from configs import tiny
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sweep import Run
import dataclasses


def member(size, tokens, name='x'):
  layer = LayerSpec(mixer=AttentionSpec(n_heads=size // 16, n_kv_heads=size // 16, head_dim=16), mlp=MlpSpec(d_ff=2 * size))
  model = DecoderConfig(vocab_size=512, d_model=size, n_layers=2, tied_embeddings=True, pattern=(layer,))
  data = dataclasses.replace(tiny.get_config().data, corpus=CORPUS)
  return dataclasses.replace(tiny.get_config(), name=name, model=model, data=data, tokens=tokens,
                             optim=OptimConfig(peak_lr=1 / size, schedule='linear', warmup_tokens=tokens // 20))


def get_sweep(arg=''):
  return [Run(experiment=member(size, 51_200, f'd{size}')) for size in (16, 48)]
"""


@pytest.fixture(scope='module')
def family(corpus, tmp_path_factory) -> Path:
  path = tmp_path_factory.mktemp('family') / 'family.py'
  path.write_text(FAMILY.replace('CORPUS', repr(str(corpus))))
  return path


def write_table(path: Path, family: Path, tokenizer: str = '', **changes) -> Path:
  """runs.csv of the family, five sizes at each of four budgets, whose losses are those of LAW within a thousandth."""
  member, rng, rows = flags.module_of(str(family)).member, np.random.default_rng(0), []
  for budget in (2e8, 4e8, 8e8, 1.6e9):
    for size in (16, 32, 48, 64, 80):
      fixed = member(size, 10**6)
      run = member(size, round(budget * total_tokens(fixed) / total_flops(fixed)))
      n, d = parameters(run.model)[0], total_tokens(run)
      rows.append({'name': f'd{size}-{budget:g}', 'status': 'finished', 'tokenizer': tokenizer, 'branch_of': '', 'params': n,
                   'tokens': d, 'flops': budget, 'loss': LAW.loss(n, d) * math.exp(1e-3 * rng.standard_normal())} | changes)
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  return path


@pytest.fixture(scope='module')
def found(family, tmp_path_factory) -> analysis.Analysis:
  table = write_table(tmp_path_factory.mktemp('table') / 'runs.csv', family)
  return analysis.analyse(points.read(table), budget=BUDGET, samples=50)


def command(*words: str, cwd: Path, module: str = 'maxlm.scaling', code: int = 0) -> str:
  done = subprocess.run([sys.executable, '-m', module, *words], cwd=cwd, capture_output=True, text=True, timeout=300,
                        env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'})
  assert done.returncode == code, done.stdout + done.stderr
  return done.stdout + done.stderr


# -- the run that is recommended


def test_the_member_that_is_chosen_has_the_least_loss_of_all_that_spend_the_budget(family):
  member = flags.module_of(str(family)).member
  for budget in (3e8, BUDGET, 4e10):
    choice = registration.choose(str(family), LAW, budget, 'params')
    losses = {}
    for size in range(16, 16 * 40, 16):
      fixed = member(size, 10**6)
      steps = int(budget * total_tokens(fixed) / total_flops(fixed) / fixed.tokens_per_step)
      losses[size] = float(LAW.loss(parameters(fixed.model)[0], steps * fixed.tokens_per_step)) if steps else math.inf
    assert choice.experiment.model.d_model == min(losses, key=losses.get)
    step = total_flops(choice.experiment) / total_tokens(choice.experiment) * choice.experiment.tokens_per_step
    assert budget - step < choice.flops <= budget and choice.flops == total_flops(choice.experiment)
    assert choice.n == parameters(choice.experiment.model)[0] and choice.d == total_tokens(choice.experiment)
  with pytest.raises(ValueError, match='more than 1e\\+06 FLOPs in a step'):
    registration.choose(str(family), LAW, 1e6, 'params')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_an_experiment_as_a_file_is_that_experiment(path, tmp_path):
  config = flags.load_config(str(path))
  text = config_file(config, 'Of a test.')
  (tmp_path / 'again.py').write_text(text)
  assert typed_json.dumps(flags.load_config(str(tmp_path / 'again.py'))) == typed_json.dumps(config)
  assert max(map(len, text.splitlines())) <= 125 and 'batch_size=' in text and 'peak_lr=' in text


def test_a_registration_says_what_was_forecast_and_is_never_written_over(found, family, tmp_path):
  path, record = registration.register(found, sweep=str(family), count='params', out=tmp_path)
  config = flags.load_config(str(tmp_path / 'forecast-6e09.py'))
  assert config.name == 'forecast-6e09' and total_flops(config) == record['flops']
  assert record['forecast'] == pytest.approx(LAW.loss(record['params'], record['tokens']), rel=5e-3)
  assert record['low'] < record['forecast'] < record['high'] and record['level'] == found.level
  best = record['optimum']
  assert 6 * best['N*'] * best['D*'] != BUDGET  # by the FLOPs of the member
  assert best['flops_per_nd'] * best['N*'] * best['D*'] == pytest.approx(BUDGET)
  assert best['intervals']['L*'][0] <= best['L*'] <= best['intervals']['L*'][1]
  assert json.loads(path.read_text()) == json.loads(json.dumps(record)) | {'sha256': registration.sha256(record)}
  before = path.read_bytes()
  with pytest.raises(FileExistsError, match='not written over'):
    registration.register(found, sweep=str(family), count='params', out=tmp_path)
  assert path.read_bytes() == before
  again = registration.register(found, sweep=str(family), count='params', out=tmp_path / 'again')[1]
  assert {key for key in record if again[key] != record[key]} == {'date'}
  other = dataclasses.replace(found, points=dataclasses.replace(found.points, loss=found.points.loss * (1 + 1e-12)))
  assert registration.register(other, sweep=str(family), count='params', out=tmp_path / 'o')[1]['data_sha256'] != record[
    'data_sha256']


# -- its grade


@pytest.fixture(scope='module')
def graded(family, tmp_path_factory) -> Path:
  """A directory in which all was done by commands: table, fit, prediction, the run itself."""
  where = tmp_path_factory.mktemp('graded')
  write_table(where / 'runs.csv', family)
  said = command('predict', 'runs.csv', f'--sweep={family}', f'--budget={BUDGET}', '--out=out', '--samples=50', cwd=where)
  sealed = json.loads((where / 'out' / 'forecast-6e09.json').read_text())['sha256']
  assert f'registered in out/forecast-6e09.json, SHA-256 {sealed}' in said
  command('--config=out/forecast-6e09.py', '--workdir=run', module='maxlm.train', cwd=where)
  return where


def test_a_run_is_graded_by_its_registration(graded):
  said = command('score', 'out/forecast-6e09.json', 'run', '--json=grade.json', cwd=graded)
  grade, registered = (json.loads((graded / name).read_text()) for name in ('grade.json', 'out/forecast-6e09.json'))
  actual = json.loads((graded / 'run' / 'DONE').read_text())['loss']['all']
  assert grade['actual'] == actual and grade['forecast'] == registered['forecast']
  assert grade['error'] == pytest.approx(100 * (registered['forecast'] - actual) / actual)
  assert grade['inside'] == (registered['low'] <= actual <= registered['high']) and f'{grade["error"]:+.2f} %' in said
  law = Chinchilla(**registered['law'])
  needed = registered['flops'] * (1 - grade['deadweight'] / 100)
  assert law.optimum(needed, registered['optimum']['flops_per_nd'])[2] == pytest.approx(actual)
  path = graded / 'out' / 'below.json'
  path.write_text(json.dumps(registered))
  resealed(path, law=registered['law'] | {'E': actual + 0.1})
  assert registration.score(path, graded / 'run')['deadweight'] is None  # no run of that law has this loss


def copied(graded: Path, tmp_path: Path) -> tuple[Path, Path]:
  shutil.copytree(graded / 'out', tmp_path / 'out')
  shutil.copytree(graded / 'run', tmp_path / 'run', ignore=shutil.ignore_patterns('checkpoints'))
  return tmp_path / 'out' / 'forecast-6e09.json', tmp_path / 'run'


@pytest.mark.parametrize('key, value', [('forecast', 5.0), ('high', 9.0), ('law', {})])
def test_an_edited_record_grades_nothing(graded, tmp_path, key, value):
  path, run = copied(graded, tmp_path)
  record = json.loads(path.read_text())
  path.write_text(json.dumps(record | {key: value}))
  with pytest.raises(ValueError, match='SHA-256 does not hold'):
    registration.score(path, run)
  path.write_text(json.dumps(record))  # the order and the spaces are not what is hashed
  assert registration.score(path, run)


def resealed(path: Path, **changes) -> None:
  """Makes the record of another registration."""
  record = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(record | {'sha256': registration.sha256(record)}))


def test_a_run_that_is_not_the_registered_one_is_refused(graded, tmp_path):
  path, run = copied(graded, tmp_path)
  config, done = json.loads((run / 'config.json').read_text()), json.loads((run / 'DONE').read_text())

  def refuses(words: str, **changes):
    (run / 'config.json').write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=words):
      registration.score(path, run)

  refuses('tokens=99', tokens=99)
  refuses('optim.peak_lr=0.5', optim=config['optim'] | {'peak_lr': 0.5})
  refuses('seed=7', seed=7)
  (run / 'config.json').write_text(json.dumps(config | {'name': 'other', 'mesh': config['mesh'] | {'data': 2}}))
  assert registration.score(path, run)['actual']  # of the machine
  (run / 'DONE').write_text(json.dumps(done | {'steps': done['steps'] - 1}))
  refuses('ended after')
  (run / 'DONE').unlink()
  refuses('no finished run')
  (run / 'DONE').write_text(json.dumps(done))
  resealed(path, tokenizer='another')
  refuses('another tokenizer')
  resealed(path, tokenizer='', target='loss/nowhere')
  refuses('no loss/nowhere of held-out rows')


def test_a_run_that_was_begun_before_is_no_forecast(graded, tmp_path):
  path, run = copied(graded, tmp_path)
  began = record.read(run).account.attempts[0].start
  for seconds, fine in ((-1, True), (1, False)):
    resealed(path, date=datetime.datetime.fromtimestamp(began + seconds, datetime.UTC).isoformat())
    if fine:
      assert registration.score(path, run)
      continue
    with pytest.raises(ValueError, match='begun before the forecast'):
      registration.score(path, run)


def test_what_cannot_be_done_is_one_line(found, graded, tmp_path):
  assert 'error: say what to do' in command('score', cwd=tmp_path, code=2)
  said = command('predict', 'runs.csv', f'--sweep={ROOT}/configs/tiny.py', '--samples=20', cwd=graded, code=2)
  assert said.splitlines()[-1].startswith('error: ') and 'has no member(size, tokens)' in said
  with pytest.raises(ValueError, match='the page is .html'):
    page.write(found, tmp_path / 'x.pdf', 'x', 'params')
  with pytest.raises(ValueError, match='no finished run'):
    registration.score(graded / 'out' / 'forecast-6e09.json', tmp_path)


# -- the page


def test_the_page_has_all_plots_and_is_safe(found):
  names = np.array(['<script>alert(1)</script>', *found.points.name[1:]])
  shown = page.page(dataclasses.replace(found, points=dataclasses.replace(found.points, name=names), alarms=['<img src=x>']),
                    'Scaling of <b>', 'params_non_embedding')
  reader = Reader(shown)
  assert not reader.open  # every tag is closed, in order
  tags = {tag for tag, _ in reader.tags}
  assert not tags & {'script', 'img', 'link', 'iframe', 'a'} and not re.search(r'\son\w+=|https?://', shown)
  assert ''.join(reader.said).count('<script>alert(1)</script>') > 5  # its tooltips
  captions = re.findall(r'<figcaption>(.*?)</figcaption>', shown)
  wanted = ('<b>loss</b> against parameters', '<b>N*</b>', '<b>D*</b>', '<b>D* / N*</b>', '<b>L*</b>', '<b>predicted</b>',
            '<b>error of the held-out', 'against <b>parameters', 'against <b>tokens</b>', 'against <b>FLOPs',
            'against <b>tokens a parameter', '<b>objective</b>', '<b>L*</b> against N*')
  assert [caption.startswith(text) for caption, text in zip(captions, wanted, strict=True)] == [True] * len(wanted)
  text = ' '.join(reader.said)
  assert f'{found.fit.law.alpha:.6g}' in text and 'parameters non embedding, N*' in text
  assert shown.index('<img src=x>'.replace('<', '&lt;').replace('>', '&gt;')) < shown.index('<figcaption>')  # alarms first


def test_rings_are_held_out_runs_with_what_was_forecast_of_them(found):
  held = page.held_out(found)
  assert [budget for budget, _, _ in held] == [row.budget for row in found.rows] and len(held) >= 2
  for row, (_, at, said) in zip(found.rows, held):
    errors = 100 * (said / found.points.loss[at] - 1)
    assert len(at) == row.scored and errors.mean() == pytest.approx(row.error, abs=1e-6)
  assert page.page(dataclasses.replace(found, rows=[]), 'x', 'params').count('<figure') == 12  # no chart of held-out errors


@pytest.mark.skipif(CHINCHILLA is None, reason='the public runs are not here')
def test_the_page_of_real_runs(tmp_path):
  said = command('fit', str(CHINCHILLA), '--columns=params=Model Size,flops=Training FLOP', '--samples=20',
                 '--budget=5.76e23', '--plot=out/scaling.html', cwd=tmp_path)
  shown = (tmp_path / 'out' / 'scaling.html').read_text()
  assert 'out/scaling.html' in said and shown.count('<figure') == 13 and not Reader(shown).open
  assert 'half decade' in shown and 'nan' not in shown.lower().replace('nano', '')


# -- charts


def dots_of(svg: str) -> list[tuple[float, float, str]]:
  return [(float(x) / charts.WIDTH, 1 - float(y) / charts.HEIGHT, tip) for x, y, tip in re.findall(
    r'<path class="c0 dots" d="M([\d.-]+) ([\d.-]+)h0"><title>(.*?)</title>', svg)]


def test_points_are_where_their_values_are_in_any_order():
  x, y = np.array([100.0, 1.0, 10.0, math.nan]), np.array([3.0, 1.0, 2.0, 1.0])
  shown = scatter.scatter('t', [Dots(x=x, y=y, tips=['c', 'a', 'b', 'gone'])], x_label=str, y_label=str, log_x=True)
  (xc, yc, c), (xa, ya, a), (xb, yb, b) = dots_of(shown)
  assert (a, b, c) == ('a', 'b', 'c') and 'gone' not in shown
  assert xb == pytest.approx((xa + xc) / 2, abs=1e-3) and yb == pytest.approx((ya + yc) / 2, abs=1e-3)
  assert 0 < xa < 0.1 and 0.9 < xc < 1 and 0 < ya < 0.1 and 0.9 < yc < 1
  assert scatter.scatter('t', [Dots(x=x[3:], y=y[3:])], x_label=str, y_label=str) == ''


def test_a_band_has_room_and_lies_around_its_curve():
  x, y = np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0])
  shown = scatter.scatter('t', [], [Curve(x=x, y=y, low=y - 1, high=y + 4)], x_label=str, y_label=str)
  corners = np.array(re.findall(r'([\d.-]+) ([\d.-]+)', re.search(r'band" d="(.*?)"', shown)[1]), float)
  assert len(corners) == 6 and corners.min() > 0 and corners[:, 1].max() < charts.HEIGHT
  assert (corners[:3, 1] < corners[:2:-1, 1]).all()  # SVG counts from above


def test_a_map_is_strongest_where_it_is_least():
  x, y = np.linspace(0, 1, 5), np.linspace(0, 2, 4)
  values = 1e-3 + (x[None] - 0.25) ** 2 + (y[:, None] - 2.0) ** 2
  shown = scatter.heat('t', x, y, values, x_label=str, y_label=str, say=lambda v: f'{v:.2g}')
  cells = {float(opacity): d for opacity, d in re.findall(r'opacity="([\d.]+)" d="(.*?)"', shown)}
  assert max(cells) == 1.0 and cells[1.0] == 'M200.0 0.0h200.0v75.0h-200.0z'  # second of five from the left, the upper row
  assert sum(d.count('M') for d in cells.values()) == values.size


def test_an_axis_of_logarithms_has_ticks_however_short_it_is():
  for low, high in ((2.3, 2.6), (23, 46), (1.9, 5.5), (2.1, 9.0), (1, 30), (1e18, 1e24)):
    ticks = charts.Scale(low, high, True).ticks(6)
    assert 2 <= len(ticks) <= 12 and low <= min(ticks) and max(ticks) <= high * (1 + 1e-9)
