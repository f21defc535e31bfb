"""Ministral 3: Mistral whose queries grow with the position. Of a model that also sees (`mistral3`) the text model is read,
which is this one or Mistral."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf import llama
from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, rope_parameters
from maxlm.hf.tables import beside_vision, read_text, size_keys, specs
from maxlm.layers.attention import AttentionSpec, QueryGrowth
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('ministral3', 'mistral3')


def read_config(keys: Keys) -> DecoderConfig:
  if keys.str('model_type') == 'mistral3':
    return read_text(keys, {'ministral3': read_config, 'mistral': llama.read_config})
  d_model, n_heads, stretched = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.inner('rope_parameters')
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads),
    head_dim=keys.size('head_dim', 128, null=d_model // n_heads),
    rope=read_rope(keys, besides=('llama_4_scaling_beta', 'max_position_embeddings')),
    query_growth=QueryGrowth(beta=stretched.float('llama_4_scaling_beta'),
                             length=stretched.size('original_max_position_embeddings')),
    window=keys.size('sliding_window', None))
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlp = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MlpSpec)[0]
  growth = attention.query_growth
  if attention.rope is None or growth is None:
    raise ValueError('its layers have rotary positions, and queries that grow with them')
  return {
    'model_type': 'ministral3', 'architectures': ['Ministral3ForCausalLM'], **size_keys(model, attention, mlp),
    'sliding_window': attention.window, 'hidden_act': 'silu', 'rope_parameters': {
      **rope_parameters(attention.rope), 'llama_4_scaling_beta': growth.beta,
      'original_max_position_embeddings': growth.length}}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from beside_vision(llama.tensors(model))
