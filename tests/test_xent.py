"""Chunked cross-entropy: values and gradients against the definition, meshes, what it never holds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.ops import xent
from maxlm.sharding import FSDP, spec
from tests.test_attention import assert_close, equations, place

DIMS = ('BTD', 'DV', 'BT', 'BT')  # x w targets weights


def example(B=4, T=15, D=16, V=48, seed=0):
  """x, w, targets, weights: some positions of weight 0, some of weight 2."""
  rng = np.random.default_rng(seed)
  x, w = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(D, V)).astype(np.float32)
  return x, w, rng.integers(0, V, (B, T), dtype=np.int32), rng.integers(0, 3, (B, T)).astype(np.float32)


def value_and_gradients(arrays, function=xent.cross_entropy, of=lambda loss: loss, **options):
  """nll, loss, and the gradients of `of(loss)` by x and w."""
  x, w, targets, weights = place(arrays, DIMS)

  def loss(x, w):
    loss, nll = function(x, w, targets, weights, **options)
    return of(loss), (loss, nll)

  (_, (loss, nll)), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
  assert [jax.typeof(g).sharding.spec for g in gradients] == [spec('BTD'), spec('DV')]
  return jax.device_get(dict(loss=loss, nll=nll, x=gradients[0], w=gradients[1]))


def reference(*arrays, **options):
  return jax.shard_map(functools.partial(xent.cross_entropy_reference, **options), out_specs=(spec(''), spec('BT')),
                       check_vma=False)(*arrays)


def loss_by_definition(x, w, targets, weights, softcap, z_loss):
  """In float64."""
  logits = x.astype(np.float64) @ w.astype(np.float64)
  logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
  lse = np.log(np.exp(logits).sum(-1))
  nll = lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return float((weights * (nll + z_loss * lse**2)).sum())


OPTIONS = [dict(), dict(softcap=3.0), dict(z_loss=0.01), dict(softcap=3.0, z_loss=0.01)]


@pytest.mark.parametrize('parts', [{'chunk': 7}, {'chunk': 60}, {}, {'block': 10}, {'block': 64}], ids=str)
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_value_and_gradients_agree_with_the_reference(mesh_of, options, parts):
  """60 tokens: in chunks of 7 they need padding, 60 and none are one chunk; 48 columns do in blocks of 10."""
  arrays = example()
  with mesh_of(1):
    assert_close(value_and_gradients(arrays, **parts, **options), value_and_gradients(arrays, reference, **options))


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_value_and_gradients_agree_with_finite_differences_of_the_definition(mesh_of, options):
  arrays = example(B=1, T=3, D=2, V=5)
  with mesh_of(1):
    results = value_and_gradients(arrays, chunk=2, **options)
  definition = functools.partial(loss_by_definition, softcap=options.get('softcap'), z_loss=options.get('z_loss', 0.0))
  np.testing.assert_allclose(results['loss'], definition(*arrays), rtol=1e-6)
  for which, name in enumerate('xw'):
    for at in np.ndindex(arrays[which].shape):
      sides = []
      for step in (1e-5, -1e-5):
        moved = [a.astype(np.float64) if i < 2 else a for i, a in enumerate(arrays)]
        moved[which][at] += step
        sides.append(definition(*moved))
      slope = (sides[0] - sides[1]) / 2e-5
      np.testing.assert_allclose(results[name][at], slope, atol=1e-5, err_msg=f'd loss / d {name}{at}')


@pytest.mark.parametrize('of', [lambda loss: 0.37 * loss, lambda loss: loss / 60, lambda loss: jnp.square(loss)],
                         ids=['times 0.37', 'mean', 'square'])
def test_both_gradients_carry_what_is_done_with_the_loss(mesh_of, of):
  arrays = example()
  with mesh_of(1):
    assert_close(value_and_gradients(arrays, of=of, chunk=16), value_and_gradients(arrays, reference, of=of))


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 8}, {'data': 8}, {'fsdp': 2, 'tensor': 4},
                                   {'data': 2, 'expert': 2, 'fsdp': 2}], ids=str)
@pytest.mark.parametrize('parts', [{'chunk': 4}, {'block': 5}], ids=str)
def test_every_mesh_gives_the_values_and_gradients_of_one_device(mesh_of, sizes, parts):
  arrays = example(B=8)
  options = dict(softcap=3.0, z_loss=0.01)
  with mesh_of(1):
    one = value_and_gradients(arrays, reference, **options)
  with mesh_of(8, **{'fsdp': 1, **sizes}):
    assert_close(value_and_gradients(arrays, **parts, **options), one)


def test_nll_carries_no_gradient(mesh_of):
  with mesh_of(1):
    x, w, targets, weights = place(example(), DIMS)
    gradients = jax.grad(lambda x, w: jnp.sum(xent.cross_entropy(x, w, targets, weights)[1]), argnums=(0, 1))(x, w)
  assert all((np.asarray(g) == 0).all() for g in gradients)


@pytest.mark.parametrize('parts, products', [({'chunk': 8}, 3), ({'block': 128}, 4)], ids=str)
def test_no_array_of_tokens_by_vocabulary_exists_and_products_are_three_or_four_with_gradients(mesh_of, parts, products):
  B, T, D, V = 4, 64, 16, 1024
  with mesh_of(4, tensor=2):
    arrays = place(example(B, T, D, V), DIMS)
    run = functools.partial(xent.cross_entropy, softcap=3.0, z_loss=0.01, **parts)
    with_gradients = jax.make_jaxpr(jax.grad(lambda *a: run(*a)[0], argnums=(0, 1)))(*arrays)
    without = jax.make_jaxpr(run)(*arrays)
  for program, n_products in ((with_gradients, products), (without, 1)):
    found = list(equations(program.jaxpr))
    largest = max(math.prod(v.aval.shape) for e in found for v in e.outvars)
    assert largest <= D * V < (B * T // 2) * (V // 2)  # at most w itself, where a device's logits would be more
    assert sum(e.primitive.name == 'dot_general' for e in found) == n_products


def test_the_gradient_of_w_is_scattered_over_fsdp_before_it_is_summed_over_other_devices(mesh_of):
  with mesh_of(8, data=2, fsdp=2, tensor=2):
    arrays = place(example(), DIMS)
    program = jax.make_jaxpr(jax.grad(lambda x, w, t, m: xent.cross_entropy(x, w, t, m)[0], argnums=1))(*arrays)
  D, V = example()[1].shape
  reductions = [(e.primitive.name, e.invars[0].aval.shape) for e in equations(program.jaxpr)
                if e.invars and e.invars[0].aval.shape in ((D, V // 2), (D // 2, V // 2)) and
                e.primitive.name.startswith(('psum', 'reduce_scatter'))]
  assert [name.split('_')[0] for name, _ in reductions] == ['reduce'] * len(FSDP) + ['psum']  # one axis after another
  assert [shape for _, shape in reductions] == [(D, V // 2)] + [(D // 2, V // 2)] * len(FSDP)


def test_bf16_hidden_states_have_an_fp32_loss_and_an_fp32_gradient_of_w(mesh_of):
  x, *rest = example()
  half = x.astype(jnp.bfloat16)
  with mesh_of(1):
    results = value_and_gradients((half, *rest), chunk=16, z_loss=0.01)
    expected = value_and_gradients((half.astype(np.float32), *rest), reference, z_loss=0.01)
    program = jax.make_jaxpr(jax.grad(lambda *a: xent.cross_entropy(*a)[0], argnums=(0, 1)))(*place((half, *rest), DIMS))
  products = [e.outvars[0].aval.dtype for e in equations(program.jaxpr) if e.primitive.name == 'dot_general']
  assert products == [np.float32] * 3
  assert {name: value.dtype for name, value in results.items()} == dict(
    loss=np.float32, nll=np.float32, x=jnp.bfloat16, w=np.float32)
  assert_close(results, expected, rtol=2e-2)


def test_large_logits_are_finite(mesh_of):
  x, *rest = example()
  with mesh_of(4, tensor=2):
    results = value_and_gradients((1e4 * x, *rest), chunk=16)
  for name, value in results.items():
    assert np.isfinite(value).all(), name


@pytest.mark.parametrize('tokens, vocabulary', [(16384, 128256), (1024, 128256), (16384, 201088), (16384, 100352),
                                               (1, 5000), (8192, 60)])
def test_blocks_are_few_and_of_a_width_that_is_scattered(tokens, vocabulary):
  block = xent.block_size(tokens, vocabulary)
  odd = block // (block & -block)
  assert odd <= 16 and (block % 128 == 0) and -(-vocabulary // block) * block <= max(128, 1.13 * vocabulary)
  assert block * tokens <= 1.13 * max(xent.BLOCK_LOGITS, 128 * tokens)
