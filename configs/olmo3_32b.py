"""OLMo 3 32B (arXiv 2512.13961), for 256 v5p chips: three layers of four see 4096 tokens, the fourth all.

    python -m maxlm.train --config=configs/olmo3_32b.py --config.data.corpus=DIR

The recipe is that of the paper's tables and OLMo-core's script: 8.4M tokens a step, 6e-4 after 2,000 steps, and a
cosine to a tenth. (Theirs was made for 5.93T tokens and stopped at 5.5T, at 6.2e-5.)

Not yet run on hardware, nor compiled whole: the contract test type-checks its step on the abstract pod.
"""

import dataclasses

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.rope import RopeSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  attention = AttentionSpec(n_heads=40, n_kv_heads=8, head_dim=128, window=4096, rope=RopeSpec(theta=500_000.0),
                            qk_norm='all')
  sliding = LayerSpec(mixer=attention, mlp=MlpSpec(d_ff=27_648), norm='post')
  full = dataclasses.replace(sliding, mixer=dataclasses.replace(attention, window=None))
  return Experiment(
    name='olmo3_32b',
    pod='v5p:4x8x8',
    model=DecoderConfig(vocab_size=100_352, d_model=5120, n_layers=64, pattern=(sliding, sliding, sliding, full)),
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/olmo3_32b', seq_len=8192, batch_size=1024),
    microbatches=2,
    optim=OptimConfig(peak_lr=6e-4, schedule='cosine', warmup_tokens=16_777_216_000, final_lr_frac=0.1),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=1000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=5_500_000_000_000,
  )
