"""Tiles of the attention kernel (`ops.splash`) on each TPU, as data.

Larger tiles mean fewer steps, each of which costs about a third of a microsecond beside its products, and less traffic: a tile of
keys is fetched once for each tile of queries. What a kernel holds in VMEM bounds them. Forward, with H the head dim in
multiples of 128, bytes:
  queries, outputs (bf16, twice, to overlap) 8 q H + keys, values the same 8 k H + accumulator 4 q H
  + segment ids, indices, sums and log-sum-exps, each 128 lanes wide: about 4096 q + scores, mask and probabilities 12 q compute
"""

from typing import NamedTuple


class Tiles(NamedTuple):
  """(queries, keys) of a tile in the forward kernel and those for the gradients of keys and values and of queries. The first
  two do `compute` of a tile's keys at a time, the last all of them."""

  forward: tuple[int, int]
  dkv: tuple[int, int]
  dq: tuple[int, int]
  compute: int


# Within the 16 MiB of VMEM that a kernel has unless the compiler is told otherwise (`xla_tpu_scoped_vmem_limit_kib`): 7 MiB by the
# sum above at H = 128, 9 at 256.
SMALL = Tiles(forward=(512, 1024), dkv=(512, 1024), dq=(512, 512), compute=512)

# (what the device's kind begins with, tiles). v4 has no more VMEM than that.
TABLE = (
  ('TPU v4', SMALL),
)


def tiles_for(device_kind: str, window: int | None) -> Tiles:
  """The tiles for a device and a layer; they are yet to be shrunk to divide its queries and keys.

  Of keys no more than the window, or most of a tile is masked, but 512: a step has its price.
  """
  tiles = next((tiles for kind, tiles in TABLE if device_kind.startswith(kind)), SMALL)
  if window is None:
    return tiles
  most = max(512, window)
  return Tiles(*((q, min(k, most)) for q, k in tiles[:3]), compute=tiles.compute)
