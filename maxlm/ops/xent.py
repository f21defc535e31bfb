"""Cross-entropy of next tokens from hidden states, a part of the logits at a time: [tokens, vocabulary] never exists.

When differentiated, gradients are computed with the loss, while logits are at hand. A small head is taken in chunks of
tokens: three products, and the fp32 gradient of w is read and written once a chunk. A large one is taken in blocks of the
vocabulary, twice, first for the log-sum-exps: four products, but each block's gradient is made once, and scattered at once.
`cross_entropy_reference` is the definition. C: the tokens of a chunk, or all of a device; inside the island V is this
device's part of the vocabulary; v: a block of it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from maxlm.ops.einsum import scatter, summed_product
from maxlm.ops.rings import LANES
from maxlm.sharding import axes, spec

# Tokens of a chunk. Adding its part to the fp32 gradient of w moves 8·D·V bytes for its 6·chunk·D·V FLOPs, which is why a
# large head is taken otherwise: at 512 tokens 0.75·chunk FLOPs a byte, where accelerators have 170 to 560.
CHUNK = 512
SMALL_HEAD = 1 << 24  # entries of w on a device: up to so many, a cache or a moment holds its gradient
BLOCK_LOGITS = 1 << 27  # of a block, fp32 (512 MiB); all logits are one block if they are no more


def cross_entropy(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *,
                  softcap: float | None = None, z_loss: float = 0.0,
                  chunk: int | None = None, block: int | None = None) -> tuple[jax.Array, jax.Array]:
  """-> loss_sum = sum(weights * (nll + z_loss*lse^2)), an fp32 scalar, and nll_BT in fp32, through which no gradient flows.

  logits = x @ w in fp32, then softcap*tanh(logits/softcap). w is the fp32 master: cast to x's dtype, gathered over fsdp,
  and its gradient reduced and scattered back in that dtype, here. Targets and weights are data: they get no gradient.
  chunk, block: take a device's tokens, or its part of the vocabulary, so many at a time. Z-loss: PaLM, arXiv:2204.02311
  section 5.
  """
  return _cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block)


def cross_entropy_reference(x_BTD, w_DV, targets_BT, weights_BT, *, softcap=None, z_loss=0.0):
  """The same on one device, all logits at once and differentiated by JAX."""
  logits_BTV = _capped(_dot('BTD,DV->BTV', x_BTD, w_DV.astype(x_BTD.dtype)), softcap)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  nll_BT = lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jnp.sum(weights_BT * (nll_BT + z_loss * lse_BT**2)), jax.lax.stop_gradient(nll_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block):
  loss, nll_BT, _ = _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block, with_gradients=False)
  return loss, nll_BT


def _forward(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block):
  loss, nll_BT, gradients = _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block, with_gradients=True)
  return (loss, nll_BT), gradients


def _backward(softcap, z_loss, chunk, block, gradients, cotangents):
  dloss, _ = cotangents
  dx_BTD, dw_DV = gradients
  return (dloss * dx_BTD).astype(dx_BTD.dtype), dloss * dw_DV, None, None


_cross_entropy.defvjp(_forward, _backward)


def _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, block, *, with_gradients):
  """Loss, nll and (dx, dw), each sharded as its argument; the gradients are () unless asked for."""
  replicas = tuple(axis for axis in axes('BT') if axis not in axes('D'))  # devices with other tokens and the same w

  def local(x_BTD, w_DV, targets_BT, weights_BT):
    D, V = x_BTD.shape[-1], w_DV.shape[1]
    tokens = x_BTD.reshape(-1, D), targets_BT.reshape(-1), weights_BT.reshape(-1).astype(jnp.float32)
    in_chunks = block is None and (chunk is not None or D * V <= SMALL_HEAD)
    size = V if in_chunks else block or block_size(tokens[1].size, V)
    w_DV = jnp.pad(w_DV.astype(x_BTD.dtype), ((0, 0), (0, -V % size)))
    w_DV = jax.lax.all_gather(jax.lax.pcast(w_DV, replicas, to='varying'), axes('D'), axis=0, tiled=True)
    if in_chunks:
      parts = _over_chunks(w_DV, tokens, softcap, z_loss, chunk or CHUNK, with_gradients)
    else:
      parts = _over_blocks(w_DV, V, tokens, softcap, z_loss, size, with_gradients)
    loss, nll_C, gradients = parts
    loss, nll_BT = jax.lax.psum(loss, axes('BT')), nll_C.reshape(targets_BT.shape)
    if not with_gradients:
      return loss, nll_BT, ()
    dx_CD, dw_DV = gradients
    return loss, nll_BT, (dx_CD.reshape(x_BTD.shape), dw_DV)

  gradients = (spec('BTD'), spec('DV')) if with_gradients else ()
  return jax.shard_map(
    local, in_specs=(spec('BTD'), spec('DV'), spec('BT'), spec('BT')), out_specs=(spec(''), spec('BT'), gradients),
  )(x_BTD, w_DV, targets_BT, weights_BT)


def _over_chunks(w_DV, tokens, softcap, z_loss, chunk, with_gradients):
  """The loop over chunks of this device's tokens, of one size: padded at the end with tokens of weight 0."""
  length = tokens[0].shape[0]
  n_chunks = math.ceil(length / chunk)
  size = math.ceil(length / n_chunks)
  split = lambda x: jnp.pad(x, [(0, n_chunks * size - length), *[(0, 0)] * (x.ndim - 1)]).reshape(
    n_chunks, size, *x.shape[1:])
  join = lambda x: x.reshape(-1, *x.shape[2:])[:length]

  def body(sums, part):
    x_CD, target_C, weight_C = part
    logits_CV = _capped(_dot('CD,DV->CV', x_CD, w_DV), softcap)
    index_V = _index(w_DV.shape[1])
    loss, nll_C, lse_C = _losses(*_statistics(logits_CV, index_V, target_C), weight_C, z_loss)
    if not with_gradients:
      return (sums[0] + loss,), (nll_C,)
    dlogits_CV = _dlogits(logits_CV, lse_C, index_V, target_C, weight_C, softcap, z_loss, x_CD.dtype)
    dx_CD = jax.lax.psum(_dot('CV,DV->CD', dlogits_CV, w_DV), axes('V')).astype(x_CD.dtype)
    return (sums[0] + loss, sums[1] + _dot('CD,CV->DV', x_CD, dlogits_CV)), (nll_C, dx_CD)

  zero = jnp.zeros_like(tokens[2][0])
  sums = (zero, jnp.zeros_like(w_DV, jnp.float32)) if with_gradients else (zero,)
  sums, parts = jax.lax.scan(body, sums, jax.tree.map(split, tokens))
  if not with_gradients:
    return sums[0], join(parts[0]), ()
  dw_DV = scatter('DV', sums[1].astype(w_DV.dtype), axes('BT')).astype(jnp.float32)
  return sums[0], join(parts[0]), (join(parts[1]), dw_DV)


def _over_blocks(w_DV, V, tokens, softcap, z_loss, block, with_gradients):
  """The two loops over blocks of this device's part of the vocabulary, of one size: after V come columns nobody chooses."""
  (x_CD, target_C, weight_C), (D, padded) = tokens, w_DV.shape
  w_vDV = jnp.moveaxis(w_DV.reshape(D, padded // block, block), 1, 0)
  index_vV = jnp.pad(_index(V), (0, padded - V), constant_values=-1).reshape(padded // block, block)

  def logits_of(w_DV, index_V):
    return jnp.where(index_V < 0, -jnp.inf, _capped(_dot('CD,DV->CV', x_CD, w_DV), softcap))

  def forward(sums, part):
    top_C, total_C, picked_C = sums
    new_top_C, new_total_C, new_picked_C = _statistics(logits_of(*part), part[1], target_C)
    higher_C = jnp.maximum(top_C, new_top_C)
    total_C = total_C * jnp.exp(top_C - higher_C) + new_total_C * jnp.exp(new_top_C - higher_C)
    return (higher_C, total_C, picked_C + new_picked_C), None

  zero_C = jax.lax.pcast(jnp.zeros_like(weight_C), axes('V'), to='varying')
  (top_C, total_C, picked_C), _ = jax.lax.scan(forward, (zero_C - jnp.inf, zero_C, zero_C), (w_vDV, index_vV))
  loss, nll_C, lse_C = _losses(top_C, total_C, picked_C, weight_C, z_loss)
  if not with_gradients:
    return loss, nll_C, ()

  def backward(dx_CD, part):
    w_DV, index_V = part
    dlogits_CV = _dlogits(logits_of(*part), lse_C, index_V, target_C, weight_C, softcap, z_loss, x_CD.dtype)
    dw_DV = summed_product('CD', 'CV', 'DV', x_CD, dlogits_CV, axes('BT')).astype(jnp.float32)
    return dx_CD + _dot('CV,DV->CD', dlogits_CV, w_DV), dw_DV

  dx_CD = jax.lax.pcast(jnp.zeros_like(x_CD, jnp.float32), axes('V'), to='varying')
  dx_CD, dw_vDV = jax.lax.scan(backward, dx_CD, (w_vDV, index_vV))
  dw_DV = jnp.moveaxis(dw_vDV, 0, 1).reshape(dw_vDV.shape[1], -1)[:, :V]
  return loss, nll_C, (jax.lax.psum(dx_CD, axes('V')).astype(x_CD.dtype), dw_DV)


# -- of some of the logits -----------------------------------------------------------------------------------------------


def _index(size):
  """Numbers of this device's part of the vocabulary, of `size`."""
  return jnp.arange(size) + jax.lax.axis_index(axes('V')) * size


def _statistics(logits_CV, index_V, target_C):
  """The highest logit, the sum of exp(logits - it), and the target's logit or 0: of this device's columns."""
  top_C = jax.lax.stop_gradient(logits_CV.max(axis=-1))
  total_C = jnp.exp(logits_CV - top_C[:, None]).sum(axis=-1)
  return top_C, total_C, jnp.where(index_V == target_C[:, None], logits_CV, 0).sum(axis=-1)


def _losses(top_C, total_C, picked_C, weight_C, z_loss):
  """The sum of weighted losses, nll and log-sum-exps, from the statistics of all devices that share the vocabulary."""
  highest_C = jax.lax.pmax(top_C, axes('V'))
  lse_C = highest_C + jnp.log(jax.lax.psum(total_C * jnp.exp(top_C - highest_C), axes('V')))
  nll_C = lse_C - jax.lax.psum(picked_C, axes('V'))
  return jnp.sum(weight_C * (nll_C + z_loss * jnp.square(lse_C))), nll_C, lse_C


def _dlogits(logits_CV, lse_C, index_V, target_C, weight_C, softcap, z_loss, dtype):
  """The loss's gradient by the products that the logits are made from."""
  p_CV = jnp.exp(logits_CV - lse_C[:, None])
  dlogits_CV = (p_CV * (1 + 2 * z_loss * lse_C[:, None]) - (index_V == target_C[:, None])) * weight_C[:, None]
  if softcap is not None:
    dlogits_CV *= jnp.where(index_V < 0, 0, 1 - jnp.square(logits_CV / softcap))
  return dlogits_CV.astype(dtype)


def block_size(tokens: int, vocabulary: int) -> int:
  """Columns of a block, of as few as keep the logits of one within bounds: 8 to 16 times a power of two, as a scatter of 23
  or more times one over a whole v6e torus compiles to a sum of everything (docs/LOG.md, 2026-11-23)."""
  columns = math.ceil(vocabulary / math.ceil(tokens * vocabulary / BLOCK_LOGITS))
  step = max(LANES, 1 << columns.bit_length() - 4)
  return math.ceil(columns / step) * step


def _capped(logits, softcap):
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _dot(dims, x, y):
  return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)
