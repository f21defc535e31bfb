"""Nemotron-H and Nemotron 3: blocks of one sublayer each: Mamba-2, attention without positions, an MLP or experts.

Time steps are at least time_step_min, as transformers has it; the published code takes time_step_limit, which is no limit.
"""

from collections.abc import Iterator
from types import NoneType
from typing import Any

from maxlm.hf.keys import FULL, LINEAR, Keys
from maxlm.hf.mamba2 import MAMBA2_WEIGHTS, read_time_step_limit
from maxlm.hf.mapping import Either, Entry, LeftOut, Tensor, within
from maxlm.hf.tables import ATTENTION_WEIGHTS, MLP_WEIGHTS, embeddings, first, pattern
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('nemotron_h',)

LETTERS = {'M': LINEAR, 'E': 'moe', '*': FULL, '-': 'mlp'}  # of hybrid_override_pattern
FORMER_NAMES = {'mamba': LINEAR, 'attention': FULL}

BLOCK = {  # by its mixer
  Mamba2Spec: (Tensor('norm.weight', 'D', 'mixer_pre_norm.scale_D'), *within('mixer.', 'mixer.', MAMBA2_WEIGHTS)),
  AttentionSpec: (Tensor('norm.weight', 'D', 'mixer_pre_norm.scale_D'), *within('mixer.', 'mixer.', ATTENTION_WEIGHTS)),
  NoneType: (
    Tensor('norm.weight', 'D', 'mlp_pre_norm.scale_D'),
    *within('mixer.', 'mlp.', MLP_WEIGHTS),
    *within('mixer.shared_experts.', 'mlp.shared.', MLP_WEIGHTS),
    Tensor('mixer.gate.weight', 'E D', 'mlp.w_router_DE'),
    Tensor('mixer.gate.e_score_correction_bias', 'E', 'mlp.select_bias_E', fp32=True),
    Tensor('mixer.fc1_latent_proj.weight', 'R D', 'mlp.w_latent_in_DR'),
    Tensor('mixer.fc2_latent_proj.weight', 'D R', 'mlp.w_latent_out_RD'),
    Either((Tensor('mixer.experts.{E}.up_proj.weight', 'F D', 'mlp.w_up_EDF'),
            Tensor('mixer.experts.{E}.down_proj.weight', 'D F', 'mlp.w_down_EFD')),
           (Tensor('mixer.experts.up_proj', 'E F D', 'mlp.w_up_EDF'),
            Tensor('mixer.experts.down_proj', 'E D F', 'mlp.w_down_EFD'))),
  ),
}


def read_config(keys: Keys) -> DecoderConfig:
  for key in ('attention_bias', 'mlp_bias', 'use_bias', 'mamba_proj_bias', 'tie_word_embeddings'):
    keys.fixed(key, False)
  keys.fixed('mamba_hidden_act', 'silu')
  keys.fixed('sliding_window')  # only null
  keys.inert('chunk_size', 'expand', 'mamba_ssm_cache_dtype', 'use_mamba_kernels', 'num_logits_to_keep', 'residual_in_fp32',
             'rescale_prenorm_residual', 'time_step_max', 'time_step_floor', 'time_step_rank')
  keys.inert('n_shared_experts', 'moe_shared_expert_overlap')  # there is one
  keys.inert('num_nextn_predict_layers', 'mtp_layers_block_type', 'mtp_hybrid_override_pattern')
  keys.inert('rope_theta', 'partial_rotary_factor', 'rope_scaling', 'rope_parameters')  # there are no positions
  eps = keys.float('layer_norm_epsilon', 1e-5)
  keys.fixed('rms_norm_eps', eps)
  keys.fixed('norm_eps', eps)
  activation, kinds = keys.activation('mlp_hidden_act', 'relu2'), _kinds(keys)
  n_heads = keys.size('num_attention_heads', 32)
  moe = MoeSpec(
    n_experts=keys.size('n_routed_experts', 8), k=keys.size('num_experts_per_tok', 2),
    experts=MlpSpec(d_ff=keys.size('moe_intermediate_size', 7688), activation=activation, gated=False),
    shared=MlpSpec(d_ff=keys.size('moe_shared_expert_intermediate_size', 7688), activation=activation, gated=False),
    latent=keys.size('moe_latent_size', None), score='sigmoid', select_bias=True, groups=keys.size('n_group', 1),
    groups_kept=keys.size('topk_group', 1), normalise=keys.bool('norm_topk_prob', True),
    scale=keys.float('routed_scaling_factor', 1.0))
  block = {
    LINEAR: LayerSpec(mixer=_mamba2(keys), mlp=None), 'moe': LayerSpec(mixer=None, mlp=moe),
    FULL: LayerSpec(mlp=None, mixer=AttentionSpec(
      n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads), rope=None,
      head_dim=keys.size('head_dim', keys.size('attention_head_dim', 128)))),
    'mlp': LayerSpec(mixer=None, mlp=MlpSpec(d_ff=keys.size('intermediate_size', 21504), activation=activation,
                                             gated=False))}
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 131072), d_model=keys.size('hidden_size', 4096), n_layers=len(kinds),
    pattern=pattern([block[kind] for kind in kinds]), norm=NormSpec(eps=eps))


def _kinds(keys: Keys) -> list[str]:
  """Of each block, from a list of words or a text of letters; where there are both they must agree."""
  letters = keys.str('hybrid_override_pattern', None)
  spelled = None if letters is None else [LETTERS.get(letter, letter) for letter in letters]
  words = keys.list('layers_block_type', (str,), keys.list('layer_types', (str,), None)) or spelled or list(LETTERS.values())
  kinds = [FORMER_NAMES.get(word, word) for word in words]
  if unknown := sorted(set(kinds) - set(LETTERS.values())):
    raise ValueError(f'{keys.where}: there is a block of {unknown[0]!r}, and this family knows {" ".join(LETTERS.values())}')
  if spelled not in (None, kinds) or keys.size('num_hidden_layers', len(kinds)) != len(kinds):
    raise ValueError(f'{keys.where}: layers_block_type, hybrid_override_pattern and num_hidden_layers contradict each other')
  return kinds


def _mamba2(keys: Keys) -> Mamba2Spec:
  if read_time_step_limit(keys) != {'dt_min': 0.0, 'dt_max': None}:
    raise ValueError(f'{keys.where}: a time_step_limit is not supported; transformers takes time_step_min alone')
  return Mamba2Spec(
    n_heads=keys.size('mamba_num_heads', 128), head_dim=keys.size('mamba_head_dim', 64),
    state_dim=keys.size('ssm_state_size', 128), n_groups=keys.size('n_groups', 8), conv_width=keys.size('conv_kernel', 4),
    conv_bias=keys.bool('use_conv_bias', True), dt_min=keys.float('time_step_min', 0.001))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  kinds = [_kind(layer) for layer in model.layers]
  config = {
    'model_type': 'nemotron_h', 'architectures': ['NemotronHForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'layers_block_type': kinds,
    'hybrid_override_pattern': ''.join(letter for kind in kinds for letter, word in LETTERS.items() if word == kind),
    'layer_norm_epsilon': model.norm.eps, 'tie_word_embeddings': False}
  if mamba2 := first(model, 'mixer', Mamba2Spec):
    config |= {
      'mamba_num_heads': mamba2.n_heads, 'mamba_head_dim': mamba2.head_dim, 'ssm_state_size': mamba2.state_dim,
      'n_groups': mamba2.n_groups, 'conv_kernel': mamba2.conv_width, 'use_conv_bias': mamba2.conv_bias,
      'time_step_min': mamba2.dt_min}
  if attention := first(model, 'mixer', AttentionSpec):
    config |= {'num_attention_heads': attention.n_heads, 'num_key_value_heads': attention.n_kv_heads,
               'head_dim': attention.head_dim}
  if mlp := first(model, 'mlp', MlpSpec):
    config |= {'intermediate_size': mlp.d_ff, 'mlp_hidden_act': mlp.activation}
  if moe := first(model, 'mlp', MoeSpec):
    config |= {
      'n_routed_experts': moe.n_experts, 'num_experts_per_tok': moe.k, 'moe_intermediate_size': moe.experts.d_ff,
      'moe_shared_expert_intermediate_size': moe.shared.d_ff if moe.shared else 1, 'moe_latent_size': moe.latent,
      'n_group': moe.groups, 'topk_group': moe.groups_kept, 'norm_topk_prob': moe.normalise,
      'routed_scaling_factor': moe.scale, 'mlp_hidden_act': moe.experts.activation}
  return config


def _kind(layer: LayerSpec) -> str:
  match layer.mixer, layer.mlp:
    case Mamba2Spec(), None:
      return LINEAR
    case AttentionSpec(), None:
      return FULL
    case None, MlpSpec():
      return 'mlp'
    case None, MoeSpec():
      return 'moe'
  raise ValueError('its layers are one sublayer each: Mamba-2, attention, an MLP or experts')


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  """transformers has 'model.' in memory where published files have 'backbone.'."""
  yield Either(*([
    *embeddings(model, f'{prefix}embeddings.weight', f'{prefix}norm_f.weight'),
    *(entry for i, layer in enumerate(model.layers)
      for entry in within(f'{prefix}layers.{i}.', f'layers.{i}.', BLOCK[type(layer.mixer)]))]
    for prefix in ('backbone.', 'model.')))
  yield LeftOut(r'mtp\..*', 'layers that predict the tokens after the next (multi-token prediction)')
