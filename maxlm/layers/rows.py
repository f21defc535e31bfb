"""What every layer is told about the packed rows it works on.  B batch  T time  M columns of a cache"""

from typing import NamedTuple

import jax

from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec
from maxlm.ops.exchange import Dispatch


class Rows(NamedTuple):
  segment_ids_BT: jax.Array  # 1, 2, … one number a document; 0 is padding. Documents do not see each other
  positions_BT: jax.Array  # of each token in its document, from 0
  rope: dict  # rope_key(…) -> (cos, sin)
  kernel: str  # of attention: 'chunked', 'splash' or 'reference'
  norm: NormSpec  # of the model, and of queries and keys
  dispatch: Dispatch = Dispatch()  # of tokens to experts
  causal: bool = True  # a token does not see those after it
  max_logits: bool = False  # layers say the largest logit of each head of attention


class Past(NamedTuple):
  """Where new tokens go in the caches, and which columns belong to their document."""

  segment_ids_BM: jax.Array  # of the cache's columns, the new ones included
  column: jax.Array  # of the first new token; what is past the present is hidden by causality


def rope_key(spec: RopeSpec, head_dim: int) -> str:
  """Layers with the same key share one table of angles."""
  return f'{head_dim} {spec}'
