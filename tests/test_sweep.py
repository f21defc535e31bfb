"""Sweeps: what is refused, what is counted, and real runs that are killed and run again."""

import csv
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm import flags, flops, stages
from maxlm.config import Stage
from maxlm.schedule import Schedule
from maxlm.sweep import Run, design, emit, progress, runs, table
from maxlm.sweep.count import parameters, total_flops, total_tokens
from tests.test_configs import platform_of, traced_step

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / 'configs' / 'sweeps').glob('*.py'))
# Of tiny models on the tests' corpus: two runs, a trunk, two that leave it, and one that has no corpus.
SWEEP = '''
import dataclasses
import io
from configs import tiny
from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Stage
from maxlm.schedule import Schedule
from maxlm.sweep import Run, member_of

def get_sweep(arg=''):
  plain = tiny.get_config()
  data = dataclasses.replace(plain.data, corpus={corpus!r})
  plain = dataclasses.replace(plain, data=data, tokens=30 * 512)
  lr = Schedule(peak_lr=3e-3, warmup_tokens=2048)
  optim = dataclasses.replace(plain.optim, peak_lr=0.0, schedule='wsd', warmup_tokens=0)
  trunk = dataclasses.replace(plain, name='trunk', tokens=0, optim=optim, checkpoint=CheckpointConfig(keep_every=10),
                              stages=(Stage(name='stable', tokens=20 * 512, lr=lr),))
  def branch(step):
    stage = Stage(name='anneal', tokens=5 * 512, lr=Schedule(peak_lr=3e-3, decay_tokens=5 * 512))
    left = dataclasses.replace(trunk, name=f'left-{{step}}', stages=(*trunk.stages, stage))
    return Run(experiment=left, branch=('trunk', step), stages=('anneal',), group='wsd')
  lost = dataclasses.replace(plain, name='lost', data=dataclasses.replace(data, corpus='nowhere'))
  found = [branch(10), Run(experiment=dataclasses.replace(plain, name='seed1', seed=1), group='plain'),
           Run(experiment=trunk, group='trunk'), branch(20)]
  return found + [Run(experiment=lost)] * (arg == 'lost')

def get_config(name=''):
  return member_of(get_sweep, name)
'''


def tiny_run(**changes) -> Run:
  return Run(experiment=dataclasses.replace(flags.load_config(str(ROOT / 'configs' / 'tiny.py')), **changes))


def branch_of(trunk: str, step: int, stage_names=('anneal',), keep_every=10) -> tuple[Run, Run]:
  """A trunk of 20 steps, and a run that leaves `trunk`."""
  plain = tiny_run().experiment
  optim = dataclasses.replace(plain.optim, peak_lr=0.0, schedule='wsd', warmup_tokens=0)
  stable = Stage(name='stable', tokens=20 * 512, lr=Schedule(peak_lr=3e-3, warmup_tokens=2048))
  anneal = Stage(name='anneal', tokens=5 * 512, lr=Schedule(peak_lr=3e-3, decay_tokens=5 * 512))
  whole = dataclasses.replace(plain, name='trunk', tokens=0, optim=optim, stages=(stable,),
                              checkpoint=dataclasses.replace(plain.checkpoint, keep_every=keep_every))
  left = dataclasses.replace(whole, name='left', stages=(stable, anneal))
  return Run(experiment=whole), Run(experiment=left, branch=(trunk, step), stages=stage_names)


@pytest.mark.parametrize('found, message', [
  ([], 'has no runs'),
  ([tiny_run(name='a'), tiny_run(name='a')], "two runs have the name 'a'"),
  ([tiny_run(name='../a')], 'has to be a directory'),
  (branch_of('trank', 10), "left leaves 'trank', which is no run of it; did you mean 'trunk'"),
  (branch_of('trunk', 7), r'at step 7, of which that run keeps no checkpoint: set its checkpoint.keep_every'),
  (branch_of('trunk', 10, keep_every=None), r'keep_every to a divisor of 10 \(now None\)'),
  (branch_of('trunk', 30), 'at step 30, of which that run keeps no checkpoint'),
  (branch_of('trunk', 10, ('cool',)), "left: --stages=cool: there is no stage 'cool'"),
  (branch_of('left', 10), 'left leaves left: it is a branch itself'),
  (branch_of('trunk', 10, ()), 'left for no stages'),
  ([Run(experiment=dataclasses.replace(tiny_run().experiment, tokens=1024))], 'tiny: optim: warmup_tokens=2048'),
])
def test_what_is_no_sweep_is_refused_in_one_line(found, message):
  with pytest.raises(ValueError, match=message) as error:
    runs.check('x.py', list(found))
  assert '\n' not in str(error.value)


def test_a_branch_is_counted_with_the_steps_of_its_trunk():
  whole, left = branch_of('trunk', 10)
  runs.check('x.py', [whole, left])
  assert total_tokens(left.settled) == (10 + 5) * 512 and left.plan[-1].stop == 15 and left.first_step == 10
  assert total_flops(left.settled) == pytest.approx(total_flops(whole.settled) * 15 / 20, rel=1e-12)
  assert left.arguments('x.py:a', 'w') == ['--config=x.py:a:left', '--workdir=w/left', '--branch=w/trunk@10',
                                                 '--stages=anneal']


def test_flops_are_exact_and_parameters_counted_three_ways():
  """Of a plain decoder by hand: 2 x 3 FLOPs a multiply-add, and a key for each query up to its own position."""
  config = runs.load(f'{ROOT}/configs/sweeps/quickstart_isoflop.py')[0].experiment
  model, length = config.model, config.data.seq_len
  D, V, L, F = model.d_model, model.vocab_size, model.n_layers, model.pattern[0].mlp.d_ff
  heads = model.pattern[0].mixer.n_heads * model.pattern[0].mixer.head_dim
  matrices = L * (4 * D * heads + 3 * D * F)
  everything, non_embedding, active = parameters(model)
  norms = L * (2 * D + 2 * 16) + D
  assert (everything, non_embedding, active) == (matrices + V * D + norms, matrices + norms, matrices + V * D)
  attention = 3 * 2 * 2 * L * heads * (length + 1) / 2  # scores and values, over the mean of visible keys
  assert total_flops(config) == pytest.approx((6 * active + attention) * total_tokens(config), rel=1e-12)


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_loads_and_each_of_its_runs_is_found_by_name(path):
  found = runs.load(str(path))
  for run in (found[0], found[-1]):
    config = flags.load_config(f'{path}:{run.name}')
    assert config == run.experiment
    stages.check(run.settled, platform_of(config), config.pod_devices)
  with pytest.raises(ValueError, match=f"no run {found[0].name + 'x'!r}; after the colon .* such as :{found[0].name}"):
    flags.load_config(f'{path}:{found[0].name}x')


def test_runs_for_pods_type_check_a_step_there():
  """The smallest and the largest of each pod."""
  found = [run.experiment for run in runs.load(str(ROOT / 'configs' / 'sweeps' / 'isoflop_1e18.py'))]
  for pod in {config.pod for config in found}:
    of_pod = sorted((config for config in found if config.pod == pod), key=lambda config: config.model.d_model)
    for config in (of_pod[0], of_pod[-1]):
      state, after, *_ = traced_step(config)
      assert after.params.embed_VD.shape == (32_768, config.model.d_model)


def test_an_isoflop_grid_is_centred_on_the_forecast_and_keeps_to_its_budgets():
  sweep = flags.module_of(str(ROOT / 'configs' / 'sweeps' / 'quickstart_isoflop.py'))
  found = sweep.get_sweep()
  for budget in sweep.BUDGETS:
    of_budget = [run.experiment for run in found if run.group == f'isoflop-{budget:.3g}']
    params = sorted({flops.matmul_params(config.model) for config in of_budget})
    centre, twice = sweep.FORECAST(budget), [config for config in of_budget if config.seed == 1]
    assert len(params) == 5 and len(of_budget) == 6 and len(twice) == 1
    assert centre / sweep.WITHIN <= params[0] < centre < params[-1] <= centre * sweep.WITHIN
    nearest = min(params, key=lambda n: abs(math.log(n / centre)))
    assert flops.matmul_params(twice[0].model) == nearest
    for config in of_budget:
      assert total_flops(config) == pytest.approx(budget, rel=0.005) and total_tokens(config) == config.tokens
  with pytest.raises(ValueError, match='the family has 0 sizes within 4 times of them'):
    design.isoflop(sweep.member, sweep.SIZES, [1e22], sweep.FORECAST)


def test_advice_names_what_a_grid_lacks():
  sweep = flags.module_of(str(ROOT / 'configs' / 'sweeps' / 'quickstart_isoflop.py'))
  few = [Run(experiment=sweep.member(size, 10_240), group='isoflop-1') for size in (16, 32, 512)]
  said = ' '.join(design.advice(few))
  assert 'has 3 sizes' in said and 'times in size' in said and 'one seed' in said
  assert design.advice([dataclasses.replace(run, group='') for run in few]) == []


# -- real runs


def sweep_at(tmp_path: Path, corpus: Path) -> Path:
  (tmp_path / 'sweep.py').write_text(SWEEP.format(corpus=str(corpus)))
  return tmp_path / 'sweep.py'


def command(sweep, workdir: Path, *arguments: str) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-m', 'maxlm.sweep', f'--sweep={sweep}', f'--workdir={workdir}', *arguments],
                          cwd=workdir.parent, env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rows_of(workdir: Path) -> list[dict]:
  with open(workdir / 'runs.csv', newline='') as file:
    return list(csv.DictReader(file))


def wait_for(condition, seconds: float = 120) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, 'it did not come to that'
    time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_table_is_that_of_one_that_was_not(tmp_path, corpus):
  """Stopped once in the middle and killed once; a finished run is not touched again, and all losses are the same bits. The
  other sweep has a run that fails, which does not stop the rest."""
  sweep, workdir, other = sweep_at(tmp_path, corpus), tmp_path / 'killed', tmp_path / 'whole'
  running = command(sweep, workdir)
  wait_for(lambda: (workdir / 'seed1' / 'checkpoints').is_dir())
  running.send_signal(signal.SIGTERM)
  said = running.communicate(timeout=120)[1]
  assert running.returncode == 75 and 'stopping by SIGTERM' in said, said
  assert {row['status'] for row in rows_of(workdir)} <= {'failed', 'missing', 'finished'}
  running = command(sweep, workdir, '--jobs=2')
  wait_for(lambda: (workdir / 'seed1' / 'DONE').exists())
  done = (workdir / 'seed1' / 'DONE').stat().st_mtime_ns
  running.kill()  # its runs go on by themselves: the next sweep waits for them
  running.communicate()
  running = command(sweep, workdir, '--jobs=2')
  said = running.communicate(timeout=300)
  assert running.returncode == 0 and 'Error' not in said[1], said
  assert (workdir / 'seed1' / 'DONE').stat().st_mtime_ns == done
  whole = command(f'{sweep}:lost', other)
  said = whole.communicate(timeout=300)
  assert whole.returncode == 1 and '4 finished, 1 failed' in said[0], said
  assert 'FAILED   lost: the corpus at nowhere is not there' in said[1]
  rows, (*expected, lost) = rows_of(workdir), rows_of(other)
  assert lost['status'] == 'failed' and lost['reason'].startswith('the corpus at nowhere is not there')
  assert [row['name'] for row in rows] == ['left-10', 'seed1', 'trunk', 'left-20']
  for row in (*rows, *expected):
    assert row['status'] == 'finished' and float(row.pop('seconds')) > 0
  assert rows == expected
  left = rows[0]
  assert (left['branch_of'], left['branch_step'], left['tokens'], left['steps']) == ('trunk', '10', str(15 * 512), '15')
  before = (workdir / 'runs.csv').read_bytes(), (workdir / 'runs.parquet').read_bytes()
  again = command(sweep, workdir, '--collect')
  assert again.wait(timeout=120) == 0
  assert ((workdir / 'runs.csv').read_bytes(), (workdir / 'runs.parquet').read_bytes()) == before
  record = json.loads((workdir / 'seed1' / 'DONE').read_text())
  assert float(rows[1]['loss']) == record['loss']['all'] and float(rows[1]['loss/stories']) == record['loss']['stories']
  edited = sweep.read_text().replace("name='seed1', seed=1", "name='seed1', seed=2")
  sweep.write_text(edited)
  refused = command(sweep, workdir)
  said = refused.communicate(timeout=120)
  assert refused.returncode == 1 and 'FAILED   seed1: it was begun with seed=1 and the sweep says 2' in said[1], said


def test_columns_are_those_of_the_contract(tmp_path):
  found = [tiny_run(name='a'), tiny_run(name='b')]
  rows = table.collect(found, tmp_path)
  assert list(rows[0]) == [
    'name', 'group', 'status', 'reason', 'workdir', 'seed', 'git', 'config_hash', 'tokenizer', 'corpus', 'd_model',
    'n_layers', 'seq_len', 'batch_tokens', 'steps', 'tokens', 'peak_lr', 'optimizer', 'weight_decay', 'warmup_tokens',
    'decay_tokens', 'params', 'params_non_embedding', 'params_active', 'flops', 'flops_6nd', 'loss', 'bits_per_byte',
    'train_loss', 'branch_of', 'branch_step', 'seconds']
  assert {row['status'] for row in rows} == {'missing'} and rows[0]['config_hash'] == rows[1]['config_hash']
  assert rows[0]['flops_6nd'] == 6 * rows[0]['params_non_embedding'] * rows[0]['tokens']


# -- launches and what a person sees


def test_launches_are_what_the_launcher_takes(tmp_path):
  whole, left = branch_of('trunk', 10)
  ladder = flags.module_of(str(ROOT / 'configs' / 'sweeps' / 'isoflop_1e18.py'))
  pod = Run(experiment=ladder.member(512, 10**9, name='pod'))
  written = emit.emit('configs/x.py:y', [left, whole, pod], 'gs://b/runs', 2, ['--spot'], tmp_path / 'ladder.jsonl')
  first, then = ([json.loads(line) for line in path.read_text().splitlines()] for path in written)
  assert first == [{'max_running': 2}, {'name': 'trunk', 'args': ['--spot', '--config=configs/x.py:y:trunk']},
                   {'name': 'pod', 'args': ['--spot', '--config=configs/x.py:y:pod', '--tpu=v5e:4x4']}]
  assert written[1].name == 'ladder.branches.jsonl' and then == [{'max_running': 2}, {'name': 'left', 'args': [
    '--spot', '--config=configs/x.py:y:left', '--', '--branch=gs://b/runs/trunk@10', '--stages=anneal']}]
  wide = dataclasses.replace(pod.experiment, data=dataclasses.replace(pod.experiment.data, batch_size=3))
  for run, message in ((Run(experiment=wide), 'x.py: pod on v5e:4x4: data.batch_size=3 rows do not divide'),
                       (tiny_run(name='lr0.1'), 'x.py: lr0.1 cannot be launched'),
                       (left, '--workdir=runs: say where the launched runs are')):
    with pytest.raises(ValueError, match=message):
      emit.emit('x.py', [run], 'runs', 1, [], tmp_path / 'refused.jsonl')
  assert not (tmp_path / 'refused.jsonl').exists()


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_terminal_is_redrawn_and_a_log_is_not(monkeypatch):
  monkeypatch.setattr(progress.time, 'monotonic', lambda: clock[0])
  for stream, redrawn in ((Terminal(), True), (io.StringIO(), False)):
    clock = [100.0]
    shown = progress.Progress(list(branch_of('trunk', 10)), stream)  # of 20 steps, and of 5 more after step 10
    for clock[0], step in ((140.0, 4), (180.0, 10)):
      shown.show({'trunk': (step, 4.5)}, set(), 0, 1)
    shown.print('finished t')
    text = stream.getvalue()
    assert ('\x1b[2A\x1b[J' in text) == redrawn
    assert '0 of 2 finished, 1 running, 1 to come; 40% of the FLOPs, about 1m 40s left' in text
    assert 'step 10/20  50%  loss 4.5' in text


def test_the_end_of_a_record_that_is_being_written_is_read(tmp_path):
  assert progress.newest_step(tmp_path) == (0, None)
  (tmp_path / 'metrics.jsonl').write_text('{"step": 3, "loss": 2.5}\n{"step": 3, "eval/loss/all": 2}\n{"step": 4, "lo')
  assert progress.newest_step(tmp_path) == (3, 2.5)
