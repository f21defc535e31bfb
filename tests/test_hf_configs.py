"""Configs as they are published (golden/configs): every key is read, and the model has the layers and the parameters that it
is known to have. Nothing is computed."""

import collections
import json
import math
from pathlib import Path

import pytest

from maxlm.hf import convert, families
from maxlm.hf.mapping import choose

CONFIGS = Path(__file__).parent / 'golden' / 'configs'

# File -> layers by the kinds of their mixer and MLP; parameters, all of them or as they are advertised.
PUBLISHED = {
  'Falcon-H1-0.5B-Base': ({'Parallel Mlp': 36}, 521_411_104),
  'Kimi-Linear-48B-A3B-Instruct': ({'Delta Mlp': 1, 'Delta Moe': 19, 'Mla Moe': 7}, '49B'),
  'Mamba-Codestral-7B-v0.1': ({'Mamba2 -': 64}, 7_285_403_648),
  'MiniMax-Text-01': ({'Lightning Moe': 70, 'Attention Moe': 10}, '456B'),
  'MiniMax-Text-01-hf': ({'Lightning Moe': 70, 'Attention Moe': 10}, '456B'),
  'NVIDIA-Nemotron-3-Nano-30B-A3B-BF16': ({'Mamba2 -': 23, '- Moe': 23, 'Attention -': 6}, '31.6B'),
  'Nemotron-H-8B-Base-8K': ({'Mamba2 -': 24, '- Mlp': 24, 'Attention -': 4}, '8.1B'),
  'Olmo-Hybrid-7B': ({'Delta Mlp': 24, 'Attention Mlp': 8}, '7B'),
  'Qwen3-Next-80B-A3B-Instruct': ({'Delta Moe': 36, 'Attention Moe': 12}, '80B'),
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


def test_every_published_config_is_tested():
  assert sorted(path.stem for path in CONFIGS.glob('*.json')) == sorted(PUBLISHED)
