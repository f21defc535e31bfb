"""OLMoE: queries and keys normalised over all heads together, and experts in all layers."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, EXPERTS, PRE_NORMS, embeddings, layers, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('olmoe',)

ROUTER = (Tensor('mlp.gate.weight', 'E D', 'mlp.w_router_DE'),)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, bias = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.bool('attention_bias', False)
  keys.fixed('clip_qkv')  # only null: queries, keys and values that are clamped
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', n_heads), head_dim=d_model // n_heads,
    rope=read_rope(keys), qk_norm='all', qkv_bias=bias, out_bias=bias)
  experts = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  moe = MoeSpec(n_experts=keys.size('num_experts', 64), k=keys.size('num_experts_per_tok', 8), experts=experts,
                normalise=keys.bool('norm_topk_prob', False))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=moe),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, moe = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MoeSpec)[0]
  return {
    'model_type': 'olmoe', 'architectures': ['OlmoeForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_kv_heads, 'attention_bias': attention.qkv_bias, 'clip_qkv': None,
    'intermediate_size': moe.experts.d_ff, 'hidden_act': 'silu', 'num_experts': moe.n_experts,
    'num_experts_per_tok': moe.k, 'norm_topk_prob': moe.normalise, 'rms_norm_eps': model.norm.eps,
    'tie_word_embeddings': model.tied_embeddings, **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, ROUTER, EXPERTS)
