"""Mamba-2: layers of a Mamba-2 mixer alone. Mistral's Codestral Mamba is one."""

import math
from collections.abc import Iterator
from typing import Any

from maxlm.hf.keys import Keys
from maxlm.hf.mapping import Entry, Tensor, within
from maxlm.hf.tables import embeddings, layers, specs
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

MODEL_TYPES = ('mamba2',)
INFINITY = {'__float__': 'Infinity'}  # as transformers 5 writes it; JSON has none

# Within the mixer, for all families that have one.
MAMBA2_WEIGHTS = (
  Tensor('in_proj.weight', '(NH|NH|KQ|KQ|N) D', 'w_z_DNH | w_x_DNH | w_b_DKQ | w_c_DKQ | w_dt_DN'),
  Tensor('conv1d.weight', '(NH|KQ|KQ) 1 W', 'conv_x_WNH | conv_b_WKQ | conv_c_WKQ'),
  Tensor('conv1d.bias', '(NH|KQ|KQ)', 'b_conv_x_NH | b_conv_b_KQ | b_conv_c_KQ'),
  Tensor('dt_bias', 'N', 'dt_bias_N', fp32=True),
  Tensor('A_log', 'N', 'a_log_N', fp32=True),
  Tensor('D', 'N', 'skip_N'),
  Tensor('norm.weight', 'NH', 'norm_scale_NH'),
  Tensor('out_proj.weight', 'D NH', 'w_o_NHD'),
)
BLOCK_NORM = Tensor('norm.weight', 'D', 'mixer_pre_norm.scale_D')


def read_config(keys: Keys) -> DecoderConfig:
  d_model, n_heads, head_dim = keys.size('hidden_size', 4096), keys.size('num_heads', 128), keys.size('head_dim', 64)
  if keys.size('expand', 2) * d_model != n_heads * head_dim:
    raise ValueError(f'{keys.where}: expand * hidden_size must be num_heads * head_dim, {n_heads * head_dim}')
  keys.fixed('hidden_act', 'silu')
  keys.fixed('use_bias', False)
  keys.fixed('rms_norm', True)
  keys.fixed('intermediate_size', n_heads * head_dim)
  keys.inert('chunk_size', 'residual_in_fp32', 'rescale_prenorm_residual', 'time_step_rank', 'time_step_min',
             'time_step_max', 'time_step_floor', 'time_step_scale', 'time_step_init_scheme', 'layer_types',
             'norm_before_gate')  # transformers has it after, whatever this says
  mixer = Mamba2Spec(
    n_heads=n_heads, head_dim=head_dim, state_dim=keys.size('state_size', 128), n_groups=keys.size('n_groups', 8),
    conv_width=keys.size('conv_kernel', 4), conv_bias=keys.bool('use_conv_bias', True), **read_time_step_limit(keys))
  return DecoderConfig(
    vocab_size=keys.size('vocab_size', 32768), d_model=d_model, n_layers=keys.size('num_hidden_layers', 64),
    pattern=(LayerSpec(mixer=mixer, mlp=None),), tied_embeddings=keys.bool('tie_word_embeddings', False),
    norm=NormSpec(eps=keys.float('layer_norm_epsilon', 1e-5), cast='before'))


def read_time_step_limit(keys: Keys) -> dict[str, float | None]:
  """dt_min and dt_max of a Mamba2Spec."""
  low, high = keys.list('time_step_limit', (int, float, dict), [0.0, math.inf], length=2)
  high = math.inf if high == INFINITY else high
  if isinstance(low, dict) or isinstance(high, dict):
    raise ValueError(f'{keys.where}: time_step_limit={[low, high]} must be two numbers')
  return {'dt_min': float(low), 'dt_max': None if high == math.inf else float(high)}


def write_time_step_limit(mixer: Mamba2Spec) -> dict[str, Any]:
  """Nothing where there is no limit: infinity can't be written so that all read it."""
  if mixer.dt_max is None and mixer.dt_min == 0:
    return {}
  return {'time_step_limit': [mixer.dt_min, INFINITY if mixer.dt_max is None else mixer.dt_max]}


def write_config(model: DecoderConfig) -> dict[str, Any]:
  mixer = specs(model, 'mixer', Mamba2Spec)[0]
  expand, rest = divmod(mixer.n_heads * mixer.head_dim, model.d_model)
  if rest:
    raise ValueError(f'n_heads * head_dim={mixer.n_heads * mixer.head_dim} is not a multiple of d_model={model.d_model}')
  return {
    'model_type': 'mamba2', 'architectures': ['Mamba2ForCausalLM'], 'vocab_size': model.vocab_size,
    'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers, 'num_heads': mixer.n_heads,
    'head_dim': mixer.head_dim, 'expand': expand, 'state_size': mixer.state_dim, 'n_groups': mixer.n_groups,
    'conv_kernel': mixer.conv_width, 'use_conv_bias': mixer.conv_bias, 'use_bias': False, 'hidden_act': 'silu',
    'layer_norm_epsilon': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings, **write_time_step_limit(mixer)}


def tensors(model: DecoderConfig) -> Iterator[Entry]:
  yield from embeddings(model, 'backbone.embeddings.weight', 'backbone.norm_f.weight')
  table = (BLOCK_NORM, *within('mixer.', 'mixer.', MAMBA2_WEIGHTS))
  yield from layers(model, table, theirs='backbone.layers.')
