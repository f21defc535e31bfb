"""Configs as they are published (golden/configs): every key is read, and the model has the layers and the parameters that it
is known to have. Nothing is computed."""

import collections
import json
import math
from pathlib import Path

import pytest

from maxlm import typed_json
from maxlm.hf import convert, families
from maxlm.hf.mapping import choose
from maxlm.models.decoder import DecoderConfig

CONFIGS = Path(__file__).parent / 'golden' / 'configs'

# File -> layers by the kinds of their mixer and MLP; parameters, all of them or as they are advertised.
PUBLISHED = {
  'DeepSeek-V3': ({'Mla Mlp': 3, 'Mla Moe': 58}, 671_026_419_200),
  'Falcon-H1-0.5B-Base': ({'Parallel Mlp': 36}, 521_411_104),
  'GLM-4.5': ({'Attention Mlp': 3, 'Attention Moe': 89}, '353B'),  # the files have 358B, with the layer left out
  'GLM-4.5-Air': ({'Attention Mlp': 1, 'Attention Moe': 45}, 106_852_251_264),
  'Kimi-K2-Instruct': ({'Mla Mlp': 1, 'Mla Moe': 60}, 1_026_408_232_448),
  'Kimi-Linear-48B-A3B-Instruct': ({'Delta Mlp': 1, 'Delta Moe': 19, 'Mla Moe': 7}, '49B'),
  'Mamba-Codestral-7B-v0.1': ({'Mamba2 -': 64}, 7_285_403_648),
  'MiniMax-M2': ({'Attention Moe': 62}, '229B'),
  'MiniMax-Text-01': ({'Lightning Moe': 70, 'Attention Moe': 10}, '456B'),
  'MiniMax-Text-01-hf': ({'Lightning Moe': 70, 'Attention Moe': 10}, '456B'),
  'Mixtral-8x7B-v0.1': ({'Attention Moe': 32}, 46_702_792_704),
  'Moonlight-16B-A3B': ({'Mla Mlp': 1, 'Mla Moe': 26}, '16B'),
  'NVIDIA-Nemotron-3-Nano-30B-A3B-BF16': ({'Mamba2 -': 23, '- Moe': 23, 'Attention -': 6}, '31.6B'),
  'Nemotron-H-8B-Base-8K': ({'Mamba2 -': 24, '- Mlp': 24, 'Attention -': 4}, '8.1B'),
  'OLMoE-1B-7B-0924': ({'Attention Moe': 16}, 6_919_161_856),
  'Olmo-Hybrid-7B': ({'Delta Mlp': 24, 'Attention Mlp': 8}, '7B'),
  'Qwen3-30B-A3B': ({'Attention Moe': 48}, 30_532_122_624),
  'Qwen3-Next-80B-A3B-Instruct': ({'Delta Moe': 36, 'Attention Moe': 12}, '80B'),
  'gpt-oss-120b': ({'Attention Moe': 36}, 116_829_156_672),
  'gpt-oss-20b': ({'Attention Moe': 24}, 20_914_757_184),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_is_the_model_that_it_is_known_to_be(mesh_of, name):
  layers, expected = PUBLISHED[name]
  config = json.loads((CONFIGS / f'{name}.json').read_text())
  family, model, _ = families.read_config(config)
  kinds = [' '.join(type(part).__name__.removesuffix('Spec').replace('NoneType', '-') for part in (layer.mixer, layer.mlp))
           for layer in model.layers]
  assert collections.Counter(kinds) == layers
  with mesh_of(1):
    like, slots = convert.parameters_of(model)
  convert.bind(choose(family.tensors(model)), slots)  # each parameter has its tensor
  total = sum(math.prod(leaf.shape) for name, leaf in like.items() if not name.endswith('decay_N'))  # these are not trained
  assert (total if isinstance(expected, int) else f'{total / 1e9:.{len(expected.partition(".")[2][:-1])}f}B') == expected
  assert families.differences(model, families.read_config(families.write_config(family, model))[1]) == []


FACTS = {
  'DeepSeek-V3': {'pattern[0].mixer.scale': 192**-0.5 * (0.1 * math.log(40) + 1)**2, 'pattern[0].mixer.bias': False,
                  'pattern[0].mixer.rope.interleaved': True, 'pattern[0].mixer.rope.scaling.amplitude': 1.0,
                  'pattern[60].mlp.groups': 8, 'pattern[60].mlp.groups_kept': 4, 'pattern[60].mlp.scale': 2.5},
  'GLM-4.5-Air': {'pattern[0].mixer.rope.fraction': 0.5, 'pattern[0].mixer.qk_norm': None, 'pattern[1].mlp.scale': 1.0},
  'MiniMax-M2': {'pattern[0].mixer.rope.fraction': 0.5, 'pattern[0].mixer.qk_norm': 'all', 'pattern[0].mlp.shared': None},
  'Moonlight-16B-A3B': {'pattern[0].mixer.q_rank': None, 'pattern[0].mixer.scale': None, 'pattern[1].mlp.shared.d_ff': 2816},
  'OLMoE-1B-7B-0924': {'pattern[0].mlp.normalise': False},
  'Qwen3-30B-A3B': {'pattern[0].mlp.normalise': True, 'pattern[0].mixer.window': None},
  'gpt-oss-20b': {'pattern[0].mixer.window': 128, 'pattern[1].mixer.window': None, 'pattern[0].mlp.experts.limit': 7.0,
                  'pattern[1].mixer.rope.scaling.truncate': False},
}


@pytest.mark.parametrize('name', FACTS)
def test_the_keys_of_a_published_config_mean_what_they_should(name):
  model = families.read_config(json.loads((CONFIGS / f'{name}.json').read_text()))[1]
  flat = typed_json.flat(typed_json.encode(model, DecoderConfig))
  assert {path: flat[path] for path in FACTS[name]} == pytest.approx(FACTS[name])


def test_an_export_names_a_class_that_transformers_has_and_no_code_of_its_own():
  original = json.loads((CONFIGS / 'Kimi-K2-Instruct.json').read_text())
  _, config = convert.config_for(families.read_config(original)[1], {'hf': {'config': original}}, None)
  stays_behind = {'auto_map', 'quantization_config'}
  assert config == {key: original[key] for key in original.keys() - stays_behind} | {'model_type': 'deepseek_v3'}


def test_every_published_config_is_tested():
  assert sorted(path.stem for path in CONFIGS.glob('*.json')) == sorted(PUBLISHED)
