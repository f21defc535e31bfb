"""Safetensors files that are not what they say, and weights of few bits."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maxlm.hf.quantized import dequantized
from maxlm.hf.tensors import INDEX, SINGLE, ToWrite, open_directory, open_file, write_directory

BF16 = np.dtype(ml_dtypes.bfloat16)
ENTRY = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def write_raw(path, header, data: bytes = b'', length: int | None = None) -> None:
  """A safetensors file: header is bytes, or what JSON makes of it."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + data)


HOSTILE = {
  'a header longer than the file': (({'a': ENTRY}, b'0' * 8, 1000), 'header'),
  'a header of a terabyte': (({'a': ENTRY}, b'0' * 8, 10**12), 'header too large'),
  'a header of 2**63 bytes': (({'a': ENTRY}, b'0' * 8, 2**63 + 1), 'header too large'),
  'no JSON': ((b'nothing', b'0' * 8), 'JSON'),
  'a list': ((b'[1, 2]',), 'JSON'),
  'nested too deep': ((b'{"a":' * 100_000,), 'recursion'),
  'no text': ((b'{"\xff": 1}',), 'header'),
  'a name twice': ((json.dumps({'a': ENTRY, 'A': ENTRY}).replace('A', 'a').encode(), b'0' * 8), "'a' twice"),
  'overlapping tensors': (({'a': ENTRY, 'b': ENTRY}, b'0' * 8), 'invalid offset'),
  'a hole': (({'a': ENTRY, 'b': ENTRY | {'data_offsets': [12, 20]}}, b'0' * 20), 'invalid offset'),
  'out of range': (({'a': ENTRY | {'shape': [4], 'data_offsets': [0, 16]}}, b'0' * 8), 'not fully covered'),
  'more data than tensors': (({'a': ENTRY}, b'0' * 12), 'not fully covered'),
  'offsets the other way round': (({'a': ENTRY | {'data_offsets': [8, 0]}}, b'0' * 8), 'offset'),
  'offsets below zero': (({'a': ENTRY | {'data_offsets': [-8, 0]}}, b'0' * 8), 'JSON'),
  'a shape that is not the bytes': (({'a': ENTRY | {'shape': [3]}}, b'0' * 8), 'shape'),
  'a dim below zero': (({'a': ENTRY | {'shape': [-2]}}, b'0' * 8), '-2'),
  'more than 2**64 entries': (({'a': ENTRY | {'shape': [2**62, 2**4]}}, b'0' * 8), 'overflow'),
  'a dtype nobody knows': (({'a': ENTRY | {'dtype': 'Q9'}}, b'0' * 8), 'Q9'),
  'a dtype that is not read': (({'a': ENTRY | {'dtype': 'C64', 'shape': [1]}}, b'0' * 8), 'a has the dtype C64'),
  'entries missing': (({'a': {'dtype': 'F32'}}, b'0' * 8), 'JSON'),
}


@pytest.mark.parametrize('content, says', HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_not_sound_is_refused_with_its_name_and_the_reason(tmp_path, content, says):
  write_raw(tmp_path / SINGLE, *content)
  with pytest.raises(ValueError, match=says) as error:
    open_directory(tmp_path)
  assert SINGLE in str(error.value) and '\n' not in str(error.value)


def test_an_empty_file_and_half_a_length_are_refused(tmp_path):
  for content in (b'', b'\0' * 5):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ValueError, match=SINGLE):
      open_directory(tmp_path)


def test_a_changed_byte_of_the_header_is_noticed_or_harmless(tmp_path):
  """Whatever the header says then, what is read lies within the file."""
  rng, values = np.random.default_rng(0), np.arange(24, dtype=np.float32)
  safetensors.numpy.save_file({'a': values[:8].reshape(2, 4), 'b': values[8:]}, tmp_path / SINGLE)
  whole, sound = (tmp_path / SINGLE).read_bytes(), 0
  for _ in range(500):
    changed = bytearray(whole)
    changed[rng.integers(0, len(whole) - 96)] = rng.integers(0, 256)
    (tmp_path / SINGLE).write_bytes(changed)
    try:
      sound += sum(tensor.array().nbytes for tensor in open_directory(tmp_path).values()) == 96
    except ValueError as error:
      assert SINGLE in str(error)
  assert 0 < sound < 250


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
  write_directory(tmp_path, [ToWrite('a', BF16, (3, 5), lambda: np.ones((3, 5), BF16))], 10**9)
  whole = (tmp_path / SINGLE).read_bytes()
  for length in range(len(whole)):
    (tmp_path / SINGLE).write_bytes(whole[:length])
    with pytest.raises(ValueError, match=SINGLE):
      open_directory(tmp_path)


def in_shards(folder, weight_map) -> None:
  """Two files with a tensor each, a in one and b in two, and an index."""
  for file, name in (('one.safetensors', 'a'), ('two.safetensors', 'b')):
    safetensors.numpy.save_file({name: np.ones(2, np.float32)}, folder / file)
  (folder / INDEX).write_text(weight_map if isinstance(weight_map, str) else json.dumps({'weight_map': weight_map}))


@pytest.mark.parametrize('weight_map, says', [
  ({'a': 'one.safetensors', 'b': 'three.safetensors'}, 'three.safetensors, which is not there'),
  ({'a': 'one.safetensors', 'b': '../two.safetensors'}, r"'../two.safetensors': it must be a .safetensors file beside"),
  ({'a': 'one.safetensors', 'b': '/etc/two.safetensors'}, 'it must be a .safetensors file beside'),
  ({'a': 'one.safetensors', 'b': 'two.bin'}, 'it must be a .safetensors file beside'),
  ({'a': 'one.safetensors', 'b': '..'}, 'it must be a .safetensors file beside'),
  ({'a': 'two.safetensors', 'b': 'one.safetensors'}, 'one.safetensors: holds a, which the index puts into two.safetensors'),
  ({'a': 'one.safetensors', 'c': 'one.safetensors', 'b': 'two.safetensors'}, 'puts c into one.safetensors, which does not'),
  ({'a': 'one.safetensors', 'c': 'two.safetensors'}, 'two.safetensors: holds b, which the index puts into no file'),
  ({'a': 'one.safetensors', 'b': 7}, 'no "weight_map"'),
  ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "'a' twice"),
  ('{}', 'no "weight_map"'), ('[]', 'expected an object'), ('no', 'not JSON'), ('[' * 100_000, 'not JSON'),
])
def test_an_index_that_does_not_agree_with_its_files_is_refused(tmp_path, weight_map, says):
  in_shards(tmp_path, weight_map)
  with pytest.raises(ValueError, match=says):
    open_directory(tmp_path)


def test_an_index_that_agrees_is_read(tmp_path):
  in_shards(tmp_path, {'a': 'one.safetensors', 'b': 'two.safetensors'})
  assert sorted(open_directory(tmp_path)) == ['a', 'b']


def test_pickles_are_not_read_and_nothing_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match='neither model.safetensors nor'):
    open_directory(tmp_path)
  (tmp_path / 'pytorch_model-00001-of-00002.bin').write_bytes(b'')
  with pytest.raises(FileNotFoundError, match='a pickle, which is code'):
    open_directory(tmp_path)


def test_what_we_write_the_library_reads_and_the_other_way_round(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {'bf16': rng.normal(size=(3, 5)).astype(BF16), 'f32': rng.normal(size=(7,)).astype(np.float32),
             'none': np.zeros((0, 4), np.float16), 'one': np.array(3.5), 'int': rng.integers(0, 9, (2, 2))}
  write_directory(tmp_path, [ToWrite(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()], 10**9)
  theirs = safetensors.numpy.load_file(tmp_path / SINGLE)
  safetensors.numpy.save_file(tensors, tmp_path / 'theirs.safetensors')
  ours = {name: tensor.array() for name, tensor in open_file(tmp_path / 'theirs.safetensors').items()}
  for name, array in tensors.items():
    for other in (theirs[name], ours[name]):
      assert (other.dtype, other.shape) == (array.dtype, array.shape)
      np.testing.assert_array_equal(other, array)


def test_data_at_odd_addresses_are_read(tmp_path):
  values = np.arange(6, dtype=BF16).reshape(2, 3)
  header = json.dumps({'a': {'dtype': 'U8', 'shape': [1], 'data_offsets': [0, 1]},
                       'b': {'dtype': 'BF16', 'shape': [2, 3], 'data_offsets': [1, 13]}}).encode()
  for spaces in range(8):
    write_raw(tmp_path / SINGLE, header + b' ' * spaces, b'\7' + values.tobytes())
    read = open_directory(tmp_path)['b'].array()
    np.testing.assert_array_equal(read.T.astype(np.float32), values.T.astype(np.float32))


def test_a_file_is_looked_at_only_where_it_is_read(tmp_path):
  """The data of a huge file need not be in memory: it is as large as it likes, and sparse."""
  size = 1 << 40
  header = json.dumps({'a': {'dtype': 'U8', 'shape': [1 << 20, 1 << 20], 'data_offsets': [0, size]}}).encode()
  write_raw(tmp_path / SINGLE, header)
  with open(tmp_path / SINGLE, 'r+b') as file:
    file.truncate(8 + len(header) + size)
    file.seek(8 + len(header) + (5 << 20) + 7)
    file.write(b'x')
  assert open_directory(tmp_path)['a'].array()[5, 6:9].tolist() == [0, ord('x'), 0]


def test_shards_are_as_full_as_they_may_be_and_the_index_lists_all(tmp_path):
  made, sizes = [], [600, 300, 200, 900, 50, 50, 1500]
  tensors = [ToWrite(f't{i}', np.dtype('uint8'), (n,), lambda i=i, n=n: made.append(i) or np.full(n, i, np.uint8))
             for i, n in enumerate(sizes)]
  names = write_directory(tmp_path, tensors, 1000)
  assert names[:-1] == [f'model-0000{i}-of-00004.safetensors' for i in (1, 2, 3, 4)] and names[-1] == INDEX
  assert made == list(range(7))  # each made once, in order
  index = json.loads((tmp_path / INDEX).read_text())
  assert index['metadata']['total_size'] == sum(sizes)
  assert [int(file[10]) for file in index['weight_map'].values()] == [1, 1, 2, 3, 3, 3, 4]
  assert {name: t.array()[0] for name, t in open_directory(tmp_path).items()} == {f't{i}': i for i in range(7)}


# Weights of few bits.


def store(folder, tensors: dict) -> dict:
  write_directory(folder, [ToWrite(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()], 10**9)
  return open_directory(folder)


MXFP4 = {'quantization_config': {'quant_method': 'mxfp4'}}
FP8 = {'quantization_config': {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [4, 3]}}


def test_fp8_blocks_are_the_numbers_times_their_factors(tmp_path):
  rng = np.random.default_rng(0)
  weight = rng.normal(size=(10, 7)).astype(ml_dtypes.float8_e4m3fn)
  scale = rng.uniform(0.1, 3, (3, 3)).astype(np.float32)
  stored = dequantized(store(tmp_path, {'x.weight': weight, 'x.weight_scale_inv': scale, 'y.weight': np.ones(3, BF16)}), FP8)
  assert sorted(stored) == ['x.weight', 'y.weight'] and stored['x.weight'].dtype == BF16
  got = stored['x.weight'].array()
  for i in range(10):
    for j in range(7):
      assert got[i, j] == weight[i, j].astype(np.float32) * scale[i // 4, j // 3]


def test_mxfp4_blocks_are_e2m1_numbers_times_powers_of_two(tmp_path):
  rng = np.random.default_rng(0)
  E, rows, columns = 3, 4, 64
  values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
  codes, scales = rng.integers(0, 16, (E, rows, columns)), rng.integers(120, 130, (E, rows, columns // 32))
  packed = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(E, rows, columns // 32, 16)
  files = {'x_blocks': packed.astype(np.uint8), 'x_scales': scales.astype(np.uint8), 'x_bias': np.ones(2, BF16)}
  stored = dequantized(store(tmp_path, files), MXFP4)
  assert sorted(stored) == ['x', 'x_bias']
  expected = values[codes] * 2.0 ** (np.repeat(scales, 32, axis=-1) - 127)
  assert stored['x'].shape == (E, columns, rows) == stored['x'].array().shape
  np.testing.assert_array_equal(stored['x'].array().astype(np.float64), expected.swapaxes(1, 2))


@pytest.mark.parametrize('config, tensors, says', [
  ({'quantization_config': {'quant_method': 'gptq'}}, {}, "quant_method='gptq' is not read"),
  ({'quantization_config': {'quant_method': 'fp8'}}, {}, "quant_method='fp8' is not read; fp8 with weight_block_size"),
  ({'quantization_config': 'fp8'}, {}, 'is not an object'), ({'quantization_config': {'bits': 4}}, {}, 'None is not read'),
  (FP8, {'x': np.ones((8, 6), ml_dtypes.float8_e4m3fn), 'x_scale_inv': np.ones((2, 3), np.float32)}, r'x: float8_e4m3fn'),
  (FP8, {'x': np.ones((8, 6), BF16), 'x_scale_inv': np.ones((2, 2), np.float32)}, 'x: bfloat16'),
  (MXFP4, {'x_blocks': np.ones((1, 2, 2, 16), np.uint8)}, 'x_scales is missing'),
  (MXFP4, {'x_blocks': np.ones((1, 2, 2, 16), np.uint8), 'x_scales': np.ones((1, 2, 1), np.uint8)}, 'x: uint8'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_quantized_weights_that_are_not_of_the_format_are_refused(tmp_path, config, tensors, says):
  with pytest.raises(ValueError, match=says):
    dequantized(store(tmp_path, tensors), config)
