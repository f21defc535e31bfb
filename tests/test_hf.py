"""Conversion from and to Hugging Face directories: the engine, and files that are not what they say.

The language of maps is tested in test_hf_mapping.py; that each family computes what transformers computes, in
test_hf_families.py.
"""

import dataclasses
import fnmatch
import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from configs import quickstart
from data_pipeline.tokenizer import END_OF_TEXT
from maxlm import lora, typed_json
from maxlm.checkpoint import Checkpoints, find, lineage
from maxlm.hf import convert, families
from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.hf.mapping import choose
from maxlm.hf.rope import read_rope, read_ropes, write_rope, write_ropes
from maxlm.hf.tensors import INDEX, ToWrite, open_directory, write_directory
from maxlm.layers.rope import LinearScaling, Llama3Scaling, LongRopeScaling, RopeSpec, YarnScaling
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.restore import load_params
from maxlm.sharding import MeshConfig, make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)
LLAMA = {'model_type': 'llama', 'vocab_size': 64, 'hidden_size': 16, 'num_hidden_layers': 3, 'num_attention_heads': 4,
         'num_key_value_heads': 2, 'intermediate_size': 24, 'head_dim': 6, 'rope_theta': 500.0, 'torch_dtype': 'bfloat16'}
MIXTRAL = LLAMA | {'model_type': 'mixtral', 'num_local_experts': 4, 'num_experts_per_tok': 2, 'sliding_window': None}
Q_PROJ, UP_PROJ = 'model.layers.1.self_attn.q_proj.weight', 'model.layers.2.mlp.up_proj.weight'


def tensors_of(config: dict, dtype=BF16) -> dict[str, np.ndarray]:
  """Random tensors of a model of that config, under their names."""
  family, model, _ = families.read_config(config)
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    _, slots = convert.parameters_of(model)
  bound, _ = convert.bind(choose(family.tensors(model)), slots)
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=b.layout.shape).astype(dtype) for b in bound for name in b.layout.names}


def write(folder, config: dict, tensors: dict[str, np.ndarray], max_shard_bytes: int = 10**9):
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  write_directory(folder, [ToWrite(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()], max_shard_bytes)
  return folder


def contents(folder) -> dict[str, np.ndarray]:
  return {name: np.array(tensor.array()) for name, tensor in open_directory(folder).items()}


def parameters(workdir) -> dict[str, np.ndarray]:
  """What the checkpoint of a workdir holds, as it is stored."""
  checkpoints, step = find(str(workdir))
  meta = checkpoints.meta(step)
  like, _ = convert.parameters_of(typed_json.decode(meta.get('model') or meta['config']['model'], DecoderConfig))
  dtypes = checkpoints.dtypes(step)
  like = {name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name], sharding=leaf.sharding) for name, leaf in like.items()}
  return {name: np.asarray(leaf) for name, leaf in checkpoints.restore_params(step, like).items()}


# Import and export.


@pytest.mark.parametrize('max_shard_bytes', [10**9, 3000])
def test_import_and_export_give_back_every_bit(tmp_path, mesh_of, max_shard_bytes):
  tensors = tensors_of(LLAMA)
  source = write(tmp_path / 'in', LLAMA, tensors, max_shard_bytes)
  assert (source / INDEX).exists() == (max_shard_bytes == 3000)
  with mesh_of(1):
    report = convert.import_directory(source, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out', max_shard_bytes=max_shard_bytes)
  assert report.n_tensors == len(tensors) and report.dtypes == ['bfloat16']
  assert report.n_parameters == sum(a.size for a in tensors.values()) == report.n_bytes // 2
  out = contents(tmp_path / 'out')
  assert {name: a.tobytes() for name, a in out.items()} == {name: a.tobytes() for name, a in tensors.items()}
  assert json.loads((tmp_path / 'out' / 'config.json').read_text()) == LLAMA
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == sorted(p.name for p in source.iterdir())
  assert all(path.stat().st_size <= 3000 + 2000 for path in source.glob('model-*'))  # and its header


@pytest.mark.parametrize('config, sizes', [
  (LLAMA, {'fsdp': 4, 'tensor': 2}), (LLAMA, {'data': 2, 'tensor': 2}), (LLAMA, {'fsdp': 8}),
  (MIXTRAL, {'expert': 4, 'tensor': 2}), (MIXTRAL, {'expert': 2, 'fsdp': 2})],
                         ids=lambda value: value.get('model_type', value))
def test_any_mesh_imports_the_same_and_each_device_reads_its_own_part(tmp_path, mesh_of, monkeypatch, config, sizes):
  source = write(tmp_path / 'in', config, tensors_of(config))
  with mesh_of(1):
    convert.import_directory(source, tmp_path / 'one')
    one = parameters(tmp_path / 'one')
  filled, fill = [], convert.fill
  monkeypatch.setattr(convert, 'fill', lambda *args: (filled.append(args[3].size), fill(*args)))
  with mesh_of(**sizes):
    convert.import_directory(source, tmp_path / 'many')
    like, slots = convert.parameters_of(families.read_config(config)[1])
    for name, leaf in parameters(tmp_path / 'many').items():
      np.testing.assert_array_equal(leaf, one[name], err_msg=name)
    convert.export_directory(str(tmp_path / 'many'), tmp_path / 'out')
  assert {n: a.tobytes() for n, a in contents(tmp_path / 'out').items()} == {
    n: a.tobytes() for n, a in contents(source).items()}
  assert sum(filled) == sum(leaf.size for leaf in like.values())  # nothing is read twice, though some devices share a part
  of_a_device = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in like.items()}
  assert max(filled) == max(math.prod(of_a_device[slot.parameter][slot.row is not None:]) for slot in slots.values())


@pytest.mark.parametrize('stored, asked, expected', [
  ('bfloat16', 'keep', 'bfloat16'), ('float32', 'keep', 'float32'), ('float16', 'keep', 'float16'),
  ('float64', 'keep', 'float32'), ('bfloat16', 'float32', 'float32'), ('float32', 'bfloat16', 'bfloat16')])
def test_dtype_is_kept_or_cast_by_choice(tmp_path, mesh_of, stored, asked, expected):
  tensors = tensors_of(LLAMA, np.dtype(stored))
  with mesh_of(1):
    convert.import_directory(write(tmp_path / 'in', LLAMA, tensors), tmp_path / 'run', asked)
    assert {leaf.dtype.name for leaf in parameters(tmp_path / 'run').values()} == {expected}
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'bf16', 'bfloat16')
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['torch_dtype'] == expected
  for name, array in contents(tmp_path / 'out').items():
    np.testing.assert_array_equal(array, tensors[name].astype(expected))
  for name, array in contents(tmp_path / 'bf16').items():
    assert array.dtype == BF16
    np.testing.assert_array_equal(array, tensors[name].astype(expected).astype(BF16))


def drop(name):
  return lambda tensors: tensors.pop(name)


def rename(name, new):
  return lambda tensors: tensors.update({new: tensors.pop(name)})


def change(name, function):
  return lambda tensors: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize('damage, says', [
  (drop(Q_PROJ), f'missing: {Q_PROJ}$'),
  (rename(Q_PROJ, 'model.layers.1.self_attn.query.weight'),
   f'missing: {Q_PROJ}; not used: model.layers.1.self_attn.query.weight'),
  (lambda tensors: tensors.update({'model.layers.1.self_attn.q_proj.bias': np.zeros(24, BF16)}),
   'not used: model.layers.1.self_attn.q_proj.bias'),
  (lambda tensors: tensors.update({f'x{i}': np.zeros(2, BF16) for i in range(30)}), r'not used: x0, x1, .*x8, .* 18 more'),
  (change(UP_PROJ, np.transpose), rf'of another shape: {UP_PROJ} \(16, 24\), where the config says \(24, 16\)'),
  (change(UP_PROJ, lambda a: a[:-1]), rf'of another shape: {UP_PROJ} \(23, 16\)'),
  (change(UP_PROJ, lambda a: a.astype(np.int32)), f'of a dtype that weights do not have: {UP_PROJ} int32'),
  (change('model.embed_tokens.weight', lambda a: a[:-1]), r'of another shape: model.embed_tokens.weight \(63, 16\)'),
  (change('model.norm.weight', lambda a: a[None]), r'of another shape: model.norm.weight \(1, 16\)'),
])
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, mesh_of, damage, says):
  tensors = tensors_of(LLAMA)
  damage(tensors)
  with mesh_of(1), pytest.raises(ValueError, match=says):
    convert.import_directory(write(tmp_path / 'in', LLAMA, tensors), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def fp8(weight: np.ndarray) -> dict[str, np.ndarray]:
  """A matrix of e4m3 numbers with a factor for each 4 x 8 of them, and what they stand for."""
  rows, columns = weight.shape
  scale = np.linspace(0.5, 2, -(-rows // 4) * -(-columns // 8), dtype=np.float32).reshape(-(-rows // 4), -(-columns // 8))
  few = weight.astype(ml_dtypes.float8_e4m3fn)
  whole = few.astype(np.float32) * np.repeat(np.repeat(scale, 4, 0), 8, 1)[:rows, :columns]
  return {'': few, '_scale_inv': scale, 'plain': whole}


def mxfp4(stack: np.ndarray) -> dict[str, np.ndarray]:
  """As `fp8`: [E, columns, rows] in blocks of 32 columns."""
  E, columns, rows = stack.shape
  codes = np.random.default_rng(1).integers(0, 16, (E, rows, columns))
  scales = np.random.default_rng(2).integers(124, 130, (E, rows, columns // 32))
  numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
  whole = np.concatenate([numbers, -numbers])[codes] * 2.0 ** (np.repeat(scales, 32, -1) - 127)
  packed = (codes[..., ::2] | codes[..., 1::2] << 4).reshape(E, rows, columns // 32, 16)
  return {'_blocks': packed.astype(np.uint8), '_scales': scales.astype(np.uint8), 'plain': whole.swapaxes(1, 2)}


GPT_OSS = {'model_type': 'gpt_oss', 'vocab_size': 48, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2,
           'num_key_value_heads': 2, 'head_dim': 8, 'intermediate_size': 64, 'num_local_experts': 3, 'experts_per_token': 2,
           'num_experts_per_tok': 2, 'sliding_window': 4, 'rope_theta': 150000.0}


@pytest.mark.parametrize('config, quantization, pack, of', [
  (LLAMA, {'quant_method': 'fp8', 'weight_block_size': [4, 8]}, fp8, '_proj.weight'),
  (GPT_OSS, {'quant_method': 'mxfp4', 'modules_to_not_convert': ['lm_head']}, mxfp4, '.experts.*_proj'),
], ids=['fp8', 'mxfp4'])
def test_weights_of_few_bits_are_imported_as_the_numbers_they_stand_for(tmp_path, mesh_of, config, quantization, pack, of):
  few, plain = {}, {}
  for name, array in tensors_of(config, np.dtype('float32')).items():
    packed = pack(array) if fnmatch.fnmatch(name, '*' + of) else {'': array, 'plain': array}
    plain[name] = packed.pop('plain').astype(np.float32)
    few |= {name + ending: part for ending, part in packed.items()}
  assert len(few) > len(plain)
  write(tmp_path / 'few', config | {'quantization_config': quantization}, few)
  write(tmp_path / 'plain', config, plain)
  with mesh_of(4, fsdp=2, tensor=2):
    for source, dtype in (('few', 'float32'), ('plain', 'float32'), ('few', 'keep')):
      convert.import_directory(tmp_path / source, tmp_path / f'{source}_{dtype}', dtype)
    got, expected, kept = (parameters(tmp_path / name) for name in ('few_float32', 'plain_float32', 'few_keep'))
    convert.export_directory(str(tmp_path / 'few_keep'), tmp_path / 'out')
  for name, leaf in expected.items():
    np.testing.assert_array_equal(got[name], leaf, err_msg=name)
    np.testing.assert_array_equal(kept[name], leaf.astype(kept[name].dtype), err_msg=name)
  assert {leaf.dtype.name for leaf in kept.values()} == {'float32', 'bfloat16'}
  assert contents(tmp_path / 'out').keys() == plain.keys()
  assert 'quantization_config' not in json.loads((tmp_path / 'out' / 'config.json').read_text())


def test_a_head_beside_tied_embeddings_must_be_equal_to_them(tmp_path, mesh_of):
  tied = LLAMA | {'tie_word_embeddings': True}
  tensors = tensors_of(tied)
  assert 'lm_head.weight' not in tensors
  embeddings = tensors['model.embed_tokens.weight']
  equal, other = write(tmp_path / 'a', tied, tensors | {'lm_head.weight': embeddings}), embeddings.copy()
  other[3, 5] += 1
  other = write(tmp_path / 'b', tied, tensors | {'lm_head.weight': other})
  with mesh_of(1):
    convert.import_directory(equal, tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
    with pytest.raises(ValueError, match='not a copy: lm_head.weight of model.embed_tokens.weight'):
      convert.import_directory(other, tmp_path / 'no')
  assert contents(tmp_path / 'out').keys() == tensors.keys()


def test_rows_of_embeddings_beyond_the_vocabulary_are_kept(tmp_path, mesh_of):
  tensors = tensors_of(LLAMA | {'vocab_size': 72})
  with mesh_of(1):
    report = convert.import_directory(write(tmp_path / 'in', LLAMA, tensors), tmp_path / 'run')
    convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out')
  assert 'has 72 rows for a vocabulary of 64' in report.notes[0]
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['vocab_size'] == 72
  assert {n: a.tobytes() for n, a in contents(tmp_path / 'out').items()} == {n: a.tobytes() for n, a in tensors.items()}


def test_buffers_of_angles_are_left_out_and_told(tmp_path, mesh_of):
  tensors = tensors_of(LLAMA) | {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': np.ones(3, np.float32) for i in range(3)}
  with mesh_of(1):
    report = convert.import_directory(write(tmp_path / 'in', LLAMA, tensors), tmp_path / 'run')
  assert report.notes[0].startswith('left out model.layers.0.self_attn.rotary_emb.inv_freq and 2 more')


def test_a_workdir_or_directory_that_is_in_use_is_left_alone(tmp_path, mesh_of):
  source = write(tmp_path / 'in', LLAMA, tensors_of(LLAMA))
  with mesh_of(1):
    convert.import_directory(source, tmp_path / 'run')
    with pytest.raises(FileExistsError, match='has a model already'):
      convert.import_directory(source, tmp_path / 'run')
    with pytest.raises(FileExistsError, match='has a model already'):
      convert.import_directory(source, source)
    with pytest.raises(FileExistsError, match='not an empty directory'):
      convert.export_directory(str(tmp_path / 'run'), source)


# config.json.


def test_a_key_that_nobody_knows_is_refused_unless_it_says_nothing():
  keys = Keys({'a': 1, 'b': None, 'c': False, 'torch_dtype': 'bfloat16', 'bos_token_id': 3, 'd': 0.5, 'e': []})
  assert keys.int('a') == 1
  with pytest.raises(ValueError, match='nobody here knows d=0.5, which may'):
    keys.done()
  keys.inert('d')
  keys.done()


@pytest.mark.parametrize('config, says', [
  ({'attention_sink_size': 4}, 'attention_sink_size=4'),
  ({'hidden_size': None}, 'hidden_size is missing'), ({'hidden_size': '16'}, "hidden_size='16' must be int"),
  ({'hidden_size': 16.0}, 'hidden_size=16.0 must be int'), ({'hidden_size': True}, 'hidden_size=True must be int'),
  ({'num_attention_heads': 0}, 'num_attention_heads=0 must be from 1'), ({'hidden_size': -16}, 'hidden_size=-16 must be'),
  ({'num_hidden_layers': 10**9}, 'num_hidden_layers=1000000000 must be from 1 to 10000'),
  ({'vocab_size': 10**12}, 'vocab_size=1000000000000 must be from 1'),
  ({'num_key_value_heads': 3}, 'n_heads=4 is not a multiple of n_kv_heads=3'), ({'head_dim': 5}, 'even number'),
  ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"), ({'attention_bias': 'yes'}, 'attention_bias'),
  ({'model_type': 'llama4'}, "model_type 'llama4' is of no family here; there are"), ({'model_type': None}, 'is missing'),
  ({'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic' is not supported"),
  ({'rope_scaling': {'rope_type': 'linear', 'factor': 2.0, 'x': 1}}, 'rope_scaling: nobody here knows x=1'),
  ({'rope_scaling': {'rope_type': 'linear'}}, 'rope_scaling: factor is missing'), ({'rope_scaling': 'yarn'}, 'must be dict'),
  ({'rope_scaling': {'type': 'linear', 'rope_type': 'yarn', 'factor': 2.0}}, "type='linear' is not supported; 'yarn' is"),
  ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0}}, 'rope_theta=100.0 contradicts 500.0'),
  ({'rope_parameters': {'type': 'linear', 'factor': 2.0}, 'rope_scaling': {'type': 'linear', 'factor': 4.0}}, 'contradict'),
], ids=lambda value: '' if isinstance(value, str) else str(value)[:60])
def test_a_config_that_cannot_be_honoured_is_refused_by_its_key(config, says):
  with pytest.raises(ValueError, match=says):
    families.read_config(LLAMA | config)


def test_words_for_layers_are_checked():
  keys = Keys({'layer_types': ['full', 'sliding']})
  with pytest.raises(ValueError, match="layer_types has 'sliding'"):
    keys.layer_types(2, ('full', 'chunked'))
  with pytest.raises(ValueError, match='2 items, and 3'):
    keys.layer_types(3, ('full', 'sliding'))


LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
YARN = {'type': 'yarn', 'factor': 40.0, 'original_max_position_embeddings': 4096}


def yarn(**fields) -> YarnScaling:
  return YarnScaling(**{'factor': 40.0, 'original_length': 4096, **fields})


@pytest.mark.parametrize('scaling, expected', [
  ({'rope_type': 'default'}, None),
  ({'type': 'linear', 'factor': 8}, LinearScaling(factor=8.0)),
  ({'rope_type': 'llama3', **LLAMA3}, Llama3Scaling(factor=8.0, original_length=8192)),
  ({**YARN, 'rope_type': 'yarn'}, yarn()),
  ({**YARN, 'beta_fast': 16, 'beta_slow': 2, 'truncate': False}, yarn(fast_turns=16.0, slow_turns=2.0, truncate=False)),
  ({**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0}, yarn(amplitude=1.0)),
  ({**YARN, 'mscale': 0.707}, yarn()),
  ({**YARN, 'attention_factor': 1.2}, yarn(amplitude=1.2)),
  ({**YARN, 'attention_factor': 0.1 * np.log(40) + 1}, yarn()),
  ({**YARN, 'factor': None, 'original_max_position_embeddings': 1024}, yarn(factor=16.0, original_length=1024)),
  ({'type': 'longrope', 'short_factor': [1, 1.5], 'long_factor': [2, 3.0], 'original_max_position_embeddings': 128},
   LongRopeScaling(divisors=(1.0, 1.5), amplitude=(1 + np.log(128) / np.log(128)) ** 0.5)),
], ids=str)
def test_rotations_are_read_from_both_spellings_and_written_in_both(scaling, expected):
  expected = RopeSpec(theta=500.0, fraction=0.5, scaling=expected)
  rest = {'max_position_embeddings': 16384}
  old = Keys(rest | {'rope_theta': 500.0, 'partial_rotary_factor': 0.5, 'rope_scaling': scaling})
  new = Keys(rest | {'rope_parameters': {'rope_theta': 500.0, 'partial_rotary_factor': 0.5, **scaling}})
  for keys in (old, new):
    assert read_rope(keys, fraction=1.0) == expected
    keys.done()
    assert len(keys.notes) == (scaling.get('type') == 'longrope')
  written = write_rope(expected)
  for keys in (Keys(rest | written), Keys(rest | {'rope_parameters': written['rope_parameters']}),
               Keys(rest | {key: value for key, value in written.items() if key != 'rope_parameters'})):
    assert read_rope(keys, fraction=1.0) == expected


@pytest.mark.parametrize('written', [
  {'rope_theta': 1e6, 'rope_local_base_freq': 1e4, 'rope_scaling': {'type': 'linear', 'factor': 8.0}},
  {'rope_parameters': {'full_attention': {'rope_type': 'linear', 'factor': 8.0}, 'sliding_attention': None}},
  {'rope_parameters': {'full_attention': {'rope_theta': 1e6, 'rope_type': 'linear', 'factor': 8.0},
                       'sliding_attention': {'rope_theta': 1e4, 'rope_type': 'default'}}, 'rope_theta': 1e6},
], ids=['flat', 'with defaults', 'both'])
def test_rotations_by_kind_of_layer_are_read_from_both_spellings(written):
  expected = {FULL: RopeSpec(theta=1e6, scaling=LinearScaling(factor=8.0)), SLIDING: RopeSpec(theta=1e4)}
  local = 'rope_local_base_freq', 1e4
  keys = Keys(written)
  assert read_ropes(keys, theta=1e6, local=local) == expected
  keys.done()
  assert read_ropes(Keys(write_ropes(expected)), theta=1.0, local=local) == expected


@pytest.mark.parametrize('config', [{'partial_rotary_factor': 0.5}, {'rope_scaling': {'partial_rotary_factor': 0.5}}])
def test_a_partial_rotation_is_refused_where_transformers_does_not_look_for_it(config):
  with pytest.raises(ValueError, match='partial_rotary_factor=0.5 is not supported'):
    read_rope(Keys(config))


@pytest.mark.parametrize('content, says', [
  ('{"model_type": ', 'not JSON'), ('[1]', 'expected an object'), ('[' * 100_000, 'not JSON'), (None, 'is not there')])
def test_a_config_that_is_no_json_is_refused(tmp_path, content, says):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises((ValueError, FileNotFoundError), match=says):
    convert.import_directory(tmp_path, tmp_path / 'run')


# Models that were trained here.


def test_quickstart_is_expressed_and_what_cannot_be_is_named():
  model = quickstart.get_config().model
  family, config = families.choose_family(model, None)
  assert config['model_type'] == 'qwen3' and config['layer_types'] == ['sliding_attention'] * 3 + ['full_attention']
  assert families.differences(model, families.read_config(config)[1]) == ["norm.cast=after (not before)"]
  other = dataclasses.replace(model, norm=dataclasses.replace(model.norm, eps=1.001e-6), embed_scale=1.0 + 1e-9)
  assert families.differences(model, other) == ['norm.eps=1e-06 (not 1.001e-06)']
  model.pattern[1].mixer.softcap, model.pattern[1].mixer.sinks = 50.0, True
  with pytest.raises(ValueError, match=r'qwen3 cannot express layers\[1\].mixer.softcap=50.0 \(not None\), '):
    families.write_config(family, model)
  with pytest.raises(ValueError, match='no family can express this model: '):
    families.choose_family(model, None)
  with pytest.raises(ValueError, match='llama cannot express'):
    families.choose_family(model, families.families()['llama'])


def test_tokens_keep_their_ids_and_none_are_those_of_another_vocabulary():
  original = LLAMA | {'bos_token_id': 5, 'eos_token_id': [6, 7], 'max_position_embeddings': 99}
  model = families.read_config(original)[1]
  changed = dataclasses.replace(model, vocab_size=72)
  for meta in (original, {'model_type': 'llama', 'text_config': original}):
    config = convert.config_for(changed, {'hf': {'config': meta}}, None)[1]
    assert [config[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')] == [5, [6, 7], None]
    assert config['max_position_embeddings'] == 99
  config = convert.config_for(model, {}, 'llama')[1]
  assert config['eos_token_id'] is None and 'max_position_embeddings' not in config


def trained(workdir, model: DecoderConfig) -> None:
  """A workdir as a run leaves it, with weights as they are drawn, on one device."""
  config = quickstart.get_config()
  config.model = model
  vocabulary = {END_OF_TEXT: 0, 'one': 1, 'two': 2}
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    params = jax.jit(lambda key: Decoder(model, key))(jax.random.key(0))
    checkpoints = Checkpoints(workdir / 'checkpoints')
    checkpoints.save(7, params=params, opt=None, meta={'config': json.loads(typed_json.dumps(config)), 'lineage': lineage()})
    checkpoints.close()
  tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='one')).save(str(workdir / 'tokenizer.json'))


def test_a_model_that_was_trained_here_goes_out_and_comes_back(tmp_path, mesh_of):
  model = dataclasses.replace(quickstart.get_config().model, d_model=16, vocab_size=32, n_layers=6)
  trained(tmp_path / 'run', model)
  with mesh_of(1):
    report = convert.export_directory(f'{tmp_path}/run@7', tmp_path / 'out')
    convert.import_directory(tmp_path / 'out', tmp_path / 'back')
    ours, back = parameters(tmp_path / 'run'), parameters(tmp_path / 'back')
  assert report.family == 'qwen3' and report.notes == [
    'in bfloat16 transformers rounds elsewhere: norm.cast=after (not before)']
  assert ours.keys() == back.keys() and all((ours[name] == back[name]).all() for name in ours)
  config, settings, generation = (json.loads((tmp_path / 'out' / name).read_text()) for name in (
    'config.json', 'tokenizer_config.json', 'generation_config.json'))
  assert config['torch_dtype'] == 'float32' and config['max_position_embeddings'] == 256
  assert (config['bos_token_id'], config['eos_token_id']) == (0, 0) == tuple(generation.values())
  assert tokenizers.Tokenizer.from_file(f'{tmp_path}/back/tokenizer.json').encode('two').ids == [0, 2]
  assert settings['eos_token'] == END_OF_TEXT and (tmp_path / 'back' / 'tokenizer_config.json').exists()


def test_adapters_are_merged_into_what_is_exported(tmp_path, mesh_of):
  model = dataclasses.replace(quickstart.get_config().model, d_model=16, vocab_size=32, n_layers=2)
  trained(tmp_path / 'run', model)
  base, adapters = Checkpoints(tmp_path / 'run' / 'checkpoints'), lora.LoraConfig(rank=2, alpha=4.0, targets=('*.w_up_DF',))
  config = dataclasses.replace(quickstart.get_config(), model=model, lora=adapters)
  parent = {'run': base.meta(7)['lineage']['run'], 'step': 7, 'path': str(tmp_path / 'run'), 'from_here': '../run'}
  with mesh_of(1):
    params = lora.adapt(load_params(base, 7), adapters, jax.random.key(0))
    changed = {name: leaf + 0.5 for name, leaf in lora.adapters(params).items()}
    tuned, plain = Checkpoints(tmp_path / 'tuned' / 'checkpoints'), json.loads(typed_json.dumps(config))
    tuned.save(3, params=changed, opt=None, meta={'config': plain, 'lineage': lineage(parent)})
    tuned.close()
    for name in ('run', 'tuned'):
      convert.export_directory(str(tmp_path / name), tmp_path / f'{name}_out')
  before, after = contents(tmp_path / 'run_out'), contents(tmp_path / 'tuned_out')
  for name in before:
    if 'up_proj' in name:
      layer, stack = int(name.split('.')[2]), 'stacks.0.mlp.w_up_DF'
      product = np.asarray(changed[f'{stack}.lora_a'][layer] @ changed[f'{stack}.lora_b'][layer])
      np.testing.assert_allclose(after[name], before[name] + 2.0 * product.T, atol=1e-5)
    else:
      np.testing.assert_array_equal(after[name], before[name])


def test_what_the_vocabulary_and_the_family_cannot_hold_is_not_exported(tmp_path, mesh_of):
  model = dataclasses.replace(quickstart.get_config().model, d_model=16, vocab_size=2, n_layers=1)
  trained(tmp_path / 'run', model)
  with mesh_of(1):
    for family, says in (('', 'tokens, the model 2'), ('nobody', '--family=nobody: there are'), ('llama', 'llama cannot')):
      with pytest.raises(ValueError, match=says):
        convert.export_directory(str(tmp_path / 'run'), tmp_path / 'out', family=family or None)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['run']
