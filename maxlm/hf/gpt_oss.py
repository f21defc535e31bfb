"""gpt-oss: attention with sinks, every other layer in a window, and experts with biases and a clamped SwiGLU."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.hf.mapping import Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, PRE_NORMS, embeddings, layers, pattern, size_keys, specs, window_keys, window_kinds
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import SWIGLU_STEEPNESS, MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import YarnScaling
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('gpt_oss',)

SINKS = (Tensor('self_attn.sinks', 'N', 'mixer.sinks_N'),)
EXPERTS = (
  Tensor('mlp.router.weight', 'E D', 'mlp.w_router_DE'),
  Tensor('mlp.router.bias', 'E', 'mlp.b_router_E'),
  Tensor('mlp.experts.gate_up_proj', 'E D F(1|1)', 'mlp.w_gate_EDF | mlp.w_up_EDF'),
  Tensor('mlp.experts.gate_up_proj_bias', 'E F(1|1)', 'mlp.b_gate_EF | mlp.b_up_EF'),
  Tensor('mlp.experts.down_proj', 'E F D', 'mlp.w_down_EFD'),
  Tensor('mlp.experts.down_proj_bias', 'E D', 'mlp.b_down_ED'),
)


def read_config(keys: Keys) -> DecoderConfig:
  n_heads, n_layers, k = keys.size('num_attention_heads'), keys.layers(), keys.size('num_experts_per_tok', 4)
  keys.inert('hidden_act')  # always 'silu', and the experts do not look at it
  keys.inert('initial_context_length')  # in OpenAI's own code, what rope_scaling says
  keys.fixed('experts_per_token', k)
  bias, window = keys.bool('attention_bias', True), keys.size('sliding_window', 128, null=None)
  rope = read_rope(keys, theta=150_000.0)
  if not (keys.plain.get('rope_parameters') or keys.plain.get('rope_scaling')):
    rope.scaling = YarnScaling(factor=32.0, original_length=4096, truncate=False)
  attention = {kind: AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads), head_dim=keys.size('head_dim', 64),
    rope=rope, window=window if kind == SLIDING else None, sinks=True, qkv_bias=bias, out_bias=bias)
    for kind in (FULL, SLIDING)}
  keys.fixed('swiglu_alpha', SWIGLU_STEEPNESS)
  experts = MlpSpec(d_ff=keys.size('intermediate_size'), activation='clamped_swiglu', bias=True,
                    limit=keys.float('swiglu_limit', 7.0))
  moe = MoeSpec(n_experts=keys.size('num_local_experts', keys.size('num_experts', 128)), k=k, experts=experts,
                router_bias=True)
  kinds = window_kinds(keys, [FULL if i % 2 else SLIDING for i in range(n_layers)], window)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=keys.size('hidden_size'), n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention[kind], mlp=moe) for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', False), norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5)))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attentions, moe = specs(model, 'mixer', AttentionSpec), specs(model, 'mlp', MoeSpec)[0]
  return {
    'model_type': 'gpt_oss', 'architectures': ['GptOssForCausalLM'], **size_keys(model, attentions[0], moe.experts),
    'attention_bias': attentions[0].qkv_bias, **window_keys(attentions), 'num_local_experts': moe.n_experts,
    'num_experts_per_tok': moe.k, 'hidden_act': 'silu', 'swiglu_limit': moe.experts.limit,
    **write_rope(attentions[0].rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, ATTENTION, SINKS, EXPERTS)
