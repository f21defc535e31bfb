"""Safetensors on disk: a model's tensors by name, as views of memory-mapped files; and files written one tensor at a time.

    stored = open_directory(path)               # model.safetensors, or the shards of model.safetensors.index.json
    stored['model.norm.weight'].array()         # nothing is read before a part of it is looked at

A file may come from anywhere, so nothing in it is believed: the safetensors library checks the header (its length, its
JSON, that the tensors cover the data without hole or overlap, that shape and dtype make up the bytes), and what it does
not look at is checked here (names that come twice, the index).
"""

import collections
import dataclasses
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import safetensors

INDEX, SINGLE = 'model.safetensors.index.json', 'model.safetensors'
JSON_LIMIT = 100_000_000  # bytes, as of a header in the library

DTYPES = {'F64': np.dtype('float64'), 'F32': np.dtype('float32'), 'F16': np.dtype('float16'),
          'BF16': np.dtype(ml_dtypes.bfloat16), 'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
          'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2), 'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
          'I64': np.dtype('int64'), 'I32': np.dtype('int32'), 'I16': np.dtype('int16'), 'I8': np.dtype('int8'),
          'U8': np.dtype('uint8'), 'BOOL': np.dtype('bool')}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Stored(Protocol):
  """A tensor that can be read: what the file holds, or what is computed from it (`maxlm.hf.quantized`)."""

  shape: tuple[int, ...]
  dtype: np.dtype
  nbytes: int  # on disk

  def array(self) -> np.ndarray:
    """Its values, read-only; of a mapped file only what is then looked at is read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mapped:
  """A tensor in a mapped file."""

  file: Path
  data: np.memmap  # the bytes of the file
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]
  nbytes: int

  def array(self) -> np.ndarray:
    return np.ndarray(self.shape, self.dtype, buffer=self.data, offset=self.offset)


def open_directory(directory: Path) -> dict[str, Mapped]:
  """The tensors of a Hugging Face directory. ValueError with the file's name and a reason for files that are not sound.

  FileNotFoundError if there are none, with a hint where there are pickled weights: those could run code, and are not read.
  """
  if (directory / INDEX).is_file():
    return _open_shards(directory)
  if (directory / SINGLE).is_file():
    return open_file(directory / SINGLE)
  pickled = sorted(path.name for path in directory.glob('pytorch_model*.bin')) + sorted(
    path.name for path in directory.glob('consolidated*.pth'))
  if pickled:
    raise FileNotFoundError(f'{directory} has weights only as {pickled[0]}, a pickle, which is code: load it where you '
                            'trust it and save it again with save_pretrained(…, safe_serialization=True)')
  raise FileNotFoundError(f'{directory} has neither {SINGLE} nor {INDEX}: is it a Hugging Face model?')


def open_file(path: Path) -> dict[str, Mapped]:
  """The tensors of one safetensors file, in its order. ValueError if it is not sound."""
  try:
    with safetensors.safe_open(path, 'np'):  # checks all of the header
      pass
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path}: not a sound safetensors file: {error}') from None
  with open(path, 'rb') as file:
    length, = struct.unpack('<Q', file.read(8))
    header = _object(file.read(length), path)
  header.pop('__metadata__', None)
  data = np.memmap(path, np.uint8, 'r')
  tensors = {}
  for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
    if entry['dtype'] not in DTYPES:
      raise ValueError(f'{path}: {name} has the dtype {entry["dtype"]}, which is not read here')
    start, end = entry['data_offsets']
    tensors[name] = Mapped(path, data, 8 + length + start, DTYPES[entry['dtype']], tuple(entry['shape']), end - start)
  return tensors


def _open_shards(directory: Path) -> dict[str, Mapped]:
  """The tensors of the files that the index lists: all of these, each where the index says, and no others."""
  where = directory / INDEX
  file_of = read_json(where).get('weight_map')
  if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
    raise ValueError(f'{where}: has no "weight_map" from names of tensors to names of files')
  tensors = {}
  for file in sorted(set(file_of.values())):
    if Path(file).name != file or not file.endswith('.safetensors'):
      raise ValueError(f'{where}: names the file {file!r}: it must be a .safetensors file beside the index')
    if not (directory / file).is_file():
      raise ValueError(f'{where}: names {file}, which is not there: fetch all files of the model')
    for name, tensor in open_file(directory / file).items():
      if file_of.get(name) != file:
        raise ValueError(f'{directory / file}: holds {name}, which the index puts into {file_of.get(name, "no file")}')
      tensors[name] = tensor
  if absent := [name for name in file_of if name not in tensors]:
    raise ValueError(f'{where}: puts {absent[0]} into {file_of[absent[0]]}, which does not hold it')
  return tensors


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. ValueError with its name if there is none in it, or if it has a name twice."""
  if not path.is_file():
    raise FileNotFoundError(f'{path} is not there: is {path.parent} a Hugging Face model?')
  if path.stat().st_size > JSON_LIMIT:
    raise ValueError(f'{path}: {path.stat().st_size:,} bytes are more than a configuration has')
  return _object(path.read_bytes(), path)


def _object(text: bytes, path: Path) -> dict[str, Any]:
  twice = []

  def unique(pairs):
    if len(found := dict(pairs)) < len(pairs):
      twice.append(collections.Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found

  try:
    plain = json.loads(text, object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of numbers with thousands of digits
    raise ValueError(f'{path}: not JSON: {error}') from None
  if twice:
    raise ValueError(f'{path}: has {twice[0]!r} twice')
  if not isinstance(plain, dict):
    raise ValueError(f'{path}: expected an object, got {type(plain).__name__}')
  return plain


@dataclasses.dataclass(frozen=True, slots=True)
class ToWrite:
  """A tensor to be written: `array()` makes it when its turn has come."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  array: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def write_directory(directory: Path, tensors: Iterable[ToWrite], max_shard_bytes: int) -> list[str]:
  """Writes the tensors, in their order, into one file, or into shards of at most so many bytes and an index.

  A shard holds at least one tensor. One tensor at a time is in memory. Returns the names of the files.
  """
  shards: list[list[ToWrite]] = [[]]
  for tensor in tensors:
    if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
      shards.append([])
    shards[-1].append(tensor)
  names = [SINGLE] if len(shards) == 1 else [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  for name, shard in zip(names, shards):
    write_file(directory / name, shard)
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(t.nbytes for shard in shards for t in shard)},
             'weight_map': {t.name: name for name, shard in zip(names, shards) for t in shard}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')
    names.append(INDEX)
  return names


def write_file(path: Path, tensors: list[ToWrite]) -> None:
  """One safetensors file, whose data begin at a multiple of eight bytes."""
  header, offset = {'__metadata__': {'format': 'pt'}}, 0
  for tensor in tensors:
    header[tensor.name] = {'dtype': CODES[tensor.dtype], 'shape': list(tensor.shape),
                           'data_offsets': [offset, offset + tensor.nbytes]}
    offset += tensor.nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors:
      array = np.asarray(tensor.array(), order='C')
      assert array.dtype == tensor.dtype and array.shape == tensor.shape, tensor.name
      file.write(array.reshape(-1).view(np.uint8).data)
