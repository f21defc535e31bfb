"""Questions whose answers lie far back in a text: made by rule, with one exact answer each, at any length.

The kinds are those of RULER (Hsieh et al. 2024, arXiv:2404.06654), in plain sentences:

    needle        one fact in the text; it is asked for
    multi_key     several facts of one form; one is asked for
    multi_value   several facts of one name; all are asked for, in their order
    tracking      facts that lead from name to name to a value: the whole way is asked for
    common        a list of words: the most frequent one
    counting      how often a word stands in the text

`problem` makes one, for training (`sources/long_range.py`) as for evaluation (`maxlm.tasks`). What is asked in
evaluation has the names that are nowhere asked for in training, where they stand in the text around: to find an unknown
name is a skill, and cannot be remembered.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

TASKS = ('needle', 'multi_key', 'multi_value', 'tracking', 'common', 'counting')
NAMES = tuple(
  'lamp door river stone chair table window garden bottle candle basket bridge castle forest hammer island jacket kettle '
  'ladder market needle orange pencil rabbit saddle ticket valley wagon button camera desert engine feather guitar harbor '
  'insect jungle kitten lemon mirror napkin office parrot quilt rocket shovel temple whistle anchor barrel cannon dragon '
  'eagle farmer helmet jewel knife magnet nest oven paddle queen ribbon sailor tunnel uncle violin wallet yard apple bell '
  'coin drum fence glove horn iron jar leaf moon nail owl pipe ring shoe tent vase wheel arrow bread cloud fork goat hat '
  'jug letter map net paint rope ship tower bag cup dish egg flag grape hill lake mill nut path seed toy well'.split())
HELD_OUT = NAMES[::6]  # that only evaluation asks for; few, for what looks up many names looks up others too
ASKED = tuple(name for name in NAMES if name not in HELD_OUT)
VALUES = tuple('red blue green black white brown grey pink gold silver purple yellow amber coral ivory olive north south '
               'east west spring summer winter tiger lion bear wolf fox deer horse sheep duck'.split())
_VERBS, _WHERE = 'stands lies rests waits sleeps turns moves falls'.split(), 'near behind under above beside'.split()
_WHEN = 'today again now often slowly'.split()
_FACTS = 4  # in a text of multi_key and of tracking, unless another number is asked for
HOPS = 2  # names on a way
_VALUES_OF_ONE, _LISTED, _MOST = 3, 6, 9  # values of a name; words of a list; a count

_PLACES = tuple(i / 1000 for i in range(1000))

Pick = Callable  # of a sequence, one item: all chance comes from here


class Question(NamedTuple):
  """asked: what the text is followed by. answer: what goes on from there, with the space before it. choices: all answers
  that whoever knows the form, but has not read the text, can give; the right one is among them, and a guess right once in
  so many. depth: where in the text the answer stands, 0 its beginning, 1 its end."""

  asked: str
  answer: str
  choices: tuple[str, ...]
  depth: float


class Problem(NamedTuple):
  text: str  # ends in a line break
  questions: list[Question]  # in an order by chance

  def document(self, n_questions: int) -> str:
    return self.text + '\n'.join(q.asked + q.answer for q in self.questions[:n_questions])


def problem(task: str, size: int, seed: str, *, held_out: bool = False, facts: int = _FACTS,
            sentences: list[str] | None = None) -> Problem:
  """size: of the text, in sentences beside those with the facts; in words for 'common'. seed: the same seed with another
  size is the same problem in a shorter or longer text. held_out: of the names for evaluation. facts: how many ('multi_key',
  'tracking'). sentences: what the text is made of (None: of made up sentences)."""
  pick, asked, others = pick_of(f'{seed}/{task}'), *((HELD_OUT, ASKED) if held_out else (ASKED, HELD_OUT))
  if task == 'common':
    return _common(size, pick, pick_of(f'{seed}/order'), asked)
  made = (_sentence(fill, others) for fill in itertools.repeat(pick_of(f'{seed}/text')))
  around = list(itertools.islice(made, size)) if sentences is None else sentences[:size]
  if task == 'counting':
    return _counting(around, pick, None if sentences else asked)
  stated, questions = _facts(task, facts, pick, asked)
  places = [int(place * (len(around) + 1)) for _, place in stated]
  lines = [[] for _ in range(len(around) + 1)]
  for (fact, _), place in zip(stated, places):
    lines[place].append(fact)
  parts = [part for before, after in itertools.zip_longest(lines, around) for part in (*before, after) if part]
  return Problem('Text: ' + ' '.join(parts) + '\n', _shuffled(questions, pick))


def fitted(task: str, tokens: int, count: Callable[[str], int], seed: str, *, held_out: bool = False,
           sentences: list[str] | None = None) -> Problem:
  """The longest problem of this seed that is, with its first question and the answer, at most so many `tokens`.

  count: tokens of a text. ValueError where even the shortest problem is longer, or `sentences` are too few.
  """
  make = lambda size: problem(task, size, seed, held_out=held_out, sentences=sentences)
  fits = lambda size: count(make(size).document(1)) <= tokens
  low, high = _LISTED + 1 if task == 'common' else 0, 2 * _LISTED
  if not fits(low):
    raise ValueError(f'a text of {tokens} tokens is too short for the task {task!r}: give more')
  while fits(high) and (sentences is None or high < len(sentences)):
    low, high = high, 2 * high
  if sentences is not None and high > len(sentences) and fits(len(sentences)):
    raise ValueError(f'{len(sentences)} sentences are too few for {tokens} tokens: give a longer text')
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return make(low)


def split_sentences(text: str) -> list[str]:
  """The sentences and lines of a text, without white space around and within them."""
  return [' '.join(part.split()) for part in re.split(r'(?<=[.!?])\s+|\n+', text) if part.strip()]


# -- facts


def _fact(name: str, value: str) -> str:
  return f'Note {name} {value}.'


def _asked(name: str) -> str:
  return f'Question: {name}'


def _facts(task: str, n: int, pick: Pick, names: tuple[str, ...]) -> tuple[list[tuple[str, float]], list[Question]]:
  """([(sentence, where it goes, 0 to 1)], questions)."""
  if task == 'needle':
    name, value, place = pick(names), pick(VALUES), pick(_PLACES)
    return [(_fact(name, value), place)], [Question(_asked(name), f' {value}', tuple(f' {v}' for v in VALUES), place)]
  if task == 'multi_key':
    pairs = list(zip(_some(names, n, pick), _some(VALUES, n, pick)))
    places, choices = [pick(_PLACES) for _ in pairs], tuple(f' {value}' for _, value in pairs)
    return ([(_fact(*pair), place) for pair, place in zip(pairs, places)],
            [Question(_asked(name), f' {value}', choices, place) for (name, value), place in zip(pairs, places)])
  if task == 'multi_value':
    (name, other), values = _some(names, 2, pick), _some(VALUES, _VALUES_OF_ONE + 1, pick)
    places = sorted(pick(_PLACES) for _ in values[1:])
    stated = [(_fact(name, value), place) for value, place in zip(values[1:], places)]
    choices = tuple(' ' + ' '.join(some) for some in itertools.permutations(values, _VALUES_OF_ONE))
    return ([*stated, (_fact(other, values[0]), pick(_PLACES))],
            [Question(_asked(name), ' ' + ' '.join(values[1:]), choices, places[0])])
  on_ways, stated, questions = _some(names, n * HOPS, pick), [], []
  for i, value in enumerate(_some(VALUES, n, pick)):
    way = on_ways[i * HOPS:(i + 1) * HOPS]
    steps = [*way, value]
    places = [pick(_PLACES) for _ in way]
    stated += [(_fact(a, b), place) for a, b, place in zip(steps, steps[1:], places)]
    questions.append((way[0], ' ' + ' '.join(steps[1:]), min(places)))
  choices = tuple(answer for _, answer, _ in questions)
  return stated, [Question(_asked(name), answer, choices, place) for name, answer, place in questions]


# -- aggregation


def _common(n_words: int, pick: Pick, order: Pick, names: tuple[str, ...]) -> Problem:
  """A list in which one word stands oftener than each of the others, by half at least."""
  words = _some(names, _LISTED, pick)
  n_words = max(n_words, _LISTED + 1)
  each = max(1, n_words * 2 // (3 + 2 * (_LISTED - 1)))
  counts = [n_words - each * (_LISTED - 1), *[each] * (_LISTED - 1)]
  listed = [word for word, n in zip(words, counts) for _ in range(n)]
  text = f'Words: {" ".join(_shuffled(listed, order))}\n'
  choices = tuple(f' {word}' for word in sorted(words))
  return Problem(text, [Question('Question: the most common word is', f' {words[0]}', choices, 0.0)])


def _counting(sentences: list[str], pick: Pick, names: tuple[str, ...] | None) -> Problem:
  """names: one of them is put into the sentences so often; None: what is counted stands there already."""
  choices = tuple(f' {n}' for n in range(1, _MOST + 1))
  if names is None:
    counts = Counter(word for sentence in ('Text', *sentences) for word in _words(sentence))
    known = [[word for word in sorted(counts) if counts[word] == n] for n in range(1, _MOST + 1)]
    word, text = pick(pick([words for words in known if words] or [['the']])), 'Text: ' + ' '.join(sentences)
    return Problem(text + '\n', [_count_of(word, counts[word], choices)] if 1 <= counts[word] <= _MOST else [])
  word, n = pick(names), pick(range(1, _MOST + 1))
  lines = [*sentences, *[f'Here is the {word}.'] * n]
  return Problem('Text: ' + ' '.join(_shuffled(lines, pick)) + '\n', [_count_of(word, n, choices)])


def _count_of(word: str, n: int, choices: tuple[str, ...]) -> Question:
  return Question(f'Question: times that {word} is there:', f' {n}', choices, 0.0)


def _words(text: str) -> list[str]:
  """Words of four letters and more, in small letters, as they are counted."""
  return re.findall(r'(?<![\w])[a-z]{4,}(?![\w])', text.lower())


# -- chance and made up text


def pick_of(seed: str) -> Pick:
  numbers = random.Random(seed)
  return lambda options: options[int(numbers.random() * len(options))]  # the sequence of random() is promised to stay


def _shuffled(items: list, pick: Pick) -> list:
  keys = [pick(range(1 << 40)) for _ in items]
  return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def _some(items: tuple[str, ...], n: int, pick: Pick) -> list[str]:
  return _shuffled(list(items), pick)[:n]


def _sentence(pick: Pick, names: tuple[str, ...]) -> str:
  return f'The {pick(names)} {pick(_VERBS)} {pick(_WHERE)} the {pick(names)} {pick(_WHEN)}.'
