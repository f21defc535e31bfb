"""The training step: microbatches change nothing, the update is AdamW, the sums are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm.checkpoint import named_leaves
from maxlm.data import to_device
from maxlm.losses import next_token_loss
from maxlm.optim import decayed
from maxlm.schedule import learning_rate
from maxlm.step import StepConfig, TrainState, eval_step, gradients, init_state, sums_by_source, train_step
from tests.rows import pack, random_batch

N_SOURCES = 3


def step_config(**changes) -> StepConfig:
  """configs/tiny.py with its first layer alone, which has weights of every kind."""
  config = tiny.get_config()
  config.model.n_layers = 1
  return dataclasses.replace(config.step_config('cpu', N_SOURCES), **changes)


def uneven_batch() -> dict[str, np.ndarray]:
  """Eight rows of 64; those that four microbatches take first and second (0, 4 and 1, 5) are nearly all padding."""
  rng = np.random.default_rng(0)
  lengths = [[3], [1, 2], [64], [30, 34], [2], [1], [20, 44], [64]]
  return pack([[rng.integers(0, 512, n + 1) for n in row] for row in lengths], 64, source=[0, 0, 2, 0, 2, 2, 0, 0])


def loss_and_gradients(config: StepConfig, params, batch) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
  n_tokens = jnp.float32(batch['loss_mask'].sum())
  grads, sums = jax.jit(functools.partial(gradients, config))(params, to_device(batch), n_tokens)
  return float(sums['nll_by_source'].sum() / n_tokens), named_arrays(grads), jax.device_get(sums)


def named_arrays(tree) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def assert_close(got: dict, expected: dict, rtol: float) -> None:
  """Each array to `rtol` of its own largest value."""
  assert got.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=rtol * np.abs(expected[name]).max(), err_msg=name)


@pytest.mark.parametrize('sizes', [{'data': 1}, {'data': 2, 'tensor': 2}], ids=str)
def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch(mesh_of, sizes):
  batch = uneven_batch()
  real = (batch['segment_ids'] > 0).sum(axis=1).reshape(2, 4).sum(axis=0)  # of each of four microbatches
  assert real.min() < real.max() / 10  # a mean over microbatches would be another number
  with mesh_of(**{'fsdp': 1, **sizes}):
    params = jax.jit(functools.partial(init_state, step_config()))(jax.random.key(0)).params
    loss, grads, sums = loss_and_gradients(step_config(), params, batch)
    loss_4, grads_4, sums_4 = loss_and_gradients(step_config(microbatches=4), params, batch)
  assert loss_4 == pytest.approx(loss, rel=1e-6)
  assert_close(grads_4, grads, 5e-6)
  np.testing.assert_array_equal(sums_4['tokens_by_source'], sums['tokens_by_source'])


@pytest.mark.parametrize('sizes', [{'data': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_loss_and_tokens_of_each_source_are_those_of_its_rows(mesh_of, sizes):
  batch, config = uneven_batch(), step_config()
  with mesh_of(**{'fsdp': 1, **sizes}):
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    _, nll_BT, _ = jax.jit(lambda params, batch: next_token_loss(params, config.model, config.compute, config.loss, batch))(
      state.params, to_device(batch))
    nll_BT, real_BT = np.asarray(nll_BT, np.float64), batch['segment_ids'] > 0
    _, metrics = jax.jit(functools.partial(train_step, config))(state, to_device(batch))
  for source in range(N_SOURCES):
    rows = batch['source'] == source
    assert int(metrics['tokens_by_source'][source]) == real_BT[rows].sum()
    mean = nll_BT[rows].sum() / real_BT[rows].sum() if rows.any() else 0.0  # source 1 has no row here
    assert float(metrics['loss_by_source'][source]) == pytest.approx(mean, rel=1e-6)
  assert float(metrics['loss']) == pytest.approx(nll_BT[real_BT].mean(), rel=1e-6)


def test_token_counts_are_exact_where_fp32_is_not(mesh_of):
  """2^24 + 1 tokens of one source: fp32 would lose the last one."""
  loss_mask = np.zeros((2, 2**24), np.int32)
  loss_mask[0], loss_mask[1, 0] = 1, 1
  with mesh_of(1):
    batch = to_device({'loss_mask': loss_mask, 'source': np.zeros(2, np.int32)})
    sums = jax.jit(functools.partial(sums_by_source, n_sources=1))(jnp.zeros((2, 1)), batch)
  assert int(sums['tokens_by_source'][0]) == 2**24 + 1


def test_two_steps_are_adamw_in_closed_form(mesh_of):
  """Against double precision from the same gradients: clipping at work, bias correction, decay on the mask alone."""
  optim = dataclasses.replace(tiny.get_config().optim, clip_norm=0.2, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-6)
  config = step_config(optim=optim)
  both = jax.jit(lambda state, batch: (  # in one program, so that the gradients have the same bits
    gradients(config, state.params, batch, jnp.sum(batch['loss_mask']).astype(jnp.float32))[0],
    *train_step(config, state, batch)))
  with mesh_of(1):
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(1))
    mask = decayed(named_leaves(state.params))
    w = {name: leaf.astype(np.float64) for name, leaf in named_arrays(state.params).items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in w.items()} for _ in range(2))
    for step in (1, 2):
      grads, state, metrics = both(state, to_device(random_batch(np.random.default_rng(step), 8, 64, 512)))
      g = {name: leaf.astype(np.float64) for name, leaf in named_arrays(grads).items()}
      norm = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
      assert norm > 2 * optim.clip_norm and float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-6)
      lr = float(learning_rate(optim, np.float32(step * 512), config.total_tokens))
      assert float(metrics['learning_rate']) == pytest.approx(lr, rel=1e-6) and lr > 0
      for name in w:
        clipped = g[name] * optim.clip_norm / norm
        m[name] = 0.8 * m[name] + 0.2 * clipped
        v[name] = 0.9 * v[name] + 0.1 * clipped**2
        update = m[name] / (1 - 0.8**step) / (np.sqrt(v[name] / (1 - 0.9**step)) + 1e-6)
        w[name] -= lr * (update + 0.3 * mask[name] * w[name])
  assert int(state.step) == 2
  assert_close(named_arrays(state.params), w, 1e-6)


def test_a_lone_key_value_head_is_trained(mesh_of):
  """Its dim of size 1 is split over `tensor`, of one device, and JAX forgets that easily."""
  model = dataclasses.replace(tiny.get_config().model)
  attention = dataclasses.replace(model.pattern[1].mixer, n_kv_heads=1)
  config = step_config(model=dataclasses.replace(model, pattern=(dataclasses.replace(model.pattern[1], mixer=attention),)))
  with mesh_of(data=2, fsdp=2):
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    new, _ = jax.eval_shape(functools.partial(train_step, config), state, to_device(uneven_batch()))
  specs = [{name: leaf.sharding.spec for name, leaf in named_leaves(of.params).items()} for of in (state, new)]
  assert specs[0] == specs[1]


def test_a_step_keeps_the_types_of_the_state(mesh_of):
  """Shapes, dtypes and shardings: else the second step would be compiled anew, or refused."""
  with mesh_of(data=2, fsdp=2, tensor=2):
    state = jax.eval_shape(functools.partial(init_state, step_config()), jax.random.key(0))
    new, _ = jax.eval_shape(functools.partial(train_step, step_config()), state, to_device(uneven_batch()))
  assert isinstance(new, TrainState) and jax.tree.structure(new) == jax.tree.structure(state)
  for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new)):
    specs = [s.sharding.spec if s.sharding else jax.P() for s in (old, leaf)]  # of scalars it may be None
    assert (old.shape, old.dtype, specs[0]) == (leaf.shape, leaf.dtype, specs[1])


def test_evaluation_sums_nll_tokens_and_bytes_of_real_positions(mesh_of):
  batch, config = uneven_batch(), step_config()
  lengths = np.random.default_rng(2).integers(0, 9, (8, 64), np.int32)
  batch['target_bytes'] = lengths * (batch['segment_ids'] > 0)
  with mesh_of(1):
    params = jax.jit(functools.partial(init_state, config))(jax.random.key(0)).params
    sums = jax.device_get(jax.jit(functools.partial(eval_step, config.model, config.compute))(params, to_device(batch)))
    loss, _, _ = loss_and_gradients(config, params, batch)
  real = int(batch['loss_mask'].sum())
  assert (int(sums['tokens']), int(sums['bytes'])) == (real, int(batch['target_bytes'].sum()))
  assert float(sums['nll']) == pytest.approx(loss * real, rel=1e-6)
