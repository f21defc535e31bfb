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

from data_pipeline import loader, shards
from maxlm import flags
from maxlm.evals import evaluate, total
from maxlm.load import Model, load
from maxlm.sharding import axis_size, spec
from maxlm.step import eval_step

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
DATA = flags.DEFINE_string('data', '', 'a corpus made by data_pipeline.build (default: the one of the run)')
ROWS = flags.DEFINE_integer('rows', 256, 'held-out rows of each source, at most')
BATCH = flags.DEFINE_integer('batch_size', 8, 'rows at a time')
TASKS = flags.DEFINE_list('tasks', [], 'tasks and groups of lm-evaluation-harness, instead of a corpus: a,b,c')
TASK_DIR = flags.DEFINE_string('task_dir', '', 'with --tasks: a directory with YAML files of further tasks')
NUM_FEWSHOT = flags.DEFINE_integer('num_fewshot', None, 'with --tasks: examples in a prompt (default: as the task says)')
LIMIT = flags.DEFINE_integer('limit', None, 'with --tasks: only so many documents of each task')
MAX_LENGTH = flags.DEFINE_integer('max_length', None, 'with --tasks: tokens seen at once, at most (default: as in training)')
CACHE = flags.DEFINE_string('cache', '', 'with --tasks: a directory for answers; the same command again goes on from them')
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
    if flag.value != flag.default:
      raise ValueError(f'--{flag.name}={flag.value} goes with --tasks')
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
  if AS_JSON.value:
    print(json.dumps({'step': model.step, 'sources': {source: {
      'loss': s.loss, 'bits_per_byte': s.bits_per_byte, 'accuracy': s.accuracy, 'tokens': s.tokens, 'bytes': s.bytes}
      for source, s in scores.items()}}))
  else:
    print(f'{"step " + str(model.step):24}{"loss":>9}{"bits/byte":>11}{"accuracy":>10}{"tokens":>10}')
    for source, s in scores.items():
      print(f'{source:24}{s.loss:9.4f}{s.bits_per_byte:11.4f}{s.accuracy:10.1%}{s.tokens:10,}')
  return 0


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
  """What `step.eval_step` gives, and the number of tokens that were the likeliest."""
  return {**eval_step(model.model, model.compute, params, batch), 'hits': hits(model, params, batch)}


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
