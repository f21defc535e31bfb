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

# The weights of the next layer of a scan are gathered while this one computes. It costs one layer's weights of memory, and
# the compiler then fills what layers save with zeros first: 5 % of a step of Llama 3 8B on v5p with 16,384 tokens a chip.
# Where gathers run on the SparseCores, nearly all of them are hidden within a layer without it.
PREFETCH = {
  'xla_tpu_enable_ici_ag_pipelining': 'true',
  'xla_should_allow_loop_variant_parameter_in_chain': 'true',
  'xla_should_add_loop_invariant_op_in_chain': 'true',
}

# VMEM that one fusion or kernel may use, of the 64 MiB of v5p and the 128 of v6e (default: 16). With it the compiler finds
# tiles for products of 16,384 tokens that use 98 % of the matrix unit, by its own count, where it found 75 to 93 %.
OPTIONS = {
  'TPU v4': PREFETCH,
  'TPU v5 lite': PREFETCH,
  'TPU v5': SPARSE_CORE_COLLECTIVES | {'xla_tpu_scoped_vmem_limit_kib': '49152'},
  'TPU v6 lite': SPARSE_CORE_COLLECTIVES | {'xla_tpu_scoped_vmem_limit_kib': '98304'},
  'TPU7x': SPARSE_CORE_COLLECTIVES,
}
ALIASES = {'TPU v5p': 'TPU v5', 'TPU v5e': 'TPU v5 lite', 'TPU v6e': 'TPU v6 lite', 'TPU v7x': 'TPU7x'}


def options(device_kind: str) -> dict[str, str]:
  """What to pass as `compile(compiler_options=…)` for devices of this kind; nothing for others than TPUs."""
  return OPTIONS.get(ALIASES.get(device_kind, device_kind), {})
