"""Loss of next tokens, or of masked ones, over packed rows, and what keeps the routers of experts in balance.

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
from maxlm.sharding import spec as shard


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
  """z_loss: weight of log(Z)^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5), which keeps logits from drifting.
  mtp: weight of the mean loss of the tokens further ahead, where the model predicts such (DeepSeek-V3, arXiv 2412.19437,
  sections 2.2 and 4.2: 0.3, and 0.1 for the last third).

  The others are for experts, on unless set to 0. balance: weight of E * sum_e f_e P_e, with f_e the share of tokens' choices
  that expert e got and P_e its mean score: 1 in balance, E if one gets all (Switch, arXiv 2101.03961, section 2.2, whose
  weight is the default). balance_over: 'batch', all tokens of a microbatch on all devices (arXiv 2501.11873), or 'sequence',
  each row for itself. Where the router has a selection bias, the bias balances: by bias_rate each step (arXiv 2408.15664,
  section 3), and the loss counts balance_beside_bias, each row for itself (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2
  and 4.2). router_z: weight of log(Z)^2 of softmax routers (ST-MoE, arXiv 2202.08906, section 2).
  """

  z_loss: float = 0.0
  mtp: float = 0.3
  balance: float = 1e-2
  balance_over: Literal['batch', 'sequence'] = 'batch'
  balance_beside_bias: float = 1e-4
  bias_rate: float = 1e-3
  router_z: float = 1e-3

  def check(self) -> None:
    """ValueError for what has no meaning."""
    for name in ('z_loss', 'mtp', 'balance', 'balance_beside_bias', 'bias_rate', 'router_z'):
      if getattr(self, name) < 0:
        raise ValueError(f'loss.{name}={getattr(self, name)} must be 0 (off) or more')
    if self.balance_over not in ('batch', 'sequence'):
      raise ValueError(f'loss.balance_over={self.balance_over!r} is neither batch nor sequence')


def next_token_loss(params: Decoder, model: DecoderConfig, compute: ComputeConfig, loss: LossConfig,
                    batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, list[dict[str, jax.Array]]]:
  """What `observed_loss` gives, but for the logits."""
  return observed_loss(params, model, compute, loss, batch, max_logits=False)[:3]


def observed_loss(params: Decoder, model: DecoderConfig, compute: ComputeConfig, loss: LossConfig,
                  batch: dict[str, jax.Array], *, max_logits: bool
                  ) -> tuple[jax.Array, jax.Array, list[dict[str, jax.Array]], dict[str, jax.Array]]:
  """(sum over the batch of nll + z-loss, fp32, and of what is further ahead, weighted; nll_BT in nats, 0 where a target does
  not count and carries no gradient; of each kind of experts `router_sums`, with losses that are not in the first sum, and
  then of each layer that predicts further ahead, as `further_ahead` says; the largest logits of heads, as
  `Decoder.observed` gives them).

  batch: tokens, targets, segment_ids, positions, loss_mask, int32 [B, T]; a target counts where loss_mask is 1: not in
  padding, and of a conversation only what the assistant says. Where some tokens are masked (`diffusion.corrupted`), it has
  loss_weights, fp32 [B, T], and nll, in both sums, is weighted.
  """
  further = [shifted(batch, k + 1) for k in range(model.mtp_depth)]
  counts = 'loss_weights' if 'loss_weights' in batch else 'loss_mask'
  batch = {name: to_zigzag(batch[name]) for name in ('tokens', 'targets', 'segment_ids', 'positions', counts)}
  x_BTD, stats, tops = params.observed(model, compute, batch['tokens'], batch['segment_ids'], batch['positions'],
                                       max_logits=max_logits)
  weights_BT = batch[counts].astype(jnp.float32)
  with jax.named_scope('head'):
    loss_sum, nll_BT = cross_entropy(x_BTD, params.head_DV(), batch['targets'], weights_BT,
                                     softcap=model.logits_softcap, z_loss=loss.z_loss)
  routers = [router_sums(spec, loss, s, batch['segment_ids'] > 0) for (spec, _), s in zip(expert_layers(model), stats)]
  if further:
    ahead_sum, said = further_ahead(params, model, compute, loss, batch, x_BTD, further)
    loss_sum, routers = loss_sum + ahead_sum, routers + said
  return loss_sum, to_natural(nll_BT * weights_BT), routers, tops


def shifted(batch: dict[str, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
  """(targets k positions later, int32, and whether they count, fp32), [B, T] in zigzag order: 0 past a document's end."""
  targets_BM, ids_BM, counts_BM = (jax.reshard(batch[name], shard('BM')) for name in ('targets', 'segment_ids', 'loss_mask'))
  same_BM = jnp.pad(ids_BM[:, k:] == ids_BM[:, :-k], ((0, 0), (0, k)))
  later = [jnp.where(same_BM, jnp.pad(a[:, k:], ((0, 0), (0, k))), 0) for a in (targets_BM, counts_BM)]
  targets_BT, counts_BT = (to_zigzag(jax.reshard(a, shard('BT'))) for a in later)
  return targets_BT, counts_BT.astype(jnp.float32)


def further_ahead(params: Decoder, model: DecoderConfig, compute: ComputeConfig, loss: LossConfig,
                  batch: dict[str, jax.Array], x_BTD: jax.Array, further: list
                  ) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
  """(the weighted sum of the losses; of each layer nll, the sum of its nats, tokens, how many these are of, `loss` of its
  router, 0 without experts, and what else `router_sums` has).

  batch: in zigzag order. x_BTD: final hidden states. further: `shifted` by 1, 2, … up to model.mtp_depth.
  """
  total, said, tokens_BT, experts = 0.0, [], batch['targets'], model.layers[-1].mlp
  for k, (targets_BT, weights_BT) in enumerate(further):
    x_BTD, stats = params.ahead(model, compute, k, x_BTD, tokens_BT, batch['segment_ids'], batch['positions'])
    with jax.named_scope('head'):
      loss_sum, nll_BT = cross_entropy(x_BTD, params.head_DV(), targets_BT, weights_BT,
                                       softcap=model.logits_softcap, z_loss=loss.z_loss)
    total += loss.mtp / model.mtp_depth * loss_sum
    sums = {'loss': jnp.float32(0)}
    if stats is not None:
      sums = router_sums(experts, loss, jax.tree.map(lambda s: s[None], stats), batch['segment_ids'] > 0)
    said.append({**sums, 'nll': jnp.sum(nll_BT * weights_BT), 'tokens': jnp.sum(weights_BT)})
    tokens_BT = targets_BT
  return total, said


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
  experts without a token; dropped, share of pairs; balance and z, the losses unweighted. Empty without spec."""
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
