"""The mixture schedule: exact weights, closed-form counts, stages that never change what went before."""

import math
import random

import numpy as np
import pytest

from data_pipeline.mixture import MixtureSchedule

WEIGHTS = [{'a': 1}, {'a': 3, 'b': 1}, {'a': 1, 'b': 1, 'c': 1}, {'a': 7, 'b': 2, 'c': 90, 'd': 1, 'e': 13},
           {'a': 6, 'b': 4, 'c': 0}, {'a': 123_456_789, 'b': 98_765, 'c': 1}]
STAGES = ((7, {'web': 3, 'books': 1}), (0, {'web': 1}), (12, {'books': 1, 'web': 1, 'code': 5}),
          (None, {'code': 2, 'web': 1}))


@pytest.mark.parametrize('weights', WEIGHTS)
def test_counts_equal_the_weights_over_every_period(weights):
  schedule, period = MixtureSchedule(stages=((None, weights),)), sum(weights.values())
  for first in (0, 1, 5, 10**6):
    assert schedule.counts(first * period, (first + 3) * period) == {name: 3 * weight for name, weight in weights.items()}


@pytest.mark.parametrize('stages', [((None, weights),) for weights in WEIGHTS] + [STAGES])
def test_rows_are_what_the_counts_say_and_each_source_goes_on_where_it_was(stages):
  schedule = MixtureSchedule(stages=stages)
  seen = dict.fromkeys(schedule.sources, 0)
  for row in range(300):
    assert schedule.counts(0, row) == seen
    source, within = schedule.source_of(row)
    assert within == seen[schedule.sources[source]]
    seen[schedule.sources[source]] += 1
  sources, within = schedule.sources_of(np.arange(300))
  assert list(zip(sources.tolist(), within.tolist())) == [schedule.source_of(row) for row in range(300)]


@pytest.mark.parametrize('weights', WEIGHTS)
def test_no_prefix_strays_from_the_weights(weights):
  schedule, total = MixtureSchedule(stages=((None, weights),)), sum(weights.values())
  allowed = math.ceil(math.log2(max(len(weights), 2)))
  for row in range(0, 3000, 7):
    for name, count in schedule.counts(0, row).items():
      assert abs(count - row * weights[name] / total) <= allowed


def test_appending_a_stage_changes_no_earlier_row():
  for n_stages in range(1, len(STAGES)):
    rows = sum(rows for rows, _ in STAGES[:n_stages])
    short, whole = MixtureSchedule(stages=STAGES[:n_stages]), MixtureSchedule(stages=STAGES)
    assert short.n_rows == rows and whole.sources[:len(short.sources)] == short.sources
    assert [short.source_of(row) for row in range(rows)] == [whole.source_of(row) for row in range(rows)]
  # An open-ended stage that is closed to make room for another.
  opened, closed = (MixtureSchedule(stages=((rows, STAGES[2][1]), *more)) for rows, more in (
    (None, ()), (29, ((None, {'new': 1, 'web': 1}),))))
  assert [opened.source_of(row) for row in range(29)] == [closed.source_of(row) for row in range(29)]


def test_the_order_in_which_a_stage_names_its_sources_does_not_matter():
  names = list(WEIGHTS[3].items())
  random.Random(0).shuffle(names)
  one, other = MixtureSchedule(stages=((None, WEIGHTS[3]),)), MixtureSchedule(stages=((None, dict(names)),))
  assert one.sources == other.sources and all(one.source_of(row) == other.source_of(row) for row in range(500))


def test_a_far_row_costs_no_more_and_agrees_with_the_counts():
  schedule, far = MixtureSchedule(stages=((10, {'a': 1}), (None, WEIGHTS[5]))), 10**15
  before = schedule.counts(0, far)
  source, within = schedule.source_of(far)
  name = schedule.sources[source]
  assert sum(before.values()) == far and within == before[name]
  assert schedule.counts(0, far + 1) == before | {name: before[name] + 1}
  assert schedule.counts(far - 7, far + 5) == {
    name: sum(schedule.sources[schedule.source_of(row)[0]] == name for row in range(far - 7, far + 5)) for name in before}


def test_a_source_of_weight_zero_is_known_and_never_drawn():
  schedule = MixtureSchedule(stages=((None, {'a': 2, 'b': 0}),))
  assert schedule.sources == ('a', 'b') and schedule.counts(0, 100) == {'a': 100, 'b': 0}
  assert schedule.draws('a') and not schedule.draws('b')


@pytest.mark.parametrize(('stages', 'complaint'), [
  ((), 'at least one stage'),
  (((None, {'a': 1}), (5, {'a': 1})), 'open-ended but not the last'),
  (((-1, {'a': 1}),), 'rows=-1'),
  (((2.5, {'a': 1}),), 'rows=2.5'),
  (((5, {'a': 0.75, 'b': 0.25}),), 'weights are integers'),
  (((5, {'a': -1, 'b': 2}),), 'weights are integers'),
  (((5, {'a': True}),), 'weights are integers'),
  (((5, {'a': 0}),), 'add up to 0'),
  (((5, {}),), 'add up to 0'),
  (((5, {'a': 2**31}),), 'add up to'),
])
def test_what_is_not_exact_is_refused(stages, complaint):
  with pytest.raises(ValueError, match=complaint):
    MixtureSchedule(stages=stages)


def test_rows_outside_the_schedule_are_refused():
  schedule = MixtureSchedule(stages=((5, {'a': 1}),))
  for row in (-1, 5):
    with pytest.raises(IndexError, match='outside the schedule of 5 rows'):
      schedule.source_of(row)
  with pytest.raises(IndexError):
    schedule.counts(0, 6)
