"""Kimi Linear: Kimi Delta Attention, and latent attention without positions in every fourth layer; DeepSeek-V3's experts."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.deepseek_v3 import LATENT_ATTENTION
from maxlm.hf.keys import FULL, LINEAR, Keys
from maxlm.hf.mapping import Either, Entry, Tensor, within
from maxlm.hf.mixtral import EXPERTS
from maxlm.hf.tables import MLP, MLP_WEIGHTS, PRE_NORMS, embeddings, first, pattern
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('kimi_linear',)

DELTA_ATTENTION = tuple(within('self_attn.', 'mixer.', (
  Tensor('q_proj.weight', 'KQ D', 'w_q_DKQ'),
  Tensor('k_proj.weight', 'KQ D', 'w_k_DKQ'),
  Tensor('v_proj.weight', 'NH D', 'w_v_DNH'),
  Tensor('q_conv1d.weight', 'KQ 1 W', 'conv_q_WKQ'),
  Tensor('k_conv1d.weight', 'KQ 1 W', 'conv_k_WKQ'),
  Tensor('v_conv1d.weight', 'NH 1 W', 'conv_v_WNH'),
  Tensor('b_proj.weight', 'N D', 'w_beta_DN'),
  Tensor('f_a_proj.weight', 'R D', 'w_decay_down_DR'),
  Tensor('f_b_proj.weight', 'NQ R', 'w_decay_up_RNQ'),
  Tensor('dt_bias', 'NQ', 'dt_bias_NQ', fp32=True),
  Tensor('A_log', '1 1 N 1', 'a_log_N', fp32=True),
  Tensor('g_a_proj.weight', 'R D', 'w_gate_down_DR'),
  Tensor('g_b_proj.weight', 'NH R', 'w_gate_up_RNH'),
  Tensor('o_norm.weight', 'D', 'out_norm.scale_D'),
  Tensor('o_proj.weight', 'D NH', 'w_o_NHD'),
)))
MLPS = (
  Either(MLP, within('block_sparse_moe.', 'mlp.', MLP_WEIGHTS)),  # the second is how transformers writes it
  *EXPERTS,
  *within('block_sparse_moe.shared_experts.', 'mlp.shared.', MLP_WEIGHTS),
  Tensor('block_sparse_moe.gate.e_score_correction_bias', 'E', 'mlp.select_bias_E', fp32=True),
)


def read_config(keys: Keys) -> DecoderConfig:
  n_heads, n_layers = keys.size('num_attention_heads', 32), keys.size('num_hidden_layers', 27, most=10_000)
  keys.fixed('num_key_value_heads', n_heads)
  keys.fixed('attention_bias', False)
  keys.fixed('hidden_act', 'silu')  # also of the convolutions
  for key, only in (('mla_use_nope', True), ('moe_router_activation_func', 'sigmoid'), ('moe_layer_freq', 1)):
    keys.fixed(key, only)
  keys.inert('head_dim', 'qk_head_dim', 'model_max_length', 'rope_theta', 'rope_scaling', 'rope_parameters')
  attention = MlaSpec(
    n_heads=n_heads, q_rank=keys.size('q_lora_rank', None), kv_rank=keys.size('kv_lora_rank', 512), rope=None,
    nope_dim=keys.size('qk_nope_head_dim', 128), rope_dim=keys.size('qk_rope_head_dim', 64),
    v_dim=keys.size('v_head_dim', 128))
  published = Keys(keys.dict('linear_attn_config', {}), f'{keys.where}: linear_attn_config')
  heads = published.size('num_heads', keys.size('linear_num_heads', 32))
  head_dim = published.size('head_dim', keys.size('linear_head_dim', 128))
  conv_width = published.size('short_conv_kernel_size', keys.size('linear_conv_kernel_dim', 4))
  delta = DeltaSpec(n_heads=heads, n_key_heads=heads, head_dim=head_dim, key_dim=head_dim, conv_width=conv_width,
                    decay='channel')
  kinds = keys.layer_types(n_layers, (LINEAR, FULL), _kinds(published, n_layers))
  published.done()
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 163840), d_model=keys.size('hidden_size', 2304), n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention if kind == FULL else delta, mlp=mlp)
                     for kind, mlp in zip(kinds, _mlps(keys, n_layers))]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def _kinds(published: Keys, n_layers: int) -> list[str]:
  """Of each layer; published configs count from 1. ValueError unless each layer is of one kind."""
  full, linear = (published.list(f'{kind}_layers', (int,), None) for kind in ('full_attn', 'kda'))
  if full is None and linear is None:
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(n_layers)]
  if sorted([*(full or ()), *(linear or ())]) != list(range(1, n_layers + 1)):
    raise ValueError(f'{published.where}: full_attn_layers and kda_layers must have each of 1 to {n_layers} once')
  return [FULL if i in full else LINEAR for i in range(1, n_layers + 1)]


def _mlps(keys: Keys, n_layers: int) -> list[MlpSpec | MoeSpec]:
  d_ff, groups = keys.size('moe_intermediate_size', 1024), keys.size('num_expert_group', 1)
  if not keys.bool('use_grouped_topk', True) and groups > 1:
    raise ValueError(f'{keys.where}: use_grouped_topk=false contradicts num_expert_group={groups}')
  moe = MoeSpec(
    n_experts=keys.size('num_experts', 256), k=keys.size('num_experts_per_token', 8), experts=MlpSpec(d_ff=d_ff),
    shared=MlpSpec(d_ff=d_ff * keys.size('num_shared_experts', 1)), score='sigmoid', select_bias=True, groups=groups,
    groups_kept=keys.size('topk_group', 1), normalise=keys.bool('moe_renormalize', True),
    scale=keys.float('routed_scaling_factor', 2.446))
  mlp = {'dense': MlpSpec(d_ff=keys.size('intermediate_size', 9216)), 'sparse': moe}
  dense = keys.int('first_k_dense_replace', 1)
  default = ['dense' if i < dense else 'sparse' for i in range(n_layers)]
  return [mlp[kind] for kind in keys.layer_types(n_layers, tuple(mlp), default, key='mlp_layer_types')]


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, delta = first(model, 'mixer', MlaSpec), first(model, 'mixer', DeltaSpec)
  mlp, moe = first(model, 'mlp', MlpSpec), first(model, 'mlp', MoeSpec)
  if attention is None or delta is None or moe is None or moe.shared is None:
    raise ValueError('it has layers of delta and of latent attention, and experts beside a shared one')
  where = {kind: [i for i, layer in enumerate(model.layers, 1) if type(layer.mixer) is kind]
           for kind in (MlaSpec, DeltaSpec)}
  return {
    'model_type': 'kimi_linear', 'architectures': ['KimiLinearForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_attention_heads': attention.n_heads,
    'num_key_value_heads': attention.n_heads, 'q_lora_rank': attention.q_rank, 'kv_lora_rank': attention.kv_rank,
    'qk_nope_head_dim': attention.nope_dim, 'qk_rope_head_dim': attention.rope_dim, 'v_head_dim': attention.v_dim,
    'mla_use_nope': True,
    'linear_attn_config': {
      'full_attn_layers': where[MlaSpec], 'kda_layers': where[DeltaSpec], 'head_dim': delta.head_dim,
      'num_heads': delta.n_heads, 'short_conv_kernel_size': delta.conv_width},
    'first_k_dense_replace': sum(type(layer.mlp) is MlpSpec for layer in model.layers),
    'intermediate_size': (mlp or moe.experts).d_ff, 'moe_intermediate_size': moe.experts.d_ff, 'hidden_act': 'silu',
    'num_experts': moe.n_experts, 'num_experts_per_token': moe.k, 'num_expert_group': moe.groups,
    'num_shared_experts': moe.shared.d_ff // moe.experts.d_ff, 'topk_group': moe.groups_kept, 'use_grouped_topk': True,
    'moe_layer_freq': 1, 'moe_router_activation_func': 'sigmoid', 'moe_renormalize': moe.normalise,
    'routed_scaling_factor': moe.scale, 'rms_norm_eps': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  for i, layer in enumerate(model.layers):
    mixer = LATENT_ATTENTION if isinstance(layer.mixer, MlaSpec) else DELTA_ATTENTION
    yield from within(f'model.layers.{i}.', f'layers.{i}.', (*PRE_NORMS, *mixer, *MLPS))
