"""Gemma 2 and 3: norms before and after each sublayer, scaled embeddings, windows in most layers.

Gemma 3 normalises queries and keys instead of capping their products, and turns them by other angles where there is a
window. Of a model that also sees (`gemma3`) the text model is read.
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
  beside_vision,
  embeddings,
  layers,
  pattern,
  read_text,
  size_keys,
  specs,
  window_keys,
  window_kinds,
)
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('gemma2', 'gemma3_text', 'gemma3')


def read_config(keys: Keys) -> DecoderConfig:
  model_type = keys.str('model_type')
  if model_type == 'gemma3':
    return read_text(keys, {'gemma3_text': read_config})
  is_2, d_model, n_layers = model_type == 'gemma2', keys.size('hidden_size'), keys.layers()
  head_dim, bias = keys.size('head_dim', 256), keys.bool('attention_bias', False)
  n_heads, n_kv_heads = keys.size('num_attention_heads', 8), keys.size('num_key_value_heads', 4)
  scalar, window = keys.float('query_pre_attn_scalar', 256.0), keys.size('sliding_window', 4096, null=None)
  if is_2:
    period, softcap, final_softcap = 2, keys.float('attn_logit_softcapping', 50.0, null=None), 30.0
    ropes = dict.fromkeys((FULL, SLIDING), read_rope(keys))
  else:
    period, softcap, final_softcap = keys.size('sliding_window_pattern', 6), None, None
    ropes = read_ropes(keys, theta=1_000_000.0, local=('rope_local_base_freq', 10_000.0))
    keys.inert('attn_logit_softcapping', '_sliding_window_pattern')
  keys.inert('cache_implementation', 'hidden_act')
  kinds = window_kinds(keys, [SLIDING if (i + 1) % period else FULL for i in range(n_layers)], window)
  attention = {kind: AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=ropes[kind], window=window if kind == SLIDING else None,
    scale=None if scalar == head_dim else scalar**-0.5, qk_norm=None if is_2 else 'head', softcap=softcap, qkv_bias=bias,
    out_bias=bias) for kind in (FULL, SLIDING)}
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation('hidden_activation', 'gelu_pytorch_tanh'))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 256_000 if is_2 else 262_208), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention[kind], mlp=mlp, norm='sandwich') for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', True), embed_scale=d_model**0.5,
    logits_softcap=keys.float('final_logit_softcapping', final_softcap, null=None),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), one_plus=True))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attentions, mlp = specs(model, 'mixer', AttentionSpec), specs(model, 'mlp', MlpSpec)[0]
  attention, ropes = attentions[0], {a.window is None: a.rope for a in attentions}
  if model.d_model % attention.n_heads:
    raise ValueError(f'd_model={model.d_model} must be a multiple of n_heads={attention.n_heads}')  # says transformers
  if attention.qk_norm is None:
    own = {'model_type': 'gemma2', 'architectures': ['Gemma2ForCausalLM'], 'attn_logit_softcapping': attention.softcap,
           **write_rope(attention.rope)}
  else:
    full, local = ropes.get(True, attention.rope), ropes.get(False, attention.rope)
    own = {'model_type': 'gemma3_text', 'architectures': ['Gemma3ForCausalLM'], **write_ropes({FULL: full, SLIDING: local}),
           'rope_local_base_freq': local.theta}
  return {
    **own, **size_keys(model, attention, mlp), **window_keys(attentions), 'attention_bias': attention.qkv_bias,
    'query_pre_attn_scalar': round(attention.score_scale**-2), 'hidden_activation': 'gelu_pytorch_tanh',
    'final_logit_softcapping': model.logits_softcap}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from beside_vision([*embeddings(model), *layers(model, SANDWICH_NORMS, ATTENTION, MLP)])
