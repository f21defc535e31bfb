"""A trained or imported model from a checkpoint, for the commands that use it."""

import dataclasses
import json
from typing import Any

import jax
import tokenizers
from etils import epath

from data_pipeline.tokenizer import END_OF_TEXT
from maxlm import typed_json
from maxlm.checkpoint import find
from maxlm.config import Experiment
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.restore import load_params, model_of
from maxlm.sharding import MeshConfig, make_mesh
from maxlm.stages import flat


@dataclasses.dataclass(kw_only=True, slots=True)
class Model:
  """model: the architecture. config: of the run that trained it (None: imported). compute: for this machine. tokenizer_text:
  its file, or None. bos: the token that begins a document, if there is one; begins: prompts get it here, not from the
  tokenizer. eos: the tokens that end a document. max_length: tokens of the longest documents it is made for, where
  that is known. step: of the checkpoint."""

  model: DecoderConfig
  config: Experiment | None
  compute: ComputeConfig
  params: Decoder
  tokenizer: tokenizers.Tokenizer | None
  tokenizer_text: str | None
  bos: int | None
  begins: bool
  eos: tuple[int, ...]
  max_length: int | None
  step: int

  def prompt(self, text: str) -> list[int]:
    """Tokens of the beginning of a document. ValueError without a tokenizer, or where nothing can begin an empty one."""
    if self.tokenizer is None:
      raise ValueError('this model came without tokenizer.json: put the file into its workdir')
    ids = self.tokenizer.encode(text).ids
    if self.bos is not None and (not ids or self.begins and ids[0] != self.bos):
      return [self.bos, *ids]
    if not ids:
      raise ValueError('this model has no token that begins a document: give a prompt')
    return ids

  def check_next_token(self) -> None:
    """ValueError for a model that fills in masked tokens instead of predicting the next one."""
    if self.model.mask_token is not None:
      raise ValueError('this model was trained by masked diffusion and has no probabilities of next tokens: maxlm.evaluate '
                       'gives its bound on a corpus, maxlm.generate samples from it')

  def check_length(self, length: int) -> None:
    """ValueError for more tokens in a row than the model has positions."""
    if self.model.max_positions is not None and length > self.model.max_positions:
      raise ValueError(f'rows of {length} tokens are longer than the {self.model.max_positions} positions of this model')


def load(checkpoint: str, dtype: str | None = None) -> Model:
  """The parameters of WORKDIR or WORKDIR@STEP in fp32, split over all devices, and what belongs to them. Sets the mesh.

  dtype: of the computation (None: bfloat16 on accelerators, float32 on CPU). FileNotFoundError if there is no checkpoint.
  """
  checkpoints, step = find(checkpoint)
  meta, workdir = checkpoints.meta(step), checkpoints.directory.parent
  config, model = experiment_of(meta), model_of(meta)
  compute = dataclasses.replace(config.compute if config else ComputeConfig(), dtype=dtype, kernel=None,
                                experts_kernel=None)
  text = (workdir / 'tokenizer.json').read_text() if (workdir / 'tokenizer.json').exists() else None
  tokenizer = tokenizers.Tokenizer.from_str(text) if text is not None else None
  hf = meta.get('hf', {}).get('config', {})
  ends = document_ends(workdir, hf, tokenizer)
  if config:  # documents begin and end as in the corpus
    bos, eot = (meta.get(name, tokenizer.token_to_id(END_OF_TEXT)) for name in ('bos', 'eot'))
    ends = {'bos': bos, 'begins': True, 'eos': tuple(dict.fromkeys((eot, *ends['eos'])))}
  text_config = hf | hf.get('text_config', {})
  lengths = (text_config.get('max_position_embeddings') or text_config.get('n_positions'),  # GPT-2's name for it
             config and config.data.seq_len)
  max_length = max(filter(None, lengths), default=None)
  jax.set_mesh(make_mesh(MeshConfig()))
  return Model(model=model, config=config, compute=compute.resolve(jax.default_backend(), model), tokenizer=tokenizer,
               params=load_params(checkpoints, step, model), tokenizer_text=text,
               max_length=max_length, step=step, **ends)


def experiment_of(meta: dict[str, Any]) -> Experiment | None:
  """The run that a checkpoint is of, as its stage sees it; None for an import."""
  if 'config' not in meta:
    return None
  config = typed_json.decode(meta['config'], Experiment, 'config')
  stage = next((i for i, stage in enumerate(config.stages) if stage.name == meta['stage']), None)
  return config if stage is None else flat(config, stage)


def document_ends(workdir: epath.Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer | None) -> dict[str, Any]:
  """`bos`, `begins` and `eos` of an imported model, from generation_config.json, then config.json, then the tokenizer's."""
  def read(name):
    return json.loads((workdir / name).read_text()) if (workdir / name).exists() else {}

  generation, words = read('generation_config.json'), read('tokenizer_config.json')

  def tokens(kind):
    for source in (generation, config):
      if (ids := source.get(f'{kind}_token_id')) is not None:
        return tuple(ids) if isinstance(ids, list) else (ids,)
    word = words.get(f'{kind}_token')
    word = word.get('content') if isinstance(word, dict) else word
    token = tokenizer.token_to_id(word) if tokenizer is not None and isinstance(word, str) else None
    return () if token is None else (token,)

  return {'bos': next(iter(tokens('bos')), None), 'begins': words.get('add_bos_token') is True, 'eos': tokens('eos')}
