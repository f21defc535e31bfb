"""Qwen3 with experts, in all layers or every so many."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, EXPERTS, MLP, PRE_NORMS, embeddings, layers, pattern, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('qwen3_moe',)

ROUTER = (Tensor('mlp.gate.weight', 'E D', 'mlp.w_router_DE'),)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  bias, window = keys.bool('attention_bias', False), keys.size('sliding_window', 4096, null=None)
  keys.inert('max_window_layers')  # of Qwen3; here a window is for all layers
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 4, null=n_heads),
    head_dim=keys.size('head_dim', d_model // n_heads), rope=read_rope(keys), qk_norm='head', qkv_bias=bias, out_bias=bias,
    window=window if keys.bool('use_sliding_window', False) else None)
  activation = keys.activation(default='silu')
  mlp = MlpSpec(d_ff=keys.size('intermediate_size', 6144), activation=activation)
  moe = MoeSpec(
    n_experts=keys.size('num_experts', keys.size('num_local_experts', 128)), k=keys.size('num_experts_per_tok', 8),
    experts=MlpSpec(d_ff=keys.size('moe_intermediate_size', 768), activation=activation),
    normalise=keys.bool('norm_topk_prob', False))
  every, dense = keys.size('decoder_sparse_step', 1), keys.list('mlp_only_layers', (int,), [])
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention, mlp=mlp if i in dense or (i + 1) % every else moe)
                     for i in range(n_layers)]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlps = specs(model, 'mixer', AttentionSpec)[0], [layer.mlp for layer in model.layers]
  moe = next((mlp for mlp in mlps if isinstance(mlp, MoeSpec)), None)
  dense = [i for i, mlp in enumerate(mlps) if isinstance(mlp, MlpSpec)]
  if moe is None:
    raise ValueError('some of its layers have experts')
  return {
    'model_type': 'qwen3_moe', 'architectures': ['Qwen3MoeForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_kv_heads, 'head_dim': attention.head_dim, 'attention_bias': attention.qkv_bias,
    'use_sliding_window': attention.window is not None, 'sliding_window': attention.window,
    'intermediate_size': mlps[dense[0]].d_ff if dense else moe.experts.d_ff, 'hidden_act': 'silu',
    'num_experts': moe.n_experts, 'num_experts_per_tok': moe.k, 'moe_intermediate_size': moe.experts.d_ff,
    'norm_topk_prob': moe.normalise, 'decoder_sparse_step': 1, 'mlp_only_layers': dense,
    'rms_norm_eps': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings, **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, MLP, ROUTER, EXPERTS)
