"""A whole model at a time, for tests: its weights, its hidden states, its loss and all gradients."""

import functools
import math

import jax
import numpy as np

from maxlm.data import to_device
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.sharding import MeshConfig, make_mesh

FP32 = ComputeConfig(dtype='float32', kernel='chunked').resolve('cpu')


def perturbed(model: DecoderConfig, seed: int = 0) -> Decoder:
  """Weights with no norm scale left at 1 and no bias or sink at 0, so that a skipped one shows. The same on every mesh."""
  likes, treedef = jax.tree.flatten(jax.eval_shape(functools.partial(Decoder, model), jax.random.key(0)))
  drawn = _drawn(repr(model), seed, model)
  return treedef.unflatten(jax.device_put(w, like.sharding.spec) for w, like in zip(drawn, likes))


_DRAWN: dict[tuple[str, int], list[np.ndarray]] = {}


def _drawn(name: str, seed: int, model: DecoderConfig) -> list[np.ndarray]:
  """Drawn once a process, on one device: to compile that takes as long as to compile the gradients."""
  def draw(key):
    init_key, noise_key = jax.random.split(key)
    leaves = []
    for i, (path, w) in enumerate(jax.tree.leaves_with_path(Decoder(model, init_key))):
      if not jax.tree_util.keystr(path).rpartition('.w_')[1]:  # matrices are random already
        w += 0.1 * jax.random.normal(jax.random.fold_in(noise_key, i), w.shape)
      leaves.append(w)
    return leaves

  if (name, seed) not in _DRAWN:
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
      _DRAWN[name, seed] = jax.device_get(jax.jit(draw)(jax.random.key(seed)))
  return _DRAWN[name, seed]


def hidden(params, batch, model, compute=FP32) -> np.ndarray:
  """Final hidden states [B, T, D] of a batch."""
  device = to_device(batch)
  x_BTD, _ = jax.jit(functools.partial(Decoder.hidden, config=model, compute=compute))(
    params, tokens_BT=device['tokens'], segment_ids_BT=device['segment_ids'], positions_BT=device['positions'])
  return np.asarray(x_BTD)


def gradients(params, batch, model, compute=FP32, **loss_options) -> tuple[float, dict[str, np.ndarray]]:
  """(loss, gradients as {name: array}) of the mean loss, with what routers add to it."""
  n = int((batch['segment_ids'] > 0).sum())

  def loss(params, batch):
    loss_sum, _, routers = next_token_loss(params, model, compute, LossConfig(z_loss=1e-3, **loss_options), batch)
    return sum((sums['loss'] for sums in routers), loss_sum) / n

  value, grads = jax.jit(jax.value_and_grad(loss))(params, to_device(batch))
  return float(value), {jax.tree_util.keystr(path): np.asarray(g) for path, g in jax.tree_util.tree_leaves_with_path(grads)}


def assert_same_gradients(a: dict[str, np.ndarray], b: dict[str, np.ndarray], rtol: float, without_gradient=()) -> None:
  """Each leaf within rtol of its largest value; those whose names have one of `without_gradient`, and no others, are 0."""
  assert a.keys() == b.keys()
  for name in a:
    scale = np.abs(a[name]).max()
    assert (scale == 0) == any(word in name for word in without_gradient), f'{name}: the largest gradient is {scale}'
    np.testing.assert_allclose(b[name], a[name], atol=rtol * scale, rtol=0, err_msg=name)


DOCUMENT_LENGTHS = 30, 3, 22, 40, 11
DOCUMENT_STARTS = (0, 0), (0, 30), (0, 33), (1, 0), (1, 40)  # (row, place)


def assert_packing_changes_nothing(params, packed: dict, alone: dict, model: DecoderConfig) -> None:
  """packed: two rows of those documents; alone: the same, one a row. Hidden states of each, and the gradients."""
  together, apart = hidden(params, packed, model), hidden(params, alone, model)
  for (row, start), n, row_alone in zip(DOCUMENT_STARTS, DOCUMENT_LENGTHS, apart, strict=True):
    np.testing.assert_allclose(together[row, start:start + n], row_alone[:n], atol=2e-5)
  loss_a, grads_a = gradients(params, packed, model)
  loss_b, grads_b = gradients(params, alone, model)
  assert math.isclose(loss_a, loss_b, rel_tol=1e-6)
  assert_same_gradients(grads_a, grads_b, 2e-5)
