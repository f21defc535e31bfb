"""The last stage: a shard of documents -> packed rows of one length, a shard for each split and part of the source."""

import functools
import pathlib

import numpy as np
import tokenizers

from data_pipeline import chat, pack, selection, shards, tokenizer, verdicts


def write_shards(root: pathlib.Path, record_name: str, key: str, shard: verdicts.Shard, seq_len: int, bos: int, eot: int,
                 chats: tuple[str, str] | None, length_buckets: tuple[int, ...]) -> dict:
  """Tokenises the documents of one shard and commits its rows; returns the record. Runs in a worker.

  bos, eot: the tokens that begin and end a document. chats: None for text; for conversations their template and what
  becomes of long ones (`chat.ChatFormat`). length_buckets: documents of so many tokens or more, and fewer than the next
  number, are a part of their own; so are those of each bucket of quality. record['shards']: of each split and part that has
  rows, its name, the number of rows and documents, positions that are filled, tokens (targets that are trained on), bytes of
  the text those stand for, special tokens within documents (of texts none: what spells one is plain text).
  record['dropped']: conversations that become no rows, by split and reason.
  """
  tokenizer_sha256, files, written, dropped = shards.sha256_file(root / 'tokenizer.json'), [], [], {}
  encoder, sizes, special = _vocabulary(root / 'tokenizer.json', tokenizer_sha256)
  dtype = pack.token_dtype(len(sizes))
  for split in (selection.TRAIN, selection.VALIDATION):
    chosen = list(selection.read_split(root, shard, split))
    texts, buckets = [text for text, _ in chosen], [bucket for _, bucket in chosen]
    if chats is None:
      begin, end = np.array([[bos], [eot]], np.int32)
      streams, counts = [np.concatenate((begin, tokens, end)) for tokens in tokenizer.encode(encoder, texts)], None
      parts = [_part(shard.source, bucket, len(stream) - 2, length_buckets) for bucket, stream in zip(buckets, streams)]
      for stream in streams:
        if len(found := np.intersect1d(stream[1:-1], special)):
          token = encoder.id_to_token(int(found[0]))
          raise ValueError(f'source {shard.source}: this tokenizer makes the special token {token} of plain text: take that '
                           'out of the texts with a filter, or use another tokenizer')
    else:
      template, too_long = chats
      template = chat.Template(template, *(encoder.id_to_token(token) for token in (bos, eot)))
      longest = seq_len if too_long == 'drop' else None
      streams, counts, dropped[split] = chat.tokenise(texts, encoder, template, longest=longest)
      parts = [shard.source] * len(streams)
    for part in sorted(set(parts)):
      mine = [i for i, name in enumerate(parts) if name == part]
      path = root / f'rows-{seq_len}' / part / f'{split}-{pathlib.PurePosixPath(shard.documents).stem}.arrayrecord'
      entry = _write_part(root, path, [streams[i] for i in mine], None if counts is None else [counts[i] for i in mine],
                          seq_len, dtype, sizes)
      files.append({name: entry[name] for name in ('path', 'bytes', 'xxh3')})
      within = sum(int(np.isin(streams[i][1:-1], special).sum()) for i in mine)
      written.append({**entry, 'special_tokens': within, 'source': part, 'of': shard.source, 'split': split,
                      'seq_len': seq_len, 'masked': chats is not None, 'tokenizer_sha256': tokenizer_sha256})
  return shards.write_record(root, record_name, key, files, source=shard.source, seq_len=seq_len, shards=written,
                             dropped=dropped)


@functools.lru_cache(maxsize=1)
def _vocabulary(path: pathlib.Path, sha256: str) -> tuple[tokenizers.Tokenizer, np.ndarray, np.ndarray]:
  """(tokenizer, bytes of each token, ids of special tokens), made once a process: large ones take a quarter second."""
  encoder = tokenizer.load(path)
  special = [index for index, token in encoder.get_added_tokens_decoder().items() if token.special]
  return encoder, tokenizer.token_bytes(encoder), np.array(special, np.int32)


def _part(source: str, bucket: str, n_tokens: int, length_buckets: tuple[int, ...]) -> str:
  """web, web.q3, web.8192, web.q3.8192"""
  longer = [least for least in length_buckets if n_tokens >= least]
  return '.'.join([source, *[bucket] * bool(bucket), *map(str, longer[-1:])])


def _write_part(root: pathlib.Path, path: pathlib.Path, streams: list, counts: list | None, seq_len: int, dtype: np.dtype,
                sizes: np.ndarray) -> dict:
  pieces = pack.cut(streams, seq_len, counts)
  bins = pack.best_fit_decreasing(pieces.lengths, seq_len)
  trained = np.concatenate([stream[1:] if counts is None else stream[counts[i]] for i, stream in enumerate(streams)])
  shards.write_rows(path, (pack.encode_row(pieces, members, seq_len, dtype) for members in bins))
  return {**shards.entry(root, path), 'rows': len(bins), 'documents': len(streams),
          'positions': int(pieces.lengths.sum()), 'tokens': len(trained), 'text_bytes': int(sizes[trained].sum())}
