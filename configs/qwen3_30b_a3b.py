"""Qwen3-30B-A3B's shape (arXiv 2505.09388, table 2), for a v5p cube of 64 chips: 8 of 128 experts, 3.3B of 30.5B
active.

    python -m maxlm.train --config=configs/qwen3_30b_a3b.py --config.data.corpus=DIR

A step is 2.1M tokens, 32,768 a chip. Rows of 4096 are the paper's first stage; its rates and batch are not published:
those here are ours, in the range of models of this size.

Not yet run on hardware. Planned for the pod (docs/perf.md): 4.18 s a step, 39.4 % of the peak, 68.2 of 95.7 GiB.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def decoder(theta: float) -> DecoderConfig:
  """theta: the base of the rotary positions, which is higher where rows are long."""
  layer = LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=4, head_dim=128, rope=RopeSpec(theta=theta), qk_norm='head'),
                    mlp=MoeSpec(n_experts=128, k=8, experts=MlpSpec(d_ff=768)))
  return DecoderConfig(vocab_size=151_936, d_model=2048, n_layers=48, pattern=(layer,), norm=NormSpec(cast='before'))


def get_config(arg: str = '') -> Experiment:
  return Experiment(
    name='qwen3_30b_a3b',
    pod='v5p:4x4x4',
    model=decoder(theta=1_000_000.0),
    compute=ComputeConfig(remat='experts'),
    data=DataConfig(corpus='corpora/qwen3_30b_a3b', seq_len=4096, batch_size=512),
    optim=OptimConfig(peak_lr=4e-4, schedule='wsd', warmup_tokens=4_000_000_000, decay_tokens=200_000_000_000),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=1_000_000_000_000,
  )
