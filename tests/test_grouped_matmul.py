"""Grouped products: both ways to compute them against a matrix for each row, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops import grouped_matmul as ops

KERNELS = {'on a CPU': ops.grouped_matmul, 'elsewhere': jax.lax.ragged_dot}
SIZES = [[5, 0, 9, 1], [0, 0, 15, 0], [15, 0, 0, 0], [0, 0, 0, 15], [4, 4, 4, 3], [1, 1, 12, 1], [15], [0, 1], [2] * 20]


def values_and_gradients(run, sizes, dtype=np.float32):
  rng = np.random.default_rng(0)
  x, w, dy = (rng.normal(size=shape).astype(dtype) for shape in ((sum(sizes), 6), (len(sizes), 6, 10), (sum(sizes), 10)))

  @jax.jit
  def all_three(x, w, dy, sizes):
    y, pull = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
    return dict(zip('yxw', (y, *pull(dy))))

  return all_three(x, w, dy, np.array(sizes))


def assert_close(actual, expected, rtol=1e-6):
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name].astype(np.float32), value, atol=rtol * np.abs(value).max(), err_msg=name)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of 2 to 4 rows, so that a few rows are several."""
  monkeypatch.setattr(ops, 'SMALLEST_BLOCK', 2)
  monkeypatch.setattr(ops, 'LARGEST_BLOCK', 4)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('kernel', KERNELS)
def test_values_and_gradients_are_those_of_a_matrix_for_each_row(kernel, sizes):
  assert_close(values_and_gradients(KERNELS[kernel], sizes), values_and_gradients(ops.grouped_matmul_reference, sizes))


def test_sizes_as_they_come_with_the_blocks_they_are_used_with(monkeypatch):
  monkeypatch.undo()
  assert ops.LARGEST_BLOCK == 128
  sizes = np.bincount(np.random.default_rng(0).integers(0, 5, 700) ** 2 % 6, minlength=6).tolist()
  assert 0 in sizes and max(sizes) > 128
  assert_close(values_and_gradients(ops.grouped_matmul, sizes), values_and_gradients(ops.grouped_matmul_reference, sizes))


def test_a_million_rows_make_no_more_blocks_than_they_need():
  """An expert without rows costs nothing: blocks are counted from the sizes, when the program runs."""
  size, count, group, start, stop = ops._blocks(1 << 20, jnp.array([0, 1 << 20, 0, 0]))
  assert int(count) == (1 << 20) // size and set(np.asarray(group[:count])) == {1}
  np.testing.assert_array_equal(start[:count], np.arange(0, 1 << 20, size))
  assert int(stop[0]) == 1 << 20


@pytest.mark.parametrize('kernel', KERNELS)
def test_bf16_rows_give_bf16_summed_in_fp32(kernel):
  results = values_and_gradients(KERNELS[kernel], [300, 0, 212], jnp.bfloat16)
  assert {value.dtype for value in results.values()} == {jnp.dtype(jnp.bfloat16)}
  assert_close(results, values_and_gradients(ops.grouped_matmul_reference, [300, 0, 212]), rtol=0.01)


@pytest.mark.parametrize('platform, has, has_not', [('cpu', 'while', 'ragged_dot'), ('tpu', 'ragged_dot', 'while')])
def test_a_cpu_is_given_the_loop_and_others_the_ragged_product(platform, has, has_not):
  arguments = np.ones((15, 6), np.float32), np.ones((3, 6, 10), np.float32), np.array([15, 0, 0])
  gradient = jax.jit(jax.grad(lambda x, w, sizes: jnp.sum(ops.grouped_matmul(x, w, sizes)), argnums=(0, 1)))
  program = gradient.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
  assert has in program and has_not not in program
