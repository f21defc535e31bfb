"""Stage 4: a shard of documents -> packed rows of one length, a shard each for train and validation."""

import pathlib

from data_pipeline import pack, selection, shards, tokenizer


def write_shards(root: pathlib.Path, record_name: str, key: str, source: str, documents: str, seq_len: int) -> dict:
  """Tokenises the documents of one shard and commits its rows; returns the record. Runs in a worker.

  record['shards']: rows, documents, bytes of text and tokens (targets) of each; an empty split has no shard.
  """
  encoder = tokenizer.load(root / 'tokenizer.json')
  dtype, eot = pack.token_dtype(encoder.get_vocab_size()), encoder.token_to_id(tokenizer.END_OF_TEXT)
  relative = pathlib.Path(documents).relative_to('documents')
  tokenizer_sha256, files, written = shards.sha256_file(root / 'tokenizer.json'), [], []
  for split in (selection.TRAIN, selection.VALIDATION):
    texts = list(selection.read_split(root, documents, split))
    if not texts:
      continue
    pieces = pack.cut(list(tokenizer.encode(encoder, texts)), eot, seq_len)
    bins = pack.best_fit_decreasing(pieces.lengths, seq_len)
    path = root / f'rows-{seq_len}' / relative.with_name(f'{split}-{relative.stem}.arrayrecord')
    shards.write_rows(path, (pack.encode_row(pieces, members, seq_len, dtype) for members in bins))
    files.append(shards.entry(root, path))
    written.append({**files[-1], 'source': source, 'split': split, 'seq_len': seq_len, 'rows': len(bins),
                    'documents': len(texts), 'text_bytes': sum(len(text.encode()) for text in texts),
                    'tokens': int(pieces.lengths.sum()), 'tokenizer_sha256': tokenizer_sha256})
  return shards.write_record(root, record_name, key, files, shards=written)
