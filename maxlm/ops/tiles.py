"""Tiles of the attention kernel (`ops.splash`) on each TPU, as data.

A tile of keys is fetched once for each tile of queries, so a kernel does as many FLOPs a byte as a tile has queries, and
twice what the chip does (peak FLOP/s by bytes/s of HBM: v4 224, v5e 240, v5p 166, v6e 560, v7x 313) leaves room for more.
A step costs about a third of a microsecond beside its products: a tile should keep the matrix units busy for one or more.
With heads of 128 that is 4 * 128 FLOPs a pair: 512 x 1024 take 1.4 us on v5e and 0.3 us on v6e, whose 1024 x 2048 take 1.2.

VMEM bounds both. Unless told otherwise (`xla_tpu_scoped_vmem_limit_kib`) the compiler gives a kernel 16 MiB (v4 has no
more). Bytes of the forward kernel, q and k being the sizes and H the head dim in multiples of 128: queries and outputs
8 q H, keys and values 8 k H (bf16, twice, so that copies overlap), accumulator 4 q H, ids, indices, sums and log-sum-exps of
128 lanes 4096 q, scores and what is made of them 12 q compute. All tiles of the table were compiled for their chips with the
default limit (docs/LOG.md, 2026-11-22); none was timed. 2048 x 2048 by 1024 fits v6e and tpu7x too, and takes 25 MiB on v4.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
  """(queries, keys) of a tile in the forward kernel and those for the gradients of keys and values and of queries. The first
  two do `compute` of a tile's keys at a time, the last all of them."""

  forward: tuple[int, int]
  dkv: tuple[int, int]
  dq: tuple[int, int]
  compute: int


SMALL = Tiles(forward=(512, 1024), dkv=(512, 1024), dq=(512, 512), compute=512)
SQUARE = Tiles(forward=(1024, 1024), dkv=(1024, 1024), dq=(1024, 512), compute=512)
LONG = Tiles(forward=(1024, 2048), dkv=(1024, 2048), dq=(1024, 1024), compute=512)

# (what the device's kind begins with, bytes of a head's vector at most, tiles): the first that fits, else SMALL
TABLE = (
  ('TPU v4', 512, SQUARE),
  ('TPU v5 lite', 512, SQUARE),
  ('TPU v5', 512, SQUARE),
  ('TPU v6', 256, LONG),
  ('TPU v6', 512, SQUARE),
  ('TPU7x', 256, LONG),
  ('TPU7x', 512, SQUARE),
)
SHORTEST = 512  # a step has its price


def tiles_for(device_kind: str, head_bytes: int, window: int | None, n_keys: int) -> Tiles:
  """The tiles for a device and a layer; they are yet to be shrunk to divide its queries and keys.

  No longer than the window, and without one than an eighth of all keys: most of a tile would be masked, or as much as is not
  along the diagonal.
  """
  tiles = next((tiles for kind, most, tiles in TABLE if device_kind.startswith(kind) and head_bytes <= most), SMALL)
  most = max(SHORTEST, n_keys // 8 if window is None else window)
  return Tiles(*((min(q, most), min(k, most)) for q, k in tiles[:3]), compute=tiles.compute)
