"""DeepSeek-V3's mixture of experts, which GLM-4.5 has too: its keys and its tensors.

The first layers have an MLP and the others experts and a shared MLP; experts are selected with a bias, from groups.
"""

from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import LeftOut, Tensor, within
from maxlm.hf.tables import EXPERTS, MLP, MLP_WEIGHTS, first
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.models.decoder import DecoderConfig

MLPS = (
  *MLP,
  *EXPERTS,
  *within('mlp.shared_experts.', 'mlp.shared.', MLP_WEIGHTS),
  Tensor('mlp.gate.weight', 'E D', 'mlp.w_router_DE'),
  Tensor('mlp.gate.e_score_correction_bias', 'E', 'mlp.select_bias_E', fp32=True),
)


def read_mlps(keys: Keys, n_layers: int, *, n_experts: int, dense: int, scale: float, groups: int = 1,
              groups_kept: int = 1) -> list[MlpSpec | MoeSpec]:
  """Of each layer. n_experts to groups_kept: what the family takes where its config does not say; dense: first layers."""
  for key, only in (('scoring_func', 'sigmoid'), ('topk_method', 'noaux_tc'), ('moe_layer_freq', 1)):
    keys.fixed(key, only)
  keys.inert('ep_size')  # over how many devices they trained it
  keys.inert('num_nextn_predict_layers', 'num_mtp_layers')  # `prediction_layers`
  activation, d_ff = keys.activation(default='silu'), keys.size('moe_intermediate_size')
  moe = MoeSpec(
    n_experts=keys.size('n_routed_experts', keys.size('num_local_experts', n_experts)),
    k=keys.size('num_experts_per_tok', 8), experts=MlpSpec(d_ff=d_ff, activation=activation),
    shared=MlpSpec(d_ff=d_ff * keys.size('n_shared_experts', 1), activation=activation), score='sigmoid', select_bias=True,
    groups=keys.size('n_group', groups), groups_kept=keys.size('topk_group', groups_kept),
    normalise=keys.bool('norm_topk_prob', True), scale=keys.float('routed_scaling_factor', scale))
  mlp = MlpSpec(d_ff=keys.size('intermediate_size'), activation=activation)
  dense = keys.int('first_k_dense_replace', dense)
  return [mlp if i < dense else moe for i in range(n_layers)]


def write_mlps(model: DecoderConfig) -> dict[str, Any]:
  """The keys that `read_mlps` understands. ValueError if no layer has experts and a shared MLP."""
  mlp, moe = first(model, 'mlp', MlpSpec), first(model, 'mlp', MoeSpec)
  if moe is None or moe.shared is None:
    raise ValueError('layers after the first ones have experts and a shared MLP')
  return {
    'first_k_dense_replace': sum(type(layer.mlp) is MlpSpec for layer in model.layers),
    'intermediate_size': (mlp or moe.experts).d_ff, 'hidden_act': 'silu', 'n_routed_experts': moe.n_experts,
    'num_experts_per_tok': moe.k, 'moe_intermediate_size': moe.experts.d_ff,
    'n_shared_experts': moe.shared.d_ff // moe.experts.d_ff, 'n_group': moe.groups, 'topk_group': moe.groups_kept,
    'norm_topk_prob': moe.normalise, 'routed_scaling_factor': moe.scale, 'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc', 'num_nextn_predict_layers': 0}


def prediction_layers(model: DecoderConfig) -> LeftOut:
  """What stands behind the last layer in published files: it predicts more than the next token."""
  after = '|'.join(str(model.n_layers + i) for i in range(4))
  return LeftOut(rf'model\.layers\.({after})\..*', 'layers that predict the tokens after the next (multi-token prediction)')
