"""Many questions to an OpenAI-compatible endpoint, each asked once: the answers are kept in a journal.

    JOURNAL/answers.jsonl     {"key": hash of the request, …, "answer": …, "finish": "stop", "tokens": [prompt, answer]}

It is only ever appended to, and belongs to the user, not to a corpus: what was paid for is never asked again, by whatever
recipe. A line that a kill or a full disk cut off is the last one, and is dropped.
"""

import asyncio
import errno
import fcntl
import json
import os
import pathlib
import random
import re
import sys
from collections.abc import Iterator

import tqdm

from data_pipeline.recipe import SourceUnavailable

_ATTEMPTS, _BACK_OFF, _LONGEST_WAIT = 7, 1.0, 120.0  # seconds: 1, 2, 4 …, or what the endpoint asks for
_TIMEOUT = 600.0  # seconds an answer may take
_MAX_BYTES = 8 << 20  # of an answer
_IN_A_ROW = 10  # requests given up with no answer between: then the endpoint is dead
_AGAIN = {408, 409, 425, 429}  # and 500 and above
_REFUSED = {400, 413, 422}  # this request, not all


class Journal:
  """Answers by key. A context manager that keeps other builds out. Some 200 bytes of memory an answer."""

  def __init__(self, folder: pathlib.Path):
    self.path, self._places = folder / 'answers.jsonl', {}

  def __enter__(self):
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._writer, self._reader = open(self.path, 'ab', buffering=0), open(self.path, 'rb')
    try:
      fcntl.flock(self._writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f'another build is writing {self.path}: wait for it, or end it') from error
    self._end = 0
    for number, line in enumerate(self._reader, 1):
      if not line.endswith(b'\n'):
        break
      try:
        self._places[bytes.fromhex(json.loads(line)['key'])] = self._end
      except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f'{self.path} line {number} is no answer: remove the line') from error
      self._end += len(line)
    self._writer.truncate(self._end)
    return self

  def __exit__(self, *exc):
    self._reader.close()
    self._writer.close()

  def __contains__(self, key: bytes) -> bool:
    return key in self._places

  def add(self, key: bytes, record: dict) -> None:
    line = json.dumps({'key': key.hex(), **record}).encode() + b'\n'
    if self._writer.write(line) < len(line):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
    self._places[key] = self._end
    self._end += len(line)

  def line(self, key: bytes) -> bytes:
    self._reader.seek(self._places[key])
    return self._reader.readline()


def ask_all(requests: Iterator[tuple[bytes, dict, dict]], journal: Journal, *, endpoint: str, key_file: str,
            concurrency: int, requests_per_second: float, what: str) -> dict[bytes, dict]:
  """Asks (key, body, facts) for which the journal has no answer and adds {facts, answer, …}. Returns the others as
  {'url': of the facts, 'failed': why}, by key.

  SourceUnavailable, in one line that says how to go on, where the endpoint does not answer or lets nobody in.
  """
  try:
    import aiohttp
  except ImportError:
    raise SourceUnavailable("asking an endpoint needs the synthetic extra: pip install -e '.[synthetic]'") from None
  headers = {'Authorization': f'Bearer {pathlib.Path(key_file).expanduser().read_text().strip()}'} if key_file else {}
  client = _Client(aiohttp, f'{endpoint.rstrip("/")}/chat/completions', journal, requests_per_second)
  todo = ((key, body, facts) for key, body, facts in requests if key not in journal)

  async def run():
    connector, timeout = aiohttp.TCPConnector(limit=concurrency), aiohttp.ClientTimeout(total=_TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
      with tqdm.tqdm(desc=f'    {what}', unit=' requests', file=sys.stderr, leave=False, mininterval=1, delay=2) as bar:
        await asyncio.gather(*(client.work(session, todo, bar) for _ in range(concurrency)))

  asyncio.run(run())
  read, written = client.tokens
  print(f'    {what}: {client.answers:,} new answers, {read:,} tokens read and {written:,} written; {len(client.failed):,} '
        'requests without one', file=sys.stderr, flush=True)
  return client.failed


class _Client:

  def __init__(self, aiohttp, url: str, journal: Journal, rate: float):
    self._errors = (aiohttp.ClientError, TimeoutError)
    self._url, self._journal, self._rate, self._next = url, journal, rate, 0.0
    self.answers, self.tokens, self.failed, self._in_a_row = 0, [0, 0], {}, 0

  async def work(self, session, todo: Iterator, bar) -> None:
    """One of many that take requests from the same iterator."""
    for key, body, facts in todo:
      answer, reason, detail = await self._ask(session, body)
      bar.update()
      if answer is not None:
        self._journal.add(key, {**facts, **answer})
        self.answers, self._in_a_row = self.answers + 1, 0
        self.tokens = [a + b for a, b in zip(self.tokens, answer['tokens'])]
        continue
      self.failed[key] = {'url': facts['url'], 'failed': reason}
      self._in_a_row += 1
      if self._in_a_row == _IN_A_ROW:
        self._end(f'gave no answer to {_IN_A_ROW} requests in a row (the last: {detail})')

  def _end(self, why: str):
    raise SourceUnavailable(f'the endpoint {self._url} {why}; its {self.answers:,} answers are kept in '
                            f'{self._journal.path}: run the same command again to go on from there')

  async def _ask(self, session, body: dict) -> tuple[dict | None, str, str]:
    """(answer, '', '') or (None, why not, details), after all attempts."""
    detail, wait = '', 0.0
    for attempt in range(_ATTEMPTS):
      await asyncio.sleep(wait)
      await self._slot()
      wait = _BACK_OFF * 2**attempt * random.uniform(0.5, 1.5)
      try:
        async with session.post(self._url, json=body, allow_redirects=False) as response:
          data = b''
          async for chunk in response.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > _MAX_BYTES:
              return None, 'answer too long', f'more than {_MAX_BYTES} bytes'
        status, after = response.status, response.headers.get('Retry-After', '')
      except self._errors as error:
        detail = f'{type(error).__name__} {error}'.strip()
        continue
      if status == 200:
        if answer := _answer(data):
          return answer, '', ''
        detail = 'what came is no chat completion'
        continue
      detail = f'HTTP {status} {_message(data)}'.strip()
      if status in _REFUSED:
        return None, 'refused by the endpoint', detail
      if status not in _AGAIN and status < 500:
        self._end(f'says {detail}')
      if re.fullmatch(r'\d{1,9}', after):
        wait = min(max(wait, float(after)), _LONGEST_WAIT)
    return None, 'no answer', detail

  async def _slot(self) -> None:
    """Waits until the next request may begin."""
    if self._rate:
      now = asyncio.get_running_loop().time()
      self._next = max(now, self._next) + 1 / self._rate
      await asyncio.sleep(self._next - 1 / self._rate - now)


def _answer(data: bytes) -> dict | None:
  """Of a chat completion; None where it is none."""
  try:
    completion = json.loads(data)
    choice, usage = completion['choices'][0], completion.get('usage') or {}
    text, finish = choice['message']['content'], str(choice.get('finish_reason'))
    tokens = [int(usage.get(name) or 0) for name in ('prompt_tokens', 'completion_tokens')]
  except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
    return None
  return {'answer': text, 'finish': finish, 'tokens': tokens} if isinstance(text, str) else None


def _message(data: bytes) -> str:
  """What an endpoint says of an error, on one line."""
  try:
    data = json.loads(data)['error']['message'].encode()
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    pass
  return ' '.join(data.decode(errors='replace').split())[:200]
