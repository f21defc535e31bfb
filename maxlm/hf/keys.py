"""config.json of a Hugging Face model, read key by key: what no family understands is refused and not ignored.

    keys = Keys(json.loads(text))
    keys.size('hidden_size'), keys.float('rms_norm_eps', 1e-6), keys.bool('attention_bias', False)
    keys.done()      # ValueError that names the keys nobody took, unless they cannot change what the model computes
"""

from __future__ import annotations  # within Keys, int and list are methods

from typing import Any

REQUIRED: Any = object()  # no default: the key must be there
SAME: Any = object()  # null means what a missing key means

FULL, SLIDING, LINEAR = 'full_attention', 'sliding_attention', 'linear_attention'  # words of layer_types

ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu', 'gelu_new': 'gelu', 'relu2': 'relu2',
               'xielu': 'xielu'}

# Keys that say nothing about the function: training, bookkeeping, generation, and what is read elsewhere.
INERT = frozenset('''
  model_type architectures auto_map dtype torch_dtype transformers_version quantization_config _name_or_path name_or_path
  initializer_range initializer_factor max_position_embeddings tokenizer_class use_cache pretraining_tp
  attention_dropout hidden_dropout dropout attn_pdrop embd_pdrop resid_pdrop resid_dropout embedding_dropout
  output_router_logits router_aux_loss_coef router_jitter_noise router_z_loss_coef aux_loss_alpha seq_aux
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
  id2label label2id problem_type task_specific_params output_attentions output_hidden_states return_dict
  chunk_size_feed_forward is_decoder keys_to_ignore_at_inference'''.split())


class Keys:
  """The keys of a JSON object; each method takes one. ValueError, naming the key, where its value is not of the kind."""

  def __init__(self, plain: dict[str, Any], where: str = 'config.json'):
    if not isinstance(plain, dict):
      raise ValueError(f'{where}: expected an object, got {_short(plain)}')
    self.plain, self.where, self.notes = plain, where, []
    self._left = dict(plain)

  def take(self, key: str, kinds: tuple[type, ...], default=REQUIRED, null=SAME):
    """The value of a key; `default` if it is not there, and `null` if it is null (SAME: as if it were not there)."""
    value = self._left.pop(key, None) if key in self._left else self.plain.get(key)
    if value is None:
      value = null if key in self.plain and null is not SAME else default
      if value is REQUIRED:
        raise ValueError(f'{self.where}: {key} is missing')
      return value
    if isinstance(value, int) and abs(value) > 2**63:
      raise ValueError(f'{self.where}: {key}={_short(value)} is no number of a model')
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      raise ValueError(f'{self.where}: {key}={_short(value)} must be {" or ".join(kind.__name__ for kind in kinds)}')
    return value

  def size(self, key: str, default=REQUIRED, null=SAME, *, most: int = 2**31) -> int:
    """A whole number from 1."""
    value = self.take(key, (int,), default, null)
    if value is not default and value is not null and not 1 <= value <= most:
      raise ValueError(f'{self.where}: {key}={_short(value)} must be from 1 to {most}')
    return value

  def layers(self, key: str = 'num_hidden_layers') -> int:
    """The number of layers, at most 10,000: a list with an entry for each is made."""
    return self.size(key, most=10_000)

  def int(self, key: str, default=REQUIRED, null=SAME) -> int:
    return self.take(key, (int,), default, null)

  def float(self, key: str, default=REQUIRED, null=SAME) -> float:
    value = self.take(key, (int, float), default, null)
    return float(value) if isinstance(value, int) else value

  def bool(self, key: str, default=REQUIRED) -> bool:
    return self.take(key, (bool,), default)

  def str(self, key: str, default=REQUIRED, null=SAME) -> str:
    return self.take(key, (str,), default, null)

  def dict(self, key: str, default=REQUIRED) -> dict:
    return self.take(key, (dict,), default)

  def list(self, key: str, kinds: tuple[type, ...], default=REQUIRED, length: int | None = None) -> list:
    """A list of items of these types, and of that length."""
    value = self.take(key, (list,), default)
    if value is not default and not all(isinstance(item, kinds) for item in value):
      kind = ' or '.join(kind.__name__ for kind in kinds)
      raise ValueError(f'{self.where}: {key}={_short(value)} must be a list of {kind}')
    if value is not default and length is not None and len(value) != length:
      raise ValueError(f'{self.where}: {key} has {len(value)} items, and {length} are needed')
    return value

  def layer_types(self, n_layers: int, known: tuple[str, ...], default=REQUIRED, key: str = 'layer_types') -> list[str]:
    """One of the known words for each layer."""
    value = self.list(key, (str,), default, length=n_layers)
    if unknown := sorted(set(value) - set(known)):
      raise ValueError(f'{self.where}: {key} has {unknown[0]!r}, and this family knows {" and ".join(known)}')
    return value

  def activation(self, key: str = 'hidden_act', default=REQUIRED) -> str:
    """The activation by our name."""
    name = self.str(key, default)
    if name not in ACTIVATIONS:
      raise ValueError(f'{self.where}: {key}={name!r} is not supported; {", ".join(ACTIVATIONS)} are')
    return ACTIVATIONS[name]

  def fixed(self, key: str, *allowed) -> None:
    """Takes a key that may be absent or null, or have one of these values, and nothing else."""
    value = self._left.pop(key, None)
    if value is not None and value not in allowed:
      raise ValueError(f'{self.where}: {key}={_short(value)} is not supported; {" or ".join(map(repr, allowed))} is')

  def inert(self, *keys: str) -> None:
    """Takes keys that have no effect in this family, or repeat what others say."""
    for key in keys:
      self._left.pop(key, None)

  def inner(self, key: str) -> Keys:
    """The keys of an object within this one; its `done` is the caller's."""
    return Keys(self.dict(key), f'{self.where}: {key}')

  def note(self, text: str) -> None:
    """Something the user should know about the import."""
    self.notes.append(text)

  def done(self, inert: frozenset[str] = INERT) -> None:
    """ValueError if a key was not taken that is not known to be inert. Nothing is what null, false and emptiness say."""
    left = [key for key, value in self._left.items() if key not in inert and value not in (None, False, [], {}, '')]
    if left:
      named = ', '.join(f'{key}={_short(self._left[key])}' for key in left[:12]) + ' and more' * (len(left) > 12)
      raise ValueError(f'{self.where}: nobody here knows {named}, which may change what the model computes')


def _short(value) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + '…'
