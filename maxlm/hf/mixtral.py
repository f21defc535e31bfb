"""Mixtral: Mistral with experts."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Either, Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, PRE_NORMS, embeddings, layers, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('mixtral',)

# As published, and as transformers 5 has them in memory.
EXPERTS = (
  Either((Tensor('block_sparse_moe.gate.weight', 'E D', 'mlp.w_router_DE'),
          Tensor('block_sparse_moe.experts.{E}.w1.weight', 'F D', 'mlp.w_gate_EDF'),
          Tensor('block_sparse_moe.experts.{E}.w3.weight', 'F D', 'mlp.w_up_EDF'),
          Tensor('block_sparse_moe.experts.{E}.w2.weight', 'D F', 'mlp.w_down_EFD')),
         (Tensor('mlp.gate.weight', 'E D', 'mlp.w_router_DE'),
          Tensor('mlp.experts.gate_up_proj', 'E (F|F) D', 'mlp.w_gate_EDF | mlp.w_up_EDF'),
          Tensor('mlp.experts.down_proj', 'E D F', 'mlp.w_down_EFD'))),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads = keys.size('hidden_size'), keys.size('num_attention_heads')
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads),
    head_dim=keys.size('head_dim', d_model // n_heads), rope=read_rope(keys), window=keys.size('sliding_window', None))
  experts = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  moe = MoeSpec(n_experts=keys.size('num_local_experts', keys.size('num_experts', 8)),
                k=keys.size('num_experts_per_tok', 2), experts=experts)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=moe),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, moe = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MoeSpec)[0]
  return {
    'model_type': 'mixtral', 'architectures': ['MixtralForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_kv_heads, 'head_dim': attention.head_dim, 'sliding_window': attention.window,
    'intermediate_size': moe.experts.d_ff, 'hidden_act': 'silu', 'num_local_experts': moe.n_experts,
    'num_experts_per_tok': moe.k, 'rms_norm_eps': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings,
    **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, EXPERTS)
