"""Trains a decoder on packed rows: `python -m maxlm.train [--config=F.py[:arg]] [--workdir=DIR] [--config.a.b=v]`.

With no flags it runs the quickstart: builds a corpus of real documents if it is missing, trains a small model on it and
shows what it learned. The same command run again resumes. SIGTERM or Ctrl-C saves and exits 75; a finished run is left
alone and exits 0.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from data_pipeline import loader
from maxlm import compiler, flags, flops, start
from maxlm.checkpoint import Checkpoints
from maxlm.config import Experiment, validate
from maxlm.data import mixture, train_batches
from maxlm.evals import Score, baselines, evaluate, total
from maxlm.metrics import MetricsWriter, Progress, StepClock
from maxlm.models.decoder import DecoderConfig, expert_layers
from maxlm.sharding import make_mesh
from maxlm.start import say, write_atomically, writing_to
from maxlm.step import TrainState, eval_step, train_step
from maxlm.stop import StopSignal
from maxlm.summary import before, report, sample

WORKDIR = flags.DEFINE_string('workdir', '', 'where the run keeps its checkpoints and logs (default: runs/<name>)')

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here


def main(config: Experiment) -> int:
  return run(config, Path(WORKDIR.value or f'runs/{config.name}'))


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
  with StopSignal() as stop, jax.set_mesh(make_mesh(config.mesh)):
    ready = stop.interruptible(set_up, config, workdir, started, parent)
    if ready is None:
      say(f'stopped  by {stop.requested} before a step was taken: there is nothing to save')
      return EXIT_PREEMPTED
    setup, state = ready
    with contextlib.closing(setup.log):
      done, state = train(setup, state, stop)
      setup.checkpoints.close()
      shown = stop.interruptible(finish, setup, state, started)
    if shown is None:
      say(f'stopped  by {stop.requested} after {done:,} steps, all saved: the same command goes on from there')
      return EXIT_PREEMPTED
    print(shown)
    return 0


# -- set up: corpus, state, programs


@dataclasses.dataclass(kw_only=True, slots=True)
class Setup:
  """What a run is made of, but for its state."""

  config: Experiment
  workdir: Path
  corpus: loader.Corpus
  checkpoints: Checkpoints
  meta: dict[str, Any]  # is saved with every checkpoint
  first_step: int  # steps that were done before
  batches: Iterator  # (host batch, device batch) of the steps to come
  update: Any  # compiled: (state, batch) -> (state, metrics)
  score: Any  # jitted: (params, batch) -> sums of a held-out batch
  log: 'StepLog'


def set_up(config: Experiment, workdir: Path, started: float,
           parent: start.Parent | None = None) -> tuple[Setup, TrainState]:
  """Opens or builds the corpus, makes or restores the state on the current mesh, compiles the step."""
  with writing_to(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  corpus = start.open_corpus(config, parent and parent.workdir)
  sources = mixture(config.data, corpus).sources
  step_config = config.step_config(jax.default_backend(), len(sources))
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=config.checkpoint.keep_last,
                            keep_every=config.checkpoint.keep_every)
  state, meta = start.start_or_resume(config, step_config, workdir, checkpoints, corpus, parent)
  first_step = int(state.step)
  batches = train_batches(config.data, corpus, config.seed, first_step)
  first_batch = next(batches)
  start.write_description(config, workdir, corpus, parent)  # now that nothing in it is refused
  say('compile  …')
  options = compiler.options(jax.devices()[0].device_kind)
  update = jax.jit(functools.partial(train_step, step_config), donate_argnums=0).lower(state, first_batch[1]).compile(
    compiler_options=options)
  log = StepLog(config, workdir, sources, first_step)
  say(f'compile  done, {time.time() - started:.1f} s after the start')
  return Setup(config=config, workdir=workdir, corpus=corpus, checkpoints=checkpoints, meta=meta, first_step=first_step,
               batches=itertools.chain([first_batch], batches), update=update,
               score=jax.jit(functools.partial(eval_step, step_config.model, step_config.compute),
                             compiler_options=options), log=log), state


# -- the loop


def train(setup: Setup, state: TrainState, stop: StopSignal) -> tuple[int, TrainState]:
  """Evaluate, data, step, log, save, until the last step or until a stop is asked for: (steps done, state), saved.

  An evaluation belongs to the steps after its checkpoint: who resumes there makes it again. What a run starts from is
  evaluated before the first step.
  """
  config, log = setup.config, setup.log
  done = saved = setup.first_step
  share = 2 / 3 if config.lora else 1  # of the work: without gradients of the weights
  while done < config.n_steps:
    if config.is_evaluated(done):
      log.flush()
      if scores := stop.interruptible(held_out, setup, state):
        log.evaluation(done, scores)
    fetched = stop.interruptible(next, setup.batches)
    if fetched is None:
      break
    host_batch, batch = fetched
    state, metrics = setup.update(state, batch)
    done += 1
    log.step(done, metrics, flops.train_flops(config.model, host_batch) * share)
    setup.checkpoints.poll()
    if done % config.checkpoint.every_steps == 0:
      save(setup, state, done)
      saved = done
  if done > saved:
    save(setup, state, done)
  return done, state


def save(setup: Setup, state: TrainState, step: int) -> None:
  """Starts to save. First the step's metrics are written: a loss that is no number is not saved, a record not lost."""
  setup.log.flush()
  setup.checkpoints.save(step, params=start.what_is_saved(state.params), opt=state.opt,
                         meta={**setup.meta, 'step': step, 'cursor': step * setup.config.data.batch_size})


def held_out(setup: Setup, state: TrainState) -> dict[str, Score]:
  """Scores of the held-out rows, a microbatch at a time: that many are known to fit."""
  rows = setup.config.data.batch_size // setup.config.microbatches
  return evaluate(setup.score, state.params, setup.corpus, setup.config.evals.rows, rows)


class StepLog:
  """The record and the progress line of the steps, each fetched when the next one is on its way."""

  def __init__(self, config: Experiment, workdir: Path, sources: tuple[str, ...], first_step: int):
    self._config, self._workdir, self._sources = config, workdir, sources
    with writing_to(workdir):
      self._writer = MetricsWriter(workdir, resumed_from=first_step or None)
    self._progress, self._clock = Progress(config.n_steps), StepClock()
    self._peak = flops.peak_flops(jax.devices()[0])  # FLOP/s of one device
    self._pending = None  # step, metrics on device, FLOPs

  def step(self, step: int, metrics: dict, step_flops: float) -> None:
    """Takes the metrics of a step that has been started, and records the step before it."""
    self.flush()
    self._pending = step, metrics, step_flops

  def flush(self) -> None:
    """Waits for the last step and records it. ValueError where the loss or the gradient is no number any more."""
    if self._pending is None:
      return
    (step, metrics, step_flops), self._pending = self._pending, None
    metrics = jax.device_get(metrics)
    seconds = self._clock.finished(step)
    values = {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'learning_rate')}
    for source, tokens, loss in zip(self._sources, metrics['tokens_by_source'], metrics['loss_by_source']):
      values[f'tokens/{source}'] = int(tokens)
      if tokens:
        values[f'loss/{source}'] = float(loss)
    values |= router_values(self._config.model, metrics['routers'])
    if seconds:
      values['tokens_per_second'] = self._config.tokens_per_step / seconds
      if self._peak:
        values['mfu'] = step_flops * jax.process_count() / seconds / (self._peak * jax.device_count())
    with writing_to(self._workdir):
      self._writer.write(step, values)
    self._progress.show(step, values, seconds)
    for name in ('loss', 'grad_norm'):
      if not math.isfinite(values[name]):
        raise ValueError(f'{name} of step {step:,} is {values[name]}; checkpoints are from before it: run again with a '
                         'lower --config.optim.peak_lr, or look at its rows (data_pipeline.loader.batch_at)')

  def evaluation(self, step: int, scores: dict[str, Score]) -> None:
    """Records held-out loss and bits per byte of each source and of all."""
    scores = {**scores, 'all': total(scores)}
    with writing_to(self._workdir):
      self._writer.write(step, {f'eval/{name}/{source}': getattr(score, name)
                                for source, score in scores.items() for name in ('loss', 'bits_per_byte')})
    self._progress.print(f'held out at step {step:,}: ' + '  '.join(
      f'{source} {score.bits_per_byte:.3f}' for source, score in scores.items()) + '  bits per byte')
    self._clock.pause()

  def close(self) -> None:
    self._progress.close()
    self._writer.close()


def router_values(model: DecoderConfig, routers: dict) -> dict[str, float]:
  """moe/<what>/<layer> of each layer with experts, to four digits; and the load violation of the worst one. What: as
  `losses.router_metrics` says."""
  layers = sorted(i for _, of_kind in expert_layers(model) for i in of_kind)
  values = {f'moe/{name}/{layer}': float(f'{value:.4g}')
            for name, value_L in routers.items() for layer, value in zip(layers, value_L)}
  return values | {'moe/load_violation': float(max(routers['load_violation']))} if layers else values


# -- the end: evaluate, compare, show


def finish(setup: Setup, state: TrainState, started: float) -> str:
  """Marks the run as done; returns what a person sees of it."""
  config = setup.config
  scores = held_out(setup, state)
  setup.log.evaluation(config.n_steps, scores)
  compared = before(setup.workdir) if config.init_from else baselines(setup.corpus, config.evals.rows)
  samples = sample(config, setup.corpus, state.params)
  summary = {'steps': config.n_steps, 'seconds': round(time.time() - started, 1),
             **{name: {source: getattr(s, name) for source, s in {**scores, 'all': total(scores)}.items()}
                for name in ('loss', 'bits_per_byte')},
             'before' if config.init_from else 'baselines': compared}
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
