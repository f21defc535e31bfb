"""The recurrences: by definition, chunked against token by token, resets, strong decays, pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops import chunks, delta, ssd
from maxlm.ops.conv import conv_silu
from maxlm.sharding import spec as shard

B, N, K, Q, H = 2, 4, 2, 5, 6
NAMES = {'ssd': ('x', 'log_decay', 'b', 'c'), 'head': ('q', 'k', 'v', 'log_decay', 'beta'),
         'channel': ('q', 'k', 'v', 'log_decay', 'beta')}
every_kind = pytest.mark.parametrize('kind', list(NAMES))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  """Chunks so short that a few dozen tokens are several."""
  monkeypatch.setattr(ssd, 'CHUNK', 8)
  monkeypatch.setattr(delta, 'CHUNK', 8)


def forms(kind):
  """(chunked, token by token), each of which takes the inputs of `example`."""
  both = (ssd.ssd_chunked, ssd.ssd_reference) if kind == 'ssd' else (delta.delta_chunked, delta.delta_reference)
  return tuple(jax.jit(lambda *arrays, form=form: form(*arrays)) for form in both)  # its own cache: CHUNK varies


def example(kind, T, decay='middling', seed=0):
  """Inputs in the order of NAMES, starts, and the state before; documents of a token or two among longer ones."""
  rng = np.random.default_rng(seed)
  f = lambda *shape: rng.normal(size=shape).astype(np.float32)
  log_decay = -np.exp(f(B, T, N, Q) if kind == 'channel' else f(B, T, N))
  match decay:
    case 'weak':
      log_decay *= 0.01
    case 'strong':
      log_decay *= 100
    case 'mixed':  # a token that forgets all, among tokens that forget little
      log_decay = np.where(rng.random(log_decay.shape) < 0.2, -1e4, 0.1 * log_decay).astype(np.float32)
  starts = rng.random((B, T)) < 0.2
  starts[:, 3:5] = starts[0, 0] = True
  starts[1, 0] = False
  if kind == 'ssd':
    inputs = f(B, T, N, H), log_decay, f(B, T, K, Q), f(B, T, K, Q)
  else:
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    inputs = unit(f(B, T, N, Q)), unit(f(B, T, N, Q)), f(B, T, N, H), log_decay, 2 * rng.random((B, T, N)).astype(np.float32)
  return inputs, starts, f(B, N, Q, H)


def by_definition(kind, inputs, state):
  """y [T, H] of one head and one document in float64: SSD as its quadratic form, the delta rule with matrices."""
  inputs = [a.astype(np.float64) for a in inputs]
  if kind == 'ssd':
    x, log_decay, b, c = inputs
    decay = lambda s, t: np.exp(log_decay[s + 1:t + 1].sum())
    return np.stack([sum(c[t] @ b[s] * decay(s, t) * x[s] for s in range(t + 1)) + decay(-1, t) * c[t] @ state
                     for t in range(len(x))])
  ys = []
  for q, k, v, log_decay, beta in zip(*inputs):
    state = (np.eye(Q) - beta * np.outer(k, k)) @ np.diag(np.exp(log_decay) * np.ones(Q)) @ state + beta * np.outer(k, v)
    ys.append(state.T @ q)
  return np.stack(ys)


def documents_of(starts):
  """Slices of the documents of one row."""
  edges = [0, *(t for t in np.flatnonzero(starts) if t), len(starts)]
  return [slice(*edge) for edge in zip(edges, edges[1:])]


def assert_close(actual, expected, rtol, names=None):
  for name, a, e in zip(names or range(len(expected)), actual, expected):
    assert np.isfinite(a).all(), name
    np.testing.assert_allclose(a, e, atol=rtol * max(np.abs(e).max(), 1e-30), rtol=0, err_msg=str(name))


@every_kind
def test_token_by_token_is_the_definition_with_each_document_by_itself(kind):
  inputs, starts, state = example(kind, 23)
  y = np.asarray(forms(kind)[1](*inputs, starts, state)[0])
  for row in range(B):
    for at in documents_of(starts[row]):
      for n in range(N):
        of_head = [a[row, at, n // (N // a.shape[2])] for a in inputs]
        before = state[row, n] if at.start == 0 and not starts[row, 0] else np.zeros((Q, H))
        np.testing.assert_allclose(y[row, at, n], by_definition(kind, of_head, before), atol=1e-5)


def value_and_gradients(form, inputs, starts, state):
  """y, the last state, and the gradients by inputs and first state of both's product with random numbers."""
  rng = np.random.default_rng(1)
  v = inputs[0 if len(inputs) == 4 else 2]
  w_y, w_state = (rng.normal(size=a.shape).astype(np.float32) for a in (v, state))

  def loss(inputs, state):
    y, last = form(*inputs, starts, state)
    return jnp.sum(y * w_y) + jnp.sum(last * w_state), (y, last)

  (_, values), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(inputs, state)
  return jax.device_get((*values, *gradients[0], gradients[1]))


@every_kind
@pytest.mark.parametrize('T, decay', [(21, 'weak'), (32, 'strong'), (37, 'mixed'), (5, 'mixed'), (1, 'middling')])
def test_chunked_agrees_with_token_by_token_in_value_and_every_gradient(kind, T, decay):
  arrays = example(kind, T, decay)
  chunked, by_token = (value_and_gradients(form, *arrays) for form in forms(kind))
  assert_close(chunked, by_token, 3e-6, ('y', 'last state', *NAMES[kind], 'state'))


@every_kind
def test_chunked_agrees_with_token_by_token_at_the_sizes_it_is_used_with(kind, monkeypatch):
  monkeypatch.undo()
  assert (ssd.CHUNK, delta.CHUNK) == (128, 64)
  inputs, starts, state = example(kind, 200, 'mixed')
  starts[:, 40:190] = False  # so that a document is longer than a chunk
  chunked, by_token = (value_and_gradients(form, inputs, starts, state) for form in forms(kind))
  assert_close(chunked, by_token, 1e-5, ('y', 'last state', *NAMES[kind], 'state'))


def test_a_decay_for_each_channel_that_is_the_same_for_all_is_one_for_the_head():
  (q, k, v, log_decay, beta), starts, state = example('head', 21)
  of_channels = np.repeat(log_decay[..., None], Q, axis=-1)
  run = forms('head')[0]
  assert_close(run(q, k, v, of_channels, beta, starts, state), run(q, k, v, log_decay, beta, starts, state), 2e-6)


@every_kind
def test_the_keys_of_a_group_are_those_of_each_of_its_heads(mesh_of, kind):
  inputs, starts, state = example(kind, 21)
  if kind == 'ssd':
    x, log_decay, b, c = inputs
    island, per_group, per_head = ssd.ssd, inputs, (x, log_decay, *(np.repeat(a, N // K, axis=2) for a in (b, c)))
  else:
    q, k, *rest = inputs
    island, per_group = delta.delta_rule, (q[:, :, :K], k[:, :, :K], *rest)
    per_head = (*(np.repeat(a, N // K, axis=2) for a in per_group[:2]), *rest)
  with mesh_of(1):
    place = lambda arrays: [jax.device_put(a, shard('BTNQ'[:a.ndim])) for a in arrays]
    rest = [jax.device_put(starts, shard('BT')), jax.device_put(state, shard('BNQH'))]
    grouped = jax.jit(lambda *arrays: island(*arrays))(*place(per_group), *rest)
    assert_close(grouped, forms(kind)[1](*per_head, starts, state), 3e-6)


@every_kind
def test_a_token_moves_those_after_it_in_its_document_and_no_other_by_a_single_bit(kind):
  """One row of the batch a perturbed token, and one with none."""
  T = 21
  inputs, starts, state = example(kind, T, 'weak')
  tokens = np.arange(T)
  inputs = [np.repeat(a[:1], T + 1, axis=0) for a in inputs]
  for a in inputs:
    a[tokens, tokens] *= 0.5
  out = forms(kind)[0](*inputs, np.repeat(starts[:1], T + 1, axis=0), np.repeat(state[:1], T + 1, axis=0))[0]
  moved = np.asarray(out[:-1] != out[-1:]).any(axis=(2, 3))
  document = np.cumsum(starts[0])
  expected = (tokens[:, None] <= tokens) & (document[:, None] == document)
  np.testing.assert_array_equal(moved, expected)


@every_kind
def test_what_comes_before_a_start_has_a_gradient_of_zero_and_may_be_huge(kind):
  inputs, starts, state = example(kind, 21, 'mixed')
  starts[:] = False
  starts[:, 11] = True
  alone = [a[:, 11:] for a in inputs]
  for a in inputs:
    a[:, :11] *= 1e4  # log decays of -1e8 too

  def loss(inputs, state, first=0):
    y, last = forms(kind)[0](*inputs, starts[:, first:], state)
    y = y[:, 11 - first:]
    return jnp.sum(jnp.sin(y)) + jnp.sum(last), (y, last)

  gradients = functools.partial(jax.value_and_grad, has_aux=True)
  (_, found), (by_inputs, by_state) = jax.jit(gradients(loss, argnums=(0, 1)))(tuple(inputs), state)
  (_, expected), by_alone = jax.jit(gradients(functools.partial(loss, first=11)))(tuple(alone), state)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())
  assert not np.any(by_state)
  for name, gradient, expected in zip(NAMES[kind], by_inputs, by_alone):
    assert not np.any(gradient[:, :11]), name
    np.testing.assert_allclose(gradient[:, 11:], expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@every_kind
def test_a_sequence_in_pieces_is_the_sequence(kind):
  inputs, starts, state = example(kind, 21)
  run = forms(kind)[0]
  whole = run(*inputs, starts, state)
  ys, at = [], 0
  for length in (10, 1, 10):
    y, state = run(*(a[:, at:at + length] for a in inputs), starts[:, at:at + length], state)
    ys.append(y)
    at += length
  assert_close((np.concatenate(ys, axis=1), state), whole, 3e-6)


@every_kind
def test_keys_and_values_of_bf16_are_summed_in_fp32(kind):
  inputs, starts, state = example(kind, 200, 'weak')
  half = [jnp.asarray(a, jnp.bfloat16) for a in inputs]
  chunked, by_token = forms(kind)
  y, last = chunked(*half, starts, state)
  assert y.dtype == last.dtype == jnp.float32
  assert_close((y, last), by_token(*(np.asarray(a, np.float32) for a in half), starts, state), 1e-5)


def test_products_with_decays_do_not_overflow_where_a_factor_would():
  """exp(sum to t) exp(-sum to s) is 0 * inf here; the decay itself is exp(-30)."""
  x = np.ones((8, 1), np.float32)
  log_decay = np.full((1, 8), -30, np.float32)
  log_decay[0, 0] = -1e6
  products = jax.jit(chunks.decayed_products)(x, x, log_decay)
  t, s = np.mgrid[:8, :8]
  np.testing.assert_allclose(products, np.where(s <= t, np.exp(-30.0 * (t - s)), 0), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize('W, with_bias', [(4, True), (1, False), (3, False)])
def test_the_convolution_is_its_definition_within_documents_and_in_pieces(mesh_of, W, with_bias):
  T = 13
  rng = np.random.default_rng(0)
  x, w, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, N, H), (W, N, H), (N, H)))
  starts = np.zeros((B, T), bool)
  starts[0, [3, 4, 9]] = starts[1, 8] = True
  expected = np.zeros(x.shape)
  document = np.cumsum(starts, axis=1)
  for row, t in np.ndindex(B, T):
    total = sum(w[W - 1 - lag] * x[row, t - lag] for lag in range(min(W, t + 1))
                if document[row, t - lag] == document[row, t])
    total = total + bias if with_bias else total
    expected[row, t] = total / (1 + np.exp(-total))

  with mesh_of(1):
    run = jax.jit(conv_silu)
    w, bias = jax.device_put(w, shard('WNH')), jax.device_put(bias, shard('NH')) if with_bias else None
    for lengths in ((T,), (2, 1, 1, 1, 5, 1, 2)):
      tail, at, ys = jnp.zeros((B, W - 1, N, H), jnp.float32, out_sharding=shard('BJNH')), 0, []
      for length in lengths:
        piece = slice(at, at + length)
        y, tail = run(jax.device_put(x[:, piece], shard('BTNH')), w, bias,
                            jax.device_put(starts[:, piece], shard('BT')), tail)
        ys.append(y)
        at += length
      np.testing.assert_allclose(np.concatenate(ys, axis=1), expected, atol=1e-6)
