"""Qwen3, dense: Llama with a norm of each query and key head, and windows in some layers."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import (
  ATTENTION,
  MLP,
  PRE_NORMS,
  embeddings,
  layers,
  pattern,
  size_keys,
  specs,
  window_keys,
  window_kinds,
)
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('qwen3',)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  n_kv_heads, head_dim = keys.size('num_key_value_heads', 32, null=n_heads), keys.size('head_dim', 128)
  rope, bias = read_rope(keys), keys.bool('attention_bias', False)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  window, first = keys.size('sliding_window', 4096, null=None), keys.int('max_window_layers', 28)
  window = window if keys.bool('use_sliding_window', False) else None
  kinds = window_kinds(keys, [SLIDING if window is not None and i >= first else FULL for i in range(n_layers)], window)
  attention = {kind: AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, qk_norm='head', qkv_bias=bias, out_bias=bias,
    window=window if kind == SLIDING else None) for kind in (FULL, SLIDING)}
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention[kind], mlp=mlp) for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attentions, mlp = specs(model, 'mixer', AttentionSpec), specs(model, 'mlp', MlpSpec)[0]
  return {
    'model_type': 'qwen3', 'architectures': ['Qwen3ForCausalLM'], **size_keys(model, attentions[0], mlp),
    'attention_bias': attentions[0].qkv_bias, 'use_sliding_window': any(a.window is not None for a in attentions),
    **window_keys(attentions), 'hidden_act': 'silu', **write_rope(attentions[0].rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLP)
