"""Tokens on their way to the experts of other devices: where each row lies, what is dropped, and the way back."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.ops import exchange as ops
from maxlm.ops.exchange import Dispatch
from maxlm.sharding import axes
from maxlm.sharding import spec as shard
from tests.modules import assert_close, perturbed, values_and_gradients
from tests.test_moe import NO_GRADIENT, SPECS, D, apply, example, rows_of

X, L, C, J = 4, 2, 6, 3  # devices, experts of each, tokens of each, experts of a token
E = X * L


def chosen(case: str) -> np.ndarray:
  """[X, C, J]: E for no expert."""
  rng = np.random.default_rng(0)
  experts = np.array([[rng.permutation(E)[:J] for _ in range(C)] for _ in range(X)], np.int32)
  if case == 'one expert and the first':
    experts[...] = np.where(np.arange(J) == 1, 5, E)
    experts[2, :4, 0] = 0
  if case == 'a device sends nothing':
    experts[1] = E
    experts[3, 2:] = E
  return experts


cases = pytest.mark.parametrize('case', ['all', 'one expert and the first', 'a device sends nothing'])


def on_ring(function, *arrays):
  """The results, [X, …], of a function of each device's part of arrays [X, …]."""
  part = jax.P(axes('E'))
  island = lambda *parts: jax.tree.map(lambda a: a[None], function(*(a[0] for a in parts)))
  run = jax.jit(jax.shard_map(island, in_specs=part, out_specs=part))
  return jax.tree.map(np.asarray, run(*(jax.device_put(a, part) for a in arrays)))


def documented(slices: ops.Slices, sent: np.ndarray, rows: int) -> np.ndarray:
  """What the documentation of `jax.lax.ragged_all_to_all` says that all devices get."""
  out = np.zeros((X, rows, sent.shape[2]), sent.dtype)
  for device in range(X):
    flat = [np.asarray(a[device]).reshape(-1) for a in (slices.sent_at_XL, slices.sent_XL, slices.placed_at_XL)]
    for i, (begin, size, place) in enumerate(zip(*flat)):
      out[i // L, place:place + size] = sent[device, begin:begin + size]
      assert slices.got_XL[i // L][device].reshape(-1)[i % L] == size  # what the receiver is told
  return out


@cases
def test_rows_arrive_sorted_by_expert_and_sender_and_come_back(mesh_of, case):
  """And the arguments are those that XLA's ragged all-to-all is to have, which no CPU runs."""
  experts_XCJ = chosen(case)
  x_XCD = (100 * np.arange(X)[:, None] + np.arange(C) + 1.0)[..., None].astype(np.float32)
  rows = ops.buffer_rows(C, J, X, L, None)
  assert rows == X * C * L

  def there_and_back(x_CD, experts_CJ):
    order = ops.sort_pairs(experts_CJ, E, C * J)
    slices, sent_PD = ops.slices_of(order.sizes_E), ops.to_rows(x_CD, order)
    there_RD = ops.exchange(sent_PD, slices, rows)
    return order, slices, sent_PD, there_RD, ops.exchange(there_RD, slices.back(), C * J)

  with mesh_of(expert=X):
    order, slices, sent, there, back = on_ring(there_and_back, x_XCD, experts_XCJ)
  for device in range(X):
    expected = [x_XCD[s, c, 0] for e in range(device * L, device * L + L) for s in range(X)
                for c in range(C) if e in experts_XCJ[s, c]]
    np.testing.assert_array_equal(there[device, :, 0], expected + [0] * (rows - len(expected)))
    n = (experts_XCJ[device] < E).sum()
    np.testing.assert_array_equal(back[device, :n], sent[device, :n])
    assert not back[device, n:].any() and order.sizes_E[device].sum() == n
  np.testing.assert_array_equal(there, documented(slices, sent, rows))
  np.testing.assert_array_equal(back, documented(slices.back(), there, C * J))


@cases
@pytest.mark.parametrize('rows', [C * J, 40])
def test_rows_of_pairs_are_sums_with_the_gradients_of_sums(case, rows):
  """Pairs without an expert count for nothing, whatever is in the rows past the last pair."""
  experts_CJ, rng = chosen(case)[3], np.random.default_rng(1)
  x_CD, factors_RD, dout_CD = (rng.normal(size=(n, 5)).astype(np.float32) for n in (C, rows, C))
  weights_CJ = rng.normal(size=(C, J)).astype(np.float32)
  used = int((experts_CJ < E).sum())

  def by_rows(x_CD, weights_CJ):
    order = ops.sort_pairs(experts_CJ, E, rows)
    y_RD = ops.to_rows(x_CD, order) * factors_RD * ops.weights_of_rows(weights_CJ, order)
    y_RD = jnp.where(jnp.arange(rows)[:, None] < used, y_RD, jnp.nan)
    return ops.from_rows(y_RD, order)

  def plain(x_CD, weights_CJ):
    order_P = np.argsort(experts_CJ.reshape(-1), kind='stable')[:used]
    y_RD = x_CD[order_P // J] * factors_RD[:used] * weights_CJ.reshape(-1)[order_P][:, None]
    return jnp.zeros_like(x_CD).at[order_P // J].add(y_RD)

  def results(function, x_CD, weights_CJ, dout_CD):
    y, pull = jax.vjp(function, x_CD, weights_CJ)
    return y, *pull(dout_CD)

  values = [jax.jit(functools.partial(results, f))(x_CD, weights_CJ, dout_CD) for f in (by_rows, plain)]
  for actual, expected in zip(*values):
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@cases
@pytest.mark.parametrize('rows', [1, 7, C * J])
def test_rounds_are_parts_of_the_whole(case, rows):
  """Their sum, and its gradients, are those of all rows at once; there are as many as it takes, and one where there is
  nothing to do."""
  experts_CJ, rng = chosen(case)[3], np.random.default_rng(2)
  x_CD, dout_CD, weights_CJ = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((C, 5), (C, 5), (C, J)))
  order = ops.sort_pairs(experts_CJ, E, -(-C * J // rows) * rows)

  def of_round(i, order, args):
    x_CD, weights_CJ = args
    here = ops.order_of_round(order, i, rows)
    expert_R = jnp.searchsorted(jnp.cumsum(here.sizes_E), jnp.arange(rows), side='right')
    y_RD = ops.to_rows(x_CD, here) * (expert_R + 1.0)[:, None] * ops.weights_of_rows(weights_CJ, here)
    return ops.from_rows(y_RD, here)

  n = ops.n_rounds(order.sizes_E, rows)
  assert n == -(-int((experts_CJ < E).sum()) // rows)
  y_CD, pull = jax.vjp(lambda *args: ops.in_rounds(of_round, n, order, args), x_CD, weights_CJ)
  factor_CJ = np.where(experts_CJ < E, experts_CJ + 1.0, 0)
  np.testing.assert_allclose(y_CD, x_CD * (factor_CJ * weights_CJ).sum(axis=1, keepdims=True), atol=1e-5)
  dx_CD, dweights_CJ = pull(dout_CD)
  np.testing.assert_allclose(dx_CD, dout_CD * (factor_CJ * weights_CJ).sum(axis=1, keepdims=True), atol=1e-5)
  np.testing.assert_allclose(dweights_CJ, factor_CJ * (x_CD * dout_CD).sum(axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize('rows', [5, 12, 17, 18, 40])
def test_what_does_not_fit_is_dropped_evenly_from_the_last_tokens(mesh_of, rows):
  experts_XCJ = chosen('all')
  experts_XCJ[:, :, 0] = np.where((experts_XCJ[:, :, 1:] // L == 2).any(-1), experts_XCJ[:, :, 0], 4)  # many to device 2
  with mesh_of(expert=X):
    kept = on_ring(lambda experts_CJ: ops.within_capacity(experts_CJ, E, rows), experts_XCJ)
  assert ((kept == experts_XCJ) | (kept == E)).all()
  for device in range(X):
    here = experts_XCJ // L == device
    n, n_kept = here.sum(axis=(1, 2)), (here & (kept < E)).sum(axis=(1, 2))
    if n.sum() <= rows:
      assert (n_kept == n).all()
    else:
      assert n_kept.sum() <= rows and (np.abs(n_kept - n * rows / n.sum()) <= 1).all()
    for s in range(X):  # in the order of tokens, first what is kept
      kept_in_order = (kept[s] < E)[here[s]]
      assert (np.diff(kept_in_order.astype(int)) <= 0).all()


def test_the_exchange_is_chosen_by_bytes_and_links():
  assert [ops.exchange_for(k, 4) for k in (1, 2, 3, 4, 8)] == ['all_to_all'] * 2 + ['gather'] * 3  # 3: equal on four
  assert [ops.exchange_for(k, 2) for k in (1, 2)] == ['all_to_all', 'gather']
  assert [ops.exchange_for(k, 64) for k in (3, 4)] == ['all_to_all', 'gather']


def test_buffers_hold_the_worst_case_or_what_they_are_allowed():
  assert ops.buffer_rows(100, 4, 8, 16, None) == 3200  # each token's four experts may all be here
  assert ops.buffer_rows(100, 4, 8, 2, None) == 1600  # but no more than there are
  assert ops.buffer_rows(100, 4, 8, 16, 1.25) == 500
  assert ops.buffer_rows(100, 4, 8, 2, 100.0) == 1600


def test_a_round_takes_a_quarter_more_than_the_mean_if_there_can_be_so_much():
  assert ops.round_rows(100, 4, 8, 16, None) == 500
  assert ops.round_rows(100, 4, 8, 16, 1.0) == 400
  assert ops.round_rows(100, 4, 1, 128, None) == 400


def dropping(spec, moe, x, exchange, capacity):
  """Values and gradients, and the pairs dropped of each row."""
  dispatch = Dispatch(exchange, capacity)
  results = values_and_gradients(apply(spec, dispatch=dispatch), moe, x)
  _, stats = jax.jit(lambda moe, x: moe(spec, x, rows_of(x, dispatch)))(moe, jax.device_put(x, shard('BTD')))
  return results, np.asarray(stats.dropped_BT)[:, 0], np.asarray(stats.load_BTE).sum()


def test_both_exchanges_drop_the_same_pairs_and_count_them(mesh_of):
  """A row that loses nothing has the output it has without a capacity, and each loss is counted where the token is."""
  spec, x = MoeSpec(n_experts=8, k=3, experts=MlpSpec(d_ff=8), normalise=False), example(B=4, T=8)
  with mesh_of(expert=4):
    moe = perturbed(spec, D)
    whole, none, pairs = dropping(spec, moe, x, 'gather', None)
    gathered, dropped, _ = dropping(spec, moe, x, 'gather', 1.0)
    sent, dropped_too, _ = dropping(spec, moe, x, 'all_to_all', 1.0)
  assert_close(sent, gathered, 2e-6)
  np.testing.assert_array_equal(dropped, dropped_too)
  assert not none.any() and pairs == x.shape[0] * x.shape[1] * 3 and 0 < dropped.sum() < pairs / 3
  changed = np.abs(gathered['y'] - whole['y']).max(axis=2) > 1e-6
  assert (changed.sum(axis=1) <= dropped).all() and (changed.any(axis=1) == (dropped > 0)).all()


@pytest.mark.parametrize('exchange', ['gather', 'all_to_all'])
def test_one_expert_on_another_device_may_get_all_tokens(mesh_of, exchange):
  spec, x = SPECS['deepseek'], example(B=4, T=3)
  spec = MoeSpec(n_experts=8, k=1, experts=spec.experts, score='sigmoid', select_bias=True,
                 normalise=False)

  def results(dispatch):
    moe = perturbed(spec, D)
    moe.select_bias_E[...] = jax.reshard(100.0 * (jnp.arange(8) == 5), shard('E'))
    return values_and_gradients(apply(spec, dispatch=dispatch), moe, x)

  with mesh_of(1):
    one = results(Dispatch())
  with mesh_of(expert=4):
    many = results(Dispatch(exchange))
  assert_close(many, one, 2e-6, NO_GRADIENT)
  assert (np.abs(many['w_up_EDF']).max(axis=(1, 2)) > 0).tolist() == [e == 5 for e in range(8)]


@pytest.mark.parametrize('exchange, collectives', [
  ('gather', {'all_gather', 'reduce_scatter'}), ('all_to_all', {'ragged_all_to_all'})])
def test_on_an_accelerator_activations_travel_in_their_own_dtype(mesh_of, exchange, collectives):
  """In bf16, there and back, and in the backward pass again; nothing as wide as a token travels in fp32."""
  spec = MoeSpec(n_experts=8, k=2, experts=MlpSpec(d_ff=24))
  with mesh_of(expert=4):
    moe = perturbed(spec, D)
    x = jax.device_put(example(B=4, T=5).astype(jnp.bfloat16), shard('BTD'))
    grad = jax.grad(lambda x, moe: jnp.sum(apply(spec, dispatch=Dispatch(exchange))(moe, x).astype(jnp.float32)))
    program = str(jax.make_jaxpr(grad)(x, moe))
  travelling = re.findall(r':(\w+)\[(?:\d+,)*(\d+)\]\S* = (all_gather|reduce_scatter|ragged_all_to_all)\[', program)
  wide = [(dtype, name) for dtype, width, name in travelling if int(width) == D]
  assert {dtype for dtype, _ in wide} == {'bf16'} and collectives <= {name for _, name in wide}
