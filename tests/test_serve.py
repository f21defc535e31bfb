"""`python -m maxlm.serve` as its users see it: over HTTP, in a process of its own, on an untrained tiny model."""

import collections
import concurrent.futures
import contextlib
import http.client
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import pyarrow.parquet as pq
import pytest

from configs import tiny
from data_pipeline.build import build
from data_pipeline.recipe import Recipe
from data_pipeline.sources.synthetic import Rewritten
from maxlm import typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.models.decoder import Decoder

ROOT = Path(__file__).parents[1]
CHAT, TEXT = 'chat/completions', 'completions'
USER = [{'role': 'user', 'content': 'x'}]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, corpus, mesh_of):
  """A workdir with one checkpoint, of step 3."""
  where, config = tmp_path_factory.mktemp('serve') / 'tiny-model', tiny.get_config()
  where.mkdir()
  config.data.corpus = str(corpus)
  (where / 'tokenizer.json').write_bytes((corpus / 'tokenizer.json').read_bytes())
  checkpoints = Checkpoints(where / 'checkpoints')
  with mesh_of(1):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    checkpoints.save(3, params=params, opt={}, meta={'step': 3, 'cursor': 24, 'lineage': lineage(),
                                                     'config': json.loads(typed_json.dumps(config))})
    checkpoints.close()
  return where


class Server:
  """A process that serves; url: where."""

  def __init__(self, workdir: Path, *arguments: str):
    self.log = workdir.parent / f'{time.time_ns()}.stderr'
    command = [sys.executable, '-m', 'maxlm.serve', f'--checkpoint={workdir}', '--port=0', *arguments]
    with open(self.log, 'w') as log:
      self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=log)
    self.line = self.process.stdout.readline()
    assert 'serving' in self.line, self.log.read_text()
    self.url = re.search(r'http://\S+', self.line)[0]

  def post(self, path: str, **body) -> dict:
    """The answer; urllib.error.HTTPError for an error."""
    request = urllib.request.Request(f'{self.url}/{path}', json.dumps(body).encode(), {'Content-Type': 'application/json'})
    with urllib.request.urlopen(request, timeout=120) as answer:
      return json.load(answer)

  def refuses(self, path: str, **body) -> tuple[int, dict]:
    with pytest.raises(urllib.error.HTTPError) as caught:
      self.post(path, **body)
    error = json.load(caught.value)['error']
    assert error.keys() == {'message', 'type', 'param', 'code'}
    return caught.value.code, error

  def raw(self, text: bytes) -> tuple[int, dict]:
    """Status and body of what is answered to these bytes."""
    connection = http.client.HTTPConnection(self.url.split('/')[2], timeout=60)
    with contextlib.closing(connection):
      connection.connect()
      connection.sock.sendall(text)
      answer = http.client.HTTPResponse(connection.sock)
      answer.begin()
      return answer.status, json.loads(answer.read())

  def end(self) -> int:
    self.process.terminate()
    self.process.stdout.close()
    return self.process.wait(60)


@pytest.fixture(scope='module')
def server(workdir):
  one = Server(workdir, '--batch_size=4', '--max_length=512')
  yield one
  assert one.end() == 0, one.log.read_text()
  assert 'Traceback' not in one.log.read_text()


def test_it_says_what_it_serves(server):
  assert re.fullmatch(r"serving 'tiny-model', step 3, up to 512 tokens, at http://127\.0\.0\.1:\d+/v1\n", server.line)
  for path in ('models', 'models/tiny-model'):
    with urllib.request.urlopen(f'{server.url}/{path}') as answer:
      card = json.load(answer)
      assert answer.headers['Content-Type'] == 'application/json'
    card = card['data'][0] if path == 'models' else card
    assert (card['id'], card['object'], card['max_model_len']) == ('tiny-model', 'model', 512)


def test_greedy_completions_are_those_of_generate(server, workdir):
  command = [sys.executable, '-m', 'maxlm.generate', f'--checkpoint={workdir}', '--prompt=The old woman', '--max_tokens=20',
             '--temperature=0', '--json']
  expected = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout)
  body = {'model': 'tiny-model', 'max_tokens': 20, 'temperature': 0}
  answer = server.post('completions', prompt='The old woman', **body)
  assert answer['object'] == 'text_completion' and answer['id'].startswith('cmpl-')
  assert 'The old woman' + answer['choices'][0]['text'] == expected['text']
  assert answer['choices'][0]['finish_reason'] == ('length' if len(expected['tokens']) == 20 else 'stop')
  n = len(expected['prompt_tokens'])
  assert answer['usage'] == {'prompt_tokens': n, 'completion_tokens': 20, 'total_tokens': n + 20}
  as_ids = server.post('completions', prompt=expected['prompt_tokens'], **body)
  assert as_ids['choices'] == answer['choices']
  several = server.post('completions', prompt=['Inventory no.', 'The old woman'], n=2, **body)
  assert [choice['index'] for choice in several['choices']] == [0, 1, 2, 3]
  assert several['choices'][2]['text'] == several['choices'][3]['text'] == answer['choices'][0]['text']


def test_a_chat_is_a_completion_of_its_template(server):
  chat = server.post('chat/completions', model='tiny-model', temperature=0, max_tokens=12, messages=[
    {'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': [{'type': 'text', 'text': 'Who are you?'}]}])
  text = server.post('completions', temperature=0, max_tokens=12,
                     prompt='<|endoftext|>System: Be brief.\n\nUser: Who are you?\n\nAssistant:')
  assert chat['object'] == 'chat.completion' and chat['usage'] == text['usage']
  assert chat['choices'][0]['message'] == {'role': 'assistant', 'content': text['choices'][0]['text'].strip()}


def test_a_seed_gives_the_same_texts_whatever_else_is_asked_meanwhile(server):
  ask = lambda **more: [choice['text'] for choice in server.post(TEXT, prompt='A', max_tokens=10, **more)['choices']]
  alone = ask(seed=5, n=6)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    others = [pool.submit(ask) for _ in range(6)]
    amid = [one.result() for one in [pool.submit(ask, seed=5, n=6) for _ in range(3)]]
    others = [other.result()[0] for other in others]
  assert amid == [alone] * 3 and len(set(alone)) == 6  # two batches: no text comes twice
  assert ask(seed=6, n=6) != alone and len(set(others)) > 1


def test_requests_at_the_same_time_get_the_answers_they_get_alone(server):
  prompts = [f'{who} {n}' for who in ('The captain', 'her brother', 'a stranger') for n in range(6)]
  ask = lambda prompt: server.post('completions', prompt=prompt, temperature=0, max_tokens=16)['choices'][0]['text']
  alone = list(map(ask, prompts))
  with concurrent.futures.ThreadPoolExecutor(18) as pool:
    assert list(pool.map(ask, prompts)) == alone


def test_a_stop_ends_a_text_before_it(server):
  ask = lambda **more: server.post('completions', prompt='A', temperature=0, **more)
  whole = ask(max_tokens=60)['choices'][0]
  word = whole['text'][20:24]
  at = whole['text'].index(word)
  cut = ask(max_tokens=60, stop=[word, 'nowhere to be found'])['choices'][0]
  assert (cut['text'], cut['finish_reason']) == (whole['text'][:at], 'stop')
  assert ask(max_tokens=60, stop='nowhere')['choices'][0] == whole


@pytest.mark.parametrize('path, body, status, says', [
  (TEXT, {'prompt': 'x', 'model': 'gpt-4'}, 404, "no model 'gpt-4', only 'tiny-model'"),
  (TEXT, {'prompt': 'x', 'stream': True}, 400, 'stream=true is not something'),
  (TEXT, {'prompt': 'x', 'logprobs': 3}, 400, 'logprobs=3'), (TEXT, {'prompt': 'x', 'echo': True}, 400, 'echo=true'),
  (TEXT, {'prompt': 'x', 'nonsense': 1}, 400, 'nonsense=1'), (TEXT, {'prompt': 'x', 'temperature': 3}, 400, 'from 0 to 2'),
  (TEXT, {'prompt': 'x', 'temperature': '1'}, 400, 'temperature is a number'),
  (TEXT, {'prompt': 'x', 'temperature': float('nan')}, 400, 'temperature is a number'),
  (TEXT, {'prompt': 'x', 'temperature': True}, 400, 'temperature is a number'),
  (TEXT, {'prompt': 'x', 'top_p': 0}, 400, 'top_p=0 leaves no token'), (TEXT, {'prompt': 'x', 'n': 0}, 400, 'n is a whole'),
  (TEXT, {'prompt': 'x', 'max_tokens': 1.5}, 400, 'max_tokens is a whole'), (TEXT, {'prompt': 'x', 'seed': -1}, 400, 'seed'),
  (TEXT, {'prompt': 'x', 'max_tokens': 512}, 400, 'together there may be 512'),
  (TEXT, {'prompt': 'x ' * 2000}, 400, 'with its answer there may be 512'),
  (TEXT, {'prompt': 'x', 'stop': ['']}, 400, 'stop is'), (TEXT, {'prompt': 'x', 'stop': {'a': 1}}, 400, 'stop is'),
  (TEXT, {'prompt': ['x'] * 200, 'n': 2}, 400, 'more than 256 texts'),
  (TEXT, {'prompt': []}, 400, 'prompt is'), (TEXT, {'prompt': [1, 99999]}, 400, 'token ids from 0 to 511'),
  (TEXT, {'prompt': [True]}, 400, 'prompt is'), (TEXT, {'prompt': {'a': 1}}, 400, 'prompt is'),
  (TEXT, {'prompt': [[1], [-1]]}, 400, 'prompt is'), (CHAT, {}, 400, 'messages is a list'),
  (CHAT, {'messages': []}, 400, 'messages is a list'), (CHAT, {'messages': ['x']}, 400, 'a message has a role'),
  (CHAT, {'messages': [{'role': 'cat', 'content': 'x'}]}, 400, 'a message has a role'),
  (CHAT, {'messages': [{'role': 'user', 'content': None}]}, 400, 'a message has a role'),
  (CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': {}}]}]}, 400, 'a message has a role'),
  (CHAT, {'messages': [{'role': 'user', 'content': 'a<|endoftext|>b'}]}, 400, 'special token <|endoftext|>'),
  (CHAT, {'messages': USER, 'tools': [{'type': 'function'}]}, 400, 'tools='),
  ('embeddings', {'input': 'x'}, 404, 'no /v1/embeddings')])
def test_what_it_cannot_do_it_refuses(server, path, body, status, says):
  code, error = server.refuses(path, **body)
  assert code == status and says in error['message'] and '\n' not in error['message']


def test_what_changes_nothing_is_accepted(server):
  server.post(TEXT, prompt='x', max_tokens=1, temperature=0, stream=False, logprobs=None, echo=False, presence_penalty=0,
              logit_bias={}, best_of=1, user='me', suffix='')
  server.post(CHAT, messages=USER, max_completion_tokens=1, temperature=0, response_format={'type': 'text'}, tools=[],
              tool_choice='none')


HEAD = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'


@pytest.mark.parametrize('text, status', [
  (HEAD + b'\r\n', 411), (HEAD + b'Content-Length: -1\r\n\r\n', 411), (HEAD + b'Content-Length: 99999999999\r\n\r\n', 413),
  (HEAD + b'Content-Length: 3\r\n\r\n{"a', 400), (HEAD + b'Content-Length: 2\r\n\r\n[]', 400),
  (HEAD + b'Content-Length: 20\r\n\r\n{"prompt": "\\ud800"}', 400), (HEAD + b'Content-Length: 2\r\n\r\n\xff\xfe', 400),
  (HEAD + b'Content-Length: 60000\r\n\r\n' + b'[' * 60000, 400),
  (b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}', 415),
  (b'DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n', 501), (b'GET /etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n', 404),
  (b'GET /../../etc/passwd HTTP/1.1\r\n\r\n', 404), (b'nonsense\r\n\r\n', 400), (b'GET / HTTP/9.9\r\n\r\n', 505)])
def test_what_is_no_request_gets_an_error_in_the_same_form(server, text, status):
  code, body = server.raw(text)
  assert code == status and body['error']['message']


def test_a_client_that_goes_away_costs_nobody_else_anything(server):
  body = json.dumps({'prompt': 'x', 'max_tokens': 50, 'temperature': 0}).encode()
  for _ in range(3):
    connection = http.client.HTTPConnection(server.url.split('/')[2])
    connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
    connection.close()
  assert server.post(TEXT, prompt='x', max_tokens=3, temperature=0)['choices']


@pytest.fixture(scope='module')
def long(workdir):
  """One for long texts."""
  server = Server(workdir, '--max_length=131072', '--batch_size=8', '--name=long')
  yield server
  server.end()


def test_a_checkpoint_rewrites_a_corpus_end_to_end(corpus, tmp_path, long):
  """An untrained model writes nonsense, but it writes it through every part: server, client, journal, judgement, rows."""
  one = Rewritten(name='rephrased', documents=str(corpus), task='rephrase', endpoint=long.url, model='long',
                  temperature=1.0, top_p=1.0, journal=str(tmp_path / 'journal'), max_documents=8, concurrency=8)
  recipe = Recipe(name='synthetic', sources=(one,), vocab_size=400, seq_lens=(64,), validation_fraction=0.1, min_bytes=20)
  out = build(recipe, tmp_path / 'out', workers=1)
  answers = [json.loads(line) for line in open(tmp_path / 'journal' / 'answers.jsonl')]
  documents = pq.read_table(out / 'documents' / 'rephrased').to_pylist()
  reasons = collections.Counter(row['reason'] for row in pq.read_table(out / 'rejects' / 'rephrased').to_pylist())
  assert len(answers) == 8 == len(documents) + reasons.total() and documents and set(reasons) <= {'cut off', 'too short'}
  assert {row['parent'] for row in documents} <= {answer['document'] for answer in answers}


def test_a_stop_is_quick_and_those_who_wait_are_told(long):
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    waiting = [pool.submit(long.refuses, TEXT, prompt='x', max_tokens=100_000, temperature=0, seed=i) for i in range(3)]
    time.sleep(3)
    assert not any(one.done() for one in waiting)
    began = time.monotonic()
    assert long.end() == 0
    assert time.monotonic() - began < 20
    assert {(code, error['message']) for code, error in (one.result() for one in waiting)} == {(503, 'the server is ending')}


@pytest.mark.parametrize('arguments, says', [
  (('--checkpoint=nowhere', '--port=0'), 'no checkpoint in'),
  (('--checkpoint=x', '--batch_size=0'), '--batch_size must be at least 1'),
  (('--checkpoint=x', '--host=192.0.2.1'), 'cannot listen at 192.0.2.1:8000')])
def test_mistakes_are_one_line(arguments, says):
  command = [sys.executable, '-m', 'maxlm.serve', *arguments]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  lines = [line for line in done.stderr.splitlines() if not line.startswith(('W', 'I'))]
  assert done.returncode == 2 and len(lines) == 1 and says in lines[0], done.stderr
