"""The fixtures of make_hf_goldens.py: one tiny configuration for each trap of a family.

Dimensions are odd where a family allows it, windows and original lengths shorter than the sequence, layer patterns longer
than a period and with a remainder; norms have a large eps, so that one at the wrong site shows.
"""

import dataclasses

GONE = object()  # a field that is not in the published config.json


@dataclasses.dataclass(kw_only=True, slots=True)
class Golden:
  """config: model_type and fields of its configuration class. off: changes of config, each of which must change the logits.
  hub: changes that give the published spelling of config.json. draw: part of a weight's name -> (mean, std); the last that
  matches counts. in_out: parts of names of matrices stored (in, out). length: T, tokens of a row. bare: tensors without the
  prefix of the model inside."""

  config: dict
  off: tuple[dict, ...] = ()
  hub: dict = dataclasses.field(default_factory=dict)
  hub_model_type: bool = False
  draw: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  in_out: tuple[str, ...] = ()
  length: int = 32
  cache_differs: bool = False
  max_shard_size: str = '1GB'
  bare: bool = False


def rope(theta: float, kind: str = 'default', **fields) -> dict:
  return {'rope_type': kind, 'rope_theta': theta, **fields}


def old_rope(theta: float, kind: str | None = None, **fields) -> dict:
  """The spelling of transformers 4: rope_theta, and rope_scaling if there is any."""
  return {'rope_parameters': GONE, 'rope_theta': theta, 'rope_scaling': kind and {'rope_type': kind, **fields}}


def shape(d: int, heads: int, kv_heads: int, layers: int, mlp: int, vocab: int = 97, eps: float = 0.02, **fields) -> dict:
  return dict(hidden_size=d, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
              intermediate_size=mlp, vocab_size=vocab, rms_norm_eps=eps, max_position_embeddings=64, bos_token_id=1,
              eos_token_id=2, **fields)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(factor=4.0, beta_fast=2.0, beta_slow=0.1, original_max_position_embeddings=16)
EPS = {'rms_norm_eps': 1e-6}

MODELS = {
  'llama': Golden(
    config=dict(model_type='llama', **shape(36, 9, 3, 3, 44), head_dim=8, attention_bias=True, mlp_bias=True,
                rope_parameters=rope(100.0, 'llama3', **LLAMA3)),
    off=(EPS, {'rope_parameters': rope(100.0)}, {'rope_parameters': {'high_freq_factor': 2.0}}),
    hub=old_rope(100.0, 'llama3', **LLAMA3)),
  'llama_tied': Golden(
    config=dict(model_type='llama', **shape(40, 5, 1, 2, 44), tie_word_embeddings=True, rope_parameters=rope(500.0)),
    off=(EPS, {'rope_parameters': rope(100.0)}),
    hub={'head_dim': GONE, 'mlp_bias': GONE, **old_rope(500.0)}),
  'mistral': Golden(
    config=dict(model_type='mistral', **shape(40, 5, 1, 2, 44), head_dim=12, sliding_window=7, rope_parameters=rope(1000.0)),
    off=(EPS, {'sliding_window': None}, {'sliding_window': 8}, {'rope_parameters': rope(100.0)}),
    hub={'rope_parameters': GONE, 'rope_theta': 1000.0}),
  'qwen3': Golden(
    config=dict(model_type='qwen3', **shape(40, 6, 2, 2, 44), head_dim=16, tie_word_embeddings=True,
                rope_parameters=rope(1000.0, 'yarn', **YARN)),
    off=(EPS, {'rope_parameters': rope(1000.0)}, {'rope_parameters': {'attention_factor': 1.0}},
         {'rope_parameters': {'truncate': False}}),
    hub=old_rope(1000.0, 'yarn', **YARN)),
  'qwen3_window': Golden(
    config=dict(model_type='qwen3', **shape(32, 3, 3, 5, 28), head_dim=8, attention_bias=True, use_sliding_window=True,
                sliding_window=9, max_window_layers=2, rope_parameters=rope(1000.0)),
    off=(EPS, {'use_sliding_window': False}, {'max_window_layers': 1}, {'sliding_window': 10}),
    hub={'layer_types': GONE, **old_rope(1000.0)}),
  'qwen3_moe': Golden(
    config=dict(model_type='qwen3_moe', **shape(32, 6, 2, 3, 28), head_dim=12, num_experts=7, num_experts_per_tok=3,
                moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[1], rope_parameters=rope(1000.0)),
    off=(EPS, {'norm_topk_prob': False}, {'num_experts_per_tok': 2}),
    hub={'num_local_experts': GONE, 'num_experts': 7, **old_rope(1000.0)}),
  'qwen3_moe_norenorm': Golden(
    config=dict(model_type='qwen3_moe', **shape(32, 6, 2, 3, 28), head_dim=12, num_experts=6, num_experts_per_tok=2,
                moe_intermediate_size=12, decoder_sparse_step=2, tie_word_embeddings=True, rope_parameters=rope(1000.0)),
    off=(EPS, {'norm_topk_prob': True})),
  'qwen3_moe_sharded': Golden(
    config=dict(model_type='qwen3_moe', **shape(32, 6, 2, 2, 28), head_dim=12, num_experts=5, num_experts_per_tok=2,
                moe_intermediate_size=12, norm_topk_prob=True, rope_parameters=rope(1000.0)),
    max_shard_size='12KB'),
  'gemma2': Golden(
    config=dict(model_type='gemma2', **shape(36, 6, 3, 5, 40), head_dim=10, query_pre_attn_scalar=17, sliding_window=6,
                attn_logit_softcapping=3.0, final_logit_softcapping=5.0, rope_parameters=rope(1000.0)),
    off=(EPS, {'query_pre_attn_scalar': 10}, {'sliding_window': 7}, {'attn_logit_softcapping': None},
         {'final_logit_softcapping': None}),
    hub={'layer_types': GONE, 'tie_word_embeddings': GONE, **old_rope(1000.0)}),
  'gemma3': Golden(
    config=dict(model_type='gemma3_text', **shape(28, 4, 2, 8, 28), head_dim=12, query_pre_attn_scalar=17, sliding_window=6,
                rope_parameters={'sliding_attention': rope(100.0), 'full_attention': rope(1000.0, 'linear', factor=8.0)}),
    off=(EPS, {'query_pre_attn_scalar': 12}, {'sliding_window': 7}, {'rope_parameters': {'full_attention': {'factor': 4.0}}},
         {'rope_parameters': {'full_attention': {'rope_theta': 100.0}}},
         {'rope_parameters': {'sliding_attention': {'rope_theta': 1000.0}}}, {'layer_types': ['sliding_attention'] * 8}),
    hub={'layer_types': GONE, 'sliding_window_pattern': 6, 'tie_word_embeddings': GONE, 'rope_local_base_freq': 100.0,
         **old_rope(1000.0, 'linear', factor=8.0)}),
  'olmo2': Golden(
    config=dict(model_type='olmo2', **shape(36, 9, 3, 3, 40), rope_parameters=rope(1000.0)),
    off=(EPS, {'rope_parameters': rope(100.0)}),
    hub=old_rope(1000.0)),
  'gpt2': Golden(
    config=dict(model_type='gpt2', n_embd=30, n_head=3, n_layer=3, n_inner=44, n_positions=48, vocab_size=97,
                layer_norm_epsilon=0.02, bos_token_id=2, eos_token_id=2),
    off=({'layer_norm_epsilon': 1e-6}, {'activation_function': 'relu'}),
    in_out=('c_attn', 'c_proj', 'c_fc'), draw={'wpe': (0.0, 0.3)}),
  'gpt2_bare': Golden(
    config=dict(model_type='gpt2', n_embd=20, n_head=5, n_layer=1, n_positions=40, vocab_size=67, bos_token_id=2,
                eos_token_id=2),
    in_out=('c_attn', 'c_proj', 'c_fc'), draw={'wpe': (0.0, 0.3)}, bare=True),
  'gpt_oss': Golden(
    config=dict(model_type='gpt_oss', **shape(32, 6, 2, 3, 14), head_dim=16, num_local_experts=5, num_experts_per_tok=2,
                sliding_window=5, swiglu_limit=1.5, rope_parameters=rope(1000.0, 'yarn', truncate=False, **YARN)),
    off=(EPS, {'sliding_window': 6}, {'swiglu_limit': 7.0}, {'rope_parameters': {'truncate': True}},
         {'rope_parameters': {'attention_factor': 1.0}}),
    in_out=('experts.gate_up_proj', 'experts.down_proj'), draw={'bias': (0.0, 0.5), 'sinks': (1.0, 1.0)},
    hub={'swiglu_alpha': GONE, 'experts_per_token': 2, 'initial_context_length': 16,
         **old_rope(1000.0, 'yarn', truncate=False, **YARN)}),
  'deepseek_v3': Golden(
    config=dict(model_type='deepseek_v3', **shape(32, 3, 3, 3, 28), q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6,
                qk_rope_head_dim=8, v_head_dim=10, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=2,
                num_experts_per_tok=3, moe_intermediate_size=10, n_group=4, topk_group=2, routed_scaling_factor=1.7,
                attention_bias=True, rope_parameters=rope(100.0, 'yarn', mscale=1.0, mscale_all_dim=0.6, **YARN)),
    off=(EPS, {'topk_group': 4}, {'n_group': 2}, {'norm_topk_prob': False}, {'routed_scaling_factor': 1.0},
         {'rope_interleave': False}, {'rope_parameters': {'mscale': 0.6}}, {'rope_parameters': {'mscale_all_dim': 0.0}},
         {'rope_parameters': rope(100.0)}),
    draw={'e_score_correction_bias': (0.0, 0.3)},
    hub={'head_dim': GONE, 'rope_interleave': GONE, 'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc',
         **old_rope(100.0, 'yarn', mscale=1.0, mscale_all_dim=0.6, type='yarn', **YARN)}),
  'deepseek_v3_noq': Golden(  # Moonlight's shape
    config=dict(model_type='deepseek_v3', **shape(32, 5, 5, 3, 28), q_lora_rank=None, kv_lora_rank=12, qk_nope_head_dim=8,
                qk_rope_head_dim=6, v_head_dim=8, first_k_dense_replace=2, n_routed_experts=6, n_shared_experts=1,
                num_experts_per_tok=2, moe_intermediate_size=10, n_group=1, topk_group=1, routed_scaling_factor=2.446,
                norm_topk_prob=False, rope_parameters=rope(100.0)),
    off=(EPS, {'norm_topk_prob': True}, {'routed_scaling_factor': 1.0}, {'rope_interleave': False}),
    draw={'e_score_correction_bias': (0.0, 0.3)}, hub={'head_dim': GONE, 'rope_interleave': GONE, **old_rope(100.0)}),
}
