"""Puzzles: every answer, and every step on the way to it, is found again from the text alone, in another way."""

import contextlib
import io
import re
import sys
from fractions import Fraction

import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build
from data_pipeline.recipe import Recipe
from data_pipeline.sources.puzzles import Puzzles

KINDS = ('arithmetic', 'algebra', 'sorting', 'code_trace', 'retrieval')


def read(**fields) -> list:
  source = Puzzles(**fields)
  return [raw for unit in source.fetch(None) for raw in source.read(unit)]


def verify(kind: str, text: str) -> int:
  """How many problems a document has. AssertionError where an answer or a step is wrong."""
  if kind == 'retrieval':
    return _verify_retrieval(text)
  problems = re.split(r'(?<=\d)\n\n(?=What)', text) if kind == 'code_trace' else text.split('\n\n')
  for problem in problems:
    {'arithmetic': _verify_arithmetic, 'algebra': _verify_algebra, 'sorting': _verify_sorting,
     'code_trace': _verify_code}[kind](problem)
  return len(problems)


def _verify_arithmetic(problem: str) -> None:
  first, *steps, answer = problem.split('\n')
  shown = [first.removeprefix('Compute ').removesuffix('.'), *(step.removeprefix('= ') for step in steps)]
  values = {eval(re.sub(r'\d+', r'Fraction(\g<0>)', text)) for text in shown}
  assert values == {int(answer.removeprefix('Answer: '))}, problem
  operations = [len(re.findall(r' [-+*/] ', text)) for text in shown]
  assert operations == list(range(len(steps), -1, -1)), problem  # each step does one


def _verify_algebra(problem: str) -> None:
  """A line is an equation of first degree: two values of each side decide it."""
  name, first, rest = re.match(r'Solve for (\w): (.*?)\n(.*)', problem, re.S).groups()
  *steps, check, answer = rest.split('\n')

  def at(side, x):
    return eval(re.sub(r'(?<=[\d)])(?=[(\w])(?<!\d)|(?<=\d)(?=[(a-z])', '*', side), {name: Fraction(x)})

  for equation in (first, *steps):
    left, right = equation.split(' = ')
    at_0, at_1 = (at(left, x) - at(right, x) for x in (0, 1))
    assert at_0 / (at_0 - at_1) == int(answer.removeprefix('Answer: ')), problem
  assert check == f'Check: both sides are {at(first.split(" = ")[0], int(answer[8:]))}.'
  assert steps[-1] == f'{name} = {answer[8:]}'


def _verify_sorting(problem: str) -> None:
  first, *merges, answer = problem.split('\n')
  order, items = re.fullmatch(r'Sort in (\w+) order: (.*)', first).groups()
  key = lambda item: int(item) if item.isdigit() else item
  for line in (*merges, answer):
    runs = [run.split(', ') for run in line.partition(': ')[2].split(' | ')]
    assert sorted(item for run in runs for item in run) == sorted(items.split(', '))
    assert all(run == sorted(run, key=key, reverse=order == 'descending') for run in runs), problem
  assert len(runs) == 1 and len(merges) == len(items.split(', ')).bit_length() - 1


def _verify_code(problem: str) -> None:
  """Python itself runs the program, and says what each line did."""
  _, source, trace = problem.split('\n\n')
  *steps, answer = trace.split('\n')
  n_set = next(i for i, line in enumerate(source.split('\n')) if not re.fullmatch(r'[a-d] = \d+', line))
  seen, frames = [], []

  def watch(frame, event, argument):
    if frame.f_code.co_filename == 'puzzle' and event == 'line':
      frames.append((frame.f_lineno, dict(frame.f_locals)))
    return watch

  out, names = io.StringIO(), {}
  program = compile(source, 'puzzle', 'exec')
  with contextlib.redirect_stdout(out):
    before = sys.gettrace()
    sys.settrace(watch)
    try:
      exec(program, names)
    finally:
      sys.settrace(before)
  assert out.getvalue() == answer.removeprefix('Answer: ') + '\n', problem
  lines = source.split('\n')
  for (number, values), (following, after) in zip(frames, frames[1:]):
    text = lines[number - 1].strip()
    if (loop := re.match(r'for (\w)', text)) and lines[following - 1].startswith(lines[number - 1].split('for')[0] + '    '):
      seen.append((number, f'{loop[1]} = {after[loop[1]]}'))
    elif text.startswith('if '):
      a, sign, b = text[3:-1].split()
      holds = eval(f'{a} {sign} {b}', {}, values)
      seen.append((number, f'{values.get(a, a)} {sign} {values.get(b, b)} is {holds}'))
    elif number > n_set and ' = ' in text:
      name, _, value = text.partition(' = ')
      seen.append((number, f'{name} = {" ".join(str(values.get(word, word)) for word in value.split())} = {after[name]}'))
  assert [f'line {number}: {text}' for number, text in seen] == steps, problem


def _verify_retrieval(text: str) -> int:
  table, *questions = re.split(r'\n\nWhat is the code of ', text)
  entries = dict(line.split(': ') for line in table.split('\n')[2:])
  for question in questions:
    name, answer = re.fullmatch(r'(\S+)\?\nAnswer: (.*)', question).groups()
    way = [entries[name].removeprefix('see ')]
    while way[-1] in entries:
      way.append(entries[way[-1]].removeprefix('see '))
    assert way == answer.split(', ') and way[-1].isdigit(), question
  return len(questions)


@pytest.mark.parametrize('level', [1, 2, 3, 5])
@pytest.mark.parametrize('kind', KINDS)
def test_every_answer_and_every_step_is_right(kind, level):
  documents = read(documents=100, kinds=(kind,), levels=(level,), characters=600)
  assert sum(verify(kind, raw.content) for raw in documents) >= 100
  assert len({raw.content for raw in documents}) == len({raw.url for raw in documents}) == 100


@pytest.mark.parametrize('kind', KINDS)
def test_a_wrong_answer_is_found(kind):
  text = read(documents=1, kinds=(kind,), levels=(3,))[0].content
  answers = list(re.finditer(r'(?m)^Answer: (.*)$', text))
  for answer in answers:
    wrong = answer[1].split(', ')[::-1] if kind == 'sorting' else [answer[1] + '1']
    with pytest.raises((AssertionError, ValueError)):
      verify(kind, text[:answer.start(1)] + ', '.join(wrong) + text[answer.end(1):])


def test_a_document_depends_on_its_number_and_the_seed_alone():
  few, many = read(documents=30), read(documents=90)
  assert [raw.content for raw in few] == [raw.content for raw in many[:30]]
  assert len({tuple(raw.url.split('/')[:3]) for raw in many}) == 15  # 5 kinds of 3 levels take turns
  assert not {raw.content for raw in few} & {raw.content for raw in read(documents=30, seed=1)}


@pytest.mark.parametrize('level', [1, 4])
def test_a_table_is_as_long_as_it_should_be_and_asks_all_over_it(level):
  document, = read(documents=1, kinds=('retrieval',), levels=(level,), characters=300_000)
  assert verify('retrieval', document.content) == 4
  assert 0.9 * 300_000 < len(document.content) < 1.1 * 300_000
  places = []
  for document in read(documents=100, kinds=('retrieval',), levels=(level,), characters=20_000):
    assert 0.9 * 20_000 < len(document.content) < 1.1 * 20_000
    places += [document.content.index(f'\n{name}: ') / len(document.content)
               for name in re.findall(r'code of (\S+)\?', document.content)]
  tenths = [sum(tenth <= 10 * place < tenth + 1 for place in places) for tenth in range(10)]
  assert min(tenths) >= 15 and max(tenths) <= 70, tenths  # of 400, 40 each; the ends are shorter


def test_a_corpus_of_puzzles_is_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
  monkeypatch.setattr('data_pipeline.sources.puzzles._DOCUMENTS_A_SHARD', 20)
  recipe = Recipe(name='puzzles', sources=(Puzzles(documents=60, characters=500),), vocab_size=300, seq_lens=(64,),
                  validation_fraction=0.1, min_bytes=100)
  hashes = []
  for workers in (1, 2):
    out = build(recipe, tmp_path / str(workers), workers=workers)
    hashes.append({path.name: path.read_bytes() for path in sorted((out / 'rows-64').rglob('*.arrayrecord'))})
  assert hashes[0] == hashes[1] and len(hashes[0]) >= 3
  documents = pq.read_table(out / 'documents' / 'puzzles', columns=['url', 'text', 'lineage']).to_pylist()
  assert len(documents) == 60 and all(verify(row['url'].split('/')[1], row['text']) for row in documents)


@pytest.mark.parametrize('fields, says', [
  ({'kinds': ('chess',)}, 'no puzzles of kind chess'), ({'kinds': ()}, 'no puzzles of kind'), ({'levels': (0,)}, 'levels='),
  ({'levels': (11,)}, 'from 1 to 10'), ({'documents': 0}, 'at least 1'), ({'characters': 0}, 'at least 1')])
def test_a_source_that_cannot_be_is_refused(fields, says):
  with pytest.raises(ValueError, match=re.escape(says)):
    Puzzles(**{'documents': 1, **fields})
