"""MiniMax-Text-01 and M1: lightning attention in seven layers of eight, experts, and the normalised state as the residual.

`minimax` is transformers' name for it, the others are those of the code that was published with the weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from maxlm.hf.keys import FULL, LINEAR, Keys
from maxlm.hf.mapping import Constant, Entry, Given, Tensor, within
from maxlm.hf.mixtral import EXPERTS
from maxlm.hf.rope import read_rope, write_rope
from maxlm.hf.tables import ATTENTION, PRE_NORMS, embeddings, first, pattern, size_keys, specs
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.lightning import LightningSpec, slopes
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('minimax', 'minimax_text_01', 'minimax_m1')

LIGHTNING = (
  Tensor('self_attn.qkv_proj.weight', 'N(H|H|H) D', 'mixer.w_q_DNH | mixer.w_k_DNH | mixer.w_v_DNH'),
  Tensor('self_attn.output_gate.weight', 'NH D', 'mixer.w_gate_DNH'),
  Tensor('self_attn.norm.weight', 'D', 'mixer.out_norm.scale_D'),
  Tensor('self_attn.out_proj.weight', 'D NH', 'mixer.w_o_NHD'),
)


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, n_layers = keys.size('hidden_size'), keys.size('num_attention_heads'), keys.layers()
  if not keys.bool('postnorm', keys.str('model_type') == 'minimax'):
    raise ValueError(f'{keys.where}: postnorm=false, a residual that is not normalised, is not supported')
  keys.fixed('hidden_act', 'silu')  # also of lightning attention
  keys.fixed('shared_intermediate_size', 0)
  keys.inert('shared_moe_mode')
  keys.size('block_size', 256, most=4096)  # for `constants`
  head_dim = keys.size('head_dim', d_model // n_heads)
  rotated = keys.size('rotary_dim', head_dim)
  if rotated != head_dim:
    keys.note(f'rotary_dim={rotated} of {head_dim}, as the model was trained; transformers 5.23 rotates whole heads')
  mixer = {
    LINEAR: LightningSpec(n_heads=n_heads, head_dim=head_dim),
    FULL: AttentionSpec(n_heads=n_heads, n_kv_heads=keys.size('num_key_value_heads', 8, null=n_heads), head_dim=head_dim,
                        rope=read_rope(keys, theta=1_000_000.0, fraction=rotated / head_dim),
                        window=keys.size('sliding_window', None))}
  moe = MoeSpec(n_experts=keys.size('num_local_experts', keys.size('num_experts', 8)),
                k=keys.size('num_experts_per_tok', 2), experts=MlpSpec(d_ff=keys.size('intermediate_size')))
  mixer_scales = {LINEAR: _scales(keys, 'linear_attn', 'linear_attention'),
                  FULL: _scales(keys, 'full_attn', 'full_attention')}
  mlp_scales = _scales(keys, 'mlp', 'mlp')
  full = keys.list('attn_type_list', (int,), [1 - i % 2 for i in range(n_layers)], length=n_layers)
  kinds = keys.layer_types(n_layers, (LINEAR, FULL), [FULL if each else LINEAR for each in full])
  return DecoderConfig(
    vocab_size=keys.size('vocab_size'), d_model=d_model, n_layers=n_layers,
    pattern=pattern([LayerSpec(mixer=mixer[kind], mlp=moe, norm='carried', mixer_scales=mixer_scales[kind],
                               mlp_scales=mlp_scales) for kind in kinds]),
    tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('rms_norm_eps', 1e-5), cast='before'))


def _scales(keys: Keys, name: str, first_name: str) -> tuple[float, float]:
  """Of the residual and of what is added to it."""
  alpha, beta = (keys.float(f'{name}_{which}_factor', keys.float(f'layernorm_{first_name}_{which}', 1.0))
                 for which in ('alpha', 'beta'))
  return alpha, beta


def write_config(model: DecoderConfig) -> dict[str, Any]:
  attention, lightning = first(model, 'mixer', AttentionSpec), first(model, 'mixer', LightningSpec)
  moe = specs(model, 'mlp', MoeSpec)[0]
  if attention is None or lightning is None:
    raise ValueError('it has layers of lightning attention and of attention')
  scales = {'mlp': model.layers[0].mlp_scales}
  for layer in model.layers:
    scales['full_attn' if isinstance(layer.mixer, AttentionSpec) else 'linear_attn'] = layer.mixer_scales
  rope = write_rope(attention.rope)
  return {
    'model_type': 'minimax', 'architectures': ['MiniMaxForCausalLM'], **size_keys(model, attention, moe.experts),
    'layer_types': [FULL if isinstance(layer.mixer, AttentionSpec) else LINEAR for layer in model.layers],
    'sliding_window': attention.window, 'num_local_experts': moe.n_experts, 'num_experts_per_tok': moe.k,
    **{f'{name}_{which}_factor': scale for name, both in scales.items() for which, scale in zip(('alpha', 'beta'), both)},
    'hidden_act': 'silu', 'rotary_dim': attention.rope.rotated(attention.head_dim), **rope}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model)
  for i, layer in enumerate(model.layers):
    mixer = ATTENTION
    if isinstance(layer.mixer, LightningSpec):
      mixer = (*LIGHTNING, Given('mixer.decay_N', slopes(layer.mixer.n_heads, i, model.n_layers)))
    yield from within(f'model.layers.{i}.', f'layers.{i}.', (*PRE_NORMS, *mixer, *EXPERTS))


def constants(model: DecoderConfig, config: dict[str, Any]) -> Iterator[Constant]:
  """What transformers makes of the decays for its blocks of tokens, and writes. The first code does not."""
  if config['model_type'] == 'minimax':
    for i, layer in enumerate(model.layers):
      if isinstance(layer.mixer, LightningSpec):
        yield from decays(f'model.layers.{i}.self_attn.', slopes(layer.mixer.n_heads, i, model.n_layers),
                          config.get('block_size') or 256)


def decays(prefix: str, slope_N: np.ndarray, size: int) -> Iterator[Constant]:
  """Of the states at each token of a block (N11, NT1), and from each to each later one (1NTS)."""
  slope_N11, N = slope_N[:, None, None].astype(np.float64), len(slope_N)
  i_T1 = np.arange(1, size + 1)[:, None]
  apart_TS = i_T1 - i_T1.T
  yield Constant(prefix + 'slope_rate', (N, 1, 1), lambda: slope_N11)
  yield Constant(prefix + 'query_decay', (N, size, 1), lambda: np.exp(-slope_N11 * i_T1))
  yield Constant(prefix + 'key_decay', (N, size, 1), lambda: np.exp(-slope_N11 * (size - i_T1)))
  yield Constant(prefix + 'diagonal_decay', (1, N, size, size),
                 lambda: np.where(apart_TS >= 0, np.exp(-slope_N11 * np.maximum(apart_TS, 0)), 0)[None])
