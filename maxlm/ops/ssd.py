"""Linear attention with a scalar decay a head, over packed documents: the state-space duality of Mamba-2 (Dao & Gu 2024,
arXiv 2405.21060) and, with other inputs, Lightning Attention (Qin et al. 2024, arXiv 2401.04658).

  state_t = exp(log_decay_t) * state_{t-1} + b_t x_t^T        y_t = c_t^T state_t

In the words of attention c are queries, b keys and x values; K groups of heads share b and c as query heads share keys.

B batch  T time  N heads in K groups of G  Q state dim  H head dim; in chunks (`ops.chunks`) I chunks  t, s positions in one
"""

import jax
import jax.numpy as jnp

from maxlm.ops import chunks, context
from maxlm.ops.chunks import dot

CHUNK = 128  # tokens: about head and state dim, where the work within chunks equals that on states (section 6)


def ssd(x_BTNH: jax.Array, log_decay_BTN: jax.Array, b_BTKQ: jax.Array, c_BTKQ: jax.Array, starts_BT: jax.Array,
        state_BNQH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """(y_BTNH, state after the last token), both fp32. starts: bool, the state before this token is empty.

  Where the mesh splits rows (`ops.context`) they begin here: the state before is for nothing, and that after None.
  """
  return chunks.over_rows(ssd_chunked, _of_parts, ('BTNH', 'BTN', 'BTKQ', 'BTKQ', 'BT', 'BNQH'), ('BTNH', 'BNQH'),
                          x_BTNH, log_decay_BTN, b_BTKQ, c_BTKQ, starts_BT, state_BNQH)


def _of_parts(*arrays):
  return context.joined(ssd_chunked(*map(context.as_rows, arrays), None)[0])


def ssd_reference(x_BTNH, log_decay_BTN, b_BTKQ, c_BTKQ, starts_BT, state_BNQH):
  """`ssd` as it is defined, token by token."""
  heads = x_BTNH.shape[2] // b_BTKQ.shape[2]

  def token(state_BNQH, inputs):
    x_BNH, log_decay_BN, b_BKQ, c_BKQ, start_B = inputs
    b_BNQ, c_BNQ = jnp.repeat(b_BKQ, heads, axis=1), jnp.repeat(c_BKQ, heads, axis=1)
    state_BNQH = jnp.where(start_B[:, None, None, None], 0, state_BNQH)
    state_BNQH = jnp.exp(log_decay_BN)[..., None, None] * state_BNQH + b_BNQ[..., None] * x_BNH[..., None, :]
    return state_BNQH, dot('BNQ,BNQH->BNH', c_BNQ, state_BNQH)

  inputs = *(a.astype(jnp.float32) for a in (x_BTNH, log_decay_BTN, b_BTKQ, c_BTKQ)), starts_BT
  state_BNQH, y_TBNH = jax.lax.scan(token, state_BNQH, tuple(a.swapaxes(0, 1) for a in inputs))
  return y_TBNH.swapaxes(0, 1), state_BNQH


def ssd_chunked(x_BTNH, log_decay_BTN, b_BTKQ, c_BTKQ, starts_BT, state_BNQH):
  """`ssd` on one device. Within a chunk, attention with decays for weights; from chunk to chunk, the recurrence of states.

  Unrolled, y_t = sum_{s <= t} (c_t . b_s) decay(s, t) x_s + decay(start, t) c_t^T state, with the state before the chunk.
  state None: inputs are parts [2B, …] of rows that other devices have the rest of (`ops.context`). These need to know of a
  part what it adds to an empty state and what it keeps of one, so a scan goes over its states twice.
  """
  T, K, size = x_BTNH.shape[1], b_BTKQ.shape[2], min(CHUNK, x_BTNH.shape[1])
  def group(x_BIN):
    return x_BIN.reshape(*x_BIN.shape[:2], K, -1, *x_BIN.shape[3:])

  x_BIKGsH, log_decay_BIKGt = group(chunks.split_time(x_BTNH, size)), group(chunks.split_time(log_decay_BTN, size))
  b_BIKsQ, c_BIKtQ = chunks.split_time(b_BTKQ, size), chunks.split_time(c_BTKQ, size)
  document_BI11t = chunks.documents(starts_BT, size)[:, :, None]

  scores_BIKts = dot('BIKtQ,BIKsQ->BIKts', c_BIKtQ, b_BIKsQ)
  scores_BIKGts = scores_BIKts[:, :, :, None] * chunks.decay_between(log_decay_BIKGt, document_BI11t)
  y_BIKGtH = dot('BIKGts,BIKGsH->BIKGtH', scores_BIKGts, x_BIKGsH)

  from_start_BIKGt = chunks.decay_from_start(log_decay_BIKGt, document_BI11t)
  to_end_BIKGs = chunks.decay_to_end(log_decay_BIKGt, document_BI11t)
  added_BIKGQH = dot('BIKsQ,BIKGsH->BIKGQH', b_BIKsQ, x_BIKGsH * to_end_BIKGs[..., None])

  def chunk(state_BKGQH, inputs):
    kept_BKG, added_BKGQH = inputs
    return kept_BKG[..., None, None] * state_BKGQH + added_BKGQH, state_BKGQH

  inputs = from_start_BIKGt[..., -1].swapaxes(0, 1), added_BIKGQH.swapaxes(0, 1)
  if state_BNQH is None:
    kept_BN = jnp.where(starts_BT.any(axis=1)[:, None], 0, jnp.exp(jnp.sum(log_decay_BTN, axis=1, dtype=jnp.float32)))
    added_BKGQH, _ = jax.lax.scan(chunk, jnp.zeros_like(added_BIKGQH[:, 0]), inputs)
    summaries = kept_BN.reshape(added_BKGQH.shape[:3]), added_BKGQH
    state_BKGQH = context.states_before(lambda state, summary: chunk(state, summary)[0], summaries, added_BKGQH.shape[1:])
  else:
    state_BKGQH = state_BNQH.reshape(added_BIKGQH[:, 0].shape)
  state_BKGQH, before_IBKGQH = jax.lax.scan(chunk, state_BKGQH, inputs)
  y_BIKGtH += from_start_BIKGt[..., None] * dot('BIKtQ,IBKGQH->BIKGtH', c_BIKtQ, before_IBKGQH)
  y_BINtH = y_BIKGtH.reshape(*y_BIKGtH.shape[:2], -1, *y_BIKGtH.shape[4:])
  return chunks.join_time(y_BINtH, T), state_BKGQH.reshape(-1, x_BTNH.shape[2], *state_BKGQH.shape[3:])
