"""gpt-oss-120b's shape (OpenAI 2025, arXiv 2508.10925), for a v5p cube of 64 chips: 4 of 128 experts, 5.1B of 117B
active.

    python -m maxlm.train --config=configs/gpt_oss_120b.py --config.data.corpus=DIR

Attention with sinks, every other layer in a window of 128. A step is 1.05M tokens, 16,384 a chip. Four chips share
the experts, so that a layer's 6.4 GB of them are not gathered whole. OpenAI has not published how it was trained:
AdamW, the schedule and the rates are ours, in the range of models of this size.

Not yet run on hardware. Planned for the pod (docs/perf.md): 3.86 s a step, 32.0 % of the peak, 89.4 of 95.7 GiB.
"""

import dataclasses

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec, YarnScaling
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sharding import MeshConfig


def get_config(arg: str = '') -> Experiment:
  rope = RopeSpec(theta=150_000.0, scaling=YarnScaling(factor=32.0, original_length=4096, truncate=False))
  attention = AttentionSpec(n_heads=64, n_kv_heads=8, head_dim=64, window=128, rope=rope, sinks=True, qkv_bias=True,
                            out_bias=True)
  expert = MlpSpec(d_ff=2880, activation='clamped_swiglu', bias=True, limit=7.0)
  sliding = LayerSpec(mixer=attention, mlp=MoeSpec(n_experts=128, k=4, experts=expert, router_bias=True))
  full = dataclasses.replace(sliding, mixer=dataclasses.replace(attention, window=None))
  return Experiment(
    name='gpt_oss_120b',
    pod='v5p:4x4x4',
    model=DecoderConfig(vocab_size=201_088, d_model=2880, n_layers=36, pattern=(sliding, full), norm=NormSpec(eps=1e-5)),
    compute=ComputeConfig(remat='experts'),
    mesh=MeshConfig(expert=4),
    data=DataConfig(corpus='corpora/gpt_oss_120b', seq_len=8192, batch_size=128),
    optim=OptimConfig(peak_lr=3e-4, schedule='wsd', warmup_tokens=2_000_000_000, decay_tokens=200_000_000_000),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=1_000_000_000_000,
  )
