"""SmolLM3: Llama without rotary positions in each fourth layer."""

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

MODEL_TYPES = ('smollm3',)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  n_kv_heads, head_dim = keys.size('num_key_value_heads', 4, null=n_heads), keys.size('head_dim', d_model // n_heads)
  interval = keys.size('no_rope_layer_interval', 4)
  rotated = keys.list('no_rope_layers', (int,), [int((i + 1) % interval > 0) for i in range(n_layers)], length=n_layers)
  window, slides = keys.size('sliding_window', None), keys.bool('use_sliding_window', False)
  kinds = window_kinds(keys, [SLIDING if slides and window and not r else FULL for r in rotated], window)
  rope, bias = read_rope(keys, theta=2_000_000.0), keys.bool('attention_bias', False)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'),
                bias=keys.bool('mlp_bias', False))
  keys.inert('max_window_layers')
  attentions = [AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope if r else None, qkv_bias=bias, out_bias=bias,
    window=window if kind == SLIDING else None) for r, kind in zip(rotated, kinds)]
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention, mlp=mlp) for attention in attentions]),
    tied_embeddings=keys.bool('tie_word_embeddings', True),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attentions, mlp = specs(model, 'mixer', AttentionSpec), specs(model, 'mlp', MlpSpec)[0]
  return {
    'model_type': 'smollm3', 'architectures': ['SmolLM3ForCausalLM'], **size_keys(model, attentions[0], mlp),
    **window_keys(attentions), 'use_sliding_window': any(a.window is not None for a in attentions),
    'no_rope_layers': [int(a.rope is not None) for a in attentions], 'attention_bias': attentions[0].qkv_bias,
    'mlp_bias': mlp.bias, 'hidden_act': 'silu',
    **write_rope(next((a.rope for a in attentions if a.rope is not None), None))}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLP)
