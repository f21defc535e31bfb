"""JSON of typed dataclasses: a faithful round trip, and a refusal that names the key for everything else."""

import dataclasses
import json
from typing import Literal

import pytest

from maxlm import typed_json


@dataclasses.dataclass(kw_only=True, slots=True)
class Attention:
  heads: int = 4
  window: int | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Recurrent:
  state: int = 16


@dataclasses.dataclass(kw_only=True, slots=True)
class Layer:
  mixer: Attention | Recurrent
  kind: Literal['gated', 'plain'] = 'gated'


@dataclasses.dataclass(kw_only=True, slots=True)
class Experiment:
  name: str = 'test'
  pattern: tuple[Layer, ...] = ()
  betas: tuple[float, float] = (0.9, 0.95)
  stages: tuple[tuple[int, dict[str, int]], ...] = ()
  clip: float | None = 1.0
  tied: bool = False
  notes: list[str] = dataclasses.field(default_factory=list)


def experiment() -> Experiment:
  return Experiment(
    pattern=(Layer(mixer=Attention(window=128)), Layer(mixer=Recurrent(), kind='plain')),
    stages=((1000, {'web': 3, 'books': 1}), (500, {'books': 1})), clip=None, tied=True, notes=['a'])


def test_round_trip_is_equal_and_of_the_same_types():
  config = experiment()
  again = typed_json.loads(typed_json.dumps(config), Experiment)
  assert again == config
  assert type(again.pattern) is tuple and type(again.stages[0]) is tuple and type(again.notes) is list
  assert [type(layer.mixer) for layer in again.pattern] == [Attention, Recurrent]


def test_round_trip_shares_nothing():
  layer = Layer(mixer=Attention())
  config = Experiment(pattern=(layer, layer))
  again = typed_json.loads(typed_json.dumps(config), Experiment)
  again.pattern[0].mixer.window = 7
  assert again.pattern[1].mixer.window is None and layer.mixer.window is None


def test_a_missing_key_takes_its_default():
  assert typed_json.loads('{"name": "old", "clip": 2.0}', Experiment) == Experiment(name='old', clip=2.0)


def test_a_whole_number_is_a_float_where_a_float_is_due():
  assert type(typed_json.loads(typed_json.dumps(Experiment(clip=1)), Experiment).clip) is float


@pytest.mark.parametrize('change, message', [
  (lambda plain: plain.update(nam='x'), "nam: unknown key of Experiment"),
  (lambda plain: plain['pattern'][0].pop('mixer'), 'pattern[0].mixer: missing key of Layer'),
  (lambda plain: plain.update(clip='1'), "clip: expected float or None, got '1'"),
  (lambda plain: plain.update(clip=True), 'clip: expected float or None, got True'),
  (lambda plain: plain.update(tied=1), 'tied: expected bool, got 1'),
  (lambda plain: plain.update(betas=[0.9]), 'betas: expected tuple[float, float], got 1 items'),
  (lambda plain: plain['pattern'][0].update(kind='gate'), "pattern[0].kind: expected 'gated' or 'plain', got 'gate'"),
  (lambda plain: plain['pattern'][0]['mixer'].update(heads=4.0), 'pattern[0].mixer.heads: expected int, got 4.0'),
  (lambda plain: plain['pattern'][0]['mixer'].update(heads=True), 'pattern[0].mixer.heads: expected int, got True'),
  (lambda plain: plain['pattern'][1]['mixer'].update(type='os.system'),
   "pattern[1].mixer.type: expected 'Attention' or 'Recurrent', got 'os.system'"),
  (lambda plain: plain['pattern'][1]['mixer'].pop('type'),
   "pattern[1].mixer.type: expected 'Attention' or 'Recurrent', got None"),
  (lambda plain: plain['stages'][0][1].update(web='3'), "stages[0][1]['web']: expected int, got '3'"),
])
def test_what_does_not_fit_is_refused_by_its_path(change, message):
  plain = json.loads(typed_json.dumps(experiment()))
  change(plain)
  with pytest.raises(ValueError) as error:
    typed_json.loads(json.dumps(plain), Experiment)
  assert str(error.value) == message


@pytest.mark.parametrize('config, message', [
  (Experiment(clip=float('nan')), 'clip: nan is not a finite number'),
  (Experiment(betas=[0.9, 0.95]), 'betas: expected tuple[float, float], got [0.9, 0.95]'),
  (Experiment(pattern=(Layer(mixer=Attention(heads='4')),)), "pattern[0].mixer.heads: expected int, got '4'"),
])
def test_a_config_that_breaks_its_own_annotations_is_not_written(config, message):
  with pytest.raises(ValueError) as error:
    typed_json.dumps(config)
  assert str(error.value) == message


def test_flat_keys_are_those_of_the_command_line():
  flat = typed_json.flat(typed_json.encode(experiment(), Experiment))
  assert flat['pattern[0].mixer.window'] == 128 and flat['pattern[1].mixer.type'] == 'Recurrent'
  assert flat['stages[1][1].books'] == 1 and flat['clip'] is None and flat['betas[0]'] == 0.9


def test_text_that_is_not_json_is_refused():
  with pytest.raises(ValueError, match='not JSON'):
    typed_json.loads('{"name": ', Experiment)
