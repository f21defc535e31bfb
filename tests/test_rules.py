"""The rules give the figures that their papers give, and estimators find what is known in closed form."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from maxlm import rules
from maxlm.optim import OptimConfig, optimizer


def test_deepseek_gives_the_hyperparameters_of_its_own_models():
  """Table 2 of arXiv 2401.02954: 7B, 2T tokens: 4.2e-4 and 2304 x 4096; 67B: 3.2e-4 and 4608 x 4096. FLOPs as 6 N D."""
  for params, rate, batch in ((7e9, 4.2e-4, 2304 * 4096), (67e9, 3.2e-4, 4608 * 4096)):
    found = rules.deepseek(6 * params * 2e12)
    assert found.learning_rate == pytest.approx(rate, rel=0.02) and found.batch == pytest.approx(batch, rel=0.04)


def test_step_law_and_porian():
  found = rules.step_law(1e9, 1e11)
  assert found.learning_rate == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11))
  assert found.batch == pytest.approx(0.58 * 10 ** (0.571 * 11))
  small, large = rules.porian(108e6), rules.porian(8 * 108e6)
  assert (small.learning_rate, small.batch, small.b2, small.warmup) == (0.00235, 327_680, 0.99, 108e6)
  assert large.learning_rate == pytest.approx(small.learning_rate / 2) and large.batch == pytest.approx(4 * small.batch)
  assert large.b2 == 0.95


def test_power_lines():
  assert rules.best_timescale(1e9, 2e10) == pytest.approx(1.084 * 20**-0.527)
  found = rules.power_lines(1e9, 2e10, learning_rate=1e-3)
  assert found.batch == pytest.approx(2048 * 0.0306 * 2e10**0.383)
  assert rules.timescale(1e-3, found.decay, found.batch, 2e10) == pytest.approx(rules.best_timescale(1e9, 2e10))
  assert rules.critical_batch(2e10) == pytest.approx(2048 * 0.0471 * 2e10**0.462)


def test_nanochat():
  """Ten times the tokens are 2.4 times the batch, which is a power of two away. Its four best decays, as rounded
  as they are published, fall as width^-1.85 (by its own fit -1.97), and the rule takes -2."""
  same = rules.nanochat(1e9, base_tokens=1e9, base_batch=2**19, base_learning_rate=0.02, base_decay=0.2)
  assert same == rules.Advice(learning_rate=0.02, batch=2**19, decay=0.2)
  more = rules.nanochat(1e10, base_tokens=1e9, base_batch=2**19, base_learning_rate=0.02, base_decay=0.2)
  assert more.batch == 2**20 and more.learning_rate == pytest.approx(0.02 * 2**0.5)
  assert more.decay == pytest.approx(0.2 * 2**0.5 / 10)
  widths, decays = [512, 768, 1024, 1280], [0.40, 0.22, 0.10, 0.08]
  assert np.polyfit(np.log(widths), np.log(decays), 1)[0] == pytest.approx(-1.85, abs=0.01)
  for width, decay in zip(widths, decays):
    assert rules.nanochat_decay(width, 512, 0.40) == pytest.approx(decay, rel=0.25)


def test_delphi_is_its_reference_run_and_goes_from_there():
  reference = rules.delphi(2.5e9, 64 * 4096), rules.delphi_adam(2.5e9, 64 * 4096)
  assert reference[0] == rules.Advice(learning_rate=0.0063, batch=64 * 4096, b2=0.9999, warmup=2.5e8)
  assert reference[1] == rules.Advice(learning_rate=6.56e-4, batch=64 * 4096, eps=1.85e-8, warmup=2.5e8)
  longer = rules.delphi(2.5e10, 256 * 4096), rules.delphi_adam(2.5e10, 256 * 4096)
  assert longer[0].learning_rate == pytest.approx(0.0063 * 2 * 10**-0.3) and longer[0].b2 == pytest.approx(0.9999**4)
  assert longer[1].learning_rate == pytest.approx(6.56e-4 * 0.4**0.5) and longer[1].eps == pytest.approx(1.85e-8 * 0.4**-0.5)
  assert rules.delphi(1e9, 1e12).b2 == 0.9


def test_steps_and_tokens_trade_as_they_should():
  for batch in (1e3, 1e6, 1e9):
    steps, tokens = rules.steps_and_tokens(batch, critical=1e6, least_steps=1e4)
    assert (steps / 1e4 - 1) * (tokens / 1e10 - 1) == pytest.approx(1) and steps * batch == pytest.approx(tokens)
  assert rules.critical_batch_of_loss(2.0) == pytest.approx(2e8 / 2 ** (1 / 0.21))


def test_the_noise_scale_of_a_linear_model():
  """Gradients of 0.5 (w x - y)^2 over random x: mean and covariance are known; 40,000 batches of 4 and of 32 examples."""
  rng, dims, w = np.random.default_rng(0), 6, np.linspace(-1, 1, 6)
  examples = rng.normal(size=(40_000, 36, dims))
  noise = rng.normal(size=(40_000, 36))
  grads = (examples @ w + noise)[..., None] * examples  # y = -noise
  # E[(w x) x] = w; E|g|^2 = E[((w x)^2 + 1) |x|^2] = |w|^2 (d + 2) + d
  trace, square = float(w @ w) * (dims + 2) + dims - float(w @ w), float(w @ w)
  small, big = (np.mean(np.sum(np.mean(part, axis=1) ** 2, axis=-1)) for part in (grads[:, :4], grads[:, 4:]))
  found = rules.noise_scale(4, small, 32, big)
  assert found == pytest.approx((trace / square, square, trace), rel=0.03)
  with pytest.raises(ValueError, match='small batch and a bigger one, not 4 and 4'):
    rules.noise_scale(4, 1.0, 4, 1.0)


def test_adamw_averages_updates_over_the_timescale():
  """Weights of AdamW are an exponential average of -update / decay, whose memory is 1 / (lr * decay) steps."""
  lr, decay, steps, rng = 0.05, 0.2, 60, np.random.default_rng(0)
  optim = optimizer(OptimConfig(peak_lr=lr, weight_decay=decay))
  adam = optimizer(OptimConfig(peak_lr=lr, weight_decay=0.0))
  weights = {'w_up_DF': np.float32(rng.normal(size=(4, 3)))}
  state, plain, first, updates = optim.init(weights), adam.init(weights), weights['w_up_DF'], []
  for _ in range(steps):
    grads = {'w_up_DF': np.float32(0.1 * rng.normal(size=(4, 3)))}
    u, state = optim.update(grads, state, weights)
    alone, plain = adam.update(grads, plain, weights)
    weights = {'w_up_DF': weights['w_up_DF'] - lr * u['w_up_DF']}
    updates.append(-np.asarray(alone['w_up_DF']) / decay)
  memory = rules.timescale(lr, decay, batch=1, tokens=1)  # in steps
  assert memory == pytest.approx(100)
  keep = (1 - 1 / memory) ** np.arange(steps - 1, -1, -1)
  expected = (1 - 1 / memory) ** steps * first + np.tensordot(keep, np.stack(updates), 1) / memory
  np.testing.assert_allclose(weights['w_up_DF'], expected, atol=1e-5)


def test_the_command():
  def run(*args):
    return subprocess.run([sys.executable, '-m', 'maxlm.rules', *args], capture_output=True, text=True, env=os.environ,
                          timeout=120)

  table = run('--params=7e9', '--tokens=2e12', '--width=4096').stdout
  assert 'DeepSeek                          0.000425      9,' in table and 'Marin MoE' in table
  found = json.loads(run('--params=1e9', '--tokens=2e10', '--batch=1e6', '--json').stdout)
  assert found['Delphi, the rest (Adam)']['batch'] == 1e6 and 'Marin MoE' not in found
  refused = run('--params=1e9')
  assert refused.returncode == 2 and 'give --tokens=1e9 or so' in refused.stderr
