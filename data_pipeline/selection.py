"""Stage 2: what becomes of each document: train, validation, or the reason why it is dropped.

One verdict a document, in a file beside its shard (same rows, same order): a new rule rewrites no text, and what was
dropped can be looked at. Of exact duplicates the first is kept, in the order of the recipe's sources.
"""

import collections
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import shards

VERDICTS = TRAIN, VALIDATION, DUPLICATE, SHORT = 'train', 'validation', 'duplicate', 'short'


def split_of(document_id: str, validation_fraction: float) -> str:
  """The split of a document by its id alone: the same in every corpus, whatever else is in it."""
  return VALIDATION if int(document_id[:16], 16) < validation_fraction * 2**64 else TRAIN


def select(root: pathlib.Path, documents: list[str], record_name: str, key: str, *, min_bytes: int,
           validation_fraction: float) -> dict:
  """Commits a verdict for every document of these shards; returns the record, with counts a shard."""
  seen, files, counts = set(), [], []
  for name in documents:
    table = pq.read_table(root / name, columns=['id', 'text'])
    verdicts = []
    for document_id, text in zip(table['id'].to_pylist(), table['text'].to_pylist()):
      if len(text.encode()) < min_bytes:
        verdict = SHORT
      elif document_id in seen:
        verdict = DUPLICATE
      else:
        verdict = split_of(document_id, validation_fraction)
      seen.add(document_id)
      verdicts.append(verdict)
    path = root / 'selection' / pathlib.Path(name).relative_to('documents')
    with shards.committed(path) as temporary:
      pq.write_table(pa.table({'id': table['id'], 'verdict': verdicts}), temporary, compression='zstd')
    files.append(shards.entry(root, path))
    counts.append(dict(collections.Counter(verdicts)))
  return shards.write_record(root, record_name, key, files, counts=counts)
