"""Scores of a checkpoint: `python -m maxlm.evaluate --checkpoint=WORKDIR[@STEP] [--data=CORPUS | --tasks=NAMES]`.

For each source of a corpus: loss (nats a token), bits per byte of its held-out text, and how often the likeliest token
is the right one. For tasks of lm-evaluation-harness (extra `eval`): the harness's own report.
"""

import functools
import json
import multiprocessing
from pathlib import Path

import jax
import jax.numpy as jnp

from data_pipeline import loader, long_range, shards
from maxlm import flags
from maxlm.continuations import ROW
from maxlm.evals import evaluate, total
from maxlm.load import Model, load
from maxlm.sharding import axis_size, spec
from maxlm.step import eval_step
from maxlm.tasks import LongRangeTasks, Tasks, check, tasks_of

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
DATA = flags.DEFINE_string('data', '', 'a corpus made by data_pipeline.build (default: the one of the run)')
ROWS = flags.DEFINE_integer('rows', 256, 'held-out rows of each source, at most')
BATCH = flags.DEFINE_integer('batch_size', 8, 'rows at a time')
TASKS = flags.DEFINE_list('tasks', [], 'tasks and groups of lm-evaluation-harness, instead of a corpus: a,b,c')
TASK_DIR = flags.DEFINE_string('task_dir', '', 'with --tasks: a directory with YAML files of further tasks')
NUM_FEWSHOT = flags.DEFINE_integer('num_fewshot', None, 'with --tasks: examples in a prompt (default: as the task says)')
LIMIT = flags.DEFINE_integer('limit', None, 'with --tasks or --long_range: only so many examples of each task')
MAX_LENGTH = flags.DEFINE_integer('max_length', None, 'with --tasks: tokens seen at once, at most (default: as in training)')
CACHE = flags.DEFINE_string('cache', '', 'with --tasks: a directory for answers; the same command again goes on from them')
LONG_RANGE = flags.DEFINE_list('long_range', [], 'score questions on texts of so many tokens instead of a corpus: 1024,4096')
AS_JSON = flags.DEFINE_bool('json', False, 'one JSON object instead of a table')

HEAD_TOKENS = 64  # positions whose logits are held at a time, to find the likeliest token


def main() -> int:
  if not CHECKPOINT.value:
    raise ValueError('give --checkpoint=WORKDIR of a run, such as --checkpoint=runs/quickstart')
  if ROWS.value < 1 or BATCH.value < 1:
    raise ValueError(f'--rows={ROWS.value} and --batch_size={BATCH.value} must be at least 1')
  if TASKS.value:
    return evaluate_tasks()
  for flag in (TASK_DIR, NUM_FEWSHOT, LIMIT, MAX_LENGTH, CACHE):
    if flag.value != flag.default and not (flag is LIMIT and LONG_RANGE.value):
      raise ValueError(f'--{flag.name}={flag.value} goes with --tasks')
  if LONG_RANGE.value:
    return evaluate_long_range()
  model = load(CHECKPOINT.value)
  if not DATA.value and model.config is None:
    raise ValueError(f'{CHECKPOINT.value} was not trained here: give --data=CORPUS')
  directory = Path(DATA.value or model.config.data.corpus)
  seq_len = model.config.data.seq_len if model.config else max(shards.read_manifest(directory)['seq_lens'])
  corpus = loader.open_corpus(directory, seq_len)
  if corpus.tokenizer_path.read_text() != model.tokenizer_text:
    raise ValueError(f'{corpus.directory} was made with another tokenizer than the model in {CHECKPOINT.value}: build the '
                     'corpus with the tokenizer in that workdir')
  model.check_length(seq_len)
  batch_size = BATCH.value + -BATCH.value % axis_size('B')
  scores = evaluate(jax.jit(functools.partial(score, model)), model.params, corpus, ROWS.value, batch_size)
  scores |= {'all': total(scores)}
  of_run = model.config.evals.tasks if model.config and not DATA.value else ()
  values = answered(model, tasks_of(of_run, corpus)) if of_run else {}
  if AS_JSON.value:
    print(json.dumps({'step': model.step, 'sources': {source: {
      'loss': s.loss, 'bits_per_byte': s.bits_per_byte, 'accuracy': s.accuracy, 'tokens': s.tokens, 'bytes': s.bytes}
      for source, s in scores.items()}, **({'tasks': values} if values else {})}))
  else:
    print(f'{"step " + str(model.step):24}{"loss":>9}{"bits/byte":>11}{"accuracy":>10}{"tokens":>10}')
    for source, s in scores.items():
      accuracy = '' if s.accuracy is None else f'{s.accuracy:.1%}'
      print(f'{source:24}{s.loss:9.4f}{s.bits_per_byte:11.4f}{accuracy:>10}{s.tokens:10,}')
    if model.model.mask_token is not None:
      print('masked diffusion: loss and bits per byte are upper bounds')
    show(values)
  return 0


def evaluate_long_range() -> int:
  """The long-range tasks, on a model from anywhere."""
  if not all(length.isdecimal() for length in LONG_RANGE.value):
    raise ValueError(f'--long_range={",".join(LONG_RANGE.value)}: give numbers of tokens, such as --long_range=1024,4096')
  lengths = tuple(map(int, LONG_RANGE.value))
  spec = LongRangeTasks(tasks=long_range.TASKS, lengths=lengths, examples=64 if LIMIT.value is None else LIMIT.value)
  check((spec,), max(lengths), '--long_range')
  model = load(CHECKPOINT.value)
  model.check_length(max(lengths))
  values = answered(model, Tasks((spec,), model.prompt, lambda source: ''))
  if AS_JSON.value:
    print(json.dumps({'step': model.step, 'tasks': values}))
  else:
    print(f'step {model.step}')
    show(values)
  return 0


def answered(model: Model, tasks: Tasks) -> dict[str, float]:
  return tasks(tasks.scorer(model.model, model.compute, BATCH.value * ROW), model.params)


def show(values: dict[str, float]) -> None:
  """A line for each task: the share that is right, and what guessing gets right."""
  for name, value in values.items():
    _, what, task = name.split('/', 2)
    chance = values.get(f'eval/chance/{task}', 0.0)
    if what == 'tasks':
      print(f'{task:24}{value:9.1%} right{chance:11.1%} by chance')
    elif what == 'bits_per_byte':
      print(f'{task:24}{value:9.4f} bits/byte')


def evaluate_tasks() -> int:
  for flag, least in ((NUM_FEWSHOT, 0), (LIMIT, 1), (MAX_LENGTH, 1)):
    if flag.value is not None and flag.value < least:
      raise ValueError(f'--{flag.name}={flag.value} must be at least {least}')
  if DATA.value:
    raise ValueError('give --tasks or --data, not both')
  try:
    from maxlm import harness
  except ModuleNotFoundError as error:
    if error.name != 'lm_eval':
      raise
    raise OSError("--tasks needs lm-evaluation-harness: pip install -e '.[eval]'") from None
  from lm_eval.utils import make_table

  multiprocessing.set_start_method('forkserver', force=True)  # the harness's processes; JAX's threads do not survive a fork
  model = load(CHECKPOINT.value)
  report = harness.run(model, TASKS.value, task_dir=TASK_DIR.value, num_fewshot=NUM_FEWSHOT.value, limit=LIMIT.value,
                       batch_size=BATCH.value, max_length=MAX_LENGTH.value, cache=CACHE.value)
  if AS_JSON.value:
    print(json.dumps({'step': model.step, 'tasks': report['results'], 'num_fewshot': report['n-shot'],
                      'samples': report['n-samples'], 'versions': report['versions']}))
  else:
    print(f'step {model.step}\n{make_table(report)}' + (make_table(report, 'groups') if report.get('groups') else ''))
  return 0


def score(model: Model, params, batch: dict) -> dict[str, jax.Array]:
  """What `step.eval_step` gives, and of next tokens how many were the likeliest."""
  sums = eval_step(model.model, model.compute, params, batch)
  return sums if model.model.mask_token is not None else {**sums, 'hits': hits(model, params, batch)}


def hits(model: Model, params, batch: dict) -> jax.Array:
  """Targets that count and are the token with the highest logit, a few positions of every row at a time."""
  x_BTD, _ = params.hidden(model.model, model.compute, batch['tokens'], batch['segment_ids'], batch['positions'])
  T = batch['targets'].shape[1]
  chunk = next(n for n in range(min(HEAD_TOKENS, T), 0, -1) if T % n == 0)

  def chunks(array):
    array = jax.reshard(array, jax.P(*spec('B'), *(None,) * (array.ndim - 1)))
    split = array.reshape(array.shape[0], T // chunk, chunk, *array.shape[2:])
    return jnp.moveaxis(split, 1, 0)

  def count(part):
    x_BMD, targets_BM, mask_BM = part
    likeliest_BM = jnp.argmax(jax.reshard(params.logits(model.model, x_BMD), jax.P(*spec('B'), None, None)), axis=-1)
    return jnp.sum((likeliest_BM == targets_BM) & (mask_BM > 0))

  return jnp.sum(jax.lax.map(count, (chunks(x_BTD), chunks(batch['targets']), chunks(batch['loss_mask']))))


if __name__ == '__main__':
  flags.run(main)
