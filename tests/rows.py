"""Packed rows of random documents, for tests."""

import numpy as np

from data_pipeline.pack import FIELDS


def pack(documents: list[list[np.ndarray]], seq_len: int, source: list[int] | None = None) -> dict[str, np.ndarray]:
  """One row for each list of documents (arrays of n+1 tokens: n inputs, each with its next token as target)."""
  batch = {name: np.zeros((len(documents), seq_len), np.int32) for name in FIELDS}
  for row, parts in enumerate(documents):
    start = 0
    for number, tokens in enumerate(parts, 1):
      stop = start + len(tokens) - 1
      assert stop <= seq_len
      batch['tokens'][row, start:stop] = tokens[:-1]
      batch['targets'][row, start:stop] = tokens[1:]
      batch['segment_ids'][row, start:stop] = number
      batch['loss_mask'][row, start:stop] = 1
      batch['positions'][row, start:stop] = np.arange(stop - start)
      start = stop
  batch['source'] = np.array(source or [0] * len(documents), np.int32)
  return batch


def random_batch(rng: np.random.Generator, rows: int, seq_len: int, vocab: int, n_sources: int = 1) -> dict[str, np.ndarray]:
  """Rows of documents of random lengths; every second row ends in padding."""
  documents = []
  for row in range(rows):
    room, parts = seq_len - (row % 2) * int(rng.integers(1, seq_len // 4)), []
    while room:
      length = int(min(room, rng.integers(1, seq_len // 2)))
      parts.append(rng.integers(0, vocab, length + 1))
      room -= length
    documents.append(parts)
  return pack(documents, seq_len, rng.integers(0, n_sources, rows).tolist())
