"""Models of other people, and ours for them: between a Hugging Face directory and a MaxLM workdir.

    python -m maxlm.hf import HF_DIR DIR [--dtype=keep]          then DIR is a workdir: generate, evaluate, fine-tune
    python -m maxlm.hf export DIR[@STEP] HF_DIR [--dtype=keep]   then transformers, vLLM and lm-eval load HF_DIR

HF_DIR holds config.json and safetensors; docs/hf.md lists the families. Tokenizer and generation settings go along.
"""

from pathlib import Path

import jax

from maxlm import flags
from maxlm.hf.convert import DTYPE_CHOICES, export_directory, import_directory
from maxlm.sharding import MeshConfig, make_mesh

DTYPE = flags.DEFINE_enum('dtype', 'keep', DTYPE_CHOICES, 'of the weights that are written; keep: as they are stored')
FAMILY = flags.DEFINE_string('family', '', 'export: the family to write (default: its own, or any that can express it)')
MAX_SHARD = flags.DEFINE_float('max_shard_gb', 5.0, 'export: a larger model is written in files of at most this size')


def main(words: list[str]) -> int:
  if len(words) != 3 or words[0] not in ('import', 'export'):
    raise ValueError('say `import HF_DIR DIR` or `export DIR HF_DIR`; --help tells more')
  command, source, target = words
  jax.set_mesh(make_mesh(MeshConfig()))
  if command == 'import':
    report = import_directory(Path(source), Path(target), DTYPE.value)
  else:
    if MAX_SHARD.value <= 0:
      raise ValueError(f'--max_shard_gb={MAX_SHARD.value} must be positive')
    report = export_directory(source, Path(target), DTYPE.value, FAMILY.value or None, int(MAX_SHARD.value * 1e9))
  for note in report.notes:
    print('note:', note)
  print(f'{target}: {report.family}, {report.n_tensors:,} tensors, {report.n_bytes / 1e9:,.2f} GB, '
        f'{report.n_parameters:,} parameters ({", ".join(report.dtypes)}), {report.seconds:.1f} s')
  return 0


if __name__ == '__main__':
  flags.run(main, words=True)
