"""Nemotron 3 Nano 30B-A3B's shape (NVIDIA 2025, technical report), for 128 v5p chips: 23 Mamba-2 layers, 6 of
attention without positions, 23 mixtures of 6 of 128 experts and a shared one, each a layer of its own. 3.2B of 31.6B
active.

    python -m maxlm.train --config=configs/nemotron3_nano.py --config.data.corpus=DIR

The recipe is the report's: 3,072 rows of 8192 a step, 1e-3 after 8.4B tokens, constant for four fifths, then down to
1e-5.

Not yet run on hardware. Planned for the pod (docs/perf.md): 25.7 s a step, 34.5 % of the peak, 49.8 of 95.7 GiB.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mamba2 import Mamba2Spec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig

LAYERS = 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME'  # M Mamba-2, E experts, * attention


def get_config(arg: str = '') -> Experiment:
  mamba2 = Mamba2Spec(n_heads=64, head_dim=64, state_dim=128, n_groups=8, dt_min=1e-3)
  attention = AttentionSpec(n_heads=32, n_kv_heads=2, head_dim=128, rope=None)
  experts = MoeSpec(n_experts=128, k=6, experts=MlpSpec(d_ff=1856, activation='relu2', gated=False),
                    shared=MlpSpec(d_ff=3712, activation='relu2', gated=False), score='sigmoid', select_bias=True, scale=2.5)
  block = {'M': LayerSpec(mixer=mamba2, mlp=None), '*': LayerSpec(mixer=attention, mlp=None),
           'E': LayerSpec(mixer=None, mlp=experts)}
  return Experiment(
    name='nemotron3_nano',
    pod='v5p:4x4x8',
    model=DecoderConfig(vocab_size=131_072, d_model=2688, n_layers=len(LAYERS),
                        pattern=tuple(block[kind] for kind in LAYERS), norm=NormSpec(eps=1e-5)),
    compute=ComputeConfig(remat='experts'),
    data=DataConfig(corpus='corpora/nemotron3_nano', seq_len=8192, batch_size=3072),
    microbatches=6,
    optim=OptimConfig(peak_lr=1e-3, schedule='wsd', warmup_tokens=8_400_000_000, decay_tokens=5_000_000_000_000,
                      final_lr_frac=0.01),
    evals=EvalConfig(every_steps=1000, rows=512),
    checkpoint=CheckpointConfig(keep_every=5000),
    tokens=25_000_000_000_000,
  )
