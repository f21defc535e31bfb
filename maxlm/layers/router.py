"""The router of a mixture of experts: which experts a token gets, and what is said of it to the loss and the log.

E experts  D width  C tokens of a device  J the k experts of a token  G groups of E
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterStats(NamedTuple):
  """Sums of a layer over the real tokens (not padding) of each row, fp32; T has one entry for each part of a row, so that
  nothing crosses devices before all layers are done."""

  load_BTE: jax.Array  # pairs of a token and an expert, dropped ones included
  score_BTE: jax.Array  # scores of all experts, of each token normalised to 1; has a gradient
  z_BT: jax.Array  # squares of log-sum-exp of the logits; has a gradient
  entropy_BT: jax.Array  # of the normalised scores, nats
  dropped_BT: jax.Array  # pairs that no expert worked on


def router_logits(x_CD: jax.Array, w_router_DE: jax.Array, b_router_E: jax.Array | None) -> jax.Array:
  """fp32 logits [C, E]. Unless told, an accelerator rounds fp32 factors to bf16: other experts where two are near."""
  logits_CE = jnp.dot(x_CD.astype(jnp.float32), w_router_DE, precision=jax.lax.Precision.HIGHEST)
  return logits_CE if b_router_E is None else logits_CE + b_router_E


def route(spec, logits_CE: jax.Array, select_bias_E: jax.Array | None,
          balanced: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(weights [C, J] of each token's experts, their int32 numbers [C, J], scores [C, E]), from fp32 logits. spec: a MoeSpec.

  There is no switch for a softmax over the selected logits alone (gpt-oss): it is that over all, normalised. balanced: for
  benchmarks, experts in turn, whatever the logits are.
  """
  scores_CE = jax.nn.softmax(logits_CE) if spec.score == 'softmax' else jax.nn.sigmoid(logits_CE)
  choice_CE = jax.lax.stop_gradient(scores_CE if select_bias_E is None else scores_CE + select_bias_E)
  if spec.groups > 1:
    choice_CGE = choice_CE.reshape(-1, spec.groups, spec.n_experts // spec.groups)
    _, kept = jax.lax.top_k(jax.lax.top_k(choice_CGE, 2)[0].sum(axis=-1), spec.groups_kept)
    kept_CG1 = jax.nn.one_hot(kept, spec.groups, dtype=bool).any(axis=1)[..., None]
    choice_CE = jnp.where(kept_CG1, choice_CGE, -jnp.inf).reshape(choice_CE.shape)
  _, experts_CJ = jax.lax.top_k(choice_CE, spec.k)
  if balanced:
    experts_CJ = jnp.arange(experts_CJ.size, dtype=jnp.int32).reshape(experts_CJ.shape) % spec.n_experts + 0 * experts_CJ
  is_of_CJE = experts_CJ[:, :, None] == jnp.arange(spec.n_experts)
  weights_CJ = jnp.sum(jnp.where(is_of_CJE, scores_CE[:, None], 0), axis=-1)  # scores_CE[experts]: its gradient is a scatter
  if spec.normalise:  # families add 1e-20 or nothing: the same in fp32 for sums above 1e-11. 1e-20 has no square in fp32
    weights_CJ /= weights_CJ.sum(axis=-1, keepdims=True) + 1e-18
  return spec.scale * weights_CJ, experts_CJ, scores_CE


def router_stats(logits_CE: jax.Array, scores_CE: jax.Array, experts_CJ: jax.Array, dropped_C: jax.Array,
                 real_BT: jax.Array) -> RouterStats:
  """Sums over the device's part of each row. experts_CJ: E for tokens that are none."""
  rows, E = real_BT.shape[0], logits_CE.shape[1]

  def of_rows(x_C):
    x_BT = x_C.reshape(*real_BT.shape, *x_C.shape[1:])
    return jnp.sum(jnp.where(real_BT.reshape(*real_BT.shape, *(1,) * (x_C.ndim - 1)), x_BT, 0), axis=1, keepdims=True)

  p_CE = scores_CE / (jnp.sum(scores_CE, axis=-1, keepdims=True) + 1e-18)  # as in `route`
  entropy_C = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(p_CE)), axis=-1)
  load_BTE = jnp.sum(experts_CJ.reshape(rows, 1, -1, 1) == jnp.arange(E), axis=2, dtype=jnp.float32)
  z_C = jnp.square(jax.nn.logsumexp(logits_CE, axis=-1))
  return RouterStats(load_BTE=load_BTE, score_BTE=of_rows(p_CE), z_BT=of_rows(z_C), entropy_BT=of_rows(entropy_C),
                     dropped_BT=of_rows(dropped_C.astype(jnp.float32)))
