"""A whole recipe in minutes, on a plain CPU machine: pre-training, mid-training and long context on real documents.

    python -m maxlm.train --config=configs/staged_tiny.py

`pretrain`: web pages and PDFs at 256 tokens, and short texts with questions on them: there a model learns to look up
what it has read. `mid`: the learning rate falls, and worked problems come in. `long`: rows of 1024, the full layers'
positions stretched, 34 % long documents and 66 % of what came before (OLMo 3, arXiv 2512.13961). The evaluations ask for
facts at up to 1024 tokens from the first step on: before `long` they are found at short distances, after it at long ones.
Figures of the last verified run are in docs/LOG.md.
"""

from maxlm.config import Experiment, Stage, Stretch
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.tasks import LongRangeTasks, PuzzleTasks

DOCUMENTS = {'web': 1, 'web.1024': 18, 'pdf.1024': 6}


def get_config(arg: str = '') -> Experiment:
  def layer(window):
    return LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=32, window=window, qk_norm='head'),
                     mlp=MlpSpec(d_ff=384))
  return Experiment(
    name='staged_tiny',
    model=DecoderConfig(vocab_size=2048, d_model=128, n_layers=4, pattern=(layer(3), layer(None))),
    data=DataConfig(corpus='corpora/staged_tiny', recipe='staged_tiny', seq_len=256, batch_size=4, max_epochs={'*': 4}),
    optim=OptimConfig(optimizer='muon', ema=0.99),
    evals=EvalConfig(every_steps=400, rows=32, tasks=(
      LongRangeTasks(tasks=('needle', 'multi_key'), lengths=(96, 256, 512, 1024), examples=64), PuzzleTasks(examples=64))),
    stages=(
      Stage(name='pretrain', tokens=1_200_000, lr=Schedule(peak_lr=2e-3, warmup_tokens=75_000),
            mixture=DOCUMENTS | {'recall': 54}),
      Stage(name='mid', tokens=400_000, lr=Schedule(peak_lr=2e-3, schedule='linear', final_lr_frac=0.1, end_lr=2e-4),
            mixture=DOCUMENTS | {'recall': 24, 'reasoning': 30}),
      Stage(name='long', tokens=400_000,
            lr=Schedule(peak_lr=1e-3, warmup_tokens=20_000, decay_tokens=200_000, end_lr=0.0),
            mixture={'long_recall': 20, 'web.1024': 10, 'pdf.1024': 4, 'web': 3, 'recall': 45, 'reasoning': 18},
            seq_len=1024, batch_size=1, full=Stretch(theta=40_000.0)),
    ),
  )
