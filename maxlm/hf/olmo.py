"""OLMo 2 and 3: norms of what comes out of a sublayer alone, and of all queries and all keys of a token.

OLMo 3 has windows in three layers of four; its positions are stretched in the others.
"""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.hf.mapping import Entry
from maxlm.hf.rope import read_rope, read_ropes, write_rope, write_ropes
from maxlm.hf.tables import (
  ATTENTION,
  MLP,
  SANDWICH_NORMS,
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

MODEL_TYPES = ('olmo2', 'olmo3')


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  n_kv_heads, head_dim = keys.size('num_key_value_heads', n_heads), keys.size('head_dim', d_model // n_heads)
  bias, kinds, window = keys.bool('attention_bias', False), [FULL] * n_layers, None
  if keys.str('model_type') == 'olmo2':
    ropes = {FULL: read_rope(keys)}
  else:
    window = keys.size('sliding_window', 4096, null=None)
    kinds = window_kinds(keys, [SLIDING if (i + 1) % 4 else FULL for i in range(n_layers)], window)
    ropes = read_ropes(keys, theta=500_000.0, local=('rope_theta', 500_000.0))
  attention = {kind: AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, window=window if kind == SLIDING else None,
    qk_norm='all', qkv_bias=bias, out_bias=bias) for kind, rope in ropes.items()}
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention[kind], mlp=mlp, norm='post') for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', False), norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5)))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attentions, mlp = specs(model, 'mixer', AttentionSpec), specs(model, 'mlp', MlpSpec)[0]
  attention, ropes = attentions[0], {a.window is None: a.rope for a in attentions}
  if all(a.window is None for a in attentions):
    own = {'model_type': 'olmo2', 'architectures': ['Olmo2ForCausalLM'], **write_rope(attention.rope)}
  else:
    own = {'model_type': 'olmo3', 'architectures': ['Olmo3ForCausalLM'], **window_keys(attentions),
           **write_ropes({FULL: ropes.get(True, attention.rope), SLIDING: ropes[False]})}
  return {**own, **size_keys(model, attention, mlp), 'attention_bias': attention.qkv_bias, 'hidden_act': 'silu'}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, SANDWICH_NORMS, ATTENTION, MLP)
