"""Stage 4: a shard of documents -> packed rows of one length, a shard each for train and validation."""

import pathlib

import numpy as np

from data_pipeline import chat, pack, selection, shards, tokenizer


def write_shards(root: pathlib.Path, record_name: str, key: str, source: str, documents: str, seq_len: int, bos: int,
                 eot: int, chats: tuple[str, str] | None) -> dict:
  """Tokenises the documents of one shard and commits its rows; returns the record. Runs in a worker.

  bos, eot: the tokens that begin and end a document. chats: None for text; for conversations their template and what
  becomes of long ones (`chat.ChatFormat`). record['shards']: of each split that has rows, their number, documents, positions
  that are filled, tokens (targets that are trained on), bytes of the text those stand for, and, of conversations, how many
  were dropped and why.
  """
  encoder = tokenizer.load(root / 'tokenizer.json')
  sizes = tokenizer.token_bytes(encoder)
  dtype = pack.token_dtype(len(sizes))
  relative = pathlib.Path(documents).relative_to('documents')
  tokenizer_sha256, files, written, dropped = shards.sha256_file(root / 'tokenizer.json'), [], [], {}
  for split in (selection.TRAIN, selection.VALIDATION):
    texts = list(selection.read_split(root, documents, split))
    if chats is None:
      begin, end = np.array([[bos], [eot]], np.int32)
      streams, counts = [np.concatenate((begin, tokens, end)) for tokens in tokenizer.encode(encoder, texts)], None
    else:
      template, too_long = chats
      template = chat.Template(template, *(encoder.id_to_token(token) for token in (bos, eot)))
      longest = seq_len if too_long == 'drop' else None
      streams, counts, dropped[split] = chat.tokenise(texts, encoder, template, longest=longest)
    if not streams:
      continue
    pieces = pack.cut(streams, seq_len, counts)
    bins = pack.best_fit_decreasing(pieces.lengths, seq_len)
    trained = np.concatenate([stream[1:] if counts is None else stream[counts[i]] for i, stream in enumerate(streams)])
    path = root / f'rows-{seq_len}' / relative.with_name(f'{split}-{relative.stem}.arrayrecord')
    shards.write_rows(path, (pack.encode_row(pieces, members, seq_len, dtype) for members in bins))
    files.append(shards.entry(root, path))
    written.append({**files[-1], 'source': source, 'split': split, 'seq_len': seq_len, 'masked': chats is not None,
                    'rows': len(bins), 'documents': len(streams), 'positions': int(pieces.lengths.sum()),
                    'tokens': len(trained), 'text_bytes': int(sizes[trained].sum()), 'tokenizer_sha256': tokenizer_sha256})
  return shards.write_record(root, record_name, key, files, shards=written, dropped=dropped)
