"""DeepSeek-V3's shape (arXiv 2412.19437, section 4.2), for 512 v5p chips: latent attention, 8 of 256 experts and a
shared one, 37B of 671B active. Its layer that predicts the token after the next is left out.

    python -m maxlm.train --config=configs/deepseek_v3.py --config.data.corpus=DIR

The recipe is the paper's: 15,360 rows of 4096 a step (they began with 3,072), 2.2e-4 after 2,000 steps, constant to
10T tokens. Theirs then fell as a cosine to a tenth and ended with two constant stages; here it falls linearly to
there. bf16, theirs was fp8. YaRN is that of the published model, made for rows of more than 4096: in pre-training it
came last. Eight chips share the experts, so that a layer's 22.5 GB of them are not gathered whole. None is dropped.

Not yet run on hardware. Planned for the pod (docs/perf.md): 208.5 s a step, 32.2 % of the peak, 79.1 of 95.7 GiB.
"""

import math

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.mla import MlaSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec, YarnScaling
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sharding import MeshConfig


def get_config(arg: str = '') -> Experiment:
  yarn = YarnScaling(factor=40.0, original_length=4096, amplitude=1.0)
  attention = MlaSpec(n_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128,
                      rope=RopeSpec(theta=10_000.0, interleaved=True, scaling=yarn),
                      scale=192**-0.5 * (0.1 * math.log(yarn.factor) + 1)**2)  # the amplitude of YaRN, in the scores alone
  experts = MoeSpec(n_experts=256, k=8, experts=MlpSpec(d_ff=2048), shared=MlpSpec(d_ff=2048), score='sigmoid',
                    select_bias=True, groups=8, groups_kept=4, scale=2.5)
  dense, mixture = LayerSpec(mixer=attention, mlp=MlpSpec(d_ff=18_432)), LayerSpec(mixer=attention, mlp=experts)
  return Experiment(
    name='deepseek_v3',
    pod='v5p:8x8x8',
    model=DecoderConfig(vocab_size=129_280, d_model=7168, n_layers=61, pattern=3 * (dense,) + 58 * (mixture,),
                        norm=NormSpec(cast='before')),
    compute=ComputeConfig(remat='attention'),
    mesh=MeshConfig(expert=8),
    data=DataConfig(corpus='corpora/deepseek_v3', seq_len=4096, batch_size=15_360),
    microbatches=15,
    optim=OptimConfig(peak_lr=2.2e-4, schedule='wsd', warmup_tokens=125_829_120_000, decay_tokens=4_800_000_000_000,
                      final_lr_frac=0.1),
    evals=EvalConfig(every_steps=1000, rows=2048),
    checkpoint=CheckpointConfig(keep_every=5000),
    tokens=14_800_000_000_000,
  )
