"""Stage 3: a byte-level BPE trained on the training split, or the tokenizer of a model; and text -> tokens with it.

Byte-level: every text has tokens, and tokens give back the text byte for byte. The pattern that splits text before the
merges is that of GPT-4 (OpenAI's cl100k_base) with each digit apart, so that numbers are spelt the same everywhere.

Documents are encoded by the engine of OpenAI's tiktoken where that is known to give the same tokens, by the tokenizers
library where it is not.
"""

import functools
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
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of ByteLevel itself
_COMPARED = (_PATTERN, _PATTERN.replace(r'|\p{N}|', r'|\p{N}{1,3}|'), _GPT2)  # by both libraries, on every character
_GAP = 1_000_000  # characters of white space that end tiktoken with a stack overflow
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
  tokenizer.no_truncation()  # which a tokenizer.json may ask for
  tokenizer.no_padding()
  return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Iterator[np.ndarray]:
  """Token ids of each text, int32 [n], without the tokens that begin and end it. The tokenizer is one of `load`."""
  quick = _engine(tokenizer.to_str())
  if quick is None:
    for start in range(0, len(texts), _TEXTS_A_CALL):
      for encoding in tokenizer.encode_batch_fast(texts[start:start + _TEXTS_A_CALL], add_special_tokens=False):
        yield np.array(encoding.ids, np.int32)
    return
  engine, always = quick
  for text in texts:
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    if any(token in text or token in normal for token in always) or _has_long_gap(normal):
      ids = tokenizer.encode(text, add_special_tokens=False).ids
    else:
      ids = engine.encode_ordinary(normal)
    yield np.array(ids, np.int32)


def _has_long_gap(text: str) -> bool:
  """Whether white space may fill `_GAP` characters and more: then it fills one of these blocks."""
  return any(text[start:start + _GAP // 2].isspace() for start in range(0, len(text), _GAP // 2))


@functools.lru_cache(2)
def _engine(text: str):
  """(a `tiktoken.Encoding`, added tokens that are tokens wherever they are spelt) that makes of every text what the
  tokenizer of this tokenizer.json makes of it; None where that is not known.

  tiktoken merges whatever gives a token, the least id first; a tokenizer.json lists the pairs that are merged. Both do the
  same if the list is in the order of ids and leads from the bytes of each token to the token: when two neighbours could be
  merged, what happened inside them is what happens to their bytes alone, so this pair is the one that the list has.
  """
  import tiktoken  # of the data extra; training does not encode
  described = json.loads(text)
  model, before = described['model'], described['pre_tokenizer'] or {'type': None}
  steps = before.get('pretokenizers') or [before]
  pattern = _GPT2 if steps[-1].get('use_regex') else steps[0].get('pattern', {}).get('Regex')
  if (model['type'] != 'BPE' or [step['type'] for step in steps] != ['Split', 'ByteLevel'][pattern == _GPT2:]
      or pattern not in _COMPARED or steps[-1]['add_prefix_space'] or steps[0].get('invert')
      or steps[0].get('behavior', 'Isolated') != 'Isolated'
      or any(model[name] for name in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback'))):
    return None
  letters, vocab = set(pre_tokenizers.ByteLevel.alphabet()), model['vocab']
  merged = [vocab[first + second] for first, second in model['merges']]
  # A byte that is a printable character is spelt as that, the others as the characters from 256 on, in order.
  byte_of = dict(zip(sorted(letters), sorted(range(256), key=lambda byte: (chr(byte) not in letters, byte))))
  reached = letters & set(vocab) | {a + b for a, b in model['merges']}
  same = tokenizers.Tokenizer.from_str(text)
  bpe, normal = same.model, same.normalizer.normalize_str if same.normalizer else str
  bpe.ignore_merges = False
  if (not letters <= reached or merged != sorted(merged) or any(len(bpe.tokenize(token)) != 1 for token in reached)
      or model['ignore_merges'] and len(reached) < len(vocab)):
    return None
  ranks = {bytes(byte_of[letter] for letter in token): vocab[token] for token in reached}
  plain = [token['content'] for token in described['added_tokens'] if not token['special']]
  return tiktoken.Encoding('', pat_str=pattern, mergeable_ranks=ranks, special_tokens={}), {*plain, *map(normal, plain)}


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
