"""One layer at a time, for tests: its weights, its outputs and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maxlm.checkpoint import named_leaves
from maxlm.layers.norm import NormSpec
from maxlm.sharding import spec as shard

NORM = NormSpec(eps=1e-5, cast='before')


def perturbed(spec, d_model: int, seed: int = 0, noise: float = 0.1) -> nnx.Module:
  """The spec's module with no norm scale left at 1 and no bias at 0, so that a skipped one shows. The same on every mesh."""
  def draw(key):
    module = spec.build(d_model, NORM, nnx.Rngs(params=key))
    leaves, treedef = jax.tree.flatten(module)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return treedef.unflatten([w + noise * jax.reshard(jax.random.normal(key, w.shape), jax.typeof(w).sharding.spec)
                              for w, key in zip(leaves, keys)])
  return jax.jit(draw)(jax.random.key(seed))


def values_and_gradients(apply, module: nnx.Module, x: np.ndarray, *rest, factors=None) -> dict[str, np.ndarray]:
  """y = apply(module, x, *rest), and by x and each weight the gradients of the sum of y * factors (None: random ones)."""
  factors = np.random.default_rng(7).normal(size=x.shape).astype(np.float32) if factors is None else factors

  def loss(module, x, *rest):
    y = apply(module, x, *rest)
    return jnp.sum(y.astype(jnp.float32) * jax.device_put(factors, shard('BTD'))), y

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, y), (by_weights, by_x) = run(module, jax.device_put(x, shard('BTD')), *rest)
  named = {'y': y, 'x': by_x} | named_leaves(by_weights)
  return {name: np.asarray(value, np.float32) for name, value in named.items()}


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float, without_gradient=()) -> None:
  """Each array within rtol of the largest value expected; names that end in `without_gradient`, and no others, are 0."""
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    scale = np.abs(value).max()
    assert (scale > 0) != name.endswith(tuple(without_gradient) or ('\0',)), f'{name}: largest is {scale}'
    np.testing.assert_allclose(actual[name], value, atol=rtol * scale, rtol=0, err_msg=name)
