"""Fine-tunes a model on conversations; loss on what the assistant says.

    python -m maxlm.train --config=configs/finetune/sft.py --config.init_from=runs/quickstart
    python -m maxlm.train --config=configs/finetune/sft.py:lora --config.init_from=runs/quickstart

The conversations are made from Python's documentation, with the tokenizer of the model; your own: docs/finetune.md. Figures
of the last verified run are in docs/LOG.md.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.lora import LoraConfig
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  """arg: '' trains all weights, 'lora' adapters, 'dora' adapters with learned lengths."""
  if arg not in ('', 'lora', 'dora'):
    raise ValueError(f'sft.py:{arg}: after the colon say lora or dora, or nothing')
  return Experiment(
    name=f'sft-{arg}' if arg else 'sft',
    data=DataConfig(corpus='corpora/sft', recipe='sft', seq_len=256, batch_size=8),
    optim=OptimConfig(peak_lr=2e-3, schedule='linear', warmup_tokens=20_000),
    evals=EvalConfig(every_steps=100, rows=64),
    checkpoint=CheckpointConfig(every_steps=100),
    tokens=500_000,
    lora=LoraConfig(rank=16, alpha=32.0, dora=arg == 'dora') if arg else None,
  )
