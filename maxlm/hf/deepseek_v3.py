"""DeepSeek-V3 and R1, and what has their architecture: Moonlight, and Kimi K2, which is exported as DeepSeek-V3."""

import math
from collections.abc import Iterator
from typing import Any

from maxlm.hf.deepseek_moe import MLPS, prediction_layers, read_mlps, write_mlps
from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry, Tensor
from maxlm.hf.rope import read_rope, write_rope, yarn_amplitude
from maxlm.hf.tables import PRE_NORMS, embeddings, layers, pattern, specs
from maxlm.layers.mla import MlaSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import YarnScaling
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('deepseek_v3', 'kimi_k2')
EXPORTED_AS = {'kimi_k2': 'deepseek_v3'}

LATENT_ATTENTION = (
  Tensor('self_attn.q_proj.weight', 'NH D', 'mixer.w_q_DNH'),
  Tensor('self_attn.q_a_proj.weight', 'R D', 'mixer.w_q_down_DR'),
  Tensor('self_attn.q_a_proj.bias', 'R', 'mixer.b_q_down_R'),
  Tensor('self_attn.q_a_layernorm.weight', 'D', 'mixer.q_norm.scale_D'),
  Tensor('self_attn.q_b_proj.weight', 'NH D', 'mixer.w_q_up_DNH'),
  Tensor('self_attn.kv_a_proj_with_mqa.weight', '(R|H) D', 'mixer.w_kv_down_DR | mixer.w_k_rope_DH'),
  Tensor('self_attn.kv_a_proj_with_mqa.bias', '(R|H)', 'mixer.b_kv_down_R | mixer.b_k_rope_H'),
  Tensor('self_attn.kv_a_layernorm.weight', 'D', 'mixer.kv_norm.scale_D'),
  Tensor('self_attn.kv_b_proj.weight', 'N(H|H) D', 'mixer.w_k_up_DNH | mixer.w_v_up_DNH'),
  Tensor('self_attn.o_proj.weight', 'D NH', 'mixer.w_o_NHD'),
  Tensor('self_attn.o_proj.bias', 'D', 'mixer.b_o_D'),
)


def read_config(keys: Keys) -> DecoderConfig:
  n_heads, n_layers = keys.size('num_attention_heads'), keys.layers()
  keys.fixed('num_key_value_heads', n_heads)
  keys.inert('head_dim', 'qk_head_dim')  # follow from those below
  attention = MlaSpec(
    n_heads=n_heads, q_rank=keys.size('q_lora_rank', 1536, null=None), kv_rank=keys.size('kv_lora_rank', 512),
    nope_dim=keys.size('qk_nope_head_dim', 128), rope_dim=keys.size('qk_rope_head_dim', 64),
    v_dim=keys.size('v_head_dim', 128), rope=read_rope(keys, interleaved=keys.bool('rope_interleave', True)),
    bias=keys.bool('attention_bias', False))
  scaling = attention.rope.scaling
  if isinstance(scaling, YarnScaling) and (mscale := _rope_keys(keys).get('mscale_all_dim')):
    attention.scale = attention.score_scale * yarn_amplitude(scaling.factor, mscale) ** 2
  mlps = read_mlps(keys, n_layers, n_experts=256, dense=3, scale=2.5, groups=8, groups_kept=4)
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=keys.size('hidden_size'), n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention, mlp=mlp) for mlp in mlps]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), cast='before'))


def _rope_keys(keys: Keys) -> dict[str, Any]:
  return keys.plain.get('rope_parameters') or keys.plain.get('rope_scaling') or {}


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, mlps = specs(model, 'mixer', MlaSpec)[0], write_mlps(model)
  return {
    'model_type': 'deepseek_v3', 'architectures': ['DeepseekV3ForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_heads, 'q_lora_rank': attention.q_rank, 'kv_lora_rank': attention.kv_rank,
    'qk_nope_head_dim': attention.nope_dim, 'qk_rope_head_dim': attention.rope_dim, 'v_head_dim': attention.v_dim,
    'attention_bias': attention.bias, **mlps, 'rms_norm_eps': model.norm.eps,
    'tie_word_embeddings': model.tied_embeddings, **_write_rope(attention)}


def _write_rope(attention: MlaSpec) -> dict[str, Any]:
  """YaRN's `mscale_all_dim` says the scale of the scores; `mscale`, for those who do not know `attention_factor`, the
  amplitude of the rotated parts."""
  keys, scaling = write_rope(attention.rope) | {'rope_interleave': attention.rope.interleaved}, attention.rope.scaling
  stretch = math.sqrt(attention.score_scale * math.sqrt(attention.nope_dim + attention.rope_dim))
  if isinstance(scaling, YarnScaling) and scaling.factor > 1 and not math.isclose(stretch, 1.0):
    amplitude = yarn_amplitude(scaling.factor) if scaling.amplitude is None else scaling.amplitude
    unit = yarn_amplitude(scaling.factor) - 1
    mscales = {'mscale': round((amplitude * stretch - 1) / unit, 9), 'mscale_all_dim': round((stretch - 1) / unit, 9)}
    for key in ('rope_parameters', 'rope_scaling'):
      keys[key] |= mscales
  return keys


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  yield from layers(model, PRE_NORMS, LATENT_ATTENTION, MLPS)
  yield prediction_layers(model)
