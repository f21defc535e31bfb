"""Tasks of lm-evaluation-harness: every answer against an independent full forward, and whole tasks from local files."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from configs import tiny
from data_pipeline import tokenizer
from maxlm import continuations, decode, harness, typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.continuations import Scorer
from maxlm.load import load
from maxlm.models.decoder import Decoder
from maxlm.score import score
from tests.make_tasks import make_tasks

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 64
TOLERANCE = 1e-5  # nats: fp32 sums of a dozen log-probabilities, in another order


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, mesh_of):
  """A checkpoint of a small untrained model, and the tasks beside it."""
  where = tmp_path_factory.mktemp('harness')
  tasks, run = make_tasks(where / 'tasks'), where / 'run'
  run.mkdir()
  texts = [json.loads(line)['text'] for path in tasks.glob('*.jsonl') for line in path.read_text().splitlines()]
  tokenizer.train(run, texts, 'record', 'key', vocab_size=384)
  config = tiny.get_config()
  config.model.pattern, config.model.n_layers, config.model.vocab_size = config.model.pattern[:2], 2, 384
  config.data.seq_len, config.model.max_positions = MAX_LENGTH, 96  # learned ones: a row does not shift its documents
  checkpoints = Checkpoints(run / 'checkpoints')
  with mesh_of(1):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    checkpoints.save(3, params=params, opt=None, meta={'config': json.loads(typed_json.dumps(config)), 'lineage': lineage()})
    checkpoints.close()
  return run


@pytest.fixture(scope='module')
def model(workdir, mesh_of):
  """The loaded model, on one of the devices."""
  loaded = load(str(workdir))
  with mesh_of(1) as mesh:
    yield on(mesh, loaded)


def on(mesh, model):
  """The model on another mesh."""
  place = lambda w: jax.device_put(np.asarray(w), jax.NamedSharding(mesh, w.sharding.spec))
  return dataclasses.replace(model, params=jax.tree.map(place, model.params))


@pytest.fixture(scope='module')
def requests(model):
  """(context, continuation) in tokens: ragged ones, some greedy, some that share an input, one twice."""
  rng = np.random.default_rng(0)
  draw = lambda least, most: rng.integers(1, 384, rng.integers(least, most)).tolist()
  pairs = [(draw(1, 50), draw(1, 12)) for _ in range(40)]
  prompts = [context for context, _ in pairs[:3]]
  greedy = decode.generate(model.params, model.model, model.compute, prompts, eos=[], max_tokens=6, temperature=0.0)
  pairs += list(zip(prompts, greedy)) + [(prompts[0], greedy[0][:k]) for k in (1, 3)]
  return pairs + [(pairs[5][0], pairs[5][1][:-1] + [token]) for token in range(1, 9)] + [pairs[7]]


def in_full(model, pairs) -> list[tuple[float, bool]]:
  """The same answers from the logits of whole, unpacked sequences, in fp64."""
  pairs = [(list(context), list(continuation)) for context, continuation in pairs]
  padded = np.full((len(pairs), max(len(context) + len(continuation) for context, continuation in pairs)), -1, np.int32)
  for row, (context, continuation) in enumerate(pairs):
    padded[row, :len(context) + len(continuation)] = context + continuation
  logits = score(model, padded, batch_size=8, logits=True)['logits'].astype(np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  answers = []
  for row, (context, continuation) in enumerate(pairs):
    after = slice(len(context) - 1, len(context) + len(continuation) - 1)
    chosen = np.take_along_axis(log_probs[row, after], np.array(continuation)[:, None], 1)
    answers.append((chosen.sum(), bool((logits[row, after].argmax(-1) == continuation).all())))
  return answers


def assert_same(got, expected, tolerance=TOLERANCE):
  np.testing.assert_allclose([answer[0] for answer in got], [answer[0] for answer in expected], rtol=0, atol=tolerance)
  assert [answer[1] for answer in got] == [answer[1] for answer in expected]


def scorer_of(model, **how):
  scorer = Scorer(model.model, model.compute, **how)
  return lambda pairs: scorer(model.params, pairs)


def answers_of(scorer, pairs):
  found = dict(scorer(pairs))
  assert sorted(found) == list(range(len(pairs)))
  return [found[i] for i in range(len(pairs))]


def instances(kind, *arguments):
  return [Instance(kind, {}, argument, 0) for argument in arguments]


def test_answers_are_those_of_a_full_forward(model, requests):
  expected = in_full(model, requests)
  assert 5 <= sum(greedy for _, greedy in expected) < len(expected)
  assert_same(answers_of(scorer_of(model, max_length=MAX_LENGTH, batch_size=4), requests), expected)


def test_answers_do_not_depend_on_rows_batches_and_devices(model, requests, monkeypatch, mesh_of):
  monkeypatch.setattr(continuations, 'ROW', 256)
  monkeypatch.setattr(continuations, 'HELD_LOGITS', 1 << 14)
  expected = in_full(model, requests)
  for batch_size in (1, 3):
    assert_same(answers_of(scorer_of(model, max_length=MAX_LENGTH, batch_size=batch_size), requests), expected)
  one = harness.fingerprint(model, 64)
  with mesh_of(data=2, fsdp=2, tensor=2) as mesh:
    split = on(mesh, model)
    assert_same(answers_of(scorer_of(split, max_length=MAX_LENGTH, batch_size=2), requests), expected)
    assert harness.fingerprint(split, 64) == one


def test_an_answer_does_not_change_with_its_neighbours_in_the_row(model, requests):
  scorer = scorer_of(model, max_length=MAX_LENGTH, batch_size=1)
  others = [([383 - token for token in context], [383 - token for token in continuation])
            for context, continuation in requests[:40]]
  for i in (0, 17, 39):
    alone = [*others[:i], requests[i], *others[i + 1:]]
    assert answers_of(scorer, alone)[i] == answers_of(scorer, requests[:40])[i]  # to the bit: the same program


def test_what_begins_another_input_rides_on_it():
  inputs = [np.array(tokens) for tokens in ([1, 2], [1, 2, 3], [1, 2], [1], [2], [1, 3], [1, 256], [1, 2, 3, 4], [258])]
  found = {host: sorted(riders) for host, riders in continuations.shared(inputs).items()}
  equal = next(riders for riders in found.values() if 7 in riders)
  assert equal == [0, 1, 2, 7] or equal == [0, 1, 2, 3, 7]
  assert sorted(request for riders in found.values() for request in riders) == list(range(9))
  assert all(inputs[host][:len(inputs[rider])].tolist() == inputs[rider].tolist() for host in found for rider in found[host])
  assert len(found) == 5


def test_rows_are_full():
  rng = np.random.default_rng(1)
  for longest in (5, 60, 200, 700, 1500, 5000):
    for least in (1, longest // 2, longest):
      lengths = rng.integers(least, longest + 1, 500).tolist()
      T, rows = continuations.packed(lengths, d_model=1024)
      assert T % 128 == 0 and sorted(i for row in rows for i in row) == list(range(500))
      assert max(sum(lengths[i] for i in row) for row in rows) <= T
      assert sum(lengths) > 0.85 * T * (len(rows) - 1) or longest > 4 * 1024  # there, attention would cost more
  assert continuations.packed([7], 1024) == (128, [[0]])
  assert continuations.packed([1024] * 9, 64)[0] == 1024  # where attention is dear and a longer row gains nothing


def test_a_text_is_split_as_the_harness_says(model):
  lm = harness.HarnessLM(model)
  encode = lambda text: model.tokenizer.encode(text).ids
  bos = model.bos
  whole, short = [bos, *encode('The miller painted some bread')], [bos, *encode('The miller painted')]
  expected = [(short, whole[len(short):])] * 2 + [([bos], encode('The miller')), ([bos], encode('  The miller'))]
  assert encode(' painted') != encode('painted')
  asked = [('The miller painted', ' some bread'), ('The miller painted ', 'some bread'), ('', 'The miller')]
  asked.append((' ', ' The miller'))
  assert_same(lm.loglikelihood(instances('loglikelihood', *asked)), in_full(model, expected))
  with pytest.raises(ValueError, match='no token of its own'):
    lm.loglikelihood(instances('loglikelihood', ('The miller', '')))


def test_what_is_too_long_loses_its_beginning(model):
  rng = np.random.default_rng(2)
  tokens = rng.integers(1, 384, 40).tolist()
  scorer = scorer_of(model, max_length=16, batch_size=1)
  pairs = [(tokens[:n], tokens[n:n + 5]) for n in (11, 12, 13, 30)]
  assert_same(answers_of(scorer, pairs), in_full(model, [((context + end)[-17:-5], end) for context, end in pairs]))
  assert_same(answers_of(scorer, [(tokens[:9], tokens[9:25])]), in_full(model, [(tokens[8:9], tokens[9:25])]))
  with pytest.raises(ValueError, match='a continuation of 17 tokens is longer'):
    list(scorer([(tokens[:9], tokens[9:26])]))


def windows(tokens, length):
  """Disjoint continuations, the first one after tokens[0], each with as much context as `length` inputs allow."""
  stops = [*range(length + 1, len(tokens), length), len(tokens)]
  return [(tokens[max(0, stop - length - 1):start], tokens[start:stop]) for start, stop in zip([1, *stops[:-1]], stops)]


def test_rolling_predicts_each_token_once_in_disjoint_windows(model):
  texts = ['The captain found a map today.', '', 'A stranger sold seven coins twice. ' * 12]
  lm = harness.HarnessLM(model, max_length=32)
  got = lm.loglikelihood_rolling(instances('loglikelihood_rolling', *[(text,) for text in texts]))
  for text, log_prob in zip(texts, got):
    tokens = [model.bos, *model.tokenizer.encode(text).ids]
    pairs = windows(tokens, 32) if text else []
    assert sum(len(pair[1]) for pair in pairs) == len(tokens) - 1
    assert log_prob == pytest.approx(sum(answer[0] for answer in in_full(model, pairs)) if pairs else 0.0, abs=5 * TOLERANCE)
  assert len(pairs) > 3 and len(pairs[-1][0]) > 1


GREEDY = {'until': [], 'do_sample': False}
PROMPTS = ['The captain', 'An old woman hid the letter by', 'Inventory no. 7 of the', 'Two', '']


def test_texts_are_those_of_each_prompt_alone_and_no_longer_than_asked_for(model, monkeypatch):
  monkeypatch.setattr(decode, 'ASK_EVERY', 5)
  lm = harness.HarnessLM(model, max_length=96, batch_size=1)
  got = lm.generate_until(instances('generate_until', *[(prompt, {**GREEDY, 'max_gen_toks': 12}) for prompt in PROMPTS],
                                    (PROMPTS[1], {**GREEDY, 'max_gen_toks': 3})))
  for prompt, text in zip(PROMPTS, got):
    alone, = decode.generate(model.params, model.model, model.compute, [model.prompt(prompt)], eos=model.eos, max_tokens=12,
                             temperature=0.0)
    assert text == model.tokenizer.decode(alone)
  assert got[1].startswith(got[-1]) and len(got[-1]) < len(got[1])


def test_a_text_ends_before_the_first_stop_and_at_the_token_that_ends_documents(model, monkeypatch):
  monkeypatch.setattr(decode, 'ASK_EVERY', 4)
  prompt = model.prompt('The doctor')
  tokens, = decode.generate(model.params, model.model, model.compute, [prompt], eos=[], max_tokens=24, temperature=0.0)
  text = model.tokenizer.decode(tokens)
  early, late = text[6:8], text[15:18]
  ended = dataclasses.replace(model, eos=(tokens[9],))
  ask = lambda model, **kwargs: harness.HarnessLM(model).generate_until(
    instances('generate_until', ('The doctor', {**GREEDY, 'max_gen_toks': 24, **kwargs})))[0]
  assert ask(model, until=[late, early, '']) == text[:min(text.index(early), text.index(late))]
  assert ask(model, until=late) == text[:text.index(late)]
  assert ask(model) == text
  assert ask(ended) == model.tokenizer.decode(tokens[:tokens.index(tokens[9])])
  seen = []
  generator = decode.Generator(model.model, model.compute, eos=[], temperature=0.0)
  enough = lambda tokens: seen.append(tokens) or len(tokens) >= 8
  written, = generator(model.params, [prompt], max_tokens=24, columns=64, enough=enough)
  assert written == tokens[:8] and seen == [tokens[:4], tokens[:8]]


def test_a_prompt_is_cut_to_leave_room_and_a_task_that_leaves_none_is_refused(model):
  lm = harness.HarnessLM(model, max_length=20)
  long = 'A young soldier asked for the keys in the market. ' * 4
  got, = lm.generate_until(instances('generate_until', (long, {**GREEDY, 'max_gen_toks': 8})))
  alone, = decode.generate(model.params, model.model, model.compute, [model.prompt(long)[-12:]], eos=model.eos, max_tokens=8,
                           temperature=0.0)
  assert got == model.tokenizer.decode(alone) and lm.n_cut == 1
  for kwargs, says in (({**GREEDY, 'max_gen_toks': 20}, 'leaves none for its prompt'),
                       ({'do_sample': True, 'top_k': 5}, 'top_k=5'), ({'repetition_penalty': 1.2}, 'repetition_penalty')):
    with pytest.raises(ValueError, match=says):
      lm.generate_until(instances('generate_until', ('Two', {'until': [], **kwargs})))


def test_samples_differ_and_are_the_same_again_and_a_greedy_text_is_written_once(model):
  how = {'do_sample': True, 'temperature': 1.0, 'max_gen_toks': 8, 'until': []}
  asked = instances('generate_until', *[('The clerk', how)] * 3, *[('The clerk', {**how, 'do_sample': False})] * 2)
  twice = []
  for _ in range(2):
    lm, n_written = harness.HarnessLM(model, batch_size=1), []
    write = lm._write
    lm._write = lambda requests: n_written.append(len(requests)) or write(requests)
    twice.append(lm.generate_until(asked))
    assert n_written == [4]
  assert twice[0] == twice[1] and len(set(twice[0][:3])) == 3 and twice[0][3] == twice[0][4]


def test_an_interrupted_evaluation_goes_on_where_it_was(model, requests, tmp_path, monkeypatch):
  monkeypatch.setattr(continuations, 'ROW', 512)
  asked = [(('', ''), *pair) for pair in requests]
  expected = harness.HarnessLM(model, batch_size=1)._loglikelihood_tokens(asked)
  lm = harness.HarnessLM(model, batch_size=1, cache=tmp_path)
  scorer = lm.scorer

  def killed(params, pairs):
    for count, answer in enumerate(scorer(params, pairs)):
      if count == 20:
        raise KeyboardInterrupt
      yield answer

  lm.scorer = killed
  with pytest.raises(KeyboardInterrupt):
    lm._loglikelihood_tokens(asked)
  file, = tmp_path.iterdir()
  file.write_text(file.read_text()[:-9])  # and the last line was half written
  for missing in (len({json.dumps(pair) for pair in requests}) - 19, 0):
    again, n_asked = harness.HarnessLM(model, batch_size=1, cache=tmp_path), []
    again.scorer = lambda params, pairs: n_asked.append(len(pairs)) or scorer(params, pairs)
    assert_same(again._loglikelihood_tokens(asked), expected)
    assert sum(n_asked) == missing
  text = instances('generate_until', ('Two', {**GREEDY, 'max_gen_toks': 4}))
  written = again.generate_until(text)
  again = harness.HarnessLM(model, batch_size=1, cache=tmp_path)
  again._write = None
  assert again.generate_until(text) == written
  assert len(list(tmp_path.iterdir())) == 1


def test_answers_are_kept_for_one_model_only(model):
  leaves, tree = jax.tree.flatten(model.params)
  i = next(i for i, leaf in enumerate(leaves) if leaf.shape == (384, 64))
  embed = np.array(leaves[i])
  place = lambda w: jax.device_put(w, leaves[i].sharding)
  other = lambda w: dataclasses.replace(model, params=tree.unflatten([*leaves[:i], place(w), *leaves[i + 1:]]))
  nudged = embed.copy()
  nudged[3, 4] = np.nextafter(nudged[3, 4], np.inf)
  variants = [model, other(nudged), other(embed[::-1]), other(embed[:, ::-1]),
              dataclasses.replace(model, eos=(5,)), dataclasses.replace(model, tokenizer_text='')]
  assert len({harness.fingerprint(variant, 64) for variant in variants} | {harness.fingerprint(model, 65)}) == 7
  assert harness.fingerprint(model, 64) == harness.fingerprint(model, 64)


@pytest.fixture(scope='module')
def report(model, workdir):
  return harness.run(model, ['choices', 'letters', 'texts', 'writing'], task_dir=str(workdir.parent / 'tasks'))


def documents(workdir, task):
  return [json.loads(line) for line in (workdir.parent / 'tasks' / f'{task}.jsonl').read_text().splitlines()]


def test_accuracy_is_that_of_an_independent_computation(model, workdir, report):
  for task in ('choices', 'letters'):
    docs, pairs = documents(workdir, task), []
    for doc in docs:
      choices = doc['choices'] if task == 'choices' else list('ABCD')
      listed = ''.join(f'\n{letter}. {choice}' for letter, choice in zip('ABCD', doc['choices'])) + '\nAnswer:'
      context = doc['question'] + listed * (task == 'letters')
      for choice in choices:
        whole, n = model.prompt(f'{context} {choice}'), len(model.prompt(context))
        pairs.append((whole[:n], whole[n:]))
    log_probs = np.array([answer[0] for answer in in_full(model, pairs)]).reshape(-1, 4)
    right = np.array([doc['answer'] for doc in docs])
    assert report['results'][task]['acc,none'] == (log_probs.argmax(1) == right).mean()
    assert 0 < (log_probs.argmax(1) == right).mean() < 1
    if task == 'choices':
      lengths = [[len(choice) for choice in doc['choices']] for doc in docs]
      assert report['results'][task]['acc_norm,none'] == ((log_probs / lengths).argmax(1) == right).mean()


def test_bits_per_byte_counts_the_bytes_of_the_text(model, workdir, report):
  nats = n_bytes = 0
  for doc in documents(workdir, 'texts'):
    tokens = [model.bos, *model.tokenizer.encode(doc['text']).ids]
    pairs = windows(tokens, MAX_LENGTH)
    nats -= sum(answer[0] for answer in in_full(model, pairs))
    n_bytes += len(doc['text'].encode())
  assert report['results']['texts']['bits_per_byte,none'] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-6)


def test_exact_matches_are_those_of_our_own_generation(model, workdir):
  tasks = workdir.parent / 'own'
  docs = documents(workdir, 'writing')[:6]
  (tasks.mkdir(), make_tasks(tasks))
  prompts = [model.prompt(doc['question']) for doc in docs]
  written = decode.generate(model.params, model.model, model.compute, prompts, eos=model.eos, max_tokens=12, temperature=0.0)
  for i, (doc, tokens) in enumerate(zip(docs, written)):
    doc['choices'] = [(model.tokenizer.decode(tokens).split('.')[0].split('\n')[0] if i < 4 else '') + 'x' * (i == 3)] * 4
  (tasks / 'writing.jsonl').write_text(''.join(json.dumps(doc) + '\n' for doc in docs))
  found = harness.run(model, ['writing'], task_dir=str(tasks))['results']['writing']['exact_match,none']
  assert found == 3 / 6


def evaluate(*flags: str, code: int = 0) -> str:
  """stdout of the command, or stderr where it fails."""
  done = subprocess.run([sys.executable, '-m', 'maxlm.evaluate', *flags], cwd=ROOT, capture_output=True, text=True,
                        timeout=600, env=os.environ | {'HF_HUB_OFFLINE': '1'})
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stderr


def test_the_command_reports_what_the_library_does(workdir, report, tmp_path):
  flags = f'--checkpoint={workdir}', f'--task_dir={workdir.parent / "tasks"}', f'--cache={tmp_path}'
  out = json.loads(evaluate(*flags, '--tasks=choices,letters,texts,writing', '--json'))
  assert out['step'] == 3 and out['samples']['choices'] == {'original': 24, 'effective': 24}
  for task in ('choices', 'letters', 'texts', 'writing'):
    expected = {name: value for name, value in report['results'][task].items() if isinstance(value, float)}
    assert {name: out['tasks'][task][name] for name in expected} == pytest.approx(expected, rel=1e-5)
  table = evaluate(*flags, '--tasks=choices', '--num_fewshot=2', '--limit=3', '--batch_size=1')
  assert 'choices' in table and 'acc_norm' in table and '|     2|' in table


@pytest.mark.parametrize('flags, says', [
  (('--tasks=choice', '--task_dir={tasks}'), "no task 'choice'"),
  (('--tasks=choices', '--task_dir=nowhere'), '--task_dir=nowhere: no such directory'),
  (('--tasks=elsewhere', '--task_dir={tasks}'), "'nobody/nothing'"),
  (('--tasks=choices', '--limit=0'), '--limit=0 must be at least 1'),
  (('--limit=3',), '--limit=3 goes with --tasks'),
], ids=lambda value: value if isinstance(value, str) else ' '.join(value))
def test_mistakes_are_one_line(workdir, flags, says):
  tasks = workdir.parent / 'tasks'
  (tasks / 'elsewhere.yaml').write_text('task: elsewhere\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n'
                                        'test_split: test\ndoc_to_text: "x"\ndoc_to_target: 0\ndoc_to_choice: ["a", "b"]\n')
  error = evaluate(f'--checkpoint={workdir}', *[flag.format(tasks=tasks) for flag in flags], code=2)
  lines = [line for line in error.splitlines() if not line.startswith(('W', 'I'))]
  assert len(lines) == 1 and says in lines[0], error


def test_the_harness_is_imported_for_tasks_only():
  code = "import sys, maxlm.evaluate; print('lm_eval' in sys.modules or 'maxlm.harness' in sys.modules)"
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
  assert done.stdout.strip() == 'False'
