"""Tasks in a run: what is asked, what counts as right, on every mesh, and in the record; and which are refused."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jobs import Job
from test_data_long_range import look_up

from configs import tiny
from data_pipeline import loader, long_range, puzzles
from data_pipeline.tokenizer import load
from maxlm import stages, tasks
from maxlm.continuations import Answer
from maxlm.data import to_device
from maxlm.losses import next_token_loss
from maxlm.models.decoder import Decoder
from maxlm.tasks import FileTask, LongRangeTasks, PuzzleTasks

ROOT = Path(__file__).parents[1]
LENGTHS = (200, 300)
SPECS = (LongRangeTasks(tasks=long_range.TASKS, lengths=LENGTHS, examples=8),
         PuzzleTasks(kinds=tuple(puzzles.PROBLEMS), examples=4))


@pytest.fixture(scope='module')
def prepared(corpus):
  return tasks.tasks_of(SPECS, loader.open_corpus(corpus, 64))


def test_each_example_is_answered_by_looking_it_up_and_has_the_length_that_it_should(corpus, prepared):
  encoder, parts = load(corpus / 'tokenizer.json'), {part.name: part for part in prepared.parts}
  decode = lambda ids: encoder.decode(ids)
  for task in long_range.TASKS:
    for length in LENGTHS:
      part = parts[f'{task}/{length}']
      assert len(part.requests) == 8 and part.gold is None and 0 < part.chance < 0.5
      for (context, continuation), in part.requests:
        assert length - 60 <= len(context) + len(continuation) <= length  # a sentence is up to so long in a small vocabulary
        text, asked = decode(context).rsplit('\n', 1)
        assert look_up(asked, text + '\n') == decode(continuation)
  for kind in puzzles.PROBLEMS:
    for (context, continuation), in parts[f'{kind}/level1'].requests:
      assert 'Answer' not in decode(context) and 'Answer: ' in decode(continuation)


def test_facts_can_stand_in_held_out_text(corpus):
  opened = loader.open_corpus(corpus, 64)
  text = ' '.join(long_range.split_sentences(tasks.held_out_text(opened, 'stories')))
  spec = LongRangeTasks(tasks=('multi_key',), lengths=(256,), examples=4, around='stories')
  encoder = load(corpus / 'tokenizer.json')
  for (context, continuation), in tasks.tasks_of((spec,), opened).parts[0].requests:
    prompt, asked = encoder.decode(context).rsplit('\n', 1)
    assert look_up(asked, prompt) == encoder.decode(continuation)
    around = re.sub(r'Note \w+ \w+\. ', '', prompt.removeprefix('Text: '))
    assert around[:200] in text
  with pytest.raises(ValueError, match="around='none': .* has no held-out text of such a source; it has stories, inv"):
    tasks.tasks_of((dataclasses.replace(spec, around='none'),), opened)


def test_what_is_right_is_counted_per_part_and_bits_per_byte_are_those_of_the_answers(tmp_path):
  lines = {'text': ['{"text": "ab"}', '{"text": "abcd"}'],
           'choice': ['{"question": "q", "choices": ["a", "b", "c"], "answer": 2}',
                      '{"question": "r", "choices": ["a", "b"], "answer": 0}'],
           'exact': ['{"question": "q", "answer": "é"}', '{"question": "r", "answer": "bc"}']}
  specs = []
  for name, some in lines.items():
    (tmp_path / name).write_text('\n'.join(some) + '\n', encoding='utf-8')
    specs.append(FileTask(name=name, path=str(tmp_path / name)))
  made = tasks.Tasks(tuple(specs), lambda text: [0, *text.encode()], lambda source: '')
  assert made.requests[0] == ([0], [97, 98]) and made.requests[2] == ([0, 113], [32, 97])
  log_probs = [-2.0, -4.0, -3.0, -2.0, -1.0, -1.0, -2.0, -1.5, -0.5]
  right = [True, False, True, True, True, True, True, True, False]
  values = tasks.scores(made.parts, {i: Answer(*answer) for i, answer in enumerate(zip(log_probs, right))})
  expected = {'eval/tasks/choice/all': 1.0, 'eval/chance/choice/all': (1 / 3 + 1 / 2) / 2, 'eval/tasks/exact/all': 0.5,
              'eval/bits_per_byte/text': 6 / math.log(2) / 6, 'eval/bits_per_byte/exact': 2 / math.log(2) / 6}
  assert values == pytest.approx(expected)
  assert tasks.Tasks((), None, None)(None, None) == {}


def in_full(model, compute, params, requests) -> list[tuple[float, bool]]:
  """Each request alone in a row, by the loss of training and by logits."""
  found, length = [], 512
  for context, continuation in requests:
    ids = [*context, *continuation]
    tokens = np.zeros((1, length), np.int32)
    tokens[0, :len(ids)] = ids
    mask, real = np.zeros((1, length), np.int32), (np.arange(length) < len(ids) - 1)[None].astype(np.int32)
    mask[0, len(context) - 1:len(ids) - 1] = 1
    positions = np.arange(length, dtype=np.int32)[None]
    batch = {'tokens': tokens, 'targets': np.roll(tokens, -1), 'segment_ids': real, 'positions': positions,
             'loss_mask': mask}
    batch = to_device(batch)
    _, nll, _ = next_token_loss(params, model, compute, tiny.get_config().loss, batch)
    x, _ = params.hidden(model, compute, batch['tokens'], batch['segment_ids'], batch['positions'])
    likeliest = np.asarray(params.logits(model, x).argmax(-1))
    found.append((-float(nll.sum()), bool((likeliest == np.asarray(batch['targets']))[mask > 0].all())))
  return found


def test_answers_in_a_run_are_those_of_single_rows_on_any_mesh(prepared, mesh_of):
  config = tiny.get_config()
  config.model.n_layers = 3
  small = tasks.Tasks((), None, None)
  small.requests = prepared.requests[::17]
  small.longest = prepared.longest
  found = {}
  for sizes in ({'data': 1}, {'data': 2, 'context': 2}, {'fsdp': 2, 'tensor': 2}):
    with mesh_of(**sizes):
      config.mesh = dataclasses.replace(config.mesh, **({'fsdp': 1} | sizes))
      compute = config.resolved('cpu')
      params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
      if sizes == {'data': 1}:
        with mesh_of(1):
          expected = jax.jit(functools.partial(Decoder, config.model))(jax.random.key(0))
          expected = in_full(config.model, compute, expected, small.requests)
      scorer = small.scorer(config.model, compute, 4096)
      found = dict(scorer(params, small.requests))
      np.testing.assert_allclose([found[i].log_prob for i in range(len(expected))], [e[0] for e in expected], rtol=1e-5)
      assert [found[i].greedy for i in range(len(expected))] == [e[1] for e in expected]


@pytest.mark.parametrize('spec, says', [
  (LongRangeTasks(lengths=(64, 2000)), r'evals.tasks\[0\]: lengths=\(64, 2000\), and the longest rows .* 64 tokens'),
  (LongRangeTasks(lengths=()), 'needs tasks, and lengths of 64'), (LongRangeTasks(lengths=(32,)), 'needs tasks'),
  (LongRangeTasks(lengths=(64,), tasks=('stack',)), "no task 'stack', only needle"),
  (LongRangeTasks(lengths=(64,), examples=0), 'examples=0 must be at least 1'),
  (PuzzleTasks(kinds=('riddle',)), "no problems of kind 'riddle', only arithmetic"),
  (PuzzleTasks(level=11), 'level from 1 to 10'),
])
def test_tasks_that_there_are_not_are_refused_before_the_run(spec, says):
  config = tiny.get_config()
  config.evals.tasks = (spec,)
  with pytest.raises(ValueError, match=says):
    stages.check(config, 'cpu', 1)


@pytest.mark.parametrize('lines, says', [
  ('', 'has no lines'), ('{"text": 3}', ':1 has neither a text'), ('{"text": "a"}\n{', ':2 is no JSON'),
  ('{"question": "q", "choices": ["a", "b"], "answer": 2}', ':1 has neither'),
  ('{"text": "a"}\n{"question": "q", "answer": "a"}', 'lines of several kinds')])
def test_a_file_that_is_no_task_is_refused(tmp_path, lines, says):
  (tmp_path / 'file').write_text(lines)
  with pytest.raises(ValueError, match=says):
    tasks.Tasks((FileTask(name='x', path=str(tmp_path / 'file')),), lambda text: [0, *text.encode()], None)
  with pytest.raises(ValueError, match='two tasks arithmetic/level1'):
    tasks.Tasks((PuzzleTasks(), PuzzleTasks()), lambda text: [0, *text.encode()], None)


CONFIG = '''
from configs import tiny
from maxlm.tasks import FileTask, LongRangeTasks, PuzzleTasks

def get_config(arg=''):
  config = tiny.get_config()
  config.model.n_layers = 1
  config.evals.every_steps, config.tokens = 4, 8 * 8 * 64
  config.evals.tasks = (LongRangeTasks(lengths=(64,), tasks=('needle',), examples=6), PuzzleTasks(examples=5),
                        FileTask(name='words', path=arg))
  return config
'''


@pytest.mark.parametrize('processes', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_records_its_tasks_and_evaluate_gives_the_same(corpus, tmp_path, processes):
  (tmp_path / 'words.jsonl').write_text('{"question": "Who", "choices": ["the captain", "the clerk"], "answer": 1}\n' * 3)
  (tmp_path / 'config.py').write_text(CONFIG)
  job = Job(corpus, tmp_path / 'run', f'--config={tmp_path}/config.py:{tmp_path}/words.jsonl', processes=processes)
  assert job.wait() == [0] * processes, job.told()
  records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  evaluations = {record['step']: record for record in records if 'eval/loss/all' in record}
  names = ['needle/64', 'arithmetic/level1', 'words/all']
  assert set(evaluations) == {4, 8}
  for record in evaluations.values():
    assert all(0 <= record[f'eval/tasks/{name}'] <= 1 for name in names)
    assert record['eval/chance/needle/64'] == 1 / 32 and record['eval/chance/words/all'] == 0.5
    assert 'eval/chance/arithmetic/level1' not in record
  assert 'right at step 8: needle/64 ' in job.said()
  command = [sys.executable, '-m', 'maxlm.evaluate', f'--checkpoint={tmp_path}/run']
  run = lambda *flags: subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=False)
  done = run('--rows=8', '--json')
  assert done.returncode == 0, done.stderr
  values = json.loads(done.stdout)['tasks']
  assert values == {name: value for name, value in evaluations[8].items() if name in values} and len(values) == 5
  shown = run('--long_range=200,300', '--limit=3')
  assert shown.returncode == 0, shown.stderr
  assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == [
    f'{task}/{length}' for task in long_range.TASKS for length in (200, 300)]
