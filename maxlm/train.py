"""Trains a decoder on packed rows: `python -m maxlm.train [--config=F.py[:arg]] [--workdir=DIR] [--config.a.b=v]`.

With no flags it runs the quickstart: builds a corpus of real documents if it is missing, trains a small model on it and
shows what it learned. The same command run again resumes. SIGTERM or Ctrl-C saves and exits 75; a finished run is left
alone and exits 0. On TPU VMs the same command runs on every host; elsewhere --coordinator, --processes and --process say
who belongs together.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from data_pipeline import loader
from maxlm import compiler, flags, flops, hosts, start, typed_json
from maxlm.checkpoint import Checkpoints, code_version
from maxlm.config import Experiment, validate
from maxlm.data import mixture, train_batches
from maxlm.evals import Score, baselines, evaluate, total
from maxlm.health import CorruptCopies, Health
from maxlm.hosts import say
from maxlm.redact import redact
from maxlm.saving import Saver
from maxlm.sharding import make_mesh
from maxlm.spikes import Skips
from maxlm.start import write_atomically, writing_to
from maxlm.step import StepConfig, TrainState, eval_step, init_state, train_step
from maxlm.steplog import StepLog
from maxlm.stop import StopSignal
from maxlm.summary import before, report, sample

WORKDIR = flags.DEFINE_string('workdir', '', 'where the run keeps its checkpoints and logs (default: runs/<name>)')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of the first process, where several train together and are '
                                  'not on TPU VMs, which find each other')
PROCESSES = flags.DEFINE_integer('processes', 0, 'how many there are')
PROCESS = flags.DEFINE_integer('process', 0, 'which of them this is, from 0')
HEARTBEAT = flags.DEFINE_integer('heartbeat_seconds', hosts.HEARTBEAT_SECONDS, 'after so long without a sign of life from '
                                 'one process, the others end too')

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here
EXIT_HARDWARE = 70  # a device does not compute what the others do: the same command goes on, but not on that machine


def main(config: Experiment) -> int:
  if '://' in WORKDIR.value:
    raise ValueError(f'--workdir={WORKDIR.value}: records are appended to, which a bucket cannot do: mount it (gcsfuse) '
                     'and give the path')
  hosts.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
  try:
    code = run(config, Path(WORKDIR.value or f'runs/{config.name}'))
  except CorruptCopies as error:
    print('error:', error, file=sys.stderr)
    code = EXIT_HARDWARE
  hosts.shutdown()
  return code


def run(config: Experiment, workdir: Path) -> int:
  """Runs the experiment in its workdir, to its end or to a SIGTERM; returns the exit code."""
  started = time.time()
  use_compile_cache()
  config, parent = start.settle(config, workdir)
  validate(config, jax.default_backend(), len(jax.devices()))
  if start.is_done(workdir, config):
    say(f'{workdir} is finished: {config.n_steps:,} steps. To go on, raise --config.tokens; for another run, give a new '
        '--workdir.')
    return 0
  with (StopSignal() as stop, jax.set_mesh(make_mesh(config.mesh)), start.held(workdir),
        Health(config.health, workdir) as health, contextlib.ExitStack() as cleanup):
    ready = stop.interruptible(set_up, config, workdir, started, health, parent)
    if ready is None or stop.reached():
      say(f'stopped  by {stop.requested} before a step was taken: there is nothing to save')
      return health.ends('stopped', EXIT_PREEMPTED)
    setup, state = ready
    cleanup.callback(lambda: setup.log.close())  # the last of them: a rewind begins another
    done, state = train(setup, state, stop)
    while setup.log.trouble and not stop.requested:
      state = rewind(setup)
      done, state = train(setup, state, stop)
    health.enter('checkpoint')
    setup.saver.close()
    health.enter('finish')
    shown = stop.interruptible(finish, setup, state, stop, started)
    if shown is None:
      say(f'stopped  by {stop.requested} after {done:,} steps, all saved: the same command goes on from there')
      return health.ends('stopped', EXIT_PREEMPTED)
    if hosts.is_first():
      print(redact(shown))
    return health.ends('finished', 0)


# -- set up: corpus, state, programs


@dataclasses.dataclass(kw_only=True, slots=True)
class Setup:
  """What a run is made of, but for its state."""

  config: Experiment
  step_config: StepConfig
  workdir: Path
  corpus: loader.Corpus
  checkpoints: Checkpoints
  saver: Saver
  meta: dict[str, Any]  # is saved with every checkpoint
  first_step: int  # steps that were done before
  skips: Skips  # batches that the run leaves out
  batches: Iterator  # (what this host reads of it, device batch) of the steps to come
  update: Any  # compiled: (state, batch) -> (state, metrics)
  score: Any  # jitted: (params, batch) -> sums of a held-out batch
  log: StepLog
  health: Health


def set_up(config: Experiment, workdir: Path, started: float, health: Health,
           parent: start.Parent | None = None) -> tuple[Setup, TrainState]:
  """Opens or builds the corpus, makes or restores the state on the current mesh, compiles the step."""
  corpus = start.open_corpus(config, parent and parent.workdir)
  step_config = config.step_config(jax.default_backend(), len(mixture(config.data, corpus).sources))
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=config.checkpoint.keep_last,
                            keep_every=config.checkpoint.keep_every)
  health.enter('restore')
  state, meta, skips = start.start_or_resume(config, step_config, workdir, checkpoints, corpus, parent)
  first_step = int(state.step)
  batches = train_batches(config.data, corpus, config.seed, first_step, skips.batch_of)
  first_batch = next(batches)
  start.write_description(config, workdir, corpus, parent)  # now that nothing in it is refused
  hours, failures = health.begin(first_step, state.params)
  say('compile  …')
  health.enter('compile')
  options = compiler.options(jax.devices()[0].device_kind)
  lowered = jax.jit(functools.partial(train_step, step_config), donate_argnums=0).lower(state, first_batch[1])
  hosts.check_equal(lambda: {
    'jax': jax.__version__, 'the code': code_version(), 'the config': hosts.fingerprint(typed_json.dumps(config)),
    'the corpus': hosts.fingerprint(json.dumps(corpus.contents)), 'the program': hosts.fingerprint(lowered.as_text())})
  update = lowered.compile(compiler_options=options)
  hosts.barrier('compiled')  # so that those who are quicker do not wait for the others within a program, which times out
  log = StepLog(config, workdir, corpus, first_step, skips.batch_of)
  saver = Saver(checkpoints, config.checkpoint, first_step, hours=hours, failures=failures,
                n_devices=jax.device_count(), event=health.event)
  say(f'compile  done, {time.time() - started:.1f} s after the start')
  return Setup(config=config, step_config=step_config, workdir=workdir, corpus=corpus, checkpoints=checkpoints, saver=saver,
               meta=meta, first_step=first_step, skips=skips, batches=itertools.chain([first_batch], batches), update=update,
               score=jax.jit(functools.partial(eval_step, step_config.model, step_config.compute),
                             compiler_options=options), log=log, health=health), state


# -- the loop


def train(setup: Setup, state: TrainState, stop: StopSignal) -> tuple[int, TrainState]:
  """Evaluate, data, step, log, save, until the last step, until a stop is asked for or until training has gone wrong
  (`setup.log.trouble`): (steps done, state). Where it has not, the state is saved.

  An evaluation belongs to the steps after its checkpoint: who resumes there makes it again. What a run starts from is
  evaluated before the first step.
  """
  config, log, saver, health = setup.config, setup.log, setup.saver, setup.health
  done = setup.first_step
  share = 2 / 3 if config.lora else 1  # of the work: without gradients of the weights
  while done < config.n_steps and not stop.reached():
    if config.is_evaluated(done):
      log.flush()
      health.enter('evaluation')
      if scores := stop.interruptible(held_out, setup, state, stop):
        log.evaluation(done, scores)
    health.enter('data')
    fetched = stop.interruptible(next, setup.batches)
    if fetched is None:
      break
    host_batch, batch = fetched
    health.enter('step')
    state, metrics = setup.update(state, batch)
    done += 1
    rows = config.data.batch_size / len(host_batch['source'])  # all of them to those this host has read
    log.step(done, metrics, flops.train_flops(config.model, host_batch) * share * rows)
    health.steps(done, state.params, log.seconds_per_step)
    if log.trouble:
      return done, state
    if saver.is_due(done, log.seconds_per_step):
      save(setup, state, done)
  if done > saver.last:
    save(setup, state, done)
  log.flush()
  return done, state


def save(setup: Setup, state: TrainState, step: int) -> None:
  """Starts to save. First the step's metrics are written: a loss that is no number is not saved, a record not lost."""
  setup.log.flush()
  if setup.log.trouble:
    return
  setup.health.enter('checkpoint')
  setup.saver.save(step, params=start.what_is_saved(state.params), opt=state.opt, recent=state.recent,
                   meta={**setup.meta, 'step': step, 'cursor': setup.skips.batch_of(step) * setup.config.data.batch_size})
  setup.log.goodput(step, setup.health.shares())
  setup.health.enter('step')


def rewind(setup: Setup) -> TrainState:
  """Goes back to a checkpoint from before training went wrong, past the batches since and some more.

  ValueError where that has been done too often, or there is none. A kill at any place finds the list of rewinds written,
  and the checkpoints that are undone gone or to be removed (`start.undo`).
  """
  config, (at, what) = setup.config, setup.log.trouble
  setup.saver.close()
  steps = hosts.agree('steps', setup.checkpoints.steps)
  early = [step for step in steps if step <= at - config.spikes.rewind_steps] or [step for step in steps if step < at][:1]
  advice = f'lower --config.optim.peak_lr, or look at its rows in {setup.workdir}/trouble-{at}.json'
  if not early:
    raise ValueError(f'step {at:,}: {what}, and there is no checkpoint from before to go back to: {advice}')
  if not config.spikes.sigmas or len(setup.skips.rewinds) >= config.spikes.max_rewinds:
    raise ValueError(f'step {at:,}: {what}, after {len(setup.skips.rewinds)} rewinds: {advice}')
  to = early[-1]
  setup.skips = setup.skips.rewound(at=at, to=to, jump_steps=config.spikes.jump_steps)
  setup.meta['skips'] = setup.skips.to_json()
  hosts.agree('rewind', lambda: start.write_rewinds(setup.workdir, setup.skips))
  start.undo(setup.checkpoints, setup.skips)
  say(f'rewind   to step {to:,}, and past the batches up to that of step {at + config.spikes.jump_steps:,}')
  setup.health.event('rewind', at=at, to=to)
  setup.health.enter('restore')
  like = jax.eval_shape(functools.partial(init_state, setup.step_config), jax.random.key(config.seed))
  state = start.restore(config, setup.checkpoints, to, like, setup.meta)
  setup.first_step = setup.saver.last = to
  setup.health.steps_undone(to)
  setup.batches = train_batches(config.data, setup.corpus, config.seed, to, setup.skips.batch_of)
  setup.log.close()
  setup.log = StepLog(config, setup.workdir, setup.corpus, to, setup.skips.batch_of)
  return state


def held_out(setup: Setup, state: TrainState, stop: StopSignal) -> dict[str, Score]:
  """Scores of the held-out rows, a microbatch at a time: that many are known to fit. KeyboardInterrupt at a stop."""
  def score(params, batch):
    if stop.reached():
      raise KeyboardInterrupt
    return setup.score(params, batch)

  rows = setup.config.data.batch_size // setup.config.microbatches
  return evaluate(score, state.params, setup.corpus, setup.config.evals.rows, rows)


# -- the end: evaluate, compare, show


def finish(setup: Setup, state: TrainState, stop: StopSignal, started: float) -> str:
  """Marks the run as done; returns what a person sees of it."""
  config = setup.config
  scores = held_out(setup, state, stop)
  setup.log.evaluation(config.n_steps, scores)
  compared = before(setup.workdir) if config.init_from else baselines(setup.corpus, config.evals.rows)
  samples = sample(config, setup.corpus, state.params)
  summary = {'steps': config.n_steps, 'seconds': round(time.time() - started, 1),
             **{name: {source: getattr(s, name) for source, s in {**scores, 'all': total(scores)}.items()}
                for name in ('loss', 'bits_per_byte')},
             'before' if config.init_from else 'baselines': compared}
  if hosts.is_first():
    with writing_to(setup.workdir):
      write_atomically(setup.workdir / 'DONE', json.dumps(summary, indent=2) + '\n')
  return report(setup.workdir, config, setup.corpus, summary, samples)


def use_compile_cache() -> None:
  """Compiled programs are kept for the next start, in the user's own cache, unless JAX was told a place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'maxlm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  flags.run(main, default_config='configs/quickstart.py')
