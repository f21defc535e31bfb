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
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from data_pipeline import loader
from maxlm import flags, flops, typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.config import Experiment, describe, validate
from maxlm.data import mixture, train_batches
from maxlm.decode import generate
from maxlm.evals import Score, baselines, evaluate, total
from maxlm.metrics import MetricsWriter, Progress, StepClock, duration
from maxlm.sharding import make_mesh
from maxlm.step import TrainState, eval_step, init_state, train_step
from maxlm.stop import StopSignal

WORKDIR = flags.DEFINE_string('workdir', '', 'where the run keeps its checkpoints and logs (default: runs/<name>)')

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here


def main(config: Experiment) -> int:
  return run(config, Path(WORKDIR.value or f'runs/{config.name}'))


def run(config: Experiment, workdir: Path) -> int:
  """Runs the experiment in its workdir, to its end or to a SIGTERM; returns the exit code."""
  started = time.time()
  use_compile_cache()
  validate(config, jax.default_backend(), len(jax.devices()))
  if is_done(workdir, config):
    say(f'{workdir} is finished: {config.n_steps:,} steps. To go on, raise --config.tokens; for another run, give a new '
        '--workdir.')
    return 0
  with StopSignal() as stop, jax.set_mesh(make_mesh(config.mesh)):
    ready = stop.interruptible(set_up, config, workdir, started)
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


def set_up(config: Experiment, workdir: Path, started: float) -> tuple[Setup, TrainState]:
  """Opens or builds the corpus, makes or restores the state on the current mesh, compiles the step."""
  with writing_to(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  corpus = open_corpus(config)
  sources = mixture(config.data, corpus).sources
  step_config = config.step_config(jax.default_backend(), len(sources))
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=config.checkpoint.keep_last,
                            keep_every=config.checkpoint.keep_every)
  state, meta = start_or_resume(config, step_config, workdir, checkpoints, corpus)
  first_step = int(state.step)
  batches = train_batches(config.data, corpus, config.seed, first_step)
  first_batch = next(batches)
  with writing_to(workdir):  # now that nothing in it is refused
    write_atomically(workdir / 'tokenizer.json', corpus.tokenizer_path.read_text(encoding='utf-8'))
    write_atomically(workdir / 'config.json', typed_json.dumps(config))
  say('compile  …')
  update = jax.jit(functools.partial(train_step, step_config), donate_argnums=0).lower(state, first_batch[1]).compile()
  log = StepLog(config, workdir, sources, first_step)
  say(f'compile  done, {time.time() - started:.1f} s after the start')
  return Setup(config=config, workdir=workdir, corpus=corpus, checkpoints=checkpoints, meta=meta, first_step=first_step,
               batches=itertools.chain([first_batch], batches), update=update,
               score=jax.jit(functools.partial(eval_step, step_config.model, step_config.compute)), log=log), state


def open_corpus(config: Experiment) -> loader.Corpus:
  """The corpus, built first if it is not there and the config names a recipe."""
  directory, seq_len = config.data.corpus, config.data.seq_len
  if config.data.recipe and not (Path(directory) / 'manifest.json').exists():
    say(f'corpus   {directory} is not there: building it with recipe {config.data.recipe!r}')
    command = ['-m', 'data_pipeline.build', f'--recipe={config.data.recipe}', f'--out={directory}', f'--seq_lens={seq_len}']
    if subprocess.run([sys.executable, *command], check=False).returncode:
      raise ValueError(f'the corpus was not built: see the lines above; again with: python {" ".join(command)}')
  corpus = loader.open_corpus(directory, seq_len)
  if corpus.vocab_size > config.model.vocab_size:
    raise ValueError(f'the corpus in {directory} has {corpus.vocab_size} tokens, more than model.vocab_size='
                     f'{config.model.vocab_size}: set --config.model.vocab_size to {corpus.vocab_size} or more')
  return corpus


def start_or_resume(config, step_config, workdir: Path, checkpoints: Checkpoints, corpus) -> tuple[TrainState, dict]:
  """The state of the newest checkpoint, or a fresh one, and what is saved beside it. ValueError if it is not this run's."""
  init = jax.jit(functools.partial(init_state, step_config))
  key = jax.random.key(config.seed)
  like = jax.eval_shape(init, key)
  say(describe(config, jax.default_backend(), sum(w.size for w in jax.tree.leaves(like.params))))
  meta = {'config': typed_json.encode(config, Experiment), 'tokenizer': corpus.tokenizer_sha256}
  step = checkpoints.latest()
  if step is None:
    return init(key), {**meta, 'lineage': lineage()}
  saved = checkpoints.meta(step)
  check_same_run(workdir, saved['config'], config)
  if saved['tokenizer'] != meta['tokenizer']:
    raise ValueError(f'{workdir} was begun with another tokenizer than that of {corpus.directory}: '
                     'give a new --workdir, or the old --config.data.corpus')
  if step > config.n_steps:
    raise ValueError(f'{workdir} is at step {step:,}, past the {config.n_steps:,} steps of this config: '
                     'raise --config.tokens')
  params, opt = checkpoints.restore(step, like.params, like.opt)
  say(f'resumed  at step {step:,} from {workdir}')
  return TrainState(step=jax.device_put(np.int32(step), jax.P()), params=params, opt=opt), {**saved, **meta}


def check_same_run(workdir: Path, saved: dict, config: Experiment) -> None:
  """ValueError where model, data or seed are not those of the saved config (JSON); says what else has changed."""
  old, new = typed_json.flat(saved), typed_json.flat(typed_json.encode(config, Experiment))
  for name in sorted(old.keys() | new.keys()):
    before, after = (values.get(name, 'absent') for values in (old, new))
    if before != after:
      if name.startswith(('model.', 'data.', 'seed')) and name not in ('data.corpus', 'data.recipe'):
        raise ValueError(f'{workdir} was begun with {name}={before} and this config has {after}: '
                         'give a new --workdir, or set it back')
      say(f'changed  {name}: {before} -> {after}')


# -- the loop


def train(setup: Setup, state: TrainState, stop: StopSignal) -> tuple[int, TrainState]:
  """Evaluate, data, step, log, save, until the last step or until a stop is asked for: (steps done, state), saved.

  An evaluation belongs to the steps after its checkpoint: who resumes there makes it again.
  """
  config, log = setup.config, setup.log
  done = saved = setup.first_step
  while done < config.n_steps:
    if done and config.evals.every_steps and done % config.evals.every_steps == 0:
      log.flush()
      if scores := stop.interruptible(held_out, setup, state):
        log.evaluation(done, scores)
    fetched = stop.interruptible(next, setup.batches)
    if fetched is None:
      break
    host_batch, batch = fetched
    state, metrics = setup.update(state, batch)
    done += 1
    log.step(done, metrics, flops.train_flops(config.model, host_batch))
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
  setup.checkpoints.save(step, params=state.params, opt=state.opt,
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


# -- the end: evaluate, compare, show


def finish(setup: Setup, state: TrainState, started: float) -> str:
  """Marks the run as done; returns what a person sees of it."""
  config = setup.config
  scores = held_out(setup, state)
  setup.log.evaluation(config.n_steps, scores)
  simple = baselines(setup.corpus, config.evals.rows)
  samples = sample(setup, state)
  summary = {'steps': config.n_steps, 'seconds': round(time.time() - started, 1),
             'bits_per_byte': {source: s.bits_per_byte for source, s in {**scores, 'all': total(scores)}.items()},
             'baselines': simple}
  with writing_to(setup.workdir):
    write_atomically(setup.workdir / 'DONE', json.dumps(summary, indent=2) + '\n')
  return report(setup.workdir, scores, simple, samples, summary['seconds'])


def sample(setup: Setup, state: TrainState) -> list[str]:
  """A few documents that the model makes up."""
  config, eot = setup.config, setup.corpus.eot
  tokenizer = tokenizers.Tokenizer.from_file(str(setup.corpus.tokenizer_path))
  prompts = ['', 'The ', 'To create a ']
  tokens = [[eot, *tokenizer.encode(prompt).ids] for prompt in prompts]
  out = generate(state.params, config.model, config.compute.resolve(jax.default_backend()), tokens, eos=[eot], max_tokens=64,
                 temperature=0.8, top_p=0.95, seed=config.seed)
  return [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, out)]


def report(workdir: Path, scores: dict[str, Score], simple: dict, samples: list[str], seconds: float) -> str:
  rows = [f'{"held-out bits per byte":28}{"model":>9}{"gzip -9":>9}{"unigram":>9}']
  rows += [f'{source:28}{score.bits_per_byte:9.3f}{simple[source]["gzip"]:9.3f}{simple[source]["unigram"]:9.3f}'
           for source, score in {**scores, 'all': total(scores)}.items()]
  shown = [f'  {" ".join(text.split())}' for text in samples]
  return '\n'.join(['', *rows, '', 'What it writes (temperature 0.8, top-p 0.95):', *shown, '',
                    f'Finished in {duration(seconds)}. Try next:',
                    f'  python -m maxlm.generate --checkpoint={workdir} --prompt="To create a table"',
                    f'  python -m maxlm.evaluate --checkpoint={workdir}',
                    '  python -m maxlm.train --help'])


# -- small things


def is_done(workdir: Path, config: Experiment) -> bool:
  """Whether the run has ended with as many steps as are asked for. ValueError if it was another run."""
  done = workdir / 'DONE'
  if not done.exists() or json.loads(done.read_text())['steps'] < config.n_steps:
    return False
  check_same_run(workdir, json.loads((workdir / 'config.json').read_text()), config)
  return True


@contextlib.contextmanager
def writing_to(workdir: Path):
  """OSErrors inside it name the workdir."""
  try:
    yield
  except OSError as error:
    raise OSError(f'cannot write to {workdir} ({error.strerror}): give another --workdir') from error


def write_atomically(path: Path, text: str) -> None:
  partial = path.with_suffix('.partial')
  with open(partial, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def use_compile_cache() -> None:
  """Compiled programs are kept for the next start, in the user's own cache, unless JAX was told a place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'maxlm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  flags.run(main, default_config='configs/quickstart.py')
