"""Documents -> rows: every token is a target once, nothing is cut off, rows are full."""

import collections

import numpy as np
import pytest

from data_pipeline import pack

EOT = 0


def documents_of(lengths, vocab_size=4096, seed=0) -> list[np.ndarray]:
  chance = np.random.default_rng(seed)
  return [chance.integers(1, vocab_size, length).astype(np.int32) for length in lengths]


def rows_of(documents, seq_len, vocab_size=4096) -> tuple[list[bytes], dict[str, np.ndarray]]:
  pieces = pack.cut(streams_of(documents), seq_len)
  dtype = pack.token_dtype(vocab_size)
  bins = pack.best_fit_decreasing(pieces.lengths, seq_len)
  records = [pack.encode_row(pieces, members, seq_len, dtype) for members in bins]
  return records, pack.decode_rows(records, seq_len, dtype)


def streams_of(documents) -> list[list[int]]:
  return [[EOT, *tokens.tolist(), EOT] for tokens in documents]


LENGTHS = (0, 1, 14, 15, 16, 17, 31, 32, 33, 100, 5, 5, 5)  # around the row of 16, and around two of them


@pytest.mark.parametrize('vocab_size', [4096, 100_000])
def test_every_token_is_a_target_exactly_once_after_its_own_predecessor(vocab_size):
  documents = documents_of(LENGTHS, vocab_size)
  _, batch = rows_of(documents, 16, vocab_size)
  real = batch['segment_ids'] > 0
  pairs = collections.Counter(zip(batch['tokens'][real].tolist(), batch['targets'][real].tolist()))
  assert pairs == collections.Counter(pair for stream in streams_of(documents) for pair in zip(stream, stream[1:]))


def test_segments_are_whole_documents_or_pieces_of_long_ones():
  documents, seq_len = documents_of(LENGTHS), 16
  _, batch = rows_of(documents, seq_len)
  segments = collections.Counter()
  for tokens, targets, ids in zip(batch['tokens'], batch['targets'], batch['segment_ids']):
    for segment in range(1, ids.max() + 1):
      segments[(tuple(tokens[ids == segment].tolist()), int(targets[ids == segment][-1]))] += 1
  expected = collections.Counter()
  for stream in streams_of(documents):
    for start in range(0, len(stream) - 1, seq_len):
      piece = stream[start:start + seq_len + 1]
      expected[tuple(piece[:seq_len] if len(piece) > seq_len else piece[:-1]), piece[-1]] += 1
  assert segments == expected


def test_positions_restart_ids_count_up_and_padding_is_zero():
  _, batch = rows_of(documents_of(LENGTHS), 16)
  for ids, positions, tokens, targets in zip(*(batch[k] for k in ('segment_ids', 'positions', 'tokens', 'targets'))):
    used = int((ids > 0).sum())
    assert (ids[:used] > 0).all() and not any(values[used:].any() for values in (ids, positions, tokens, targets))
    assert (np.diff(ids[:used]) >= 0).all() and set(ids[:used].tolist()) == set(range(1, int(ids.max()) + 1))
    for segment in range(1, ids.max() + 1):
      assert positions[ids == segment].tolist() == list(range(int((ids == segment).sum())))
  assert all(values.dtype == np.int32 and values.shape == (len(batch['tokens']), 16) for values in batch.values())


def simple_best_fit(lengths, capacity):
  """The definition, in quadratic time."""
  free, bins = [], []
  for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    fitting = [i for i in range(len(bins)) if free[i] >= lengths[piece]]
    index = min(fitting, key=lambda i: free[i]) if fitting else len(bins)
    if not fitting:
      bins.append([])
      free.append(capacity)
    bins[index].append(piece)
    free[index] -= lengths[piece]
  return bins, free


@pytest.mark.parametrize('seed', range(5))
def test_packing_is_best_fit_decreasing_and_the_same_every_time(seed):
  lengths = np.random.default_rng(seed).integers(1, 41, 300)
  bins = pack.best_fit_decreasing(lengths, 40)
  assert bins == pack.best_fit_decreasing(lengths, 40)
  assert sorted(piece for members in bins for piece in members) == list(range(300))
  free = sorted(40 - int(lengths[members].sum()) for members in bins)
  simple, simple_free = simple_best_fit(lengths.tolist(), 40)
  assert free == sorted(simple_free) and len(bins) == len(simple)


def test_rows_of_ordinary_documents_are_full():
  lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 3000).astype(int)
  _, batch = rows_of(documents_of(lengths), 256)
  assert (batch['segment_ids'] > 0).mean() > 0.999


def test_a_sequence_longer_than_the_row_is_refused():
  with pytest.raises(ValueError, match='33 positions does not fit rows of 32'):
    pack.best_fit_decreasing([5, 33], 32)


def test_records_of_another_length_are_refused():
  records, _ = rows_of(documents_of(LENGTHS), 16)
  with pytest.raises(ValueError, match='not a row of 32 tokens'):
    pack.decode_rows(records, 32, pack.token_dtype(4096))
  with pytest.raises(ValueError, match='segments of'):
    pack.decode_rows(records, 8, pack.token_dtype(4096))
