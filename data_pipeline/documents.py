"""Stage 1: sources -> shards of documents, in Parquet: id, text, source, url, lineage.

The id is the xxh3-128 of the text: equal documents have equal ids wherever they come from, and whatever is decided by a
hash of the id (the validation split) stays as it is when a corpus grows.
"""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline import shards
from data_pipeline.recipe import Input, Source

_SCHEMA = pa.schema([(name, pa.string()) for name in ('id', 'text', 'source', 'url', 'lineage')])
_ROWS_A_GROUP = 1000


def write_shard(root: pathlib.Path, record_name: str, key: str, source: Source, unit: Input, name: str) -> dict:
  """Reads one input and commits its documents as root/name; returns the record. Runs in a worker."""
  path, n_documents, n_bytes = root / name, 0, 0
  with shards.committed(path) as temporary:
    with pq.ParquetWriter(temporary, _SCHEMA, compression='zstd') as writer:
      batch = []
      for url, text in source.read(unit):
        n_documents, n_bytes = n_documents + 1, n_bytes + len(text.encode())
        batch.append({'id': xxhash.xxh3_128_hexdigest(text.encode()), 'text': text, 'source': source.name, 'url': url,
                      'lineage': unit.lineage})
        if len(batch) == _ROWS_A_GROUP:
          writer.write_table(pa.Table.from_pylist(batch, _SCHEMA))
          batch = []
      writer.write_table(pa.Table.from_pylist(batch, _SCHEMA))
  return shards.write_record(root, record_name, key, [shards.entry(root, path)],
                             source=source.name, lineage=unit.lineage, documents=n_documents, bytes=n_bytes)

