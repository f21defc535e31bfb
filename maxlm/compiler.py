"""Compiler options of each generation of TPUs, each with its reason. What they do was read from compiled programs
(`maxlm.plan`, docs/perf.md), not timed on hardware.

Their meanings: openxla.org/xla/flags_guidance, and the option lists of MaxText and AXLearn.
"""

# Gathers and scatters run on the SparseCores and not in line on the TensorCore, which otherwise waits for each of them: an
# all-gather over a whole torus uses all of its links at once, and of a sum that is scattered over several dimensions of a
# torus the compiler makes a reduce-scatter, not an all-reduce.
SPARSE_CORE_COLLECTIVES = {
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter': 'true',
  'xla_tpu_enable_sparse_core_collective_offload_all_reduce': 'true',
  'xla_tpu_use_tc_device_shape_on_sc': 'true',
  'xla_sc_disable_megacore_partitioning': 'true',
}

# By default a v4 gathers in line, too, a quarter of a step of Marin 8B with 4,096 tokens a chip.
ASYNCHRONOUS_GATHERS = {'xla_enable_async_all_gather': 'true'}

# VMEM that one fusion or kernel may use, of the 64 MiB of v5p and the 128 of v5e and v6e (default: 16). With it the compiler
# finds tiles for products of 16,384 tokens that use 98 % of the matrix unit, by its own count, where it found 75 to 93 %.
def vmem(mib: int) -> dict[str, str]:
  return {'xla_tpu_scoped_vmem_limit_kib': str(mib << 10)}


# Not here: the options that gather the next layer's weights of a scan ahead (xla_tpu_enable_ici_ag_pipelining). The compiler
# then fills what layers save with zeros first, 5 % of a step of Llama 3 8B on v5p with 16,384 tokens a chip, and nearly all
# gathers are hidden within a layer without them.
OPTIONS = {
  'TPU v4': ASYNCHRONOUS_GATHERS,
  'TPU v5 lite': vmem(64),
  'TPU v5': SPARSE_CORE_COLLECTIVES | vmem(48),
  'TPU v6 lite': SPARSE_CORE_COLLECTIVES | vmem(96),
  'TPU7x': SPARSE_CORE_COLLECTIVES | vmem(48),
}
ALIASES = {'TPU v5p': 'TPU v5', 'TPU v5e': 'TPU v5 lite', 'TPU v6e': 'TPU v6 lite', 'TPU v7x': 'TPU7x'}


def options(device_kind: str) -> dict[str, str]:
  """What to pass as `compile(compiler_options=…)` for devices of this kind; nothing for others than TPUs."""
  return OPTIONS.get(ALIASES.get(device_kind, device_kind), {})
