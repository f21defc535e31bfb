"""A run from its first command to its end: killed, stopped, resumed, refused; what it records is exact.

What a user does is done as a user does it: `python -m maxlm.train` in a process of its own, on one device. Where the moment
matters (a stop while data is awaited) or the eight fake devices are needed, `train.run` is called here.
"""

import contextlib
import fcntl
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from filelock import FileLock

from configs import moe_tiny, tiny
from data_pipeline import loader
from data_pipeline.mixture import MixtureSchedule
from maxlm import flags, stages, train, typed_json
from maxlm.checkpoint import Checkpoints
from maxlm.config import Experiment
from maxlm.health import Health
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.step import init_state
from maxlm.stop import StopSignal
from tests.jobs import has_saved, losses, record

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / 'tests' / 'golden' / 'tiny_losses.json'
N_STEPS = 60  # of configs/tiny.py, with a checkpoint every 10


@pytest.fixture(scope='session')
def reference(shared, corpus) -> Path:
  """The workdir of a run of configs/tiny.py on one device that nothing disturbed."""
  workdir = shared / 'reference'
  with FileLock(shared / 'reference.lock'):
    if not (workdir / 'DONE').exists():
      process = start(corpus, workdir)
      assert process.wait(300) == 0, said(process)
  return workdir


# -- what the tests do with a run


def start(corpus: Path, workdir: Path, *arguments: str, wrap=()) -> subprocess.Popen:
  """`python -m maxlm.train --config=configs/tiny.py …` under way. What it says goes to files beside the workdir."""
  command = [*wrap, sys.executable, '-m', 'maxlm.train', f'--config={ROOT}/configs/tiny.py',
             f'--config.data.corpus={corpus}', f'--workdir={workdir}', *arguments]
  out = workdir.with_name(f'{workdir.name}-{time.time_ns()}')
  with open(f'{out}.stdout', 'w') as stdout, open(f'{out}.stderr', 'w') as stderr:
    process = subprocess.Popen(command, cwd=workdir.parent, stdout=stdout, stderr=stderr,
                               env=os.environ | {'PYTHONPATH': str(ROOT)})
  process.said = Path(f'{out}.stderr')
  return process


def copied(run: Path, to: Path, *without: str) -> Path:
  """A copy of a run that other tests restore meanwhile, which notes what they verified."""
  return shutil.copytree(run, to, ignore=shutil.ignore_patterns('*.partial', *without))


def said(process: subprocess.Popen) -> str:
  return process.said.read_text()


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
  until = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, f'it ended before: {said(process)}'
    assert time.monotonic() < until, f'it did not come to that: {said(process)}'
    time.sleep(0.005)


def restored(workdir: Path, mesh_of) -> dict[str, np.ndarray]:
  """Parameters and optimizer state of the newest checkpoint, whatever mesh they were saved from."""
  checkpoints = Checkpoints(workdir / 'checkpoints')
  config = typed_json.decode(checkpoints.meta(checkpoints.latest())['config'], Experiment)
  with mesh_of(1):
    like = jax.eval_shape(lambda: init_state(config.step_config('cpu', 2), jax.random.key(0)))
    tree = checkpoints.restore(checkpoints.latest(), like.params, like.opt, recent=like.recent)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same_run(workdir: Path, other: Path, mesh_of) -> None:
  """The same record, line for line, and the same bits at the end."""
  assert record(workdir) == record(other)
  state, expected = restored(workdir, mesh_of), restored(other, mesh_of)
  assert state.keys() == expected.keys() and len(state) > 30
  assert [name for name in state if state[name].tobytes() != expected[name].tobytes()] == []


def short_config(corpus: Path, n_steps: int = 12):
  """configs/tiny.py with one layer, which compiles for 8 devices in seconds, evaluated every 5 steps, saved every 4."""
  config = tiny.get_config()
  config.data.corpus, config.tokens = str(corpus), n_steps * config.tokens_per_step
  config.model.n_layers, config.model.pattern = 1, config.model.pattern[1:2]
  config.evals.every_steps, config.evals.rows, config.checkpoint.every_steps = 5, 8, 4
  return config


# -- the record


def test_the_first_losses_have_not_moved(reference, corpus):
  """To move them on purpose: python -m tests.golden.write, and the reason in the commit.

  Tolerance: fp32 sums in another order (AVX2, SSE, fast math, other thread counts) move these losses by at most 4e-7 of
  themselves over 20 steps, as measured; a change of the model or of the data order moves them by more than 1e-4.
  """
  golden = json.loads(GOLDEN.read_text())
  assert loader.open_corpus(corpus, 64).tokenizer_sha256 == golden['tokenizer_sha256'], 'the test corpus has moved'
  np.testing.assert_allclose(losses(reference)[:20], golden['losses'], rtol=3e-6, atol=0)


def test_each_step_is_recorded_once_and_evaluations_where_they_were_asked_for(reference):
  lines = record(reference)
  assert [line['step'] for line in lines if 'loss' in line] == list(range(1, N_STEPS + 1))
  assert [line['step'] for line in lines if 'loss' not in line] == [25, 50, 60]
  assert losses(reference)[-1] < 2 < 6 < losses(reference)[0]


def test_tokens_of_each_source_are_those_of_the_schedule(reference, corpus):
  """By another way: the rows that the schedule counts, read from a stream of that source alone."""
  rows, opened = N_STEPS * 8, loader.open_corpus(corpus, 64)
  counts = MixtureSchedule(stages=((None, {'stories': 3, 'inventories': 1}),)).counts(0, rows)
  assert counts == {'stories': rows * 3 // 4, 'inventories': rows // 4}
  for source, count in counts.items():
    stream = loader.batch_at(opened, MixtureSchedule(stages=((None, {source: 1}),)), seed=0, batch_size=count, step=0)
    expected = int((stream['segment_ids'] > 0).sum())
    assert expected < count * 64  # there is padding, which is not counted
    assert sum(line.get(f'tokens/{source}', 0) for line in record(reference)) == expected


def test_the_workdir_says_what_ran(reference, corpus):
  config = json.loads((reference / 'config.json').read_text())
  assert config['data']['corpus'] == str(corpus) and config['tokens'] == N_STEPS * 512
  assert (reference / 'tokenizer.json').read_bytes() == (corpus / 'tokenizer.json').read_bytes()
  meta = Checkpoints(reference / 'checkpoints').meta(N_STEPS)
  assert meta['config'] == config and (meta['step'], meta['cursor']) == (60, 480) and len(meta['lineage']['run']) == 32
  assert Checkpoints(reference / 'checkpoints').steps() == [40, 50, 60]
  done = json.loads((reference / 'DONE').read_text())
  assert done['steps'] == N_STEPS and done['bits_per_byte']['all'] < done['baselines']['all']['unigram']


def test_a_step_reuses_the_memory_of_the_state_and_nothing_crosses_to_the_host(corpus, tmp_path):
  config = short_config(corpus)
  with jax.set_mesh(make_mesh(config.mesh)), Health(config.health, tmp_path) as health:
    setup, state = train.set_up(config, stages.segments(config), tmp_path, time.time(), health)
    batches = [next(setup.batches)[1] for _ in range(2)]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert setup.update.memory_analysis().alias_size_in_bytes == held
    with jax.transfer_guard('disallow'):
      new, _ = setup.update(state, batches[0])
      setup.update(new, batches[1])
    setup.log.close()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  program = setup.update.as_text()
  assert not [word for word in ('callback', 'infeed', 'outfeed', 'send(', 'recv(') if word in program]


# -- killed, stopped, finished


def test_killed_twice_and_run_again_it_ends_with_the_same_bits(reference, corpus, tmp_path, mesh_of):
  for step in (10, 30):
    process = start(corpus, tmp_path / 'run')
    wait_until(has_saved(tmp_path / 'run', step), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(losses(tmp_path / 'run')) < N_STEPS
  process = start(corpus, tmp_path / 'run')
  assert process.wait(300) == 0, said(process)
  assert 'resumed  at step ' in said(process)
  assert_same_run(tmp_path / 'run', reference, mesh_of)


def test_sigterm_saves_and_exits_75_and_a_rerun_ends_with_the_same_bits(reference, corpus, tmp_path, mesh_of):
  process = start(corpus, tmp_path / 'run')
  wait_until(has_saved(tmp_path / 'run', 20), process)
  process.terminate()
  assert process.wait(60) == train.EXIT_PREEMPTED, said(process)
  step = Checkpoints(tmp_path / 'run' / 'checkpoints').latest()
  assert len(losses(tmp_path / 'run')) == step < N_STEPS
  assert said(process).splitlines()[-1] == (f'stopped  by SIGTERM after {step} steps, all saved: '
                                           'the same command goes on from there')
  process = start(corpus, tmp_path / 'run')
  assert process.wait(300) == 0, said(process)
  assert_same_run(tmp_path / 'run', reference, mesh_of)


def test_a_finished_run_is_left_alone_and_says_so(reference, corpus, tmp_path):
  finished = copied(reference, tmp_path / 'finished')
  before = {path: path.stat().st_mtime_ns for path in finished.rglob('*')}
  process = start(corpus, finished)
  assert process.wait(60) == 0
  assert said(process).startswith(f'{finished} is finished: 60 steps.') and said(process).count('\n') == 1
  assert {path: path.stat().st_mtime_ns for path in finished.rglob('*')} == before


def test_sigterm_during_the_set_up_exits_75_and_nothing_is_trusted(corpus, tmp_path):
  process = start(corpus, tmp_path / 'run')
  wait_until(lambda: 'compile  …' in said(process), process)
  process.terminate()
  assert process.wait(60) == train.EXIT_PREEMPTED, said(process)
  assert said(process).splitlines()[-1].startswith('stopped  by SIGTERM before a step was taken')
  assert not list((tmp_path / 'run').rglob('*.partial')) and not (tmp_path / 'run' / 'checkpoints').exists()


def test_sigterm_while_the_corpus_is_built_ends_the_build_too(tmp_path):
  (tmp_path / 'text.txt').write_text('\n'.join(f'{n} squared is {n * n}' for n in range(800_000)))
  (tmp_path / 'recipe.py').write_text(f"""
from data_pipeline.recipe import Recipe
from data_pipeline.sources.text_files import TextFiles

def get_recipe():
  return Recipe(name='long', sources=(TextFiles(name='text', pattern='{tmp_path}/*.txt'),), vocab_size=512, seq_lens=(64,),
                validation_fraction=0.1, min_bytes=1)
""")
  process = start(tmp_path / 'corpus', tmp_path / 'run', f'--config.data.recipe={tmp_path}/recipe.py')
  wait_until(lambda: '1 documents' in said(process), process)
  process.terminate()
  assert process.wait(30) == train.EXIT_PREEMPTED, said(process)
  with open(tmp_path / 'corpus' / 'build' / 'lock') as lock:  # nobody holds it any more
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  assert not (tmp_path / 'corpus' / 'manifest.json').exists()


@contextlib.contextmanager
def stopping(monkeypatch, name: str, call: int):
  """SIGTERM arrives in call number `call` of train.<name>, which then hangs for as long as it is let."""
  real, calls = getattr(train, name), []

  def hanging(*args, **kwargs):
    calls.append(name)
    if len(calls) == call:
      threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
      time.sleep(60)
      pytest.fail(f'SIGTERM did not end {name}')
    return real(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(train, name, hanging)
    yield


def hang_after(n_batches: int):
  """train_batches whose source stalls after so many batches."""
  real = train.train_batches

  def batches(*args):
    for i, batch in enumerate(real(*args)):
      if i == n_batches:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        threading.Event().wait(60)
      yield batch
  return batches


@pytest.fixture(scope='module')
def short_run(corpus, tmp_path_factory) -> Path:
  """The workdir of an undisturbed short run on the eight devices of this process."""
  workdir, polls = tmp_path_factory.mktemp('short') / 'run', []
  poll = Checkpoints.poll
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Checkpoints, 'poll', lambda self: polls.append(poll(self)))
    assert train.run(short_config(corpus), workdir) == 0
  assert len(polls) == 12  # a save that failed is told at the next step
  return workdir


@pytest.mark.parametrize('place, saved_at', [('waiting for data', 6), ('evaluating', 10), ('evaluating at the end', 12),
                                             ('writing samples', 12)])
def test_sigterm_is_acted_on_wherever_the_loop_is(short_run, corpus, tmp_path, mesh_of, monkeypatch, capfd, place, saved_at):
  with monkeypatch.context() as patch:
    if place == 'waiting for data':
      patch.setattr(train, 'train_batches', hang_after(saved_at))
    name, call = {'evaluating': ('evaluate', 2), 'evaluating at the end': ('evaluate', 3)}.get(place, ('sample', 1))
    with stopping(patch, name, call):
      assert train.run(short_config(corpus), tmp_path / 'run') == train.EXIT_PREEMPTED
  assert Checkpoints(tmp_path / 'run' / 'checkpoints').latest() == saved_at
  assert capfd.readouterr().err.splitlines()[-1].startswith(f'stopped  by SIGTERM after {saved_at} steps, all saved')
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the context is over
  assert train.run(short_config(corpus), tmp_path / 'run') == 0
  assert_same_run(tmp_path / 'run', short_run, mesh_of)


def test_a_stop_that_arrives_in_a_callback_is_not_lost(capfd):
  """JAX has a callback in the garbage collector; an exception there ends as 'Exception ignored in …'."""
  def collecting():
    gc.callbacks.append(lambda phase, _: phase == 'stop' and os.kill(os.getpid(), signal.SIGTERM))
    gc.collect()
    gc.callbacks.pop()
    time.sleep(60)

  with StopSignal() as stop:
    assert stop.interruptible(max, 1, 2) == 2
    began = time.monotonic()
    assert stop.interruptible(collecting) is None and time.monotonic() - began < 30
    assert stop.requested == 'SIGTERM' and stop.interruptible(max, 1, 2) is None
  assert capfd.readouterr().err == ''
  assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_other_meshes_give_the_losses_of_one_device_also_when_resumed(reference, corpus, tmp_path, monkeypatch):
  """Five steps on context 2 x fsdp 2 x tensor 2, five on fsdp 8, against one device in another process."""
  config = tiny.get_config()
  config.data.corpus, config.evals.every_steps = str(corpus), 0
  monkeypatch.setattr(train, 'train_batches', hang_after(5))
  for steps, sizes in ((5, {'context': 2, 'fsdp': 2, 'tensor': 2}), (10, {'data': 1, 'fsdp': 8, 'tensor': 1})):
    config.mesh = MeshConfig(**sizes)
    assert train.run(config, tmp_path / 'run') == train.EXIT_PREEMPTED
    assert len(losses(tmp_path / 'run')) == steps
  np.testing.assert_allclose(losses(tmp_path / 'run'), losses(reference)[:10], rtol=3e-6, atol=0)


def stopped_and_not(config_of: Callable[[], Experiment], folder: Path, monkeypatch) -> dict:
  """Digests of step 12 of a run that was stopped twice, and of one that was not: the same, as their records are."""
  digests = []
  for name, stops in (('undisturbed', ()), ('stopped', (5, 2))):
    for after in stops:
      with monkeypatch.context() as patch:
        patch.setattr(train, 'train_batches', hang_after(after))
        assert train.run(config_of(), folder / name) == train.EXIT_PREEMPTED
    assert train.run(config_of(), folder / name) == 0
    digests.append(Checkpoints(folder / name / 'checkpoints').digests(12))
  assert digests[0] == digests[1] and record(folder / 'undisturbed') == record(folder / 'stopped')
  return digests[0]


def test_all_that_decides_the_next_step_is_saved(corpus, tmp_path, monkeypatch):
  """Experts that are balanced by a bias, microbatches, and the window of spikes."""
  def config():
    config = short_config(corpus)
    config.model = moe_tiny.get_config('bias').model
    config.model.vocab_size, config.model.n_layers = 512, 2
    config.data.batch_size, config.microbatches = 16, 2
    config.tokens = 12 * config.tokens_per_step
    return config

  digests = stopped_and_not(config, tmp_path, monkeypatch)
  assert any('bias' in name for name in digests['params']) and set(digests) == {'params', 'opt', 'recent'}


def test_a_finished_run_goes_on_when_more_tokens_are_asked_for(short_run, corpus, tmp_path, capfd):
  shutil.copytree(short_run, tmp_path / 'run')
  config = short_config(corpus, 14)
  config.optim.peak_lr = 1e-3
  assert train.run(config, tmp_path / 'run') == 0
  text = capfd.readouterr().err
  assert 'changed  optim.peak_lr: 0.003 -> 0.001' in text and 'resumed  at step 12' in text
  assert len(losses(tmp_path / 'run')) == 14 and losses(tmp_path / 'run')[:12] == losses(short_run)
  with pytest.raises(ValueError, match='at step 14, past the 13 steps'):
    (tmp_path / 'run' / 'DONE').unlink()
    train.run(short_config(corpus, 13), tmp_path / 'run')


# -- bad input: one line with cause and fix, and nothing left behind that a rerun would trust


def error_of(monkeypatch, capfd, *arguments: str) -> str:
  """The one line with which the command ends."""
  monkeypatch.setattr(sys, 'argv', ['maxlm.train', f'--config={ROOT}/configs/tiny.py', *arguments])
  with pytest.raises(SystemExit) as ended:
    flags.run(train.main, default_config='configs/quickstart.py')
  text = capfd.readouterr().err
  *before, line = text.splitlines()
  assert ended.value.code == 2 and line.startswith('error: ') and 'Traceback' not in text
  assert not any('error' in other.lower() or 'warning' in other.lower() for other in before), text
  return line


def files_of(directory: Path) -> dict[Path, bytes]:
  return {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}


BAD_CONFIG = [  # (flags, what the line says)
  (['--config.data.corpus=nowhere'], ['nowhere', 'data_pipeline.build']),
  (['--config.data.seq_len=128'], ['rows of 64 tokens, not 128', '--seq_lens=128']),
  (["--config.data.mixture={'web': 1}"], ['the mixture names web', 'it has stories, inventories']),
  (["--config.data.mixture={'stories': 0}"], ["data.mixture['stories']=0", 'from 1']),
  (['--config.model.vocab_size=256'], ['more than model.vocab_size=256', 'or more']),
  (['--config.model.n_layer=4'], ['no such key; did you mean --config.model.n_layers?']),
  (['--config.model.n_layers=four'], ['--config.model.n_layers=four: expected int']),
  (['--config.mesh.fsdp=3'], ['needs 3 devices, and this machine has 8', '--config.mesh']),
  (['--config.mesh.tensor=8', '--config.mesh.fsdp=1'], ['n_heads=4 does not divide into 8 parts']),
  (['--config.data.batch_size=12'], ['data.batch_size=12 rows do not divide', 'such as 16']),
  (['--config.checkpoint.every_steps=0'], ['checkpoint.every_steps=0 must be at least 1']),
  (['--config.health.hang_seconds=0'], ['health.hang_seconds=0', 'must be at least 1']),
  (['--workdir=gs://bucket/run'], ['a bucket cannot do', 'mount it']),
  (['--config.microbatches=3'], ['3 microbatches x 8 parts', 'such as 24']),
  (['--config.optim.decay_tokens=5'], ['optim.decay_tokens=5 has no meaning', 'set it to 0']),
  (['--config.compute.kernel=splash'], ["'splash' runs on tpu, not on cpu", "use 'chunked'"]),
  (['--workdir=file/run'], ['cannot write to file/run', 'another --workdir']),
  (['--workdir=/proc/run'], ['cannot write to /proc/run', 'another --workdir']),
]


@pytest.mark.parametrize('arguments, parts', BAD_CONFIG, ids=lambda value: ' '.join(value) if '--' in value[0] else '')
def test_bad_config_ends_in_one_line_that_names_the_fix(corpus, tmp_path, monkeypatch, capfd, arguments, parts):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  line = error_of(monkeypatch, capfd, f'--config.data.corpus={corpus}', '--workdir=run', *arguments)
  print(line)
  assert [part for part in parts if part not in line] == [], line
  assert list(files_of(tmp_path)) == [tmp_path / 'file'] and not Path('/proc/run').exists()


def test_a_corpus_that_is_not_one_is_refused(corpus, tmp_path, monkeypatch, capfd):
  def refused(*arguments):
    return error_of(monkeypatch, capfd, f'--config.data.corpus={tmp_path}/corpus', f'--workdir={tmp_path}/run', *arguments)

  (tmp_path / 'corpus').mkdir()
  assert f'{tmp_path}/corpus' in (line := refused()) and 'data_pipeline.build' in line
  (tmp_path / 'corpus').rmdir()
  shutil.copytree(corpus, tmp_path / 'corpus')
  manifest = json.loads((corpus / 'manifest.json').read_text())
  manifest['rows'][0]['tokenizer_sha256'] = '0' * 64
  (tmp_path / 'corpus' / 'manifest.json').write_text(json.dumps(manifest))
  assert 'was made with another tokenizer' in (line := refused()) and 'build the corpus again' in line
  shutil.copy(corpus / 'manifest.json', tmp_path / 'corpus' / 'manifest.json')
  shard = tmp_path / 'corpus' / manifest['rows'][0]['path']
  shard.write_bytes(shard.read_bytes()[:-1])
  assert str(shard) in (line := refused()) and 'build the corpus again' in line
  assert files_of(tmp_path / 'run') == {}


@pytest.mark.parametrize('remove', [[], ['DONE'], ['DONE', 'config.json']], ids=['finished', 'unfinished', 'no config.json'])
def test_a_workdir_of_another_run_is_refused_and_left_as_it_is(reference, corpus, tmp_path, monkeypatch, capfd, remove):
  run = tmp_path / 'run'
  copied(reference, run, *remove)
  before = files_of(run)
  for change, cause in (
      ('model.d_model=128', 'begun with model.d_model=64 and this config has 128'),
      ('model.n_layers=2', 'begun with model.n_layers=5 and this config has 2'),
      ('model.pattern[0].mixer.window=7', 'begun with model.pattern[0].mixer.window=24'),
      ('data.batch_size=16', 'begun with data.batch_size=8'),
      ("data.mixture={'stories': 1}", 'begun with data.mixture.inventories=1 and this config has absent'),
      ('seed=1', 'begun with seed=0 and this config has 1')):
    line = error_of(monkeypatch, capfd, f'--config.data.corpus={corpus}', f'--workdir={run}', f'--config.{change}')
    assert cause in line and 'give a new --workdir' in line
  assert files_of(run) == before


def test_a_loss_that_is_no_number_is_one_line_and_is_not_saved(corpus, tmp_path, monkeypatch, capfd):
  line = error_of(monkeypatch, capfd, f'--config.data.corpus={corpus}', f'--workdir={tmp_path}/run',
                  '--config.optim.peak_lr=1e18', '--config.checkpoint.every_steps=1', '--config.model.n_layers=1',
                  '--config.spikes.max_rewinds=0')
  assert ('loss is' in line or 'grad_norm is' in line) and 'lower --config.optim.peak_lr' in line
  last = record(tmp_path / 'run')[-1]
  assert last['loss'] is None or last['grad_norm'] is None
  saved, until = tmp_path / 'run' / 'checkpoints', time.monotonic() + 20
  while any(not (step / 'commit_success.txt').exists() for step in saved.glob('*')) and time.monotonic() < until:
    time.sleep(0.1)  # what was being saved when the error came is ended by a thread
  assert 0 < Checkpoints(saved).latest() < last['step']


def test_a_misspelt_key_of_the_8b_config_suggests_the_right_one(tmp_path):
  command = [sys.executable, '-m', 'maxlm.train', '--config=configs/llama3_8b.py', '--config.model.n_layer=2',
             f'--workdir={tmp_path}/run']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, '', [])
  assert done.stderr == 'error: --config.model.n_layer: no such key; did you mean --config.model.n_layers?\n'


def test_a_full_disk_is_one_line_and_a_rerun_ends_with_the_same_bits(reference, corpus, tmp_path, mesh_of):
  def on_a_disk_of(size: str) -> tuple[subprocess.Popen, Path]:
    """Trains on a disk of that size; what was on it afterwards is in the second."""
    disk, kept = tmp_path / f'disk-{size}', tmp_path / f'kept-{size}'
    disk.mkdir()
    script = ('mount -t tmpfs -o size=$1 tmpfs "$2" || exit 99; disk=$2; kept=$3; shift 3; '
              '"$@"; code=$?; cp -r "$disk" "$kept"; exit $code')
    process = start(corpus, disk / 'run', wrap=['unshare', '-rm', 'sh', '-c', script, 'sh', size, disk, kept])
    code = process.wait(300)
    if code in (1, 99):
      pytest.skip('this machine lets no user mount a small disk')
    assert code == 2 and 'Traceback' not in said(process), said(process)
    last = [line for line in said(process).splitlines() if not line.startswith('WARNING:absl')][-1]  # of Orbax's threads
    return last, kept / 'run'

  line, run = on_a_disk_of('16k')
  assert line.startswith(f'error: cannot write to {tmp_path}/disk-16k/run (No space left on device)')
  assert not (run / 'config.json').exists()
  line, run = on_a_disk_of('4m')  # there is room for one checkpoint
  assert line.startswith('error: the checkpoint of step 2') and 'was not written' in line and 'free space' in line
  assert Checkpoints(run / 'checkpoints').steps() == [10]
  process = start(corpus, run)
  assert process.wait(300) == 0, said(process)
  assert_same_run(run, reference, mesh_of)
