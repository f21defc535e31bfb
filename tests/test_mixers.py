"""Every mixer in a whole model: decoding with its cache, packed documents, and meshes, values and gradients.

The layers' own tests compare them with their definitions; here are the promises that a model makes whatever it is made of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm import flops
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.lightning import LightningSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.layers.rope import RopeSpec
from maxlm.layers.rows import Past
from maxlm.models.decoder import Decoder, DecoderConfig, LayerSpec, empty_caches
from tests.models import FP32, assert_same_gradients, gradients, hidden, perturbed
from tests.rows import pack, random_batch

V = 64
UNTRAINED = ('select_bias', 'decay_N')  # weights without a gradient, by design


def model(*pattern: LayerSpec, **options) -> DecoderConfig:
  return DecoderConfig(vocab_size=V, d_model=32, n_layers=len(pattern), pattern=pattern, **options)


def attention(**options) -> AttentionSpec:
  return AttentionSpec(**{'n_heads': 4, 'n_kv_heads': 2, 'head_dim': 8} | options)


MLP = MlpSpec(d_ff=48)
MAMBA = Mamba2Spec(n_heads=4, head_dim=8, state_dim=8, n_groups=2)
DELTA = DeltaSpec(n_heads=4, n_key_heads=2, head_dim=8, key_dim=8)
MLA = MlaSpec(n_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=6, rope=RopeSpec(interleaved=True))
EXPERTS = MoeSpec(n_experts=6, k=2, experts=MlpSpec(d_ff=16), score='sigmoid', select_bias=True, scale=1.5,
                  shared=MlpSpec(d_ff=16))

MODELS = {
  'mamba2, moe, attention, one a layer (Nemotron-H)': model(
    LayerSpec(mixer=MAMBA, mlp=None), LayerSpec(mixer=None, mlp=EXPERTS), LayerSpec(mixer=attention(rope=None), mlp=None),
    LayerSpec(mixer=None, mlp=MlpSpec(d_ff=48, activation='relu2', gated=False))),
  'gated delta net and gated attention, shared gate (Qwen3-Next)': model(
    LayerSpec(mixer=DELTA, mlp=MoeSpec(n_experts=6, k=2, experts=MlpSpec(d_ff=16), shared=MLP, shared_gate=True)),
    LayerSpec(mixer=attention(gate='element', qk_norm='head', rope=RopeSpec(fraction=0.5)), mlp=MLP),
    norm=NormSpec(one_plus=True)),
  'delta attention with a decay a channel, latent attention (Kimi Linear)': model(
    LayerSpec(mixer=DeltaSpec(n_heads=4, n_key_heads=4, head_dim=8, key_dim=8, decay='channel'), mlp=MLP),
    LayerSpec(mixer=MLA, mlp=EXPERTS)),
  'lightning attention, carried (MiniMax-01); attention beside mamba2 (Falcon-H1)': model(
    LayerSpec(mixer=LightningSpec(n_heads=4, head_dim=8), mlp=MLP, norm='carried', mixer_scales=(1.2, 0.8)),
    LayerSpec(mixer=ParallelSpec(mixers=(MAMBA, attention(window=5, sinks=True))), mlp=MLP)),
}
each_model = pytest.mark.parametrize('name', MODELS)


@each_model
def test_decoding_with_the_cache_equals_the_full_forward(mesh_of, name):
  """Prompt of 9 tokens at once, then one by one, beside a shorter left-padded row."""
  config, rng = MODELS[name], np.random.default_rng(0)
  tokens = rng.integers(0, V, (2, 24)).astype(np.int32)
  ids = np.ones_like(tokens)
  ids[1, :4] = 0
  positions = np.maximum(np.cumsum(ids, axis=1) - 1, 0).astype(np.int32)
  with mesh_of(1):
    params = perturbed(config)
    full = hidden(params, {'tokens': tokens, 'segment_ids': ids, 'positions': positions}, config)
    caches = empty_caches(config, FP32, 2, 24)
    extend = jax.jit(functools.partial(Decoder.extend, config=config, compute=FP32))
    column, got = 0, []
    for stop in (9, *range(10, 25)):
      part = slice(column, stop)
      new = to_device({'t': tokens[:, part], 's': ids[:, part], 'p': positions[:, part], 'ids': ids})
      h, caches = extend(params, tokens_BT=new['t'], segment_ids_BT=new['s'], positions_BT=new['p'], caches=caches,
                         past=Past(new['ids'], jnp.asarray(column)))
      got.append(np.asarray(h))
      column = stop
  np.testing.assert_allclose(np.concatenate(got, 1)[ids > 0], full[ids > 0], atol=5e-5)


def rows_of(documents: list[np.ndarray], *rows: list[int]) -> dict[str, np.ndarray]:
  """8 rows of 32 tokens, the first of them with these documents each, the others empty."""
  return pack([[documents[i] for i in row] for row in rows] + [[]] * (8 - len(rows)), 32)


@each_model
def test_a_packed_document_has_the_loss_and_gradients_it_has_alone(mesh_of, name):
  config, rng = MODELS[name], np.random.default_rng(1)
  documents = [rng.integers(0, V, n + 1) for n in (17, 1, 12, 20, 9)]
  with mesh_of(1):
    params = perturbed(config)
    rows = {'balance_beside_bias': 0.0}  # of a row, whatever is in it
    loss_a, grads_a = gradients(params, rows_of(documents, [0, 1, 2], [3, 4]), config, **rows)
    loss_b, grads_b = gradients(params, rows_of(documents, [0], [1], [2], [3], [4]), config, **rows)
  assert loss_a == pytest.approx(loss_b, rel=1e-6)
  assert_same_gradients(grads_a, grads_b, 2e-5, UNTRAINED)


@each_model
def test_loss_and_every_gradient_leaf_are_the_same_on_a_mesh(mesh_of, name):
  config, batch = MODELS[name], random_batch(np.random.default_rng(2), 8, 32, V)
  with mesh_of(1):
    loss_one, grads_one = gradients(perturbed(config), batch, config)
  with mesh_of(data=2, fsdp=2, tensor=2):
    loss_many, grads_many = gradients(perturbed(config), batch, config)
  assert loss_many == pytest.approx(loss_one, rel=1e-6)
  assert_same_gradients(grads_one, grads_many, 2e-5, UNTRAINED)


@each_model
def test_every_part_tells_its_weights_for_the_flops(mesh_of, name):
  """All matrices and convolutions but the look-up, and of the experts those that a token gets."""
  config = MODELS[name]
  with mesh_of(1):
    params = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    weight = jax.tree_util.keystr(path).removesuffix('.value').rpartition('.')[2]
    if weight.startswith(('w_', 'conv_', 'unembed')):
      total += leaf.size * 2 // 6 if weight.endswith(('_EDF', '_EFD')) else leaf.size
  assert flops.matmul_params(config) == total
