"""A trained model from a checkpoint, for the commands that use it."""

import dataclasses

import jax
import tokenizers

from data_pipeline.tokenizer import END_OF_TEXT
from maxlm import typed_json
from maxlm.checkpoint import find
from maxlm.config import Experiment
from maxlm.models.decoder import ComputeConfig, Decoder
from maxlm.sharding import MeshConfig, make_mesh


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
  """step: of the checkpoint. compute: for this machine. tokenizer_text: its file. eot: the token that begins
  and ends a document."""

  config: Experiment
  compute: ComputeConfig
  params: Decoder
  tokenizer: tokenizers.Tokenizer
  tokenizer_text: str
  eot: int
  step: int


def load(checkpoint: str, dtype: str | None = None) -> Model:
  """The parameters of WORKDIR or WORKDIR@STEP, split over all devices, and what belongs to them. Sets the mesh.

  dtype: of the computation (None: bfloat16 on accelerators, float32 on CPU). FileNotFoundError if there is no checkpoint.
  """
  checkpoints, step = find(checkpoint)
  config = typed_json.decode(checkpoints.meta(step)['config'], Experiment)
  compute = dataclasses.replace(config.compute, dtype=dtype, kernel=None).resolve(jax.default_backend())
  jax.set_mesh(make_mesh(MeshConfig()))
  like = jax.eval_shape(lambda: Decoder(config.model, jax.random.key(0)))
  tokenizer_text = (checkpoints.directory.parent / 'tokenizer.json').read_text()
  tokenizer = tokenizers.Tokenizer.from_str(tokenizer_text)
  return Model(config=config, compute=compute, params=checkpoints.restore_params(step, like), tokenizer=tokenizer,
               tokenizer_text=tokenizer_text, eot=tokenizer.token_to_id(END_OF_TEXT), step=step)
