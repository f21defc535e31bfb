"""Compiles MaxText's training step for a pod, by its own `train_compile`, and keeps the program for `maxlm.plan` to read.

    python tests/benchmarks/peer_maxtext_pod.py OUT.hlo compile_topology=v5p-128 model_name=llama3.1-8b remat_policy=full …

What follows OUT.hlo are options of MaxText 0.2.5, in whose environment this runs. Beside OUT.hlo it writes OUT.json: sizes
in memory, seconds to compile, options. For a small change of the program it has no options, so its own functions are used.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}

from maxtext.trainers.pre_train import train_compile

SIZES = ('argument_size_in_bytes', 'output_size_in_bytes', 'alias_size_in_bytes', 'temp_size_in_bytes',
         'peak_memory_in_bytes')


def main(out: Path, *options: str) -> None:
  compile_step = train_compile.jit_and_compile

  def keep(*args, **kwargs):
    start = time.time()
    compiled = compile_step(*args, **kwargs)
    memory = compiled.memory_analysis()
    out.write_text(compiled.as_text())
    out.with_suffix('.json').write_text(json.dumps({
      'seconds': time.time() - start, 'options': options, **{name: getattr(memory, name) for name in SIZES}}, indent=2))
    return compiled

  train_compile.jit_and_compile = keep
  train_compile.main(['train_compile', 'run_name=plan', f'base_output_directory={tempfile.mkdtemp()}', 'hardware=cpu',
                      'compile_topology_num_slices=1', 'enable_checkpointing=False', 'dataset_type=synthetic', *options])


if __name__ == '__main__':
  main(Path(sys.argv[1]), *sys.argv[2:])
