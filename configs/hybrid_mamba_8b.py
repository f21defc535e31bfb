"""A Mamba-2 hybrid of 8.7B parameters (Waleffe et al. 2024, arXiv 2406.07887), for 64 v5p chips: of 56 layers, 24 Mamba-2,
4 attention without positions, 28 MLPs.

    python -m maxlm.train --config=configs/hybrid_mamba_8b.py --dry_run
    python -m maxlm.train --config=configs/hybrid_mamba_8b.py

The shape and the 3.5T tokens of rows of 4096 are the paper's, and so is that 50B tokens of longer rows extend it: no rotary
positions need stretching. The paper decays over all of it with a cosine; here the rate stays and falls over the last tenth,
so that the long stage, or another data mix, can branch from its stable part. Rates and mixtures are ours.

Not yet run on hardware. Planned for the pod (docs/perf.md): 15.5 s a step of the first stage, 42.6 % of the peak,
25.5 of 95.7 GiB.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment, Stage
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.sharding import MeshConfig

LAYERS = 'M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-'  # M Mamba-2, * attention, - MLP
B = 1_000_000_000


def get_config(arg: str = '') -> Experiment:
  block = {
    'M': LayerSpec(mixer=Mamba2Spec(n_heads=128, head_dim=64, state_dim=128, n_groups=8), mlp=None),
    '*': LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, rope=None), mlp=None),
    '-': LayerSpec(mixer=None, mlp=MlpSpec(d_ff=16_384, activation='relu2', gated=False)),
  }
  return Experiment(
    name='hybrid_mamba_8b',
    pod='v5p:4x4x4',
    model=DecoderConfig(vocab_size=256_000, d_model=4096, n_layers=len(LAYERS),
                        pattern=tuple(block[kind] for kind in LAYERS)),
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/hybrid_mamba_8b', seq_len=4096, batch_size=1024, max_epochs={'*': 4.0}),
    microbatches=4,
    optim=OptimConfig(),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=2000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    stages=(
      Stage(name='stable', tokens=3150 * B, lr=Schedule(peak_lr=3e-4, warmup_tokens=2 * B),
            mixture={'web': 70, 'pdf': 12, 'code': 15, 'synthetic': 3}),
      Stage(name='anneal', tokens=350 * B, lr=Schedule(peak_lr=3e-4, schedule='linear', final_lr_frac=0.1, end_lr=3e-5),
            mixture={'web': 45, 'pdf': 20, 'code': 20, 'synthetic': 15}),
      Stage(name='long', tokens=50 * B, lr=Schedule(peak_lr=3e-5, schedule='linear', end_lr=0.0), seq_len=32_768,
            batch_size=128, mixture={'pdf.8192': 25, 'code.8192': 9, 'web': 40, 'code': 16, 'synthetic': 10},
            mesh=MeshConfig(context=4), microbatches=4),
    ),
  )
