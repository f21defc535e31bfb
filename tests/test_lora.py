"""Adapters: what they compute by definition, what they reach and what they leave alone, on any mesh; merged is the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm import lora
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.data import to_device
from maxlm.models.decoder import ComputeConfig, Decoder
from maxlm.ops.einsum import Adapted, column_lengths, einsum
from maxlm.step import StepConfig, gradients, init_state, train_step
from maxlm.trained import is_adapter
from tests.models import hidden, perturbed
from tests.rows import random_batch
from tests.test_mixers import MODELS

PLAIN = tiny.get_config().model.pattern[1:2]


def step_config(n_layers=1, **changes) -> StepConfig:
  """configs/tiny.py with layers of one kind, and adapters of rank 3."""
  config = tiny.get_config()
  config.model.n_layers, config.model.pattern = n_layers, PLAIN
  config.lora = lora.LoraConfig(rank=3, alpha=6.0, **changes)
  return config.step_config('cpu', 1)


def params_of(config: StepConfig, used: bool) -> Decoder:
  """Fresh parameters; used: with adapters that do something, as after training."""
  params = jax.jit(lambda key: init_state(config, key).params)(jax.random.key(0))
  return with_noise(params) if used else params


def with_noise(params: Decoder) -> Decoder:
  rng = np.random.default_rng(0)
  return with_leaves(params, {
    name: jax.device_put(np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)
    for name, leaf in lora.adapters(params).items()})


def batch_of(rows=8) -> dict[str, np.ndarray]:
  return random_batch(np.random.default_rng(3), rows, 64, 512)


def logits(config: StepConfig, params: Decoder, batch: dict) -> np.ndarray:
  run = jax.jit(lambda params, b: params.logits(config.model, params.hidden(
    config.model, config.compute, b['tokens'], b['segment_ids'], b['positions'])[0]))
  return np.asarray(run(params, to_device(batch)))


SIZES = dict(A=2, B=2, T=3, D=8, N=4, H=5, F=6, R=4)


@pytest.mark.parametrize('dims', ['BTD,DNH->BTNH', 'BTNH,NHD->BTD', 'BTD,DF->BTF', 'BTR,RD->BTD'])
@pytest.mark.parametrize('dora', [False, True])
def test_an_adapted_product_is_that_with_the_sum_of_the_weights(mesh_of, dims, dora):
  """In double precision: W + s A B, with DoRA each column times its learned length over its own."""
  rng = np.random.default_rng(0)
  x_dims, w_dims = dims.split('->')[0].split(',')
  ins = ''.join(letter for letter in w_dims if letter in x_dims)
  outs = ''.join(letter for letter in w_dims if letter not in x_dims)
  draw = lambda letters: rng.normal(size=[SIZES[letter] for letter in letters])
  x, w, a, b, m = draw(x_dims), draw(w_dims), draw(ins + 'A'), draw('A' + outs), 1 + draw(outs) ** 2
  whole = w + 0.7 * np.einsum(f'{ins}A,A{outs}->{w_dims}', a, b)
  lengths = np.sqrt(np.einsum(f'{w_dims},{w_dims}->{outs}', whole, whole))
  if dora:
    whole = np.einsum(f'{w_dims},{outs}->{w_dims}', whole, m / lengths)
  f32 = lambda array: jnp.asarray(array, jnp.float32)
  with mesh_of(1):
    got = jax.jit(lambda x, *parts: einsum(dims, x, Adapted(*parts[:3], 0.7, parts[3] if dora else None)))(
      *map(f32, (x, w, a, b, m)))
    np.testing.assert_allclose(column_lengths(w_dims, f32(w), f32(a), f32(b), 0.7), lengths, rtol=1e-6)
  np.testing.assert_allclose(got, np.einsum(dims, x, whole), rtol=0, atol=1e-6 * np.abs(whole).sum())


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
def test_adapters_begin_as_nothing_alone_are_trained_and_merge_into_the_same_model(mesh_of, dora):
  config, batch = step_config(dora=dora), batch_of()
  with mesh_of(1):
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    plain = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    first, base = logits(config, state.params, batch), logits(config, plain, batch)
    before = {name: np.asarray(leaf) for name, leaf in named_leaves(state.params).items()}
    step = jax.jit(functools.partial(train_step, config))
    new, metrics = step(*[step(state, to_device(batch))[0]], to_device(batch))
    after = {name: np.asarray(leaf) for name, leaf in named_leaves(new.params).items()}
    used = params_of(config, used=True)
    unmerged = logits(config, used, batch)
    merged = jax.jit(lora.merge)(used)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    got = logits(config, merged, batch)
  np.testing.assert_allclose(first, base, rtol=0, atol=1e-5 * np.abs(base).max() if dora else 0)
  changed = {name for name in after if after[name].tobytes() != before[name].tobytes()}
  assert changed == {name for name in after if is_adapter(name)} and len(changed) == (3 if dora else 2) * 7
  moments = {name.split('.', 2)[2] for name in named_leaves(state.opt) if '.mu.' in name}
  assert moments == changed and len(named_leaves(state.opt)) == 1 + 2 * len(changed)
  scale = np.abs(base).max()
  assert np.abs(unmerged - base).max() > 0.05 * scale
  np.testing.assert_allclose(got, unmerged, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_a_mesh_gives_the_loss_and_every_gradient_of_one_device_scanned_and_rematerialised(mesh_of, sizes):
  config = step_config(n_layers=3, dora=True)
  config.compute = dataclasses.replace(config.compute, remat='full')
  batch, results = batch_of(), []
  n_tokens = jnp.float32(batch['loss_mask'].sum())
  for mesh in ({'data': 1}, sizes):
    with mesh_of(**{'fsdp': 1, **mesh}):
      grads, sums = jax.jit(functools.partial(gradients, config))(params_of(config, used=True), to_device(batch), n_tokens)
      results.append(({name: np.asarray(leaf) for name, leaf in grads.items()}, float(sums['nll_by_source'].sum())))
  (one, loss), (several, loss_of_several) = results
  assert loss_of_several == pytest.approx(loss, rel=2e-6) and one.keys() == several.keys()
  assert all(map(is_adapter, one)) and all(np.abs(leaf).max() > 0 for leaf in one.values())
  for name in one:
    np.testing.assert_allclose(several[name], one[name], rtol=0, atol=1e-5 * np.abs(one[name]).max(), err_msg=name)


def test_in_bfloat16_the_sum_of_weights_is_still_not_made(mesh_of):
  config = step_config()
  config.compute = ComputeConfig(dtype='bfloat16').resolve('cpu')
  with mesh_of(1):
    params = jax.eval_shape(lambda: init_state(config, jax.random.key(0)).params)
    jaxpr = jax.make_jaxpr(functools.partial(gradients, config))(params, to_device(batch_of()), jnp.float32(1))
  shapes = {(64, 4, 16), (64, 2, 16), (4, 16, 64), (64, 128), (128, 64)}
  products = [eqn for eqn in all_equations(jaxpr.jaxpr) if eqn.primitive.name in ('dot_general', 'add', 'mul')]
  assert len(products) > 100 and not [eqn for eqn in products if eqn.outvars[0].aval.shape in shapes]


def all_equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for part in value if isinstance(value, (tuple, list)) else [value]:
        if hasattr(part, 'eqns') or hasattr(part, 'jaxpr'):
          yield from all_equations(getattr(part, 'jaxpr', part))


NAMES = ['embed_VD', 'final_norm.scale_D', 'stacks.0.mixer.w_q_DNH', 'stacks.0.mixer.w_o_NHD', 'stacks.0.mixer.b_q_NH',
         'stacks.0.mixer.q_norm.scale_D', 'stacks.0.mixer.conv_q_WKQ', 'stacks.0.mlp.w_up_DF', 'stacks.1.mlp.w_router_DE',
         'stacks.1.mlp.w_up_EDF', 'stacks.1.mlp.shared.w_up_DF', 'stacks.1.mlp.w_shared_gate_D']


def test_targets_are_patterns_of_names():
  able = ['stacks.0.mixer.w_q_DNH', 'stacks.0.mixer.w_o_NHD', 'stacks.0.mlp.w_up_DF', 'stacks.1.mlp.shared.w_up_DF']
  assert lora.targets(NAMES, lora.LoraConfig()) == able
  assert lora.targets(NAMES, lora.LoraConfig(targets=('*.w_up_DF', '*.w_q_*'))) == [able[0], *able[2:]]


@pytest.mark.parametrize('target, says', [
  ('*.w_up_*', "'*.w_up_*' matches stacks.1.mlp.w_up_EDF, which cannot have an adapter"), ('embed_VD', 'embed_VD, which'),
  ('*.mlp.w_*', 'stacks.1.mlp.w_router_DE, which'), ('*.conv_*', 'conv_q_WKQ, which'), ('*.q_norm.*', 'scale_D, which'),
  ('w_q_DNH', "no weight matches 'w_q_DNH'; there are w_q_DNH"), ('*.q_proj', "lora.targets: no weight matches '*.q_proj'")])
def test_what_cannot_be_adapted_is_refused_by_name(target, says):
  with pytest.raises(ValueError) as error:
    lora.targets(NAMES, lora.LoraConfig(targets=(target,)))
  assert says in str(error.value) and '\n' not in str(error.value)


def test_ranks_and_scales_without_meaning_are_refused():
  lora.LoraConfig().check()
  for config in (lora.LoraConfig(rank=0), lora.LoraConfig(alpha=0.0)):
    with pytest.raises(ValueError, match='lora.rank=.* at least 1'):
      config.check()


@pytest.mark.parametrize('name', MODELS)
def test_in_every_mixer_and_beside_experts_merged_equals_unmerged(mesh_of, name):
  """Of models with all layers there are. A weight that is used otherwise than through `ops.einsum` would be a type error."""
  model, config = MODELS[name], lora.LoraConfig(rank=2, alpha=3.0, dora=True)
  batch = random_batch(np.random.default_rng(0), 2, 24, model.vocab_size)
  with mesh_of(1):
    base = perturbed(model)
    params = with_noise(jax.jit(lambda params: lora.adapt(params, config, jax.random.key(0)))(base))
    used = hidden(params, batch, model)
    merged, without = hidden(jax.jit(lora.merge)(params), batch, model), hidden(base, batch, model)
  scale = np.abs(used).max()
  np.testing.assert_allclose(merged, used, rtol=0, atol=1e-5 * scale)
  assert np.abs(without - used).max() > 0.05 * scale
  matrices = {name for name in named_leaves(base) if '.w_' in name and len(name.rpartition('_')[2]) > 1}
  adapted = {name.removesuffix('.lora_a') for name in lora.adapters(params) if name.endswith('.lora_a')}
  assert {name.rpartition('.')[2] for name in matrices - adapted} <= {
    'w_router_DE', 'w_up_EDF', 'w_gate_EDF', 'w_down_EFD'} and len(adapted) > 8
