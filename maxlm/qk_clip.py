"""QK-clip: attention logits that do not grow without bound (Kimi K2, arXiv 2507.20534, section 2.1, where tau is 100).

Where the largest logit S of a head, over all pairs of tokens of a step's batch that see each other, exceeds tau, what makes
the head's queries and keys is multiplied, after the optimizer's update, so that the same batch would have given a logit of
gamma * S, gamma = tau / S. A head at or under tau stays as it is, bit for bit.

  as many key heads as query heads  w_q, b_q, w_k and b_k of the head by sqrt(gamma)
  shared key heads (GQA, MQA)       w_q and b_q by gamma: other keys would change other heads' logits
  latent attention                  the dims without rotation of w_q (w_q_up) and w_k_up by sqrt(gamma); the rotated ones of
                                    w_q (w_q_up) by gamma, for the keys that they meet are those of all heads

What is decided here and not in the paper: the rule for shared key heads; S is before a softcap and without sinks, and
padding does not count; biases of queries and keys are multiplied as the weights are.
"""

import jax
import jax.numpy as jnp

from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.layers.mla import MlaSpec
from maxlm.models.decoder import Decoder, DecoderConfig, attentions


def check(model: DecoderConfig) -> None:
  """ValueError where there is nothing to clip, or it would have no effect."""
  for i, layer in enumerate(model.pattern):
    if any(spec.qk_norm for spec in attentions(layer.mixer)):
      raise ValueError(f'optim.qk_clip: model.pattern[{i}].mixer normalises queries and keys, so their weights could be '
                       'multiplied by anything without effect: set its qk_norm to None, or optim.qk_clip')
  if not any(attentions(layer.mixer) or isinstance(layer.mixer, MlaSpec) for layer in model.pattern):
    raise ValueError('optim.qk_clip: no layer of model.pattern is attention: set it to None')
  if model.mtp_depth:
    raise ValueError(f'optim.qk_clip does not reach the layers of model.mtp_depth={model.mtp_depth}: set one of them to 0, '
                     'or None')


def clipped(tau: float, params: Decoder, max_logits: dict[str, jax.Array]) -> Decoder:
  """The parameters with the heads that exceed tau clipped. max_logits: of a batch, as `Decoder.observed` says."""
  leaves, changed = named_leaves(params), {}
  with jax.named_scope('qk_clip'):
    for mixer, top_LN in max_logits.items():
      gamma_LN = jnp.where(top_LN > tau, tau / top_LN, 1.0)
      weights = {name: leaves[f'{mixer}.{name}'] for name in
                 ('w_q_DNH', 'b_q_NH', 'w_k_DKH', 'b_k_KH', 'w_q_up_DNH', 'w_k_up_DNH') if f'{mixer}.{name}' in leaves}
      changed |= {f'{mixer}.{name}': w for name, w in multiplied(weights, gamma_LN).items()}
  return with_leaves(params, leaves | changed)


def multiplied(weights: dict[str, jax.Array], gamma_LN: jax.Array) -> dict[str, jax.Array]:
  """Weights of a stack's mixers, L before the dims of their names, so multiplied that logits are gamma times as large."""
  half_LN = jnp.sqrt(gamma_LN)
  if 'w_k_up_DNH' in weights:
    w_k = weights['w_k_up_DNH']
    name = 'w_q_up_DNH' if 'w_q_up_DNH' in weights else 'w_q_DNH'
    is_nope_H = jnp.arange(weights[name].shape[-1]) < w_k.shape[-1]
    factor_LNH = jnp.where(is_nope_H, half_LN[:, :, None], gamma_LN[:, :, None])
    return {name: weights[name] * factor_LNH[:, None], 'w_k_up_DNH': w_k * half_LN[:, None, :, None]}
  if weights['w_k_DKH'].shape[2] == gamma_LN.shape[1]:
    return {name: w * (half_LN[:, :, None] if name.startswith('b') else half_LN[:, None, :, None])
            for name, w in weights.items()}
  return {name: w * (gamma_LN[:, :, None] if name.startswith('b') else gamma_LN[:, None, :, None])
          for name, w in weights.items() if 'q' in name}


def metrics(max_logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """max_logit: the largest of all heads and layers. Empty where none are asked for."""
  return {'max_logit': jnp.max(jnp.stack([jnp.max(top_LN) for top_LN in max_logits.values()]))} if max_logits else {}
