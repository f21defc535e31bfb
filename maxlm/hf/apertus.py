"""Apertus: an MLP without gates and with a learned activation, and norms of each query and key head."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Constant, Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, MLP, embeddings, layers, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import XIELU_BETA, MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import Llama3Scaling, RopeSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('apertus',)

NORMS = (
  Tensor('attention_layernorm.weight', 'D', 'mixer_pre_norm.scale_D'),
  Tensor('feedforward_layernorm.weight', 'D', 'mlp_pre_norm.scale_D'),
)
XIELU = (
  Tensor('mlp.act_fn.alpha_p', '1', 'mlp.alpha_p'),
  Tensor('mlp.act_fn.alpha_n', '1', 'mlp.alpha_n'),
  Constant('mlp.act_fn.beta', (), XIELU_BETA),
  Constant('mlp.act_fn.eps', (), -1e-6),  # of no effect: see layers/mlp.py
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads = keys.size('hidden_size'), keys.size('num_attention_heads')
  n_kv_heads, head_dim = keys.size('num_key_value_heads', n_heads), keys.size('head_dim', d_model // n_heads)
  bias, rope = keys.bool('attention_bias', False), read_rope(keys, theta=12_000_000.0)
  if not keys.dict('rope_parameters', None) and not keys.dict('rope_scaling', None):
    rope = RopeSpec(theta=12_000_000.0, scaling=Llama3Scaling(factor=8.0, original_length=8192))
  keys.fixed('qk_norm', True)
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, qk_norm='head', qkv_bias=bias, out_bias=bias)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='xielu'), gated=False)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlp = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MlpSpec)[0]
  return {
    'model_type': 'apertus', 'architectures': ['ApertusForCausalLM'], **size_keys(model, attention, mlp),
    'attention_bias': attention.qkv_bias, 'hidden_act': 'xielu', **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, NORMS, ATTENTION, MLP, XIELU)
