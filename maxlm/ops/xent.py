"""Cross-entropy of next tokens from hidden states, in chunks of tokens: [tokens, vocabulary] never exists.

When differentiated, the loop that computes the loss also computes both gradients, while a chunk's logits are at hand:
three products instead of the four of recomputing the logits, and one product when only the loss is wanted.
`cross_entropy_reference` is the definition. C: the tokens of a chunk; inside the island V is this device's part of it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from maxlm.ops.einsum import scatter
from maxlm.sharding import axes, spec

# Tokens a device takes at a time. Adding a chunk's part to the fp32 gradient of w moves 8·D·V bytes for its 2·chunk·D·V
# of 6·chunk·D·V FLOPs: 0.75·chunk FLOPs a byte, where accelerators have 170 to 560. A CPU is fastest at 256 to 512.
CHUNK = 512
CHUNK_LOGITS = 1 << 26  # a chunk is shorter if its fp32 logits would be more than these (256 MiB) on a device


def cross_entropy(x_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, *,
                  softcap: float | None = None, z_loss: float = 0.0,
                  chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
  """-> loss_sum = sum(weights * (nll + z_loss*lse^2)), an fp32 scalar, and nll_BT in fp32, through which no gradient flows.

  logits = x @ w in fp32, then softcap*tanh(logits/softcap). w is the fp32 master: cast to x's dtype, gathered over fsdp,
  and its gradient reduced and scattered back, here. Targets and weights are data: they get no gradient. `chunk`:
  tokens a device takes at a time. Z-loss: PaLM, arXiv:2204.02311 section 5.
  """
  return _cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk)


def cross_entropy_reference(x_BTD, w_DV, targets_BT, weights_BT, *, softcap=None, z_loss=0.0):
  """The same on one device, all logits at once and differentiated by JAX."""
  logits_BTV = _capped(_dot('BTD,DV->BTV', x_BTD, w_DV.astype(x_BTD.dtype)), softcap)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  nll_BT = lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jnp.sum(weights_BT * (nll_BT + z_loss * lse_BT**2)), jax.lax.stop_gradient(nll_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk):
  loss, nll_BT, _ = _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, with_gradients=False)
  return loss, nll_BT


def _forward(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk):
  loss, nll_BT, gradients = _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, with_gradients=True)
  return (loss, nll_BT), gradients


def _backward(softcap, z_loss, chunk, gradients, cotangents):
  dloss, _ = cotangents
  dx_BTD, dw_DV = gradients
  return (dloss * dx_BTD).astype(dx_BTD.dtype), dloss * dw_DV, None, None


_cross_entropy.defvjp(_forward, _backward)


def _island(x_BTD, w_DV, targets_BT, weights_BT, softcap, z_loss, chunk, *, with_gradients):
  """Loss, nll and (dx, dw), each sharded as its argument; the gradients are () unless asked for."""
  replicas = tuple(axis for axis in axes('BT') if axis not in axes('D'))  # devices with other tokens and the same w

  def local(x_BTD, w_DV, targets_BT, weights_BT):
    w_DV = jax.lax.pcast(w_DV.astype(x_BTD.dtype), replicas, to='varying')
    w_DV = jax.lax.all_gather(w_DV, axes('D'), axis=0, tiled=True)
    D = x_BTD.shape[-1]
    tokens = x_BTD.reshape(-1, D), targets_BT.reshape(-1), weights_BT.reshape(-1).astype(jnp.float32)
    loss, nll_C, gradients = _over_chunks(w_DV, tokens, softcap, z_loss, chunk, with_gradients)
    loss, nll_BT = jax.lax.psum(loss, axes('BT')), nll_C.reshape(targets_BT.shape)
    if not with_gradients:
      return loss, nll_BT, ()
    dx_CD, dw_DV = gradients
    dw_DV = scatter('DV', dw_DV.astype(x_BTD.dtype), axes('BT'))
    return loss, nll_BT, (dx_CD.reshape(x_BTD.shape), dw_DV.astype(jnp.float32))

  gradients = (spec('BTD'), spec('DV')) if with_gradients else ()
  return jax.shard_map(
    local, in_specs=(spec('BTD'), spec('DV'), spec('BT'), spec('BT')), out_specs=(spec(''), spec('BT'), gradients),
  )(x_BTD, w_DV, targets_BT, weights_BT)


def _over_chunks(w_DV, tokens, softcap, z_loss, chunk, with_gradients):
  """The loop over chunks of this device's tokens, of one size: padded at the end with tokens of weight 0."""
  length = tokens[0].shape[0]
  chunk = chunk or max(1, min(CHUNK, CHUNK_LOGITS // w_DV.shape[1]))
  n_chunks = math.ceil(length / chunk)
  size = math.ceil(length / n_chunks)
  split = lambda x: jnp.pad(x, [(0, n_chunks * size - length), *[(0, 0)] * (x.ndim - 1)]).reshape(
    n_chunks, size, *x.shape[1:])
  join = lambda x: x.reshape(-1, *x.shape[2:])[:length]

  def body(sums, part):
    loss, nll_C, gradients = _chunk(w_DV, *part, softcap, z_loss, with_gradients)
    if not with_gradients:
      return (sums[0] + loss,), (nll_C,)
    dx_CD, dw_DV = gradients
    return (sums[0] + loss, sums[1] + dw_DV), (nll_C, dx_CD)

  zero = jnp.zeros_like(tokens[2][0])
  sums = (zero, jnp.zeros_like(w_DV, jnp.float32)) if with_gradients else (zero,)
  sums, parts = jax.lax.scan(body, sums, jax.tree.map(split, tokens))
  return sums[0], join(parts[0]), (join(parts[1]), sums[1]) if with_gradients else ()


def _chunk(w_DV, x_CD, target_C, weight_C, softcap, z_loss, with_gradients):
  """Loss, nll and gradients (dx, this device's part of dw) of one chunk. V here is this device's part of it."""
  logits_CV = _capped(_dot('CD,DV->CV', x_CD, w_DV), softcap)
  top_C = jax.lax.pmax(jax.lax.stop_gradient(logits_CV.max(axis=-1)), axes('V'))
  lse_C = top_C + jnp.log(jax.lax.psum(jnp.exp(logits_CV - top_C[:, None]).sum(axis=-1), axes('V')))
  index_V = jnp.arange(w_DV.shape[1]) + jax.lax.axis_index(axes('V')) * w_DV.shape[1]
  is_target_CV = index_V == target_C[:, None]
  nll_C = lse_C - jax.lax.psum(jnp.where(is_target_CV, logits_CV, 0).sum(axis=-1), axes('V'))
  loss = jnp.sum(weight_C * (nll_C + z_loss * jnp.square(lse_C)))
  if not with_gradients:
    return loss, nll_C, ()
  p_CV = jnp.exp(logits_CV - lse_C[:, None])
  dlogits_CV = (p_CV * (1 + 2 * z_loss * lse_C[:, None]) - is_target_CV) * weight_C[:, None]
  if softcap is not None:
    dlogits_CV *= 1 - jnp.square(logits_CV / softcap)
  dlogits_CV = dlogits_CV.astype(x_CD.dtype)
  dx_CD = jax.lax.psum(_dot('CV,DV->CD', dlogits_CV, w_DV), axes('V')).astype(x_CD.dtype)
  return loss, nll_C, (dx_CD, _dot('CD,CV->DV', x_CD, dlogits_CV))


def _capped(logits, softcap):
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _dot(dims, x, y):
  return jnp.einsum(dims, x, y, preferred_element_type=jnp.float32)
