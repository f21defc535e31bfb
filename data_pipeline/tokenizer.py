"""Stage 3: a byte-level BPE trained on the training split, or the tokenizer of a model; and text -> tokens with it.

Byte-level: every text has tokens, and tokens give back the text byte for byte. The pattern that splits text before the
merges is that of GPT-4 (OpenAI's cl100k_base) with each digit apart, so that numbers are spelt the same everywhere.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline import shards

END_OF_TEXT = '<|endoftext|>'
_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r'|\s*[\r\n]+|\s+(?!\S)|\s+')
_TEXTS_A_CALL = 256


def train(root: pathlib.Path, texts: Iterable[str], record_name: str, key: str, *, vocab_size: int) -> dict:
  """Trains on these texts, commits root/tokenizer.json, returns the record. The same texts give the same bytes."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(_PATTERN), behavior='isolated'),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  tokenizer.train_from_iterator(texts, trainer)
  path = root / 'tokenizer.json'
  with shards.committed(path) as temporary:
    temporary.write_text(tokenizer.to_str(pretty=True) + '\n', encoding='utf-8')
  return _record(root, record_name, key, {'bos': END_OF_TEXT, 'eot': END_OF_TEXT, 'chat_template': ''})


def adopt(root: pathlib.Path, given: str, record_name: str, key: str) -> dict:
  """Commits a copy of a tokenizer that there is already (`facts_of`) as root/tokenizer.json; returns the record."""
  file, facts = facts_of(given)
  with shards.committed(root / 'tokenizer.json') as temporary:
    shutil.copyfile(file, temporary)
  return _record(root, record_name, key, facts)


def _record(root: pathlib.Path, record_name: str, key: str, facts: dict[str, str]) -> dict:
  path = root / 'tokenizer.json'
  tokenizer = load(path)
  return shards.write_record(root, record_name, key, [shards.entry(root, path)], sha256=shards.sha256_file(path),
                             vocab_size=max(tokenizer.get_vocab().values()) + 1, chat_template=facts['chat_template'],
                             **{name: tokenizer.token_to_id(facts[name]) for name in ('bos', 'eot')})


def facts_of(given: str) -> tuple[pathlib.Path, dict[str, str]]:
  """The tokenizer.json that `given` means, itself or the folder it is in, and {bos, eot, chat_template} as texts.

  Which tokens begin and end a text is said by the tokenizer_config.json beside it, as Hugging Face writes it; where there
  is none, both are <|endoftext|>. A model without a token that begins a text begins it with the one that ends it. The chat
  template is '' where there is none. FileNotFoundError or ValueError with one line.
  """
  path = pathlib.Path(given)
  path = path / 'tokenizer.json' if path.is_dir() else path
  if not path.is_file():
    raise FileNotFoundError(f'there is no tokenizer {path}: name a tokenizer.json, or the workdir of a run')
  tokenizer, said, template = load(path), path.with_name('tokenizer_config.json'), path.with_name('chat_template.jinja')
  said = json.loads(said.read_text(encoding='utf-8')) if said.is_file() else {}
  named = {name: token['content'] if isinstance(token, dict) else token for name, token in said.items() if '_token' in name}
  eot = named.get('eos_token') or END_OF_TEXT
  bos = named.get('bos_token') if named.get('add_bos_token') else None
  around = tokenizer.encode('').tokens  # of a tokenizer that puts special tokens around a text by itself
  bos = around[0] if around and around[0] != eot else bos or eot
  for token in (bos, eot):
    if tokenizer.token_to_id(token) is None:
      raise ValueError(f'{path} has no token {token}: a tokenizer_config.json beside it names its bos_token and eos_token')
  chat = template.read_text(encoding='utf-8') if template.is_file() else said.get('chat_template') or ''
  if isinstance(chat, list):  # of several, each with a name
    chat = next((one['template'] for one in chat if one['name'] == 'default'), '')
  return path, {'bos': bos, 'eot': eot, 'chat_template': chat}


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer as documents are encoded with it: a text that spells <|endoftext|> does not end a document."""
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.encode_special_tokens = True
  return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
  """Token ids of each text, int32 [n], without the tokens that begin and end it."""
  for start in range(0, len(texts), _TEXTS_A_CALL):
    for encoding in tokenizer.encode_batch_fast(texts[start:start + _TEXTS_A_CALL], add_special_tokens=False):
      yield np.array(encoding.ids, np.int32)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  """int32 [vocab_size]: utf-8 bytes each token stands for, 0 for special ones. They add up to a text's bytes."""
  added = tokenizer.get_added_tokens_decoder()
  is_byte_level = 'ByteLevel' in json.dumps(json.loads(tokenizer.to_str())['decoder'])
  sizes = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int32)
  for token, index in tokenizer.get_vocab().items():
    if index in added:
      sizes[index] = 0 if added[index].special else len(token.encode())
    elif is_byte_level:
      sizes[index] = len(token)  # a character of the token's name is a byte
    else:  # SentencePiece's: a byte that no token has is spelt <0x0A>, and a space is U+2581
      sizes[index] = 1 if re.fullmatch('<0x[0-9A-F]{2}>', token) else len(token.replace('\u2581', ' ').encode())
  return sizes
