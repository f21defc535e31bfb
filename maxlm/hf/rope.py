"""Rotary positions in config.json <-> RopeSpec.

transformers 5 writes one object `rope_parameters` (or one a kind of layer); published configs have `rope_theta` and
`rope_scaling`, some `partial_rotary_factor`. Both are read (where both stand they must agree) and both are written.
"""

import math
from typing import Any

from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling


def read_rope(keys: Keys, *, theta: float = 10_000.0, fraction: float | None = None, interleaved: bool = False,
              besides: tuple[str, ...] = ()) -> RopeSpec:
  """The one RopeSpec of a config; theta and fraction where it does not say. fraction None: the family's heads are rotated
  whole, and a config that says otherwise is refused. besides: keys of `rope_parameters` that the family reads itself."""
  theta, fraction = keys.float('rope_theta', theta), _fraction(keys, fraction)
  found = []
  for key in ('rope_parameters', 'rope_scaling'):
    if keys.dict(key, None):
      inner = keys.inner(key)
      inner.inert(*besides)
      found.append(_read(keys, inner, theta, fraction, interleaved))
  if len(found) == 2 and found[0] != found[1]:
    raise ValueError(f'{keys.where}: rope_parameters and rope_scaling contradict each other')
  return found[0] if found else _read(keys, Keys({}), theta, fraction, interleaved)


def read_ropes(keys: Keys, *, theta: float, local: tuple[str, float]) -> dict[str, RopeSpec]:
  """The RopeSpecs of full and of sliding attention, from an object for each in `rope_parameters`. Published configs say it
  with `rope_theta` and `rope_scaling` for full attention, and with the key `local` for the other's theta. theta, local[1]:
  where nothing says."""
  thetas = {FULL: keys.float('rope_theta', theta), SLIDING: keys.float(*local)}
  nested, ropes = Keys(keys.dict('rope_parameters', {}), f'{keys.where}: rope_parameters'), {}
  for kind, theta in thetas.items():
    scaling = keys.dict('rope_scaling', {}) if kind == FULL else {}
    inner = Keys({'rope_theta': theta} | nested.dict(kind, {}) | scaling, f'{nested.where}: {kind}')
    inner.fixed('truncate', True)  # transformers does not look for it here
    ropes[kind] = _read(keys, inner, inner.float('rope_theta'), None, False)
  nested.done()
  return ropes


def write_rope(rope: RopeSpec | None) -> dict[str, Any]:
  """The keys of config.json that `read_rope` understands, in both spellings. ValueError if there is no rope."""
  if rope is None:
    raise ValueError('its layers have rotary positions')
  parameters = rope_parameters(rope)
  scaling = {key: value for key, value in parameters.items() if key not in ('rope_theta', 'partial_rotary_factor')}
  keys = {'rope_parameters': parameters, 'rope_theta': rope.theta, 'rope_scaling': scaling if rope.scaling else None}
  return keys | ({'partial_rotary_factor': rope.fraction} if rope.fraction != 1.0 else {})


def write_ropes(ropes: dict[str, RopeSpec | None]) -> dict[str, Any]:
  """The keys that `read_ropes` understands but for `local`. ValueError if one has no rope."""
  keys = {kind: write_rope(rope) for kind, rope in ropes.items()}
  return keys[FULL] | {'rope_parameters': {kind: written['rope_parameters'] for kind, written in keys.items()}}


def rope_parameters(rope: RopeSpec) -> dict[str, Any]:
  """The object that transformers 5 has for one kind of layer."""
  common = {'rope_theta': rope.theta} | ({'partial_rotary_factor': rope.fraction} if rope.fraction != 1.0 else {})
  match rope.scaling:
    case None:
      return {'rope_type': 'default', **common}
    case LinearScaling(factor=factor):
      return {'rope_type': 'linear', 'factor': factor, **common}
    case Llama3Scaling() as s:
      return {'rope_type': 'llama3', 'factor': s.factor, 'low_freq_factor': s.low_turns, 'high_freq_factor': s.high_turns,
              'original_max_position_embeddings': s.original_length, **common}
    case LongRopeScaling() as s:
      divisors = list(s.divisors)
      return {'rope_type': 'longrope', 'short_factor': divisors, 'long_factor': divisors, 'attention_factor': s.amplitude,
              **common}
    case YarnScaling() as s:
      amplitude = {} if s.amplitude is None else {'attention_factor': s.amplitude}
      return {'rope_type': 'yarn', 'factor': s.factor, 'beta_fast': s.fast_turns, 'beta_slow': s.slow_turns,
              'original_max_position_embeddings': s.original_length, 'truncate': s.truncate, **amplitude, **common}


def yarn_amplitude(factor: float, mscale: float = 1.0) -> float:
  """How much YaRN stretches queries and keys together for a context `factor` times as long (its eq. 22)."""
  return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _fraction(keys: Keys, default: float | None) -> float | None:
  """partial_rotary_factor. Where the default is None transformers does not look for it, so there is none but 1."""
  if default is None:
    return keys.fixed('partial_rotary_factor', 1.0)
  return keys.float('partial_rotary_factor', default)


def _read(keys: Keys, inner: Keys, theta: float, fraction: float | None, interleaved: bool) -> RopeSpec:
  kind = inner.str('rope_type', None) or inner.str('type', 'default')
  inner.fixed('type', kind)  # some have both
  fraction = _fraction(inner, fraction)
  spec = RopeSpec(theta=inner.float('rope_theta', theta), fraction=1.0 if fraction is None else fraction,
                  interleaved=interleaved)
  if 'rope_theta' in keys.plain and spec.theta != theta:
    raise ValueError(f'{inner.where}: rope_theta={spec.theta} contradicts {theta} beside it')
  match kind:
    case 'default':
      inner.inert('original_max_position_embeddings', 'factor')  # of no use without scaling, and some have them
    case 'linear':
      spec.scaling = LinearScaling(factor=inner.float('factor'))
    case 'llama3':
      spec.scaling = Llama3Scaling(factor=inner.float('factor'), low_turns=inner.float('low_freq_factor'),
                                   high_turns=inner.float('high_freq_factor'), original_length=_original(keys, inner))
    case 'yarn':
      spec.scaling = _read_yarn(keys, inner)
    case 'longrope' | 'su':
      spec.scaling = _read_longrope(keys, inner)
    case _:
      raise ValueError(f'{inner.where}: rope_type={kind!r} is not supported; default, linear, llama3, yarn, longrope are')
  inner.done()
  return spec


def _original(keys: Keys, inner: Keys) -> int:
  """The length before stretching: beside the others (Phi-3), with them, or the longest."""
  within = inner.size('original_max_position_embeddings', None)
  return keys.size('original_max_position_embeddings', within) or keys.size('max_position_embeddings')


def _factor(keys: Keys, inner: Keys, original: int) -> float:
  return inner.float('factor', None) or keys.size('max_position_embeddings') / original


def _read_yarn(keys: Keys, inner: Keys) -> YarnScaling:
  original = _original(keys, inner)
  factor = _factor(keys, inner, original)
  amplitude = inner.float('attention_factor', None)
  mscale, mscale_all = inner.float('mscale', 0.0), inner.float('mscale_all_dim', 0.0)
  if amplitude is None and mscale and mscale_all:
    amplitude = yarn_amplitude(factor, mscale) / yarn_amplitude(factor, mscale_all)
  if amplitude is not None and math.isclose(amplitude, yarn_amplitude(factor), rel_tol=1e-9):
    amplitude = None
  return YarnScaling(factor=factor, original_length=original, fast_turns=inner.float('beta_fast', 32.0),
                     slow_turns=inner.float('beta_slow', 1.0), truncate=inner.bool('truncate', True), amplitude=amplitude)


def _read_longrope(keys: Keys, inner: Keys) -> LongRopeScaling:
  """transformers takes `long_factor` for a batch that is longer than the original length; a RopeSpec has one of the two."""
  short, long = (inner.list(key, (int, float)) for key in ('short_factor', 'long_factor'))
  amplitude = inner.float('attention_factor', None)
  if amplitude is None or short != long:
    original = _original(keys, inner)
    factor = _factor(keys, inner, original)
    if amplitude is None:
      amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if short != long and keys.size('max_position_embeddings') > original:
      keys.note(f'longrope: short_factor is used, as by transformers for up to {original:,} tokens; for a model of longer '
                'ones, give it the values of long_factor in config.json')
  inner.inert('factor', 'original_max_position_embeddings')
  return LongRopeScaling(divisors=tuple(map(float, short)), amplitude=amplitude)
