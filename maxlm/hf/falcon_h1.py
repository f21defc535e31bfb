"""Falcon-H1: attention and Mamba-2 side by side in each layer, and a factor at every place that muP has one for.

Some factors are the same thing here: that of the attention's input and that of its keys are a scale of the scores and one
of its output, and that of the Mamba-2's input is in those of its parts. A config that is written has an equivalent set.
"""

import math
from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mamba2 import MAMBA2_WEIGHTS, read_time_step_limit, write_time_step_limit
from maxlm.hf.mapping import Entry, Tensor, within
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION_WEIGHTS, MLP_WEIGHTS, embeddings, layers, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('falcon_h1',)

LAYER = (
  Tensor('input_layernorm.weight', 'D', 'mixer_pre_norm.scale_D'),
  Tensor('pre_ff_layernorm.weight', 'D', 'mlp_pre_norm.scale_D'),
  *within('self_attn.', 'mixer.mixers.0.', ATTENTION_WEIGHTS),
  *within('mamba.', 'mixer.mixers.1.', MAMBA2_WEIGHTS),
  *within('feed_forward.', 'mlp.', MLP_WEIGHTS),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model = keys.size('hidden_size', 4096)
  keys.fixed('hidden_act', 'silu')  # also of the convolutions
  keys.inert('mamba_chunk_size', 'mamba_use_mlp', 'mlp_expansion_factor', 'num_logits_to_keep', 'layers_block_type')
  mlp_scales = keys.list('mlp_multipliers', (int, float), [1.0, 1.0], length=2)
  mlp = MlpSpec(d_ff=keys.size('intermediate_size', 14336), bias=keys.bool('mlp_bias', False),
                gate_scale=float(mlp_scales[0]), out_scale=float(mlp_scales[1]))
  mixer = ParallelSpec(mixers=(_attention(keys, d_model), _mamba2(keys, d_model)))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 128000), d_model=d_model, n_layers=keys.size('num_hidden_layers', 32),
    pattern=(LayerSpec(mixer=mixer, mlp=mlp),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    embed_scale=keys.float('embedding_multiplier', 1.0), logits_scale=keys.float('lm_head_multiplier', 1.0),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def _attention(keys: Keys, d_model: int) -> AttentionSpec:
  n_heads, bias = keys.size('num_attention_heads', 32), keys.bool('attention_bias', False)
  head_dim = keys.size('head_dim', d_model // n_heads)
  in_scale, key_scale = keys.float('attention_in_multiplier', 1.0), keys.float('key_multiplier', 1.0)
  if bias and in_scale != 1.0:
    raise ValueError(f'{keys.where}: attention_in_multiplier={in_scale} is not supported with attention_bias')
  score_scale = in_scale**2 * key_scale
  return AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads), head_dim=head_dim, rope=read_rope(keys),
    qkv_bias=bias, out_bias=bias, scale=None if score_scale == 1.0 else score_scale * head_dim**-0.5,
    out_scale=in_scale * keys.float('attention_out_multiplier', 1.0))


def _mamba2(keys: Keys, d_model: int) -> Mamba2Spec:
  for bias in ('mamba_proj_bias', 'projectors_bias'):
    keys.fixed(bias, False)
  n_heads, expanded = keys.size('mamba_n_heads', 128), keys.size('mamba_expand', 2) * d_model
  inner = keys.size('mamba_d_ssm', 1024, null=expanded)
  head_dim = keys.take('mamba_d_head', (int, str), 'auto')
  head_dim = inner // n_heads if head_dim == 'auto' else head_dim
  if head_dim != inner / n_heads:
    raise ValueError(f'{keys.where}: mamba_d_head={head_dim} must be {inner / n_heads}, its part of {inner}')
  in_scale = keys.float('ssm_in_multiplier', 1.0)
  in_scales = keys.list('ssm_multipliers', (int, float), [1.0] * 5, length=5)
  norm_first, norm = keys.bool('mamba_norm_before_gate', True), keys.bool('mamba_rms_norm', False)
  return Mamba2Spec(
    n_heads=n_heads, head_dim=head_dim, state_dim=keys.size('mamba_d_state', 256), n_groups=keys.size('mamba_n_groups', 1),
    conv_width=keys.size('mamba_d_conv', 4), conv_bias=keys.bool('mamba_conv_bias', True), **read_time_step_limit(keys),
    norm='none' if not norm else 'norm_first' if norm_first else 'gate_first',
    in_scales=tuple(in_scale * scale for scale in in_scales), out_scale=keys.float('ssm_out_multiplier', 1.0))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  mixers, mlp = specs(model, 'mixer', ParallelSpec)[0].mixers, specs(model, 'mlp', MlpSpec)[0]
  if [type(mixer) for mixer in mixers] != [AttentionSpec, Mamba2Spec]:
    raise ValueError('its layers have attention and Mamba-2 side by side, in this order')
  attention, mamba2 = mixers
  return {
    'model_type': 'falcon_h1', 'architectures': ['FalconH1ForCausalLM'], **size_keys(model, attention, mlp),
    'embedding_multiplier': model.embed_scale, 'lm_head_multiplier': model.logits_scale,
    'attention_bias': attention.qkv_bias, 'attention_in_multiplier': 1.0,
    'key_multiplier': attention.score_scale * math.sqrt(attention.head_dim),
    'attention_out_multiplier': attention.out_scale, 'mamba_d_ssm': mamba2.n_heads * mamba2.head_dim,
    'mamba_n_heads': mamba2.n_heads, 'mamba_d_head': mamba2.head_dim, 'mamba_d_state': mamba2.state_dim,
    'mamba_n_groups': mamba2.n_groups, 'mamba_d_conv': mamba2.conv_width, 'mamba_conv_bias': mamba2.conv_bias,
    'mamba_rms_norm': mamba2.norm != 'none', 'mamba_norm_before_gate': mamba2.norm == 'norm_first',
    'ssm_in_multiplier': 1.0, 'ssm_multipliers': list(mamba2.in_scales), 'ssm_out_multiplier': mamba2.out_scale,
    **write_time_step_limit(mamba2), 'mlp_bias': mlp.bias, 'mlp_multipliers': [mlp.gate_scale, mlp.out_scale],
    'hidden_act': 'silu', **write_rope(attention.rope)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model, norm='model.final_layernorm.weight')
  yield from layers(model, LAYER)
