"""What a run costs and how large its model is, from its config alone."""

import functools
import math

import jax

from maxlm import flops, typed_json
from maxlm.checkpoint import named_leaves
from maxlm.config import Experiment
from maxlm.dry_run import flops_of
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.sharding import MeshConfig, abstract_mesh
from maxlm.stages import segments

VOCABULARY = ('embed_VD', 'unembed_DV', 'positions_PD')


def parameters(model: DecoderConfig) -> tuple[int, int, int]:
  """(all; without embeddings and head; active: those that multiply a token, the head among them and the look-up not).

  Laws fitted to the three differ (Kaplan et al. 2020, arXiv 2001.08361, counted without embeddings, Hoffmann et al. 2022,
  arXiv 2203.15556, all).
  """
  return _parameters(typed_json.dumps(model))


@functools.cache
def _parameters(text: str) -> tuple[int, int, int]:
  model = typed_json.loads(text, DecoderConfig)
  with jax.sharding.use_abstract_mesh(abstract_mesh(MeshConfig(), 1)):
    leaves = named_leaves(jax.eval_shape(lambda: Decoder(model, jax.random.key(0))))
  sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
  everything = sum(sizes.values())
  return everything, everything - sum(sizes.get(name, 0) for name in VOCABULARY), flops.matmul_params(model)


def total_flops(experiment: Experiment) -> float:
  """Of all its training steps, attention counted, where each row is one document."""
  return sum(map(flops_of, segments(experiment)))


def total_tokens(experiment: Experiment) -> int:
  """Of all its steps."""
  return sum((part.stop - part.first) * part.config.tokens_per_step for part in segments(experiment))
