"""Next-token loss over packed rows."""

import dataclasses

import jax
import jax.numpy as jnp

from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.ops.xent import cross_entropy


@dataclasses.dataclass(kw_only=True, slots=True)
class LossConfig:
  """z_loss: weight of log(Z)^2 (Chowdhery et al. 2022, arXiv 2204.02311, section 5), which keeps logits from drifting."""

  z_loss: float = 0.0


def next_token_loss(params: Decoder, model: DecoderConfig, compute: ComputeConfig, loss: LossConfig,
                    batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """(sum over the batch of nll + z-loss, fp32; nll_BT in nats, 0 where a target does not count and carries no gradient).

  batch: tokens, targets, segment_ids, positions, loss_mask, int32 [B, T]; a target counts where loss_mask is 1: not in
  padding, and of a conversation only what the assistant says.
  """
  x_BTD = params.hidden(model, compute, batch['tokens'], batch['segment_ids'], batch['positions'])
  weights_BT = batch['loss_mask'].astype(jnp.float32)
  loss_sum, nll_BT = cross_entropy(x_BTD, params.head_DV(), batch['targets'], weights_BT,
                                   softcap=model.logits_softcap, z_loss=loss.z_loss)
  return loss_sum, nll_BT * weights_BT
