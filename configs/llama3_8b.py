"""Llama 3 8B's shape (Grattafiori et al. 2024, arXiv 2407.21783, table 3), for a v5p cube of 64 chips.

    python -m maxlm.train --config=configs/llama3_8b.py --config.data.corpus=DIR

Not yet run on hardware. Planned for the pod (docs/perf.md): 2.67 s a step, 68.7 % of the peak, 50.3 of 95.7 GiB.
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
  layer = LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, rope=RopeSpec(theta=500_000.0)),
                    mlp=MlpSpec(d_ff=14_336))
  return Experiment(
    name='llama3_8b',
    pod='v5p:4x4x4',
    model=DecoderConfig(vocab_size=128_256, d_model=4096, n_layers=32, pattern=(layer,), norm=NormSpec(eps=1e-5)),
    compute=ComputeConfig(remat='products'),
    data=DataConfig(corpus='corpora/llama3_8b', seq_len=8192, batch_size=128),
    optim=OptimConfig(peak_lr=3e-4, schedule='cosine', warmup_tokens=8_000_000_000, final_lr_frac=0.01),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=1_000_000_000_000,
  )
