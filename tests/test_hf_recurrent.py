"""What the recurrent and hybrid families have of their own: keys that say the same, keys that contradict each other, tensors
that follow from the config. That they compute what transformers computes is tested in test_hf_families.py."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from maxlm import typed_json
from maxlm.checkpoint import Checkpoints
from maxlm.hf import convert, families
from maxlm.hf.tensors import ToWrite, open_directory, write_directory
from maxlm.layers.delta import DeltaSpec
from maxlm.layers.rope import RopeSpec
from maxlm.models.decoder import DecoderConfig

GOLDEN = Path(__file__).parent / 'golden'


def config_of(name: str, **changes) -> dict:
  """The config of a fixture; a key that becomes `...` is not there."""
  config = json.loads((GOLDEN / 'hf' / name / 'config.json').read_text()) | changes
  return {key: value for key, value in config.items() if value is not ...}


def model_of(name: str, **changes) -> DecoderConfig:
  return families.read_config(config_of(name, **changes))[1]


SAME = {
  'mamba2: infinity as published': ('mamba2', {'time_step_limit': [0.0, math.inf]}, {'time_step_limit': ...}),
  'falcon: factors of the input': (
    'falcon_h1', {'attention_in_multiplier': 2.0, 'key_multiplier': 0.5, 'attention_out_multiplier': 0.25},
    {'attention_in_multiplier': 1.0, 'key_multiplier': 2.0, 'attention_out_multiplier': 0.5}),
  'falcon: factors of the state space': (
    'falcon_h1', {'ssm_in_multiplier': 0.5, 'ssm_multipliers': [2.0, 4.0, 1.0, 6.0, 8.0]},
    {'ssm_in_multiplier': 1.0, 'ssm_multipliers': [1.0, 2.0, 0.5, 3.0, 4.0]}),
  'falcon: no factors': ('falcon_h1', {'ssm_multipliers': None, 'mlp_multipliers': None, 'key_multiplier': None},
                         {'ssm_multipliers': [1.0] * 5, 'mlp_multipliers': [1.0] * 2, 'key_multiplier': 1.0}),
  'falcon: widths that follow': ('falcon_h1', {'mamba_d_ssm': None, 'mamba_n_heads': 6, 'mamba_d_head': 'auto'},
                                 {'mamba_d_ssm': 60, 'mamba_n_heads': 6, 'mamba_d_head': 10}),
  'nemotron: former words': (
    'nemotron_h_latent', {'layers_block_type': ['mamba', 'mlp', 'attention', 'moe', 'mamba', 'moe']},
    {'layers_block_type': ..., 'hybrid_override_pattern': 'M-*EME'}),
  'nemotron: positions that nobody adds': ('nemotron_h', {'rope_theta': 10000, 'partial_rotary_factor': 1.0}, {}),
  'olmo: no positions': ('olmo_hybrid', {'rope_parameters': {'rope_theta': None}},
                         {'rope_parameters': ..., 'rope_theta': None, 'rope_scaling': None}),
  'olmo: default positions': ('olmo_hybrid', {'rope_parameters': None}, {'rope_parameters': ..., 'rope_theta': 10000.0}),
  'olmo: widths that follow': ('olmo_hybrid', {
    'linear_num_key_heads': None, 'linear_num_value_heads': None, 'linear_key_head_dim': None, 'linear_value_head_dim': None,
    'num_key_value_heads': None, 'layer_types': None, 'num_hidden_layers': 3}, {
      'linear_num_key_heads': 3, 'linear_num_value_heads': 3, 'linear_key_head_dim': 7, 'linear_value_head_dim': 14,
      'num_key_value_heads': 3, 'layer_types': ['linear_attention'] * 2 + ['full_attention'], 'num_hidden_layers': 3}),
  'minimax: layers that follow': ('minimax', {'layer_types': None},
                                  {'layer_types': [f'{kind}_attention' for kind in ('full', 'linear') * 2 + ('full',)]}),
  'kimi: layers that follow': ('kimi_linear', {'layer_types': None, 'mlp_layer_types': None, 'first_k_dense_replace': 2},
                               {'layer_types': ['linear_attention'] * 4 + ['full_attention'],
                                'mlp_layer_types': ['dense'] * 2 + ['sparse'] * 3}),
}


@pytest.mark.parametrize('name, one, other', SAME.values(), ids=SAME)
def test_two_ways_to_say_the_same(name, one, other):
  assert families.differences(model_of(name, **one), model_of(name, **other)) == []


def test_both_published_spellings_of_minimax_are_the_same_model():
  models = [families.read_config(json.loads((GOLDEN / 'configs' / f'{name}.json').read_text()))
            for name in ('MiniMax-Text-01', 'MiniMax-Text-01-hf')]
  assert families.differences(models[0][1], models[1][1]) == []
  assert models[0][1].layers[7].mixer.rope == RopeSpec(theta=1e7, fraction=0.5)
  assert all('rotary_dim=64 of 128' in note for _, _, [note] in models)


def test_attention_without_positions_is_told_from_one_with_the_default_theta():
  assert model_of('olmo_hybrid_nope').layers[3].mixer.rope is None
  assert model_of('olmo_hybrid_nope', rope_parameters=...).layers[3].mixer.rope == RopeSpec(theta=10_000.0)


REFUSED = {
  'mamba2 expand': ('mamba2', {'expand': 3}, 'expand'),
  'mamba2 biases': ('mamba2', {'use_bias': True}, 'use_bias'),
  'mamba2 limits': ('mamba2', {'time_step_limit': [0.0, {'__float__': 'NaN'}]}, 'time_step_limit'),
  'mamba2 no limits': ('mamba2', {'time_step_limit': [0.5, 0.1]}, 'dt_max=0.1'),
  'qwen3_next biases': ('qwen3_next', {'attention_bias': True}, 'attention_bias'),
  'olmo kind': ('olmo_hybrid', {'layer_types': ['sliding_attention'] * 5}, 'sliding_attention'),
  'falcon scaled biases': ('falcon_h1', {'attention_bias': True}, 'attention_in_multiplier=1.2'),
  'falcon biases': ('falcon_h1', {'projectors_bias': True}, 'projectors_bias'),
  'falcon heads': ('falcon_h1', {'mamba_d_head': 8}, 'mamba_d_head=8 must be 9'),
  'falcon factors': ('falcon_h1', {'ssm_multipliers': [1.0] * 4}, 'ssm_multipliers has 4 items'),
  'nemotron letters': ('nemotron_h', {'layers_block_type': ..., 'hybrid_override_pattern': 'MX'}, "'X'"),
  'nemotron contradiction': ('nemotron_h', {'hybrid_override_pattern': 'MEM*-MEE'}, 'contradict each other'),
  'nemotron count': ('nemotron_h', {'num_hidden_layers': 9}, 'contradict each other'),
  'nemotron limits': ('nemotron_h', {'time_step_limit': [0.0, 0.1]}, 'time_step_limit'),
  'nemotron eps': ('nemotron_h', {'rms_norm_eps': 0.5}, 'rms_norm_eps=0.5'),
  'minimax residual': ('minimax', {'postnorm': False}, 'postnorm'),
  'minimax shared': ('minimax', {'shared_intermediate_size': 8}, 'shared_intermediate_size'),
  'kimi layers': (
    'kimi_linear', {'layer_types': ..., 'linear_attn_config': {'full_attn_layers': [3], 'kda_layers': [1, 2, 4]}},
    'each of 1 to 5 once'),
  'kimi positions': ('kimi_linear', {'mla_use_nope': False}, 'mla_use_nope'),
  'kimi groups': ('kimi_linear', {'use_grouped_topk': False}, 'use_grouped_topk'),
  'kimi unknown': ('kimi_linear', {'linear_attn_config': {'gate_lower_bound': -5.0}}, 'gate_lower_bound'),
}


@pytest.mark.parametrize('name, changes, says', REFUSED.values(), ids=REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused_by_its_key(name, changes, says):
  with pytest.raises(ValueError, match='config.json') as error:
    model_of(name, **changes)
  assert says in str(error.value)


def with_mixer(model: DecoderConfig, kind: type, **changes) -> DecoderConfig:
  """The model with other mixers of that kind."""
  layers = [dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **changes)) if isinstance(layer.mixer, kind)
            else layer for layer in model.layers]
  return dataclasses.replace(model, pattern=tuple(layers))


@pytest.mark.parametrize('name, changes, says', [
  ('qwen3_next', {'negative_eigenvalues': True}, 'negative_eigenvalues=True'),
  ('olmo_hybrid', {'norm_eps': None}, 'norm_eps'), ('olmo_hybrid', {'decay': 'channel'}, 'decay'),
  ('kimi_linear', {'n_key_heads': 1}, 'n_key_heads=1'), ('kimi_linear', {'key_dim': 4}, 'key_dim=4')])
def test_a_delta_rule_that_the_family_does_not_have_is_not_written(name, changes, says):
  model, (family, _, _) = model_of(name), families.read_config(config_of(name))
  with pytest.raises(ValueError, match='cannot express') as error:
    families.write_config(family, with_mixer(model, DeltaSpec, **changes))
  assert says in str(error.value)


# Tensors that follow from the config: those of lightning attention.

SLOPES = 'model.layers.1.self_attn.slope_rate'


def copy_with(target: Path, name: str, change) -> Path:
  """A fixture with other tensors: change takes a dict of arrays and gives one."""
  target.mkdir()
  arrays = {key: tensor.array() for key, tensor in open_directory(GOLDEN / 'hf' / name).items()}
  write_directory(target, [ToWrite(key, a.dtype, a.shape, lambda a=a: a) for key, a in change(arrays).items()], 10**9)
  (target / 'config.json').write_text(json.dumps(config_of(name)))
  return target


def test_decays_may_be_missing_in_a_file_and_are_written(tmp_path, mesh_of):
  source = copy_with(tmp_path / 'hf', 'minimax', lambda arrays: {
    key: a for key, a in arrays.items() if not key.endswith(('decay', 'slope_rate'))})
  with mesh_of(1):
    convert.import_directory(source, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
  mine, theirs = (open_directory(folder) for folder in (tmp_path / 'out', GOLDEN / 'hf' / 'minimax'))
  assert sorted(mine) == sorted(theirs)
  for name in theirs:  # torch's exponential function differs from numpy's in the last bit
    np.testing.assert_allclose(mine[name].array(), theirs[name].array(), rtol=1e-6, atol=1e-7)


def test_decays_in_a_file_may_be_rounded_and_not_wrong(tmp_path, mesh_of):
  rounded, wrong = (copy_with(tmp_path / f'times {factor}', 'minimax', lambda arrays, factor=factor: arrays | {
    SLOPES: (arrays[SLOPES] * np.float32(factor)).astype('bfloat16')}) for factor in (1.0, 1.1))
  with mesh_of(1):
    convert.import_directory(rounded, tmp_path / 'run')
    with pytest.raises(ValueError, match=SLOPES):
      convert.import_directory(wrong, tmp_path / 'other')


def test_other_decays_than_the_formula_gives_are_not_exported(tmp_path, mesh_of):
  with mesh_of(1):
    convert.import_directory(GOLDEN / 'hf' / 'minimax', tmp_path / 'run')
    checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
    meta = checkpoints.meta(0)
    like, _ = convert.parameters_of(typed_json.decode(meta['model'], DecoderConfig))
    params = checkpoints.restore_params(0, like)
    name = next(name for name in params if name.endswith('decay_N'))
    params[name] = jax.device_put(2 * params[name], params[name].sharding)
    changed = Checkpoints(tmp_path / 'changed' / 'checkpoints')
    changed.save(1, params=params, opt=None, meta=meta)
    changed.close()
    with pytest.raises(ValueError, match=r'layers\.\d\.mixer\.decay_N has other values'):
      convert.export_directory(str(tmp_path / 'changed'), tmp_path / 'out')


def test_layers_that_transformers_writes_under_another_name_are_read(tmp_path, mesh_of):
  """It takes the MLP of Kimi's first layer for one of its mixtures."""
  source = copy_with(tmp_path / 'hf', 'kimi_linear', lambda arrays: {
    key.replace('layers.0.mlp.', 'layers.0.block_sparse_moe.'): a for key, a in arrays.items()})
  with mesh_of(1):
    convert.import_directory(source, tmp_path / 'run')
