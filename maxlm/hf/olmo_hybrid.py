"""OLMo hybrid: three layers of Gated DeltaNet behind norms, then one of attention before them, mostly without positions."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import FULL, LINEAR, Keys
from maxlm.hf.mapping import Either, Entry, Tensor, within
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, MLP, PRE_NORMS, embeddings, first, pattern, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('olmo_hybrid',)
NO_ROPE = {'rope_type': 'default', 'rope_theta': None}

# The norms as published, and as in the first release, which is what transformers writes.
LINEAR_LAYER = (
  Either(PRE_NORMS, (Tensor('attention_layer_norm.weight', 'D', 'mixer_pre_norm.scale_D'),
                     Tensor('feedforward_layer_norm.weight', 'D', 'mlp_pre_norm.scale_D'))),
  Tensor('linear_attn.q_proj.weight', 'KQ D', 'mixer.w_q_DKQ'),
  Tensor('linear_attn.k_proj.weight', 'KQ D', 'mixer.w_k_DKQ'),
  Tensor('linear_attn.v_proj.weight', 'NH D', 'mixer.w_v_DNH'),
  Tensor('linear_attn.q_conv1d.weight', 'KQ 1 W', 'mixer.conv_q_WKQ'),
  Tensor('linear_attn.k_conv1d.weight', 'KQ 1 W', 'mixer.conv_k_WKQ'),
  Tensor('linear_attn.v_conv1d.weight', 'NH 1 W', 'mixer.conv_v_WNH'),
  Tensor('linear_attn.a_proj.weight', 'N D', 'mixer.w_decay_DN'),
  Tensor('linear_attn.b_proj.weight', 'N D', 'mixer.w_beta_DN'),
  Tensor('linear_attn.g_proj.weight', 'NH D', 'mixer.w_gate_DNH'),
  Tensor('linear_attn.dt_bias', 'N', 'mixer.dt_bias_N', fp32=True),
  Tensor('linear_attn.A_log', 'N', 'mixer.a_log_N', fp32=True),
  Tensor('linear_attn.o_norm.weight', 'D', 'mixer.out_norm.scale_D'),
  Tensor('linear_attn.o_proj.weight', 'D NH', 'mixer.w_o_NHD'),
)
FULL_LAYER = (
  Either((Tensor('post_attention_layernorm.weight', 'D', 'mixer_post_norm.scale_D'),),
         (Tensor('feedforward_layer_norm.weight', 'D', 'mixer_post_norm.scale_D'),)),
  Tensor('post_feedforward_layernorm.weight', 'D', 'mlp_post_norm.scale_D'),
  *ATTENTION,
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  bias = keys.bool('attention_bias', False)
  keys.fixed('hidden_act', 'silu')  # also of the convolutions
  keys.inert('linear_a_log_min', 'linear_a_log_max', 'linear_dt_min', 'linear_dt_max', 'linear_dt_init_floor')
  attention = AttentionSpec(
    n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', n_heads), rope=_rope(keys), qk_norm='all', qkv_bias=bias,
    out_bias=bias, head_dim=keys.size('head_dim', d_model // n_heads))
  n_key_heads = keys.size('linear_num_key_heads', n_heads)
  key_dim = keys.size('linear_key_head_dim', 3 * d_model // (4 * n_key_heads))
  delta = DeltaSpec(
    n_heads=keys.size('linear_num_value_heads', n_heads), n_key_heads=n_key_heads, key_dim=key_dim,
    head_dim=keys.size('linear_value_head_dim', 2 * key_dim), conv_width=keys.size('linear_conv_kernel_dim', 4),
    negative_eigenvalues=keys.bool('linear_allow_neg_eigval', True), norm_eps=1e-5)
  default = [LINEAR if (i + 1) % 4 else FULL for i in range(n_layers)]
  kinds = keys.layer_types(n_layers, (LINEAR, FULL), default if FULL in default else [*default[:-1], FULL])
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'))
  layer = {LINEAR: LayerSpec(mixer=delta, mlp=mlp), FULL: LayerSpec(mixer=attention, mlp=mlp, norm='post')}
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers, pattern=pattern([layer[kind] for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', False), norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6)))


def _rope(keys: Keys):
  """None where a theta of null is written out: without any theta transformers takes its default."""
  said = keys.plain.get('rope_parameters') or keys.plain
  if isinstance(said, dict) and 'rope_theta' in said and said['rope_theta'] is None:
    keys.inert('rope_parameters', 'rope_theta')
    keys.fixed('rope_scaling')
    return None
  return read_rope(keys)


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, delta = first(model, 'mixer', AttentionSpec), first(model, 'mixer', DeltaSpec)
  if attention is None or delta is None:
    raise ValueError('it has layers of DeltaNet and of attention')
  return {
    'model_type': 'olmo_hybrid', 'architectures': ['OlmoHybridForCausalLM'],
    **size_keys(model, attention, specs(model, 'mlp', MlpSpec)[0]),
    'layer_types': [FULL if isinstance(layer.mixer, AttentionSpec) else LINEAR for layer in model.layers],
    'attention_bias': attention.qkv_bias, 'linear_num_value_heads': delta.n_heads,
    'linear_num_key_heads': delta.n_key_heads, 'linear_value_head_dim': delta.head_dim,
    'linear_key_head_dim': delta.key_dim, 'linear_conv_kernel_dim': delta.conv_width,
    'linear_allow_neg_eigval': delta.negative_eigenvalues, 'hidden_act': 'silu',
    **({'rope_parameters': NO_ROPE} if attention.rope is None else write_rope(attention.rope))}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  for i, layer in enumerate(model.layers):
    mixer = LINEAR_LAYER if isinstance(layer.mixer, DeltaSpec) else FULL_LAYER
    yield from within(f'model.layers.{i}.', f'layers.{i}.', (*mixer, *MLP))
