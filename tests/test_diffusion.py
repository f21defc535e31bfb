"""Masked diffusion: what is masked, the bound against all masks of a toy, who sees whom, meshes, training, sampling."""

import dataclasses
import functools
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from maxlm import decode, diffusion, flops
from maxlm.config import validate
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import ComputeConfig, LayerSpec
from maxlm.ops.attention import check_attention, visible_BTS
from maxlm.step import eval_step, init_state, train_step
from tests.models import (
  DOCUMENT_LENGTHS,
  DOCUMENT_STARTS,
  FP32,
  assert_packing_changes_nothing,
  assert_same_gradients,
  gradients,
  hidden,
  perturbed,
)
from tests.rows import pack, random_batch

ROOT = Path(__file__).parents[1]
MASK = 511
LATENT = LayerSpec(mixer=MlaSpec(n_heads=2, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8), mlp=MlpSpec(d_ff=32))
MODEL = dataclasses.replace(tiny.get_config().model, mask_token=MASK)  # windows, softcap, sinks; full; post norms


def corrupt(batch, seed=0, mask=MASK):
  """As numpy, from the current mesh."""
  fields = {name: batch[name] for name in ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')}
  run = jax.jit(functools.partial(diffusion.corrupted, mask))
  return jax.device_get(run(to_device(fields), jax.random.key(seed)))


def logits_of(params, model, tokens):
  """[rows, T, V] of rows that are one document each."""
  T = tokens.shape[1]
  rows = {'tokens': tokens.astype(np.int32), 'segment_ids': np.ones_like(tokens, np.int32),
          'positions': np.tile(np.arange(T, dtype=np.int32), (len(tokens), 1))}
  x_BTD = jax.device_put(hidden(params, rows, model), jax.P(None, None, None))
  return np.asarray(params.logits(model, x_BTD), np.float64)


def log_softmax(logits):
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# -- what is masked


def test_of_each_document_any_number_of_tokens_is_masked_equally_often_and_any_choice_of_them(mesh_of):
  """3,000 rows of two documents, of 4 tokens of which the first does not count, and of 2; by row, which were masked."""
  rng = np.random.default_rng(0)
  batch = pack([[rng.integers(0, 500, 5), rng.integers(0, 500, 3)]] * 3000, 8)
  batch['loss_mask'][:, 0] = 0
  with mesh_of(1):
    seen = corrupt(batch)
  weights, masked = seen['loss_weights'], seen['loss_weights'] > 0
  np.testing.assert_array_equal(seen['tokens'], np.where(masked, MASK, batch['targets']))
  assert not masked[:, 0].any() and not masked[:, 6:].any()  # does not count; padding
  for at, L in ((slice(1, 4), 3), (slice(4, 6), 2)):
    l = masked[:, at].sum(axis=1)
    np.testing.assert_allclose(weights[:, at][masked[:, at]], np.repeat(L / l, l), rtol=1e-6)
    np.testing.assert_allclose(np.bincount(l, minlength=L + 1)[1:], 3000 / L, atol=2)  # even, not only on average
    for choice in (c for n in range(1, L + 1) for c in itertools.combinations(range(L), n)):
      share = (masked[:, at] == np.isin(np.arange(L), choice)).all(axis=1).mean()
      expected = 1 / L / math.comb(L, len(choice))
      assert abs(share - expected) < 4.5 * math.sqrt(expected / 3000)
    np.testing.assert_allclose(weights[:, at].mean(axis=0), 1, atol=0.06)  # so a constant loss is estimated without bias


def test_masks_are_those_of_seed_and_step_and_row_and_those_of_evaluation_of_the_row_alone(mesh_of):
  batch = random_batch(np.random.default_rng(1), 8, 64, 500)
  fields = {name: batch[name] for name in ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')}
  draws = jax.jit(lambda batch: diffusion.draws(MASK, batch, 3))
  with mesh_of(1):
    one, again, other = corrupt(batch), corrupt(batch), corrupt(batch, seed=1)
    held = jax.device_get(draws(to_device(fields)))
    some = jax.device_get(draws(to_device({name: a[[5, 2]] for name, a in fields.items()})))
  with mesh_of(data=2, fsdp=2, context=2):
    many, held_many = corrupt(batch), jax.device_get(draws(to_device(fields)))
  for name in one:
    np.testing.assert_array_equal(one[name], again[name])
    np.testing.assert_array_equal(one[name], many[name])
    np.testing.assert_array_equal(held[name], held_many[name])
    np.testing.assert_array_equal(held[name][:, [5, 2]], some[name])
  assert (one['tokens'] != other['tokens']).any()
  assert (held['tokens'][0] != held['tokens'][1]).any()


# -- the bound


def exact_bound(params, model, document):
  """Nats: by all masks of the L tokens, l of them with probability 1 / L / (L choose l), and their nats times L / l."""
  L, total = len(document), 0.0
  masks = np.array([m for m in itertools.product((0, 1), repeat=L) if any(m)], bool)
  logp = log_softmax(logits_of(params, model, np.where(masks, model.mask_token, document)))
  for mask, logp_TV in zip(masks, logp):
    l = mask.sum()
    total -= logp_TV[np.arange(L), document][mask].sum() * L / l / (L * math.comb(L, l))
  return total


def test_the_loss_is_on_average_the_bound_by_all_masks(mesh_of):
  """A document of 5 tokens, 31 masks; and of `eval_step`'s few masks the mean is near it as well."""
  model = dataclasses.replace(MODEL, n_layers=2)
  document = np.array([7, 300, 7, 41, 88])
  batch = pack([[np.array([0, *document])]] * 4096, 5)
  with mesh_of(1):
    params = perturbed(model)
    bound = exact_bound(params, model, document)
    seen = corrupt(batch)
    kinds, counts = np.unique(seen['tokens'], axis=0, return_counts=True)  # 31 of them at most
    logp = log_softmax(logits_of(params, model, kinds))
    nats = {tuple(kind): -logp_TV[np.arange(5), document] for kind, logp_TV in zip(kinds, logp)}
    each = np.array([(nats[tuple(row)] * weights).sum() for row, weights in zip(seen['tokens'], seen['loss_weights'])])
    error = each.std() / math.sqrt(len(each))
    assert len(kinds) == 31 and abs(each.mean() - bound) < 4 * error < 0.01 * bound
    held = pack([[np.array([0, *np.random.default_rng(i).permutation(document)])] for i in range(64)], 5)
    held = {**{k: v for k, v in held.items() if k != 'source'}, 'target_bytes': held['loss_mask']}
    sums = jax.device_get(jax.jit(functools.partial(eval_step, model, FP32))(params, to_device(held)))
    unique = {tuple(row): exact_bound(params, model, row) for row in held['targets']}
    exact = sum(unique[tuple(row)] for row in held['targets'])
  assert int(sums['tokens']) == 320
  assert float(sums['nll']) == pytest.approx(exact, rel=0.05)


def test_sampling_one_token_a_step_in_random_order_is_from_the_distribution_that_the_bound_is_of(mesh_of):
  """All documents of two tokens of a vocabulary of three and the mask: their chances by hand, over both orders."""
  model = dataclasses.replace(MODEL, vocab_size=4, mask_token=3, n_layers=2, tied_embeddings=True)
  documents = list(itertools.product(range(3), repeat=2))
  with mesh_of(1):
    params = perturbed(model, seed=3)

    def conditional(a, b):
      """Log-probabilities of both tokens among the three that are no mask, given those that are there."""
      return log_softmax(logits_of(params, model, np.array([[a, b]]))[0, :, :3])

    empty = conditional(3, 3)
    chances, bounds = [], []
    for a, b in documents:
      orders = [empty[0, a] + conditional(a, 3)[1, b], empty[1, b] + conditional(3, b)[0, a]]
      chances.append(np.exp(orders).mean())
      bounds.append(-np.mean(orders))
    how = diffusion.Sampling(order='random')
    out = diffusion.sample(params, model, FP32, [[0]] * 4000, eos=[], max_tokens=2, how=how)
  assert sum(chances) == pytest.approx(1)
  assert all(bound >= -math.log(chance) for bound, chance in zip(bounds, chances))
  assert max(chances) > 3 * min(chances)
  counts = np.array([out.count([a, b]) for a, b in documents])
  chi2 = ((counts - 4000 * np.array(chances))**2 / (4000 * np.array(chances))).sum()
  assert chi2 < 26  # 8 degrees of freedom: one in a thousand is more


# -- who sees whom


@pytest.mark.parametrize('windows', [(5,), (5, 5), (5, None)], ids=str)
def test_a_token_moves_the_outputs_on_both_sides_that_may_see_it_and_no_other(mesh_of, windows):
  pattern = tuple(dataclasses.replace(MODEL.pattern[0], mixer=dataclasses.replace(MODEL.pattern[0].mixer, window=w))
                  for w in windows)
  model = dataclasses.replace(MODEL, n_layers=len(windows), pattern=pattern)
  reach = None if None in windows else sum(w - 1 for w in windows) + 1
  batch = pack([[np.random.default_rng(0).integers(0, 500, n + 1) for n in (20, 9, 25)]], 64)
  with mesh_of(1):
    params = perturbed(model)
    base = hidden(params, batch, model)
    for j in (0, 7, 19, 20, 28, 53, 60):
      changed = {**batch, 'tokens': batch['tokens'].copy()}
      changed['tokens'][0, j] += 1
      moved = np.abs(hidden(params, changed, model) - base)[0].max(-1) > 0
      may = batch['segment_ids'][0] == batch['segment_ids'][0, j]
      if reach is not None:
        may &= abs(np.arange(64) - j) < reach
      np.testing.assert_array_equal(moved, may, err_msg=f'key {j}')


@pytest.mark.parametrize('window', [None, 1, 5, 24, 1000])
def test_flops_are_of_the_pairs_that_see_each_other(window):
  batch = random_batch(np.random.default_rng(1), 6, 64, 512)
  segments = batch['segment_ids']
  mask_BTS = np.asarray(visible_BTS(np.arange(64), np.arange(64), segments, segments, window, False))
  i, j = np.mgrid[:64, :64]
  by_hand = (segments[:, :, None] == segments[:, None, :]) & (abs(i - j) < (window or 64))
  np.testing.assert_array_equal(mask_BTS, by_hand)
  assert flops.visible_pairs(batch['positions'], segments, window, False) == (by_hand & (segments > 0)[:, :, None]).sum()


@pytest.mark.parametrize('change', [{'kernel': 'reference'}, {'remat': 'full'}], ids=str)
def test_how_it_is_computed_does_not_change_loss_or_gradients(mesh_of, change):
  """Rows of 400 have several blocks of queries, of which none may leave out keys that come later."""
  model = dataclasses.replace(MODEL, n_layers=2)
  with mesh_of(1):
    batch = corrupt(random_batch(np.random.default_rng(3), 2, 400, 500))
    params = perturbed(model)
    loss_a, grads_a = gradients(params, batch, model)
    loss_b, grads_b = gradients(params, batch, model, dataclasses.replace(FP32, **change))
  assert loss_a == pytest.approx(loss_b, rel=1e-6)
  assert_same_gradients(grads_a, grads_b, 5e-5)


@pytest.mark.parametrize('model', [MODEL, dataclasses.replace(MODEL, n_layers=2, pattern=(LATENT,))], ids=['all', 'latent'])
@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'context': 2, 'fsdp': 2}], ids=str)
def test_loss_and_every_gradient_leaf_are_the_same_on_any_mesh(mesh_of, sizes, model):
  batch = random_batch(np.random.default_rng(2), 8, 64, 500)
  with mesh_of(1):
    loss_one, grads_one = gradients(perturbed(model), corrupt(batch), model)
  with mesh_of(math.prod(sizes.values()), **sizes):
    loss_many, grads_many = gradients(perturbed(model), corrupt(batch), model)
  assert loss_many == pytest.approx(loss_one, rel=1e-6)
  assert_same_gradients(grads_one, grads_many, 1e-5)


def test_a_packed_document_has_the_hidden_states_and_gradients_it_has_alone(mesh_of):
  rng = np.random.default_rng(1)
  documents = [rng.integers(0, 500, n + 1) for n in DOCUMENT_LENGTHS]
  with mesh_of(1):
    packed, alone = corrupt(pack([documents[:3], documents[3:]], 64)), corrupt(pack([[d] for d in documents], 64))
    for name in ('tokens', 'loss_weights'):  # the same masks: these are by row
      alone[name] = np.zeros_like(alone[name])
      for i, ((row, start), n) in enumerate(zip(DOCUMENT_STARTS, DOCUMENT_LENGTHS)):
        alone[name][i, :n] = packed[name][row, start:start + n]
    assert_packing_changes_nothing(perturbed(MODEL), packed, alone, MODEL)


# -- training


def test_a_step_is_the_same_in_microbatches_and_masks_anew_in_the_next(mesh_of):
  config = tiny.get_config()
  config.model = dataclasses.replace(MODEL, n_layers=1)
  batch = random_batch(np.random.default_rng(0), 8, 64, 500, n_sources=2)
  results = []
  for sizes, parts in (({}, 1), ({'data': 2, 'context': 2}, 1), ({}, 4)):
    with mesh_of(math.prod(sizes.values()), **{'fsdp': 1, **sizes}):
      step_config = dataclasses.replace(config.step_config('cpu', 2), microbatches=parts)
      state = jax.jit(functools.partial(init_state, step_config))(jax.random.key(0))
      step = jax.jit(functools.partial(train_step, step_config))
      one, metrics = step(state, to_device(batch))
      _, next_metrics = step(dataclasses.replace(state, step=one.step), to_device(batch))
      results.append(jax.device_get((metrics, one.params.stacks[0].mixer.w_q_DNH[...])))
      assert float(next_metrics['loss']) != float(metrics['loss'])
  for metrics, weights in results[1:]:
    for name in ('loss', 'grad_norm', 'loss_by_source', 'tokens_by_source'):
      np.testing.assert_allclose(metrics[name], results[0][0][name], rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(weights, results[0][1], atol=2e-6)


def test_a_run_learns_more_than_frequencies_samples_and_is_refused_where_next_tokens_are_needed(corpus, tmp_path):
  """By the commands, on the corpus of configs/tiny.py."""
  def run(*arguments, code=0):
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr

  train_it = ('-m', 'maxlm.train', f'--config={ROOT}/configs/tiny.py', f'--config.data.corpus={corpus}', '--workdir=run',
              '--config.model.n_layers=2', '--config.spikes.sigmas=0')
  assert 'set --config.model.mask_token to 494' in run(*train_it, '--config.model.mask_token=100', code=2)
  said = run(*train_it, f'--config.model.mask_token={MASK}', f'--config.tokens={400 * 512}')
  assert f'masked diffusion (mask token {MASK})' in said
  done = json.loads((tmp_path / 'run' / 'DONE').read_text())
  assert done['bits_per_byte']['all'] < 0.75 * done['baselines']['all']['unigram']
  scores = json.loads(run('-m', 'maxlm.evaluate', '--checkpoint=run', '--rows=16', '--json'))['sources']
  assert scores['all']['accuracy'] is None
  assert scores['all']['bits_per_byte'] == pytest.approx(done['bits_per_byte']['all'], rel=1e-4)  # the same masks
  ask = ('-m', 'maxlm.generate', '--checkpoint=run', '--prompt=The ', '--max_tokens=16', '--json')
  written = [json.loads(run(*ask, '--steps=8', '--block=8', f'--order={order}')) for order in ('confidence', 'random')]
  assert written[0]['tokens'] != written[1]['tokens']
  assert all(token != MASK for one in written for token in one['tokens'])
  assert '--steps' not in written[0]['text'] and 'do not divide into blocks of 5' in run(*ask, '--block=5', code=2)
  np.save(tmp_path / 'in.npy', np.ones((1, 8), np.int64))
  assert 'maxlm.evaluate' in run('-m', 'maxlm.score', '--checkpoint=run', '--tokens=in.npy', '--out=out.npz', code=2)
  assert 'mask_token' in run('-m', 'maxlm.hf', 'export', 'run', 'hf', code=2)


# -- sampling


def by_hand(params, model, prompt, n, block, steps, eos=()):
  """Greedy, most confident first, in plain Python."""
  tokens = [*prompt, *[model.mask_token] * n]
  for start in range(len(prompt), len(tokens), block):
    for s in range(steps):
      logits = logits_of(params, model, np.array([tokens]))[0]
      logits[:, model.mask_token] = -np.inf
      free = [i for i in range(start, start + block) if tokens[i] == model.mask_token]
      sure = sorted(free, key=lambda i: -log_softmax(logits)[i].max())
      for i in sure[:block // steps + (s < block % steps)]:
        tokens[i] = int(logits[i].argmax())
  return tokens[len(prompt):]


@pytest.mark.parametrize('block, steps', [(None, None), (4, 12), (4, 6), (None, 5)])
def test_greedy_samples_are_those_of_the_definition(mesh_of, block, steps):
  model = dataclasses.replace(MODEL, n_layers=2)
  prompts = [[9, 5, 300], [9, 17, 80, 411, 23]]
  how = diffusion.Sampling(block=block, steps=steps, temperature=0.0)
  of_block = block or 12
  with mesh_of(1):
    params = perturbed(model)
    out = diffusion.sample(params, model, FP32, prompts, eos=[], max_tokens=12, how=how)
    for prompt, written in zip(prompts, out):
      assert written == by_hand(params, model, prompt[1:], 12, of_block, (steps or 12) * of_block // 12)
    assert diffusion.sample(params, model, FP32, prompts[1:], eos=[], max_tokens=12, how=how) == out[1:]  # one row
    ended = diffusion.sample(params, model, FP32, prompts, eos=[out[0][5]], max_tokens=12, how=how)
    assert ended[0] == decode.cut(out[0], [out[0][5]])
  with mesh_of(data=2, fsdp=2, tensor=2):
    assert diffusion.sample(perturbed(model), model, FP32, prompts, eos=[], max_tokens=12, how=how) == out


@pytest.mark.parametrize('how, message', [
  (dict(block=5), 'blocks of 5'), (dict(steps=13), '13 steps'), (dict(block=4, steps=4), '4 steps'),
  (dict(order='left'), "'left'"), (dict(temperature=-1.0), 'temperature=-1.0'), (dict(top_p=0.0), 'top_p=0.0')], ids=str)
def test_what_cannot_be_sampled_is_refused_in_one_line(how, message):
  with pytest.raises(ValueError, match=message) as error:
    diffusion.Sampling(**how).check(12)
  assert '\n' not in str(error.value)


def test_what_cannot_see_both_ways_is_refused_in_one_line_with_the_fix():
  config = tiny.get_config()
  config.model = dataclasses.replace(MODEL, pattern=(LayerSpec(
    mixer=Mamba2Spec(n_heads=4, head_dim=16, n_groups=1, state_dim=16), mlp=MlpSpec(d_ff=32)),))
  with pytest.raises(ValueError, match='Mamba2Spec, which reads from left to right.*use AttentionSpec'):
    validate(config, 'cpu', 1)
  config.model = dataclasses.replace(MODEL, mask_token=512)
  with pytest.raises(ValueError, match='mask_token=512 is none of the 512 tokens'):
    validate(config, 'cpu', 1)
  with pytest.raises(ValueError, match="sees both ways.*use 'chunked'"):
    check_attention('cudnn', 'gpu', window=None, softcap=None, sinks=False, head_dim=64, seq_len=128, dtype='bfloat16',
                    causal=False)
  plain = dataclasses.replace(MODEL, pattern=(LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=16),
                                                        mlp=MlpSpec(d_ff=32)),))
  assert ComputeConfig().resolve('gpu', plain).kernel == 'chunked'
  assert ComputeConfig().resolve('gpu', dataclasses.replace(plain, mask_token=None)).kernel == 'cudnn'
