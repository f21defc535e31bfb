"""Answers requests in OpenAI's form over HTTP: `python -m maxlm.serve --checkpoint=WORKDIR[@STEP] --port=8000`.

    GET /v1/models    POST /v1/completions    POST /v1/chat/completions

Texts that wait and are to be written in the same way (temperature, top_p, max_tokens, stop) are written together, at most
--batch_size at a time; a request with a `seed` only with its own texts, so that it is answered alike each time. What a
request asks for and we cannot do is an error, never left out. Ctrl-C or SIGTERM ends the server within a few dozen tokens.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import http.server
import itertools
import json
import secrets
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from data_pipeline import chat, tokenizer
from maxlm import flags
from maxlm.checkpoint import parse
from maxlm.decode import Generator
from maxlm.load import Model, load
from maxlm.stop import StopSignal

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
HOST = flags.DEFINE_string('host', '127.0.0.1', 'the address to listen at; 0.0.0.0 lets everybody in, without a key')
PORT = flags.DEFINE_integer('port', 8000, 'to listen at; 0: one that is free')
NAME = flags.DEFINE_string('name', '', "of the model in requests (default: the workdir's)")
BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'texts that are written at a time, at most')
MAX_LENGTH = flags.DEFINE_integer('max_length', 0, 'tokens of a prompt and its answer, at most (default: as in training)')

CHAT_TOKENS, COMPLETION_TOKENS = 1024, 16  # of an answer where a request does not say
MAX_BYTES, MAX_ROWS, MAX_WAITING = 8 << 20, 256, 1024  # of a request; texts of a request; texts of all
SECONDS = 60  # that a client may take to send a request
SETTINGS = 8  # temperatures and top_p's whose programs are kept
NOTHING_TO_DO = {'best_of': 1, 'response_format': {'type': 'text'}, 'tool_choice': 'none'}
UNDERSTOOD = {'model', 'prompt', 'messages', 'max_tokens', 'max_completion_tokens', 'temperature', 'top_p', 'n', 'stop',
              'seed', 'user'}


class Refused(Exception):
  """What a client is told instead of an answer."""

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
    kind = 'invalid_request_error' if status < 500 and status != 429 else 'server_error'
    self.status = status
    self.error = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


@dataclasses.dataclass(frozen=True, slots=True)
class How:
  """How texts are written; what has the same `How` may be written together. alone: a number that no other request has."""

  temperature: float
  top_p: float
  max_tokens: int
  stop: tuple[str, ...]
  seed: int | None
  alone: int | None


@dataclasses.dataclass(slots=True, eq=False)
class Row:
  prompt: list[int]
  place: int  # in its request
  how: How
  answer: concurrent.futures.Future  # of (text, finish_reason, number of tokens)


class Writer:
  """Writes the texts that the threads of requests ask for, in the thread that calls `run`."""

  def __init__(self, model: Model, batch_size: int):
    self.model, self.batch_size = model, batch_size
    self._waiting, self._change, self._closed, self._open = collections.deque(), threading.Condition(), False, 0
    self._generator = functools.lru_cache(SETTINGS)(lambda temperature, top_p: Generator(
      model.model, model.compute, eos=model.eos, temperature=temperature, top_p=top_p))

  def write(self, prompts: list[list[int]], how: How) -> list[tuple[str, str, int]]:
    """Called by a request; waits for its texts. Refused where there are too many, or the server ends."""
    rows = [Row(prompt, place, how, concurrent.futures.Future()) for place, prompt in enumerate(prompts)]
    with self._change:
      if self._closed:
        raise Refused(503, 'the server is ending')
      if len(self._waiting) + len(rows) > MAX_WAITING:
        raise Refused(429, 'too many requests are waiting: try again in a while', code='rate_limit_exceeded')
      self._waiting.extend(rows)
      self._change.notify_all()
    return [row.answer.result() for row in rows]

  def __enter__(self):
    """A request is being answered."""
    with self._change:
      self._open += 1

  def __exit__(self, *exc):
    with self._change:
      self._open -= 1
      self._change.notify_all()

  def run(self, stop: StopSignal) -> None:
    """Until `stop` is requested; then tells all who wait, and waits until they have been told."""
    while not stop.requested:
      if batch := self._take():
        self._write(batch, stop)
    with self._change:
      self._closed = True
      for row in self._waiting:
        row.answer.set_exception(Refused(503, 'the server is ending'))
      self._change.wait_for(lambda: not self._open, timeout=5)

  def _take(self) -> list[Row]:
    """The first row that waits and those that can be written with it; none where none has come for a moment."""
    with self._change:
      self._change.wait_for(lambda: self._waiting, timeout=0.2)
      like = [row for row in self._waiting if row.how == self._waiting[0].how][:self.batch_size]
      taken = set(map(id, like))
      self._waiting = collections.deque(row for row in self._waiting if id(row) not in taken)
      return like

  def _write(self, batch: list[Row], stop: StopSignal) -> None:
    how, decode = batch[0].how, self.model.tokenizer.decode
    prompts = [row.prompt for row in batch]
    longest, positions = max(map(len, prompts)), self.model.model.max_positions
    room = size_of(how.max_tokens)
    room = room if positions is None else min(room, positions - longest)
    prompts += prompts[-1:] * (self.batch_size - len(prompts)) * (len(prompts) > 1)  # two sizes to compile: one, and all
    enough = lambda ids: bool(stop.requested) or len(ids) >= how.max_tokens or any(word in decode(ids) for word in how.stop)
    try:
      written = self._generator(how.temperature, how.top_p)(
        self.model.params, prompts, max_tokens=room, columns=size_of(longest), enough=enough,
        seed=secrets.randbits(31) if how.seed is None else how.seed + batch[0].place)
    except jax.errors.JaxRuntimeError as error:  # out of memory, most often
      for row in batch:
        row.answer.set_exception(Refused(500, f'the model failed: {str(error).splitlines()[0]}'))
      return
    for row, ids in zip(batch, written):
      if stop.requested:
        row.answer.set_exception(Refused(503, 'the server is ending'))
      else:
        row.answer.set_result(finished(decode(ids[:how.max_tokens]), min(len(ids), how.max_tokens), how))


def finished(text: str, n_tokens: int, how: How) -> tuple[str, str, int]:
  """(text up to the first of how.stop, why it ends, its tokens as they were written)."""
  cuts = [at for word in how.stop if (at := text.find(word)) >= 0]
  return text[:min(cuts, default=None)], 'stop' if cuts or n_tokens < how.max_tokens else 'length', n_tokens


def size_of(n_tokens: int) -> int:
  """What they are padded to, so that few shapes are compiled: 64, 128, 256, …"""
  return max(64, 1 << (n_tokens - 1).bit_length())


class Service:
  """What is answered: checks requests, makes prompts of them and objects of the texts."""

  def __init__(self, model: Model, workdir: str, name: str, batch_size: int, max_length: int):
    model.check_length(max_length)
    model.prompt('.')  # ValueError without a tokenizer
    self.model, self.name, self.max_length, self.writer = model, name, max_length, Writer(model, batch_size)
    _, facts = tokenizer.facts_of(workdir)
    self.template = chat.Template(facts['chat_template'], facts['bos'], facts['eot'])
    self.template.render([{'role': 'user', 'content': '.'}], ask=True)  # what it cannot do is known now
    self.special = [token.content for token in model.tokenizer.get_added_tokens_decoder().values() if token.special]
    self.card = {'id': name, 'object': 'model', 'created': int(time.time()), 'owned_by': 'maxlm',
                 'max_model_len': max_length}
    self._numbers = itertools.count()

  def get(self, path: str) -> dict[str, Any]:
    if path == '/v1/models':
      return {'object': 'list', 'data': [self.card]}
    if path == f'/v1/models/{self.name}':
      return self.card
    raise Refused(404, f'there is no {path} to get: /v1/models', code='not_found')

  def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path not in ('/v1/completions', '/v1/chat/completions'):
      raise Refused(404, f'there is no {path} to post to: /v1/completions, /v1/chat/completions', code='not_found')
    if body.get('model') not in (self.name, None):
      raise Refused(404, f'there is no model {body["model"]!r}, only {self.name!r}', 'model', 'model_not_found')
    for name, value in body.items():
      if name not in UNDERSTOOD and value and value != NOTHING_TO_DO.get(name):
        raise Refused(400, f'{name}={json.dumps(value)[:100]} is not something this server can do: leave it out', name,
                      'unsupported_parameter')
    is_chat = path == '/v1/chat/completions'
    prompts = [self._conversation(body)] if is_chat else self._prompts(body)
    n = number(body, 'n', 1, 1, MAX_ROWS, int)
    if n * len(prompts) > MAX_ROWS:
      raise Refused(400, f'{len(prompts)} prompts and n={n} are more than {MAX_ROWS} texts: send several requests', 'n')
    how = self._how(body, CHAT_TOKENS if is_chat else COMPLETION_TOKENS, max(map(len, prompts)), is_chat)
    written = self.writer.write([prompt for prompt in prompts for _ in range(n)], how)
    choices = [{'index': i, 'finish_reason': finish, 'logprobs': None} |
               ({'message': {'role': 'assistant', 'content': text.strip()}} if is_chat else {'text': text})
               for i, (text, finish, _) in enumerate(written)]
    read, wrote = sum(map(len, prompts)), sum(n_tokens for *_, n_tokens in written)
    return {'id': f'{"chatcmpl" if is_chat else "cmpl"}-{uuid.uuid4().hex}', 'created': int(time.time()), 'model': self.name,
            'object': 'chat.completion' if is_chat else 'text_completion', 'choices': choices,
            'usage': {'prompt_tokens': read, 'completion_tokens': wrote, 'total_tokens': read + wrote}}

  def _how(self, body: dict[str, Any], default_tokens: int, longest: int, is_chat: bool) -> How:
    room = self.max_length - longest
    if room < 1:
      raise Refused(400, f'the prompt has {longest} tokens, and with its answer there may be {self.max_length}',
                    'messages' if is_chat else 'prompt', 'context_length_exceeded')
    name = 'max_completion_tokens' if body.get('max_completion_tokens') is not None else 'max_tokens'
    max_tokens = number(body, name, min(default_tokens, room), 1, None, int)
    if max_tokens > room:
      raise Refused(400, f'the prompt has {longest} tokens and {name}={max_tokens}: together there may be {self.max_length}',
                    name, 'context_length_exceeded')
    stop = body.get('stop') or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 16 or not all(isinstance(word, str) and word for word in stop):
      raise Refused(400, 'stop is a text or a list of at most 16', 'stop')
    seed = number(body, 'seed', None, 0, 2**31 - 1, int)
    temperature, top_p = number(body, 'temperature', 1.0, 0, 2, float), number(body, 'top_p', 1.0, 0, 1, float)
    if not top_p:
      raise Refused(400, 'top_p=0 leaves no token: temperature=0 takes the likeliest', 'top_p')
    return How(temperature, top_p, max_tokens, tuple(stop), seed, None if seed is None else next(self._numbers))

  def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
    """Texts or lists of token ids, one or several."""
    prompt = body.get('prompt', '')
    several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    vocab_size = self.model.model.vocab_size
    for one in several:
      is_ids = isinstance(one, list) and one and all(type(token) is int and 0 <= token < vocab_size for token in one)
      if not isinstance(one, str) and not is_ids:
        raise Refused(400, f'prompt is a text, a list of token ids from 0 to {vocab_size - 1}, or a list of such', 'prompt')
    try:
      return [self.model.prompt(one) if isinstance(one, str) else one for one in several]
    except ValueError as error:
      raise Refused(400, str(error), 'prompt') from error

  def _conversation(self, body: dict[str, Any]) -> list[int]:
    """Tokens of the messages in the model's chat template, up to the answer."""
    messages = body.get('messages')
    if not isinstance(messages, list) or not messages:
      raise Refused(400, 'messages is a list of {"role": …, "content": …}', 'messages')
    said = []
    for message in messages:
      role, content = (message.get('role'), message.get('content')) if isinstance(message, dict) else (None, None)
      if isinstance(content, list):  # in parts, as those of clients who also send images
        parts = [part.get('text') if isinstance(part, dict) and part.get('type') == 'text' else None for part in content]
        content = None if None in parts else ''.join(map(str, parts))
      if role not in chat.ROLES or not isinstance(content, str):
        raise Refused(400, f'a message has a role ({", ".join(chat.ROLES)}) and content that is text', 'messages')
      if word := next((word for word in self.special if word in content), None):
        raise Refused(400, f'a message spells the special token {word}, which could end it or begin another', 'messages')
      said.append({'role': role, 'content': content})
    try:
      text = self.template.render(said, ask=True)
    except ValueError as error:
      raise Refused(400, f'the chat template refuses the messages: {error}', 'messages') from error
    return self.model.tokenizer.encode(text, add_special_tokens=False).ids


def number(body: dict[str, Any], name: str, default, least, most, kind):
  """body[name] as `kind`, or the default. Refused where it is no number or out of bounds."""
  value = body.get(name)
  if value is None:
    return default
  if type(value) not in (int, kind) or not least <= value <= (value if most is None else most):
    bounds = f'of at least {least}' if most is None else f'from {least} to {most}'
    raise Refused(400, f'{name} is {"a whole number" if kind is int else "a number"} {bounds}', name)
  return kind(value)


class Handler(http.server.BaseHTTPRequestHandler):
  """HTTP around a Service, `self.server.service`."""

  protocol_version, server_version, timeout = 'HTTP/1.1', 'maxlm', SECONDS

  def do_GET(self):
    self._answer(lambda: self.server.service.get(self.path.partition('?')[0]))

  def do_POST(self):
    self._answer(lambda: self.server.service.post(self.path.partition('?')[0], self._body()))

  def send_error(self, code, message=None, explain=None):
    """What http.server finds wrong: a method that there is not, a line that is no request."""
    self.close_connection, self.request_version = True, self.protocol_version  # or there would be no headers
    self._send(code, Refused(code, message or self.responses.get(code, ('error',))[0]).error)

  def _answer(self, make):
    with self.server.service.writer:
      try:
        self._send(200, make())
      except Refused as refused:
        self._send(refused.status, refused.error)
      except (ConnectionError, TimeoutError):  # whoever asked is gone
        self.close_connection = True

  def _body(self) -> dict[str, Any]:
    kind, length = self.headers.get_content_type(), self.headers.get('Content-Length', '')
    self.close_connection = True  # unless all that was sent is read
    if kind != 'application/json':  # the one that a page in a browser cannot send to another host unasked
      raise Refused(415, f'the Content-Type is {kind}: send application/json')
    if not (length.isascii() and length.isdigit()):
      raise Refused(411, 'send the Content-Length')
    if len(length) > 12 or int(length) > MAX_BYTES:
      raise Refused(413, f'a request has at most {MAX_BYTES} bytes')
    data = self.rfile.read(int(length))
    self.close_connection = self.headers.get('Connection', '').lower() == 'close'
    try:
      body = json.loads(data)
      json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON, and no text
    except (ValueError, RecursionError):
      raise Refused(400, 'the request is not JSON') from None
    if not isinstance(body, dict):
      raise Refused(400, 'the request is not a JSON object')
    return body

  def _send(self, status: int, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    try:
      self.send_response(status)
      self.send_header('Content-Type', 'application/json')
      self.send_header('Content-Length', str(len(data)))
      if status in (429, 503):
        self.send_header('Retry-After', '1')
      if self.close_connection:
        self.send_header('Connection', 'close')
      self.end_headers()
      self.wfile.write(data)
    except (ConnectionError, TimeoutError):
      self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
  daemon_threads, request_queue_size = True, 256
  service: Service


def main() -> int:
  if not CHECKPOINT.value:
    raise ValueError('give --checkpoint=WORKDIR of a run, such as --checkpoint=runs/quickstart')
  if BATCH_SIZE.value < 1 or MAX_LENGTH.value < 0 or not 0 <= PORT.value < 65536:
    raise ValueError('--batch_size must be at least 1, --max_length at least 0, --port from 0 to 65535')
  try:
    server = Server((HOST.value, PORT.value), Handler)
  except OSError as error:
    raise OSError(error.errno, f'cannot listen at {HOST.value}:{PORT.value} ({error.strerror}): give another --host or '
                               '--port') from error
  with server, StopSignal() as stop:
    model, workdir = load(CHECKPOINT.value), parse(CHECKPOINT.value)[0]
    model.check_next_token()
    max_length = MAX_LENGTH.value or model.max_length or 2048
    server.service = Service(model, workdir, NAME.value or Path(workdir).resolve().name, BATCH_SIZE.value, max_length)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    host, port = server.server_address[:2]
    print(f'serving {server.service.name!r}, step {model.step}, up to {max_length} tokens, at http://{host}:{port}/v1',
          flush=True)
    server.service.writer.run(stop)
    server.shutdown()
  return 0


if __name__ == '__main__':
  flags.run(main)
