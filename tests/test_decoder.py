"""The decoder as a whole: what it sees, that packing and scanning and meshes do not change it, that its cache is right."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm import decode
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.rows import Past
from maxlm.models.decoder import Decoder, LayerSpec, empty_caches, stack_of_layer
from tests.models import (
  DOCUMENT_LENGTHS,
  FP32,
  assert_packing_changes_nothing,
  assert_same_gradients,
  gradients,
  hidden,
  perturbed,
)
from tests.rows import pack, random_batch

MODEL = tiny.get_config().model


def test_a_token_moves_the_outputs_that_may_see_it_and_no_other(mesh_of):
  """Layers of windows 24 and none: reach of a stack is the union; segments stop it. Perturb key j, look at output i."""
  window = 5
  for layers, reach in (((window,), window), ((window, window), 2 * window - 1), ((window, None), None)):
    pattern = tuple(dataclasses.replace(MODEL.pattern[0], mixer=dataclasses.replace(
      MODEL.pattern[0].mixer, window=w)) for w in layers)
    model = dataclasses.replace(MODEL, n_layers=len(layers), pattern=pattern)
    rng = np.random.default_rng(0)
    batch = pack([[rng.integers(0, 512, n + 1) for n in (20, 9, 25)]], 64)
    with mesh_of(1):
      params = perturbed(model)
      base = hidden(params, batch, model)
      for j in (0, 7, 19, 20, 28, 30, 53, 60):
        changed = {k: v.copy() for k, v in batch.items()}
        changed['tokens'][0, j] += 1
        moved = np.abs(hidden(params, changed, model) - base)[0].max(-1) > 0
        i = np.arange(64)
        may = (i >= j) & (batch['segment_ids'][0] == batch['segment_ids'][0, j])
        if reach is not None:
          may &= i - j < reach
        np.testing.assert_array_equal(moved, may, err_msg=f'windows {layers}, key {j}')


def test_a_packed_document_has_the_hidden_states_and_gradients_it_has_alone(mesh_of):
  rng = np.random.default_rng(1)
  documents = [rng.integers(0, 512, n + 1) for n in DOCUMENT_LENGTHS]
  with mesh_of(1):
    packed, alone = pack([documents[:3], documents[3:]], 64), pack([[d] for d in documents], 64)
    assert_packing_changes_nothing(perturbed(MODEL), packed, alone, MODEL)


@pytest.mark.parametrize('sizes', [{'data': 8}, {'fsdp': 8}, {'tensor': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2},
                                   {'fsdp': 4, 'tensor': 2}], ids=str)
def test_loss_and_every_gradient_leaf_are_the_same_on_any_mesh(mesh_of, sizes):
  batch = random_batch(np.random.default_rng(2), 8, 64, 512)
  with mesh_of(1):
    loss_one, grads_one = gradients(perturbed(MODEL), batch, MODEL)
  with mesh_of(math.prod(sizes.values()), **{'fsdp': 1, **sizes}):
    params = perturbed(MODEL)
    loss_many, grads_many = gradients(params, batch, MODEL)
  assert loss_many == pytest.approx(loss_one, rel=1e-6)
  assert_same_gradients(grads_one, grads_many, 1e-5)


@pytest.mark.parametrize('change', [{'remat': 'full'}, {'remat': 'attention'}, {'unroll': 4}, {'kernel': 'reference'}],
                         ids=str)
def test_how_it_is_computed_does_not_change_loss_or_gradients(mesh_of, change):
  batch = random_batch(np.random.default_rng(3), 2, 64, 512)
  model = dataclasses.replace(MODEL, n_layers=8)
  with mesh_of(1):
    params = perturbed(model)
    loss_a, grads_a = gradients(params, batch, model)
    loss_b, grads_b = gradients(params, batch, model, dataclasses.replace(FP32, **change))
  assert loss_a == pytest.approx(loss_b, rel=1e-6)
  # Another kernel sums in another order; eight layers of random weights make 1.6e-5 of that in fp32.
  assert_same_gradients(grads_a, grads_b, 5e-5 if 'kernel' in change else 1e-5)


def test_weights_do_not_know_how_layers_are_scanned(mesh_of):
  """A pattern written twice over is the same architecture: same weights, same shapes, same function."""
  twice = dataclasses.replace(MODEL, n_layers=6, pattern=MODEL.pattern * 2)
  once = dataclasses.replace(MODEL, n_layers=6)
  batch = random_batch(np.random.default_rng(4), 2, 64, 512)
  with mesh_of(1):
    a, b = perturbed(once), perturbed(twice)
    for (path, x), (_, y) in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b)):
      np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_allclose(hidden(a, batch, once), hidden(a, batch, twice), atol=1e-5)


def test_layers_of_one_shape_share_a_stack_whatever_their_masks(mesh_of):
  def layer(window, d_ff=32):
    return LayerSpec(mixer=AttentionSpec(n_heads=2, n_kv_heads=2, head_dim=8, window=window), mlp=MlpSpec(d_ff=d_ff))
  model = dataclasses.replace(MODEL, n_layers=7, pattern=(layer(4), layer(None), layer(4, 64)))
  with mesh_of(1):
    assert stack_of_layer(model) == [0, 0, 1, 0, 0, 1, 0]


def test_eager_and_jitted_weights_have_the_same_leaves(mesh_of):
  """A raw array attribute would drop out of the pytree under jit; nothing here is one."""
  model = dataclasses.replace(MODEL, n_layers=1, pattern=MODEL.pattern[:1])
  with mesh_of(1):
    eager, jitted = Decoder(model, jax.random.key(0)), jax.jit(lambda key: Decoder(model, key))(jax.random.key(0))
  assert jax.tree.structure(eager) == jax.tree.structure(jitted)
  assert len(jax.tree.leaves(eager)) == len(jax.tree.leaves(jitted)) > 20


def test_logits_of_the_cache_equal_the_full_forward(mesh_of):
  """Prompt of 9 tokens at once, then one by one, beside a shorter left-padded row."""
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, 512, (2, 40)).astype(np.int32)
  segments = np.ones_like(tokens)
  segments[1, :4] = 0
  positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
  with mesh_of(1):
    params = perturbed(MODEL)
    full = hidden(params, {'tokens': tokens, 'segment_ids': segments, 'positions': positions}, MODEL)
    caches = empty_caches(MODEL, FP32, 2, 40)
    extend = jax.jit(functools.partial(Decoder.extend, config=MODEL, compute=FP32))
    column, got = 0, []
    for stop in (9, *range(10, 41)):
      part = slice(column, stop)
      on_mesh = to_device({'t': tokens[:, part], 's': segments[:, part], 'p': positions[:, part], 'ids': segments})
      h, caches = extend(params, tokens_BT=on_mesh['t'], segment_ids_BT=on_mesh['s'], positions_BT=on_mesh['p'],
                         caches=caches, past=Past(on_mesh['ids'], jnp.asarray(column)))
      got.append(np.asarray(h))
      column = stop
  np.testing.assert_allclose(np.concatenate(got, 1)[segments > 0], full[segments > 0], atol=2e-5)


def test_greedy_generation_takes_the_likeliest_next_token_and_stops_at_the_end(mesh_of):
  with mesh_of(1):
    params = perturbed(MODEL)
    prompts = [[0, 5, 9, 11], [0, 7]]
    out = decode.generate(params, MODEL, FP32, prompts, eos=[0], max_tokens=12, temperature=0.0)
    for prompt, continuation in zip(prompts, out):
      tokens = np.array([prompt + continuation], np.int32)
      ones = np.ones_like(tokens)
      positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
      h = hidden(params, {'tokens': tokens, 'segment_ids': ones, 'positions': positions}, MODEL)
      best = np.asarray(params.logits(MODEL, jax.device_put(h, jax.P(None, None, None)))).argmax(-1)[0]
      np.testing.assert_array_equal(best[len(prompt) - 1:-1], continuation)
      assert len(continuation) == 12 or best[-1] == 0


def test_top_p_draws_only_from_the_smallest_likely_set(mesh_of):
  chances = np.array([0.5, 0.3, 0.15, 0.05], np.float32)
  with mesh_of(1):
    logits_BV = jax.device_put(np.tile(np.log(chances), (2000, 1)), jax.P(None, None))
    some = np.asarray(decode.draw(logits_BV, 1.0, 0.7, jax.random.key(0)))
    every = np.asarray(decode.draw(logits_BV, 1.0, 1.0, jax.random.key(1)))
    likeliest = np.asarray(decode.draw(logits_BV, 0.0, 1.0, jax.random.key(2)))
  assert set(some) == {0, 1}
  np.testing.assert_allclose(np.bincount(every, minlength=4) / 2000, chances, atol=0.04)
  assert set(likeliest) == {0}
