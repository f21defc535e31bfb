"""QK-clip: the largest logits by definition, heads above tau brought down to it and no bit of others changed, meshes."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm import lora, train
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.config import validate
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec, QueryGrowth
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.layers.rope import RopeSpec, YarnScaling
from maxlm.models.decoder import Decoder, DecoderConfig, LayerSpec, rows_for, runs, stack_of_layer, unstack
from maxlm.ops import attention as ops
from maxlm.ops.context import to_zigzag
from maxlm.sharding import spec as shard
from maxlm.step import StepConfig, begin, gradients, train_step
from tests.models import FP32, perturbed
from tests.rows import random_batch
from tests.test_spikes import bits, window_of
from tests.test_train import short_config

V, D, T = 64, 16, 24
HEADS = dict(n_heads=4, head_dim=6)
YARN = RopeSpec(theta=100.0, interleaved=True, scaling=YarnScaling(factor=4.0, original_length=16, amplitude=1.1))
GROUPED = AttentionSpec(**HEADS, n_kv_heads=2, window=5, softcap=5.0, sinks=True, qkv_bias=True)
MIXERS = {
  'a key head each': AttentionSpec(**HEADS, n_kv_heads=4, qkv_bias=True, query_growth=QueryGrowth(beta=0.3, length=8)),
  'shared key heads': GROUPED,
  'mla': MlaSpec(n_heads=4, q_rank=12, kv_rank=8, nope_dim=6, rope_dim=4, v_dim=9, rope=YARN, scale=0.4, bias=True),
  'mla, queries of the token': MlaSpec(n_heads=4, q_rank=None, kv_rank=8, nope_dim=6, rope_dim=2, v_dim=3),
  'parallel': ParallelSpec(mixers=(Mamba2Spec(n_heads=4, head_dim=6, state_dim=5, n_groups=2), GROUPED)),
}
every_mixer = pytest.mark.parametrize('mixer', MIXERS.values(), ids=MIXERS)
DEEP = DecoderConfig(vocab_size=V, d_model=D, n_layers=9, pattern=(
  LayerSpec(mixer=GROUPED, mlp=MlpSpec(d_ff=24)),
  LayerSpec(mixer=dataclasses.replace(GROUPED, window=None, scale=0.7), mlp=MlpSpec(d_ff=24)),  # of the same stack
  LayerSpec(mixer=None, mlp=MlpSpec(d_ff=8)),
  LayerSpec(mixer=MIXERS['parallel'], mlp=None)))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks so short that a few dozen tokens are several, and the longer ones are scanned."""
  monkeypatch.setattr(ops, 'UNROLLED_CHUNKS', 3)
  monkeypatch.setattr(ops, 'SHORTEST_CHUNK', 4)
  monkeypatch.setattr(ops, 'SCAN_ROWS', 8)


def model_of(mixer, n_layers: int = 1) -> DecoderConfig:
  return DecoderConfig(vocab_size=V, d_model=D, n_layers=n_layers, pattern=(LayerSpec(mixer=mixer, mlp=MlpSpec(d_ff=24)),))


def step_config(model: DecoderConfig, tau: float | None, peak_lr: float = 0.0, **changes) -> StepConfig:
  config = tiny.get_config()
  config.model = model
  config.optim = dataclasses.replace(config.optim, peak_lr=peak_lr, warmup_tokens=0, qk_clip=tau)
  return dataclasses.replace(config.step_config('cpu', 1), **changes)


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
  return random_batch(np.random.default_rng(seed), 8, T, V)


def start(config: StepConfig, loud: float = 30.0):
  """The state before the first step; queries of heads 1 and 2 are many times as large as others."""
  params = perturbed(config.model)
  factor_N1 = np.array([1, loud, 3 * loud, 1], np.float32)[:, None]
  louder = {name: w * factor_N1 for name, w in named_leaves(params).items()
            if name.rpartition('.')[2] in ('w_q_DNH', 'w_q_up_DNH', 'b_q_NH')}
  return begin(config, with_leaves(params, named_leaves(params) | louder), jax.random.key(0))


def max_logits(model: DecoderConfig, params, batch, compute=FP32) -> dict[str, np.ndarray]:
  run = jax.jit(lambda params, tokens, ids, positions: params.observed(model, compute, tokens, ids, positions,
                                                                       max_logits=True)[2])
  device = {name: to_zigzag(a) for name, a in to_device(batch).items() if a.ndim == 2}
  return {name: np.asarray(top) for name, top in
          run(params, device['tokens'], device['segment_ids'], device['positions']).items()}


# -- the largest logits


@pytest.mark.parametrize('sizes', [{}, {'data': 2, 'tensor': 2}, {'fsdp': 2, 'context': 2}, {'context': 4}], ids=str)
@pytest.mark.parametrize('window, causal', [(None, True), (5, True), (13, True), (None, False), (5, False)])
def test_they_are_the_largest_of_what_is_seen_in_documents_and_not_in_padding(mesh_of, sizes, window, causal):
  rng = np.random.default_rng(0)
  B, N, K, H, length = 4, 4, 2, 6, 48
  q, k = (rng.normal(size=(B, length, heads, H)).astype(np.float32) for heads in (N, K))
  ids = np.sort(rng.integers(1, 4, (B, length)), axis=1).astype(np.int32)
  ids[:, 43:] = 0
  q[:, 43:] *= 100  # what padding would give
  q[..., 3, :] = -np.abs(q[..., 3, :])  # and a head whose logits are all below zero
  k[..., 1, :] = np.abs(k[..., 1, :])
  expected = np.full(N, -np.inf)
  for b, i, j, n in np.ndindex(B, length, length, N):
    near = abs(i - j) < (window or math.inf) and (j <= i or not causal)
    if near and ids[b, i] == ids[b, j] > 0:
      expected[n] = max(expected[n], 0.3 * float(q[b, i, n].astype(np.float64) @ k[b, j, n // 2]))
  assert expected[3] < 0 < expected[2]
  with mesh_of(**{'fsdp': 1, **sizes}):
    order = np.asarray(to_zigzag(jax.device_put(np.tile(np.arange(length), (B, 1)), shard('BT'))))[0]
    q, k, ids = (jax.device_put(a[:, order], shard(dims)) for a, dims in ((q, 'BTNH'), (k, 'BSKH'), (ids, 'BT')))
    run = jax.jit(functools.partial(ops.max_logits_N, window=window, scale=0.3, causal=causal))
    got, nothing = run(q, k, ids), run(q, k, 0 * ids)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  np.testing.assert_array_equal(nothing, np.float32(ops.MASKED))


@every_mixer
def test_a_layer_says_them_and_its_output_is_the_same(mesh_of, mixer):
  """Against all scores of the kernel that keeps them, seen through the projections of the layer itself."""
  model, batch = model_of(mixer), batch_of()
  with mesh_of(1):
    params, device = perturbed(model), to_device(batch)
    rows = rows_for(model, FP32, device['segment_ids'], device['positions'])
    layer, = unstack(params.stacks[0], 1)
    x = params.embed(model, FP32, device['tokens'], device['positions'])
    run = jax.jit(lambda layer, x: layer(model.pattern[0], x, rows._replace(max_logits=True)))
    said, _, tops = run(layer, x)
    plain, _, none = jax.jit(lambda layer, x: layer(model.pattern[0], x, rows))(layer, x)
    np.testing.assert_array_equal(said, plain)
    assert none == {} and [*tops] == ['.mixers.1' if mixer is MIXERS['parallel'] else '']
    part, spec = (layer.mixer.mixers[1], GROUPED) if '.mixers.1' in tops else (layer.mixer, mixer)
    h = layer.mixer_pre_norm(model.norm, x)
    q, k, _ = (np.asarray(a, np.float64) for a in jax.jit(lambda part, h: part._project(spec, h, rows))(part, h))
  k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
  scores = np.einsum('btnh,bsnh->nbts', q, k) * spec.score_scale
  i, j = np.mgrid[:T, :T]
  ids_BT1, near = batch['segment_ids'][:, :, None], i - j < (getattr(spec, 'window', None) or T)
  seen = (j <= i) & near & (ids_BT1 == ids_BT1.swapaxes(1, 2)) & (ids_BT1 > 0)
  np.testing.assert_allclose(*tops.values(), np.where(seen, scores, -np.inf).max(axis=(1, 2, 3)), rtol=2e-6)


@pytest.mark.parametrize('compute', [{}, {'unroll': 2}, {'remat': 'full'}], ids=str)
def test_the_scan_gives_each_layer_its_own_in_the_order_of_its_stack(mesh_of, compute):
  batch = batch_of()
  assert [tuple(run) for run in runs(DEEP)] == [(0, 4, 2), (8, 1, 1)]
  with mesh_of(1):
    stack_of = stack_of_layer(DEEP)
    assert stack_of[:4] == [0, 0, 1, 2]
    params, device = perturbed(DEEP), to_device(batch)
    got = max_logits(DEEP, params, batch, dataclasses.replace(FP32, **compute))
    rows = rows_for(DEEP, FP32, device['segment_ids'], device['positions'])._replace(max_logits=True)
    x, expected = params.embed(DEEP, FP32, device['tokens'], device['positions']), {}
    left = [iter(unstack(stack, n)) for stack, n in zip(params.stacks, (5, 2, 2))]
    for spec, stack in zip(DEEP.layers, stack_of):
      x, _, tops = jax.jit(lambda layer, x, spec=spec: layer(spec, x, rows))(next(left[stack]), x)
      for place, top in tops.items():
        expected.setdefault(f'stacks.{stack}.mixer{place}', []).append(top)
  assert {name: top.shape for name, top in got.items()} == {'stacks.0.mixer': (5, 4), 'stacks.2.mixer.mixers.1': (2, 4)}
  for name, top in got.items():
    np.testing.assert_allclose(top, np.stack(expected[name]), rtol=1e-5)


# -- a step


SCALED = {'a key head each': ('w_q_DNH', 'b_q_NH', 'w_k_DKH', 'b_k_KH'), 'shared key heads': ('w_q_DNH', 'b_q_NH'),
          'mla': ('w_q_up_DNH', 'w_k_up_DNH'), 'mla, queries of the token': ('w_q_DNH', 'w_k_up_DNH'),
          'parallel': ('mixers.1.w_q_DNH', 'mixers.1.b_q_NH')}


@pytest.mark.parametrize('kind', MIXERS)
def test_a_step_brings_loud_heads_down_to_tau_and_changes_no_bit_of_others(mesh_of, kind):
  model, batch, tau = model_of(MIXERS[kind]), batch_of(), 9.0
  config = step_config(model, tau)
  with mesh_of(1):
    state = start(config)
    before, old = (np.concatenate([*max_logits(model, state.params, batch).values()])[0], named_leaves(state.params))
    assert before[[0, 3]].max() < tau < before[[1, 2]].min()
    state, metrics = jax.jit(functools.partial(train_step, config))(state, to_device(batch))
    after, new = (np.concatenate([*max_logits(model, state.params, batch).values()])[0], named_leaves(state.params))
  assert float(metrics['attention']['max_logit']) == pytest.approx(before.max(), rel=1e-6)
  np.testing.assert_allclose(after[[1, 2]], tau, rtol=1e-5)
  assert after.max() <= tau * (1 + 1e-5)
  np.testing.assert_array_equal(after[[0, 3]], before[[0, 3]])
  changed = {name.removeprefix('stacks.0.mixer.') for name in old if not np.array_equal(old[name], new[name])}
  assert changed == {*SCALED[kind]}
  gamma = tau / before
  for name in changed:
    was, now = (np.moveaxis(np.asarray(leaves['stacks.0.mixer.' + name])[0], -2, 0) for leaves in (old, new))  # [N, …, H]
    np.testing.assert_array_equal(now[[0, 3]], was[[0, 3]])
    for head in (1, 2):
      factor = np.full(was.shape[-1], math.sqrt(gamma[head]))
      if kind in ('shared key heads', 'parallel'):
        factor[:] = gamma[head]
      elif 'mla' in kind and 'q' in name:
        factor[MIXERS[kind].nope_dim:] = gamma[head]
      np.testing.assert_allclose(now[head], was[head] * factor, rtol=2e-6)


THREE = dataclasses.replace(DEEP, n_layers=3, pattern=(*DEEP.pattern[:2], LayerSpec(mixer=MIXERS['mla'], mlp=None)))


def step_of_three(mesh_of, tau: float | None, sizes: dict, microbatches: int = 1) -> tuple[dict, dict, dict]:
  """(largest logits, weights after a step with learning rate 0, gradients)."""
  config, batch = step_config(THREE, tau, microbatches=microbatches), batch_of()
  n_tokens = np.float32(batch['loss_mask'].sum())
  both = jax.jit(lambda state, batch: (gradients(config, state.params, batch, n_tokens), train_step(config, state, batch)))
  with mesh_of(**{'fsdp': 1, **sizes}):
    state = start(config, loud=3.0)
    (grads, sums), (new, metrics) = both(state, to_device(batch))
    assert (tau is None) == (sums['max_logits'] == {}) == (metrics['attention'] == {})
    for name, w in named_leaves(new.params).items():
      assert w.sharding.spec == named_leaves(state.params)[name].sharding.spec, name
  return jax.device_get((sums['max_logits'], named_leaves(new.params), grads))


@pytest.fixture(scope='module')
def on_one_device(mesh_of):
  """tau, which half of the heads exceed, and the step with and without it."""
  with mesh_of(1):
    tops = np.concatenate([*max_logits(THREE, start(step_config(THREE, None), loud=3.0).params, batch_of()).values()])
  tau = float(np.median(tops))
  return tau, step_of_three(mesh_of, tau, {}), step_of_three(mesh_of, None, {})


def assert_near(got: dict, expected: dict, rtol: float) -> None:
  assert got.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(got[name], value, rtol=0, atol=rtol * np.abs(value).max(), err_msg=name)


def test_it_leaves_the_gradients_as_they_are(on_one_device):
  _, clipped, silent = on_one_device
  assert_near(clipped[2], silent[2], 1e-6)
  assert {name.rpartition('.')[2] for name in clipped[1] if not np.array_equal(clipped[1][name], silent[1][name])} == {
    'w_q_DNH', 'b_q_NH', 'w_q_up_DNH', 'w_k_up_DNH'}


@pytest.mark.parametrize('sizes, microbatches', [
  ({'data': 2, 'tensor': 2}, 1), ({'fsdp': 2, 'context': 2}, 1), ({'fsdp': 2, 'tensor': 2}, 2), ({}, 4)], ids=str)
def test_meshes_and_microbatches_give_the_logits_and_weights_of_one_device(mesh_of, on_one_device, sizes, microbatches):
  tau, expected, _ = on_one_device
  logits, weights, _ = step_of_three(mesh_of, tau, sizes, microbatches)
  assert_near(logits, expected[0], 1e-5)
  assert_near(weights, expected[1], 1e-5)


def test_microbatches_keep_a_largest_logit_below_zero(mesh_of):
  """The sum over microbatches begins at 0, the largest of them does not."""
  model = model_of(AttentionSpec(**HEADS, n_kv_heads=4, rope=None, qkv_bias=True))
  config, batch = step_config(model, 5.0, microbatches=2), batch_of()
  with mesh_of(1):
    leaves = named_leaves(perturbed(model))
    changes = {f'stacks.0.mixer.{name}': 0 * leaves[f'stacks.0.mixer.{name}'] + value for name, value in
               (('w_q_DNH', 0.0), ('w_k_DKH', 0.0), ('b_q_NH', 1.0), ('b_k_KH', -1.0))}
    state = begin(config, with_leaves(perturbed(model), leaves | changes), jax.random.key(0))
    _, metrics = jax.jit(functools.partial(train_step, config))(state, to_device(batch))
  assert float(metrics['attention']['max_logit']) == pytest.approx(-math.sqrt(6), rel=1e-6)


def test_it_comes_after_the_update_and_before_the_mean_and_a_skipped_step_changes_nothing(mesh_of):
  model, batch, tau = model_of(MIXERS['shared key heads']), batch_of(), 9.0
  on, off = (step_config(model, t, peak_lr=0.01) for t in (tau, None))
  on.optim.ema = off.optim.ema = 0.75
  with mesh_of(1):
    state = start(on)
    top = max_logits(model, state.params, batch)['stacks.0.mixer'][0]
    run = jax.jit(functools.partial(train_step, on))
    clipped, _ = run(state, to_device(batch))
    plain, _ = jax.jit(functools.partial(train_step, off))(state, to_device(batch))
    old, plain, new, mean = (jax.device_get(x) for x in (*map(named_leaves, (state.params, plain.params, clipped.params)),
                                                         clipped.ema))
    low = np.random.default_rng(0).normal(1e-3, 1e-4, 64)
    skipped, metrics = run(dataclasses.replace(state, recent=window_of(low, low, on.spikes)), to_device(batch))
    assert int(metrics['skipped']) == 1
    assert bits(skipped.params) == bits(state.params) and bits(skipped.ema) == bits(state.ema)
  name = 'stacks.0.mixer.w_q_DNH'
  expected = plain[name] * np.minimum(1, tau / top)[:, None]
  assert np.abs(plain[name] - old[name]).max() > 0.005
  np.testing.assert_allclose(new[name], expected, rtol=0, atol=1e-6 * np.abs(plain[name]).max())
  np.testing.assert_allclose(mean[name], 0.75 * old[name] + 0.25 * new[name], rtol=0, atol=1e-6 * np.abs(old[name]).max())


def test_the_program_without_it_has_nothing_of_it(mesh_of):
  def text(tau):
    config = step_config(DEEP, tau)
    with mesh_of(1):
      state = jax.eval_shape(lambda: begin(config, Decoder(DEEP, jax.random.key(0)), jax.random.key(0)))
      return jax.jit(functools.partial(train_step, config)).lower(state, to_device(batch_of())).as_text(debug_info=True)
  with_it, without = text(100.0), text(None)
  assert all(scope in with_it and scope not in without for scope in ('max_logits/', 'qk_clip/'))


# -- a run


def test_the_record_has_the_largest_logit_where_it_is_on(corpus, tmp_path):
  config = short_config(corpus, n_steps=3)
  config.optim.qk_clip, config.optim.warmup_tokens = 1e-3, 0
  assert train.run(config, tmp_path) == 0
  record = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  tops = [entry['attention/max_logit'] for entry in record if 'loss' in entry]
  assert len(tops) == 3 and tops[0] > 0.1 > tops[1] > 0  # fresh weights, and then what tau leaves and a step adds


def change(config, **changes):
  config.model = dataclasses.replace(config.model, **changes)


@pytest.mark.parametrize('edit, message', [
  (lambda c: change(c, pattern=tiny.get_config().model.pattern), r'model.pattern\[0\].mixer normalises .* set its qk_norm'),
  (lambda c: change(c, pattern=(LayerSpec(mixer=None, mlp=MlpSpec(d_ff=8)),)), 'no layer of model.pattern is attention'),
  (lambda c: change(c, mtp_depth=1), 'model.mtp_depth=1: set one of them'),
  (lambda c: setattr(c.optim, 'freeze', ('embed_VD',)), 'leave optim.freeze and freeze_layers out'),
  (lambda c: setattr(c.optim, 'freeze_layers', 1), 'leave optim.freeze and freeze_layers out'),
  (lambda c: setattr(c, 'lora', lora.LoraConfig(rank=2)), 'lora trains adapters: leave one'),
  (lambda c: setattr(c.optim, 'qk_clip', 0.0), 'qk_clip=0.0 .* more than 0, such as 100'),
])
def test_what_it_has_no_effect_on_or_may_not_change_is_refused_in_one_line(edit, message):
  config = tiny.get_config()
  change(config, pattern=config.model.pattern[1:])
  config.optim.qk_clip = 100.0
  validate(config, 'cpu', 1)
  edit(config)
  with pytest.raises(ValueError, match=message) as error:
    validate(config, 'cpu', 1)
  assert '\n' not in str(error.value)
