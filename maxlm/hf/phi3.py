"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama whose projections of one input are one matrix, with LongRoPE."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import PRE_NORMS, embeddings, layers, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import LongRopeScaling
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('phi3',)

FUSED = (
  Tensor('self_attn.qkv_proj.weight', '(NH|KH|KH) D', 'mixer.w_q_DNH | mixer.w_k_DKH | mixer.w_v_DKH'),
  Tensor('self_attn.o_proj.weight', 'D NH', 'mixer.w_o_NHD'),
  Tensor('mlp.gate_up_proj.weight', '(F|F) D', 'mlp.w_gate_DF | mlp.w_up_DF'),
  Tensor('mlp.down_proj.weight', 'D F', 'mlp.w_down_FD'),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads = keys.size('hidden_size'), keys.size('num_attention_heads')
  n_kv_heads, head_dim = keys.size('num_key_value_heads', n_heads), keys.size('head_dim', d_model // n_heads)
  rope = read_rope(keys, fraction=1.0)
  if not isinstance(rope.scaling, LongRopeScaling | None):
    raise ValueError(f'{keys.where}: rope_scaling is of {type(rope.scaling).__name__}; here it can be longrope')
  keys.inert('original_max_position_embeddings')
  keys.fixed('full_attn_mod', 1)
  keys.fixed('interpolate_factor', 1)
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, window=keys.size('sliding_window', None))
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=keys.activation(default='silu'))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=keys.layers(),
    pattern=(LayerSpec(mixer=attention, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlp = specs(model, 'mixer', AttentionSpec)[0], specs(model, 'mlp', MlpSpec)[0]
  return {
    'model_type': 'phi3', 'architectures': ['Phi3ForCausalLM'], **size_keys(model, attention, mlp),
    'sliding_window': attention.window, 'hidden_act': 'silu', **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, FUSED)
