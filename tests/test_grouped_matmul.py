"""Grouped products: each way to compute them against a matrix for each row, in value and gradient."""

import collections
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rows import Rows
from maxlm.models.decoder import ComputeConfig
from maxlm.ops import grouped_gpu, grouped_tpu
from maxlm.ops import grouped_matmul as ops
from maxlm.ops.exchange import Dispatch
from maxlm.plan.topology import parse
from maxlm.sharding import MeshConfig, axes, make_mesh, spec

KERNELS = ('blocked', 'pallas', 'ragged_dot')
SIZES = [[5, 0, 9, 1], [0, 0, 15, 0], [15, 0, 0, 0], [0, 0, 0, 15], [4, 4, 4, 3], [1, 1, 12, 1], [15], [0, 1], [2] * 20]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of 2 to 4 rows and tiles of 8, multiplied 4 at a time, so that a few rows are several."""
  monkeypatch.setattr(ops, 'SMALLEST_BLOCK', 2)
  monkeypatch.setattr(ops, 'LARGEST_BLOCK', 4)
  monkeypatch.setattr(grouped_tpu, 'ROW_TILES', (8,))
  monkeypatch.setattr(grouped_tpu, 'PART', 4)


def product(kernel):
  if kernel == 'reference':
    return ops.grouped_matmul_reference
  return functools.partial(ops.grouped_matmul, kernel=kernel, interpret=kernel == 'pallas')


@functools.cache
def compiled(kernel):
  """Compiled once for all sizes: these are arguments."""
  @jax.jit
  def all_three(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: product(kernel)(x, w, sizes), x, w)
    return dict(zip('yxw', (y, *pull(dy))))

  return all_three


def example(sizes, P=None, D=6, F=10, dtype=np.float32):
  rng = np.random.default_rng(0)
  P = sum(sizes) if P is None else P
  return *(rng.normal(size=shape).astype(dtype) for shape in ((P, D), (len(sizes), D, F), (P, F))), np.array(sizes, np.int32)


def values_and_gradients(kernel, sizes, **options):
  return compiled(kernel)(*example(sizes, **options))


def assert_close(actual, expected, rtol=1e-6):
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name].astype(np.float32), value, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_values_and_gradients_are_those_of_a_matrix_for_each_row(kernel, sizes):
  assert_close(values_and_gradients(kernel, sizes), values_and_gradients('reference', sizes))


@pytest.mark.parametrize('sizes', [[5, 0, 2, 1], [0, 0, 0, 0], [0, 3, 0, 0], [8, 0, 0, 0], [0, 0, 12, 2]], ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_rows_past_the_groups_are_not_looked_at_and_have_zeros(kernel, sizes):
  """Even where they are not numbers: a buffer may hold what was in the memory before."""
  used = sum(sizes)
  x, w, dy, sizes = example(sizes, P=15)
  expected = compiled('reference')(x, w, np.where(np.arange(15)[:, None] < used, dy, 0), sizes)
  x[used:] = dy[used:] = np.nan
  actual = compiled(kernel)(x, w, dy, sizes)
  assert_close(actual, expected)
  assert not actual['y'][used:].any() and not actual['x'][used:].any()


@pytest.mark.parametrize('sizes', [[5, 0, 9, 1], [5, 0, 2, 1], [0, 0, 0, 0], [0, 3, 0, 0]], ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_a_bias_is_added_to_the_rows_of_its_group(kernel, sizes):
  """And to none past the groups, whose gradient, numbers or not, it does not get."""
  used = sum(sizes)
  x, w, dy, sizes = example(sizes, P=15)
  bias = np.random.default_rng(1).normal(size=(w.shape[0], w.shape[2])).astype(np.float32)

  def results(kernel, *arguments):
    def all_four(x, w, bias, dy):
      y, pull = jax.vjp(lambda x, w, bias: product(kernel)(x, w, sizes, bias), x, w, bias)
      return dict(zip('yxwb', (y, *pull(dy))))

    return jax.jit(all_four)(*arguments)

  expected = results('reference', x, w, bias, np.where(np.arange(15)[:, None] < used, dy, 0))
  x[used:] = dy[used:] = np.nan
  assert_close(results(kernel, x, w, bias, dy), expected)


@pytest.mark.parametrize('kernel', KERNELS)
def test_several_products_of_the_same_rows_are_those_of_each_and_their_gradients_to_the_rows_add_up(kernel):
  x, w, dy, sizes = example([5, 0, 9, 1], P=17)
  other_w, other_dy = np.random.default_rng(1).permuted(w, axis=1), dy[:, ::-1]

  @jax.jit
  def run(x, ws, dys):
    several = functools.partial(ops.grouped_matmuls, kernel=kernel, interpret=kernel == 'pallas')
    ys, pull = jax.vjp(lambda x, ws: several(x, ws, sizes, (None, None)), x, ws)
    dx, dws = pull(dys)
    return {'x': dx} | {f'{name}{i}': a for name, both in (('y', ys), ('w', dws)) for i, a in enumerate(both)}

  one, other = (compiled('reference')(x, *of, sizes) for of in ((w, dy), (other_w, other_dy)))
  expected = {'x': one['x'] + other['x'], 'y0': one['y'], 'y1': other['y'], 'w0': one['w'], 'w1': other['w']}
  assert_close(run(x, (w, other_w), (dy, other_dy)), expected)


def test_sizes_as_they_come_with_the_blocks_they_are_used_with(monkeypatch):
  monkeypatch.undo()
  assert ops.LARGEST_BLOCK == 128
  sizes = np.bincount(np.random.default_rng(0).integers(0, 5, 700) ** 2 % 6, minlength=6).tolist()
  assert 0 in sizes and max(sizes) > 128
  assert_close(values_and_gradients('blocked', sizes), values_and_gradients('reference', sizes))


def test_pallas_tiles_that_the_dims_are_no_multiples_of(monkeypatch):
  monkeypatch.setattr(grouped_tpu, 'row_tiles', lambda *_: (8, 128))
  monkeypatch.setattr(grouped_tpu, 'outer_tiles', lambda *_: (8, 128, 128))
  sizes, dims = [7, 0, 11, 2], dict(P=23, D=140, F=200)
  assert_close(values_and_gradients('pallas', sizes, **dims), values_and_gradients('reference', sizes, **dims), rtol=3e-6)


def test_pallas_has_types_in_an_island_that_checks_what_varies(mesh_of):
  """Its interpreter has not, so this is a TPU's program: rows are each device's own, the matrices are those of all."""
  x, w, _, sizes = example([5, 0, 9, 1])

  def island(x, w, sizes):
    return ops.grouped_matmul(x, jax.lax.pcast(w, axes('B'), to='varying'), sizes[0], kernel='pallas')

  with mesh_of(2):
    run = jax.shard_map(island, in_specs=(spec('BD'), jax.P(), spec('BE')), out_specs=spec('BD'))
    gradients = jax.jit(jax.grad(lambda *arguments: run(*arguments).sum(), argnums=(0, 1)))
    placed = [jax.device_put(np.concatenate([a, a]), spec(dims)) for a, dims in ((x, 'BD'), (sizes[None], 'BE'))]
    program = gradients.trace(placed[0], w, placed[1]).lower(lowering_platforms=('tpu',))
  assert kernels_in(program.as_text()) == ['grouped_outer', 'grouped_rows_transposed']


def test_a_million_rows_make_no_more_blocks_than_they_need():
  """An expert without rows costs nothing: blocks are counted from the sizes, when the program runs."""
  size, count, group, start, stop = ops._blocks(1 << 20, jnp.array([0, 1 << 20, 0, 0]))
  assert int(count) == (1 << 20) // size and set(np.asarray(group[:count])) == {1}
  np.testing.assert_array_equal(start[:count], np.arange(0, 1 << 20, size))
  assert int(stop[0]) == 1 << 20


def test_pallas_visits_a_tile_for_each_group_in_it_and_no_more():
  def visits(past):
    count, *tables = jax.jit(lambda sizes: (v := grouped_tpu.make_visits(sizes, 32, 8, past=past)) and (v.count, *v.tables))(
      np.array([3, 0, 13, 4, 0]))
    return [np.asarray(table)[:int(count)].tolist() for table in tables]

  group, tile, read, start = visits(past=True)
  assert list(zip(group, tile)) == [(0, 0), (2, 0), (2, 1), (3, 2), (5, 2), (5, 3)]
  assert read == [0, 0, 1, 2, 2, 2] and start[:5] == [0, 3, 3, 16, 20]
  assert visits(past=False)[0] == [0, 1, 2, 2, 3, 4]  # the gradient of a matrix that no row met is written too


# Of the configs: rows of a device, width, hidden width, experts of a device.
SHAPES = [(65_536, 2880, 2880, 128), (65_536, 2880, 2880, 8), (65_536, 7168, 2048, 8), (262_144, 2048, 768, 128),
          (98_304, 2688, 1856, 128), (40, 4096, 6144, 8)]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('tiles', [grouped_tpu.TILES, grouped_tpu.TILES_V4])
def test_pallas_tiles_fit_and_are_not_small(monkeypatch, shape, tiles):
  monkeypatch.undo()
  monkeypatch.setattr(grouped_tpu, '_vmem', lambda: (tiles, 2 * tiles))
  P, D, F, E = shape
  for inner, width in ((D, F), (F, D)):
    rows, block = grouped_tpu.row_tiles(P, inner, width, E, 2)
    held = 4 * (rows * inner + inner * block + rows * block)
    assert held < tiles and rows % 128 == 0 and (block % 128 == 0 or block == width)
    if tiles == grouped_tpu.TILES:
      assert held > tiles / 4 or block == width
  rows, d, f = grouped_tpu.outer_tiles(P, D, F, E, 2)
  assert 4 * rows * (d + f) + 8 * d * f < tiles and d >= 512 and f >= 512


def test_pallas_refuses_rows_that_no_tile_can_hold(monkeypatch):
  monkeypatch.undo()
  with pytest.raises(ValueError, match=r"cannot hold rows of 200000 in a TPU's VMEM: use 'ragged_dot'"):
    grouped_tpu.row_tiles(1024, 200_000, 128, 8, 2)


@pytest.mark.parametrize('kernel', KERNELS)
def test_bf16_rows_give_bf16_summed_in_fp32(kernel):
  results = values_and_gradients(kernel, [300, 0, 212], dtype=jnp.bfloat16)
  assert {value.dtype for value in results.values()} == {jnp.dtype(jnp.bfloat16)}
  assert_close(results, values_and_gradients('reference', [300, 0, 212]), rtol=0.01)


def kernels_in(program: str) -> list[str]:
  return sorted(re.findall(r'kernel_name = "(\w+)"', program))


def lowered(kernel, platform, dtype=np.float32):
  """The program of a gradient, as text, for a machine that is not there."""
  x, w, dy, sizes = example([15, 0, 0], dtype=dtype)
  gradient = jax.jit(jax.grad(lambda x, w, sizes: jnp.sum(ops.grouped_matmul(x, w, sizes, kernel=kernel)), argnums=(0, 1)))
  return gradient.trace(x, w, sizes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize('kernel, platform, has, has_not', [
  ('blocked', 'cpu', 'while', 'ragged_dot'), ('ragged_dot', 'tpu', 'ragged_dot', 'while')])
def test_the_kernel_that_is_asked_for_is_the_one_in_the_program(kernel, platform, has, has_not):
  program = lowered(kernel, platform)
  assert has in program and has_not not in program


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_pallas_kernels_of_the_backward_pass_are_in_a_tpus_program(monkeypatch, dtype):
  monkeypatch.undo()
  assert kernels_in(lowered('pallas', 'tpu', dtype)) == ['grouped_outer', 'grouped_rows_transposed']


def test_a_layer_of_experts_on_a_tpu_has_no_product_more_than_it_needs(monkeypatch):
  """The compiled program of a layer's gradient on four v5p chips, two of which share the experts."""
  monkeypatch.undo()
  layer, norm = MoeSpec(n_experts=4, k=2, experts=MlpSpec(d_ff=256)), NormSpec()
  mesh = make_mesh(MeshConfig(expert=2), parse('v5p:2x2x1').devices())
  like = lambda a, split: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, split))

  def total(moe, x_BTD, ids_BT):
    rows = Rows(segment_ids_BT=ids_BT, positions_BT=None, rope={}, kernel='splash', norm=norm,
                dispatch=Dispatch(kernel='pallas'))
    return jnp.sum(moe(layer, x_BTD, rows)[0], dtype=jnp.float32)

  with jax.set_mesh(mesh):
    moe = jax.tree.map(lambda w: like(w, w.sharding.spec), jax.eval_shape(lambda: layer.build(256, norm, nnx.Rngs(0))))
    x_BTD, ids_BT = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16), jax.ShapeDtypeStruct((4, 128), jnp.int32)
    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    program = gradient.lower(moe, like(x_BTD, spec('BTD')), like(ids_BT, spec('BT'))).compile().as_text()
  straight = '\n'.join(line for line in program.splitlines() if 'more_rounds' not in line)
  calls = collections.Counter(
    re.findall(r'%(grouped_\w+?)(?:\.\d+)? = \S+ custom-call\(.*tpu_custom_call', straight))
  assert calls == {'grouped_rows': 3, 'grouped_outer': 3,  # up, gate and down
                   'grouped_rows_transposed': 2}  # up and gate add up in one
  assert not re.search(r'\bragged', program)


def test_the_contractions_that_tokamax_is_asked_for_are_those_of_the_gradients():
  """By XLA's function of the same meaning: its own kernels are for GPUs (tests/benchmarks/gpu.py compares them there)."""
  x, w, dy, sizes = example([5, 0, 9, 1])
  run = jax.jit(jax.lax.ragged_dot_general, static_argnums=3)
  expected = compiled('reference')(x, w, dy, sizes)
  assert_close({'x': run(dy, w, sizes, grouped_gpu.TRANSPOSED), 'w': run(x, dy, sizes, grouped_gpu.OUTER)},
               {name: expected[name] for name in 'xw'})


def test_tokamax_is_imported_only_when_it_is_to_be_used(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"not installed: pip install 'maxlm\[kernels\]', or use 'blocked'"):
    ops.check_grouped_matmul('tokamax', 'gpu', 'bfloat16')
  x, w, _, sizes = example([15, 0, 0])
  with pytest.raises(ValueError, match=r"pip install 'maxlm\[kernels\]'"):
    ops.grouped_matmul(x, w, sizes, kernel='tokamax')


@pytest.mark.parametrize('kernel, platform, dtype, message', [
  ('megablox', 'tpu', 'bfloat16', "'megablox' is none of blocked, pallas, tokamax, ragged_dot"),
  ('pallas', 'gpu', 'bfloat16', "runs on tpu, not on gpu: use 'tokamax'"),
  ('pallas', 'cpu', 'float32', "runs on tpu, not on cpu: use 'blocked'"),
  ('tokamax', 'cpu', 'bfloat16', "runs on gpu, not on cpu: use 'blocked'"),
  ('tokamax', 'gpu', 'float32', "takes bfloat16, not float32: use 'blocked'"),
  ('ragged_dot', 'gpu', 'bfloat16', "every expert on gpu: use 'tokamax'")])
def test_what_a_kernel_cannot_do_is_refused_in_one_line(kernel, platform, dtype, message):
  with pytest.raises(ValueError, match=message) as error:
    ops.check_grouped_matmul(kernel, platform, dtype)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('platform, dtype, kernel', [
  ('cpu', 'float32', 'blocked'), ('tpu', 'float32', 'pallas'), ('gpu', 'bfloat16', 'tokamax'),
  ('gpu', 'float32', 'blocked')])
def test_a_platform_has_its_kernel(platform, dtype, kernel):
  assert ComputeConfig(dtype=dtype).resolve(platform).experts_kernel == kernel
  assert ComputeConfig(dtype=dtype, experts_kernel='ragged_dot').resolve(platform).experts_kernel == 'ragged_dot'


@pytest.mark.parametrize('kernel, platform', [('blocked', 'gpu'), ('pallas', 'tpu'), ('ragged_dot', 'tpu')])
def test_what_a_kernel_can_do_is_accepted(kernel, platform):
  ops.check_grouped_matmul(kernel, platform, 'float32')
