"""Who talks to whom in a collective: replica groups in all the syntaxes that the compiler writes, as tuples of devices.

    {{0,1},{2,3}}                     written out; {} is everybody
    [2,4]<=[4,2]T(1,0)                iota, reshaped and transposed: 2 groups of 4
    mesh['a'=4,'b'=2] {'a'}           a mesh and the axes along which a group extends; an axis may be a part, 'a':(2)2
"""

import functools
import re

import numpy as np

_AXIS = re.compile(r"'([^']*)'=(\d+)")
_PART = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


@functools.lru_cache
def replica_groups(text: str, n_devices: int) -> tuple[tuple[int, ...], ...]:
  """Devices, by their place in the mesh, of each group. ValueError for a syntax that is none of the above."""
  text = text.strip()
  if text.startswith('mesh'):
    return _of_mesh(text)
  if text.startswith('['):
    shape, ids = _iota(text)
    return tuple(map(tuple, ids.reshape(shape).tolist()))
  if re.fullmatch(r'\{[\d,{}\s]*\}', text):
    groups = tuple(tuple(int(n) for n in found.split(',')) for found in re.findall(r'\{([\d,\s]+)\}', text))
    return groups or (tuple(range(n_devices)),)
  raise ValueError(f'replica groups in a syntax that this reader does not know: {text[:120]!r}')


@functools.lru_cache
def permute_pairs(text: str) -> tuple[tuple[int, int], ...]:
  """'{{0,1},{1,0}}' -> (from, to) of each message."""
  return tuple((int(a), int(b)) for a, b in re.findall(r'\{(\d+),(\d+)\}', text))


def _iota(text: str) -> tuple[tuple[int, ...], np.ndarray]:
  """'[2,4]<=[4,2]T(1,0)' -> (2, 4) and the ids in order."""
  matched = re.match(r'\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?', text)
  if matched is None:
    raise ValueError(f'replica groups in a syntax that this reader does not know: {text[:120]!r}')
  shape, source, order = (tuple(int(n) for n in part.split(',')) if part else None for part in matched.groups())
  ids = np.arange(int(np.prod(source or shape))).reshape(source or shape)
  return shape, (ids.transpose(order) if order else ids).reshape(-1)


def _of_mesh(text: str) -> tuple[tuple[int, ...], ...]:
  head, _, along = text.rpartition('{')
  sizes = {name: int(size) for name, size in _AXIS.findall(head)}
  ids = np.arange(int(np.prod(list(sizes.values()))))
  if devices := re.search(r'device_ids=\(([^)]*\)?)\)', head):
    ids = _iota(devices[1])[1] if '[' in devices[1] else np.array([int(n) for n in devices[1].split(',')])
  dims, inside = [], []  # the mesh with axes that are used in part split into before, part and after
  parts = {name: (int(before or 1), int(size) if size else None) for name, before, size in _PART.findall(along)}
  for name, size in sizes.items():
    before, part = parts.get(name, (size, 1))
    part = size // before if part is None else part
    inside.append(len(dims) + 1)
    dims += [before, part, size // (before * part)]
  outside = [i for i in range(len(dims)) if i not in inside]
  n = int(np.prod([dims[i] for i in inside]))
  return tuple(map(tuple, ids.reshape(dims).transpose(outside + inside).reshape(-1, n).tolist()))
