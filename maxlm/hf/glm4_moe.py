"""GLM-4.5 to 4.7: DeepSeek-V3's mixture of experts under the attention of Llama, with heads rotated in part."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.deepseek_moe import MLPS, prediction_layers, read_mlps, write_mlps
from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, PRE_NORMS, embeddings, layers, pattern, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('glm4_moe',)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8), head_dim=keys.size('head_dim', d_model // n_heads),
    rope=read_rope(keys, fraction=0.5), qk_norm='head' if keys.bool('use_qk_norm', False) else None,
    qkv_bias=keys.bool('attention_bias', False))
  mlps = read_mlps(keys, n_layers, n_experts=128, dense=1, scale=1.0)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention, mlp=mlp) for mlp in mlps]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlps = specs(model, 'mixer', AttentionSpec)[0], write_mlps(model)
  return {
    'model_type': 'glm4_moe', 'architectures': ['Glm4MoeForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_kv_heads, 'head_dim': attention.head_dim, 'attention_bias': attention.qkv_bias,
    'use_qk_norm': attention.qk_norm is not None, **mlps, 'rms_norm_eps': model.norm.eps,
    'tie_word_embeddings': model.tied_embeddings, **write_rope(attention.rope),
    'partial_rotary_factor': attention.rope.fraction}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLPS)
  yield prediction_layers(model)
