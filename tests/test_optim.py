"""The learning rate is the schedule's at every corner and at any scale; weight decay falls on the matrices alone; optimizers
are their algorithms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm.checkpoint import named_leaves
from maxlm.models.decoder import Decoder
from maxlm.optim import OptimConfig, decayed, optimizer, slow_schedules
from maxlm.schedule import learning_rate


def rates(config: OptimConfig, tokens, total: int) -> np.ndarray:
  """As `step.train_step` asks for them: tokens in fp32, in a compiled function."""
  return np.asarray(jax.jit(lambda t: learning_rate(config, t, total))(np.asarray(tokens, np.float32)))


def expected(config: OptimConfig, tokens, total: int) -> np.ndarray:
  """The schedule by its definition, in double precision."""
  tokens = np.asarray(tokens, np.float64)
  warm = np.minimum(tokens / config.warmup_tokens, 1) if config.warmup_tokens else np.ones_like(tokens)
  start = total - config.decay_tokens if config.schedule == 'wsd' else config.warmup_tokens
  progress = np.clip((tokens - start) / (total - start), 0, 1) if total > start else np.zeros_like(tokens)
  shape = {'wsd': 1 - progress, 'linear': 1 - progress, 'cosine': (1 + np.cos(np.pi * progress)) / 2}[config.schedule]
  return config.peak_lr * warm * (config.final_lr_frac + (1 - config.final_lr_frac) * shape)


@pytest.mark.parametrize('schedule, corners', [
  ('wsd', {0: 0, 50: 0.5, 100: 1, 101: 1, 800: 1, 900: 0.55, 1000: 0.1}),
  ('cosine', {0: 0, 50: 0.5, 100: 1, 325: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 550: 0.55, 1000: 0.1}),
  ('linear', {0: 0, 50: 0.5, 100: 1, 325: 0.775, 550: 0.55, 1000: 0.1})])
def test_a_schedule_warms_up_stays_and_falls_where_it_says(schedule, corners):
  config = OptimConfig(peak_lr=2e-3, schedule=schedule, warmup_tokens=100, decay_tokens=200 * (schedule == 'wsd'),
                       final_lr_frac=0.1)
  np.testing.assert_allclose(rates(config, list(corners), 1000), [2e-3 * part for part in corners.values()], rtol=1e-6)


@pytest.mark.parametrize('schedule', ['wsd', 'cosine', 'linear'])
@pytest.mark.parametrize('frac', [0.0, 0.01])
def test_it_ends_exactly_at_the_final_fraction(schedule, frac):
  """At the token counts of steps, which fp32 rounds: 3 rows of 7 tokens, and 61,036 steps of 2^24 tokens."""
  for total, decay in ((21 * 999, 21 * 100), (61_036 * 2**24, 10**12)):
    config = OptimConfig(peak_lr=1.0, schedule=schedule, warmup_tokens=5, decay_tokens=decay * (schedule == 'wsd'),
                         final_lr_frac=frac)
    assert rates(config, total, total) == np.float32(frac)


def test_no_warm_up_and_no_decay_is_a_constant():
  np.testing.assert_array_equal(rates(OptimConfig(peak_lr=0.5), [1, 500, 999, 1000], 1000), 0.5)


@pytest.mark.parametrize('schedule', ['wsd', 'cosine', 'linear'])
def test_fp32_tokens_are_precise_enough_for_15_trillion(schedule):
  """fp32 knows 1.5e13 to 2^19: over a decay of 1e12 tokens that is 5e-7 of the peak."""
  step, total = 2**22, 15_000_000_000_000 // 2**22 * 2**22
  config = OptimConfig(peak_lr=1.0, schedule=schedule, warmup_tokens=8_000_000_000, final_lr_frac=0.01,
                       decay_tokens=10**12 * (schedule == 'wsd'))
  tokens = step * np.unique(np.concatenate([np.arange(1, 4000), np.linspace(4000, total // step, 20_000).astype(np.int64),
                                            total // step - np.arange(4000)]))
  np.testing.assert_allclose(rates(config, tokens, total), expected(config, tokens, total), atol=1e-6, rtol=0)


def test_a_schedule_that_does_not_fit_the_run_is_refused():
  OptimConfig(peak_lr=1.0, warmup_tokens=40, decay_tokens=60).check(100)
  with pytest.raises(ValueError, match='warmup_tokens=40 .* decay_tokens=61 is more than the 100 tokens'):
    OptimConfig(peak_lr=1.0, warmup_tokens=40, decay_tokens=61).check(100)
  with pytest.raises(ValueError, match='decay_tokens=1 has no meaning .* set it to 0'):
    OptimConfig(peak_lr=1.0, schedule='cosine', decay_tokens=1).check(100)


@pytest.mark.parametrize('tied', [False, True])
def test_weights_decay_but_not_embeddings_norms_biases_or_sinks(mesh_of, tied):
  model = dataclasses.replace(tiny.get_config().model, tied_embeddings=tied)
  with mesh_of(1):
    params = jax.eval_shape(lambda: Decoder(model, jax.random.key(0)))
  mask = decayed(named_leaves(params))
  assert len(mask) == len(jax.tree.leaves(params))
  sliding, plain, post = (f'stacks.{i}.' for i in range(3))
  projections = ('mixer.w_q_DNH', 'mixer.w_k_DKH', 'mixer.w_v_DKH', 'mixer.w_o_NHD', 'mlp.w_up_DF',
                 'mlp.w_down_FD')
  assert {name for name, decays in mask.items() if decays} == {
    *(stack + name for stack in (sliding, plain, post) for name in projections),
    plain + 'mlp.w_gate_DF', post + 'mlp.w_gate_DF', *([] if tied else ['unembed_DV'])}
  assert {name for name, decays in mask.items() if not decays} == {
    'embed_VD', 'final_norm.scale_D',
    *(sliding + name for name in (
      'mixer.b_q_NH', 'mixer.b_k_KH', 'mixer.b_v_KH', 'mixer.b_o_D', 'mixer.q_norm.scale_D',
      'mixer.k_norm.scale_D', 'mixer.sinks_N', 'mlp.b_up_F', 'mlp.b_down_D', 'mixer_pre_norm.scale_D',
      'mixer_post_norm.scale_D', 'mlp_pre_norm.scale_D', 'mlp_post_norm.scale_D')),
    plain + 'mixer_pre_norm.scale_D', plain + 'mlp_pre_norm.scale_D',
    post + 'mixer_post_norm.scale_D', post + 'mlp_post_norm.scale_D'}


# -- optimizers


def in_double(config: OptimConfig, grads: list[np.ndarray]) -> list[np.ndarray]:
  """AdEMAMix's updates by algorithm 1 of arXiv 2409.03137, with the warm-ups of its section 3, in double precision."""
  m1, m2, v, updates = 0.0, 0.0, 0.0, []
  half = lambda b: np.log(0.5) / np.log(b)
  for t, g in enumerate(grads, 1):
    part = min(t / config.slow_warmup_steps, 1) if config.slow_warmup_steps else 1
    b3 = 0.5 ** (1 / ((1 - part) * half(config.b1) + part * half(config.b3)))  # the half-life rises linearly
    m1, m2 = config.b1 * m1 + (1 - config.b1) * g, b3 * m2 + (1 - b3) * g
    v = config.b2 * v + (1 - config.b2) * g**2
    slow = config.slow_weight * part * m2
    updates.append((m1 / (1 - config.b1**t) + slow) / (np.sqrt(v / (1 - config.b2**t)) + config.eps))
  return updates


def updates_of(config: OptimConfig, grads: list[np.ndarray], name: str) -> list[np.ndarray]:
  """Of a weight that is all zeros, so that decay does nothing; the gradients are too small to be clipped."""
  rule, zeros, found = optimizer(config), {name: jnp.zeros(grads[0].shape)}, []
  state = rule.init(zeros)
  for g in grads:
    updates, state = rule.update({name: jnp.asarray(g, jnp.float32)}, state, zeros)
    found.append(np.asarray(updates[name]))
  return found


@pytest.mark.parametrize('warmup', [0, 6])
def test_ademamix_is_its_algorithm_with_its_warm_ups(warmup):
  rng = np.random.default_rng(0)
  grads = [1e-3 * rng.normal(size=(2, 5)) + 1e-3 for _ in range(9)]
  config = OptimConfig(peak_lr=1.0, optimizer='ademamix', b3=0.99, slow_weight=5.0, slow_warmup_steps=warmup)
  for got, expected in zip(updates_of(config, grads, 'embed_VD'), in_double(config, grads)):
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_the_slow_mean_begins_as_the_fast_one_and_ends_as_asked():
  config = OptimConfig(peak_lr=1.0, optimizer='ademamix', slow_warmup_steps=1000)
  b3, weight = slow_schedules(config)
  assert np.log(0.5) / np.log(float(b3(jnp.int32(0)))) == pytest.approx(6.58 + (6931.1 - 6.58) / 1000, rel=1e-3)
  assert float(weight(jnp.int32(0))) == pytest.approx(8 / 1000)
  for done in (999, 1000, 10**6):
    assert float(b3(jnp.int32(done))) == pytest.approx(0.9999, abs=3e-7) and float(weight(jnp.int32(done))) == 8
  assert np.log(0.5) / np.log(float(b3(jnp.int32(499)))) == pytest.approx((6931.1 + 6.58) / 2, rel=1e-3)


@pytest.mark.parametrize('rule', ['adamw', 'ademamix', 'muon'])
def test_cautious_keeps_what_agrees_with_the_gradient_and_scales_it_by_what_is_lost(mesh_of, rule):
  """Of each layer of a stack for itself; the optimizer's own state does not know."""
  rng, name = np.random.default_rng(1), 'stacks.0.mlp.w_up_DF'
  grads = [1e-3 * rng.normal(size=(2, 6, 5)) for _ in range(4)]
  with mesh_of(1):
    plain, kept = (updates_of(OptimConfig(peak_lr=1.0, optimizer=rule, cautious=on), grads, name) for on in (False, True))
  for g, u, got in zip(grads, plain, kept):
    agrees = u * g > 0
    shares = agrees.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(got, u * agrees / shares, rtol=1e-5)
  assert 0.3 < shares.min() < shares.max() < 0.95 and shares[0] != shares[1]


@pytest.mark.parametrize('changes, message', [
  ({'optimizer': 'lion'}, "optim.optimizer='lion' is none of adamw, muon, ademamix"),
  ({'optimizer': 'ademamix', 'b3': 0.5}, 'AdEMAMix needs 0 < b1=0.9 <= b3=0.5 < 1'),
  ({'slow_warmup_steps': 5}, 'slow_warmup_steps=5.* set it to 0'),
  ({'ema': 1.0}, 'optim.ema=1.0 is a decay a step: 0 .* or less than 1')])
def test_what_has_no_meaning_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    OptimConfig(peak_lr=1.0, **changes).check(100)
