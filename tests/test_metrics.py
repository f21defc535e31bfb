"""The record of a run has each step once, whatever happened to the attempts; the progress line says what is true."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from maxlm.metrics import MetricsWriter, Progress, StepClock, duration, progress_line, si
from maxlm.steplog import StepLog

ROOT = Path(__file__).parents[1]


def record(workdir) -> list[dict]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def write(workdir, steps, *, resumed_from=None, **values):
  writer = MetricsWriter(workdir, resumed_from=resumed_from)
  for step in steps:
    writer.write(step, values or {'loss': float(step)})
  writer.close()


def test_a_line_has_step_time_and_values(tmp_path):
  write(tmp_path, [3], loss=1.5, mfu=0.25)
  (line,) = record(tmp_path)
  assert abs(line.pop('time') - time.time()) < 60
  assert line == {'step': 3, 'loss': 1.5, 'mfu': 0.25}


def test_what_is_not_finite_is_null(tmp_path):
  write(tmp_path, [1], loss=float('nan'), grad_norm=float('inf'))
  assert record(tmp_path)[0] | {'time': 0} == {'step': 1, 'time': 0, 'loss': None, 'grad_norm': None}


def test_resuming_leaves_each_step_once(tmp_path):
  write(tmp_path, [1, 2, 3, 4, 5])
  write(tmp_path, [4, 5, 6], resumed_from=3)
  assert [line['step'] for line in record(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_resuming_drops_the_evaluation_that_followed_the_checkpoint(tmp_path):
  write(tmp_path, [1, 2, 3])
  write(tmp_path, [3], resumed_from=3, **{'eval/loss/all': 2.0})
  write(tmp_path, [3], resumed_from=3, **{'eval/loss/all': 2.0})
  steps = [(line['step'], 'eval/loss/all' in line) for line in record(tmp_path)]
  assert steps == [(1, False), (2, False), (3, False), (3, True)]


def test_starting_anew_begins_the_record_anew(tmp_path):
  write(tmp_path, [0, 1, 2])
  write(tmp_path, [0, 1])
  assert [line['step'] for line in record(tmp_path)] == [0, 1]


@pytest.mark.parametrize('cut, steps', [(1, [1, 2, 3, 4]), (9, [1, 2, 4])])
def test_a_line_that_was_cut_is_dropped_and_the_file_stays_valid(tmp_path, cut, steps):
  write(tmp_path, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-cut])  # of one byte, the line is all there
  write(tmp_path, [4], resumed_from=3)
  assert [line['step'] for line in record(tmp_path)] == steps


@pytest.mark.parametrize('which', ['_file', '_board'])
def test_a_full_disk_is_an_error_and_not_a_wait(tmp_path, which):
  writer = MetricsWriter(tmp_path)
  file = {'_file': writer._file, '_board': writer._board._py_recordio_writer._writer}[which]
  full = os.open('/dev/full', os.O_WRONLY)
  os.dup2(full, file.fileno())
  os.close(full)
  with pytest.raises(OSError, match='No space left'):
    for step in range(100):
      writer.write(step, {'loss': 1.0})


def test_every_line_written_before_a_kill_is_there(tmp_path):
  script = ('import os, signal, sys; from maxlm.metrics import MetricsWriter\n'
            'writer = MetricsWriter(sys.argv[1])\n'
            'for step in range(100): writer.write(step, {"loss": 1.0})\n'
            'os.kill(os.getpid(), signal.SIGKILL)')
  killed = subprocess.run([sys.executable, '-c', script, tmp_path], cwd=ROOT, timeout=60)
  assert killed.returncode == -signal.SIGKILL
  assert [line['step'] for line in record(tmp_path)] == list(range(100))


def board_events(workdir) -> list[Event]:
  """The events in TensorBoard's files: length (8 bytes), checksum (4), event, checksum (4), and again."""
  events = []
  for path in sorted((workdir / 'tensorboard').iterdir(), key=os.path.getmtime):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], 'little')
      events.append(Event.FromString(data[12:12 + length]))
      data = data[16 + length:]
  return events


def test_tensorboard_has_the_same_names_and_hides_what_was_dropped(tmp_path):
  write(tmp_path, [1, 2, 3])
  write(tmp_path, [3], resumed_from=2, loss=9.0, mfu=0.5)
  events = board_events(tmp_path)
  scalars = [(event.step, value.tag) for event in events for value in event.summary.value]
  assert scalars == [(1, 'loss'), (2, 'loss'), (3, 'loss'), (3, 'loss'), (3, 'mfu')]
  # From the step of a START on, TensorBoard hides whatever came before it.
  assert [event.step for event in events if event.session_log.status == SessionLog.START] == [0, 3]


def test_a_workdir_that_cannot_be_written_is_an_oserror(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError):
    MetricsWriter(tmp_path / 'file' / 'run')


def test_the_first_step_is_not_in_the_rate():
  clock = StepClock()
  assert clock.finished(1, now=60.0) is None  # compiled for a minute
  assert clock.finished(2, now=60.5) == pytest.approx(0.5)
  assert clock.finished(4, now=61.5) == pytest.approx(0.5)


def test_a_pause_is_not_in_the_rate():
  clock = StepClock()
  for step in range(1, 5):
    clock.finished(step, now=float(step))
  clock.pause()
  assert clock.finished(5, now=1000.0) == pytest.approx(1.0)
  assert clock.finished(6, now=1001.0) == pytest.approx(1.0)


def test_the_rate_follows_the_last_steps():
  clock = StepClock(window=4)
  now = 0.0
  for step in range(1, 20):
    now += 1.0 if step < 10 else 3.0
    rate = clock.finished(step, now=now)
  assert rate == pytest.approx(3.0)


def test_progress_line():
  values = {'grad_norm': 0.8213, 'x': 1.0, 'loss': 4.21297, 'mfu': 0.4119, 'tokens_per_second': 12345.6,
            'learning_rate': 3e-4}
  assert progress_line(1200, 5000, values, 0.05) == (
    'step 1,200/5,000  24%  3m 10s left  loss 4.2130  12.3k tok/s  MFU 41.2%  lr 3.00e-04  grad norm 0.821')
  assert progress_line(1, 3, {'loss': float('nan')}, None) == 'step 1/3  33%  loss nan'
  assert progress_line(3, 3, {'loss': 1.0}, 0.5) == 'step 3/3  100%  loss 1.0000'


@pytest.mark.parametrize('value, text', [
  (0.5, '0.5'), (999, '999'), (999.6, '1k'), (1234, '1.23k'), (5.6e6, '5.6M'), (2e9, '2G')])
def test_si(value, text):
  assert si(value) == text


@pytest.mark.parametrize('seconds, text', [
  (0.2, '1s'), (59, '59s'), (59.5, '1m 00s'), (190, '3m 10s'), (3600, '1h 00m'), (7320, '2h 02m'), (90000, '1d 01h')])
def test_duration(seconds, text):
  assert duration(seconds) == text


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_pipe_gets_the_first_lines_at_once_then_a_few_and_the_last():
  pipe = io.StringIO()
  progress = Progress(50, stream=pipe, every_seconds=1000)
  for step in range(1, 51):
    progress.show(step, {'loss': 1.0}, None)
  progress.close()
  lines = pipe.getvalue().splitlines()
  assert [line.split()[1] for line in lines] == ['1/50', '2/50', '3/50', '50/50']
  assert '\r' not in pipe.getvalue() and '\x1b' not in pipe.getvalue()


def test_a_terminal_gets_one_line_that_changes(monkeypatch):
  monkeypatch.setenv('COLUMNS', '40')
  terminal = Terminal()
  progress = Progress(2, stream=terminal)
  values = {'loss': 1.0, 'tokens_per_second': 1e4, 'learning_rate': 1e-3}
  progress.show(1, values, 1.0)
  progress.print('saved')
  progress.show(2, values, 1.0)
  progress.close()
  text = terminal.getvalue()
  assert text.count('\n') == 2 and text.endswith('\n')
  first, second = text.split('\r\x1b[Ksaved\n')
  assert first == '\rstep 1/2  50%  1s left  loss 1.0000  10\x1b[K'  # cut at the width of the terminal
  assert second.startswith('step 1/2') and '\rstep 2/2' in second


def test_a_cpu_does_not_more_than_its_peak_however_that_was_measured(tmp_path, monkeypatch):
  monkeypatch.setattr('maxlm.flops.peak_flops', lambda device: 1e9)
  log = StepLog(tmp_path, 0, 10, None)
  assert [log.mfu(rate) for rate in (5e8, 2e9, 5e8)] == [0.5, 1.0, 0.25]
