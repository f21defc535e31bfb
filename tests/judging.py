"""Runs a step over documents that a test makes up, without the rest of a build; and reads what steps said in a build."""

import contextlib
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline import documents, shards, verdicts
from data_pipeline.runners import LocalRunner
from data_pipeline.tasks import Tasks


def write(root: pathlib.Path, shards_of: list[list]) -> list[verdicts.Shard]:
  """A shard of source 'web' for each list of texts, or of dicts of columns with at least a text."""
  written = []
  for i, texts in enumerate(shards_of):
    rows = []
    for j, one in enumerate(texts):
      row = {'source': 'web', 'url': f'{i}:{j}', 'date': '', 'parent': '', 'lineage': ''}
      row |= one if isinstance(one, dict) else {'text': one}
      data = row['text'].encode()
      rows.append({'id': id_of(row['text']), 'bytes': len(data)} | row)
    path = root / f'documents/web/{i:05d}-of-{len(shards_of):05d}.parquet'
    with shards.committed(path) as temporary:
      pq.write_table(pa.Table.from_pylist(rows, documents._SCHEMA), temporary, compression='zstd')
    entry = shards.entry(root, path)
    written.append(verdicts.Shard(source='web', documents=entry['path'], rows=len(rows), hashes=(entry['xxh3'],)))
  return written


def judge(root: pathlib.Path, step, of: list[verdicts.Shard], workers: int = 1) -> tuple[list[dict], list[verdicts.Shard]]:
  """(records, shards as the step leaves them)."""
  with LocalRunner(workers) as runner:
    records = step.judge(Tasks(root, runner, contextlib.nullcontext), of)
  return records, [shard.judged(record) for shard, record in zip(of, records, strict=True)]


def table(root: pathlib.Path, shard: verdicts.Shard) -> pa.Table:
  """What the last step said of a shard."""
  return pq.read_table(root / shard.verdicts[-1])


def trained(corpus: pathlib.Path, source: str = 'web') -> list[dict]:
  """Rows of the one shard of a source, with what the last step says and the text that is trained on."""
  path = f'{source}/00000-of-00001.parquet'
  rows = pq.read_table(corpus / 'documents' / path).to_pylist()
  files = sorted((corpus / 'verdicts').glob(f'*/{path}'), key=lambda file: file.stat().st_mtime_ns)
  for row, said in zip(rows, pq.read_table(files[-1]).to_pylist()):
    row |= said
  shard = verdicts.Shard(source, f'documents/{path}', len(rows), (), tuple(str(file.relative_to(corpus)) for file in files))
  for numbers, texts in verdicts.edited(corpus, shard):
    for number, text in zip(numbers.tolist(), texts):
      rows[number]['trained'] = text
  return rows


def id_of(text: str) -> str:
  return xxhash.xxh3_128_hexdigest(text.encode())
