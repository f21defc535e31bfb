"""Trains a decoder on packed rows: `python -m maxlm.train [--config=F.py[:arg]] [--workdir=DIR] [--config.a.b=v]`.

With no flags it runs the quickstart: builds a corpus of real documents if it is missing, trains a small model on it and
shows what it learned. The same command run again resumes. SIGTERM saves and exits 75; a finished run exits 0.
"""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tokenizers

from data_pipeline import loader
from maxlm import flags, flops, typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.config import Experiment, describe, validate
from maxlm.data import check_batch, mixture, train_batches
from maxlm.decode import generate
from maxlm.evals import Score, baselines, evaluate, total
from maxlm.metrics import MetricsWriter, Progress, StepClock, duration
from maxlm.sharding import make_mesh
from maxlm.step import TrainState, eval_step, init_state, train_step

WORKDIR = flags.DEFINE_string('workdir', '', 'where the run keeps its checkpoints and logs (default: runs/<name>)')

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here


def main(config: Experiment) -> int:
  return run(config, Path(WORKDIR.value or f'runs/{config.name}'))


def run(config: Experiment, workdir: Path) -> int:
  """Runs the experiment in its workdir, to its end or to a SIGTERM; returns the exit code."""
  started = time.time()
  stop = StopSignal()
  use_compile_cache()
  platform = jax.default_backend()
  validate(config, platform, len(jax.devices()))
  if is_done(workdir, config):
    say(f'{workdir} is finished: {config.n_steps:,} steps. For more, raise --config.tokens; for a new run, give a new --workdir.')
    return 0

  # -- data
  corpus = open_corpus(config)
  sources = mixture(config.data, corpus).sources
  prepare_workdir(workdir, config, corpus)

  # -- mesh, programs, state
  jax.set_mesh(make_mesh(config.mesh))
  check_batch(config.data.batch_size, config.microbatches)
  step_config = config.step_config(platform, len(sources))
  init = jax.jit(functools.partial(init_state, step_config))
  key = jax.random.key(config.seed)
  like = jax.eval_shape(init, key)
  say(describe(config, platform, sum(w.size for w in jax.tree.leaves(like.params))))
  checkpoints = Checkpoints(workdir / 'checkpoints', keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every)
  resumed_from = checkpoints.latest()
  if resumed_from is None:
    state, meta = init(key), {'config': json.loads(typed_json.dumps(config)), 'lineage': lineage()}
  else:
    params, opt = checkpoints.restore(resumed_from, like.params, like.opt)
    state = TrainState(step=jax.device_put(np.int32(resumed_from), jax.P()), params=params, opt=opt)
    meta = {**checkpoints.meta(resumed_from), 'config': json.loads(typed_json.dumps(config))}
    say(f'resumed  at step {resumed_from:,} from {workdir}')
  first_step = resumed_from or 0
  batches = train_batches(config.data, corpus, config.seed, first_step)
  host_batch, batch = next(batches)
  say('compile  …')
  update = jax.jit(functools.partial(train_step, step_config), donate_argnums=0).lower(state, batch).compile()
  score = jax.jit(functools.partial(eval_step, step_config))
  peak = flops.peak_flops(jax.devices()[0])
  say(f'compile  done, {time.time() - started:.1f} s after the start')

  # -- the loop: data, step, log, evaluate, save
  writer, progress, clock = MetricsWriter(workdir, resumed_from=resumed_from), Progress(config.n_steps), StepClock()
  log = StepLog(config, sources, writer, progress, clock, None if peak is None else peak * len(jax.devices()))
  pending = None  # the step before, whose metrics are fetched once the next one is on its way
  for step in range(first_step + 1, config.n_steps + 1):
    state, metrics = update(state, batch)
    if pending:
      log.write(*pending)
    pending = step, metrics, flops.train_flops(config.model, host_batch)
    checkpoints.poll()
    last = step == config.n_steps
    if not last:
      host_batch, batch = next(batches)
    if config.evals.every_steps and step % config.evals.every_steps == 0 and not last:
      log.write(*pending)
      pending = None
      log.evaluation(step, evaluate(score, state.params, corpus, config.evals.rows, eval_rows(config)))
    if last or stop.requested or step % config.checkpoint.every_steps == 0:
      checkpoints.save(step, params=state.params, opt=state.opt, meta={**meta, 'step': step, 'cursor': step * config.data.batch_size})
    if stop.requested and not last:
      checkpoints.close()
      say(f'stopped  by {stop.requested} at step {step:,}; saved. The same command goes on from here.')
      return EXIT_PREEMPTED
  if pending:
    log.write(*pending)
  progress.close()

  # -- the end: evaluate, compare, show
  scores = evaluate(score, state.params, corpus, config.evals.rows, eval_rows(config))
  log.evaluation(config.n_steps, scores)
  checkpoints.close()
  writer.close()
  simple = baselines(corpus, config.evals.rows)
  samples = sample(state.params, config, platform, corpus)
  summary = {'steps': config.n_steps, 'seconds': round(time.time() - started, 1),
             'bits_per_byte': {source: s.bits_per_byte for source, s in {**scores, 'all': total(scores)}.items()},
             'baselines': simple}
  write_atomically(workdir / 'DONE', json.dumps(summary, indent=2))
  print(report(workdir, scores, simple, samples, summary['seconds']))
  return 0


class StepLog:
  """Turns a finished step's metrics into a record and the progress line."""

  def __init__(self, config: Experiment, sources, writer: MetricsWriter, progress: Progress, clock: StepClock, peak: float | None):
    self._config, self._sources, self._writer, self._progress, self._clock = config, sources, writer, progress, clock
    self._peak = peak  # FLOP/s of all devices

  def write(self, step: int, metrics: dict, step_flops: float) -> None:
    """Waits for the step. Records every log_every-th one; FloatingPointError where the loss is no number any more."""
    metrics = jax.device_get(metrics)
    seconds = self._clock.finished(step)
    values = {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'learning_rate')}
    for i, source in enumerate(self._sources):
      values[f'tokens/{source}'] = float(metrics['tokens_by_source'][i])
      if values[f'tokens/{source}']:
        values[f'loss/{source}'] = float(metrics['loss_by_source'][i])
    if seconds:
      values['tokens_per_second'] = self._config.tokens_per_step / seconds
      if self._peak:
        values['mfu'] = step_flops * jax.process_count() / seconds / self._peak
    self._writer.write(step, values)
    self._progress.show(step, values, seconds)
    if not math.isfinite(values['loss']):
      raise FloatingPointError(f'the loss of step {step} is {values["loss"]}: the last checkpoint is from before; lower '
                               'optim.peak_lr, or look at the rows of this step with data_pipeline.loader.batch_at')

  def evaluation(self, step: int, scores: dict[str, Score]) -> None:
    """Records held-out loss and bits per byte of each source and of all."""
    scores = {**scores, 'all': total(scores)}
    self._writer.write(step, {f'eval/{name}/{source}': getattr(score, name)
                              for source, score in scores.items() for name in ('loss', 'bits_per_byte')})
    self._progress.print(f'held out at step {step:,}: ' + '  '.join(
      f'{source} {score.bits_per_byte:.3f}' for source, score in scores.items()) + '  bits per byte')
    self._clock.pause()


class StopSignal:
  """Remembers SIGTERM, and SIGINT once, for the loop to act on between two steps. A second SIGINT interrupts at once."""

  def __init__(self):
    self.requested = ''
    signal.signal(signal.SIGTERM, self._handle)
    signal.signal(signal.SIGINT, self._handle)

  def _handle(self, number, frame):
    self.requested = signal.Signals(number).name
    signal.signal(signal.SIGINT, signal.default_int_handler)


def open_corpus(config: Experiment) -> loader.Corpus:
  """The corpus, built first if it is not there and the config names a recipe."""
  directory, seq_len = config.data.corpus, config.data.seq_len
  if config.data.recipe and not (Path(directory) / 'manifest.json').exists():
    say(f'corpus   {directory} is not there: building it with recipe {config.data.recipe!r}')
    built = subprocess.run([sys.executable, '-m', 'data_pipeline.build', f'--recipe={config.data.recipe}', f'--out={directory}',
                            f'--seq_lens={seq_len}'], check=False)
    if built.returncode:
      raise ValueError(f'the corpus was not built: see the lines above; again with: python -m data_pipeline.build '
                       f'--recipe={config.data.recipe} --out={directory}')
  corpus = loader.open_corpus(directory, seq_len)
  if corpus.vocab_size > config.model.vocab_size:
    raise ValueError(f'the corpus in {directory} has {corpus.vocab_size} tokens, more than model.vocab_size='
                     f'{config.model.vocab_size}: set it to {corpus.vocab_size} or more')
  return corpus


def prepare_workdir(workdir: Path, config: Experiment, corpus: loader.Corpus) -> None:
  """Makes the workdir, or checks that it belongs to this run; writes config.json and the tokenizer into it.

  ValueError where model, data or seed are not those the run began with: its checkpoints and its data order are theirs.
  """
  file = workdir / 'config.json'
  if file.exists():
    old, new = (flat(json.loads(text)) for text in (file.read_text(), typed_json.dumps(config)))
    fixed = ('model.', 'data.', 'seed')
    for name in sorted(old.keys() | new.keys()):
      if old.get(name) != new.get(name):
        if name.startswith(fixed) and name not in ('data.corpus', 'data.recipe'):
          raise ValueError(f'{workdir} was begun with {name}={old.get(name)} and this config has {new.get(name)}: '
                           'give a new --workdir, or set it back')
        say(f'changed  {name}: {old.get(name)} -> {new.get(name)}')
    if (workdir / 'tokenizer.json').read_bytes() != corpus.tokenizer_path.read_bytes():
      raise ValueError(f'{workdir} was begun with another tokenizer than that of {corpus.directory}: give a new --workdir')
  workdir.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(corpus.tokenizer_path, workdir / 'tokenizer.json')
  write_atomically(file, typed_json.dumps(config))


def flat(tree, prefix: str = '') -> dict:
  """{'model.pattern[0].norm': 'pre', …} of a JSON tree."""
  if isinstance(tree, dict) and tree:
    return {k: v for name, child in tree.items() for k, v in flat(child, f'{prefix}.{name}' if prefix else name).items()}
  if isinstance(tree, list) and tree:
    return {k: v for i, child in enumerate(tree) for k, v in flat(child, f'{prefix}[{i}]').items()}
  return {prefix: tree}


def is_done(workdir: Path, config: Experiment) -> bool:
  """Whether the run has ended with as many steps as are asked for."""
  done = workdir / 'DONE'
  return done.exists() and json.loads(done.read_text())['steps'] >= config.n_steps


def write_atomically(path: Path, text: str) -> None:
  partial = path.with_suffix('.partial')
  with open(partial, 'w', encoding='utf-8') as file:
    file.write(text + '\n')
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def eval_rows(config: Experiment) -> int:
  """Rows of a batch in evaluation: those of a microbatch in training, which are known to fit."""
  return config.data.batch_size // config.microbatches


def sample(params, config: Experiment, platform: str, corpus: loader.Corpus) -> list[str]:
  """A few documents that the model makes up."""
  tokenizer = tokenizers.Tokenizer.from_file(str(corpus.tokenizer_path))
  prompts = ['', 'The ', 'To create a ']
  tokens = [[corpus.eot, *tokenizer.encode(prompt).ids] for prompt in prompts]
  out = generate(params, config.model, config.compute.resolve(platform), tokens, eot=corpus.eot, max_tokens=64, temperature=0.8,
                 top_p=0.95, seed=config.seed)
  return [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, out)]


def report(workdir: Path, scores: dict[str, Score], simple: dict, samples: list[str], seconds: float) -> str:
  """What a person sees at the end."""
  rows = [f'{"held-out bits per byte":28}{"model":>9}{"gzip -9":>9}{"unigram":>9}']
  rows += [f'{source:28}{score.bits_per_byte:9.3f}{simple[source]["gzip"]:9.3f}{simple[source]["unigram"]:9.3f}'
           for source, score in {**scores, 'all': total(scores)}.items()]
  shown = [f'  {" ".join(text.split())}' for text in samples]
  return '\n'.join(['', *rows, '', 'What it writes (temperature 0.8, top-p 0.95):', *shown, '', f'Finished in {duration(seconds)}. Try next:',
                    f'  python -m maxlm.generate --checkpoint={workdir} --prompt="To create a table"',
                    f'  python -m maxlm.evaluate --checkpoint={workdir}',
                    f'  tensorboard --logdir={workdir}/tensorboard'])


def use_compile_cache() -> None:
  """Compiled programs are kept for the next start, in the user's own cache, unless JAX was told a place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(Path.home() / '.cache' / 'maxlm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == '__main__':
  flags.run(main, default_config='configs/quickstart.py')
