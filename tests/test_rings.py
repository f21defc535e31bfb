"""A weight's gradient around rings (`maxlm.ops.rings`): the same as by a product and a scatter, and hidden on a v5e."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from maxlm.ops import rings
from maxlm.ops.einsum import after, einsum
from maxlm.plan import topology
from maxlm.plan.network import network_of
from maxlm.plan.report import read
from maxlm.sharding import MESH_AXES, MeshConfig, make_mesh, spec

SIZES = {'B': 8, 'T': 4, 'D': 32, 'F': 768, 'N': 12, 'H': 128}
PRODUCTS = ('BTD,DF->BTF', 'BTF,FD->BTD', 'BTD,DNH->BTNH', 'BTNH,NHD->BTD')


@pytest.fixture
def on_cpu(monkeypatch):
  monkeypatch.setattr(rings, 'KINDS', ('cpu',))
  monkeypatch.setattr(rings, 'LEAST_FLOPS', 0)


def mesh(**sizes: int) -> Mesh:
  """Of fake devices, with the axes that a pod's torus has."""
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  devices = np.array(jax.devices()[:np.prod(shape)]).reshape(shape)
  return Mesh(devices, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def example(dims: str) -> tuple[jax.Array, ...]:
  """x, w and the gradient of the output, on the current mesh."""
  draw = np.random.default_rng(0).normal
  return tuple(jax.device_put(draw(size=[SIZES[dim] for dim in of]).astype(np.float32), spec(of))
               for of in dims.replace('->', ',').split(','))


def gradient(dims: str):
  """Of the weight, as a function of `example`."""
  return lambda x, w, dy: jax.vjp(lambda w: einsum(dims, x, w), w)[1](dy)[0]


@pytest.mark.parametrize('dims', PRODUCTS)
@pytest.mark.parametrize('sizes', [dict(fsdp_x=8), dict(fsdp_x=4, fsdp_y=2), dict(fsdp_x=2, fsdp_y=2, fsdp_z=2),
                                   dict(data=2, fsdp_x=4), dict(fsdp_x=4, tensor=2)], ids=str)
def test_the_sum_is_that_of_all_devices_whatever_the_torus(dims, sizes, on_cpu):
  with jax.set_mesh(mesh()):
    expected = np.asarray(gradient(dims)(*example(dims)))
  with jax.set_mesh(mesh(**sizes)):
    args = example(dims)
    assert 'ppermute' in str(jax.make_jaxpr(gradient(dims))(*args))
    dw = jax.jit(gradient(dims))(*args)
    assert dw.sharding.spec == args[1].sharding.spec
  np.testing.assert_allclose(dw, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize('change', [dict(MOST_TOKENS=3), dict(LEAST_FLOPS=1e12), dict(KINDS=('TPU v5 lite',))], ids=str)
def test_where_rings_do_not_pay_there_are_none(change, on_cpu, monkeypatch):
  for name, value in change.items():
    monkeypatch.setattr(rings, name, value)
  with jax.set_mesh(mesh(fsdp_x=4, fsdp_y=2)):
    jaxpr = str(jax.make_jaxpr(gradient('BTD,DF->BTF'))(*example('BTD,DF->BTF')))
  assert 'ppermute' not in jaxpr and 'reduce_scatter' in jaxpr


def test_too_few_columns_go_around_fewer_rings(on_cpu, monkeypatch):
  monkeypatch.setitem(SIZES, 'F', 3 * 128)  # 4 x 2 has three ways: x forwards, x backwards, y
  with jax.set_mesh(mesh(fsdp_x=4, fsdp_y=2)):
    three = str(jax.make_jaxpr(gradient('BTD,DF->BTF'))(*example('BTD,DF->BTF'))).count('ppermute[')
    monkeypatch.setitem(SIZES, 'F', 2 * 128)
    two = str(jax.make_jaxpr(gradient('BTD,DF->BTF'))(*example('BTD,DF->BTF'))).count('ppermute[')
    monkeypatch.setitem(SIZES, 'F', 100)
    none = str(jax.make_jaxpr(gradient('BTD,DF->BTF'))(*example('BTD,DF->BTF'))).count('ppermute[')
  assert (three, two, none) == (3 + 3 + 1, 3 + 3, 0)


def test_a_hint_to_wait_changes_no_value_and_gives_a_frozen_weight_no_gradient():
  def loss(hint):
    def of(x, w, y):
      w, y = hint(w, y)
      return jnp.sum(einsum('BTD,DF->BTF', x, w)) + jnp.sum(y)
    return of

  with jax.set_mesh(mesh()):
    args = example('BTD,DF->BTF')
    for got, expected in zip(jax.grad(loss(after), (0, 1, 2))(*args), jax.grad(loss(lambda w, y: (w, y)), (0, 1, 2))(*args)):
      np.testing.assert_array_equal(got, expected)
    products = lambda wrt: str(jax.make_jaxpr(jax.grad(loss(after), wrt))(*args)).count('dot_general')
    assert (products((0, 2)), products((0, 1, 2))) == (2, 3)


@pytest.mark.slow
def test_on_a_v5e_the_sum_travels_while_its_parts_are_computed(monkeypatch):
  """1,024 tokens a chip, a weight of 4096 x 14336 over 256 chips, beside a product and a scatter in line."""
  pod = topology.parse('v5e:16x16', 1)
  current = make_mesh(MeshConfig(), pod.devices())

  def walked():
    with jax.set_mesh(current):
      args = [jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(current, spec(dims)))
              for dims, dtype, *shape in (('BTD', jnp.bfloat16, 256, 1024, 4096), ('DF', jnp.float32, 4096, 14336),
                                          ('BTF', jnp.bfloat16, 256, 1024, 14336))]
      compiled = jax.jit(lambda *args: gradient('BTD,DF->BTF')(*args)).lower(*args).compile()
    return read(compiled.as_text(), 'gradient', network_of(pod, current)).span

  rings_span = walked()
  monkeypatch.setattr(rings, 'KINDS', ())
  in_line = walked()
  permutes = [traffic for (axes, kind), traffic in rings_span.traffic.items() if kind == 'collective-permute']
  assert sum(traffic.count for traffic in permutes) == 2 * 2 * 15  # both directions of both dimensions
  assert sum(traffic.exposed for traffic in permutes) < 0.1 * sum(traffic.seconds for traffic in permutes)
  assert rings_span.seconds < 0.6 * in_line.seconds
