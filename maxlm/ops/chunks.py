"""What recurrences share that go over packed rows a chunk of tokens at a time: time in chunks, and decays within one.

A state is multiplied by exp(log_decay) at each token, log_decay <= 0, and is empty before a token that starts a document.
Two rules keep the chunked forms exact. The decay from s to t is the exponential of a sum over the tokens between them, taken
as that sum: as a difference of two running sums it would lose its digits behind a strong decay, and overflow for s > t.
A boundary is a mask on the decays, not a decay: nothing leaks, and no gradient is inf * 0.

B batch  T time  N heads  Q channels  I chunks  t, s positions in a chunk; `…t` has time last, after dims that broadcast
"""

import jax
import jax.numpy as jnp

from maxlm.sharding import axis_size, spec


def over_rows(whole, of_parts, in_dims: tuple[str, ...], out_dims: tuple[str, str], *arrays):
  """(outputs, what the next tokens need of these): `whole(*arrays)` on each device's part of the batch and the heads.

  The last array is what these tokens need of those before. Where the mesh splits rows (`ops.context`) it is for nothing,
  since rows begin in them: outputs are of_parts(*arrays but the last), and what the next tokens would need is None.
  """
  if axis_size('T') > 1:
    *in_specs, out_spec = (spec(dims) for dims in (*in_dims[:-1], out_dims[0]))
    return jax.shard_map(of_parts, in_specs=tuple(in_specs), out_specs=out_spec)(*arrays[:-1]), None
  # M is never split
  in_specs, out_specs = (tuple(spec(dims.replace('T', 'M')) for dims in group) for group in (in_dims, out_dims))
  arrays = [array if array is None else jax.reshard(array, in_spec) for array, in_spec in zip(arrays, in_specs)]
  y, state = jax.shard_map(whole, in_specs=in_specs, out_specs=out_specs)(*arrays)
  return jax.reshard(y, spec(out_dims[0])), state


def split_time(x: jax.Array, size: int) -> jax.Array:
  """[B, T, N, …] -> fp32 [B, I, N, size, …]. Zeros are appended: a token without input and decay changes no state."""
  B, T = x.shape[:2]
  padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
  return jnp.moveaxis(padded.reshape(B, -1, size, *x.shape[2:]), 2, 3)


def join_time(y: jax.Array, length: int) -> jax.Array:
  """[B, I, N, t, …] -> [B, length, N, …]."""
  y = jnp.moveaxis(y, 3, 2)
  return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]


def documents(starts_BT: jax.Array, size: int) -> jax.Array:
  """int32 [B, I, 1, t]: how many documents have started in the chunk up to t. 0: the one the chunk before ended in."""
  return jnp.cumsum(split_time(starts_BT[:, :, None], size).astype(jnp.int32), axis=-1)


def sums_to(x: jax.Array) -> jax.Array:
  """[…t]: over the tokens of the chunk up to t."""
  return jnp.cumsum(x, axis=-1)


def sums_after(x: jax.Array) -> jax.Array:
  """[…s]: over the tokens of the chunk after s."""
  rest = jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)
  return jax.lax.cumsum(rest, axis=x.ndim - 1, reverse=True)


def visible(document: jax.Array) -> jax.Array:
  """bool […ts]: s is t or before it, and in its document."""
  causal_ts = jnp.tri(document.shape[-1], dtype=bool)
  return causal_ts & (document[..., :, None] == document[..., None, :])


def decay_between(log_decay: jax.Array, document: jax.Array) -> jax.Array:
  """[…ts]: of what token s wrote, until token t; 0 where t does not see s."""
  after_s = jnp.tri(log_decay.shape[-1], k=-1, dtype=bool)  # [m, s]: token m comes after s
  sums = jnp.cumsum(jnp.where(after_s, log_decay[..., :, None], 0), axis=-2)
  return jnp.where(visible(document), jnp.exp(sums), 0)


def decay_from_start(log_decay: jax.Array, document: jax.Array) -> jax.Array:
  """[…t]: of the state before the chunk, until token t."""
  return jnp.where(document == 0, jnp.exp(sums_to(log_decay)), 0)


def decay_to_end(log_decay: jax.Array, document: jax.Array) -> jax.Array:
  """[…s]: of what token s wrote, until the end of the chunk."""
  return jnp.where(document == document[..., -1:], jnp.exp(sums_after(log_decay)), 0)


def decayed_products(x_tQ: jax.Array, k_tQ: jax.Array, log_decay_Qt: jax.Array) -> jax.Array:
  """[…ts]: x_t . decay(s, t) k_s for s <= t, else 0, where each channel of Q has its own decay.

  As a product of matrices it needs decay(s, t) as a factor of t and one of s, and exp(sum to t) exp(-sum to s) overflows.
  So the chunk, a power of two of tokens, is halved: from a token s of the first half to a token t of the second, it is the
  decay from s to the middle times that from the middle to t, neither above 1. What is left are the two halves.
  """
  *lead, size, Q = x_tQ.shape
  if size == 1:
    return jnp.sum(x_tQ * k_tQ, axis=-1, keepdims=True)
  x_X2tQ, k_X2tQ = (a.reshape(-1, 2, size // 2, Q) for a in (x_tQ, k_tQ))  # X: all dims before, as one
  log_decay_X2Qt = log_decay_Qt.reshape(-1, Q, 2, size // 2).swapaxes(1, 2)
  within_X2ts = decayed_products(x_X2tQ, k_X2tQ, log_decay_X2Qt)
  x_XtQ = x_X2tQ[:, 1] * jnp.exp(sums_to(log_decay_X2Qt[:, 1])).swapaxes(1, 2)
  k_XsQ = k_X2tQ[:, 0] * jnp.exp(sums_after(log_decay_X2Qt[:, 0])).swapaxes(1, 2)
  across_Xts = dot('XtQ,XsQ->Xts', x_XtQ, k_XsQ)
  first = jnp.concatenate([within_X2ts[:, 0], jnp.zeros_like(across_Xts)], axis=-1)
  second = jnp.concatenate([across_Xts, within_X2ts[:, 1]], axis=-1)
  return jnp.concatenate([first, second], axis=-2).reshape(*lead, size, size)


def dot(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """A product in fp32: a TPU would otherwise round its factors to bf16, and a state carries that error on."""
  return jnp.einsum(dims, x, y, precision='highest')
