"""Balance of experts: losses and metrics by definition, biases by hand, the same on any mesh and in any microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm.checkpoint import named_leaves
from maxlm.config import Experiment, describe, validate
from maxlm.data import to_device
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.router import RouterStats, route, router_stats
from maxlm.lora import LoraConfig
from maxlm.losses import LossConfig, router_metrics, router_sums
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.step import StepConfig, begin, gradients, init_state, train_step
from maxlm.steplog import router_values
from tests.models import assert_same_gradients, perturbed
from tests.rows import random_batch

V, E = 64, 8
SOFTMAX = MoeSpec(n_experts=E, k=2, experts=MlpSpec(d_ff=16))
SIGMOID = MoeSpec(n_experts=E, k=3, experts=MlpSpec(d_ff=16, bias=True), score='sigmoid', select_bias=True)
both = pytest.mark.parametrize('spec', [SOFTMAX, SIGMOID], ids=['softmax', 'sigmoid'])
OFF = dict(balance=0.0, balance_beside_bias=0.0, router_z=0.0)
NOT_BY_GRADIENTS = 'select_bias_E',


def model(*kinds: MoeSpec) -> DecoderConfig:
  """Layers of nothing but experts: tokens do not see each other, and compile quickly."""
  return DecoderConfig(vocab_size=V, d_model=16, n_layers=len(kinds),
                       pattern=tuple(LayerSpec(mixer=None, mlp=kind) for kind in kinds))


MODEL = model(SIGMOID, SOFTMAX, SIGMOID, SOFTMAX)


def step_config(**changes) -> StepConfig:
  config = tiny.get_config()
  config.model, config.loss = MODEL, LossConfig(**changes.pop('loss', {}))
  return dataclasses.replace(config.step_config('cpu', 1), **changes)


def batch_of(rows=8) -> dict[str, np.ndarray]:
  return random_batch(np.random.default_rng(5), rows, 16, V)


# -- losses and metrics


def example(spec):
  """(logits [3, 10, E], real [3, 10]) of rows that end in padding, one of them all of it."""
  logits = 2 * np.random.default_rng(0).normal(size=(3, 10, E)).astype(np.float32)
  return logits, np.arange(10) < np.array([10, 7, 0])[:, None]


def stats_of(spec, logits_BTE, real_BT, bias_E=None) -> RouterStats:
  """Of one layer."""
  logits_CE = jnp.asarray(logits_BTE.reshape(-1, E))
  _, experts_CJ, scores_CE = route(spec, logits_CE, bias_E)
  experts_CJ = jnp.where(real_BT.reshape(-1, 1), experts_CJ, E)
  stats = router_stats(logits_CE, scores_CE, experts_CJ, jnp.arange(len(logits_CE)) % 2, jnp.asarray(real_BT))
  return jax.tree.map(lambda s: s[None], stats)


def by_definition(spec, logits, real) -> list[dict]:
  """For each row, over its real tokens: f and P [E], sums of z and entropy, tokens."""
  rows = []
  for logits_TE, real_T in zip(logits.astype(np.float64), real):
    x = logits_TE[real_T]
    scores = np.exp(x) / np.exp(x).sum(-1, keepdims=True) if spec.score == 'softmax' else 1 / (1 + np.exp(-x))
    p = scores / scores.sum(-1, keepdims=True)
    chosen = np.argsort(-x, axis=1)[:, :spec.k]
    rows.append({'load': np.bincount(chosen.ravel(), minlength=E), 'P': p.sum(0), 'n': len(x),
                 'z': (np.log(np.exp(x).sum(-1))**2).sum(), 'entropy': -(p * np.log(p)).sum()})
  return rows


@both
@pytest.mark.parametrize('over', ['batch', 'sequence'])
def test_losses_and_metrics_are_their_definitions_and_padding_does_not_count(spec, over):
  logits, real = example(spec)
  rows, n = by_definition(spec, logits, real), 17
  total = {name: sum(row[name] for row in rows) for name in rows[0]}
  if over == 'batch' and not spec.select_bias:
    balance = E * np.sum(total['load'] / (spec.k * n) * total['P'] / n)
  else:
    balance = sum(E * np.sum(row['load'] / spec.k * row['P'] / row['n']) for row in rows if row['n']) / n
  loss = LossConfig(balance=0.3, balance_beside_bias=0.2, router_z=0.1, balance_over=over)
  sums = jax.jit(functools.partial(router_sums, spec, loss))(stats_of(spec, logits, real), jnp.asarray(real))
  metrics = router_metrics(model(spec), [sums], jnp.float32(n))
  expected = {'load_violation': total['load'].max() / total['load'].mean() - 1, 'entropy': total['entropy'] / n,
              'dead': (total['load'] == 0).sum(), 'balance': balance, 'z': total['z'] / n,
              'dropped': (np.arange(30) % 2)[real.ravel()].sum() / (spec.k * n)}
  assert metrics.keys() == expected.keys()
  for name, value in expected.items():
    assert metrics[name].shape == (1,) and float(metrics[name][0]) == pytest.approx(value, rel=1e-5), name
  weighted = 0.2 * balance if spec.select_bias else 0.3 * balance + 0.1 * total['z'] / n
  assert float(sums['loss']) == pytest.approx(weighted * n, rel=1e-5)


def test_balance_is_1_in_balance_and_the_number_of_experts_where_one_gets_all():
  loss, real = LossConfig(), np.ones((1, E), bool)
  spec = dataclasses.replace(SOFTMAX, k=1)
  for logits, expected, dead in ((50 * np.eye(E), 1, 0), (50 * np.eye(E)[:1].repeat(E, 0), E, E - 1)):
    sums = router_sums(spec, loss, stats_of(spec, logits[None].astype(np.float32), real), jnp.asarray(real))
    metrics = router_metrics(model(spec), [sums], jnp.float32(E))
    assert float(metrics['balance'][0]) == pytest.approx(expected) and metrics['dead'][0] == dead
    assert float(metrics['load_violation'][0]) == pytest.approx(expected - 1)


def test_the_gradient_of_the_balance_moves_scores_and_takes_loads_as_they_are():
  """Downhill, the expert with the most tokens loses score and the emptiest gains."""
  logits, real = example(SOFTMAX)
  logits[..., 3] += 2
  logits[..., 5] -= 2
  loss = lambda x: router_sums(SOFTMAX, LossConfig(router_z=0.0), stats_of(SOFTMAX, x, real), jnp.asarray(real))['loss']
  slope_E = jax.grad(lambda shift_E: loss(jnp.asarray(logits) + shift_E))(jnp.zeros(E))
  assert slope_E.argmax() == 3 and slope_E[3] > 0 > slope_E[5]


# -- the step


def run_step(config, batch, params=None):
  """(state before, state after, metrics) of one step."""
  state = jax.jit(functools.partial(init_state, config))(jax.random.key(0)) if params is None else jax.jit(
    functools.partial(begin, config))(params, jax.random.key(0))
  after, metrics = jax.jit(functools.partial(train_step, config))(state, to_device(batch))
  return state, after, jax.device_get(metrics)


def test_biases_rise_where_the_whole_batch_gave_less_than_the_mean_whatever_the_microbatches(mesh_of):
  batch, rate = batch_of(), 0.01
  with mesh_of(1):
    before, one, metrics = run_step(step_config(loss={'bias_rate': rate}), batch)
    _, four, _ = run_step(step_config(loss={'bias_rate': rate}, microbatches=4), batch)
    n = jnp.float32((batch['loss_mask']).sum())
    _, sums = jax.jit(functools.partial(gradients, step_config()))(before.params, to_device(batch), n)
  load_LE = np.asarray(sums['routers'][0]['load_LE'])  # of the sigmoid layers, 0 and 2
  assert load_LE.sum() == 2 * 3 * (batch['segment_ids'] > 0).sum()
  expected = rate * np.sign(load_LE.mean(axis=1, keepdims=True) - load_LE)
  assert (expected > 0).any() and (expected < 0).any()
  for state in (one, four):
    names = [name for name in named_leaves(state.params) if name.endswith('select_bias_E')]
    np.testing.assert_allclose(named_leaves(state.params)[names[0]], expected, rtol=1e-6)
  assert not [name for name in named_leaves(state.opt) if 'select_bias' in name]
  assert metrics['routers']['load_violation'].shape == (4,)
  np.testing.assert_allclose(metrics['routers']['load_violation'][[0, 2]], load_LE.max(1) / load_LE.mean(1) - 1, rtol=1e-6)
  values = router_values(MODEL, metrics['routers'])
  assert len(values) == 6 * 4 + 1 and {'moe/entropy/0', 'moe/dropped/3'} <= values.keys()
  assert values['moe/load_violation'] == pytest.approx(max(values[f'moe/load_violation/{i}'] for i in range(4)), rel=1e-3)


@pytest.mark.parametrize('changes, moved', [
  ({'loss': {'bias_rate': 0.0}}, (False, False)), ({'freeze': ('*select_bias_E',)}, (False, False)),
  ({'freeze_layers': 1}, (False, True)), ({'lora': LoraConfig(rank=2)}, (False, False))], ids=str)
def test_a_bias_is_left_alone_where_it_is_frozen(mesh_of, changes, moved):
  freeze = {name: changes.pop(name) for name in ('freeze', 'freeze_layers') if name in changes}
  config = step_config(optim=dataclasses.replace(tiny.get_config().optim, **freeze), **changes)
  if config.lora:  # something that can have an adapter
    config.model = model(dataclasses.replace(SIGMOID, shared=MlpSpec(d_ff=16)), SIGMOID)
  with mesh_of(1):
    before, after, _ = run_step(config, batch_of(), perturbed(config.model))
  old, new = (named_leaves(state.params) for state in (before, after))
  biases = [(old[name], new[name]) for name in old if name.endswith('select_bias_E')]
  assert tuple((a != b).any() for stack in biases for a, b in zip(*stack)) == moved


def losses_and_gradients(config, batch):
  n = jnp.float32(batch['loss_mask'].sum())
  grads, sums = jax.jit(functools.partial(gradients, config))(perturbed(MODEL), to_device(batch), n)
  sums = jax.device_get(sums)
  return {name: np.asarray(g) for name, g in grads.items()}, sums


@pytest.mark.parametrize('sizes, exchange', [
  ({'data': 2, 'expert': 2, 'tensor': 2}, 'all_to_all'), ({'fsdp': 2, 'expert': 2, 'context': 2}, None)], ids=str)
def test_loss_gradients_and_loads_are_those_of_one_device(mesh_of, sizes, exchange):
  """Losses of the routers with them, at weights at which they count."""
  loss = {'balance': 0.3, 'balance_beside_bias': 0.2, 'router_z': 0.1}
  config, batch = step_config(loss=loss), batch_of()
  with mesh_of(1):
    grads_one, one = losses_and_gradients(config, batch)
    without, _ = losses_and_gradients(step_config(loss=OFF), batch)
  config.compute.exchange = exchange
  with mesh_of(8, **sizes):
    grads, many = losses_and_gradients(config, batch)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many)):
    np.testing.assert_allclose(a, b, rtol=2e-6)
  assert_same_gradients(grads_one, grads, 5e-6, NOT_BY_GRADIENTS)
  for name in ('stacks.0.mlp.w_router_DE', 'stacks.1.mlp.w_router_DE'):
    assert np.abs(grads_one[name] - without[name]).max() > 0.01 * np.abs(without[name]).max()


# -- what is refused, and what is said


def experiment(**changes) -> Experiment:
  return dataclasses.replace(tiny.get_config(), model=MODEL, **changes)


@pytest.mark.parametrize('mesh, compute, message', [
  ({}, {'exchange': 'gather'}, "compute.exchange='gather': devices share experts where mesh.expert is more than 1"),
  ({}, {'capacity': 1.5}, 'compute.capacity=1.5: devices share experts'),
  ({'expert': 2}, {'capacity': 0.5}, 'compute.capacity=0.5: it must be at least 1'),
  ({'expert': 2}, {'exchange': 'ring'}, "compute.exchange='ring' is neither"),
  ({}, {'benchmark_routing': 'balanced'}, 'give the run a name with "benchmark" in it'),
  ({'expert': 16}, {}, r'model.pattern\[0\].mlp.n_experts=8 does not divide into 16 parts \(expert of the mesh\)')], ids=str)
def test_what_does_not_fit_is_refused(mesh, compute, message):
  config = experiment()
  config.data.batch_size = 16
  for name, value in mesh.items():
    setattr(config.mesh, name, value)
  for name, value in compute.items():
    setattr(config.compute, name, value)
  with pytest.raises(ValueError, match=message):
    validate(config, 'cpu', max(mesh.get('expert', 1), 1))


def test_experts_need_an_axis_and_an_axis_experts():
  config = tiny.get_config()
  config.mesh.expert = 2
  with pytest.raises(ValueError, match='mesh.expert=2: the model has no experts to split; set it to 1 and use fsdp'):
    validate(config, 'cpu', 2)


def test_the_start_of_a_run_says_how_tokens_come_to_experts_and_shouts_where_routers_do_not_decide():
  config = experiment(name='a benchmark')
  config.mesh.expert, config.compute.capacity = 8, 1.5
  validate(config, 'cpu', 8)
  assert 'experts  3 of 8 in 2 layers: on 8 devices, all_to_all' in describe(config, 'cpu', 1, 1)
  said = describe(config, 'cpu', 1, 1)
  assert 'at most 1.5 times the average load' in said and 'BALANCED' not in said
  config.compute.benchmark_routing = 'balanced'
  validate(config, 'cpu', 8)
  assert 'WARNING  BALANCED ROUTING' in describe(config, 'cpu', 1, 1)


def test_balanced_routing_is_balanced_and_weighs_by_scores():
  logits = jnp.asarray(example(SOFTMAX)[0].reshape(-1, E)[:12])
  weights, experts, scores = route(SOFTMAX, logits, None, balanced=True)
  np.testing.assert_array_equal(np.bincount(np.asarray(experts).ravel()), 3)
  np.testing.assert_allclose(weights[0] / weights[0, 0], scores[0, experts[0]] / scores[0, experts[0, 0]], rtol=1e-6)
