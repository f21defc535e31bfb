"""The mesh: sizes, how fsdp is factored along a torus, refusals."""

import math

import jax
import pytest

from maxlm.sharding import FSDP, MESH_AXES, MeshConfig, P, axes, make_mesh, mesh_shape, spec


@pytest.mark.parametrize('sizes, extents, expected', [
  ((1, 64, 1, 1, 1), (4, 4, 4, 1), (1, 4, 4, 4, 1, 1, 1)),  # v5p:4x4x4
  ((1, 256, 1, 1, 1), (16, 16, 1, 1), (1, 16, 16, 1, 1, 1, 1)),  # v6e:16x16
  ((1, 16, 4, 1, 1), (4, 4, 4, 1), (1, 4, 4, 1, 4, 1, 1)),  # experts take one dimension
  ((1, 32, 8, 1, 1), (16, 16, 1, 1), (1, 16, 2, 1, 8, 1, 1)),  # or a part of one
  ((1, 4, 1, 16, 1), (4, 4, 4, 1), (1, 4, 1, 1, 1, 16, 1)),  # or two
  ((2, 8, 1, 1, 4), (4, 4, 4, 1), (2, 4, 2, 1, 1, 1, 4)),
  ((1, 128, 1, 1, 1), (4, 4, 4, 2), (1, 4, 4, 8, 1, 1, 1)),  # two cores a chip: the last takes two dimensions
  ((1, 8, 1, 1, 1), (), (1, 8, 1, 1, 1, 1, 1)),  # no torus
  ((1, 6, 1, 1, 1), (2, 2, 2, 1), (1, 6, 1, 1, 1, 1, 1)),  # not all of it
], ids=str)
def test_fsdp_is_factored_along_what_is_left_of_the_torus(sizes, extents, expected):
  assert mesh_shape(sizes, extents) == expected
  assert math.prod(expected) == math.prod(sizes)


def test_letters_are_split_over_mesh_axes():
  assert spec('DF') == P(FSDP, 'tensor')
  assert axes('BT') == ('data', *FSDP, 'expert', 'context')
  assert axes('H') == ()


class Chip:
  """A device as far as a mesh looks at it."""

  platform, device_kind, core_on_chip = 'cpu', 'cpu', 0

  def __init__(self, index):
    self.id = self.process_index = index
    self.slice_index = index // 4
    self.coords = index % 4, 0, 0


def test_data_crosses_slices_and_nothing_else_does():
  chips = [Chip(i) for i in range(8)]
  with pytest.raises(ValueError, match='mesh.data=1: the 2 slices'):
    make_mesh(MeshConfig(), chips)


def test_a_mesh_has_every_axis():
  mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices())
  assert dict(mesh.shape) == dict(zip(MESH_AXES, (2, 2, 1, 1, 1, 1, 2)))
