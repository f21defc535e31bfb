"""The fixtures of make_hf_goldens.py: one tiny configuration for each trap of a family.

Dimensions are odd where a family allows it, windows and original lengths shorter than the sequence, layer patterns longer
than a period and with a remainder; norms have a large eps, so that one at the wrong site shows.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import torch

GONE = object()  # a field that is not in the published config.json


@dataclasses.dataclass(kw_only=True, slots=True)
class Golden:
  """config: model_type and fields of its configuration class. off: changes of config, each of which must change the logits.
  hub: changes that give the published spelling of config.json. draw: part of a weight's name -> (mean, std); the last that
  matches counts. fixed: parts of names of constants that are saved as if they were weights, in fp32. in_out: parts of names
  of matrices stored (in, out). length: T, tokens of a row. files: the tensors by name that a published checkpoint holds for
  those that transformers saves, where it saves others."""

  config: dict
  off: tuple[dict, ...] = ()
  hub: dict = dataclasses.field(default_factory=dict)
  hub_model_type: bool = False
  draw: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  fixed: tuple[str, ...] = ()
  in_out: tuple[str, ...] = ()
  length: int = 32
  cache_differs: bool = False
  max_shard_size: str = '1GB'
  files: Callable[[dict], dict] = lambda tensors: tensors


def rope(theta: float, kind: str = 'default', **fields) -> dict:
  return {'rope_type': kind, 'rope_theta': theta, **fields}


def old_rope(theta: float, kind: str | None = None, **fields) -> dict:
  """The spelling of transformers 4: rope_theta, and rope_scaling if there is any."""
  return {'rope_parameters': GONE, 'rope_theta': theta, 'rope_scaling': kind and {'rope_type': kind, **fields}}


def shape(d: int, heads: int, kv_heads: int, layers: int, mlp: int, vocab: int = 97, eps: float = 0.02, **fields) -> dict:
  return dict(hidden_size=d, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=layers,
              intermediate_size=mlp, vocab_size=vocab, rms_norm_eps=eps, max_position_embeddings=64, bos_token_id=1,
              eos_token_id=2, **fields)


def bare_gpt2(tensors: dict) -> dict:
  """As the first GPT-2 checkpoints: no prefix, and with the causal masks, which are no weights."""
  bare = {name.removeprefix('transformer.'): tensor for name, tensor in tensors.items()}
  P = len(bare['wpe.weight'])
  mask = torch.ones(1, 1, P, P).tril()
  return bare | {name.replace('c_attn.bias', 'bias'): mask.clone() for name in bare if name.endswith('c_attn.bias')}


def all_bf16(tensors: dict) -> dict:
  """Apertus' constants are in bf16 too."""
  return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def split_convolutions(tensors: dict) -> dict:
  """OLMo-hybrid's kernels of q, k and v, each as wide as those are; transformers saves three equal parts of all of them."""
  tensors = dict(tensors)
  for name in [name for name in tensors if name.endswith('q_conv1d.weight')]:
    names = [name.replace('q_conv1d', f'{part}_conv1d') for part in 'qkv']
    widths = [len(tensors[name.replace('conv1d', 'proj')]) for name in names]
    parts = torch.cat([tensors[name] for name in names]).split(widths)
    tensors |= {name: part.clone() for name, part in zip(names, parts)}
  return tensors


def published_olmo_hybrid(tensors: dict) -> dict:
  """And the norms' names of now; transformers saves those of the first release, which it reads too."""
  return {name.replace('.attention_layer_norm.', '.input_layernorm.')
          .replace('.feedforward_layer_norm.', '.post_attention_layernorm.'): tensor
          for name, tensor in split_convolutions(tensors).items()}


def published_kimi_linear(tensors: dict) -> dict:
  """Its dense layers are called mlp; transformers saves them as if they were mixtures of experts."""
  return {re.sub(r'block_sparse_moe(\.(gate|up|down)_proj)', r'mlp\1', name): tensor for name, tensor in tensors.items()}


def nemotron_h(pattern: str, **fields) -> dict:
  kinds = {'M': 'linear_attention', '*': 'full_attention', 'E': 'moe', '-': 'mlp'}
  return dict(layers_block_type=[kinds[kind] for kind in pattern], hidden_size=24, vocab_size=97, num_attention_heads=3,
              num_key_value_heads=1, head_dim=10, intermediate_size=28, mamba_num_heads=6, mamba_head_dim=5,
              ssm_state_size=8, n_groups=3, chunk_size=7, n_routed_experts=6, num_experts_per_tok=2,
              moe_intermediate_size=10, moe_shared_expert_intermediate_size=14, routed_scaling_factor=1.7,
              layer_norm_epsilon=0.02, max_position_embeddings=64, **fields)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(factor=4.0, beta_fast=2.0, beta_slow=0.1, original_max_position_embeddings=16)
K2_YARN = dict(factor=4.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, original_max_position_embeddings=16)
LONGROPE = dict(long_factor=[1.0, 1.3, 2.1, 3.0, 3.7, 4.0], short_factor=[1.0, 1.1, 1.2, 1.5, 1.6, 1.9])
EPS = {'rms_norm_eps': 1e-6}
NO_LIMIT = {'time_step_limit': [0.0, math.inf]}  # written as Infinity, which is not JSON but is what there is
SSM = [0.8, 1.2, 0.7, 1.3, 0.9]
FALCON_H1 = dict(
  mamba_d_ssm=36, mamba_n_heads=4, mamba_d_head=9, mamba_d_state=8, mamba_chunk_size=7, rope_parameters=rope(1000.0),
  embedding_multiplier=2.0, lm_head_multiplier=0.6, key_multiplier=0.7, attention_in_multiplier=1.2, ssm_multipliers=SSM,
  attention_out_multiplier=0.8, ssm_in_multiplier=1.3, ssm_out_multiplier=0.7, mlp_multipliers=[0.8, 0.7])
DECAY = {'A_log': (-1.0, 0.5), 'dt_bias': (-1.0, 0.5)}  # states that live for several tokens

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
    in_out=('c_attn', 'c_proj', 'c_fc'), draw={'wpe': (0.0, 0.3)}, files=bare_gpt2),
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
  'kimi_k2': Golden(
    config=dict(model_type='deepseek_v3', **shape(32, 4, 4, 3, 28), q_lora_rank=10, kv_lora_rank=14, qk_nope_head_dim=8,
                qk_rope_head_dim=8, v_head_dim=6, first_k_dense_replace=1, n_routed_experts=7, n_shared_experts=1,
                num_experts_per_tok=3, moe_intermediate_size=10, n_group=1, topk_group=1, routed_scaling_factor=2.827,
                rope_parameters=rope(100.0, 'yarn', **K2_YARN)),
    off=(EPS, {'rope_parameters': {'beta_slow': 0.1}}, {'rope_parameters': {'mscale_all_dim': 0.0}}),
    draw={'e_score_correction_bias': (0.0, 0.3)},
    hub={'model_type': 'kimi_k2', 'head_dim': GONE, 'rope_interleave': GONE, 'scoring_func': 'sigmoid',
         'topk_method': 'noaux_tc', **old_rope(100.0, 'yarn', type='yarn', **K2_YARN)}, hub_model_type=True),
  'llm360_k2': Golden(
    config=dict(model_type='llama', **shape(36, 3, 3, 2, 40, vocab=100) | {'bos_token_id': None}, pad_token_id=0,
                rope_parameters=rope(1000.0)),
    off=(EPS, {'rope_parameters': rope(100.0)}),
    hub={'head_dim': GONE, **old_rope(1000.0)}),
  'ministral3': Golden(
    config=dict(model_type='ministral3', **shape(40, 5, 1, 2, 44), head_dim=12, tie_word_embeddings=True,
                rope_parameters=rope(1000.0, 'yarn', mscale=1.0, mscale_all_dim=0.6, llama_4_scaling_beta=0.3, **YARN)),
    off=(EPS, {'rope_parameters': {'llama_4_scaling_beta': 0.0}}, {'rope_parameters': {'mscale_all_dim': 1.0}},
         {'rope_parameters': {'beta_slow': 0.01}}),
    length=44),
  'mixtral': Golden(
    config=dict(model_type='mixtral', **shape(36, 6, 2, 2, 16), head_dim=10, num_local_experts=5, num_experts_per_tok=2,
                rope_parameters=rope(1000.0)),
    off=(EPS, {'num_experts_per_tok': 3}),
    hub={'head_dim': 10, **old_rope(1000.0)}),
  'smollm3': Golden(
    config=dict(model_type='smollm3', **shape(36, 6, 2, 5, 36), pad_token_id=0, rope_parameters=rope(1000.0)),
    off=(EPS, {'no_rope_layer_interval': 3}, {'no_rope_layer_interval': 9}),
    hub={'tie_word_embeddings': GONE, **old_rope(1000.0)}),
  'olmo3': Golden(
    config=dict(model_type='olmo3', **shape(36, 3, 1, 5, 32), pad_token_id=0, sliding_window=6, rope_parameters={
      'sliding_attention': rope(500_000.0), 'full_attention': rope(500_000.0, 'yarn', attention_factor=1.3, **YARN)}),
    off=(EPS, {'sliding_window': 7}, {'rope_parameters': {'full_attention': {'attention_factor': 1.0}}},
         {'rope_parameters': {'full_attention': {'factor': 1.0}}},
         {'rope_parameters': {'sliding_attention': rope(500_000.0, 'yarn', attention_factor=1.3, **YARN)}}),
    hub={'layer_types': GONE, **old_rope(500_000.0, 'yarn', attention_factor=1.3, **YARN)}),
  'olmoe': Golden(
    config=dict(model_type='olmoe', **shape(36, 6, 3, 3, 10), pad_token_id=0, num_experts=7, num_experts_per_tok=3,
                rope_parameters=rope(1000.0)),
    off=(EPS, {'norm_topk_prob': True}),
    hub=old_rope(1000.0)),
  'apertus': Golden(
    config=dict(model_type='apertus', **shape(48, 6, 2, 2, 56), pad_token_id=0,
                rope_parameters=rope(100.0, 'llama3', **LLAMA3)),
    off=(EPS, {'rope_parameters': rope(100.0)}),
    fixed=('act_fn.beta', 'act_fn.eps'), draw={'alpha': (0.3, 0.4)}, files=all_bf16,
    hub=old_rope(100.0, 'llama3', **LLAMA3)),
  'glm4_moe': Golden(
    config=dict(model_type='glm4_moe', **shape(32, 6, 2, 3, 28), head_dim=12, attention_bias=True, use_qk_norm=True,
                first_k_dense_replace=1, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=10,
                routed_scaling_factor=1.7, rope_parameters=rope(1000.0, partial_rotary_factor=0.5)),
    off=(EPS, {'rope_parameters': {'partial_rotary_factor': 1.0}}, {'routed_scaling_factor': 1.0},
         {'norm_topk_prob': False}),
    draw={'e_score_correction_bias': (0.0, 0.3)},
    hub={'partial_rotary_factor': 0.5, **old_rope(1000.0)}),
  'glm4_moe_air': Golden(  # no norm of queries and keys; groups, which published ones do not use
    config=dict(model_type='glm4_moe', **shape(32, 6, 2, 3, 28), head_dim=12, attention_bias=True, n_shared_experts=2,
                first_k_dense_replace=2, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=10, n_group=3,
                topk_group=2, rope_parameters=rope(1000.0, partial_rotary_factor=0.5)),
    off=(EPS, {'topk_group': 3}), draw={'e_score_correction_bias': (0.0, 0.3)},
    hub={'partial_rotary_factor': 0.5, **old_rope(1000.0)}),
  'minimax_m2': Golden(
    config=dict(model_type='minimax_m2', **shape(32, 6, 2, 3, 10), head_dim=12, num_local_experts=6, num_experts_per_tok=3,
                rope_parameters=rope(1000.0, partial_rotary_factor=0.5)),
    off=(EPS, {'rope_parameters': {'partial_rotary_factor': 1.0}}, {'num_experts_per_tok': 2}),
    draw={'e_score_correction_bias': (0.0, 0.3)},
    hub={'rope_parameters': GONE, 'rope_theta': 1000.0, 'rotary_dim': 6, 'use_qk_norm': True, 'qk_norm_type': 'per_layer',
         'scoring_func': 'sigmoid', 'use_routing_bias': True}),
  'minimax': Golden(
    config=dict(model_type='minimax', **shape(24, 3, 1, 5, 12), head_dim=10, num_local_experts=4, num_experts_per_tok=2,
                layer_types=['linear_attention', 'linear_attention', 'full_attention', 'linear_attention', 'full_attention'],
                block_size=5, full_attn_alpha_factor=1.6, full_attn_beta_factor=0.8, linear_attn_alpha_factor=1.4,
                linear_attn_beta_factor=0.9, mlp_alpha_factor=1.2, mlp_beta_factor=1.1, rope_parameters=rope(1000.0)),
    off=(EPS, *({f'{part}_factor': 1.0} for part in ('full_attn_alpha', 'full_attn_beta', 'linear_attn_alpha',
                                                     'linear_attn_beta', 'mlp_alpha', 'mlp_beta'))),
    fixed=('slope_rate', 'decay')),
  'phi3': Golden(
    config=dict(model_type='phi3', **shape(40, 5, 5, 2, 44), pad_token_id=0, sliding_window=9, rope_parameters=rope(1000.0)),
    off=(EPS, {'sliding_window': None}, {'sliding_window': 10}),
    hub=old_rope(1000.0)),
  'phi3_longrope': Golden(  # beyond the original length: the long factors
    config=dict(model_type='phi3', **shape(48, 3, 1, 2, 40), pad_token_id=0, tie_word_embeddings=True,
                original_max_position_embeddings=16,
                rope_parameters=rope(1000.0, 'longrope', partial_rotary_factor=0.75, **LONGROPE)),
    off=(EPS, {'rope_parameters': {'partial_rotary_factor': 0.5, 'long_factor': LONGROPE['long_factor'][:4],
                                   'short_factor': LONGROPE['short_factor'][:4]}},
         {'rope_parameters': {'attention_factor': 1.0}}, {'original_max_position_embeddings': 32}),
    hub={'partial_rotary_factor': 0.75, **old_rope(1000.0, 'longrope', type='longrope', **LONGROPE)}),
  'phi3_longrope_short': Golden(  # within it: the short ones
    config=dict(model_type='phi3', **shape(48, 3, 1, 1, 40), pad_token_id=0, original_max_position_embeddings=32,
                rope_parameters=rope(1000.0, 'longrope', partial_rotary_factor=0.75, **LONGROPE)),
    off=(EPS, {'original_max_position_embeddings': 31}),
    hub={'partial_rotary_factor': 0.75, **old_rope(1000.0, 'longrope', type='longrope', **LONGROPE)}),
  'qwen3_next': Golden(
    config=dict(model_type='qwen3_next', **shape(24, 3, 1, 5, 28, vocab=67), head_dim=16, linear_num_key_heads=2,
                linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=8, linear_conv_kernel_dim=3,
                num_experts=5, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12,
                mlp_only_layers=[1], rope_parameters=rope(1000.0, partial_rotary_factor=0.25)),
    off=(EPS, {'norm_topk_prob': False}, {'rope_parameters': {'partial_rotary_factor': 0.5}}),
    draw=DECAY, length=72,
    hub={'layer_types': GONE, 'full_attention_interval': 4, 'partial_rotary_factor': 0.25, **old_rope(1000.0)}),
  'olmo_hybrid': Golden(
    config=dict(model_type='olmo_hybrid', **shape(30, 3, 1, 5, 32, vocab=67), pad_token_id=0, linear_num_key_heads=3,
                linear_num_value_heads=3, linear_key_head_dim=6, linear_value_head_dim=10, rope_parameters=rope(1000.0)),
    off=(EPS, {'linear_allow_neg_eigval': False}, {'rope_parameters': {'rope_theta': None}}),
    draw=DECAY | {'linear_attn.o_proj': (0.0, 0.12)}, files=published_olmo_hybrid, length=72),
  'olmo_hybrid_nope': Golden(
    config=dict(model_type='olmo_hybrid', **shape(30, 3, 3, 4, 24, vocab=67), pad_token_id=0, linear_num_key_heads=2,
                linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=8, linear_conv_kernel_dim=3,
                linear_allow_neg_eigval=False, rope_parameters={'rope_type': 'default', 'rope_theta': None}),
    off=(EPS, {'linear_allow_neg_eigval': True}, {'rope_parameters': {'rope_theta': 1000.0}}),
    draw=DECAY | {'linear_attn.o_proj': (0.0, 0.12)}, files=split_convolutions, length=72),
  'kimi_linear': Golden(
    config=dict(model_type='kimi_linear', **shape(24, 3, 3, 5, 28, vocab=67), pad_token_id=0, kv_lora_rank=10,
                qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, linear_head_dim=8, linear_num_heads=3, n_group=3,
                topk_group=2,
                layer_types=['linear_attention', 'linear_attention', 'full_attention', 'linear_attention', 'full_attention'],
                num_local_experts=6, num_experts_per_tok=2, moe_intermediate_size=8),
    off=(EPS, {'topk_group': 3}, {'norm_topk_prob': False}, {'routed_scaling_factor': 1.0}),
    draw=DECAY | {'e_score_correction_bias': (0.0, 0.3)}, files=published_kimi_linear, length=72,
    hub={'layer_types': GONE, 'mlp_layer_types': GONE, 'first_k_dense_replace': 1, 'moe_layer_freq': 1, 'mla_use_nope': True,
         'linear_head_dim': GONE, 'linear_num_heads': GONE, 'linear_conv_kernel_dim': GONE, 'head_dim': GONE,
         'moe_router_activation_func': 'sigmoid', 'use_grouped_topk': True, 'rope_theta': 10000.0, 'rope_scaling': None,
         'linear_attn_config': {'full_attn_layers': [3, 5], 'kda_layers': [1, 2, 4], 'head_dim': 8, 'num_heads': 3,
                                'short_conv_kernel_size': 4}}),
  'nemotron_h': Golden(  # time steps from time_step_min on, which transformers forgets where it decodes with its cache
    config=dict(model_type='nemotron_h', **nemotron_h('MEM*-ME*', time_step_min=0.2, n_group=3, topk_group=2)),
    off=({'layer_norm_epsilon': 1e-6}, {'time_step_min': 0.001}, {'topk_group': 3}, {'norm_topk_prob': False},
         {'routed_scaling_factor': 1.0}),
    draw=DECAY | {'e_score_correction_bias': (0.0, 0.3)}, cache_differs=True,
    hub={'layers_block_type': GONE, 'hybrid_override_pattern': 'MEM*-ME*', 'num_hidden_layers': 8, **NO_LIMIT}),
  'nemotron_h_latent': Golden(
    config=dict(model_type='nemotron_h', **nemotron_h('M-*EME', moe_latent_size=14)),
    off=({'layer_norm_epsilon': 1e-6}, {'norm_topk_prob': False}, {'routed_scaling_factor': 1.0}),
    draw=DECAY | {'e_score_correction_bias': (0.0, 0.3)},
    hub={'layers_block_type': GONE, 'hybrid_override_pattern': 'M-*EME', 'num_hidden_layers': 6, **NO_LIMIT}),
  'mamba2': Golden(
    config=dict(model_type='mamba2', hidden_size=30, num_heads=6, head_dim=10, state_size=8, n_groups=2, expand=2,
                chunk_size=6, num_hidden_layers=3, vocab_size=97, layer_norm_epsilon=0.02, bos_token_id=0, eos_token_id=2,
                pad_token_id=1),
    off=({'layer_norm_epsilon': 1e-6}, {'time_step_limit': [0.3, 0.5]}), draw=DECAY, hub=NO_LIMIT),
  'falcon_h1': Golden(
    config=dict(model_type='falcon_h1', **shape(30, 3, 1, 3, 28), **FALCON_H1, head_dim=8, mamba_n_groups=1),
    off=(EPS, *({name: 1.0} for name in FALCON_H1 if name.endswith('multiplier')), {'mlp_multipliers': [1.0, 0.7]},
         {'mlp_multipliers': [0.8, 1.0]}, *({'ssm_multipliers': [*SSM[:i], 1.0, *SSM[i + 1:]]} for i in range(5))),
    draw=DECAY, hub={'time_step_limit': GONE, **old_rope(1000.0)}),
  'falcon_h1_norm': Golden(
    config=dict(model_type='falcon_h1', **shape(30, 3, 1, 2, 28), **FALCON_H1, head_dim=8, mamba_n_groups=2,
                mamba_rms_norm=True, mamba_norm_before_gate=False, tie_word_embeddings=True),
    off=(EPS, {'mamba_norm_before_gate': True}),
    draw=DECAY, hub={'time_step_limit': GONE, **old_rope(1000.0)}),
}
