"""Tasks that a run is scored on as it goes, made by rule or read from local files: exact answers, choices, bits per byte.

    EvalConfig(every_steps=200, tasks=(LongRangeTasks(lengths=(256, 1024)), PuzzleTasks(kinds=('arithmetic',)),
                                       FileTask(name='quiz', path='tasks/quiz.jsonl')))

A task is prepared once, into requests for `maxlm.continuations`, and answered at each evaluation. An answer is right where
each of its tokens is the likeliest one after those before it: what greedy decoding would write.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from data_pipeline import loader, long_range, puzzles
from data_pipeline.tokenizer import load
from maxlm.continuations import ROW, Answer, Request, Scorer
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig

Encode = Callable[[str], list[int]]  # text -> tokens, the first of which begins a document

_AROUND_ROWS = 512  # held-out rows, at most, that a text is made of


@dataclasses.dataclass(kw_only=True, slots=True)
class LongRangeTasks:
  """Questions on long texts (`data_pipeline.long_range`). lengths: tokens of text, question and answer, at most, and
  nearly. examples: of each task and length. around: the source whose held-out text the facts stand in ('': made up)."""

  tasks: tuple[str, ...] = ('needle', 'multi_key', 'tracking', 'common')
  lengths: tuple[int, ...]
  examples: int = 64
  around: str = ''


@dataclasses.dataclass(kw_only=True, slots=True)
class PuzzleTasks:
  """Problems of `data_pipeline.puzzles` that are worked out: right is every step, and the answer."""

  kinds: tuple[str, ...] = ('arithmetic',)
  level: int = 1
  examples: int = 64


@dataclasses.dataclass(kw_only=True, slots=True)
class FileTask:
  """A local file of JSON lines, of which the first `examples` are taken (0: all).

  {"question": …, "choices": […], "answer": 1}: right where the right choice is the likeliest one.
  {"question": …, "answer": "…"}: right where each token of the answer is; and bits per byte of the answers.
  {"text": …}: bits per byte.
  """

  name: str
  path: str
  examples: int = 0


class Part(NamedTuple):
  """Examples that make a number in the record. requests: of each example, one for each choice, or one alone. gold: which
  choice is right; None where there are none. chance: share that guessing gets right (None: nothing is right or wrong).
  n_bytes: of the continuations, whose bits per byte count; 0 where they do not."""

  name: str
  requests: list[list[Request]]
  gold: list[int] | None
  chance: float | None
  n_bytes: int = 0


def pair(encode: Encode, context: str, continuation: str) -> Request:
  """Of the tokens of the whole text, those that the context has too, and those from the first other one on."""
  before, whole = encode(context), encode(context + continuation)
  n = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), len(before))
  n = min(n, len(whole) - 1)
  return whole[:n], whole[n:]


def check(specs: tuple, longest: int, where: str = 'evals.tasks') -> None:
  """ValueError, in one line, for tasks that do not exist, and lengths beyond the longest rows of the run."""
  for i, spec in enumerate(specs):
    at = f'{where}[{i}]'
    if isinstance(spec, LongRangeTasks):
      if unknown := [task for task in spec.tasks if task not in long_range.TASKS]:
        raise ValueError(f'{at}: there is no task {unknown[0]!r}, only {", ".join(long_range.TASKS)}')
      if not spec.tasks or not spec.lengths or min(spec.lengths) < 64:
        raise ValueError(f'{at}: needs tasks, and lengths of 64 tokens and more; has tasks={spec.tasks}, '
                         f'lengths={spec.lengths}')
      if max(spec.lengths) > longest:
        raise ValueError(f'{at}: lengths={spec.lengths}, and the longest rows that the run is trained on have {longest} '
                         'tokens: leave out what is longer')
    elif isinstance(spec, PuzzleTasks):
      if unknown := [kind for kind in spec.kinds if kind not in puzzles.PROBLEMS]:
        raise ValueError(f'{at}: there are no problems of kind {unknown[0]!r}, only {", ".join(puzzles.PROBLEMS)}')
      if not spec.kinds or not 1 <= spec.level <= 10:
        raise ValueError(f'{at}: needs kinds, and a level from 1 to 10; has kinds={spec.kinds}, level={spec.level}')
    if spec.examples < (not isinstance(spec, FileTask)):
      raise ValueError(f'{at}.examples={spec.examples} must be at least 1')


# -- examples


def prepared(specs: tuple, encode: Encode, texts: Callable[[str], str]) -> list[Part]:
  """The parts of these tasks, ready to be asked. texts: of a source, what is held out.

  The same tokenizer, and the same held-out text, give the same examples. ValueError or OSError, in one line, for files.
  """
  makers = {LongRangeTasks: lambda spec: _long_range(spec, encode, texts), PuzzleTasks: lambda spec: _puzzles(spec, encode),
            FileTask: lambda spec: [_file(spec, encode)]}
  parts = [part for spec in specs for part in makers[type(spec)](spec)]
  names = [part.name for part in parts]
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f'evals.tasks: there are two tasks {min(twice)}: leave out one, or give it another name')
  return parts


def _long_range(spec: LongRangeTasks, encode: Encode, texts: Callable[[str], str]) -> list[Part]:
  sentences = long_range.split_sentences(texts(spec.around)) if spec.around else None
  count, parts = lambda text: len(encode(text)), []
  for task in spec.tasks:
    for length in spec.lengths:
      problems = []
      for i in range(spec.examples):
        turned = sentences
        if sentences is not None:  # each example begins elsewhere
          first = i * len(sentences) // spec.examples
          turned = sentences[first:] + sentences[:first]
        seed = f'evaluation/{length}/{i}'
        problems.append(long_range.fitted(task, length, count, seed, held_out=True, sentences=turned))
      asked = [problem.questions[0] for problem in problems]
      requests = [[pair(encode, p.text + q.asked, q.answer)] for p, q in zip(problems, asked)]
      chance = sum(1 / len(q.choices) for q in asked) / len(asked)
      parts.append(Part(f'{task}/{length}', requests, None, chance))
  return parts


def _puzzles(spec: PuzzleTasks, encode: Encode) -> list[Part]:
  parts = []
  for kind in spec.kinds:
    requests = []
    for i in range(spec.examples):
      text = puzzles.PROBLEMS[kind](spec.level, long_range.pick_of(f'evaluation/{kind}/{spec.level}/{i}'))
      requests.append([pair(encode, *puzzles.asked_and_answer(kind, text))])
    parts.append(Part(f'{kind}/level{spec.level}', requests, None, 0.0))
  return parts


def _file(spec: FileTask, encode: Encode) -> Part:
  lines = [line for line in pathlib.Path(spec.path).read_text(encoding='utf-8').splitlines() if line.strip()]
  items = [_item(spec, i, line) for i, line in enumerate(lines[:spec.examples or None], 1)]
  kinds = {tuple(sorted(item)) for item in items}
  if len(kinds) != 1:
    raise ValueError(f'{spec.path} has {"lines of several kinds: give each a file of its own" if kinds else "no lines"}')
  name = f'{spec.name}/all'
  if 'text' in items[0]:
    requests = [[pair(encode, '', item['text'])] for item in items]
    return Part(name, requests, None, None, sum(len(item['text'].encode()) for item in items))
  if 'choices' in items[0]:
    requests = [[pair(encode, item['question'], f' {choice}') for choice in item['choices']] for item in items]
    chance = sum(1 / len(item['choices']) for item in items) / len(items)
    return Part(name, requests, [item['answer'] for item in items], chance)
  answers = [f' {item["answer"]}' for item in items]
  return Part(name, [[pair(encode, item['question'], answer)] for item, answer in zip(items, answers)], None, 0.0,
              sum(len(answer.encode()) for answer in answers))


def _item(spec: FileTask, number: int, line: str) -> dict:
  """ValueError for a line that is none of the kinds."""
  try:
    item = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{spec.path}:{number} is no JSON: {error}') from None
  match item:
    case {'text': str(text)} if text:
      return {'text': text}
    case {'question': str(question), 'choices': [_, _, *_] as choices, 'answer': int(answer)} if (
        question and 0 <= answer < len(choices) and all(isinstance(choice, str) and choice for choice in choices)):
      return {'question': question, 'choices': choices, 'answer': answer}
    case {'question': str(question), 'answer': str(answer)} if question and answer:
      return {'question': question, 'answer': answer}
  raise ValueError(f'{spec.path}:{number} has neither a text, nor a question with an answer, nor one with choices and the '
                   'number of the right one, from 0')


# -- in a run


class Tasks:
  """What a run is scored on, prepared: called with a scorer and parameters, it gives the numbers of the record."""

  def __init__(self, specs: tuple, encode: Encode, texts: Callable[[str], str]):
    self.specs, self.parts = specs, prepared(specs, encode, texts)
    self.requests = [request for part in self.parts for requests in part.requests for request in requests]
    self.n_tokens = sum(len(context) + len(continuation) for context, continuation in self.requests)
    self.longest = max((len(context) + len(continuation) - 1 for context, continuation in self.requests), default=1)

  def scorer(self, model: DecoderConfig, compute: ComputeConfig, tokens_at_a_time: int) -> Scorer:
    """compute: resolved. tokens_at_a_time: that are known to fit, such as those of a microbatch."""
    return Scorer(model, compute, max_length=self.longest, batch_size=max(1, tokens_at_a_time // ROW))

  def __call__(self, scorer: Scorer, params: Decoder, go_on: Callable[[], None] = lambda: None) -> dict[str, float]:
    """eval/tasks/<task>/<length or 'all'>: the share that is right; eval/chance/…, where it is not 0; and
    eval/bits_per_byte/<task>. go_on: is called now and then, and may raise. Every host calls it, and gets the same."""
    answers = {}
    for i, answer in scorer(params, self.requests) if self.requests else ():
      if len(answers) % 64 == 0:
        go_on()
      answers[i] = answer
    return scores(self.parts, answers)


def scores(parts: list[Part], answers: dict[int, Answer]) -> dict[str, float]:
  """answers: by number of the request, all parts' one after the other."""
  values, at = {}, 0
  for part in parts:
    mine = []
    for requests in part.requests:
      mine.append([answers[at + i] for i in range(len(requests))])
      at += len(requests)
    if part.chance is not None:
      likeliest = [max(range(len(some)), key=[answer.log_prob for answer in some].__getitem__) for some in mine]
      hits = [some[0].greedy for some in mine] if part.gold is None else [a == b for a, b in zip(likeliest, part.gold)]
      values[f'eval/tasks/{part.name}'] = sum(hits) / len(hits)
      values |= {f'eval/chance/{part.name}': part.chance} if part.chance else {}
    if part.n_bytes:
      nats = -sum(some[0].log_prob for some in mine)
      values[f'eval/bits_per_byte/{part.name.removesuffix("/all")}'] = nats / math.log(2) / part.n_bytes
  return values


def tasks_of(specs: tuple, corpus: loader.Corpus) -> Tasks:
  """For a model that is trained on this corpus."""
  encoder = load(corpus.tokenizer_path)
  encode = lambda text: [corpus.bos, *encoder.encode(text, add_special_tokens=False).ids]
  return Tasks(specs, encode, lambda source: held_out_text(corpus, source))


def held_out_text(corpus: loader.Corpus, source: str) -> str:
  """Text of held-out rows of a source. ValueError where there is none."""
  encoder, pieces = load(corpus.tokenizer_path), []
  if source in corpus.sources:
    for batch in loader.validation_batches(corpus, source, 64, _AROUND_ROWS):
      pieces += [encoder.decode(row[segments > 0].tolist()) for row, segments in zip(batch['tokens'], batch['segment_ids'])]
  if not pieces:
    raise ValueError(f'evals.tasks: around={source!r}: {corpus.directory} has no held-out text of such a source; '
                     f'it has {", ".join(corpus.sources)}')
  return '\n'.join(pieces)
