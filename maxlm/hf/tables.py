"""What the families share: tables of tensors, and looking at a model's layers.

The names of theirs in a table of a layer begin after 'model.layers.3.', ours after 'layers.3.'; a weight that a layer
does not have makes its entry say nothing (`maxlm.hf.mapping`). In a table of WEIGHTS both begin within the module, for
families that have it elsewhere: within('mixer.', 'mlp.', MLP_WEIGHTS).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from maxlm.hf.keys import FULL, SLIDING, Keys
from maxlm.hf.mapping import Copy, Either, Entry, LeftOut, Tensor, within
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec

ATTENTION_WEIGHTS = (
  Tensor('q_proj.weight', 'NH D', 'w_q_DNH'),
  Tensor('k_proj.weight', 'KH D', 'w_k_DKH'),
  Tensor('v_proj.weight', 'KH D', 'w_v_DKH'),
  Tensor('o_proj.weight', 'D NH', 'w_o_NHD'),
  Tensor('q_proj.bias', 'NH', 'b_q_NH'),
  Tensor('k_proj.bias', 'KH', 'b_k_KH'),
  Tensor('v_proj.bias', 'KH', 'b_v_KH'),
  Tensor('o_proj.bias', 'D', 'b_o_D'),
  Tensor('q_norm.weight', 'D', 'q_norm.scale_D'),
  Tensor('k_norm.weight', 'D', 'k_norm.scale_D'),
)
ATTENTION = tuple(within('self_attn.', 'mixer.', ATTENTION_WEIGHTS))

MLP_WEIGHTS = (
  Tensor('gate_proj.weight', 'F D', 'w_gate_DF'),
  Tensor('up_proj.weight', 'F D', 'w_up_DF'),
  Tensor('down_proj.weight', 'D F', 'w_down_FD'),
  Tensor('gate_proj.bias', 'F', 'b_gate_F'),
  Tensor('up_proj.bias', 'F', 'b_up_F'),
  Tensor('down_proj.bias', 'D', 'b_down_D'),
)
MLP = tuple(within('mlp.', 'mlp.', MLP_WEIGHTS))

# Of a mixture: as published, one tensor an expert, and as transformers 5 has them in memory.
EXPERTS = (
  Either((Tensor('mlp.experts.{E}.gate_proj.weight', 'F D', 'mlp.w_gate_EDF'),
          Tensor('mlp.experts.{E}.up_proj.weight', 'F D', 'mlp.w_up_EDF'),
          Tensor('mlp.experts.{E}.down_proj.weight', 'D F', 'mlp.w_down_EFD')),
         (Tensor('mlp.experts.gate_up_proj', 'E (F|F) D', 'mlp.w_gate_EDF | mlp.w_up_EDF'),
          Tensor('mlp.experts.down_proj', 'E D F', 'mlp.w_down_EFD'))),
)

PRE_NORMS = (
  Tensor('input_layernorm.weight', 'D', 'mixer_pre_norm.scale_D'),
  Tensor('post_attention_layernorm.weight', 'D', 'mlp_pre_norm.scale_D'),
)

# Of Gemma; OLMo has the norms of what comes out alone.
SANDWICH_NORMS = (
  Tensor('input_layernorm.weight', 'D', 'mixer_pre_norm.scale_D'),
  Tensor('post_attention_layernorm.weight', 'D', 'mixer_post_norm.scale_D'),
  Tensor('pre_feedforward_layernorm.weight', 'D', 'mlp_pre_norm.scale_D'),
  Tensor('post_feedforward_layernorm.weight', 'D', 'mlp_post_norm.scale_D'),
)


def embeddings(model: DecoderConfig, table: str = 'model.embed_tokens.weight',
               norm: str = 'model.norm.weight') -> Iterator[Entry]:
  """Embeddings, last norm and head; a head beside tied embeddings must be equal to them."""
  yield Tensor(table, 'V D', 'embed_VD')
  yield Tensor(norm, 'D', 'final_norm.scale_D')
  if model.tied_embeddings:
    yield Copy('lm_head.weight', of=table)
  else:
    yield Tensor('lm_head.weight', 'V D', 'unembed_DV')


def layers(model: DecoderConfig, *tables: Iterable[Entry], theirs: str = 'model.layers.') -> Iterator[Entry]:
  """The tables for each layer."""
  for i in range(model.n_layers):
    for table in tables:
      yield from within(f'{theirs}{i}.', f'layers.{i}.', table)


def beside_vision(entries: Iterable[Entry]) -> Iterator[Entry]:
  """The entries of a text model, which may be `language_model.` in one that also sees; the rest of that is left out."""
  entries = tuple(entries)
  yield Either(entries, within('language_model.', '', entries))
  yield LeftOut(r'(vision_tower|multi_modal_projector)\..*', 'the text model alone is imported')


def read_text(keys: Keys, readers: dict[str, Callable[[Keys], DecoderConfig]]) -> DecoderConfig:
  """Reads the config of the text model in that of one that also sees, with the reader of its model_type. How it sees is not
  looked at."""
  keys.inert('vision_config', 'projector_hidden_act', 'vision_feature_layer', 'multimodal_projector_bias',
             'spatial_merge_size', 'mm_tokens_per_image', 'image_token_index', 'boi_token_index', 'eoi_token_index')
  tied = keys.bool('tie_word_embeddings', None)
  text = Keys({'tie_word_embeddings': tied} | keys.dict('text_config'), f'{keys.where}: text_config')
  if (model_type := text.str('model_type')) not in readers:
    raise ValueError(f'{text.where}: model_type={model_type!r} is not supported; {" and ".join(readers)} can be here')
  model = readers[model_type](text)
  text.done()
  keys.notes.extend(text.notes)
  return model


def window_kinds(keys: Keys, default: list[str], window: int | None) -> list[str]:
  """FULL or SLIDING for each layer, as `layer_types` says or else the default. ValueError if one slides without a window."""
  kinds = keys.layer_types(len(default), (FULL, SLIDING), default)
  if window is None and SLIDING in kinds:
    raise ValueError(f'{keys.where}: sliding_window is null, and there are layers of {SLIDING}')
  return kinds


def window_keys(attentions: list[AttentionSpec]) -> dict[str, Any]:
  """The keys that say which layers have windows, and how long these are."""
  return {'layer_types': [FULL if a.window is None else SLIDING for a in attentions],
          'sliding_window': next((a.window for a in attentions if a.window is not None), None)}


def size_keys(model: DecoderConfig, attention: AttentionSpec, mlp: MlpSpec) -> dict[str, Any]:
  """The keys that nearly all families have by the same names."""
  return {
    'vocab_size': model.vocab_size, 'hidden_size': model.d_model, 'num_hidden_layers': model.n_layers,
    'num_attention_heads': attention.n_heads, 'num_key_value_heads': attention.n_kv_heads, 'head_dim': attention.head_dim,
    'intermediate_size': mlp.d_ff, 'rms_norm_eps': model.norm.eps, 'tie_word_embeddings': model.tied_embeddings}


def specs(model: DecoderConfig, part: str, kind: type) -> list:
  """The mixer or mlp of every layer. ValueError unless all are of the one kind that the family has."""
  found = [getattr(layer, part) for layer in model.layers]
  for i, spec in enumerate(found):
    if type(spec) is not kind:
      raise ValueError(f'{part} of layer {i} is {type(spec).__name__}, not {kind.__name__}')
  return found


def first(model: DecoderConfig, part: str, kind: type):
  """The first mixer or mlp of that kind; None if no layer has one."""
  return next((spec for layer in model.layers if type(spec := getattr(layer, part)) is kind), None)


def pattern(layers: list[LayerSpec]) -> tuple[LayerSpec, ...]:
  """The shortest pattern that gives these layers."""
  n = len(layers)
  period = next(p for p in range(1, n + 1) if all(layers[i] == layers[i % p] for i in range(p, n)))
  return tuple(layers[:period])
