"""MiniMax-M2: queries and keys normalised over all heads together, heads rotated in part, and Mixtral's experts selected by
biased sigmoids."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.deepseek_moe import prediction_layers
from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Either, Entry, Tensor
from maxlm.hf.mixtral import EXPERTS
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, PRE_NORMS, embeddings, layers, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('minimax_m2',)

SELECTION = (Either(*([Tensor(f'{block}.e_score_correction_bias', 'E', 'mlp.select_bias_E', fp32=True)]
                      for block in ('block_sparse_moe', 'mlp'))),)


def read_config(keys: Keys) -> DecoderConfig:
  n_heads, n_layers, head_dim = keys.size('num_attention_heads'), keys.layers(), keys.size('head_dim', 128)
  for key, only in (('use_qk_norm', True), ('qk_norm_type', 'per_layer'), ('scoring_func', 'sigmoid'),
                    ('use_routing_bias', True), ('shared_intermediate_size', 0), ('attn_type_list', [1] * n_layers)):
    keys.fixed(key, only)
  keys.inert('shared_moe_mode')  # of the shared MLP that is not there
  keys.inert('use_mtp', 'num_mtp_modules', 'mtp_transformer_layers')  # `prediction_layers`
  fraction = keys.size('rotary_dim', head_dim) / head_dim
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8), head_dim=head_dim,
    rope=read_rope(keys, theta=5_000_000.0, fraction=fraction), qk_norm='all')
  experts = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  moe = MoeSpec(n_experts=keys.size('num_local_experts', keys.size('num_experts', 256)),
                k=keys.size('num_experts_per_tok', 8), experts=experts, score='sigmoid', select_bias=True)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=keys.size('hidden_size'), n_layers=n_layers,
    pattern=(LayerSpec(mixer=attention, mlp=moe),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, moe = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MoeSpec)[0]
  rope = write_rope(attention.rope)
  return {
    'model_type': 'minimax_m2', 'architectures': ['MiniMaxM2ForCausalLM'], **size_keys(model, attention, moe.experts),
    'rotary_dim': attention.rope.rotated(attention.head_dim), 'use_qk_norm': True, 'qk_norm_type': 'per_layer',
    'hidden_act': 'silu', 'num_local_experts': moe.n_experts, 'num_experts_per_tok': moe.k, 'scoring_func': 'sigmoid',
    'use_routing_bias': True, **rope}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, EXPERTS, SELECTION)
  yield prediction_layers(model)
