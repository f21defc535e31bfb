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
from maxlm import compiler, ema, flags, flops, hosts, stages, start, typed_json
from maxlm.checkpoint import Checkpoints, code_version
from maxlm.config import Experiment, describe
from maxlm.data import Feed, train_batches
from maxlm.dry_run import dry_run
from maxlm.evals import baselines, evaluate, total
from maxlm.health import CorruptCopies, Health
from maxlm.hosts import say
from maxlm.models.decoder import DecoderConfig
from maxlm.redact import redact
from maxlm.report import page
from maxlm.saving import Saver
from maxlm.sharding import make_mesh
from maxlm.spikes import Skips
from maxlm.stages import Segment
from maxlm.start import write_atomically, writing_to
from maxlm.step import TrainState, begin_stage, eval_step, train_step
from maxlm.steplog import StepLog
from maxlm.stop import StopSignal
from maxlm.summary import before, report, sample
from maxlm.tasks import Tasks, tasks_of

WORKDIR = flags.DEFINE_string('workdir', '', 'where the run keeps its checkpoints and logs (default: runs/<name>)')
BRANCH = flags.DEFINE_string('branch', '', 'WORKDIR@STEP: the checkpoint of a run with stages that this run leaves, for '
                             'those of --stages')
STAGES = flags.DEFINE_string('stages', '', 'names of stages, with commas: a run of these only (default: all of the config)')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'check the config, print what the run would be, and end')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of the first process, where several train together and are '
                                  'not on TPU VMs, which find each other')
PROCESSES = flags.DEFINE_integer('processes', 0, 'how many there are')
PROCESS = flags.DEFINE_integer('process', 0, 'which of them this is, from 0')
HEARTBEAT = flags.DEFINE_integer('heartbeat_seconds', hosts.HEARTBEAT_SECONDS, 'after so long without a sign of life from '
                                 'one process, the others end too')

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here
EXIT_HARDWARE = 70  # a device does not compute what the others do: the same command goes on, but not on that machine


def main(config: Experiment) -> int:
  workdir = Path(WORKDIR.value or f'runs/{config.name}')
  if DRY_RUN.value:
    print(dry_run(*start.settle(config, workdir, BRANCH.value, STAGES.value)))
    return 0
  if '://' in WORKDIR.value:
    raise ValueError(f'--workdir={WORKDIR.value}: records are appended to, which a bucket cannot do: mount it (gcsfuse) '
                     'and give the path')
  hosts.connect(COORDINATOR.value, PROCESSES.value, PROCESS.value, HEARTBEAT.value)
  try:
    code = run(config, workdir, BRANCH.value, STAGES.value)
  except CorruptCopies as error:
    print('error:', error, file=sys.stderr)
    code = EXIT_HARDWARE
  hosts.shutdown()
  return code


def run(config: Experiment, workdir: Path, branch: str = '', chosen: str = '') -> int:
  """Runs the experiment in its workdir, to its end or to a SIGTERM; returns the exit code. branch, chosen: as the flags."""
  started = time.time()
  use_compile_cache()
  config, parent = start.settle(config, workdir, branch, chosen)
  stages.check(config, jax.default_backend(), len(jax.devices()))
  plan = stages.segments(config)
  n_steps = plan[-1].stop
  if start.is_done(workdir, config, n_steps):
    say(f'{workdir} is finished: {n_steps:,} steps. To go on, raise --config.tokens; for another run, give a new --workdir.')
    return 0
  with (StopSignal() as stop, jax.set_mesh(make_mesh(plan[0].config.mesh)), start.held(workdir),
        Health(config.health, workdir) as health, contextlib.ExitStack() as cleanup):
    ready = stop.interruptible(set_up, config, plan, workdir, started, health, parent)
    if ready is None or stop.reached():
      say(f'stopped  by {stop.requested} before a step was taken: there is nothing to save')
      return health.ends('stopped', EXIT_PREEMPTED)
    setup, state = ready
    cleanup.callback(lambda: setup.log.close())  # the last of them: a rewind begins another
    done, state = train(setup, state, stop)
    while not stop.requested and (setup.log.trouble or done < n_steps):
      part = stages.segment_of(plan, done)
      state = stop.interruptible(enter, setup, rewind(setup) if setup.log.trouble else moved(setup, state, part))
      if state is not None:
        done, state = train(setup, state, stop)
    health.enter('checkpoint')
    setup.saver.close()
    health.enter('finish')
    shown = None if stop.requested else stop.interruptible(finish, setup, state, stop, started)
    if shown is None:
      say(f'stopped  by {stop.requested} after {done:,} steps, all saved: the same command goes on from there')
      return health.ends('stopped', EXIT_PREEMPTED)
    if hosts.is_first():
      print(redact(shown))
    return health.ends('finished', 0)


# -- set up: corpora, state, programs


@dataclasses.dataclass(kw_only=True, slots=True)
class Setup:
  """What a run is made of, but for its state. Of the part that it is in: segment, feed and what follows."""

  config: Experiment
  plan: tuple[Segment, ...]
  feeds: tuple[Feed, ...]  # of each part
  corpus: loader.Corpus  # whose held-out rows are scored throughout
  workdir: Path
  checkpoints: Checkpoints
  saver: Saver
  meta: dict[str, Any]  # is saved with every checkpoint
  skips: Skips  # batches that the run leaves out
  log: StepLog
  health: Health
  segment: Segment
  feed: Feed | None = None
  first_step: int = 0  # steps that were done before
  batches: Iterator = iter(())  # (what this host reads of it, device batch) of the steps to come
  update: Any = None  # compiled: (state, batch) -> (state, metrics)
  score: Any = None  # jitted: (params, batch) -> sums of a held-out batch
  tasks: Tasks | None = None
  scorer: Any = None  # of their answers


def set_up(config: Experiment, plan: tuple[Segment, ...], workdir: Path, started: float, health: Health,
           parent: start.Parent | None = None) -> tuple[Setup, TrainState]:
  """Opens or builds the corpora, makes or restores the state on the mesh it is to be on, compiles the step."""
  feeds, corpus = start.open_feeds(config, plan, parent and parent.workdir)
  stages.check_epochs(config, stages.draws(plan, feeds))
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=config.checkpoint.keep_last,
                            keep_every=config.checkpoint.keep_every, keep_steps={s.stop for s in plan if s.is_last})
  health.enter('restore')
  state, meta, skips = start.start_or_resume(config, plan, feeds, workdir, checkpoints, parent)
  first_step = int(state.step)
  start.write_description(config, workdir, corpus, parent)  # now that nothing in it is refused
  hours, failures = health.begin(first_step, state.params)
  setup = Setup(
    config=config, plan=plan, segment=plan[stages.segment_of(plan, first_step)], feeds=feeds, corpus=corpus, workdir=workdir,
    checkpoints=checkpoints, meta=meta, skips=skips,
    saver=Saver(checkpoints, config.checkpoint, first_step, hours=hours, failures=failures, n_devices=jax.device_count(),
                event=health.event),
    log=StepLog(workdir, first_step, plan[-1].stop, skips.batch_of), health=health)
  part = start.part_to_begin(plan, checkpoints, first_step, workdir)
  state = enter(setup, moved(setup, state, part), part)
  say(f'compile  done, {time.time() - started:.1f} s after the start')
  return setup, state


def enter(setup: Setup, state: TrainState, part: int | None = None) -> TrainState:
  """Makes ready for that part of the run, on its mesh, by default that of the steps that come after the state's: batches,
  and the program, which it compiles."""
  step = int(state.step)
  part = stages.segment_of(setup.plan, step) if part is None else part
  segment, feed = setup.plan[part], setup.feeds[part]
  config, step_config = segment.config, segment.step_config(jax.default_backend(), len(feed.schedule.sources))
  if setup.config.stages:
    place = f'{segment.stage + 1} of {len(setup.config.stages)}'
    say(f'stage    {segment.name}, {place}: steps {segment.first:,} to {segment.stop:,}')
  n_parameters = sum(w.size for w in jax.tree.leaves(state.params))
  say(describe(config, jax.default_backend(), segment.stop - segment.first, n_parameters))
  if segment.is_first and segment.stage and step == segment.first:
    fresh = setup.config.stages[segment.stage].optimizer == 'fresh'
    state = jax.jit(functools.partial(begin_stage, step_config, fresh=fresh), donate_argnums=0)(state)
  batches = train_batches(feed, step, setup.skips.batch_of)
  first_batch = next(batches)
  say('compile  …')
  setup.health.enter('compile')
  options = compiler.options(jax.devices()[0].device_kind)
  lowered = jax.jit(functools.partial(train_step, step_config), donate_argnums=0).lower(state, first_batch[1])
  hosts.check_equal(lambda: {
    'jax': jax.__version__, 'the code': code_version(), 'the config': hosts.fingerprint(typed_json.dumps(setup.config)),
    'the corpus': hosts.fingerprint(json.dumps(feed.corpus.contents)),
    'the program': hosts.fingerprint(lowered.as_text())})
  setup.update = lowered.compile(compiler_options=options)
  hosts.barrier('compiled')  # so that those who are quicker do not wait for the others within a program, which times out
  setup.segment, setup.feed, setup.first_step = segment, feed, step
  setup.batches = itertools.chain([first_batch], batches)
  setup.score = jax.jit(functools.partial(eval_step, step_config.model, step_config.compute), compiler_options=options)
  if setup.tasks is None or setup.tasks.specs != config.evals.tasks:
    setup.tasks = tasks_of(config.evals.tasks, setup.corpus)
  setup.scorer = config.evals.tasks and setup.tasks.scorer(config.model, step_config.compute,
                                                           config.tokens_per_step // config.microbatches)
  setup.log.enter(segment, feed)
  return state


def moved(setup: Setup, state: TrainState, part: int) -> TrainState:
  """The state on the mesh of that part of the run: where it is on another one, by way of its checkpoint."""
  if setup.plan[part].config.mesh == setup.segment.config.mesh:
    return state
  setup.health.enter('restore')
  setup.checkpoints.wait()
  return start.restore(setup.plan[part], setup.checkpoints, int(state.step), setup.meta)


# -- the loop


def train(setup: Setup, state: TrainState, stop: StopSignal) -> tuple[int, TrainState]:
  """Evaluate, data, step, log, save, until the last step of this part of the run, until a stop is asked for or until
  training has gone wrong (`setup.log.trouble`): (steps done, state). Where it has not, the state is saved.

  An evaluation belongs to the steps after its checkpoint: who resumes there makes it again. What a run or a stage starts
  from is evaluated before the first step, and what a stage leaves after its last.
  """
  segment, log, saver, health = setup.segment, setup.log, setup.saver, setup.health
  config, done = segment.config, setup.first_step
  share = 2 / 3 if config.lora else 1  # of the work: without gradients of the weights
  while done < segment.stop and not stop.reached():
    if config.is_evaluated(done) or done == segment.first and segment.is_first and segment.stage:
      evaluate_now(setup, state, stop, done)
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
    if saver.is_due(done, log.seconds_per_step) and done < segment.stop:
      save(setup, state, done)
  log.flush()
  if done == segment.stop < setup.plan[-1].stop and segment.is_last and not log.trouble:
    evaluate_now(setup, state, stop, done, ended=True)
  if done > saver.last:
    save(setup, state, done)
  return done, state


def evaluate_now(setup: Setup, state: TrainState, stop: StopSignal, done: int, ended: bool = False) -> None:
  """Scores what is held out, and records it. ended: at the end of a stage."""
  setup.log.flush()
  setup.health.enter('evaluation')
  if scores := stop.interruptible(held_out, setup, state, stop):
    setup.log.evaluation(done, *scores, ended=ended)


def save(setup: Setup, state: TrainState, step: int) -> None:
  """Starts to save. First the step's metrics are written: a loss that is no number is not saved, a record not lost."""
  setup.log.flush()
  if setup.log.trouble:
    return
  setup.health.enter('checkpoint')
  about = {'step': step, 'cursor': setup.feed.row(setup.skips.batch_of(step)), 'stage': setup.segment.name,
           'tokens': setup.segment.tokens_at(step), 'model': typed_json.encode(setup.segment.config.model, DecoderConfig)}
  setup.saver.save(step, params=start.what_is_saved(state.params), opt=state.opt, recent=state.recent, ema=state.ema,
                   meta={**setup.meta, **about})
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
  state = start.restore(setup.plan[stages.segment_of(setup.plan, to)], setup.checkpoints, to, setup.meta)
  setup.saver.last = to
  setup.health.steps_undone(to)
  setup.log.close()
  setup.log = StepLog(setup.workdir, to, setup.plan[-1].stop, setup.skips.batch_of)
  return state


def held_out(setup: Setup, state: TrainState, stop: StopSignal) -> tuple[dict, dict[str, float], dict | None]:
  """Scores of the held-out rows by source, and of all, a microbatch at a time: that many are known to fit. In a stage of
  longer rows, or of another corpus, its own too: 'web@65536'. What the tasks give. And scores of the running mean of the
  weights, where there is one. KeyboardInterrupt at a stop."""
  def go_on():
    if stop.reached():
      raise KeyboardInterrupt

  def score(params, batch):
    go_on()
    return setup.score(params, batch)

  config, own = setup.segment.config, setup.feed.corpus
  rows, params, scores = config.data.batch_size // config.microbatches, [state.params], []
  if state.ema is not None:
    params.append(ema.in_place(config.optim, config.model, state.params, state.ema))
  for weights in params:
    scores.append({})
    for corpus, suffix in {setup.corpus: '', **({own: f'@{own.seq_len}'} if own is not setup.corpus else {})}.items():
      found = evaluate(score, weights, corpus, config.evals.rows, rows)
      scores[-1] |= {f'{source}{suffix}': s for source, s in {**found, 'all': total(found)}.items()}
  return scores[0], setup.tasks(setup.scorer, state.params, go_on), scores[1] if state.ema is not None else None


# -- the end: evaluate, compare, show


def finish(setup: Setup, state: TrainState, stop: StopSignal, started: float) -> str:
  """Marks the run as done; returns what a person sees of it."""
  config, n_steps = setup.segment.config, setup.plan[-1].stop
  scores, of_tasks, of_mean = held_out(setup, state, stop)
  setup.log.evaluation(n_steps, scores, of_tasks, of_mean)
  compared = before(setup.workdir) if config.init_from else baselines(setup.corpus, config.evals.rows)
  samples = sample(config, setup.corpus, state.params)
  summary = {'steps': n_steps, 'seconds': round(time.time() - started, 1),
             **{name: {source: getattr(s, name) for source, s in scores.items() if source in compared}
                for name in ('loss', 'bits_per_byte')},
             'before' if config.init_from else 'baselines': compared, **({'tasks': of_tasks} if of_tasks else {})}
  if hosts.is_first():
    with writing_to(setup.workdir):
      write_atomically(setup.workdir / 'DONE', json.dumps(summary, indent=2) + '\n')
      page.write(setup.workdir)
  return report(setup.workdir, config, setup.corpus, summary, samples)


def use_compile_cache() -> None:
  """Compiled programs are kept for the next start, in the user's own cache, unless JAX was told a place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'maxlm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  flags.run(main, default_config='configs/quickstart.py')
