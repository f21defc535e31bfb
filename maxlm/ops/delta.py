"""The gated delta rule over packed documents: Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), where a head has one
decay, and Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692), where each of its key channels has its own.

  state_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) state_{t-1} + beta_t k_t v_t^T        y_t = q_t^T state_t

The state maps keys to values: a token replaces the part `beta` of what the decayed state holds for its key by its value.

B batch  T time  N heads  K key heads  Q key dim  H value dim; in chunks (`ops.chunks`) I chunks  t, s positions in one
"""

import jax
import jax.numpy as jnp

from maxlm.ops import chunks, context
from maxlm.ops.chunks import dot

CHUNK = 64  # tokens, a power of two: solving for a chunk's writes costs its square


def delta_rule(q_BTKQ: jax.Array, k_BTKQ: jax.Array, v_BTNH: jax.Array, log_decay: jax.Array, beta_BTN: jax.Array,
               starts_BT: jax.Array, state_BNQH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """(y_BTNH, state after the last token), both fp32.

  Each of the K heads of q and k serves N/K heads of v. log_decay: [B, T, N], or [B, T, N, Q] with one a key channel.
  starts: bool, the state before this token is empty. Where the mesh splits rows (`ops.context`) they begin here: the state
  before is for nothing, and that after None.
  """
  def whole(q_BTKQ, k_BTKQ, v_BTNH, *rest):
    heads = v_BTNH.shape[2] // k_BTKQ.shape[2]
    return delta_chunked(jnp.repeat(q_BTKQ, heads, axis=2), jnp.repeat(k_BTKQ, heads, axis=2), v_BTNH, *rest)

  def of_parts(*arrays):
    return context.joined(whole(*map(context.as_rows, arrays), None)[0])

  dims = 'BTKQ', 'BTKQ', 'BTNH', 'BTNQ'[:log_decay.ndim], 'BTN', 'BT', 'BNQH'
  return chunks.over_rows(whole, of_parts, dims, ('BTNH', 'BNQH'),
                          q_BTKQ, k_BTKQ, v_BTNH, log_decay, beta_BTN, starts_BT, state_BNQH)


def delta_reference(q_BTNQ, k_BTNQ, v_BTNH, log_decay, beta_BTN, starts_BT, state_BNQH):
  """`delta_rule` as it is defined, token by token; q and k have N heads."""
  def token(state_BNQH, inputs):
    q_BNQ, k_BNQ, v_BNH, log_decay_BNQ, beta_BN, start_B = inputs
    state_BNQH = jnp.where(start_B[:, None, None, None], 0, state_BNQH) * jnp.exp(log_decay_BNQ)[..., None]
    wrong_BNH = v_BNH - dot('BNQ,BNQH->BNH', k_BNQ, state_BNQH)
    state_BNQH += k_BNQ[..., None] * (beta_BN[..., None] * wrong_BNH)[..., None, :]
    return state_BNQH, dot('BNQ,BNQH->BNH', q_BNQ, state_BNQH)

  inputs = *(a.astype(jnp.float32) for a in (q_BTNQ, k_BTNQ, v_BTNH, per_channel(log_decay), beta_BTN)), starts_BT
  state_BNQH, y_TBNH = jax.lax.scan(token, state_BNQH, tuple(a.swapaxes(0, 1) for a in inputs))
  return y_TBNH.swapaxes(0, 1), state_BNQH


def per_channel(log_decay: jax.Array) -> jax.Array:
  """[B, T, N, Q], with Q = 1 where a head has one decay for all its channels."""
  return log_decay if log_decay.ndim == 4 else log_decay[..., None]


def delta_chunked(q_BTNQ, k_BTNQ, v_BTNH, log_decay, beta_BTN, starts_BT, state_BNQH):
  """`delta_rule` on one device: all that the tokens of a chunk write is found at once, with one triangular solve.

  Say token t writes k_t n_t^T with n_t = beta_t (v_t - what the decayed state holds for k_t). The decayed state is what is
  left of S, the state before the chunk, and of the writes since:
    n_t = beta_t v_t - beta_t (decay(start, t) k_t)^T S - sum_{s < t} beta_t (k_t . decay(s, t) k_s) n_s
  With A the strictly lower triangle of the coefficients in the sum, n = u - w S, where (I + A) u = beta v and
  (I + A) w = beta decay(start) k: the WY representation of DeltaNet (arXiv 2406.06484, section 3.2), with decays.
  u and w do not depend on S, so they are found for all chunks at once, and two products a chunk are left for the scan.

  state None: inputs are parts [2B, …] of rows that other devices have the rest of (`ops.context`). These need to know of a
  part what it makes of the state S before it, M S + A: a scan as the one for states, over [A | M] from [0 | I]. So of the
  work only the two products of the scan are done more often, and no chunk's own Q x Q matrix is made.
  """
  T = v_BTNH.shape[1]
  size = min(CHUNK, 1 << (T - 1).bit_length())
  q_BINtQ, k_BINtQ, v_BINtH, beta_BINt = (chunks.split_time(x, size) for x in (q_BTNQ, k_BTNQ, v_BTNH, beta_BTN))
  document_BI11t = chunks.documents(starts_BT, size)[:, :, None]
  log_decay_BINQt = chunks.split_time(per_channel(log_decay), size).swapaxes(3, 4)
  if log_decay.ndim == 3:
    decay_BINts = chunks.decay_between(log_decay_BINQt, document_BI11t)[:, :, :, 0]
    kk_BINts, qk_BINts = (dot('BINtQ,BINsQ->BINts', x, k_BINtQ) * decay_BINts for x in (k_BINtQ, q_BINtQ))
  else:
    seen_BI1ts = chunks.visible(document_BI11t)[:, :, 0]
    kk_BINts, qk_BINts = (jnp.where(seen_BI1ts, chunks.decayed_products(x, k_BINtQ, log_decay_BINQt), 0)
                          for x in (k_BINtQ, q_BINtQ))
  from_start_BINtQ = chunks.decay_from_start(log_decay_BINQt, document_BI11t).swapaxes(3, 4)
  to_end_BINsQ = chunks.decay_to_end(log_decay_BINQt, document_BI11t).swapaxes(3, 4)

  beta_BINt1 = beta_BINt[..., None]
  wanted = beta_BINt1 * jnp.concatenate([v_BINtH, from_start_BINtQ * k_BINtQ], axis=-1)
  solved = jax.lax.linalg.triangular_solve(jnp.tril(beta_BINt1 * kk_BINts, k=-1), wanted, left_side=True, lower=True,
                                           unit_diagonal=True)
  u_BINtH, w_BINtQ = jnp.split(solved, [v_BINtH.shape[-1]], axis=-1)

  def chunk(state_BNQH, inputs):
    u_BNtH, w_BNtQ, k_BNtQ, kept_BNQ = inputs
    u_BNtH = jnp.pad(u_BNtH, ((0, 0),) * 3 + ((0, state_BNQH.shape[-1] - u_BNtH.shape[-1]),))
    n_BNtH = u_BNtH - dot('BNtQ,BNQH->BNtH', w_BNtQ, state_BNQH)
    return kept_BNQ[..., None] * state_BNQH + dot('BNtQ,BNtH->BNQH', k_BNtQ, n_BNtH), (state_BNQH, n_BNtH)

  inputs = u_BINtH, w_BINtQ, to_end_BINsQ * k_BINtQ, from_start_BINtQ[:, :, :, -1]
  inputs = tuple(x.swapaxes(0, 1) for x in inputs)
  if state_BNQH is None:
    empty_BNQH = jnp.zeros_like(inputs[1][0, :, :, :1].swapaxes(2, 3) * inputs[0][0, :, :, :1])
    eye_BNQQ = jnp.zeros_like(empty_BNQH[..., :1]) + jnp.eye(empty_BNQH.shape[2])
    both, _ = jax.lax.scan(lambda state, inputs: (chunk(state, inputs)[0], None),
                           jnp.concatenate([empty_BNQH, eye_BNQQ], axis=-1), inputs)
    summaries = jnp.split(both, [empty_BNQH.shape[-1]], axis=-1)
    state_BNQH = context.states_before(lambda state, summary: dot('BNQR,BNRH->BNQH', summary[1], state) + summary[0],
                                       summaries, empty_BNQH.shape[1:])
  state_BNQH, (before_IBNQH, n_IBNtH) = jax.lax.scan(chunk, state_BNQH, inputs)
  y_BINtH = dot('BINtQ,IBNQH->BINtH', from_start_BINtQ * q_BINtQ, before_IBNQH)
  return chunks.join_time(y_BINtH + dot('BINts,IBNsH->BINtH', qk_BINts, n_IBNtH), T), state_BNQH
