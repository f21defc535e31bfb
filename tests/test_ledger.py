"""The ledger adds up to the wall time, whatever happens to the process; what is redone is lost; no line can spoil it."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maxlm import goodput
from maxlm.ledger import CATEGORIES, Account, Ledger, process_age, read

ROOT = Path(__file__).parents[1]
SLACK = 0.1  # seconds: a clock tick of /proc, and what a loaded machine takes between two lines of a test


def start(attempt: str, at: float) -> dict:
  return {'kind': 'start', 'attempt': attempt, 'time': at}


def resumed(attempt: str, step: int) -> dict:
  return {'kind': 'resumed', 'attempt': attempt, 'time': 0, 'step': step}


def spent(attempt: str, first: int, last: int, **seconds: float) -> dict:
  return {'kind': 'time', 'attempt': attempt, 'time': 0, 'seconds': seconds, 'from': first, 'to': last}


def account_of(*records) -> Account:
  account = Account()
  for record in records:
    account.add(record)
  return account


def nonzero(account: Account) -> dict:
  return {category: pytest.approx(seconds) for category, seconds in account.seconds.items() if abs(seconds) > 1e-9}


# -- what lines add up to


def test_steps_redone_after_a_kill_are_lost_and_the_time_between_attempts_is_idle():
  account = account_of(
    start('a', 1000), spent('a', 0, 0, init=5, compile=10), resumed('a', 0), spent('a', 0, 100, data=1, step=100),
    spent('a', 100, 120, step=20, checkpoint=2),
    start('b', 1200), spent('b', 0, 0, init=6), resumed('b', 100), spent('b', 100, 150, step=50))
  assert account.seconds == nonzero(account) | {category: 0 for category in CATEGORIES if category not in nonzero(account)}
  assert nonzero(account) == {'init': 11, 'compile': 10, 'data': 1, 'step': 150, 'checkpoint': 2, 'lost': 20, 'idle': 62}
  assert account.wall == pytest.approx(1200 + 56 - 1000)
  assert account.goodput == pytest.approx(150 / 256) and account.goodput_without_idle == pytest.approx(150 / 194)


def test_a_line_that_the_checkpoint_lies_within_is_lost_in_part():
  account = account_of(start('a', 0), resumed('a', 0), spent('a', 0, 40, step=40),
                       start('b', 40), resumed('b', 30), spent('b', 30, 50, step=20), start('c', 60), resumed('c', 20))
  assert nonzero(account) == {'step': 20, 'lost': 40}


def test_a_step_that_was_not_finished_is_lost_only_if_another_attempt_does_it():
  lines = [start('a', 0), resumed('a', 0), spent('a', 0, 1, step=10), spent('a', 1, 1, step=10)]
  assert nonzero(account_of(*lines)) == {'step': 20}
  assert nonzero(account_of(*lines, spent('a', 1, 2, step=10))) == {'step': 30}
  assert nonzero(account_of(*lines, start('b', 20), resumed('b', 1))) == {'step': 10, 'lost': 10}


def test_a_rewind_within_an_attempt_loses_what_it_undoes():
  account = account_of(start('a', 0), resumed('a', 0), spent('a', 0, 30, step=30), spent('a', 20, 25, step=5))
  assert nonzero(account) == {'step': 25, 'lost': 10}


def test_an_attempt_that_never_came_to_a_step_loses_nothing_of_others():
  account = account_of(start('a', 0), resumed('a', 0), spent('a', 0, 30, step=30), start('b', 40), spent('b', 0, 0, init=5),
                       start('c', 50), resumed('c', 30), spent('c', 30, 31, step=1))
  assert nonzero(account) == {'step': 31, 'init': 5, 'idle': 15}


def test_a_clock_set_back_between_attempts_makes_no_negative_time():
  account = account_of(start('a', 1000), resumed('a', 0), spent('a', 0, 10, step=10), start('b', 400),
                       spent('b', 0, 0, init=5))
  assert nonzero(account) == {'step': 10, 'init': 5}


@pytest.mark.parametrize('seed', range(20))
def test_categories_sum_to_the_wall_time_and_steps_that_stand_are_counted_once(seed):
  """Random attempts of steps of one second each: what stands are exactly the steps that the last pass over them did."""
  rng, lines, now, reached, wanted_lost = random.Random(seed), [], 1e9, 0, 0
  for attempt in map(str, range(8)):
    lines.append(start(attempt, now))
    lines.append(spent(attempt, 0, 0, init=2.5, restore=1.5))
    now += 4
    if rng.random() < 0.8:
      first = rng.randint(0, reached)
      wanted_lost += reached - first
      lines.append(resumed(attempt, first))
      for _ in range(rng.randint(0, 5)):
        if rng.random() < 0.2:  # a rewind
          back = rng.randint(0, first)
          wanted_lost += first - back
          first = back
        last = first + rng.randint(1, 9)
        lines.append(spent(attempt, first, last, step=last - first, data=0.5))
        now += last - first + 0.5
        first = last
      reached = first
    end = now
    now += rng.choice([0, 0.25, 100])
  account = account_of(*lines)
  assert account.wall == pytest.approx(end - 1e9)
  assert account.seconds['step'] == pytest.approx(reached) and account.seconds['lost'] == pytest.approx(wanted_lost)
  assert sum(account.shares().values()) == pytest.approx(1)


@pytest.mark.parametrize('bad', ['{"kind": "ti', '[1]', '7', 'null', '\x00' * 40, '{"kind": 3}',
                                 '{"kind": "time", "attempt": "a"}',
                                 '{"kind": "time", "attempt": "a", "seconds": [1], "from": 0, "to": 1}',
                                 '{"kind": "time", "attempt": "other", "seconds": {"step": 1}, "from": 0, "to": 1}'])
def test_a_line_that_says_nothing_is_counted_and_spoils_nothing(tmp_path, bad):
  good = [start('a', 0), resumed('a', 0), spent('a', 0, 10, step=10), start('b', 20), resumed('b', 10)]
  lines = [json.dumps(line) for line in good]
  (tmp_path / 'goodput.jsonl').write_text('\n'.join([*lines[:3], bad, *lines[3:]]) + '\n')
  account = read(tmp_path / 'goodput.jsonl')
  assert nonzero(account) == {'step': 10, 'idle': 10} and account.ignored == 1


# -- what a process writes


RUN = """
import sys, time
from maxlm.ledger import Ledger
path, first, sleep = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with Ledger(path) as ledger:
  time.sleep(0.2)
  ledger.enter('restore')
  time.sleep(0.1)
  ledger.resumed(first)
  ledger.enter('data')
  print('ready', flush=True)
  for step in range(first + 1, first + 1001):
    ledger.enter('step')
    time.sleep(sleep)
    ledger.steps(step)
    ledger.enter('data')
    if step % 10 == 0:
      ledger.enter('checkpoint')
      time.sleep(0.01)
      ledger.enter('data')
"""


def begin(path: Path, first: int, sleep: float) -> subprocess.Popen:
  process = subprocess.Popen([sys.executable, '-c', RUN, str(path), str(first), str(sleep)], stdout=subprocess.PIPE,
                             env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True)
  assert process.stdout.readline() == 'ready\n'
  return process


def test_a_killed_and_a_finished_attempt_add_up_to_the_wall_time(tmp_path):
  path = tmp_path / 'goodput.jsonl'
  before = time.time()
  process = begin(path, 0, 0.02)
  time.sleep(7)
  process.kill()
  process.wait()
  killed = read(path)
  assert killed.attempts[0].how is None and killed.attempts[0].done >= 100
  assert 4.5 <= killed.wall <= 7 + SLACK + time.time() - before - 7  # at most one interval between lines is missing
  time.sleep(1)
  process = begin(path, 50, 0)
  assert process.wait() == 0
  after = time.time()
  account = read(path)
  assert [attempt.how for attempt in account.attempts] == [None, 'finished']
  assert (account.attempts[1].resumed, account.attempts[1].done) == (50, 1050)
  assert account.wall == pytest.approx(after - before, abs=1)  # an interpreter begins and ends outside of it
  assert account.wall == pytest.approx(json.loads(path.read_text().splitlines()[-1])['time'] - account.attempts[0].start,
                                       abs=SLACK)
  assert account.seconds['idle'] >= 1 and account.seconds['init'] >= 0.4 and account.seconds['restore'] >= 0.2
  assert account.seconds['lost'] == pytest.approx(killed.seconds['step'] * (1 - 50 / killed.attempts[0].done), rel=0.1)


def test_long_phases_are_written_down_while_they_last(tmp_path):
  """A kill in the tenth minute of a compilation does not make nine minutes idle."""
  with Ledger(tmp_path / 'goodput.jsonl') as ledger:
    ledger.enter('compile')
    until = time.monotonic() + 60
    while not read(tmp_path / 'goodput.jsonl').seconds['compile'] and time.monotonic() < until:
      time.sleep(0.1)
    assert read(tmp_path / 'goodput.jsonl').seconds['compile'] >= 4
    assert ledger.shares()['compile'] > 0 and sum(ledger.shares().values()) == pytest.approx(1)


def test_attempts_of_one_process_share_its_time(tmp_path):
  path = tmp_path / 'goodput.jsonl'
  for how in ('SIGTERM', 'finished'):
    with Ledger(path) as ledger:
      time.sleep(0.1)
      ledger.close(how)
      ledger.enter('step')  # says nothing any more
  account = read(path)
  assert [attempt.how for attempt in account.attempts] == ['SIGTERM', 'finished']
  assert account.wall == pytest.approx(process_age(), abs=SLACK) and set(nonzero(account)) <= {'init', 'idle'}


def test_phases_from_before_the_ledger_was_opened_have_their_time(tmp_path):
  now, age = time.monotonic(), process_age()
  with Ledger(tmp_path / 'goodput.jsonl') as ledger:
    for phase, at in ('init', now - 0.9 * age), ('restore', now - 0.6 * age), ('init', now - 0.1 * age):
      ledger.enter(phase, at)
      time.sleep(0.05)  # the thread could run
    ledger.enter('compile')
  seconds = read(tmp_path / 'goodput.jsonl').seconds
  assert seconds['restore'] == pytest.approx(0.5 * age, abs=SLACK)
  assert seconds['init'] == pytest.approx(0.5 * age, abs=0.2 + SLACK)


def test_a_rewind_and_an_event_are_recorded(tmp_path):
  with Ledger(tmp_path / 'goodput.jsonl') as ledger:
    ledger.resumed(0)
    ledger.enter('step')
    ledger.steps(10)
    time.sleep(0.2)
    ledger.event('rewind', at=10, to=4)
    ledger.steps(4)
    time.sleep(0.2)
    ledger.steps(6)
    with pytest.raises(TypeError):
      ledger.event('rewind', at=object())
  account = read(tmp_path / 'goodput.jsonl')
  assert [(event['event'], event['at'] > 0, event['to']) for event in account.events] == [('rewind', True, 4)]
  assert account.seconds['lost'] == pytest.approx(0.2 * 6 / 10, abs=SLACK)
  assert account.attempts[0].done == 6


def test_an_exception_names_how_an_attempt_ended(tmp_path):
  with pytest.raises(ValueError), Ledger(tmp_path / 'goodput.jsonl'):
    raise ValueError('a secret')
  assert read(tmp_path / 'goodput.jsonl').attempts[0].how == 'ValueError'
  assert 'secret' not in (tmp_path / 'goodput.jsonl').read_text()


def test_a_cut_line_is_ended_before_the_next_attempt_writes(tmp_path):
  path = tmp_path / 'goodput.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in [start('a', 0), resumed('a', 0)]) + '{"kind": "time", "atte')
  Ledger(path).close()
  account = read(path)
  assert account.ignored == 1 and [attempt.how for attempt in account.attempts] == [None, 'finished']


FULL = """
import resource, sys, time
from maxlm.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
  time.sleep(1.5)
  resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))  # the file ends within a line
  for phase in ('restore', 'compile', 'data'):
    ledger.enter(phase)
    time.sleep(1.2)
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_what_a_full_disk_refuses_is_told_once_and_written_later(tmp_path):
  path = tmp_path / 'goodput.jsonl'
  ran = subprocess.run([sys.executable, '-c', FULL, str(path)], env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True,
                       capture_output=True, check=True)
  assert ran.stderr.count('\n') == 1 and 'File too large' in ran.stderr
  account = read(path)
  assert not account.ignored and account.attempts[0].how == 'finished'
  assert all(account.seconds[phase] >= 1 for phase in ('init', 'restore', 'compile', 'data'))


def test_a_process_that_does_not_write_keeps_nothing():
  ledger = Ledger(None)
  for step in range(100):
    ledger.enter('step')
    ledger.steps(step)
  ledger.event('rewind')
  ledger.close()
  assert not ledger._marks and ledger.shares() == {}


def test_a_phase_change_costs_microseconds(tmp_path):
  with Ledger(tmp_path / 'goodput.jsonl') as ledger:
    began = time.perf_counter()
    for step in range(20_000):
      ledger.enter('step')
      ledger.steps(step)
      ledger.enter('data')
    assert (time.perf_counter() - began) / 60_000 < 20e-6


# -- the command


@pytest.fixture
def workdir(tmp_path) -> Path:
  lines = [start('a', 1.79e9), spent('a', 0, 0, init=5, compile=10), resumed('a', 0), spent('a', 0, 100, data=5, step=95),
           {'kind': 'event', 'attempt': 'a', 'time': 0, 'event': 'rewind <b>', 'from': 3}, spent('a', 90, 110, step=20),
           start('b', 1.79e9 + 200), resumed('b', 100), spent('b', 100, 150, step=50),
           {'kind': 'end', 'attempt': 'b', 'time': 0, 'how': 'SIGTERM'}]
  (tmp_path / 'goodput.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return tmp_path


def run_command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', 'maxlm.goodput', *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_command_says_where_the_time_went(workdir):
  ran = run_command(str(workdir), f'--plot={workdir}/plot.html')
  assert ran.returncode == 0, ran.stderr
  for part in ('2 attempts, 4m 10s', 'goodput 58.', 'idle', 'lost', '0 to 110', '100 to 150', 'SIGTERM', 'killed',
               "1 x rewind <b>"):
    assert part in ran.stdout, ran.stdout
  picture = (workdir / 'plot.html').read_text()
  assert picture.count('<svg') == 1 and 'rewind &lt;b&gt;' in picture and picture.count('http') == 1  # the SVG's namespace
  answer = json.loads(run_command(str(workdir), '--json').stdout)
  assert answer['wall'] == pytest.approx(250) == pytest.approx(sum(answer['seconds'].values()))
  assert answer['attempts'][1]['resumed'] == 100 and answer['events'][0]['event'] == 'rewind <b>'


def test_the_picture_has_each_second_in_its_place(workdir):
  """The widths of a lane's bars are the seconds of the attempt; those of the first bar, of the run."""
  account = read(workdir / 'goodput.jsonl')
  bars = goodput._sorted_bar(account, 2.0)
  assert sum(width for _, width, *_ in bars) == pytest.approx(500)
  for attempt, seconds in zip(account.attempts, (135, 50)):
    bars = goodput._attempt_bars(account, attempt, account.attempts[0].start, 2.0)
    assert sum(width for _, width, *_ in bars) == pytest.approx(2 * seconds)
    assert all(x + width == pytest.approx(after) for (x, width, *_), (after, *_) in zip(bars, bars[1:]))
  assert goodput._attempt_bars(account, account.attempts[1], account.attempts[0].start, 2.0)[0][0] == pytest.approx(400)


def test_the_command_refuses_in_one_line(tmp_path):
  refused = ([str(tmp_path)], 'give the workdir'), ([], 'say which run'), ([str(tmp_path), '--plot=a.png'], '.svg')
  for arguments, words in refused:
    ran = run_command(*arguments)
    assert ran.returncode == 2 and words in ran.stderr and ran.stderr.count('\n') == 1
