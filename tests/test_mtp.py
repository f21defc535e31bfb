"""Layers that predict further ahead: what they see and predict, that nothing else notices them, meshes, experts, FLOPs."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import tokenizers

from configs import moe_tiny, quickstart, tiny
from data_pipeline.tokenizer import END_OF_TEXT
from maxlm import decode, flops, typed_json
from maxlm.checkpoint import Checkpoints, find, lineage, named_leaves
from maxlm.config import validate
from maxlm.data import to_device
from maxlm.hf import convert
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import Decoder, LayerSpec
from maxlm.restore import load_params
from maxlm.step import init_state, train_step
from tests.models import FP32, assert_same_gradients, gradients, hidden, perturbed
from tests.rows import pack, random_batch

TINY = tiny.get_config().model
MODEL = dataclasses.replace(TINY, n_layers=1, pattern=TINY.pattern[1:2], mtp_depth=2)
WITHOUT = dataclasses.replace(MODEL, mtp_depth=0)


def said(params, model, batch):
  """(loss, nll, what the layers ahead say) of a numpy batch."""
  run = jax.jit(lambda params, batch: next_token_loss(params, model, FP32, LossConfig(mtp=0.5), batch))
  return jax.device_get(run(params, to_device(batch)))


def moe_model():
  config = moe_tiny.get_config('bias')
  return config, dataclasses.replace(config.model, n_layers=1, d_model=64, mtp_depth=1, vocab_size=512)


def ahead_logits(params, model, batch, k):
  """Of the k-th layer, by the parts of `Decoder` and the definition of what it is given: [B, T, V]."""
  device = to_device({name: batch[name] for name in ('tokens', 'segment_ids', 'positions')})
  given = [to_device({'t': np.roll(batch['targets'], -depth, axis=1)})['t'] for depth in range(k)]

  def run(params):
    rows = device['segment_ids'], device['positions']
    x_BTD, _ = params.hidden(model, FP32, device['tokens'], *rows)
    for depth, tokens_BT in enumerate(given):
      x_BTD, _ = params.ahead(model, FP32, depth, x_BTD, tokens_BT, *rows)
    return params.logits(model, x_BTD)

  return np.asarray(jax.jit(run)(params))


def test_the_loss_is_that_of_the_tokens_further_ahead_within_documents(mesh_of):
  """Documents of 20, 1, 2 and 30 tokens and padding; the losses once more, token by token."""
  rng = np.random.default_rng(0)
  batch = pack([[rng.integers(0, 512, n + 1) for n in (20, 1, 2, 30)], [rng.integers(0, 512, 65)]], 64)
  with mesh_of(1):
    params = perturbed(MODEL)
    loss, nll_BT, ahead = said(params, MODEL, batch)
    for k in (1, 2):
      logits = ahead_logits(params, MODEL, batch, k).astype(np.float64)
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      total = count = 0
      for b in range(2):
        for i in range(64 - k):
          if batch['segment_ids'][b, i] == batch['segment_ids'][b, i + k] > 0:
            total, count = total - logp[b, i, batch['targets'][b, i + k]], count + 1
      assert count == ahead[k - 1]['tokens'] == sum(max(n - k, 0) for n in (20, 1, 2, 30, 64))
      assert ahead[k - 1]['nll'] == pytest.approx(total, rel=1e-5)
    plain = said(params, WITHOUT, batch)
  np.testing.assert_array_equal(nll_BT, plain[1])
  assert loss == pytest.approx(plain[0] + 0.25 * (ahead[0]['nll'] + ahead[1]['nll']), rel=1e-6)


def test_it_sees_the_tokens_up_to_the_one_before_its_target_and_no_other_document(mesh_of):
  """Depth 1 at i has read up to i + 1: perturb the token that is the input at j, and the target at j - 1."""
  batch = pack([[np.random.default_rng(0).integers(0, 500, n + 1) for n in (20, 9, 25)]], 64)
  segments = batch['segment_ids'][0]
  with mesh_of(1):
    params = perturbed(MODEL)
    base = ahead_logits(params, MODEL, batch, 1)
    for j in (0, 7, 20, 24, 53):
      changed = {name: a.copy() for name, a in batch.items()}
      changed['tokens'][0, j] += 1
      if j and segments[j - 1] == segments[j]:
        changed['targets'][0, j - 1] += 1
      moved = np.abs(ahead_logits(params, MODEL, changed, 1) - base)[0].max(-1) > 0
      i = np.arange(64)
      np.testing.assert_array_equal(moved, (i >= j - 1) & (segments == segments[j]), err_msg=f'token {j}')


def test_a_model_without_it_has_the_weights_and_the_program_it_had(mesh_of):
  batch = random_batch(np.random.default_rng(1), 2, 64, 512)
  with mesh_of(1):
    one, two = (named_leaves(Decoder(m, jax.random.key(0))) for m in (WITHOUT, MODEL))
    assert one.keys() == {name for name in two if not name.startswith('mtp.')} and not any('mtp' in name for name in one)
    for name in one:
      np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    params = perturbed(MODEL)
    np.testing.assert_array_equal(hidden(params, batch, MODEL), hidden(params, batch, WITHOUT))
    written = [decode.generate(params, model, FP32, [[0, 5, 9]], eos=[], max_tokens=6, temperature=0.0)
               for model in (MODEL, WITHOUT)]
  assert written[0] == written[1]


@pytest.mark.parametrize('experts', [False, True])
@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'context': 2, 'fsdp': 2}], ids=str)
def test_loss_and_every_gradient_leaf_are_the_same_on_any_mesh(mesh_of, sizes, experts):
  model, options = (moe_model()[1], {'balance_over': 'sequence'}) if experts else (MODEL, {})
  batch = random_batch(np.random.default_rng(2), 8, 64, 512)
  with mesh_of(1):
    loss_one, grads_one = gradients(perturbed(model), batch, model, **options)
  with mesh_of(math.prod(sizes.values()), **sizes):
    loss_many, grads_many = gradients(perturbed(model), batch, model, **options)
  assert loss_many == pytest.approx(loss_one, rel=1e-6)
  assert_same_gradients(grads_one, grads_many, 1e-5, without_gradient=('select_bias',))
  assert any('mtp' in name and 'w_join' in name for name in grads_one)


@pytest.mark.parametrize('remat', ['full', 'attention'])
def test_remat_does_not_change_loss_or_gradients(mesh_of, remat):
  batch = random_batch(np.random.default_rng(3), 2, 64, 512)
  with mesh_of(1):
    params = perturbed(MODEL)
    loss_a, grads_a = gradients(params, batch, MODEL)
    loss_b, grads_b = gradients(params, batch, MODEL, dataclasses.replace(FP32, remat=remat))
  assert loss_a == pytest.approx(loss_b, rel=1e-6)
  assert_same_gradients(grads_a, grads_b, 1e-5)


def test_a_packed_document_has_the_gradients_it_has_alone(mesh_of):
  documents = [np.random.default_rng(4).integers(0, 512, n + 1) for n in (30, 3, 22, 40, 11)]
  with mesh_of(1):
    params = perturbed(MODEL)
    loss_a, grads_a = gradients(params, pack([documents[:3], documents[3:]], 64), MODEL)
    loss_b, grads_b = gradients(params, pack([[d] for d in documents], 64), MODEL)
  assert loss_a == pytest.approx(loss_b, rel=1e-6)
  assert_same_gradients(grads_a, grads_b, 2e-5)


def test_a_step_trains_it_and_moves_the_bias_of_its_router_the_same_in_microbatches(mesh_of):
  config, config.model = moe_model()
  batch = random_batch(np.random.default_rng(5), 4, 64, 512)
  results = []
  with mesh_of(1):
    for parts in (1, 2):
      step_config = dataclasses.replace(config.step_config('cpu', 1), microbatches=parts)
      state = jax.jit(functools.partial(init_state, step_config))(jax.random.key(0))
      before = jax.device_get(named_leaves(state.params))
      state, metrics = jax.jit(functools.partial(train_step, step_config))(state, to_device(batch))
      results.append(jax.device_get((named_leaves(state.params), metrics)))
  (after, metrics), (after_2, metrics_2) = results
  assert len(metrics['ahead']) == 1 and 5.5 < metrics['ahead'][0] < 7.5
  assert metrics_2['ahead'][0] == pytest.approx(metrics['ahead'][0], rel=1e-6)
  bias = 'mtp.0.layer.mlp.select_bias_E'
  assert set(np.abs(after[bias] - before[bias]).round(9)) <= {0, np.float32(config.loss.bias_rate).round(9)}
  assert (after[bias] != before[bias]).any()
  np.testing.assert_array_equal(after[bias], after_2[bias])
  assert (after['mtp.0.w_join_DR'] != before['mtp.0.w_join_DR']).all()


def test_it_learns_the_token_after_the_next(mesh_of):
  """Rows that count on from anywhere, times three, modulo 31: the next token follows from one, and so does that after it."""
  layer = LayerSpec(mixer=AttentionSpec(n_heads=2, n_kv_heads=2, head_dim=8), mlp=MlpSpec(d_ff=64))
  config = tiny.get_config()
  config.model = dataclasses.replace(TINY, vocab_size=32, d_model=32, n_layers=1, pattern=(layer,), mtp_depth=1,
                                     logits_softcap=None)
  config.optim = dataclasses.replace(config.optim, peak_lr=1e-2, warmup_tokens=0)
  config.tokens = 80 * config.tokens_per_step
  rng = np.random.default_rng(6)
  with mesh_of(1):
    step_config = config.step_config('cpu', 1)
    state = jax.jit(functools.partial(init_state, step_config))(jax.random.key(0))
    step = jax.jit(functools.partial(train_step, step_config))
    first = None
    for _ in range(80):
      state, metrics = step(state, to_device(pack([[(rng.integers(31) + 3 * np.arange(65)) % 31] for _ in range(8)], 64)))
      first = first or float(metrics['ahead'][0])
    batch = pack([[(5 + 3 * np.arange(65)) % 31]], 64)
    guessed = ahead_logits(state.params, config.model, batch, 1).argmax(-1)[0]
  assert first > 3 and float(metrics['ahead'][0]) < 0.05
  np.testing.assert_array_equal(guessed[:-1], batch['targets'][0, 1:])


def test_flops_count_its_products_and_its_head(mesh_of):
  with mesh_of(1):
    named = named_leaves(jax.eval_shape(lambda: Decoder(MODEL, jax.random.key(0))))
  products = sum(leaf.size for name, leaf in named.items() if '.w_' in name) + (1 + 2) * 64 * 512
  assert flops.matmul_params(MODEL) == products
  batch = pack([[np.zeros(65, int)]], 64)
  heads, pairs = MODEL.layers[-1].mixer.n_heads * MODEL.layers[-1].mixer.head_dim, 64 * 65 / 2
  extra = flops.train_flops(MODEL, batch) - flops.train_flops(WITHOUT, batch)
  assert extra == 3 * (2 * 64 * (products - flops.matmul_params(WITHOUT)) + 2 * 4 * heads * pairs)


@pytest.mark.parametrize('change, message', [
  ({'mtp_depth': -1}, 'mtp_depth=-1'), ({'mtp_depth': 64}, 'less than data.seq_len'), ({'mask_token': 5}, 'no next one')],
  ids=str)
def test_what_has_no_meaning_is_refused_in_one_line(change, message):
  config = tiny.get_config()
  config.model = dataclasses.replace(MODEL, **change)
  with pytest.raises(ValueError, match=message) as error:
    validate(config, 'cpu', 1)
  assert '\n' not in str(error.value)


def test_an_export_leaves_it_out_and_says_so(tmp_path, mesh_of):
  config = quickstart.get_config()
  config.model = dataclasses.replace(config.model, d_model=16, vocab_size=32, n_layers=2, mtp_depth=1)
  with mesh_of(1):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
    checkpoints.save(7, params=params, opt=None, meta={'config': json.loads(typed_json.dumps(config)), 'lineage': lineage()})
    checkpoints.close()
    words = tokenizers.models.WordLevel({END_OF_TEXT: 0, 'one': 1}, unk_token='one')
    tokenizers.Tokenizer(words).save(str(tmp_path / 'run' / 'tokenizer.json'))
    report = convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
    convert.import_directory(tmp_path / 'out', tmp_path / 'back')
    back = named_leaves(load_params(Checkpoints(tmp_path / 'back' / 'checkpoints'), find(str(tmp_path / 'back'))[1]))
  ours = named_leaves(params)
  assert 'the layers that predict further ahead (mtp_depth) are left out' in report.notes
  assert back.keys() == {name for name in ours if not name.startswith('mtp.')}
  for name in back:
    np.testing.assert_array_equal(back[name], ours[name])
