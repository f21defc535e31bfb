"""The running mean of the weights: its closed form, skipped steps, and in a run: evaluated, saved, resumed and used."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm import ema, lora, train
from maxlm.checkpoint import Checkpoints, named_leaves
from maxlm.data import to_device
from maxlm.restore import load_params
from maxlm.step import init_state
from tests.test_spikes import batch_of, bits, step_config, stepper, window_of
from tests.test_train import short_config, stopped_and_not

DECAY = 0.75


def with_mean(config, **changes):
  return dataclasses.replace(config, optim=dataclasses.replace(config.optim, ema=DECAY, **changes))


def arrays(tree) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree).items()}


@pytest.mark.parametrize('sizes', [{'fsdp': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_it_is_the_weighted_sum_of_all_weights_so_far_selection_biases_included(mesh_of, sizes):
  config = with_mean(step_config())
  with mesh_of(**sizes):
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    run, past = stepper(config), [arrays(state.params)]
    assert bits(state.ema) == bits(state.params)
    for seed in range(4):
      state, _ = run(state, to_device(batch_of(seed)))
      past.append(arrays(state.params))
      assert all(a.sharding == b.sharding for a, b in zip(state.ema.values(), named_leaves(state.params).values()))
  assert any(name.endswith('select_bias_E') for name in state.ema)
  for name, mean in arrays(state.ema).items():
    expected = DECAY**4 * past[0][name] + sum((1 - DECAY) * DECAY**(4 - i) * past[i][name] for i in range(1, 5))
    np.testing.assert_allclose(mean, expected, atol=1e-6 * max(1, np.abs(expected).max()), rtol=0, err_msg=name)
    assert np.abs(mean - past[4][name]).max() > 1e-4, name


def test_a_skipped_step_changes_no_bit_of_it(mesh_of):
  config = with_mean(step_config())
  with mesh_of(1):
    run = stepper(config)
    state, _ = run(jax.jit(functools.partial(init_state, config))(jax.random.key(0)), to_device(batch_of(1)))
    low = np.random.default_rng(0).normal(1e-3, 1e-4, 64)
    state = dataclasses.replace(state, recent=window_of(low, low, config.spikes))
    after, metrics = run(state, to_device(batch_of(2)))
  assert int(metrics['skipped']) == 1 and bits(after.ema) == bits(state.ema)


def test_what_is_not_trained_has_no_mean_and_without_a_decay_there_is_none(mesh_of):
  config = tiny.get_config()
  config.model.n_layers, config.model.pattern = 3, config.model.pattern[1:2]
  frozen = with_mean(config.step_config('cpu', 1), freeze=('embed_VD',), freeze_layers=1)
  config.lora = lora.LoraConfig(rank=2)
  adapted = with_mean(config.step_config('cpu', 1))
  with mesh_of(1):
    assert jax.eval_shape(functools.partial(init_state, step_config()), jax.random.key(0)).ema is None
    state = jax.jit(functools.partial(init_state, frozen))(jax.random.key(0))
    assert 'embed_VD' not in state.ema and state.ema['stacks.0.mixer.w_q_DNH'].shape[0] == 2
    zeros = {name: 0 * w for name, w in state.ema.items()}
    put = named_leaves(ema.in_place(frozen.optim, frozen.model, state.params, zeros))
    np.testing.assert_array_equal(put['embed_VD'], state.params.embed_VD[...])
    assert [bool(np.asarray(w).any()) for w in put['stacks.0.mixer.w_q_DNH']] == [True, False, False]
    of_adapters = jax.eval_shape(functools.partial(init_state, adapted), jax.random.key(0)).ema
  assert of_adapters and {name.rpartition('.')[2] for name in of_adapters} == {'lora_a', 'lora_b'}


def test_a_run_with_muon_and_a_mean_stopped_twice_ends_with_the_same_bits(corpus, tmp_path, monkeypatch, mesh_of):
  def config():
    config = short_config(corpus)
    config.optim = dataclasses.replace(config.optim, optimizer='muon', cautious=True, ema=DECAY)
    return config

  digests = stopped_and_not(config, tmp_path, monkeypatch)
  assert set(digests) == {'params', 'opt', 'recent', 'ema'}
  assert any('momentum.stacks.0.mixer.w_q_DNH' in name for name in digests['opt'])
  last = json.loads((tmp_path / 'stopped' / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['eval/loss_ema/all'] != last['eval/loss/all'] and last['eval/bits_per_byte_ema/stories'] > 0
  checkpoints = Checkpoints(tmp_path / 'stopped' / 'checkpoints')
  with mesh_of(1):
    mean = load_params(checkpoints, 12, ema=True)
    assert bits(checkpoints.restore_item(12, 'ema', named_leaves(mean))) == bits(mean) != bits(load_params(checkpoints, 12))


def test_a_checkpoint_without_one_says_so_and_a_rerun_may_not_begin_one(corpus, tmp_path, mesh_of):
  config = short_config(corpus, 4)
  assert train.run(config, tmp_path / 'run') == 0
  with mesh_of(1), pytest.raises(ValueError, match='keeps no running mean of weights: a run with --config.optim.ema does'):
    load_params(Checkpoints(tmp_path / 'run' / 'checkpoints'), 4, ema=True)
  config = short_config(corpus, 8)
  for change in ({'ema': 0.9}, {'optimizer': 'muon'}):
    changed = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **change))
    with pytest.raises(ValueError, match=f'was begun with optim.{[*change][0]}=.* give a new --workdir'):
      train.run(changed, tmp_path / 'run')
