"""What a TPU chip can do, by generation: the numbers that every estimate of `maxlm.plan` rests on.

Peaks, memory and links: cloud.google.com/tpu/docs system pages and the scaling book (Austin et al. 2025,
jax-ml.github.io/scaling-book, part 2). Memory: what the compiler says is available. Clocks: from the peak, which is clock x
matrix units x width^2 x 2. With them the compiler's cycles of a large product, 16384 x 14336 x 4096 with enough VMEM, come
to 98 % of the peak on v5p, 94 % on tpu7x and 88 % on v6e (docs/plan.md).
"""

import dataclasses

GiB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
  """One generation. Rates are of a *device*, which is a chip but for tpu7x, where a chip shows as two devices.

  flops: bf16 a second. hbm_bytes: available to a program. hbm_rate, link_rate: bytes a second, of a link
  one way. clock: of the compiler's cycles. mxu: width of the matrix unit. dcn_rate: bytes a second of a device between
  slices. host_rate: to the host's memory. dims: of the torus. devices: of a chip. megacore: two cores work as one.
  """

  name: str
  device_kind: str
  flops: float
  hbm_bytes: float
  hbm_rate: float
  link_rate: float
  dcn_rate: float
  host_rate: float
  clock: float
  mxu: int
  dims: int
  devices: int = 1
  megacore: bool = False


CHIPS = {chip.name: chip for chip in (
  Chip(name='v4', device_kind='TPU v4', flops=275e12, hbm_bytes=30.75 * GiB, hbm_rate=1.23e12, link_rate=4.5e10,
       dcn_rate=6.25e9, host_rate=1.6e10, clock=1.05e9, mxu=128, dims=3, megacore=True),
  Chip(name='v5e', device_kind='TPU v5 lite', flops=197e12, hbm_bytes=15.75 * GiB, hbm_rate=8.2e11, link_rate=4.5e10,
       dcn_rate=3.125e9, host_rate=1.6e10, clock=1.5e9, mxu=128, dims=2),
  Chip(name='v5p', device_kind='TPU v5', flops=459e12, hbm_bytes=95.73 * GiB, hbm_rate=2.765e12, link_rate=9e10,
       dcn_rate=6.25e9, host_rate=1.6e10, clock=1.75e9, mxu=128, dims=3, megacore=True),
  Chip(name='v6e', device_kind='TPU v6 lite', flops=918e12, hbm_bytes=31.24 * GiB, hbm_rate=1.64e12, link_rate=9e10,
       dcn_rate=12.5e9, host_rate=3.2e10, clock=1.75e9, mxu=256, dims=2),
  Chip(name='tpu7x', device_kind='TPU7x', flops=1153.5e12, hbm_bytes=94.74 * GiB, hbm_rate=3.69e12, link_rate=9e10,
       dcn_rate=6.25e9, host_rate=0.8e10, clock=2.2e9, mxu=256, dims=3, devices=2),
)}

HOP = 1e-6  # seconds a message takes over one link, whatever its size
DCN_HOP = 50e-6  # and between slices
