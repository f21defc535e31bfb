"""Short causal convolution of each channel by itself, over packed documents, then SiLU: what recurrent mixers put before
their recurrence (Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv 2412.06464).

B batch  T time  W taps, the last one for the token itself  N, H channels: heads and what is in one  J = W - 1 tokens before
"""

import jax
import jax.numpy as jnp

from maxlm.ops import context
from maxlm.ops.chunks import over_rows


def conv_silu(x_BTNH: jax.Array, w_WNH: jax.Array, bias_NH: jax.Array | None, starts_BT: jax.Array,
              tail_BJNH: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """(silu(sum_w w[w] x[t - (W - 1) + w] + bias) in the dtype of x, the tail of the next call in that of the tail).

  A token sees those of its own document. starts: bool, a document starts at this token. tail: the W - 1 inputs before the
  first one, those of another document than the last of them as zeros. K heads of Q channels are split as N of H are.
  Where the mesh splits rows they begin here: the tail is for nothing, and the next one None.
  """
  return over_rows(_conv_silu, _conv_of_parts, ('BTNH', 'WNH', 'NH', 'BT', 'BJNH'), ('BTNH', 'BJNH'),
                   x_BTNH, w_WNH, bias_NH, starts_BT, tail_BJNH)


def _conv_of_parts(x_BTNH, w_WNH, bias_NH, starts_BT):
  """With the last inputs of the chunks before for tails."""
  x, starts, J = context.as_rows(x_BTNH), context.as_rows(starts_BT), w_WNH.shape[0] - 1
  T = x.shape[1]
  if T < J:
    raise ValueError(f'a convolution of {J + 1} taps over chunks of {T} tokens: split rows into fewer parts (mesh.context)')
  tail = _tail(x[:, T - J:], jnp.cumsum(starts, axis=1)[:, T - J:])
  with jax.named_scope('halo'):
    tail = context.from_before(tail) if J else tail
  return context.joined(_conv_silu(x, w_WNH, bias_NH, starts, tail)[0])


def _conv_silu(x_BTNH, w_WNH, bias_NH, starts_BT, tail_BJNH):
  T, W = x_BTNH.shape[1], w_WNH.shape[0]
  all_inputs = jnp.concatenate([tail_BJNH.astype(x_BTNH.dtype), x_BTNH], axis=1)
  document = jnp.pad(jnp.cumsum(starts_BT, axis=1), ((0, 0), (W - 1, 0)))  # 0 in the tail
  y_BTNH = 0.0 if bias_NH is None else bias_NH
  for tap in range(W):
    same_BT11 = (document[:, tap:tap + T] == document[:, W - 1:])[..., None, None]
    y_BTNH += jnp.where(same_BT11, all_inputs[:, tap:tap + T], 0).astype(jnp.float32) * w_WNH[tap]
  return jax.nn.silu(y_BTNH).astype(x_BTNH.dtype), _tail(all_inputs[:, T:], document[:, T:]).astype(tail_BJNH.dtype)


def _tail(x_BJNH, document_BJ):
  return jnp.where((document_BJ == document_BJ[:, -1:])[..., None, None], x_BJNH, 0)
