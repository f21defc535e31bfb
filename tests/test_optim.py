"""The learning rate is the schedule's at every corner and at any scale; weight decay falls on the matrices alone."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm.checkpoint import named_leaves
from maxlm.models.decoder import Decoder
from maxlm.optim import OptimConfig, decayed, learning_rate


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
