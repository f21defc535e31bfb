"""Mixture of experts: routing and outputs by definition, sorted against dense, meshes, precision, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.checkpoint import named_leaves
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec, every_expert
from maxlm.layers.router import route, router_logits
from maxlm.layers.rows import Rows
from maxlm.models.decoder import remat
from maxlm.ops.exchange import Dispatch
from maxlm.optim import decayed
from maxlm.sharding import spec as shard
from tests.modules import NORM, assert_close, perturbed, values_and_gradients
from tests.test_mlp import by_definition as mlp_by_definition

D = 16
SWIGLU = MlpSpec(d_ff=16)
SPECS = {
  'mixtral': MoeSpec(n_experts=8, k=2, experts=SWIGLU),
  'one of many': MoeSpec(n_experts=32, k=1, experts=SWIGLU, normalise=False),  # most experts get nothing
  'all of them': MoeSpec(n_experts=4, k=4, experts=SWIGLU, normalise=False),
  'gpt-oss': MoeSpec(n_experts=8, k=4, router_bias=True,
                     experts=MlpSpec(d_ff=16, bias=True, activation='clamped_swiglu', limit=0.7)),
  'qwen3-next': MoeSpec(n_experts=8, k=3, experts=SWIGLU, shared=MlpSpec(d_ff=32), shared_gate=True),
  'deepseek': MoeSpec(n_experts=8, k=3, experts=SWIGLU, shared=MlpSpec(d_ff=32), score='sigmoid', select_bias=True,
                      groups=4, groups_kept=2, scale=2.5),
  'nemotron': MoeSpec(n_experts=8, k=3, experts=MlpSpec(d_ff=16, activation='relu2', gated=False), latent=8, scale=2.5,
                      shared=MlpSpec(d_ff=32, activation='relu2', gated=False), score='sigmoid', select_bias=True),
  'every switch': MoeSpec(n_experts=8, k=3, experts=MlpSpec(d_ff=16, bias=True, gate_scale=0.7), latent=8, shared_gate=True,
                          shared=MlpSpec(d_ff=32, bias=True, out_scale=1.3), router_bias=True, select_bias=True,
                          groups=2, groups_kept=1, normalise=False, scale=1.5),
}
NO_GRADIENT = 'select_bias_E',
every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def route_by_definition(spec, logits, bias):
  """{expert: weight} of one token."""
  scores = softmax(logits) if spec.score == 'softmax' else sigmoid(logits)
  choice = {e: scores[e] + bias[e] for e in range(spec.n_experts)}
  size = spec.n_experts // spec.groups
  groups = [range(g * size, (g + 1) * size) for g in range(spec.groups)]
  groups.sort(key=lambda group: -sum(sorted(choice[e] for e in group)[-2:]))
  eligible = [e for group in groups[:spec.groups_kept] for e in group]
  selected = sorted(eligible, key=lambda e: -choice[e])[:spec.k]
  total = sum(scores[e] for e in selected) if spec.normalise else 1
  return {e: spec.scale * scores[e] / total for e in selected}


def by_definition(spec, moe, x):
  """The layer in float64, a token at a time."""
  w = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(moe).items()}
  expert = lambda e: {f'{name[:-len(dims)]}{dims[1:]}': w[name][e] for name, dims in (
    (name, name.rsplit('_', 1)[1]) for name in w) if len(dims) > 1 and dims[0] == 'E'}
  y = np.zeros(x.shape)
  for token in np.ndindex(x.shape[:2]):
    routed = route_by_definition(spec, x[token] @ w['w_router_DE'] + w.get('b_router_E', 0),
                                 w.get('select_bias_E', np.zeros(spec.n_experts)))
    u = x[token] if spec.latent is None else x[token] @ w['w_latent_in_DR']
    out = sum(weight * mlp_by_definition(spec.experts, expert(e), u) for e, weight in routed.items())
    y[token] = out if spec.latent is None else out @ w['w_latent_out_RD']
    if spec.shared is not None:
      shared = {name.removeprefix('shared.'): value for name, value in w.items() if name.startswith('shared.')}
      gate = sigmoid(x[token] @ w['w_shared_gate_D']) if spec.shared_gate else 1
      y[token] += gate * mlp_by_definition(spec.shared, shared, x[token])
  return y


def example(B=2, T=9, seed=0):
  return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


HERE = Dispatch()


def rows_of(x, dispatch=HERE):
  """Rows of one document each."""
  ids_BT = jnp.ones(x.shape[:2], jnp.int32, out_sharding=shard('BT'))
  return Rows(segment_ids_BT=ids_BT, positions_BT=None, rope={}, kernel='chunked', norm=NORM, dispatch=dispatch)


def apply(spec, run=None, dispatch=HERE):
  return lambda moe, x: moe(spec, x, rows_of(x, dispatch), run)[0]


@every_spec
def test_the_output_is_the_definition(mesh_of, spec):
  spec.check('here')
  with mesh_of(1):
    moe = perturbed(spec, D)
    y = jax.jit(apply(spec))(moe, jax.device_put(example(), shard('BTD')))
  expected = by_definition(spec, moe, example().astype(np.float64))
  np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@every_spec
def test_sorted_experts_agree_with_every_expert_in_value_and_every_gradient(mesh_of, spec):
  with mesh_of(1):
    moe = perturbed(spec, D)
    assert_close(values_and_gradients(apply(spec), moe, example()),
                 values_and_gradients(apply(spec, every_expert), moe, example()), 2e-6, NO_GRADIENT)


@pytest.mark.parametrize('k', [1, 2])
def test_one_expert_may_get_all_tokens_and_the_others_none(mesh_of, k):
  """Nothing is dropped, and without tokens there is no gradient."""
  spec = dataclasses.replace(SPECS['deepseek'], k=k, groups=1, groups_kept=1, normalise=False)
  with mesh_of(1):
    moe = perturbed(spec, D)
    moe.select_bias_E[...] = 100.0 * (jnp.arange(8) == 5)
    actual = values_and_gradients(apply(spec), moe, example())
    assert_close(actual, values_and_gradients(apply(spec, every_expert), moe, example()), 2e-6, NO_GRADIENT)
  used = np.abs(actual['w_up_EDF']).max(axis=(1, 2)) > 0
  assert used[5] and (used.sum() == 1) == (k == 1)
  expected = by_definition(spec, moe, example().astype(np.float64))
  np.testing.assert_allclose(actual['y'], expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize('name, sizes', [
  ('every switch', {'data': 2, 'fsdp': 2, 'tensor': 2}), ('gpt-oss', {'fsdp': 4, 'tensor': 2}),
  ('deepseek', {'fsdp': 2, 'expert': 2, 'tensor': 2}), ('every switch', {'data': 2, 'expert': 2, 'tensor': 2}),
  ('gpt-oss', {'fsdp': 2, 'expert': 4})], ids=str)
@pytest.mark.parametrize('exchange', ['gather', 'all_to_all'])
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, name, sizes, exchange):
  if exchange == 'all_to_all' and 'expert' not in sizes:
    return  # nothing is exchanged
  spec, x = SPECS[name], example(B=8, T=3)
  with mesh_of(1):
    one = values_and_gradients(apply(spec), perturbed(spec, D), x)
  with mesh_of(8, **sizes):
    many = values_and_gradients(apply(spec, dispatch=Dispatch(exchange)), perturbed(spec, D), x)
  assert_close(many, one, 2e-6, NO_GRADIENT)


@pytest.mark.parametrize('policy, kept', [('full', False), ('experts', True)])
def test_what_is_kept_of_experts_on_several_devices_changes_no_gradient(mesh_of, capsys, policy, kept):
  """Rounds are computed again or kept by name, as everything else is."""
  spec, x = SPECS['gpt-oss'], example(B=8, T=3)
  layer = apply(spec)
  with mesh_of(expert=4):
    moe = perturbed(spec, D)
    assert_close(values_and_gradients(remat(layer, policy, False), moe, x), values_and_gradients(layer, moe, x), 1e-6)
    jax.ad_checkpoint.print_saved_residuals(remat(layer, policy, False), moe, jax.device_put(x, shard('BTD')))
  assert ('output of shard_map' in capsys.readouterr().out) == kept


@pytest.mark.parametrize('groups, kept', [(1, 1), (2, 1), (4, 2), (4, 4), (8, 3)])
@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_experts_are_selected_from_the_best_groups_and_weighted_without_the_bias(groups, kept, score):
  spec = MoeSpec(n_experts=16, k=4, experts=SWIGLU, score=score, select_bias=True, groups=groups, groups_kept=kept, scale=2.)
  rng = np.random.default_rng(0)
  logits, bias = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32) - 3  # all below 0
  weights, experts, scores = jax.jit(lambda *a: route(spec, *a))(logits, bias)
  for token in range(50):
    expected = route_by_definition(spec, logits[token].astype(np.float64), bias.astype(np.float64))
    actual = dict(zip(experts[token].tolist(), weights[token].tolist()))
    assert actual.keys() == expected.keys() and len(actual) == 4
    np.testing.assert_allclose([actual[e] for e in expected], list(expected.values()), rtol=2e-6)
    np.testing.assert_allclose(scores[token], (softmax if score == 'softmax' else sigmoid)(logits[token]), rtol=2e-6)


def test_a_selection_bias_moves_the_selection_and_not_the_weights():
  spec = MoeSpec(n_experts=8, k=8, experts=SWIGLU, score='sigmoid', select_bias=True)
  logits = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
  rising = np.arange(8, dtype=np.float32) * 10
  for bias in (rising, -rising):
    weights, experts, _ = route(spec, logits, bias)
    assert (experts == (np.argsort(-bias))).all()
    by_expert = np.take_along_axis(np.asarray(weights), np.argsort(experts, axis=1), axis=1)
    np.testing.assert_allclose(by_expert, sigmoid(logits) / sigmoid(logits).sum(axis=1, keepdims=True), rtol=1e-6)


def test_normalised_softmax_is_the_softmax_of_the_selected_logits():
  spec = MoeSpec(n_experts=16, k=3, experts=SWIGLU)
  logits = 3 * np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
  weights, experts, _ = route(spec, logits, None)
  np.testing.assert_allclose(weights, jax.nn.softmax(np.take_along_axis(logits, np.asarray(experts), 1)), rtol=1e-6)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_logits_of_any_size_have_finite_weights_and_gradients(score):
  spec = MoeSpec(n_experts=4, k=2, experts=SWIGLU, score=score)
  logits = np.array([[-1e4, -2e4, -3e4, -4e4], [1e4, 2e4, -1e4, 0]], np.float32)
  for run in (lambda x: route(spec, x, None)[0], jax.grad(lambda x: jnp.sum(route(spec, x, None)[0][:, 0]))):
    assert np.isfinite(jax.jit(run)(logits)).all()


def test_in_bf16_the_router_is_fp32_of_full_precision(mesh_of):
  """Nearly tied experts: with logits of bf16 many tokens would get others."""
  spec = SPECS['deepseek']
  x = example(B=4, T=50).astype(jnp.bfloat16)
  with mesh_of(1):
    moe = perturbed(spec, D)
    program = jax.make_jaxpr(apply(spec))(moe, jax.device_put(x, shard('BTD')))
    values = values_and_gradients(apply(spec), moe, x)
    expected = values_and_gradients(apply(spec), moe, x.astype(np.float32))
  assert program.out_avals[0].dtype == jnp.bfloat16 and 'Precision.HIGHEST' in str(program)
  w_router_DE = np.asarray(moe.w_router_DE[...])
  np.testing.assert_allclose(router_logits(x[0], w_router_DE, None), x[0].astype(np.float64) @ w_router_DE, atol=2e-6)
  assert_close(values, expected, 0.03, NO_GRADIENT)


def test_matrices_decay_and_biases_do_not(mesh_of):
  with mesh_of(1):
    mask = decayed(named_leaves(perturbed(SPECS['every switch'], D)))
  biases = 'b_down_ED b_gate_EF b_router_E b_up_EF select_bias_E shared.b_down_D shared.b_gate_F shared.b_up_F'
  assert sorted(name for name, decays in mask.items() if not decays) == biases.split()


@every_spec
def test_matmul_params_are_the_matrices_that_a_token_meets(mesh_of, spec):
  with mesh_of(1):
    moe = perturbed(spec, D)
  sizes = {name: leaf.size for name, leaf in named_leaves(moe).items() if 'w_' in name}
  of_experts = sum(size for name, size in sizes.items() if '_E' in name)
  others = sum(sizes.values()) - of_experts
  assert spec.matmul_params(D) == others + of_experts * spec.k // spec.n_experts


@pytest.mark.parametrize('change, message', [
  ({'k': 9}, r'moe\.k=9 must be from 1 to 8'),
  ({'k': 0}, r'moe\.k=0 must be from 1 to 8'),
  ({'groups': 4, 'groups_kept': 1, 'k': 3}, r'moe\.k=3 must be from 1 to 2'),
  ({'groups': 3}, r'moe\.groups=3 does not divide n_experts=8'),
  ({'groups': 8}, r'moe\.groups=8 does not divide n_experts=8 into groups of two or more'),
  ({'groups': 2, 'groups_kept': 3}, r'moe\.groups_kept=3 must be from 1 to groups=2'),
  ({'score': 'tanh'}, r"moe\.score='tanh' is neither"),
  ({'shared_gate': True}, r'moe\.shared_gate=True needs a shared MLP'),
  ({'latent': 0}, r'moe\.latent=0 must be'),
  ({'experts': MlpSpec(d_ff=8, activation='xielu', gated=False)}, r"moe\.experts\.activation='xielu' has scalars"),
  ({'experts': MlpSpec(d_ff=8, out_scale=2.0)}, r'moe\.experts\.out_scale=2\.0: set .*moe\.scale'),
  ({'experts': MlpSpec(d_ff=0)}, r'moe\.experts\.d_ff=0'),
  ({'shared': MlpSpec(d_ff=0)}, r'moe\.shared\.d_ff=0'),
])
def test_what_has_no_meaning_is_refused(change, message):
  with pytest.raises(ValueError, match=message) as error:
    MoeSpec(**{'n_experts': 8, 'k': 2, 'experts': SWIGLU, **change}).check('model.pattern[0].moe')
  assert '\n' not in str(error.value)
