"""µP and CompleteP: which weight gets which factor, that the base itself is unchanged, that nothing grows with size, and
where no rule is known."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import tiny
from maxlm import mup, typed_json
from maxlm.checkpoint import named_leaves
from maxlm.config import Experiment, validate
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.models.decoder import Decoder, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig, optimizer
from maxlm.parametrisation import factors, fans, in_units_of_base, is_matrix, parametrised, shapes
from maxlm.step import init_state, train_step
from tests.models import FP32
from tests.rows import random_batch
from tests.test_mixers import MODELS

PLAIN = DecoderConfig(vocab_size=64, d_model=64, n_layers=2, pattern=(
  LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=16), mlp=MlpSpec(d_ff=128)),))
each_model = pytest.mark.parametrize('name', MODELS)


# -- factors


@each_model
def test_the_learning_rate_of_matrices_falls_as_the_variance_they_are_drawn_with(mesh_of, name):
  """Of every mixer and of experts: variance is 1 / fan-in, by the layers' own code, and so must the learning rate be."""
  tied = 'MiniMax' in name
  base = dataclasses.replace(MODELS[name], tied_embeddings=tied)
  model = mup.scaled(base, 4 * base.d_model)
  of = factors(base, shapes(model))
  with mesh_of(1):
    small, large = (named_leaves(jax.jit(lambda m=m: Decoder(m, jax.random.key(0, impl='unsafe_rbg')))())  # compiles quickly
                    for m in (base, model))
  assert of.keys() == small.keys()
  for weight in of:
    if is_matrix(weight):
      drawn = np.var(large[weight]) / np.var(small[weight])  # of at least 32 weights: 3 sigma of the log of a ratio are 1
      assert abs(math.log(of[weight].adam / drawn)) < (1.1 if small[weight].size < 1000 else 0.35), weight
      if 'rank' not in weight:
        assert of[weight].adam in (1 / 4, 1.0), weight
    elif weight in ('unembed_DV', 'embed_VD') and (weight == 'unembed_DV' or tied):
      assert of[weight].adam == 0.5
    else:
      assert of[weight].adam == 1, weight
  assert any(of[weight].adam == 1 / 4 for weight in of)


def test_a_rank_that_does_not_grow_keeps_its_learning_rate():
  mla = MlaSpec(n_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6)
  def of_width(width, heads):
    layer = LayerSpec(mixer=dataclasses.replace(mla, n_heads=heads), mlp=None)
    return DecoderConfig(vocab_size=64, d_model=width, n_layers=1, pattern=(layer,))
  of = factors(of_width(32, 4), shapes(of_width(128, 16)))
  of = {name.rpartition('.')[2]: factor.adam for name, factor in of.items()}
  assert of == {'embed_VD': 1, 'unembed_DV': 0.5, 'scale_D': 1, 'w_q_down_DR': 1 / 4, 'w_q_up_DNH': 1, 'w_kv_down_DR': 1 / 4,
                'w_k_rope_DH': 1 / 4, 'w_k_up_DNH': 1, 'w_v_up_DNH': 1, 'w_o_NHD': 1 / 4}


def test_fans_are_read_from_the_letters():
  assert fans('stacks.0.mixer.w_q_DNH', (7, 32, 4, 8)) == (32, 32)
  assert fans('stacks.0.mixer.w_o_NHD', (7, 2, 8, 32)) == (16, 32)
  assert fans('stacks.1.mlp.w_down_EFD', (7, 6, 48, 32)) == (48, 32)
  assert fans('stacks.1.mlp.w_router_DE', (7, 32, 6)) == (32, 6)
  assert fans('stacks.1.mlp.w_shared_gate_D', (7, 32)) == (32, 1)
  assert fans('stacks.1.mixer.conv_x_WNH', (7, 4, 2, 8)) == (1, 64)
  assert fans('stacks.1.mlp.alpha_p', (7,)) == (1, 1)
  assert fans('unembed_DV', (32, 64)) == (32, 64)


def test_forward_factors():
  base = dataclasses.replace(PLAIN, embed_scale=3.0, logits_scale=2.0)
  wide = mup.scaled(base, 256)
  wide = dataclasses.replace(wide, n_layers=8, pattern=(dataclasses.replace(
    wide.pattern[0], mixer=dataclasses.replace(wide.pattern[0].mixer, n_heads=8, n_kv_heads=4, head_dim=32)),))
  found = parametrised(wide, base)
  assert (found.logits_scale, found.embed_scale) == (1.0, 3.0)
  assert found.pattern[0].mixer.scale == 16**-0.5 * 16 / 32  # 1 / d from the base on
  assert found.pattern[0].mixer_scales == found.pattern[0].mlp_scales == (1.0, 1 / 4)
  assert parametrised(found, base) == found
  tied = dataclasses.replace(base, tied_embeddings=True)
  found = parametrised(dataclasses.replace(wide, tied_embeddings=True), tied)
  assert (found.logits_scale, found.embed_scale) == (1.0, 6.0)


@pytest.mark.parametrize('tied', [False, True])
def test_the_head_learns_what_the_papers_head_learns(tied):
  """Theirs: drawn with a constant variance, logits divided by m, learning rate and decay as at the base. 20 steps of both,
  gradients through logits, and for tied embeddings through what they embed too."""
  m, D, V, rng = 4, 64, 16, np.random.default_rng(0)
  drawn_DV, x_BD = rng.normal(size=(D, V)).astype(np.float32), rng.normal(size=(8, D)).astype(np.float32)
  labels_B = rng.integers(0, V, 8)

  def loss(w_DV, factor, embed):
    h_BD = x_BD + (embed * w_DV.T[labels_B] if tied else 0)
    return jnp.mean((h_BD @ w_DV * factor - jax.nn.one_hot(labels_B, V)) ** 2)

  def run(w_DV, factor, embed, transform, factors):
    state, plain = transform.init({'w': w_DV}), []
    for _ in range(20):
      grads = {'w': jax.grad(loss)(w_DV, factor, embed) / factors['eps']}
      updates, state = transform.update(grads, state, {'w': w_DV})
      w_DV = w_DV - 0.01 * (updates['w'] * factors['lr'] + 0.1 * w_DV)
      plain.append(x_BD @ w_DV * factor)
    return np.stack(plain)

  base = dataclasses.replace(PLAIN, d_model=D // m, tied_embeddings=tied)
  model = parametrised(dataclasses.replace(PLAIN, d_model=D, tied_embeddings=tied), base)
  name = 'embed_VD' if tied else 'unembed_DV'
  of = factors(base, shapes(model))[name]
  adam = optax.scale_by_adam(eps=1e-3)  # large enough to show
  # The papers' eps of the head falls with its gradient, 1 / m: so does that of tied embeddings.
  theirs = run(drawn_DV, 1 / m, 1.0, adam, {'eps': 1 / m, 'lr': 1.0})
  ours = run(drawn_DV * m**-0.5, model.logits_scale, model.embed_scale, adam, {'eps': of.eps, 'lr': of.adam})
  if not tied:  # there eps is as large as the head's gradient: unlike the table, which leaves it, ours follows
    assert of.eps == m**-0.5
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# -- in a step


def step_config(model, base=None, **options):
  config = Experiment(**{'name': 'mup', 'model': model, 'data': tiny.get_config().data, 'tokens': 64 * 1000,
                         'optim': OptimConfig(peak_lr=1e-2, base=base)} | options)
  return config.step_config('cpu', 1)


@pytest.mark.parametrize('name', ['plain', 'delta attention with a decay a channel, latent attention (Kimi Linear)'])
def test_with_its_own_size_as_base_the_program_is_the_same_to_the_letter(mesh_of, name):
  model = PLAIN if name == 'plain' else MODELS[name]
  assert parametrised(model, model) == model
  with mesh_of(1):
    batch = to_device(random_batch(np.random.default_rng(0), 2, 32, 64))
    programs = []
    for base in (None, model):
      config = step_config(model, base)
      state = jax.eval_shape(lambda config=config: init_state(config, jax.random.key(0)))
      lowered = jax.jit(lambda state, batch, config=config: train_step(config, state, batch)).lower(state, batch)
      programs.append(lowered.as_text())
  assert programs[0] == programs[1]


def test_a_step_is_the_same_on_any_mesh_and_a_base_may_be_smaller_than_the_mesh(mesh_of):
  base = dataclasses.replace(mup.scaled(PLAIN, 32), vocab_size=64)  # one key-value head: less than devices that share heads
  model = parametrised(dataclasses.replace(PLAIN, n_layers=4), base)
  losses = []
  for sizes in (dict(fsdp=1), dict(fsdp=2, tensor=2)):
    with mesh_of(**sizes):
      config = step_config(model, base)
      batch = to_device(random_batch(np.random.default_rng(0), 4, 32, 64))
      state = jax.jit(lambda config=config: init_state(config, jax.random.key(0)))()
      step = jax.jit(lambda state, batch, config=config: train_step(config, state, batch))
      losses.append([])
      for _ in range(3):
        state, metrics = step(state, batch)
        losses[-1].append(float(metrics['loss']))
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
  assert losses[0][2] < losses[0][0]


def test_updates_and_eps_have_their_factors():
  """Adam's first update is g / (|g| + eps): large gradients show the learning rate's factor, small ones eps's."""
  base = PLAIN
  weights = {name: np.ones(leaf.shape, np.float32) for name, leaf in
             shapes(parametrised(dataclasses.replace(mup.scaled(PLAIN, 256), n_layers=8), base)).items()}
  update = in_units_of_base(optax.scale_by_adam(eps=1e-3), base)
  of = factors(base, weights)
  for size in (1e3, 1e-6):
    grads = {name: np.full_like(w, size) for name, w in weights.items()}
    updates, _ = update.update(grads, update.init(weights), weights)
    for name, u in updates.items():
      wanted = of[name].adam * size / (size + 1e-3 * of[name].eps)
      np.testing.assert_allclose(u, wanted, rtol=1e-4, err_msg=name)
  assert of['stacks.0.mlp.w_up_DF'] == (1 / 4, 1 / 2, 1 / 16) and of['stacks.0.mlp_pre_norm.scale_D'] == (1, 1, 1 / 16)


def test_muon_has_a_factor_of_its_own_on_what_is_orthogonal():
  update = in_units_of_base(optax.scale(1.0), PLAIN, orthogonal=lambda name: 'w_up' in name)
  weights = {name: np.ones(leaf.shape, np.float32) for name, leaf in shapes(mup.scaled(PLAIN, 256)).items()}
  updates, _ = update.update({name: w * factors(PLAIN, weights)[name].eps for name, w in weights.items()}, None, weights)
  assert {name: float(u.max()) for name, u in updates.items() if '.mlp.' in name} == {
    'stacks.0.mlp.w_up_DF': 1 / 2, 'stacks.0.mlp.w_gate_DF': 1 / 4, 'stacks.0.mlp.w_down_FD': 1 / 4}


def test_decay_takes_the_same_share_of_a_step_at_every_width():
  base, config = PLAIN, OptimConfig(peak_lr=1.0, weight_decay=0.3, base=PLAIN)
  weights = {name: np.ones(leaf.shape, np.float32) for name, leaf in shapes(mup.scaled(base, 256)).items()}
  none = {name: np.zeros_like(w) for name, w in weights.items()}
  updates, _ = optimizer(config).update(none, optimizer(config).init(weights), weights)
  for name, u in updates.items():
    np.testing.assert_allclose(u, 0.3 if name == 'unembed_DV' or is_matrix(name) else 0, rtol=1e-6, err_msg=name)


# -- refusals


def test_what_no_rule_covers_is_refused():
  def refused(match, model, base):
    with pytest.raises(ValueError, match=match):
      parametrised(model, base)

  def one(mixer=None, mlp=None, n_layers=2, **options):
    layer = LayerSpec(mixer=mixer, mlp=mlp, **options)
    return DecoderConfig(vocab_size=64, d_model=64, n_layers=n_layers, pattern=(layer,))

  moe = MoeSpec(n_experts=4, k=2, experts=MlpSpec(d_ff=16))
  refused(r'pattern\[0\].mlp.n_experts=8, and in optim.base it is 4', one(mlp=dataclasses.replace(moe, n_experts=8)),
          one(mlp=moe))
  mamba = Mamba2Spec(n_heads=4, head_dim=8, state_dim=8)
  refused(r'state_dim=16, .* no rule', one(mixer=dataclasses.replace(mamba, state_dim=16)), one(mixer=mamba))
  refused('is MoeSpec, and in optim.base MlpSpec', one(mlp=moe), one(mlp=MlpSpec(d_ff=16)))
  refused('vocab_size=32', dataclasses.replace(PLAIN, vocab_size=32), PLAIN)
  refused('has 2 parts, and in optim.base 1', dataclasses.replace(PLAIN, pattern=PLAIN.pattern * 2), PLAIN)
  carried = one(mlp=MlpSpec(d_ff=16), norm='carried')
  refused('goes with depth', dataclasses.replace(carried, n_layers=4), carried)


def test_a_config_whose_factors_do_not_follow_from_its_base_is_refused():
  config = tiny.get_config()
  config.optim.base = config.model
  validate(config, 'cpu', 1)
  assert typed_json.decode(json.loads(json.dumps(typed_json.encode(config, Experiment))), Experiment) == config
  config.model = mup.scaled(config.model, 128)
  with pytest.raises(ValueError, match=r'optim.base has width 64 .* take model=parametrised\(model, base\)'):
    validate(config, 'cpu', 1)
  config.model = parametrised(config.model, config.optim.base)
  validate(config, 'cpu', 1)
  config.optim.freeze = ('embed_VD',)
  with pytest.raises(ValueError, match='optim.base is for a model that is trained whole'):
    validate(config, 'cpu', 1)


# -- coordinate checks


def slopes(what: str, sizes: list[int], kind: str) -> dict[str, dict[str, float]]:
  models = [mup.scaled(PLAIN, size) if what == 'width' else dataclasses.replace(PLAIN, n_layers=size) for size in sizes]
  logs = []
  for model in models:
    base = models[0] if kind == 'mup' else None
    model = parametrised(model, models[0]) if kind == 'mup' else model
    logs.append(mup.coordinates(model, FP32, OptimConfig(peak_lr=1e-2, base=base), steps=5, seeds=2))
  return {name: {part: mup.slope(sizes, [log[name][part] for log in logs]) for part in log} for name, log in logs[0].items()}


@pytest.mark.parametrize('what, sizes, averages_out', [('width', [64, 256], 'logits'),
                                                       ('depth', [4, 16], 'residual stream')])
def test_coordinates_do_not_depend_on_size(mesh_of, what, sizes, averages_out):
  """Within ±0.1, but for what is random at first and averages out: its slope is between -0.5 and 0.1."""
  with mesh_of(1):
    ours, standard = slopes(what, sizes, 'mup'), slopes(what, sizes, 'sp')
  for name, of in ours.items():
    assert max(of.values()) < 0.1, (name, of)
    assert min(of.values()) > (-0.55 if name == averages_out else -0.1), (name, of)
  assert max(of['change'] for of in standard.values()) > 0.3, 'the check does not see what it is for'


def test_the_command():
  command = [sys.executable, '-m', 'maxlm.mup', '--config=configs/tiny.py', '--config.model.n_layers=1']
  ran = subprocess.run([*command, '--widths=64,128', '--steps=1', '--seeds=1', '--json'], capture_output=True, text=True,
                       env=os.environ, timeout=300, check=True)
  found = json.loads(ran.stdout)
  assert found['sizes'] == [64, 128] and found['sp'].keys() == found['mup'].keys() == found['values']['sp'].keys()
  assert {'embedding', 'residual stream', 'logits', 'mixer of pattern[0], attention', 'mlp of pattern[0], mlp'
          } <= {*found['mup']}
  ran = subprocess.run([*command, '--widths=48,64'], capture_output=True, text=True, env=os.environ, timeout=300)
  assert ran.returncode == 2 and 'n_kv_heads=2 at width 64 is 1.5 at width 48: take widths' in ran.stderr
