"""Text from a model behind an endpoint: every answer is paid for once, whatever happens on the way, and judged before it is
kept. The endpoint is an HTTP server of this process that does what a test wants, good or bad."""

import collections
import dataclasses
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build, main
from data_pipeline.recipe import Recipe, Reject, SourceUnavailable
from data_pipeline.sources import journal, synthetic
from data_pipeline.sources.synthetic import Rewritten, usable
from data_pipeline.sources.text_files import TextFiles
from tests.engine_parts import Censor

ROOT = Path(__file__).parents[1]


class ManyAtOnce(http.server.ThreadingHTTPServer):
  request_queue_size = 64  # a connection that finds no place tries again after a second


class Endpoint:
  """A server of chat completions. behave(number of the request from 0, passage) returns what goes wrong: a status,
  'hang up', 'garbage', 'sleep', or None: then the answer is the passage with its words turned round."""

  def __init__(self, behave=lambda number, passage: None, after: str = ''):
    endpoint, self.bodies, self.headers, self.times = self, [], [], []
    self.busy = self.most_busy = 0
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with lock:
          number = len(endpoint.bodies)
          endpoint.bodies.append(body)
          endpoint.headers.append(dict(self.headers) | {'path': self.path})
          endpoint.times.append(time.monotonic())
          endpoint.busy += 1
          endpoint.most_busy = max(endpoint.most_busy, endpoint.busy)
        passage = body['messages'][-1]['content'].partition('Passage:\n\n')[2]
        wrong = behave(number, passage)
        time.sleep(1.5 if wrong == 'sleep' else 0.01)
        with lock:
          endpoint.busy -= 1
        if wrong == 'hang up':
          self.close_connection = True
          self.connection.shutdown(socket.SHUT_RDWR)
          return
        text = ' '.join(passage.split()[::-1])
        answer = {'choices': [{'message': {'content': text}, 'finish_reason': 'stop'}],
                  'usage': {'prompt_tokens': 7, 'completion_tokens': 5}}
        data = b'{"choices": []' if wrong == 'garbage' else json.dumps(
          {'error': {'message': 'not\ntoday'}} if isinstance(wrong, int) else answer).encode()
        self.send_response(wrong if isinstance(wrong, int) else 200)
        self.send_header('Content-Length', str(len(data)))
        if after:
          self.send_header('Retry-After', after)
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, *args):
        pass

    self.server = ManyAtOnce(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self.server.server_address[1]}/v1'

  def passages(self) -> collections.Counter:
    return collections.Counter(body['messages'][-1]['content'] for body in self.bodies)

  def __enter__(self):
    threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *exc):
    self.server.shutdown()
    self.server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(journal, '_BACK_OFF', 0.01)


def source(corpus, server, folder, **fields) -> Rewritten:
  return Rewritten(**{'name': 'rephrased', 'documents': str(corpus), 'task': 'rephrase', 'model': 'm',
                      'endpoint': server.url, 'journal': str(folder / 'journal'), **fields})


def fetched(one: Rewritten, scratch: Path) -> list:
  scratch.mkdir()
  return [raw for unit in one.fetch(scratch) for raw in one.read(unit)]


def recipe(*sources) -> Recipe:
  return Recipe(name='synthetic', sources=sources, vocab_size=300, seq_lens=(64,), validation_fraction=0.1, min_bytes=20)


def trained_on(corpus: Path, of: str) -> list[dict]:
  """Training documents of a source, straight from the files."""
  rows = []
  for path in sorted((corpus / 'documents' / of).glob('*.parquet')):
    chosen = pq.read_table(corpus / 'selection' / of / path.name)['verdict'].to_pylist()
    rows += [row for row, verdict in zip(pq.read_table(path).to_pylist(), chosen) if verdict == 'train']
  return rows


def test_a_corpus_of_rewritten_documents_keeps_their_parents_and_pays_once(corpus, tmp_path):
  key_file = tmp_path / 'key'
  key_file.write_text('not-for-the-log\n')
  with Endpoint() as endpoint:
    one = source(corpus, endpoint, tmp_path, of=('stories',), key_file=str(key_file), concurrency=4)
    out = build(recipe(one), tmp_path / 'out', workers=2)
    parents = {row['id']: row for row in trained_on(corpus, 'stories')}
    documents = pq.read_table(out / 'documents' / 'rephrased').to_pylist()
    rejects = pq.read_table(out / 'rejects' / 'rephrased').to_pylist()
    assert {row['parent'] for row in documents} <= parents.keys() and len(documents) + len(rejects) == len(endpoint.bodies)
    assert {row['reason'] for row in rejects} <= {'too short', 'repeats itself'} and len(documents) > 100
    for row in documents:
      assert row['text'].split()[-1] in parents[row['parent']]['text'] and row['url'].endswith('#rephrase-1')
    assert set(endpoint.passages().values()) == {1} and 1 < endpoint.most_busy <= 4
    assert all(headers['Authorization'] == 'Bearer not-for-the-log' and headers['path'] == '/v1/chat/completions'
               for headers in endpoint.headers)
    for path in [path for path in (*out.rglob('*'), *(tmp_path / 'journal').rglob('*')) if path.is_file()]:
      assert b'not-for-the-log' not in path.read_bytes(), path
    n = len(endpoint.bodies)
    build(recipe(one), tmp_path / 'elsewhere', workers=1)
    assert len(endpoint.bodies) == n
    assert {path.name: path.read_bytes() for path in (out / 'rows-64').rglob('*.arrayrecord')} == {
      path.name: path.read_bytes() for path in (tmp_path / 'elsewhere' / 'rows-64').rglob('*.arrayrecord')}


def test_fewer_documents_are_some_of_those_of_more_and_held_out_ones_are_never_asked_about(corpus, tmp_path):
  with Endpoint() as endpoint:
    few = fetched(source(corpus, endpoint, tmp_path, max_documents=20), tmp_path / 'a')
    assert len(few) == len(endpoint.bodies) == 20
    more = fetched(source(corpus, endpoint, tmp_path, max_documents=60), tmp_path / 'b')
    assert len(more) == len(endpoint.bodies) == 60 and {raw.url for raw in few} < {raw.url for raw in more}
    everything = fetched(source(corpus, endpoint, tmp_path), tmp_path / 'c')
    wanted = sum(len(trained_on(corpus, of)) for of in ('stories', 'inventories'))
    assert len(everything) == len(endpoint.bodies) == wanted
    held_out = {row['text'] for of in ('stories', 'inventories')
                for row in pq.read_table(corpus / 'documents' / of).to_pylist()} - {
                  row['text'] for of in ('stories', 'inventories') for row in trained_on(corpus, of)}
    asked = {passage.partition('Passage:\n\n')[2] for passage in endpoint.passages()}
    assert held_out and not held_out & asked


def test_what_steps_leave_out_is_never_sent_and_a_bucket_can_be_chosen(tmp_path):
  texts = [f'{("axe", "bee", "zebra")[i % 3]} {i} of the others, whether they are many or few' for i in range(60)]
  (tmp_path / 'text.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  made = dataclasses.replace(recipe(TextFiles(name='text', pattern=str(tmp_path / 'text.jsonl'))), steps=(Censor(),))
  build(made, tmp_path / 'corpus', workers=1)
  with Endpoint() as endpoint:
    in_bucket = fetched(source(tmp_path / 'corpus', endpoint, tmp_path, of=('text.q1',)), tmp_path / 'a')
    passages = [passage.partition('Passage:\n\n')[2] for passage in endpoint.passages()]
    assert len(in_bucket) == len(passages) >= 12 and all(passage.startswith('axe ') for passage in passages)
    fetched(source(tmp_path / 'corpus', endpoint, tmp_path), tmp_path / 'b')
    passages = [passage.partition('Passage:\n\n')[2] for passage in endpoint.passages()]
  assert len(passages) >= 25 and not [passage for passage in passages if 'the' in passage or 'zebra' in passage]
  assert all(' of é oérs, wheér éy are' in passage for passage in passages)


@pytest.mark.parametrize('wrong', [429, 500, 503, 'hang up', 'garbage', 'sleep'])
def test_what_fails_once_is_asked_again(corpus, tmp_path, monkeypatch, wrong):
  monkeypatch.setattr(journal, '_TIMEOUT', 1.0)
  seen = set()
  with Endpoint(lambda number, passage: None if passage in seen else seen.add(passage) or wrong) as endpoint:
    documents = fetched(source(corpus, endpoint, tmp_path, max_documents=20), tmp_path / 'a')
  assert len(documents) == 20 and not [raw for raw in documents if getattr(raw, 'reason', '') == 'no answer']
  assert min(endpoint.passages().values()) >= 2 and len(endpoint.passages()) == 20


def test_an_endpoint_that_asks_for_patience_gets_it(corpus, tmp_path):
  with Endpoint(lambda number, passage: 429 if number == 0 else None, after='1') as endpoint:
    fetched(source(corpus, endpoint, tmp_path, max_documents=1), tmp_path / 'a')
  assert len(endpoint.times) == 2 and endpoint.times[1] - endpoint.times[0] >= 1


@pytest.mark.parametrize('wrong, reason', [(400, 'refused by the endpoint'), (500, 'no answer')])
def test_documents_without_an_answer_are_counted_and_asked_about_again_by_another_build(corpus, tmp_path, wrong, reason):
  broken = {row['text'] for row in trained_on(corpus, 'stories')[::20]}
  with Endpoint(lambda number, passage: wrong if passage in broken else None) as endpoint:
    one = source(corpus, endpoint, tmp_path, of=('stories',))
    out = build(recipe(one), tmp_path / 'out', workers=1)
    rejects = pq.read_table(out / 'rejects' / 'rephrased').to_pylist()
    assert sum(row['reason'] == reason for row in rejects) == len(broken) >= 5
  with Endpoint() as mended:
    documents = fetched(source(corpus, mended, tmp_path, of=('stories',)), tmp_path / 'a')
    assert {passage.partition('Passage:\n\n')[2] for passage in mended.passages()} == broken
    assert reason not in {getattr(raw, 'reason', '') for raw in documents}


def test_a_dead_endpoint_ends_the_build_in_one_line_and_nothing_is_lost(corpus, tmp_path, capsys):
  with Endpoint(lambda number, passage: 503 if number >= 40 else None) as endpoint:
    one = source(corpus, endpoint, tmp_path, of=('stories',), concurrency=4)
    with pytest.raises(SourceUnavailable) as caught:
      build(recipe(one), tmp_path / 'out', workers=1)
    line = str(caught.value)
    assert '\n' not in line and 'HTTP 503 not today' in line and 'run the same command again' in line
    assert f'its 40 answers are kept in {tmp_path}/journal/answers.jsonl' in line
    answered = {body['messages'][-1]['content'] for body in endpoint.bodies[:40]}
  with Endpoint() as mended:
    build(recipe(source(corpus, mended, tmp_path, of=('stories',))), tmp_path / 'out', workers=1)
    assert len(mended.bodies) == len(trained_on(corpus, 'stories')) - 40 and not answered & mended.passages().keys()


def test_nobody_listens(corpus, tmp_path):
  with Endpoint() as endpoint:
    pass
  with pytest.raises(SourceUnavailable, match='ClientConnectorError.*0 answers are kept'):
    fetched(source(corpus, endpoint, tmp_path), tmp_path / 'a')


@pytest.mark.parametrize('status', [401, 403, 404, 307])
def test_an_endpoint_that_lets_nobody_in_is_asked_no_more(corpus, tmp_path, status):
  with Endpoint(lambda number, passage: status) as endpoint:
    with pytest.raises(SourceUnavailable, match=f'says HTTP {status} not today'):
      fetched(source(corpus, endpoint, tmp_path, concurrency=2), tmp_path / 'a')
  assert len(endpoint.bodies) <= 4


def test_no_more_requests_a_second_than_allowed(corpus, tmp_path):
  with Endpoint() as endpoint:
    fetched(source(corpus, endpoint, tmp_path, max_documents=21, requests_per_second=20), tmp_path / 'a')
  assert len(endpoint.times) == 21 and endpoint.times[-1] - endpoint.times[0] >= 0.9


RECIPE = """
from data_pipeline.recipe import Recipe
from data_pipeline.sources.synthetic import Rewritten
def get_recipe():
  one = Rewritten(name='rephrased', documents={corpus!r}, task='rephrase', model='m', endpoint={url!r}, journal={journal!r})
  return Recipe(name='synthetic', sources=(one,), vocab_size=300, seq_lens=(64,), validation_fraction=0.1, min_bytes=20)
"""


def test_a_killed_build_pays_for_nothing_twice_and_ends_with_the_same_bytes(corpus, tmp_path):
  with Endpoint() as endpoint:
    (tmp_path / 'r.py').write_text(RECIPE.format(corpus=str(corpus), url=endpoint.url, journal=str(tmp_path / 'journal')))
    flags = [f'--recipe={tmp_path}/r.py', f'--out={tmp_path}/out', '--workers=1']
    process = subprocess.Popen([sys.executable, '-m', 'data_pipeline.build', *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(endpoint.bodies) < 100:
      assert process.poll() is None
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answers = tmp_path / 'journal' / 'answers.jsonl'
    answers.write_bytes(answers.read_bytes()[:-20])  # as if it had been killed while it wrote
    kept = len(answers.read_bytes().split(b'\n')) - 1
    time.sleep(0.2)
    asked = len(endpoint.bodies)
    assert main(flags) == 0
    total = sum(len(trained_on(corpus, of)) for of in ('stories', 'inventories'))
    assert len(endpoint.bodies) - asked == total - kept and kept >= 80
    assert main([flags[0], f'--out={tmp_path}/again', '--workers=1']) == 0
    assert len(endpoint.bodies) - asked == total - kept
  assert (tmp_path / 'again/documents/rephrased/00000-of-00001.parquet').read_bytes() == (
    tmp_path / 'out/documents/rephrased/00000-of-00001.parquet').read_bytes()


def test_two_builds_do_not_write_one_journal_and_damage_is_named(corpus, tmp_path):
  with Endpoint() as endpoint:
    one = source(corpus, endpoint, tmp_path, max_documents=2)
    with journal.Journal(tmp_path / 'journal'), pytest.raises(ValueError, match='another build is writing'):
      fetched(one, tmp_path / 'a')
    fetched(one, tmp_path / 'b')
    path = tmp_path / 'journal' / 'answers.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b'\n')
    with pytest.raises(ValueError, match=re.escape(f'{path} line 2 is no answer: remove the line')):
      fetched(one, tmp_path / 'c')
    path.write_bytes(lines[0])
    fetched(one, tmp_path / 'd')
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize('fields, says', [
  ({'task': 'poem'}, "no task 'poem': name one of rephrase, diverse_qa"), ({'endpoint': 'ftp://x/v1'}, 'is a URL such as'),
  ({'endpoint': 'http://user:pw@host/v1'}, 'no place for a password'), ({'endpoint': 'http://h/v1?api-key=1'}, 'no place'),
  ({'concurrency': 0}, 'at least 1'), ({'of': ('nowhere',)}, 'has no source nowhere, only inventories, stories'),
  ({'documents': '/nowhere'}, 'is not there'), ({'key_file': '/nowhere/key'}, '/nowhere/key')])
def test_mistakes_are_one_line(corpus, tmp_path, fields, says):
  with Endpoint() as endpoint, pytest.raises((ValueError, OSError), match=re.escape(says)) as caught:
    fetched(source(corpus, endpoint, tmp_path, **fields), tmp_path / 'a')
  assert '\n' not in str(caught.value) and not endpoint.bodies


# -- pieces


def test_long_documents_are_asked_about_piece_by_piece_and_no_word_is_lost():
  words = [f'w{i}' for i in range(20_000)]
  text = ''.join(word + ('.\n\n' if i % 97 == 96 else '. ' if i % 11 == 10 else ' ') for i, word in enumerate(words))
  pieces = list(synthetic._pieces(text, 2000))
  assert re.findall(r'w\d+', ' '.join(pieces)) == words
  sizes = [len(piece) for piece in pieces]
  assert max(sizes) <= 2000 and min(sizes) >= 800 and sum(piece.endswith('.') for piece in pieces) >= len(pieces) - 1
  started = time.monotonic()
  assert ''.join(synthetic._pieces('x' * 30_000_000, 2000)) == 'x' * 30_000_000
  assert time.monotonic() - started < 5
  assert list(synthetic._pieces('short', 2000)) == ['short']


# -- what is kept


SOURCE = ('The lantern of the miller was made in the year 1802 from brass and hung for a long time above the door of the '
          'old mill by the river, where travellers saw it from far away at night and knew that the way was right.')
GOOD = 'Made of brass in 1802, the lantern of the miller guided travellers at night: it hung above the door of his mill.'


def record(answer: str, finish: str = 'stop') -> dict:
  return {'text': SOURCE, 'answer': answer, 'finish': finish}


@pytest.mark.parametrize('task, answer, text', [
  ('rephrase', GOOD, GOOD),
  ('rephrase', f'Here is the rewritten passage:\n\n{GOOD}\n', GOOD),
  ('distill', f'Sure! The substance is as follows.\n{GOOD}', GOOD),
  ('distill', f'<think>\nWhat is asked?\n</think>\n\n{GOOD}', GOOD),
  ('rephrase', 'Here is where the miller lived: in a mill by the river, with a lantern above the door that shone.',
   'Here is where the miller lived: in a mill by the river, with a lantern above the door that shone.'),
  ('extract_knowledge', GOOD + '\n\nSorry is a word too.', GOOD + '\n\nSorry is a word too.'),
  ('diverse_qa', 'Question: When was the lantern made?\nAnswer: In 1802.\n\n**Question:** Was it iron?\nAnswer: No, brass.',
   f'{SOURCE}\n\nQuestion: When was the lantern made?\nAnswer: In 1802.\n\nQuestion: Was it iron?\nAnswer: No, brass.'),
  ('knowledge_list', '- The lantern of the miller was made in 1802.\n* It is made of brass.\n3. It hung above a door.\n',
   'The lantern of the miller was made in 1802.\nIt is made of brass.\nIt hung above a door.')])
def test_what_frames_an_answer_goes(task, answer, text):
  assert usable(task, record(answer)) == text


@pytest.mark.parametrize('task, answer, reason', [
  ('rephrase', '', 'too short'), ('rephrase', 'It was brass.', 'too short'),
  ('rephrase', 'Here is the passage:\n' + GOOD[:30], 'too short'),
  ('rephrase', "I'm sorry, but I cannot help with rewriting this passage about a lantern of a miller.", 'refusal'),
  ('distill', 'As an AI, I have no opinion on lanterns; the text seems to be about one that hung on a mill.', 'refusal'),
  ('distill', 'I cannot distill this text, because it does not have enough substance to be made shorter.', 'refusal'),
  ('rephrase', GOOD + ' Leave out menus, advertisements and broken fragments. Add nothing more.', 'repeats the prompt'),
  ('rephrase', SOURCE, 'copies its source'), ('distill', SOURCE[:150], 'copies its source'),
  ('extract_knowledge', 'The lantern is of brass. ' * 20, 'repeats itself'),
  ('diverse_qa', GOOD, 'no questions'),
  ('diverse_qa', 'Question: When was the lantern made by the miller, and of what?', 'no questions'),
  ('knowledge_list', GOOD, 'no list')])
def test_an_answer_that_is_none_is_left_out_with_its_reason(task, answer, reason):
  with pytest.raises(Reject) as caught:
    usable(task, record(answer))
  assert str(caught.value) == reason


def test_an_answer_that_was_cut_off_or_withheld_is_left_out():
  for finish, reason in (('length', 'cut off'), ('content_filter', 'refusal')):
    with pytest.raises(Reject, match=reason):
      usable('rephrase', record(GOOD, finish))


@pytest.mark.parametrize('data', [
  b'', b'[]', b'{', b'null', b'{"choices": [{}]}', b'{"choices": [{"message": {"content": null}}]}', b'\xff', b'[' * 100_000,
  b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": Infinity}}', b'{"choices": {"0": 1}}',
  b'{"choices": "x"}', b'{"choices": [{"message": "x"}]}'], ids=lambda data: data[:20])
def test_what_is_no_completion_is_no_answer(data):
  assert journal._answer(data) is None and '\n' not in journal._message(data) and len(journal._message(data)) <= 200
