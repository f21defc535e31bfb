"""Stage 3: a byte-level BPE trained on the training split; and text -> tokens with it.

Byte-level: every text has tokens, and tokens give back the text byte for byte. The pattern that splits text before the
merges is that of GPT-4 (OpenAI's cl100k_base) with each digit apart, so that numbers are spelt the same everywhere.
"""

import pathlib
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
  return shards.write_record(root, record_name, key, [shards.entry(root, path)], sha256=shards.sha256_file(path),
                             vocab_size=tokenizer.get_vocab_size(), eot=tokenizer.token_to_id(END_OF_TEXT))


def load(path: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer as documents are encoded with it: a text that spells <|endoftext|> does not end a document."""
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.encode_special_tokens = True
  return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
  """Token ids of each text, int32 [n], without the end of text."""
  for start in range(0, len(texts), _TEXTS_A_CALL):
    for encoding in tokenizer.encode_batch_fast(texts[start:start + _TEXTS_A_CALL]):
      yield np.array(encoding.ids, np.int32)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray:
  """int32 [vocab_size]: utf-8 bytes each token stands for, 0 for the end of text. They add up to a text's bytes."""
  sizes = np.zeros(tokenizer.get_vocab_size(), np.int32)
  for token, index in tokenizer.get_vocab().items():
    sizes[index] = 0 if token == END_OF_TEXT else len(token)  # byte-level: a character of the token's name is a byte
  return sizes
