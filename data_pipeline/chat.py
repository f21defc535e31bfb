"""Conversations: what a line of a chat file may be, its text in a template, its tokens, and which of them are trained on.

A line is one JSON object. Trained on is what the assistant says, the completion, or all of the text:

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

**The mask is exact by construction.** A conversation is tokenised once for each answer as the model will see it when it is
asked (all text up to the answer) and once with the answer. The first must be the beginning of the second, token for token;
then the rest is the answer, the mark that ends it included. Where a token would join the two, or where a template
changes what came before, the conversation is left out and counted: no token is ever half trained on.

**Our template needs no new token**, so that a base model's embeddings need not learn one: a turn is `User: …` and an empty
line, the answer ends as a document does, with the end of text. A model with a chat template of its own keeps that one; such
templates are programs in Jinja and run in its sandbox (extra `chat`).
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import tokenizers

ROLES = ('system', 'user', 'assistant')

# What `Template.render` does without Jinja, for programs that have it: transformers, vLLM.
OURS = ("{{ bos_token | default(eos_token, true) }}"
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + message['content'] | trim + eos_token }}"
        "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '\n\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")

# Why a conversation is left out when it is tokenised.
TOO_LONG, JOINED, SPECIAL = 'too long', 'tokens join prompt and answer', 'spells a special token'
REFUSED = 'refused by the template'
_RECORDS_A_CALL = 256


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class ChatFormat:
  """How the conversations of a source become rows.

  too_long: what becomes of one that is longer than a row: 'drop', or 'split' into rows, of which the later ones begin in
  its middle. template: path of a Jinja file ('': the one beside the tokenizer, and ours where there is none).
  """

  too_long: Literal['drop', 'split'] = 'drop'
  template: str = ''


# -- a line


def canonical(line: bytes) -> str:
  """A line of a chat file as JSON of one form: the conversation up to its last answer, or {"rejected": why, "line": …}."""
  try:
    record = _checked(line)
  except ValueError as error:
    record = {'rejected': str(error), 'line': line.decode('utf-8', errors='replace').rstrip('\r\n')}
  return json.dumps(record, ensure_ascii=False)


def _checked(line: bytes) -> dict:
  """The object of a line without what we do not use. ValueError with a reason of few words, to be counted."""
  try:
    record = json.loads(line.decode('utf-8'))
    json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, and no text
  except UnicodeError:
    raise ValueError('not UTF-8') from None
  except (ValueError, RecursionError):
    raise ValueError('not JSON') from None
  if not isinstance(record, dict):
    raise ValueError('not an object')
  if 'messages' not in record and 'completion' in record:
    if not all(isinstance(record.get(name), str) for name in ('prompt', 'completion')):
      raise ValueError('prompt or completion is no text')
    return {'prompt': record['prompt'], 'completion': _filled(record['completion'])}
  if 'messages' not in record and isinstance(record.get('text'), str):
    return {'text': _filled(record['text'])}
  messages = record.get('messages')
  if not isinstance(messages, list):
    raise ValueError('no messages')
  messages = [_checked_message(message) for message in messages]
  while messages and messages[-1]['role'] != 'assistant':
    messages.pop()  # nobody answers it
  if not messages:
    raise ValueError('no answer')
  return {'messages': messages}


def _checked_message(message) -> dict:
  if not isinstance(message, dict) or 'role' not in message:
    raise ValueError('a message without a role')
  if message['role'] not in ROLES:
    raise ValueError('unknown role')
  if not isinstance(message.get('content'), str):
    raise ValueError('a message without text')
  return {'role': message['role'], 'content': _filled(message['content'])}


def _filled(text: str) -> str:
  if not text.strip():
    raise ValueError('an empty text')
  return text


def rejection(document: str) -> str | None:
  """Why `canonical` rejected a line; None for a conversation."""
  return json.loads(document).get('rejected')


def words(document: str) -> str:
  """All that is said in a conversation, for a tokenizer to learn from."""
  return '\n\n'.join(_said(json.loads(document)))


def _said(record: dict) -> list[str]:
  return [message['content'] for message in record['messages']] if 'messages' in record else list(record.values())


# -- its text


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
  """How a conversation is written. source: in Jinja, or '' for ours. bos, eot: the texts of the tokens that begin and
  end a document."""

  source: str
  bos: str
  eot: str

  def render(self, messages: list[dict], ask: bool) -> str:
    """The text of the messages; ask: up to where the assistant's next answer begins. ValueError if the template refuses."""
    if self.source not in ('', OURS):
      return _rendered(self.source, messages, ask, self.bos, self.eot)
    turns = [f'Assistant: {message["content"].strip()}{self.eot}' if message['role'] == 'assistant' else
             f'{message["role"].capitalize()}: {message["content"].strip()}\n\n' for message in messages]
    return self.bos + ''.join(turns) + 'Assistant:' * ask

  def spans(self, record: dict) -> list[str]:
    """Texts [prompt, with the answer, with the next prompt, …], each the beginning of the next."""
    if 'text' in record:
      return [self.bos, self.bos + record['text'] + self.eot]
    if 'completion' in record:
      prompt = self.bos + record['prompt']
      return [prompt, prompt + record['completion'] + self.eot]
    messages = record['messages']
    answers = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    return [self.render(messages[:end], ask) for i in answers for end, ask in ((i, True), (i + 1, False))]


def _rendered(source: str, messages: list[dict], ask: bool, bos: str, eot: str) -> str:
  import jinja2

  try:
    return _compiled(source).render(messages=messages, add_generation_prompt=ask, bos_token=bos, eos_token=eot)
  except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:  # it is a program
    raise ValueError(str(error)) from error


@functools.cache
def _compiled(source: str):
  """A template as transformers compiles it, but for the date, which would make a corpus depend on the day."""
  try:
    import jinja2.sandbox
  except ImportError:
    raise OSError("the model's chat template is a program in Jinja: pip install -e '.[chat]'") from None

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                             extensions=['jinja2.ext.loopcontrols'])
  environment.globals['raise_exception'] = raise_exception
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise OSError(f'the chat template is not valid Jinja: {error}') from error


# -- its tokens


class Tokenised(NamedTuple):
  streams: list[np.ndarray]  # token ids int32 [n] of each conversation, the tokens that begin and end it included
  counts: list[np.ndarray]  # bool [n]: whether each is trained on where it is the target
  dropped: collections.Counter  # how many were left out, by reason


def tokenise(documents: Iterable[str], tokenizer: tokenizers.Tokenizer, template: Template, *,
             longest: int | None) -> Tokenised:
  """Conversations (as of `canonical`) -> tokens. longest: those of more positions are dropped (None: none is)."""
  tokenizer.encode_special_tokens = False  # those that the template writes are meant
  special = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  done = Tokenised([], [], collections.Counter())
  for batch in _batches(documents, template, special, done.dropped):
    texts = [text for spans in batch for text in spans]
    encodings = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    for spans in batch:
      ids = [np.array(next(encodings).ids, np.int32) for _ in spans]
      counts = _mask(ids, list(special.values()))
      if counts is None:
        done.dropped[JOINED] += 1
      elif longest is not None and len(counts) - 1 > longest:
        done.dropped[TOO_LONG] += 1
      else:
        done.streams.append(ids[-1])
        done.counts.append(counts)
  return done


def _batches(documents: Iterable[str], template: Template, special: Iterable[str],
             dropped: collections.Counter) -> Iterator[list[list[str]]]:
  """The spans of conversations, some hundreds at a time."""
  batch = []
  for document in documents:
    record = json.loads(document)
    if any(token in text for text in _said(record) for token in special):
      dropped[SPECIAL] += 1  # it could end a turn or begin another
      continue
    try:
      batch.append(template.spans(record))
    except ValueError as error:
      dropped[f'{REFUSED}: {error}'] += 1
    if len(batch) == _RECORDS_A_CALL:
      yield batch
      batch = []
  yield batch


def _mask(spans: list[np.ndarray], special: list[int]) -> np.ndarray | None:
  """Whether each token of the last span is an answer's. spans: [prompt, with the answer, …]; None unless each begins the
  next."""
  counts = np.zeros(len(spans[-1]), bool)
  for i, (before, after) in enumerate(zip(spans, spans[1:])):
    if not np.array_equal(before, after[:len(before)]):
      return None
    if i % 2 == 0:
      ends, = np.nonzero(np.isin(after[len(before):], special))
      # What a template writes after the mark that ends a turn, such as a line break, nobody has to predict.
      counts[len(before):len(before) + ends[-1] + 1 if len(ends) else len(after)] = True
  return counts
