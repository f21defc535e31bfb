"""When a run saves, and what it does when a save fails."""

import contextlib
import math

import jax
import jax.numpy as jnp
import pytest

from maxlm.checkpoint import CheckpointConfig, Checkpoints
from maxlm.saving import FIRST, Saver, interval_seconds

ARRAYS = {'params': {'x': jnp.arange(64.0)}, 'opt': {'x': jnp.ones(64)}}


def test_the_interval_is_youngs_and_a_save_costs_at_most_one_percent():
  youngs = math.sqrt(2 * 1.0 * 24 * 3600)
  assert interval_seconds(1.0, hours=0, failures=0, n_devices=1) == pytest.approx(youngs) and youngs > 100
  for stall, hours, failures, n_devices in ((0.05, 0, 0, 1), (3, 100, 40, 512), (30, 1, 20, 4096), (600, 0, 0, 64)):
    seconds = interval_seconds(stall, hours, failures, n_devices)
    assert stall / seconds <= 0.01 + 1e-9
    assert seconds >= interval_seconds(stall, hours, failures + 1, n_devices)  # who fails more saves more often
    assert seconds <= interval_seconds(2 * stall, hours, failures, n_devices)  # a dearer save is made less often


def test_failures_are_those_of_the_run_when_there_are_enough_of_them():
  """After 1,000 hours with a failure in each, what other machines have does not matter any more."""
  expected = math.sqrt(2 * 0.5 * 3600)
  for n_devices in (1, 16_384):
    assert interval_seconds(0.5, hours=1000, failures=1000, n_devices=n_devices) == pytest.approx(expected, rel=0.02)


@contextlib.contextmanager
def saver(directory, config: CheckpointConfig, events: list, first_step: int = 0):
  checkpoints = Checkpoints(directory / 'checkpoints', keep_last=100)
  yield Saver(checkpoints, config, first_step, hours=0, failures=0, n_devices=1,
              event=lambda kind, **facts: events.append((kind, facts)))
  with contextlib.suppress(OSError):
    checkpoints.close()


def steps_saved(saver: Saver, steps, seconds_per_step) -> list[int]:
  saved = []
  for step in steps:
    if saver.is_due(step, seconds_per_step):
      saver.save(step, **ARRAYS, meta={'step': step})
      saved.append(step)
  return saved


@pytest.mark.parametrize('config, expected', [
  (CheckpointConfig(every_steps=20), [20, 40, 60]), (CheckpointConfig(every_steps=25, keep_every=30), [25, 30, 50, 60])])
def test_a_fixed_interval(tmp_path, config, expected):
  with saver(tmp_path, config, []) as it:
    assert steps_saved(it, range(1, 61), 0.001) == expected and it.last == 60
  assert Checkpoints(tmp_path / 'checkpoints').steps() == expected


def test_an_automatic_interval_follows_from_what_the_first_save_has_cost(tmp_path):
  """A step of 1,000 s: every one is saved. One of a microsecond: none is, after the two that measure."""
  with saver(tmp_path / 'slow', CheckpointConfig(), []) as it:
    assert steps_saved(it, range(1, 25), 1000.0)[:2] == [FIRST, 2 * FIRST]
    assert steps_saved(it, range(25, 28), 1000.0) == [25, 26, 27]
  with saver(tmp_path / 'fast', CheckpointConfig(), [], first_step=100) as it:
    assert steps_saved(it, range(101, 1000), 1e-6) == [100 + FIRST, 100 + 2 * FIRST]


def test_a_failed_save_is_told_tried_again_at_the_next_step_and_forgotten_after_a_good_one(tmp_path, capfd):
  events, config = [], CheckpointConfig(every_steps=10, max_failures=3)
  (tmp_path / 'checkpoints').write_text('')  # no directory can be made here
  with saver(tmp_path, config, events) as it:
    assert steps_saved(it, range(1, 11), 1.0) == [10]
    assert len(events) == 1 and events[0][0] == 'save failed' and '1 in a row, 3 end the run' in capfd.readouterr().err
    assert it.last == 0
    (tmp_path / 'checkpoints').unlink()
    assert steps_saved(it, range(11, 12), 1.0) == [11]  # not at 20
    assert steps_saved(it, range(12, 21), 1.0)[-1] == 20 and it.last == 20
    it.close()
    assert Checkpoints(tmp_path / 'checkpoints').steps()[-1] == 20


def test_failures_in_a_row_end_the_run(tmp_path):
  (tmp_path / 'checkpoints').write_text('')
  with saver(tmp_path, CheckpointConfig(every_steps=1, max_failures=2), events := []) as it:
    with pytest.raises(OSError, match='the checkpoint of step 2 was not written'):
      steps_saved(it, range(1, 5), 1.0)
  assert len(events) == 2


def test_copies_of_weights_that_differ_are_told_by_name(mesh_of, tmp_path):
  from maxlm.health import CorruptCopies, Health, HealthConfig

  with mesh_of(data=4), Health(HealthConfig(compare_every=2), tmp_path) as health:
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    pieces = [jax.device_put(jnp.ones(8).at[3].add(0 if i != 2 else 1e-6), device)
              for i, device in enumerate(sharding.mesh.devices.flatten())]
    good, bad = jax.device_put(jnp.ones(8), sharding), jax.make_array_from_single_device_arrays((8,), sharding, pieces)
    health.begin(0, {'w': good})
    health.steps(1, {'w': bad}, 0.1)  # not compared
    health.steps(2, {'w': good}, 0.1)
    with pytest.raises(CorruptCopies, match=r'step 4 device \d+ of process 0 holds other numbers in w'):
      health.steps(4, {'w': bad}, 0.1)
  assert '"event": "corrupt"' in (tmp_path / 'goodput.jsonl').read_text()
