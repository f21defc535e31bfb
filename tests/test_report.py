"""The report of a run: what it reads of a workdir, whatever happened to it; what its charts show; a page that is safe."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import Checkpoints
from maxlm.report import charts, page, record, scores
from maxlm.report.charts import Line, Mark, chart
from tests import runs
from tests.test_data_report import Reader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def staged(tmp_path_factory) -> Path:
  return runs.write_run(tmp_path_factory.mktemp('runs') / 'staged')


def of(records: list, tmp_path: Path, **changes) -> record.Run:
  return record.read(runs.write_run(tmp_path / 'run', records, **changes))


# -- reading


def test_what_was_undone_counts_once_as_it_was_done_last(tmp_path):
  """A record as kills leave it that nobody cleaned up after: the same as that of a run that nothing disturbed."""
  whole = runs.staged_records()
  at = [i for i, one in enumerate(whole) if 'loss' in one]
  # To step 250; again from 201 to 280; again from 271 to the end.
  first, second = whole[:at[249] + 1], whole[:at[279] + 1]
  wrong = [one | {name: value + 1 for name, value in one.items() if name.startswith(('loss', 'eval/'))} for one in first]
  again = [*wrong, *second[at[200]:], *whole[at[270]:]]
  assert len(again) > len(whole) + 60
  run, undisturbed = of([*whole[:at[200]], *again[at[200]:]], tmp_path), of(whole, tmp_path / 'other')
  assert run.redone == 50 + 10 and undisturbed.redone == 0
  assert run.series.keys() == undisturbed.series.keys() and run.evaluations == undisturbed.evaluations
  assert run.stages == undisturbed.stages
  for name, series in run.series.items():
    np.testing.assert_array_equal(series.steps, undisturbed.series[name].steps, err_msg=name)
    np.testing.assert_array_equal(series.values, undisturbed.series[name].values, err_msg=name)


def test_stages_and_what_they_did_are_those_of_the_record(staged):
  run = record.read(staged)
  assert [(span.name, span.first, span.last) for span in run.stages] == [
    ('pretrain', 1, 300), ('midtrain', 301, 420), ('long', 421, 500)]
  columns, values = scores.stage_scores(run)
  assert columns == [f'{when} {name}' for name, *_ in runs.STAGES for when in ('before', 'after')]
  at = [runs.evaluation(step, stage) for step, stage in (
    (0, 'pretrain'), (300, 'pretrain'), (300, 'midtrain'), (420, 'midtrain'), (420, 'long'), (500, 'long'))]
  assert values['tasks/needle/1024'] == [one['eval/tasks/needle/1024'] for one in at]
  assert values['bits_per_byte/pdf'] == [one['eval/bits_per_byte/pdf'] for one in at]
  assert values['tasks/needle/1024'][4] > values['tasks/needle/1024'][3] + 0.5  # the same weights, in another stage
  shown = page.page([run])
  after = values['tasks/needle/1024'][5]
  assert f'{100 * after:.3g} %' in shown and 'before long' in shown
  assert scores.tasks_of(run) == {task: ['256', '512', '1024'] for task in runs.TASKS}


def test_time_leaves_out_what_nobody_was_at_work_in(tmp_path):
  """A step is half a second; the second attempt begins an hour after the first has ended."""
  records = [runs.record(step) for step in range(1, 201)]
  records += [runs.record(step, time=1.79e9 + 3705 + (step - 200) * 0.5) for step in range(201, 501)]
  run = of(records, tmp_path)
  seconds = run.seconds(np.array([1, 200, 201, 500]))
  idle = 3700 - 100  # from the last line of the first attempt, which began 10 s before the first step
  np.testing.assert_allclose(seconds, [10.5, 110, 3715.5 - idle, 3865 - idle])
  assert run.state == 'finished' and run.shares['idle'] > 0.9
  (tmp_path / 'run' / 'goodput.jsonl').unlink()
  run = record.read(tmp_path / 'run')
  np.testing.assert_allclose(run.seconds(np.array([1, 500])), [0, 3854.5])
  assert run.state == 'goes on, or was killed' and run.shares == {} and page.page([run])


def test_tokens_are_those_of_the_record_else_of_the_config_else_steps(tmp_path):
  records = [runs.record(step) for step in range(1, 11)]
  bare = [{name: value for name, value in one.items() if name != 'tokens'} for one in records]
  at = np.array([0, 5, 10])
  for said, changes, expected in ((records, {}, at * runs.BATCH_TOKENS), (bare, {}, at * 8 * 256), (bare, {'data': {}}, at)):
    where = tmp_path / str(len(list(tmp_path.iterdir())))
    run = of(said, where, stages=[], **changes)
    assert run.tokens(at)[1:].tolist() == expected[1:].tolist()
    assert ('>step' if expected is at else 'tokens') in page.page([run]).replace('against step', '>step')


def test_lines_that_are_none_are_counted_and_told(tmp_path):
  run = of([runs.record(step) for step in range(1, 11)], tmp_path)
  path = tmp_path / 'run' / 'metrics.jsonl'
  whole = path.read_text()
  path.write_text(whole[:200] + '\n[1]\n{"step": "x"}\n{"step": true, "loss": 1}\n' + whole + whole[:150])  # a kill
  (tmp_path / 'run' / 'config.json').write_text('{"name": ')
  cut = record.read(tmp_path / 'run')
  assert cut.series['loss'].values.tolist() == run.series['loss'].values.tolist() and len(cut.notes) == 2
  assert '5 lines of metrics.jsonl' in cut.notes[0] and 'config.json' in cut.notes[1]
  assert '5 lines of metrics.jsonl could not be read' in page.page([cut])


def test_checkpoints_say_lineage_and_parameters(tmp_path, mesh_of):
  workdir = runs.write_run(tmp_path / 'run', [runs.record(1)])
  checkpoints = Checkpoints(workdir / 'checkpoints')
  parents = [{'run': 'c' * 32, 'step': 9, 'path': '/a'}, {'run': 'd' * 32, 'step': 8, 'path': '/b'}]
  with mesh_of(1):
    params = {'a': jax.device_put(jnp.zeros((3, 5)), jax.P()), 'b': jax.device_put(jnp.zeros(7), jax.P())}
    checkpoints.save(1, params=params, meta={'lineage': {'run': 'e' * 32, 'parents': parents, 'parent': parents[0]}})
    checkpoints.close()
  run = record.read(workdir)
  assert run.n_parameters == 22 and page.facts(run)['from'] == 'step 9 of /a, step 8 of /b'
  (workdir / 'checkpoints' / '1' / 'digest' / 'data.json').write_text('{')
  run = record.read(workdir)
  assert run.n_parameters is None and 'damaged' in run.notes[0] and page.page([run])


# -- charts


def drawn(svg: str, kind: str) -> list[np.ndarray]:
  """The points of the paths of a kind, x and y from 0 to 1."""
  found = re.findall(rf'<path class="{kind}" d="M([^"]*?)(?:h0)?"/>', svg)
  return [np.array([[float(n) for n in point.split()] for point in re.split('L', path)]) / (charts.WIDTH, charts.HEIGHT)
          for path in found]


def figure(*lines: Line, **how) -> str:
  return chart('<b>x</b>', lines, x_label=str, y_label=lambda v: f'{v:.3g}', **how)


def test_no_peak_is_lost_however_many_points_there_are():
  rng = np.random.default_rng(0)
  y = rng.normal(0, 1, 100_000)
  y[[3, 41_234, 99_998]] = 8, -9, 7
  y[50_000] = 8.5
  shown = figure(Line(name='', x=np.arange(100_000.0), y=y, band=True), floor=-10, top=10)
  assert len(shown) < 60_000
  band, = drawn(shown, 'c0 band')
  values = 10 - 20 * band[:, 1]
  assert values.min() == pytest.approx(-9, abs=0.1)
  for place, value in ((41_234, -9), (50_000, 8.5), (99_998, 7)):
    near = np.abs(band[:, 0] - place / 1e5) < 1.1 / charts.ROOM
    assert np.abs(values[near] - value).min() < 0.1, place


def test_what_is_no_number_is_a_gap_and_a_mark():
  y = np.arange(40.0)
  y[[20, 21]] = math.nan, math.inf
  shown = figure(Line(name='loss', x=np.arange(40.0), y=y, band=True))
  assert [len(part) for part in drawn(shown, 'c0 band')] == [40, 36] and len(drawn(shown, 'c0')) == 2
  assert 'class="above bad"' in shown and 'no number at 20.0' in shown and 'nan' not in shown.replace('no number', '')
  assert figure(Line(name='', x=np.arange(4.0), y=np.full(4, math.nan))) == ''


def test_a_spike_does_not_flatten_the_chart_and_is_told():
  y = 3 + np.exp(-np.arange(1000) / 100)
  y[500] = 1e6
  shown = figure(Line(name='', x=np.arange(1000.0), y=y, band=True, left_out=y > 100))
  assert '(up to 1e+06)' in shown
  line, = drawn(shown, 'c0')
  assert line[:, 1].max() - line[:, 1].min() > 0.8 and (line[-20:, 1] > 0.8).all()


def test_averages_neither_lag_nor_see_what_is_left_out():
  straight = np.arange(1000.0)
  np.testing.assert_allclose(charts.smoothed(straight)[200:800], straight[200:800], atol=1e-6)
  y, out = np.ones(300), np.arange(300) % 50 == 7
  y[out] = 1e9
  np.testing.assert_allclose(charts.smoothed(y, out), 1, rtol=1e-9)
  y[100] = math.nan
  assert np.flatnonzero(np.isnan(charts.smoothed(y, out))).tolist() == [100]
  np.testing.assert_allclose(charts.smoothed(np.array([5.0])), 5)


@pytest.mark.parametrize('low, high', [(0, 1), (3.1, 3.2), (0, 1.2e12), (-4, 7), (1e-9, 3e-9), (99.9999, 100)])
def test_ticks_are_few_round_and_within(low, high):
  for n in (4, 6, 8):
    ticks = charts.Scale(low, high).ticks(n)
    assert 2 <= len(ticks) <= n + 1 and low - 1e-9 * high <= ticks[0] and ticks[-1] <= high * (1 + 1e-9)
    assert all(len(f'{abs(tick):.6g}'.replace('.', '').strip('0')) <= 6 for tick in ticks)
  assert charts.Scale(1e-4, 100, True).ticks(4)[0] >= 1e-4


def test_marks_are_where_they_happened_and_many_at_one_place_are_one():
  marks = [Mark(x=5, text='a <b>', kind='line'), Mark(x=99, text='outside', kind='below'),
           *(Mark(x=7.5 + i / 1000, text='skip', kind='below', bad=True) for i in range(9))]
  shown = figure(Line(name='', x=np.arange(11.0), y=np.arange(11.0)), marks=marks, tall=True)
  assert '<s style="left:50.00%"' in shown and 'a &lt;b&gt;' in shown and 'outside' not in shown
  assert shown.count('class="below bad"') == 1 and 'skip and 8 more' in shown


# -- the page


def test_pages_need_nothing_from_elsewhere_and_close_their_tags(staged, tmp_path):
  records = runs.staged_records(1, 1.5)
  for one in records:
    if one['step'] in (40, 41) and 'loss' in one:
      one |= {'loss': None, 'skipped': 1}
    one |= {'loss/<script>alert(1)</script>': 2.0, 'eval/bits_per_byte/"onload=': 1.0}
  other = runs.write_run(tmp_path / '<i>other', records, seed=7)
  for found in ([record.read(staged)], [record.read(other)], record.read_all([str(staged), str(other), str(staged)])):
    shown = page.page(found)
    reader = Reader(shown)
    assert not reader.open
    assert {tag for tag, _ in reader.tags} <= set(
      'html head meta title style body main section h1 h2 h3 h4 p div span b i u s em small ul li table thead tbody tr th '
      'td figure figcaption details summary pre code svg path rect'.split())
    assert {name for _, attributes in reader.tags for name in attributes} <= set(
      'lang charset name content http-equiv class style title role aria-label scope viewbox preserveaspectratio d x y width '
      'height'.split())
    policy, = (attributes['content'] for _, attributes in reader.tags if attributes.get('http-equiv'))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert 'url(' not in shown and 'http://' not in shown and 'https://' not in shown and '@import' not in shown
    assert not re.search(r'[\s"(]nan\b|NaN|\binf\b', shown)
  said = ''.join(reader.said)
  assert 'seed' in said and 'Configs differ in' in said and '2 steps, first at 40' in said


def test_a_run_with_hardly_anything_has_a_page(tmp_path):
  run = of([{'step': 1, 'time': 1.79e9, 'loss': 5.0}], tmp_path)
  (tmp_path / 'run' / 'goodput.jsonl').unlink()
  (tmp_path / 'run' / 'config.json').unlink()
  run = record.read(tmp_path / 'run')
  shown = page.page([run])
  assert not Reader(shown).open and 'Held-out' not in shown and '>5<' in shown
  assert not Reader(page.page([run, run])).open
  run = of([runs.record(step, loss=None, grad_norm=None) for step in range(1, 5)], tmp_path / 'nan')
  assert 'no number at 4 steps, first at 1' in page.page([run])


def test_a_long_run_takes_seconds_and_a_small_page(tmp_path):
  run = runs.write_run(tmp_path / 'run', [runs.record(step) for step in range(1, 30_001)], stages=[])
  began = time.monotonic()
  shown = page.page([record.read(run)])
  assert time.monotonic() - began < 20 and len(shown) < 250_000


def command(*arguments: str, cwd: Path, code: int = 0) -> str:
  done = subprocess.run([sys.executable, '-m', 'maxlm.report', *arguments], cwd=cwd, capture_output=True, text=True,
                        timeout=120, env={'PYTHONPATH': str(ROOT), 'PATH': ''})
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stderr


def test_command_writes_pages_and_numbers(staged, tmp_path):
  other = runs.write_run(tmp_path / 'other', seed=3)
  command(str(staged), str(other), f'--out={tmp_path}/both.html', cwd=tmp_path)
  assert '2 runs, compared' in (tmp_path / 'both.html').read_text()
  numbers = json.loads(command(str(staged), str(other), '--json', cwd=tmp_path))
  assert numbers['config_differences']['seed'] == [0, 3] and numbers['runs'][0]['step'] == 500
  assert numbers['runs'][0]['stages'][2] == {'name': 'long', 'first_step': 421, 'last_step': 500}
  assert page.write(staged) == staged / 'report.html'
  assert (staged / 'report.html').read_text() == page.page([record.read(staged)])
  assert not list(staged.glob('*.partial'))


def test_what_is_no_run_is_refused_in_a_line(staged, tmp_path):
  said = command(f'{staged}x', cwd=tmp_path, code=2)
  assert f'did you mean {staged}?' in said and said.count('\n') == 1
  for name in ('empty', 'new'):
    (tmp_path / name).mkdir()
  (tmp_path / 'new' / 'metrics.jsonl').write_text('')
  for where, line in (('nowhere/at/all', 'no directory nowhere/at/all: give'), (tmp_path / 'new', 'has no step yet'),
                      (tmp_path / 'empty', 'has no metrics.jsonl'), (staged / 'config.json', 'no directory')):
    with pytest.raises((ValueError, OSError), match=line):
      record.read(where)
