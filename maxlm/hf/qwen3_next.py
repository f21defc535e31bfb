"""Qwen3-Next: three layers of Gated DeltaNet, then one of attention with an output gate; experts in all layers."""

from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import FULL, LINEAR, Keys
from maxlm.hf.mapping import Entry, LeftOut, Tensor, within
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, EXPERTS, MLP, MLP_WEIGHTS, PRE_NORMS, embeddings, first, pattern, size_keys
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('qwen3_next',)

GATED_ATTENTION = (
  Tensor('self_attn.q_proj.weight', 'N(H|H) D', 'mixer.w_q_DNH | mixer.w_gate_DNH'),
  *(entry for entry in ATTENTION if entry.name != 'self_attn.q_proj.weight'),
)
SHARED = (
  Tensor('mlp.gate.weight', 'E D', 'mlp.w_router_DE'),
  *within('mlp.shared_expert.', 'mlp.shared.', MLP_WEIGHTS),
  Tensor('mlp.shared_expert_gate.weight', '1 D', 'mlp.w_shared_gate_D'),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_layers = keys.size('hidden_size', 2048), keys.size('num_hidden_layers', 48)
  keys.fixed('attention_bias', False)
  keys.fixed('use_sliding_window', False)
  keys.fixed('hidden_act', 'silu')  # also of the convolutions
  attention = AttentionSpec(
    n_heads=keys.size('num_attention_heads', 16), n_kv_heads=keys.size('num_key_value_heads', 2),
    head_dim=keys.size('head_dim', 256), rope=read_rope(keys, fraction=0.25), qk_norm='head', gate='element')
  delta = DeltaSpec(
    n_heads=keys.size('linear_num_value_heads', 32), n_key_heads=keys.size('linear_num_key_heads', 16),
    head_dim=keys.size('linear_value_head_dim', 128), key_dim=keys.size('linear_key_head_dim', 128),
    conv_width=keys.size('linear_conv_kernel_dim', 4))
  mlp = MlpSpec(d_ff=keys.size('intermediate_size', 5632))
  moe = MoeSpec(
    n_experts=keys.size('num_experts', 512), k=keys.size('num_experts_per_tok', 10),
    experts=MlpSpec(d_ff=keys.size('moe_intermediate_size', 512)), normalise=keys.bool('norm_topk_prob', True),
    shared=MlpSpec(d_ff=keys.size('shared_expert_intermediate_size', 512)), shared_gate=True)
  interval, every = keys.size('full_attention_interval', 4), keys.size('decoder_sparse_step', 1)
  kinds = keys.layer_types(n_layers, (LINEAR, FULL), [LINEAR if (i + 1) % interval else FULL for i in range(n_layers)])
  dense = keys.list('mlp_only_layers', (int,), [])
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 151936), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=attention if kind == FULL else delta,
                               mlp=mlp if i in dense or (i + 1) % every else moe) for i, kind in enumerate(kinds)]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-6), one_plus=True))


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, delta = first(model, 'mixer', AttentionSpec), first(model, 'mixer', DeltaSpec)
  mlp, moe = first(model, 'mlp', MlpSpec), first(model, 'mlp', MoeSpec)
  if attention is None or delta is None or moe is None or moe.shared is None:
    raise ValueError('it has layers of DeltaNet and of attention, and experts beside a shared one')
  dense = [i for i, layer in enumerate(model.layers) if isinstance(layer.mlp, MlpSpec)]
  return {
    'model_type': 'qwen3_next', 'architectures': ['Qwen3NextForCausalLM'],
    **size_keys(model, attention, mlp or moe.experts),
    'layer_types': [FULL if isinstance(layer.mixer, AttentionSpec) else LINEAR for layer in model.layers],
    'attention_bias': False, 'linear_num_value_heads': delta.n_heads, 'linear_num_key_heads': delta.n_key_heads,
    'linear_value_head_dim': delta.head_dim, 'linear_key_head_dim': delta.key_dim,
    'linear_conv_kernel_dim': delta.conv_width, 'num_experts': moe.n_experts, 'num_experts_per_tok': moe.k,
    'moe_intermediate_size': moe.experts.d_ff, 'shared_expert_intermediate_size': moe.shared.d_ff,
    'norm_topk_prob': moe.normalise, 'decoder_sparse_step': 1, 'mlp_only_layers': dense,
    'hidden_act': 'silu', **({'partial_rotary_factor': 1.0} | write_rope(attention.rope))}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  for i, layer in enumerate(model.layers):
    mixer = delta_table(layer.mixer) if isinstance(layer.mixer, DeltaSpec) else GATED_ATTENTION
    yield from within(f'model.layers.{i}.', f'layers.{i}.', (*PRE_NORMS, *mixer, *MLP, *SHARED, *EXPERTS))
  yield LeftOut(r'mtp\..*', 'prediction of further tokens')


def delta_table(spec: DeltaSpec) -> tuple[Entry, ...]:
  """Each key head has its queries, keys, and the values and gates of its value heads next to each other."""
  grouped = {'N': 'KG', 'K': spec.n_key_heads}
  return (
    Tensor('linear_attn.in_proj_qkvz.weight', 'K(Q|Q|GH|GH) D',
           'mixer.w_q_DKQ | mixer.w_k_DKQ | mixer.w_v_DNH | mixer.w_gate_DNH', grouped),
    Tensor('linear_attn.in_proj_ba.weight', 'K(G|G) D', 'mixer.w_beta_DN | mixer.w_decay_DN', grouped),
    Tensor('linear_attn.conv1d.weight', '(KQ|KQ|NH) 1 W', 'mixer.conv_q_WKQ | mixer.conv_k_WKQ | mixer.conv_v_WNH'),
    Tensor('linear_attn.dt_bias', 'N', 'mixer.dt_bias_N', fp32=True),
    Tensor('linear_attn.A_log', 'N', 'mixer.a_log_N', fp32=True),
    Tensor('linear_attn.norm.weight', 'D', 'mixer.out_norm.scale_D'),
    Tensor('linear_attn.out_proj.weight', 'D NH', 'mixer.w_o_NHD'),
  )
