"""Stage 2: what becomes of each document: train, validation, or the reason why it is dropped; for a line of a chat file
that is none, what is wrong with it.

One verdict a document, in a file beside its shard (same rows, same order): a new rule rewrites no text, and what was
dropped can be looked at. Of exact duplicates the first is kept, in the order of the recipe's sources.
"""

import collections
import pathlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import chat, shards

VERDICTS = TRAIN, VALIDATION, DUPLICATE, SHORT = 'train', 'validation', 'duplicate', 'short'


def split_of(document_id: str, validation_fraction: float) -> str:
  """The split of a document by its id alone: the same in every corpus, whatever else is in it."""
  return VALIDATION if int(document_id[:16], 16) < validation_fraction * 2**64 else TRAIN


def select(root: pathlib.Path, documents: list[str], record_name: str, key: str, *, chats: list[bool], min_bytes: int,
           validation_fraction: float) -> dict:
  """Commits a verdict for every document of these shards; returns the record, with counts a shard.

  chats: for each shard, whether its documents are conversations.
  """
  seen, files, counts = set(), [], []
  for name, are_chats in zip(documents, chats):
    ids, verdicts = [], []
    for batch in pq.ParquetFile(root / name).iter_batches(columns=['id', 'text']):
      for document_id, text in zip(batch['id'].to_pylist(), batch['text'].to_pylist()):
        if are_chats and (rejection := chat.rejection(text)):
          verdict = rejection
        elif len(text.encode()) < min_bytes:
          verdict = SHORT
        elif document_id in seen:
          verdict = DUPLICATE
        else:
          verdict = split_of(document_id, validation_fraction)
        seen.add(document_id)
        ids.append(document_id)
        verdicts.append(verdict)
    path = _verdicts_of(root, name)
    with shards.committed(path) as temporary:
      table = pa.table({'id': pa.array(ids, pa.string()), 'verdict': pa.array(verdicts, pa.string())})
      pq.write_table(table, temporary, compression='zstd')
    files.append(shards.entry(root, path))
    counts.append(dict(collections.Counter(verdicts)))
  return shards.write_record(root, record_name, key, files, counts=counts)


def read_split(root: pathlib.Path, documents: str, split: str) -> Iterator[str]:
  """The texts of one shard of documents whose verdict is `split`, in order."""
  verdicts = iter(pq.read_table(_verdicts_of(root, documents), columns=['verdict'])['verdict'].to_pylist())
  for batch in pq.ParquetFile(root / documents).iter_batches(columns=['text']):
    yield from (text.as_py() for text in batch['text'] if next(verdicts) == split)


def _verdicts_of(root: pathlib.Path, documents: str) -> pathlib.Path:
  return root / 'selection' / pathlib.PurePosixPath(documents).relative_to('documents')
