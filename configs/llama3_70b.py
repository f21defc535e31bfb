"""Llama 3 70B's shape (Grattafiori et al. 2024, arXiv 2407.21783, table 3), for 256 v5p chips.

    python -m maxlm.train --config=configs/llama3_70b.py --config.data.corpus=DIR

4.2M tokens a step, 16,384 a chip. The peak learning rate is that of the paper's table 3; schedule and ratios are
those it gives for 405B (section 3.4.1): 8,000 steps of warm-up, a cosine to a hundredth.

Not yet run on hardware. Planned for the pod (docs/perf.md): 23.7 s a step, 67.6 % of the peak, 52.5 of 95.7 GiB.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  layer = LayerSpec(mixer=AttentionSpec(n_heads=64, n_kv_heads=8, head_dim=128, rope=RopeSpec(theta=500_000.0)),
                    mlp=MlpSpec(d_ff=28_672))
  return Experiment(
    name='llama3_70b',
    pod='v5p:4x8x8',
    model=DecoderConfig(vocab_size=128_256, d_model=8192, n_layers=80, pattern=(layer,),
                        norm=NormSpec(eps=1e-5, cast='before')),
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/llama3_70b', seq_len=8192, batch_size=512),
    optim=OptimConfig(peak_lr=1.5e-4, schedule='cosine', warmup_tokens=33_554_432_000, final_lr_frac=0.01),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=15_000_000_000_000,
  )
