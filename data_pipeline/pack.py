"""Documents of tokens -> rows of exactly L positions, and the bytes of a row.

A document is a stream of tokens [EOT, t1..tn, EOT]: n+1 positions, each with the next token as its target. A stream longer
than L positions is cut into pieces, never truncated: a piece's last target is the next piece's first token. Pieces are
packed best-fit-decreasing into bins of L (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3).

A row's record is its L tokens (uint16 or uint32, little-endian, 0 where the bin was not filled) followed by a pair of
uint32 (length, next token) for each segment: fixed-size first, so a batch is decoded without a loop over rows. Where only
some targets are trained on, a mask lies in between: a bit a position, in ceil(L/8) bytes, the first position highest.
"""

import dataclasses

import numpy as np

FIELDS = ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')  # of a batch, each [rows, positions]
_PAIR = np.dtype('<u4')


def token_dtype(vocab_size: int) -> np.dtype:
  """How tokens are stored in a row."""
  return np.dtype('<u2') if vocab_size <= 1 << 16 else np.dtype('<u4')


@dataclasses.dataclass(slots=True)
class Pieces:
  """Streams laid end to end, and where they were cut: piece i is the positions stream[starts[i]:][:lengths[i]]."""

  stream: np.ndarray  # [n] int32: EOT t1..tn EOT EOT t1..tm EOT
  starts: np.ndarray  # [p] int64
  lengths: np.ndarray  # [p] int64, 1..seq_len
  counts: np.ndarray | None  # [n] bool: whether a token is trained on where it is the target; None: all are


def cut(streams, seq_len: int, counts=None) -> Pieces:
  """Pieces of `streams` (token ids, two or more each), cut at every seq_len positions of a stream.

  counts: for each stream, whether each of its tokens is trained on; pieces where none is are left out.
  """
  sizes = np.array([len(tokens) - 1 for tokens in streams], np.int64)
  n_pieces = -(-sizes // seq_len)
  first_piece = np.cumsum(n_pieces) - n_pieces
  offsets = (np.arange(n_pieces.sum()) - np.repeat(first_piece, n_pieces)) * seq_len  # in the piece's stream
  starts = np.repeat(np.cumsum(sizes + 1) - (sizes + 1), n_pieces) + offsets
  lengths = np.minimum(np.repeat(sizes, n_pieces) - offsets, seq_len)
  stream = np.concatenate([np.zeros(0, np.int32), *streams])
  if counts is not None:
    counts = np.concatenate([np.zeros(0, bool), *counts])
    n_before = np.cumsum(counts)  # up to and with each token
    trained = n_before[starts + lengths] > n_before[starts]
    starts, lengths = starts[trained], lengths[trained]
  return Pieces(stream=stream, starts=starts, lengths=lengths, counts=counts)


def best_fit_decreasing(lengths, capacity: int) -> list[list[int]]:
  """Bins of indices into `lengths`: longest first, each into the fullest bin that still holds it. Deterministic.

  ValueError where a length does not fit an empty bin.
  """
  bins, open_bins, spaces = [], {}, 0  # open_bins[s]: bins with s free positions; bit s of spaces: there are some
  for piece in np.argsort(-np.asarray(lengths, np.int64), kind='stable').tolist():
    length = int(lengths[piece])
    if not 0 < length <= capacity:
      raise ValueError(f'a sequence of {length} positions does not fit rows of {capacity}: cut it first')
    if fitting := spaces >> length:
      space = length + (fitting & -fitting).bit_length() - 1
      index = open_bins[space].pop()
      if not open_bins[space]:
        spaces ^= 1 << space
    else:
      space, index = capacity, len(bins)
      bins.append([])
    bins[index].append(piece)
    if rest := space - length:
      open_bins.setdefault(rest, []).append(index)
      spaces |= 1 << rest
  return bins


def encode_row(pieces: Pieces, members: list[int], seq_len: int, dtype: np.dtype) -> bytes:
  """The record of the row that holds these pieces."""
  tokens, mask = np.zeros(seq_len, dtype), np.zeros(seq_len, bool)
  segments = np.empty((len(members), 2), _PAIR)
  at = 0
  for segment, piece in enumerate(members):
    start, length = pieces.starts[piece], pieces.lengths[piece]
    tokens[at:at + length] = pieces.stream[start:start + length]
    if pieces.counts is not None:
      mask[at:at + length] = pieces.counts[start + 1:start + 1 + length]
    segments[segment] = length, pieces.stream[start + length]
    at += length
  assert at <= seq_len
  mask = b'' if pieces.counts is None else np.packbits(mask).tobytes()
  return tokens.tobytes() + mask + segments.tobytes()


def decode_rows(records: list[bytes], seq_len: int, dtype: np.dtype, masked=False) -> dict[str, np.ndarray]:
  """Records of R rows -> the FIELDS, int32 [R, seq_len].

  masked: whether the records have a mask (one answer, or one a record). segment_ids count 1, 2, … within a row and are 0
  in padding, where the rest is 0 too; positions restart in each segment; loss_mask is 1 where the target is trained on.
  ValueError where a record is not a row of seq_len.
  """
  n_rows, masked = len(records), np.broadcast_to(masked, len(records))
  size, head = seq_len * dtype.itemsize, seq_len * dtype.itemsize + masked * -(-seq_len // 8)
  n_segments, remainders = np.divmod([len(record) for record in records] - head, 2 * _PAIR.itemsize)
  if n_segments.min() < 1 or remainders.any():
    raise ValueError(f'a record is not a row of {seq_len} tokens: the shard is damaged or was built for another seq_len; '
                     'run `python -m data_pipeline.shards verify` on the corpus')
  tokens = np.frombuffer(b''.join([record[:size] for record in records]), dtype).reshape(n_rows, seq_len)
  pairs = np.frombuffer(b''.join([record[at:] for record, at in zip(records, head)]), _PAIR)
  lengths, next_tokens = pairs.reshape(-1, 2).astype(np.int64).T
  row_of = np.repeat(np.arange(n_rows), n_segments)
  ends = np.cumsum(lengths)
  before_row = np.concatenate([[0], ends])[np.cumsum(n_segments) - n_segments]  # positions used by earlier rows
  used = np.append(before_row[1:], ends[-1]) - before_row
  if used.max() > seq_len or lengths.min() < 1:
    raise ValueError(f'a record has segments of {used.max()} tokens in a row of {seq_len}: the shard is damaged; '
                     'run `python -m data_pipeline.shards verify` on the corpus')
  column_end = ends - before_row[row_of]
  column_start = column_end - lengths

  real = np.arange(seq_len) < used[:, None]
  starts = np.zeros((n_rows, seq_len), np.int32)
  starts[row_of, column_start] = 1
  segment_ids = np.cumsum(starts, axis=1, dtype=np.int32) * real
  starts[row_of, column_start] = column_start
  positions = (np.arange(seq_len, dtype=np.int32) - np.maximum.accumulate(starts, axis=1)) * real
  targets = np.zeros((n_rows, seq_len), np.int32)
  targets[:, :-1] = tokens[:, 1:]
  targets[row_of, column_end - 1] = next_tokens
  loss_mask = real.astype(np.int32)
  if masked.any():
    bits = np.frombuffer(b''.join([record[size:at] for record, at in zip(records, head)]), np.uint8)
    loss_mask[masked] &= np.unpackbits(bits.reshape(-1, -(-seq_len // 8)), axis=1, count=seq_len)
  return dict(zip(FIELDS, (tokens.astype(np.int32), targets * real, segment_ids, positions, loss_mask)))
