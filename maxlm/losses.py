"""Next-token loss over packed rows, and what keeps the routers of experts in balance.

B rows  T parts of a row  L layers  E experts
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from maxlm.layers.moe import MoeSpec
from maxlm.layers.router import RouterStats
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, expert_layers
from maxlm.ops.context import to_natural, to_zigzag
from maxlm.ops.xent import cross_entropy


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
  """z_loss: weight of log(Z)^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5), which keeps logits from drifting.

  The others are for experts, on unless set to 0. balance: weight of E * sum_e f_e P_e, with f_e the share of tokens' choices
  that expert e got and P_e its mean score: 1 in balance, E if one gets all (Switch, arXiv 2101.03961, section 2.2, whose
  weight is the default). balance_over: 'batch', all tokens of a microbatch on all devices (arXiv 2501.11873), or 'sequence',
  each row for itself. Where the router has a selection bias, the bias balances: by bias_rate each step (arXiv 2408.15664,
  section 3), and the loss counts balance_beside_bias, each row for itself (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2
  and 4.2). router_z: weight of log(Z)^2 of softmax routers (ST-MoE, arXiv 2202.08906, section 2).
  """

  z_loss: float = 0.0
  balance: float = 1e-2
  balance_over: Literal['batch', 'sequence'] = 'batch'
  balance_beside_bias: float = 1e-4
  bias_rate: float = 1e-3
  router_z: float = 1e-3

  def check(self) -> None:
    """ValueError for what has no meaning."""
    for name in ('z_loss', 'balance', 'balance_beside_bias', 'bias_rate', 'router_z'):
      if getattr(self, name) < 0:
        raise ValueError(f'loss.{name}={getattr(self, name)} must be 0 (off) or more')
    if self.balance_over not in ('batch', 'sequence'):
      raise ValueError(f'loss.balance_over={self.balance_over!r} is neither batch nor sequence')


def next_token_loss(params: Decoder, model: DecoderConfig, compute: ComputeConfig, loss: LossConfig,
                    batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, list[dict[str, jax.Array]]]:
  """(sum over the batch of nll + z-loss, fp32; nll_BT in nats, 0 where a target does not count and carries no gradient; of
  each kind of experts `router_sums`, with losses that are not in the first sum).

  batch: tokens, targets, segment_ids, positions, loss_mask, int32 [B, T]; a target counts where loss_mask is 1: not in
  padding, and of a conversation only what the assistant says.
  """
  batch = {name: to_zigzag(batch[name]) for name in ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')}
  x_BTD, stats = params.hidden(model, compute, batch['tokens'], batch['segment_ids'], batch['positions'])
  weights_BT = batch['loss_mask'].astype(jnp.float32)
  with jax.named_scope('head'):
    loss_sum, nll_BT = cross_entropy(x_BTD, params.head_DV(), batch['targets'], weights_BT,
                                     softcap=model.logits_softcap, z_loss=loss.z_loss)
  routers = [router_sums(spec, loss, s, batch['segment_ids'] > 0) for (spec, _), s in zip(expert_layers(model), stats)]
  return loss_sum, to_natural(nll_BT * weights_BT), routers


def router_sums(spec: MoeSpec, loss: LossConfig, stats: RouterStats, real_BT: jax.Array) -> dict[str, jax.Array]:
  """Sums over the real tokens of a batch, fp32, of layers with these experts: load_LE, entropy_L, dropped_L, z_L, balance_L
  (the loss, unweighted, times tokens), and `loss`, what all layers add to the model's, with its gradient."""
  share = spec.n_experts / spec.k
  if loss.balance_over == 'batch' and not spec.select_bias:
    load_LE, score_LE = (jnp.sum(s, axis=(1, 2)) for s in (stats.load_BTE, stats.score_BTE))
    balance_L = share * jnp.sum(load_LE * score_LE, axis=1) / jnp.maximum(jnp.sum(real_BT), 1)
  else:
    load_LBE, score_LBE = (jnp.sum(s, axis=2) for s in (stats.load_BTE, stats.score_BTE))
    real_B1 = jnp.maximum(jnp.sum(real_BT, axis=1, keepdims=True), 1)
    balance_L, load_LE = share * jnp.sum(load_LBE * score_LBE / real_B1, axis=(1, 2)), jnp.sum(load_LBE, axis=1)
  z_L, entropy_L, dropped_L = (jnp.sum(s, axis=(1, 2)) for s in (stats.z_BT, stats.entropy_BT, stats.dropped_BT))
  added = (loss.balance_beside_bias if spec.select_bias else loss.balance) * jnp.sum(balance_L)
  if spec.score == 'softmax':
    added += loss.router_z * jnp.sum(z_L)
  return {'loss': added, 'load_LE': load_LE, 'entropy_L': entropy_L, 'dropped_L': dropped_L, 'z_L': z_L,
          'balance_L': balance_L}


def router_metrics(model: DecoderConfig, routers: list[dict[str, jax.Array]], tokens: jax.Array) -> dict[str, jax.Array]:
  """From `router_sums` of a batch of that many real tokens, of each layer with experts, in their order, fp32:
  load_violation, the highest load over the mean, less 1 (arXiv 2408.15664, section 4.1); entropy of the scores, nats; dead,
  experts without a token; dropped, share of pairs; balance and z, the losses unweighted. Empty without experts."""
  kinds = expert_layers(model)
  known = [i for _, layers in kinds for i in layers]
  order = sorted(range(len(known)), key=known.__getitem__)
  of_kinds = [{
    'load_violation': jnp.max(sums['load_LE'], axis=1) / jnp.maximum(jnp.mean(sums['load_LE'], axis=1), 1e-9) - 1,
    'entropy': sums['entropy_L'] / tokens,
    'dead': jnp.sum(sums['load_LE'] == 0, axis=1).astype(jnp.float32),
    'dropped': sums['dropped_L'] / (spec.k * tokens),
    'balance': sums['balance_L'] / tokens,
    'z': sums['z_L'] / tokens} for (spec, _), sums in zip(kinds, routers)]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts)[jnp.array(order)], *of_kinds) if kinds else {}
