"""Qwen3, dense: Llama with a norm of each query and key head, and windows in some layers."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, MLP, PRE_NORMS, embeddings, layers, pattern, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('qwen3',)
FULL, SLIDING = 'full_attention', 'sliding_attention'


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  n_kv_heads, head_dim = keys.size('num_key_value_heads', 32, null=n_heads), keys.size('head_dim', 128)
  rope, bias = read_rope(keys), keys.bool('attention_bias', False)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  window, first = keys.size('sliding_window', 4096, null=None), keys.int('max_window_layers', 28)
  window = window if keys.bool('use_sliding_window', False) else None
  kinds = keys.layer_types(n_layers, (FULL, SLIDING), [
    SLIDING if window is not None and i >= first else FULL for i in range(n_layers)])
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
  attention, windows = attentions[0], [a.window for a in attentions if a.window is not None]
  if attention.rope is None:
    raise ValueError('its layers have rotary positions')
  return {
    'model_type': 'qwen3', 'architectures': ['Qwen3ForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_kv_heads, 'head_dim': attention.head_dim, 'attention_bias': attention.qkv_bias,
    'use_sliding_window': bool(windows), 'sliding_window': windows[0] if windows else None,
    'layer_types': [FULL if a.window is None else SLIDING for a in attentions], 'intermediate_size': mlp.d_ff,
    'hidden_act': 'silu', 'rms_norm_eps': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings,
    **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLP)
