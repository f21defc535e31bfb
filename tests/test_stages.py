"""A run of several stages: each has what it says, the run goes on between them bit for bit, and what does not add up is
refused with the reason."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from data_pipeline import loader
from maxlm import dry_run, stages, start, train
from maxlm.checkpoint import Checkpoints
from maxlm.config import Ramp, Stretch
from maxlm.data import DataConfig, feeds, masked, train_batches
from maxlm.layers.rope import YarnScaling
from maxlm.load import load
from maxlm.schedule import Schedule
from tests import staged
from tests.jobs import has_saved, record
from tests.make_corpus import make_corpus

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def corpus(shared) -> Path:
  """The corpus of configs/tiny.py, in rows of 64 and of 128."""
  with FileLock(shared / 'staged-corpus.lock'):
    if not (shared / 'staged-corpus' / 'manifest.json').exists():
      make_corpus(shared / 'staged-corpus', seq_lens=(64, 128))
  return shared / 'staged-corpus'


def config_of(corpus: Path):
  config = staged.get_config()
  config.data.corpus = str(corpus)
  return config


@pytest.fixture(scope='session')
def reference(shared, corpus) -> Path:
  """The workdir of the whole run, on eight devices, undisturbed."""
  with FileLock(shared / 'staged.lock'):
    if not (shared / 'staged' / 'DONE').exists():
      assert train.run(config_of(corpus), shared / 'staged') == 0
  return shared / 'staged'


def state(workdir: Path, step: int) -> dict:
  return Checkpoints(workdir / 'checkpoints').digests(step)


# -- what a stage is


def test_stages_are_what_they_say(reference, corpus):
  """Learning rates, tokens of each source, lengths and evaluations, out of the record."""
  steps = [line for line in record(reference) if 'loss' in line]
  assert [line['step'] for line in steps] == [*range(1, 41)]
  assert [line['stage'] for line in steps] == ['base'] * 22 + ['mid'] * 10 + ['long'] * 8
  sizes = [8 * 64] * 12 + [16 * 64] * 20 + [8 * 128] * 8
  assert [line['tokens'] for line in steps] == np.cumsum(sizes).tolist()
  warm = [3e-3 * min(1, n / 2048) for n in np.cumsum(sizes[:22])]
  linear = [3e-3 * (1 - n / 10) for n in range(1, 11)]
  tokens = np.arange(1, 9) * 1024
  cosine = 1e-3 * np.minimum(tokens / 2048, 1) * (1 + np.cos(np.pi * np.maximum(tokens - 2048, 0) / 6144)) / 2
  np.testing.assert_allclose([line['learning_rate'] for line in steps], [*warm, *linear, *cosine], atol=1e-9)
  held_out = [line for line in record(reference) if 'eval/loss/all' in line]
  assert [(line['step'], line['stage'], line.get('ended')) for line in held_out] == [
    (22, 'base', 'base'), (22, 'mid', None), (32, 'mid', 'mid'), (32, 'long', None), (40, 'long', None)]
  assert [('eval/loss/all@128' in line) for line in held_out] == [False] * 3 + [True] * 2
  assert held_out[-1]['eval/loss/all'] < held_out[2]['eval/loss/all'] < held_out[0]['eval/loss/all']


def test_the_sources_of_each_stage_are_those_of_its_mixture(corpus):
  config = config_of(corpus)
  plan = stages.segments(config)
  opened = {length: loader.open_corpus(corpus, length) for length in (64, 128)}
  made = feeds([(s.config.data, s.stop - s.first) for s in plan], [opened[s.config.data.seq_len] for s in plan], 0)
  drawn = {(draw.stage, draw.source): draw for draw in stages.draws(plan, made)}
  assert drawn['base', 'stories'].tokens == 3 * drawn['base', 'inventories'].tokens == 12_288
  assert 3 * drawn['mid', 'stories'].tokens == drawn['mid', 'inventories'].tokens == 7_680
  assert drawn['long', 'stories'].epochs == 48 / opened[128].rows('stories')
  rows = [row for s, feed in zip(plan, made) for step in range(s.first, s.stop) if s.name != 'long'
          for row in loader.row_ids(feed.corpus, feed.schedule, seed=0, batch_size=feed.batch_size, step=0,
                                    cursor=feed.row(step))]
  seen = {(row['source'], row['epoch'], row['row']) for row in rows}
  assert len(seen) == len(rows) == 12 * 8 + 20 * 16  # no row twice within an epoch, over the stages


def test_batches_of_a_stage_after_a_jump_are_its_own(corpus, mesh_of):
  """A run that left out batches reads on in the open end of a stage, and begins the next one later."""
  data = DataConfig(corpus=str(corpus), mixture={'stories': 1}, seq_len=64, batch_size=8)
  more = dataclasses.replace(data, mixture={'inventories': 1}, batch_size=16)
  opened = loader.open_corpus(corpus, 64)
  first, second = feeds([(data, 4), (more, 4)], [opened, opened], 0)
  with mesh_of(1):
    jumped = train_batches(first, 2, lambda step: step + 3 * (step >= 2))
    batch, _ = next(jumped)
    expected, _ = next(train_batches(first, 5))
    assert batch['tokens'].shape == (8, 64) and np.array_equal(batch['tokens'], expected['tokens'])
    after, _ = next(train_batches(second, 4, lambda step: step + 3))
  assert set(first.schedule.sources) == {'stories'} and second.schedule.sources == ('stories', 'inventories')
  assert after['source'].tolist() == [1] * 16 and second.row(4) == 32


def test_rows_that_are_one_document(corpus):
  batch = loader.batch_at(loader.open_corpus(corpus, 64), feeds_schedule(corpus), seed=0, batch_size=8, step=0)
  whole = masked(batch, 'row')
  assert masked(batch, 'document') is batch and batch['segment_ids'].max() > 1
  assert whole['segment_ids'].max() == 1 and np.array_equal(whole['segment_ids'] > 0, batch['segment_ids'] > 0)
  assert np.array_equal(whole['positions'], np.where(batch['segment_ids'] > 0, np.arange(64), 0))
  assert all(np.array_equal(whole[name], batch[name]) for name in ('tokens', 'targets', 'loss_mask'))


def feeds_schedule(corpus):
  opened = loader.open_corpus(corpus, 64)
  return feeds([(DataConfig(corpus=str(corpus), seq_len=64, batch_size=8), 1)], [opened], 0)[0].schedule


def test_a_checkpoint_is_used_as_its_stage_has_it(reference):
  checkpoints = Checkpoints(reference / 'checkpoints')
  assert {*staged.ENDS.values()} <= {*checkpoints.steps()}
  meta = checkpoints.meta(32)
  assert (meta['stage'], meta['tokens'], meta['cursor']) == ('mid', 12 * 512 + 20 * 1024, 12 * 8 + 20 * 16)
  mid, long = load(f'{reference}@32'), load(f'{reference}@40')
  assert mid.model.pattern[1].mixer.rope.scaling is None and mid.model.pattern[0].mixer.window == 24
  assert long.model.pattern[1].mixer.rope.scaling == YarnScaling(factor=2.0, original_length=64)
  assert long.model.pattern[0].mixer.window == 32 and long.model.pattern[2].mixer.rope is None
  assert (mid.max_length, long.max_length) == (64, 128)


# -- killed, resumed, branched


def test_a_run_goes_on_from_each_of_its_checkpoints_with_the_same_bits(reference, corpus, tmp_path):
  """From within each stage and from between them, each time after a kill: what was saved later is gone."""
  for step in (10, 22, 30, 32, 40):
    goes_on(cut(reference, tmp_path / f'from-{step}', step), reference, corpus)


def cut(reference: Path, workdir: Path, step: int) -> Path:
  """A copy of the run as a kill leaves it whose newest checkpoint is of that step."""
  shutil.copytree(reference, workdir)
  (workdir / 'DONE').unlink()
  for later in Checkpoints(workdir / 'checkpoints').steps():
    if later > step:
      shutil.rmtree(workdir / 'checkpoints' / str(later))
  return workdir


def goes_on(workdir: Path, reference: Path, corpus: Path) -> None:
  """The same command ends with the record and the bits of the undisturbed run."""
  assert train.run(config_of(corpus), workdir) == 0
  assert state(workdir, 40) == state(reference, 40) and record(workdir) == record(reference)


def test_a_stop_during_the_evaluation_at_the_end_of_a_stage_does_not_lose_it(reference, corpus, tmp_path, monkeypatch):
  """It is made on the mesh of its stage, before the next one begins on another."""
  workdir, evaluate = cut(reference, tmp_path / 'run', 20), train.evaluate

  def stopping(*args):
    monkeypatch.undo()
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args)

  monkeypatch.setattr(train, 'evaluate', stopping)
  assert train.run(config_of(corpus), workdir) == train.EXIT_PREEMPTED
  assert Checkpoints(workdir / 'checkpoints').latest() == staged.ENDS['base'] == record(workdir)[-1]['step']
  assert not any('ended' in line for line in record(workdir))
  goes_on(workdir, reference, corpus)


@pytest.mark.slow
def test_a_stage_that_was_the_last_and_has_a_next_one_now_is_scored_at_its_end(reference, corpus, tmp_path):
  base = stages.chosen(config_of(corpus), ('base',))
  assert train.run(base, cut(reference, tmp_path / 'run', 20)) == 0
  assert not any('ended' in line for line in record(tmp_path / 'run'))
  goes_on(tmp_path / 'run', reference, corpus)


@pytest.mark.slow
def test_killed_in_each_stage_and_run_again_it_ends_with_the_same_bits(corpus, tmp_path):
  """As a user would: processes on one device, kill -9 in each stage."""
  def begin(workdir):
    return subprocess.Popen(
      [sys.executable, '-m', 'maxlm.train', f'--config={ROOT}/tests/staged.py', f'--config.data.corpus={corpus}',
       f'--workdir={workdir}', '--config.checkpoint.every_steps=2'], env=os.environ | {'PYTHONPATH': str(ROOT)},
      stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

  assert begin(tmp_path / 'whole').wait(300) == 0
  for step in (4, 24, 34):
    process = begin(tmp_path / 'killed')
    while not has_saved(tmp_path / 'killed', step)():
      assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert begin(tmp_path / 'killed').wait(300) == 0
  assert state(tmp_path / 'killed', 40) == state(tmp_path / 'whole', 40)
  assert record(tmp_path / 'killed') == record(tmp_path / 'whole')


def branch(config, workdir: Path, at: str, names: str) -> int:
  """What `--branch=… --stages=…` does."""
  return train.run(config, workdir, at, names)


def test_a_branch_is_its_trunk_up_to_there_and_then_another_run(reference, corpus, tmp_path):
  on, off = tmp_path / 'on', tmp_path / 'off'
  assert branch(config_of(corpus), on, f'{reference}@20', 'base,mid,long') == 0
  assert state(on, 40) == state(reference, 40)  # it goes on as the trunk did
  after = [line for line in record(reference) if line['step'] > 20]
  assert [line for line in record(on) if line['step'] > 20] == after
  assert branch(config_of(corpus), off, f'{reference}@20', 'mid') == 0  # two steps before the stage's end
  lines = [line for line in record(off) if 'loss' in line]
  assert [line['step'] for line in lines] == [*range(21, 31)] and {line['stage'] for line in lines} == {'mid'}
  np.testing.assert_allclose(lines[0]['learning_rate'], 2.7e-3, rtol=1e-5)
  assert lines[-1]['learning_rate'] == 0
  meta, trunk = (Checkpoints(of / 'checkpoints').meta(at) for of, at in ((off, 30), (reference, 20)))
  assert meta['lineage']['parent']['run'] == trunk['lineage']['run'] and meta['lineage']['parent']['step'] == 20
  assert [stage['name'] for stage in meta['config']['stages']] == ['base', 'mid']
  assert branch(config_of(corpus), off, f'{reference}@20', 'mid') == 0  # it is finished


def test_a_branch_is_resumed_by_its_own_command(reference, corpus, tmp_path):
  config = config_of(corpus)
  assert branch(config, tmp_path / 'whole', f'{reference}@20', 'mid') == 0
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  (tmp_path / 'cut' / 'DONE').unlink()
  shutil.rmtree(tmp_path / 'cut' / 'checkpoints' / '30')
  Checkpoints(tmp_path / 'cut' / 'checkpoints').latest()
  assert branch(config, tmp_path / 'cut', f'{reference}@20', 'mid') == 0
  assert state(tmp_path / 'cut', 30) == state(tmp_path / 'whole', 30)


@pytest.mark.parametrize('step, names, reason', [
  (20, 'long', "step 20 is in stage 'base', after it 'mid'; --stages=long needs a checkpoint of stage 'mid'"),
  (32, 'base', "is in stage 'mid', after it 'long'"),
  (28, 'long', "the learning rate of stage 'mid' is 0.0012, below its peak of 0.003: .* from its end, step 32"),
  (2, 'mid', 'below its peak'),
  (32, 'lang', "there is no stage 'lang' in this config, it has base, mid, long"),
  (32, 'long,mid', 'or stages in their order'),
  (41, 'long', 'step 41 is none of the 40')])
def test_a_branch_from_the_wrong_place_is_refused(corpus, step, names, reason):
  with pytest.raises(ValueError, match=reason):
    stages.branched(config_of(corpus), step, tuple(names.split(',')))


def test_what_is_no_branch_is_refused(reference, corpus, tmp_path):
  config = config_of(corpus)
  for at, names, reason in ((str(reference), 'mid', 'name a checkpoint, WORKDIR@STEP'),
                            (f'{reference}@20', '', 'and what comes then'),
                            (f'{reference}@20', 'long', "needs a checkpoint of stage 'mid'")):
    with pytest.raises(ValueError, match=reason):
      branch(config, tmp_path / 'run', at, names)
  with pytest.raises(ValueError, match='a branch has a workdir of its own'):
    branch(config, reference, f'{reference}@20', 'mid')
  config.model.logits_softcap = None
  with pytest.raises(ValueError, match='was begun with model.logits_softcap=30.0 and this config has None'):
    branch(config, tmp_path / 'run', f'{reference}@20', 'mid')
  with pytest.raises(ValueError, match='a run begins with its first stage; this config has base, mid, long'):
    stages.chosen(config, ('mid',))
  assert stages.segments(stages.chosen(config, ('base',)))[-1].stop == 22


def test_a_stage_that_has_begun_is_not_changed(reference, corpus):
  meta = Checkpoints(reference / 'checkpoints').meta(30)  # in mid
  for i, change, refused in (
      (0, {'tokens': 64}, True), (1, {'mixture': {'stories': 1}}, True), (1, {'tokens': 64 * 64 * 16}, False),
      (2, {'batch_size': 16}, False), (0, {'microbatches': 2}, False)):
    config = config_of(corpus)
    config.stages = tuple(dataclasses.replace(stage, **change) if j == i else stage
                          for j, stage in enumerate(config.stages))
    if refused:
      with pytest.raises(ValueError, match=rf'was begun with stages\[{i}\]'):
        start.check_same_run(reference, meta, {}, config)
    else:
      start.check_same_run(reference, meta, {}, config)


# -- what does not add up


def replaced(i: int, **changes):
  config = staged.get_config()
  config.stages = tuple(dataclasses.replace(stage, **changes) if j == i else stage for j, stage in enumerate(config.stages))
  return config


LINEAR = Schedule(peak_lr=2e-4, schedule='linear')
TOO_LONG = dataclasses.replace(LINEAR, horizon_tokens=10**9)


@pytest.mark.parametrize('i, changes, reason', [
  (1, {'lr': TOO_LONG}, r"stages\[1\] \('mid'\).lr: the decay is laid over 1,000,000,000 tokens and the stage has 10,240, "
                        'so it ends at 0.0002'),
  (1, {'lr': dataclasses.replace(TOO_LONG, end_lr=0.0)}, 'ends at 0.0002 after 10,240 tokens, not at end_lr=0'),
  (1, {'lr': Schedule(peak_lr=1e-3, end_lr=0.0)}, 'ends at 0.001 after 10,240 tokens, not at end_lr=0'),
  (1, {'lr': Schedule(peak_lr=1e-3, warmup_tokens=9000, decay_tokens=9000)}, 'is more than the 10240 tokens'),
  (1, {'lr': Schedule()}, r"stages\[1\] \('mid'\).lr.peak_lr is not set"),
  (1, {'lr': dataclasses.replace(LINEAR, horizon_tokens=64)}, 'horizon_tokens=64 ends before the 10,240 tokens'),
  (1, {'name': 'base'}, "there is another stage of that name"),
  (1, {'name': 'a,b'}, 'a name has letters'),
  (1, {'tokens': 0}, 'tokens=0 must be at least 1'),
  (0, {'ramp': (Ramp(rows=32, until_tokens=640),)}, 'ramp: tokens and rows must grow .*, up to batch_size=16'),
  (0, {'ramp': (Ramp(rows=8, until_tokens=10**6),)}, 'ramp ends after 1,000,000 tokens and the stage has 16,384'),
  (2, {'full': Stretch(scaling=YarnScaling(factor=1.5, original_length=64))},
   'rows of 128 tokens, and rotary positions that are stretched 1.5 times from 64 reach 96'),
  (2, {'sliding': Stretch(window=24)}, r"stages\[2\] \('long'\).sliding changes nothing"),
  (2, {'batch_size': 12}, r"stages\[2\] \('long'\): data.batch_size=12 rows do not divide")])
def test_a_recipe_that_does_not_add_up_is_refused_with_the_reason(i, changes, reason):
  with pytest.raises(ValueError, match=reason):
    stages.check(replaced(i, **changes), 'cpu', 8)


def test_tokens_and_rates_are_of_the_stages():
  config = staged.get_config()
  config.tokens = 64
  with pytest.raises(ValueError, match='tokens=64: in a run with stages each has its own: leave it out'):
    stages.check(config, 'cpu', 8)
  config.tokens, config.optim.peak_lr = 0, 1e-3
  with pytest.raises(ValueError, match='optim.peak_lr=0.001: in a run with stages each has its own'):
    stages.check(config, 'cpu', 8)


def test_a_source_that_is_read_too_often_is_refused(corpus):
  config = config_of(corpus)
  config.data.max_epochs = {'*': 4, 'inventories': 0.45}
  with pytest.raises(ValueError, match=r"'inventories' of .* is read 0\.\d+ times in this run \(0\.\d+ in base, .* in mid, "
                                       r'.* in long\) and data.max_epochs allows 0.45'):
    dry_run.dry_run(config, None)
  config.data.max_epochs = {'*': 4}
  assert 'inventories' in dry_run.dry_run(config, None)
  config.data.corpus, config.data.source_tokens = '/not/there', {'inventories': 1000, 'stories': 10**9}
  with pytest.raises(ValueError, match=r"source 'inventories' of /not/there is read 1\d\.\d+ times"):
    dry_run.dry_run(config, None)


def test_a_dry_run_says_what_the_run_would_be(corpus, capsys, tmp_path):
  command = [sys.executable, '-m', 'maxlm.train', f'--config={ROOT}/tests/staged.py', f'--config.data.corpus={corpus}',
             '--dry_run', f'--workdir={tmp_path}/run']
  ran = subprocess.run(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True)
  lines = [' '.join(line.split()) for line in ran.stdout.splitlines()]
  assert any(line.startswith('mid 10 10.2k 16 x 64 1.02k 0.0027 > 0 one device') for line in lines)
  assert any(line.startswith('long inventories 25.0% 2.05k') for line in lines)
  assert 'long steps 32 to 40 goes on from step 32 of mid' in lines
  assert not (tmp_path / 'run').exists()
