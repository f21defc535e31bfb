"""An isoFLOP ladder on the quickstart corpus: four budgets, five sizes each, on a plain CPU machine.

    python -m maxlm.sweep --sweep=configs/sweeps/quickstart_isoflop.py --workdir=runs/isoflop --jobs=2

`python -m maxlm.train --config=configs/sweeps/quickstart_isoflop.py:NAME` trains one of its runs alone.
"""

import math

from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sweep import Run, design, member_of

BUDGETS = (5e11, 1e12, 2e12, 4e12)  # FLOPs, attention and head counted
SIZES = (8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)  # of the family
FORECAST = design.tokens_per_parameter(10)  # by seven runs at 5e11 and 4e12 FLOPs
WITHIN = 2.5  # times of the forecast: further up runs have too few steps, further down more tokens than the corpus


def member(size: int, tokens: int, *, name: str = '', seed: int = 0) -> Experiment:
  """The family. size: width of the model, from which the rest follows.

  Batch: 1,024 tokens, below the critical one at all lengths here. Learning rate: 1 / width, which was best at widths 32
  to 256 (docs/hyperparameters.md; the quickstart has it too), down to 0 in a line.
  """
  heads = math.ceil(size / 16)
  layer = LayerSpec(mixer=AttentionSpec(n_heads=heads, n_kv_heads=heads, head_dim=16, qk_norm='head'),
                    mlp=MlpSpec(d_ff=3 * size))
  return Experiment(
    name=name or f'd{size}-{tokens // 1024}k',
    model=DecoderConfig(vocab_size=4096, d_model=size, n_layers=1 + math.ceil(size / 64), tied_embeddings=True,
                        pattern=(layer,)),
    data=DataConfig(corpus='corpora/quickstart', recipe='quickstart', seq_len=256, batch_size=4),
    optim=OptimConfig(peak_lr=1 / max(size, 16), schedule='linear', warmup_tokens=tokens // 20),
    evals=EvalConfig(rows=128),
    tokens=tokens,
    seed=seed,
  )


def get_sweep(arg: str = '') -> list[Run]:
  return design.isoflop(member, SIZES, BUDGETS, FORECAST, within=WITHIN)


def get_config(name: str = '') -> Experiment:
  return member_of(get_sweep, name)
