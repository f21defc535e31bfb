"""What becomes of each document after all steps: train, validation, or the reason why it is left out.

    selection/<source>/00000-of-00001.parquet   id, verdict, bucket: the same rows in the same order

The texts that are read here are those that a model is trained on: with the edits of all steps.
"""

import collections
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import chat, shards, verdicts

TRAIN, VALIDATION, SHORT = 'train', 'validation', 'short'
BUCKET = 'bucket'  # the column of a step's verdicts that names a part of a source: quality


def split_of(document_id: str, validation_fraction: float) -> str:
  """The split of a document by its id alone: the same in every corpus, whatever else is in it."""
  return VALIDATION if int(document_id[:16], 16) < validation_fraction * 2**64 else TRAIN


def write_shard(root: pathlib.Path, record_name: str, key: str, shard: verdicts.Shard, are_chats: bool, min_bytes: int,
                validation_fraction: float) -> dict:
  """Commits a verdict for every document of a shard; returns the record. Runs in a worker.

  record['counts']: documents by verdict; record['text_bytes']: of each split, edited; record['lengths']: documents of
  2^k bytes and more, edited, by k; the rest is of `verdicts.count`.
  are_chats: whether the documents are conversations; lines of chat files that are none are left out.
  """
  ids = pq.read_table(root / shard.documents, columns=['id'])['id'].to_pylist()
  verdict, rejected = verdicts.reasons(root, shard).copy(), {}
  n_bytes, lengths = collections.Counter(), collections.Counter()
  for rows, texts in verdicts.edited(root, shard):
    for row, text in zip(rows.tolist(), texts):
      size = len(text.encode())
      if reason := (are_chats and chat.rejection(text)) or (size < min_bytes and SHORT):
        verdict[row] = rejected[row] = reason
      else:
        verdict[row] = split_of(ids[row], validation_fraction)
        n_bytes[verdict[row]] += size
        lengths[max(size, 1).bit_length() - 1] += 1
  path = _selection_of(root, shard.documents)
  with shards.committed(path) as temporary:
    pq.write_table(pa.table({'id': pa.array(ids, pa.string()), 'verdict': pa.array(verdict, pa.string()),
                             'bucket': _buckets(root, shard)}), temporary, compression='zstd')
  return shards.write_record(root, record_name, key, [shards.entry(root, path)], source=shard.source,
                             counts=dict(collections.Counter(verdict.tolist())), text_bytes=dict(n_bytes),
                             lengths=dict(sorted(lengths.items())), **verdicts.count(root, shard, rejected))


def _buckets(root: pathlib.Path, shard: verdicts.Shard) -> pa.Array:
  """The part of its source that each document belongs to: '' where no step names one, else what the last one says."""
  for path in reversed(shard.verdicts):
    if BUCKET in pq.read_schema(root / path).names:
      return pq.read_table(root / path, columns=[BUCKET])[BUCKET].combine_chunks()
  return pa.array(np.full(shard.rows, '', object), pa.string())


def read_split(root: pathlib.Path, shard: verdicts.Shard, split: str) -> Iterator[tuple[str, str]]:
  """(text, bucket) of the documents of one shard whose verdict is `split`, in order."""
  table = pq.read_table(_selection_of(root, shard.documents), columns=['verdict', 'bucket'])
  chosen, buckets = table['verdict'].to_pylist(), table['bucket'].to_pylist()
  for rows, texts in verdicts.edited(root, shard):
    yield from ((text, buckets[row]) for row, text in zip(rows.tolist(), texts) if chosen[row] == split)


def _selection_of(root: pathlib.Path, documents: str) -> pathlib.Path:
  return root / 'selection' / pathlib.PurePosixPath(documents).relative_to('documents')
