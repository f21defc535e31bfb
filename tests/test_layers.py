"""The parts that every family is made of, each against its definition written out in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec, QueryGrowth
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.rope import (
  LinearScaling,
  Llama3Scaling,
  LongRopeScaling,
  RopeSpec,
  YarnScaling,
  frequencies,
  rope_table,
  rotate,
)
from maxlm.layers.rows import Rows, rope_key
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, Layer, LayerSpec, Run, runs, unstack
from maxlm.sharding import spec as shard
from tests.modules import NORM, assert_close, perturbed, values_and_gradients

FP32 = ComputeConfig(dtype='float32', kernel='reference')


# -- norms


@pytest.mark.parametrize('kind', ['rms', 'layer'])
@pytest.mark.parametrize('one_plus', [False, True])
def test_a_norm_is_its_definition(mesh_of, kind, one_plus):
  rng = np.random.default_rng(0)
  x, scale, bias = rng.normal(2, 3, (2, 4, 6)), rng.normal(1, 0.3, 6), rng.normal(0, 1, 6)
  spec = NormSpec(kind=kind, one_plus=one_plus, eps=0.1)
  centred = x - x.mean(-1, keepdims=True) if kind == 'layer' else x
  expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1) * (scale + 1 if one_plus else scale)
  if kind == 'layer':
    expected += bias
  with mesh_of(1):
    norm = Norm(spec, 6)
    norm.scale_D[...] = jnp.asarray(scale, jnp.float32)
    if kind == 'layer':
      norm.bias_D[...] = jnp.asarray(bias, jnp.float32)
    np.testing.assert_allclose(norm(spec, jnp.asarray(x, jnp.float32)), expected, atol=1e-5)


def test_a_norm_starts_as_the_identity_of_normalised_input(mesh_of):
  x = np.array([[[3.0, -3.0, 3.0, -3.0]]], np.float32)
  with mesh_of(1):
    for spec in (NormSpec(), NormSpec(one_plus=True), NormSpec(kind='layer')):
      np.testing.assert_allclose(Norm(spec, 4)(spec, jnp.asarray(x)), x / 3, atol=1e-5)


@pytest.mark.parametrize('cast', ['before', 'after'])
def test_the_factor_of_a_norm_is_applied_in_the_dtype_it_says(mesh_of, cast):
  """In bfloat16 the two orders round differently: each is checked against its own roundings."""
  rng = np.random.default_rng(1)
  x, scale = jnp.asarray(rng.normal(size=(1, 8, 64)), jnp.bfloat16), jnp.asarray(rng.normal(1, 0.3, 64), jnp.float32)
  unit = np.asarray(x, np.float32)
  unit = unit / np.sqrt((unit**2).mean(-1, keepdims=True) + 1e-6)
  if cast == 'before':
    expected = jnp.asarray(unit).astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)
    other = (unit * scale).astype(jnp.bfloat16)
  else:
    expected = (unit * scale).astype(jnp.bfloat16)
    other = jnp.asarray(unit).astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)
  with mesh_of(1):
    spec = NormSpec(cast=cast)
    norm = Norm(spec, 64)
    norm.scale_D[...] = scale
    got = norm(spec, x)
  assert got.dtype == jnp.bfloat16
  assert np.mean(np.asarray(got) == np.asarray(expected)) > 0.98 > np.mean(np.asarray(got) == np.asarray(other))


# -- rotary positions


def turned(x, positions, frequency, interleaved):
  """Each pair of dims as a complex number, times e^(i * position * frequency)."""
  x = x.astype(np.float64)
  half = len(frequency)
  re, im = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
  z = (re + 1j * im) * np.exp(1j * positions[:, :, None, None] * frequency)
  out = np.empty_like(x)
  if interleaved:
    out[..., 0::2], out[..., 1::2] = z.real, z.imag
  else:
    out[..., :half], out[..., half:] = z.real, z.imag
  return out


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_pairs_of_the_first_dims_are_turned_by_position_times_frequency(interleaved, fraction):
  rng = np.random.default_rng(2)
  x, positions = rng.normal(size=(2, 5, 3, 16)).astype(np.float32), rng.integers(0, 200, (2, 5))
  spec = RopeSpec(theta=500.0, fraction=fraction, interleaved=interleaved)
  R = int(16 * fraction)
  frequency = np.array([500.0 ** (-2 * i / R) for i in range(R // 2)])
  expected = np.concatenate([turned(x[..., :R], positions, frequency, interleaved), x[..., R:]], axis=-1)
  got = rotate(jnp.asarray(x), spec, rope_table(jnp.asarray(positions), spec, 16))
  np.testing.assert_allclose(got, expected, atol=2e-4)  # fp32 angles of 200 radians are good to 1e-5


def test_scaled_frequencies_are_those_of_their_papers():
  """One frequency at a time, from the definitions in words, at theta 10,000 and 64 dims."""
  plain = [10_000.0 ** (-2 * i / 64) for i in range(32)]
  turns = [128 * f / (2 * math.pi) for f in plain]  # over 128 positions

  def check(scaling, expected, amplitude):
    got, got_amplitude = frequencies(RopeSpec(scaling=scaling), 64)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    assert got_amplitude == pytest.approx(amplitude)

  check(LinearScaling(factor=8.0), [f / 8 for f in plain], 1.0)
  check(LongRopeScaling(divisors=tuple(float(i + 1) for i in range(32)), amplitude=1.2),
        [f / (i + 1) for i, f in enumerate(plain)], 1.2)

  llama3 = []
  for f, t in zip(plain, turns):
    if t > 4:
      llama3.append(f)
    elif t < 1:
      llama3.append(f / 8)
    else:
      llama3.append(f / 8 + (t - 1) / 3 * (f - f / 8))
  assert {f in plain for f in llama3} == {True, False}
  check(Llama3Scaling(factor=8.0, original_length=128), llama3, 1.0)

  first = 64 * math.log(128 / (8 * 2 * math.pi)) / (2 * math.log(10_000))  # turns 8 times
  last = 64 * math.log(128 / (0.5 * 2 * math.pi)) / (2 * math.log(10_000))  # turns half a time
  for truncate in (False, True):
    low, high = (math.floor(first), math.ceil(last)) if truncate else (first, last)
    stretch = [min(max((i - low) / (high - low), 0), 1) for i in range(32)]
    check(YarnScaling(factor=4.0, original_length=128, fast_turns=8.0, slow_turns=0.5, truncate=truncate),
          [s * f / 4 + (1 - s) * f for s, f in zip(stretch, plain)], 0.1 * math.log(4) + 1)
  check(YarnScaling(factor=4.0, original_length=128, fast_turns=8.0, slow_turns=0.5, amplitude=1.5),
        [s * f / 4 + (1 - s) * f for s, f in zip(stretch, plain)], 1.5)


@pytest.mark.parametrize('spec, message', [
  (RopeSpec(fraction=0.2), r'rope: 3 of 16 dims of a head to rotate: it must be an even number'),
  (RopeSpec(fraction=1.5), r'rope.fraction=1\.5 must be'), (RopeSpec(fraction=math.inf), r'rope.fraction=inf must be'),
  (RopeSpec(scaling=LongRopeScaling(divisors=(1.0,))), 'rope.scaling.divisors: 1 of them for 8 frequencies')])
def test_what_cannot_be_rotated_is_refused(spec, message):
  with pytest.raises(ValueError, match=message):
    spec.check('rope', 16)


# -- attention, written out for one document


def attention_by_hand(weights, spec: AttentionSpec, norm: NormSpec, x):
  """x [T, D] of one document that begins at position 0, and weights as numpy in float64."""
  T = len(x)
  q, k, v = (np.einsum('TD,DNH->TNH', x, weights[name]) for name in ('w_q_DNH', 'w_k_DKH', 'w_v_DKH'))

  def normed(y, scale, over):
    return y / np.sqrt((y**2).mean(over, keepdims=True) + norm.eps) * scale.reshape(y.shape[-len(over):])

  if spec.qk_norm:
    over = {'head': (-1,), 'all': (-2, -1)}[spec.qk_norm]
    q, k = normed(q, weights['q_norm.scale_D'], over), normed(k, weights['k_norm.scale_D'], over)
  frequency = spec.rope.theta ** (-np.arange(0, spec.head_dim, 2) / spec.head_dim)
  q, k = (turned(y[None], np.arange(T)[None], frequency, False)[0] for y in (q, k))
  if spec.query_growth:
    q *= (1 + spec.query_growth.beta * np.log(1 + np.arange(T) // spec.query_growth.length))[:, None, None]
  out = np.zeros_like(q)
  for n in range(spec.n_heads):
    m = n // (spec.n_heads // spec.n_kv_heads)
    for t in range(T):
      scores = k[:t + 1, m] @ q[t, n] / math.sqrt(spec.head_dim)
      p = np.exp(scores - scores.max())
      out[t, n] = p @ v[:t + 1, m] / p.sum()
  if spec.gate == 'element':
    out /= 1 + np.exp(-np.einsum('TD,DNH->TNH', x, weights['w_gate_DNH']))
  if spec.gate == 'head':
    out /= 1 + np.exp(-np.einsum('TD,DN->TN', x, weights['w_gate_DN']))[..., None]
  return np.einsum('TNH,NHD->TD', out, weights['w_o_NHD']) * spec.out_scale


def rows_of(segment_ids, spec: AttentionSpec, norm: NormSpec = NORM) -> Rows:
  index = np.arange(segment_ids.shape[1])
  new = np.diff(segment_ids, axis=1, prepend=-1) != 0
  positions = (index - np.maximum.accumulate(np.where(new, index, 0), axis=1)).astype(np.int32)
  on_mesh = to_device({'ids': segment_ids, 'positions': positions})
  table = rope_table(on_mesh['positions'], spec.rope, spec.head_dim)
  return Rows(on_mesh['ids'], on_mesh['positions'], {rope_key(spec.rope, spec.head_dim): table}, 'chunked', norm)


SWITCHES = [{}, {'qk_norm': 'head'}, {'qk_norm': 'all'}, {'gate': 'element'}, {'gate': 'head'}, {'out_scale': 0.3},
            {'query_growth': QueryGrowth(beta=0.5, length=3)}]


@pytest.mark.parametrize('switch', SWITCHES, ids=str)
def test_attention_is_its_definition_and_the_same_on_any_mesh(mesh_of, switch):
  spec = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=8, rope=RopeSpec(theta=100.0), **switch)
  x = np.random.default_rng(3).normal(size=(4, 12, 16)).astype(np.float32)
  segment_ids = np.repeat([[1] * 5 + [2] * 7], 4, axis=0).astype(np.int32)

  def run(attention, x, rows):
    return attention(spec, x, rows._replace(kernel='chunked', norm=NORM, causal=True))

  def results():
    rows = rows_of(segment_ids, spec)._replace(kernel=None, norm=None, dispatch=None)
    return values_and_gradients(run, perturbed(spec, 16), x, rows)

  with mesh_of(1):
    one = results()
    named = jax.tree_util.tree_leaves_with_path(perturbed(spec, 16))
    weights = {jax.tree_util.keystr(path).replace('.value', '')[1:]: np.asarray(w, np.float64) for path, w in named}
  expected = np.concatenate([attention_by_hand(weights, spec, NORM, x[0, part].astype(np.float64))
                             for part in (slice(0, 5), slice(5, 12))])
  np.testing.assert_allclose(one['y'][0], expected, atol=2e-5 * np.abs(expected).max())
  with mesh_of(data=2, fsdp=2, tensor=2):
    assert_close(results(), one, 1e-5)


# -- layers


def test_a_layer_adds_its_sublayers_as_it_says(mesh_of):
  """Placement of norms, factors, and layers of one sublayer, each beside the formula."""
  D = 16
  x = np.random.default_rng(4).normal(size=(1, 6, D)).astype(np.float32)
  attention, mlp = AttentionSpec(n_heads=2, n_kv_heads=2, head_dim=8), MlpSpec(d_ff=24)
  with mesh_of(1):
    rows = rows_of(np.ones((1, 6), np.int32), attention)
    x = jax.device_put(x, shard('BTD'))

    def both(placement, mixer=attention, mlp=mlp, **scales):
      spec = LayerSpec(mixer=mixer, mlp=mlp, norm=placement, **scales)
      built = dataclasses.replace(NORM), nnx.Rngs(0)
      layer = Layer(spec, D, *built)
      for i, name in enumerate(('mixer_pre_norm', 'mixer_post_norm', 'mlp_pre_norm', 'mlp_post_norm')):
        if getattr(layer, name, None) is not None:
          getattr(layer, name).scale_D[...] *= 0.5 + i
      f = (lambda h: layer.mixer(mixer, h, rows)) if mixer else None
      g = (lambda h: layer.mlp(spec.mlp, h)) if mlp else None
      norms = {name: (lambda h, norm=norm: norm(NORM, h)) for name, norm in vars(layer).items() if isinstance(norm, Norm)}
      return layer(spec, x, rows)[0], f, g, norms

    y, f, g, n = both('pre')
    h = x + f(n['mixer_pre_norm'](x))
    np.testing.assert_allclose(y, h + g(n['mlp_pre_norm'](h)), atol=1e-5)
    y, f, g, n = both('post')
    h = x + n['mixer_post_norm'](f(x))
    np.testing.assert_allclose(y, h + n['mlp_post_norm'](g(h)), atol=1e-5)
    y, f, g, n = both('sandwich')
    h = x + n['mixer_post_norm'](f(n['mixer_pre_norm'](x)))
    np.testing.assert_allclose(y, h + n['mlp_post_norm'](g(n['mlp_pre_norm'](h))), atol=1e-5)
    y, f, g, n = both('carried', mixer_scales=(2.0, 0.5), mlp_scales=(3.0, 0.25))
    a = n['mixer_pre_norm'](x)
    b = n['mlp_pre_norm'](2 * a + 0.5 * f(a))
    np.testing.assert_allclose(y, 3 * b + 0.25 * g(b), atol=1e-5)
    y, f, g, n = both('pre', mlp=None)
    np.testing.assert_allclose(y, x + f(n['mixer_pre_norm'](x)), atol=1e-5)
    y, f, g, n = both('pre', mixer=None)
    np.testing.assert_allclose(y, x + g(n['mlp_pre_norm'](x)), atol=1e-5)


def layers_of(word: str) -> tuple[LayerSpec, ...]:
  """A layer for each letter; equal letters are equal layers."""
  return tuple(LayerSpec(mixer=None, mlp=MlpSpec(d_ff=ord(letter))) for letter in word)


NEMOTRON = 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'


@pytest.mark.parametrize('pattern, n_layers, expected', [
  ('a', 32, [(0, 1, 32)]),
  ('sssf', 4, [(0, 4, 1)]),  # too short for a loop
  ('sssf', 8, [(0, 4, 2)]),
  ('sssssf', 26, [(0, 6, 4), (24, 2, 1)]),  # Gemma 3
  ('ddd' + 'm' * 58, 61, [(0, 3, 1), (3, 1, 58)]),  # DeepSeek-V3
  ('sssssf', 3, [(0, 3, 1)]),
  ('abc' + 'xy' * 5 + 'z', 14, [(0, 3, 1), (3, 2, 5), (13, 1, 1)]),
  (NEMOTRON, 52, [(0, 7, 5), (35, 8, 1), (43, 2, 4), (51, 1, 1)])])
def test_what_repeats_in_a_pattern_is_found(pattern, n_layers, expected):
  config = DecoderConfig(vocab_size=8, d_model=4, n_layers=n_layers, pattern=layers_of(pattern))
  assert runs(config) == [Run(*run) for run in expected]
  written_out = [run.first + i % run.period for run in runs(config) for i in range(run.period * run.repeats)]
  assert [config.layers[i] for i in written_out] == config.layers


def test_a_model_is_its_layers_one_after_the_other(mesh_of):
  """Several runs, two stacks whose layers alternate, a learned position, factors on embeddings and logits."""
  pattern = layers_of('a' + 'ab' * 4 + 'c')
  model = DecoderConfig(vocab_size=32, d_model=8, n_layers=10, pattern=pattern, embed_scale=3.0, logits_scale=0.5,
                        max_positions=6, norm=NormSpec(eps=1e-5))
  assert [tuple(run) for run in runs(model)] == [(0, 1, 1), (1, 2, 4), (9, 1, 1)]
  tokens = np.random.default_rng(5).integers(0, 32, (1, 6)).astype(np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 5]], np.int32)
  with mesh_of(1):
    params = Decoder(model, jax.random.key(0))
    batch = to_device({'tokens': tokens, 'ids': np.ones_like(tokens), 'positions': positions})
    got, _ = params.hidden(model, FP32, batch['tokens'], batch['ids'], batch['positions'])
    x = 3.0 * np.asarray(params.embed_VD[...])[tokens] + np.asarray(params.positions_PD[...])[positions]
    left = [iter(unstack(stack, n)) for stack, n in zip(params.stacks, (5, 4, 1))]
    for letter in 'a' + 'ab' * 4 + 'c':
      layer = next(left['abc'.index(letter)])
      spec = pattern[('a' + 'ab' * 4 + 'c').index(letter)]
      x, *_ = layer(spec, jax.device_put(x, shard('BTD')), Rows(None, None, {}, 'chunked', model.norm))
    expected = params.final_norm(model.norm, x) * 0.5
  np.testing.assert_allclose(got, expected, atol=1e-5)
