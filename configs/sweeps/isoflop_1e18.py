"""An isoFLOP ladder from 1e18 to 1e20 FLOPs for v5e slices. Designed, type-checked on abstract pods, not yet run.

    python -m maxlm.sweep --sweep=configs/sweeps/isoflop_1e18.py --workdir=/gcs/ladder --jobs=4 --emit=launch --out=F.jsonl

Rules: learning rate by size (Porian et al. 2024, arXiv 2406.19146, as OLMo-core halves it), batch and decay by length (Power
Lines, arXiv 2505.13738). The forecast is 20 tokens a parameter: give the law of a first fit as the next ladder's.
"""

import math

from maxlm import rules
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sweep import Run, design, member_of

BUDGETS = (1e18, 3e18, 1e19, 3e19, 1e20)
SIZES = tuple(range(384, 3200, 128))
FORECAST = design.tokens_per_parameter(20)


def member(size: int, tokens: int, *, name: str = '', seed: int = 0) -> Experiment:
  """The family. size: width of the model: heads of 128, as many layers as heads, three times as many hidden units."""
  heads = size // 128
  params = 13 * heads * size**2  # without embeddings
  lr = rules.porian(params).learning_rate
  rows = 2 ** round(math.log2(max(64, rules.power_lines(params, tokens, lr).batch / 2048)))
  decay = rules.decay_for_timescale(rules.best_timescale(params, tokens), lr, rows * 2048, tokens)
  layer = LayerSpec(mixer=AttentionSpec(n_heads=heads, n_kv_heads=heads, head_dim=128, qk_norm='head'),
                    mlp=MlpSpec(d_ff=3 * size))
  return Experiment(
    name=name or f'd{size}-{tokens / 1e9:.3g}b',
    pod='v5e:4x4' if size <= 1024 else 'v5e:8x8',
    model=DecoderConfig(vocab_size=32_768, d_model=size, n_layers=heads, pattern=(layer,)),
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/dense_1b', seq_len=2048, batch_size=rows),
    optim=OptimConfig(peak_lr=lr, schedule='linear', warmup_tokens=tokens // 20, weight_decay=min(decay, 1.0)),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(rows=1024),
    tokens=tokens,
    seed=seed,
  )


def get_sweep(arg: str = '') -> list[Run]:
  return design.isoflop(member, SIZES, BUDGETS, FORECAST)


def get_config(name: str = '') -> Experiment:
  return member_of(get_sweep, name)
