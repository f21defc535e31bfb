"""Long-range tasks: a program that only reads the text finds every answer, and one that only knows the form finds as many as
chance says; in training data and in evaluation, which ask for other names."""

import random
import re
from collections import Counter

import corpora
import pyarrow.parquet as pq
import pytest

from data_pipeline import long_range
from data_pipeline.build import build
from data_pipeline.recipe import Recipe
from data_pipeline.sources.long_range import LongRange
from data_pipeline.sources.text_files import TextFiles


def look_up(asked: str, text: str) -> str:
  """The answer, from nothing but what is written."""
  said = re.findall(r'\bNote ([a-z]+) ([a-z]+)\.', text)
  if asked == 'Question: the most common word is':
    return ' ' + Counter(text.removeprefix('Words: ').split()).most_common(1)[0][0]
  if counted := re.fullmatch(r'Question: times that (\w+) is there:', asked):
    return f' {len(re.findall(rf"(?<!\w){counted[1]}(?!\w)", text.lower()))}'
  name, = re.fullmatch(r'Question: (\w+)', asked).groups()
  found = [value for key, value in said if key == name]
  while len(found) == 1 and found[0] in dict(said):
    return ' ' + ' '.join([found[0], *look_up(f'Question: {found[0]}', text).split()])
  return ' ' + ' '.join(found)


def made(task: str, size: int, n: int, **how) -> list[long_range.Problem]:
  return [long_range.problem(task, size, f'{size}/{i}', **how) for i in range(n)]


@pytest.mark.parametrize('size', [1, 20, 300])
@pytest.mark.parametrize('task', long_range.TASKS)
def test_looking_up_finds_every_answer_and_guessing_finds_as_many_as_chance_says(task, size):
  n, chance, guess = 400, [], random.Random(3)
  hits = 0
  for problem in made(task, max(size, 7), n, held_out=True):
    for question in problem.questions:
      assert look_up(question.asked, problem.text) == question.answer and 0 <= question.depth <= 1
    first = problem.questions[0]
    assert first.answer in first.choices and len(set(first.choices)) == len(first.choices) > 1
    chance.append(1 / len(first.choices))
    hits += guess.choice(first.choices) == first.answer
  expected = sum(chance)
  assert abs(hits - expected) < 4 * (expected * (1 - expected / n)) ** 0.5


@pytest.mark.parametrize('task', long_range.TASKS)
def test_a_problem_has_the_wanted_number_of_tokens_nearly(task):
  count = lambda text: len(re.findall(r'\w+|[^\w\s]', text))
  for tokens in (64, 256, 2000):
    problem = long_range.fitted(task, tokens, count, 'x', held_out=True)
    assert tokens - 12 <= count(problem.document(1)) <= tokens
    assert look_up(problem.questions[0].asked, problem.text) == problem.questions[0].answer
  with pytest.raises(ValueError, match='too short for the task'):
    long_range.fitted(task, 5, count, 'x')
  with pytest.raises(ValueError, match='3 sentences are too few for 2000 tokens'):
    long_range.fitted('needle', 2000, count, 'x', sentences=['One is here.', 'Two is there.', 'Three.'])


def test_places_are_all_over_the_text():
  depths = [problem.questions[0].depth for problem in made('multi_key', 50, 400)]
  for i in range(4):
    assert 60 < sum(i / 4 <= depth < (i + 1) / 4 for depth in depths) < 140
  for problem in made('needle', 200, 20):
    question = problem.questions[0]
    at = re.search(rf'\bNote {question.asked.split()[1]} ', problem.text).start() / len(problem.text)
    assert abs(at - question.depth) < 0.05


def test_names_that_evaluation_asks_for_are_asked_for_nowhere_in_training_but_stand_there():
  asked = {held_out: {problem.questions[0].asked for task in ('needle', 'multi_key', 'tracking', 'multi_value')
                      for problem in made(task, 3, 300, held_out=held_out)} for held_out in (False, True)}
  assert not asked[False] & asked[True] and {side: len(some) for side, some in asked.items()} == {
    False: len(long_range.ASKED), True: len(long_range.HELD_OUT)}
  text = ' '.join(problem.text for problem in made('needle', 30, 100))
  assert {question.split()[1] for question in asked[True]} <= set(text.replace('.', '').split())


def read(source) -> list:
  return [raw for unit in source.fetch(None) for raw in source.read(unit)]


def test_documents_of_the_source_are_right_and_always_the_same():
  source = LongRange(documents=120, characters=(100, 2000))
  raws = read(source)
  assert raws == read(source) and len(raws) == 120 and raws != read(LongRange(documents=120, characters=(100, 2000), seed=1))
  sizes = Counter()
  for raw in raws:
    text, *questions = re.split(r'\n(?=Question)', raw.content)
    assert questions
    for question in questions:
      asked, answer = re.fullmatch(r'(Question: (?:.*:|the most common word is|\w+))( [^:]*)', question).groups()
      assert look_up(asked, text) == answer
    sizes[len(text) > 1000] += 1
  assert min(sizes.values()) > 50


def test_real_documents_are_counted_in_and_searched(tmp_path):
  (tmp_path / 'text').mkdir()
  for i in range(40):
    (tmp_path / 'text' / f'{i}.txt').write_text(corpora.made_up_text(i, 400).replace('_', ''), encoding='utf-8')
  texts = TextFiles(name='texts', pattern=f'{tmp_path}/text/*.txt')
  source = LongRange(name='questions', of=texts, documents=30, characters=(600, 100_000), tasks=('multi_key', 'counting'))
  recipe = Recipe(name='r', sources=(texts, source), vocab_size=300, seq_lens=(64,), validation_fraction=0.1, min_bytes=20)
  root = build(recipe, tmp_path / 'out', workers=1)
  rows = pq.read_table(root / 'documents' / 'questions').to_pylist()
  urls = {row['url'] for row in pq.read_table(root / 'documents' / 'texts').to_pylist()}
  assert len(rows) == 30 and {row['url'].removesuffix('#questions') for row in rows} <= urls
  kinds = Counter()
  for row in rows:
    text, *questions = re.split(r'\n(?=Question)', row['text'])
    for question in questions:
      asked, answer = re.fullmatch(r'(Question: (?:.*:|\w+))( \w+)', question).groups()
      assert look_up(asked, text) == answer
      kinds['times' in asked] += 1
  assert min(kinds.values()) > 5


@pytest.mark.parametrize('fields, says', [
  (dict(tasks=('haystack',)), 'no tasks haystack: there are needle'), (dict(tasks=()), r'no tasks \(\)'),
  (dict(documents=0), 'at least 1'), (dict(characters=()), 'at least 1'), (dict(facts=0), 'from 1 to'),
  (dict(facts=100), 'from 1 to')])
def test_fields_that_make_no_documents_are_refused(fields, says):
  with pytest.raises(ValueError, match=says):
    LongRange(**dict(documents=3) | fields)
