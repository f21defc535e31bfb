"""Llama 1 to 3.x, LLM360's K2 (which is one), and Mistral, which adds a window."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, MLP, PRE_NORMS, embeddings, layers, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('llama', 'mistral')


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads = keys.size('hidden_size'), keys.size('num_attention_heads')
  is_mistral = keys.str('model_type') == 'mistral'
  bias = not is_mistral and keys.bool('attention_bias', False)
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8 if is_mistral else n_heads, null=n_heads),
    head_dim=keys.size('head_dim', d_model // n_heads), rope=read_rope(keys), qkv_bias=bias, out_bias=bias,
    window=keys.size('sliding_window', 4096, null=None) if is_mistral else None)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'),
                bias=not is_mistral and keys.bool('mlp_bias', False))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlp = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MlpSpec)[0]
  is_llama = attention.window is None and model.d_model % attention.n_heads == 0  # transformers insists on the latter
  own = ({'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'attention_bias': attention.qkv_bias,
          'mlp_bias': mlp.bias} if is_llama else
         {'model_type': 'mistral', 'architectures': ['MistralForCausalLM'], 'sliding_window': attention.window})
  return {**own, **size_keys(model, attention, mlp), 'hidden_act': 'silu', **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLP)
