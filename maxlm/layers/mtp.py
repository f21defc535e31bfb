"""A layer that predicts the token after the next: multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

Where a model has read tokens up to i and its state is h_i, the layer gets a projection of [norm(h_i); norm(embedding of
token i + 1)], and what it makes of that, normalised, goes through the model's own head to predict token i + 2. The next of
such layers gets that and token i + 2. Embedding and head are the model's; they learn from all predictions.

D width of the model; of the projection's input, both halves of it  R width of its output, the model's
"""

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.layers.norm import Norm, NormSpec
from maxlm.layers.param import normal
from maxlm.ops.einsum import einsum


class Ahead(nnx.Module):
  """Weights of one such layer. layer: a layer like those of the model."""

  def __init__(self, layer: nnx.Module, d_model: int, norm: NormSpec, rngs: nnx.Rngs):
    self.hidden_norm, self.token_norm = Norm(norm, d_model), Norm(norm, d_model)
    self.w_join_DR = normal(rngs, 'DR', (2 * d_model, d_model), (2 * d_model) ** -0.5)
    self.layer = layer
    self.final_norm = Norm(norm, d_model)

  def join(self, norm: NormSpec, x_BTD: jax.Array, token_BTD: jax.Array) -> jax.Array:
    """What the layer gets: of the states so far, and of the embeddings of the tokens that come next."""
    both_BTD = jnp.concatenate([self.hidden_norm(norm, x_BTD), self.token_norm(norm, token_BTD)], axis=-1)
    return einsum('BTD,DR->BTR', both_BTD, self.w_join_DR[...])
