"""1.14B parameters, llama-shaped, for sixteen v5e chips.

    python -m maxlm.train --config=configs/dense_1b.py --config.data.corpus=DIR

Not yet run on hardware. Planned for the pod (docs/perf.md): 2.37 s a step, 50.8 % of the peak, 8.5 of 15.8 GiB.
"""

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
  layer = LayerSpec(mixer=AttentionSpec(n_heads=16, n_kv_heads=8, head_dim=128, rope=RopeSpec(theta=500_000.0),
                                        qk_norm='head'),
                    mlp=MlpSpec(d_ff=8192))
  return Experiment(
    name='dense_1b',
    pod='v5e:4x4',
    model=DecoderConfig(vocab_size=32_768, d_model=2048, n_layers=16, pattern=(layer,)),
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/dense_1b', seq_len=4096, batch_size=128),
    optim=OptimConfig(peak_lr=1e-3, schedule='wsd', warmup_tokens=1_000_000_000, decay_tokens=5_000_000_000),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=256),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=25_000_000_000,
  )
