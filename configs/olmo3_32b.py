"""OLMo 3 32B (arXiv 2512.13961), for 256 v5p chips: pre-training, mid-training and long context as one run.

    python -m maxlm.train --config=configs/olmo3_32b.py --dry_run
    python -m maxlm.train --config=configs/olmo3_32b.py

Three layers of four see 4096 tokens, the fourth all. The numbers are those of the paper's tables and of OLMo-core's
scripts (src/scripts/official/OLMo3), as of June 2026. What is different there:

- `pretrain`: a cosine over one epoch of their mix, left at step 656,000 at a rate of 6.21e-5 (table 35 prints 6.0e-5, its
  end). That rate is reached by a cosine over 5.73T tokens, so this is the horizon here.
- `mid`: they train it twice, with the data in different orders, and average the two. The second one is a branch of the first
  stage's end with another --config.seed: docs/stages.md has the commands.
- `long`: the script loads the checkpoint of pre-training at step 656,000 instead of the mid-trained model. Here a stage goes
  on from the one before it, and a branch from another is refused. Their model is the mean of the steps 10,000, 11,000 and
  11,921 of the stage: `python -m maxlm.average`.

Not yet run on hardware. Planned for the pod (docs/perf.md): 23.6 s a step of the first stage, 61.5 % of the peak,
39.8 of 95.7 GiB.
"""

import dataclasses

from configs.olmo3_7b import DOLMINO, LONGMINO
from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment, Stage, Stretch
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.rope import RopeSpec, YarnScaling
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.sharding import MeshConfig

STEP = 1024 * 8192  # tokens
DOLMA3 = {'web': 4510, 'pdf': 805, 'code': 409, 'math': 152, 'arxiv': 51, 'wikipedia': 3}  # in billions of tokens


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
    data=DataConfig(corpus='corpora/dolma3', mixture=DOLMA3, seq_len=8192, batch_size=1024, mask='row',
                    source_tokens={name: size * 10**9 for name, size in DOLMA3.items()}, max_epochs={'*': 1.01}),
    microbatches=2,
    optim=OptimConfig(),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=1000, rows=512),
    checkpoint=CheckpointConfig(keep_every=1000),
    stages=(
      Stage(name='pretrain', tokens=656_000 * STEP,
            lr=Schedule(peak_lr=6e-4, schedule='cosine', warmup_tokens=2000 * STEP, final_lr_frac=0.1,
                        horizon_tokens=5_730_000_000_000, end_lr=6.21e-5)),
      Stage(name='mid', tokens=100_000_000_000, lr=Schedule(peak_lr=2.0712e-4, schedule='linear', end_lr=0.0),
            corpus='corpora/dolmino', mixture=DOLMINO, batch_size=512),
      Stage(name='long', tokens=11_921 * STEP,
            lr=Schedule(peak_lr=2.0712e-4, schedule='linear', warmup_tokens=200 * STEP, end_lr=0.0),
            corpus='corpora/longmino', mixture=LONGMINO, seq_len=65_536, batch_size=128, mask='document',
            full=Stretch(scaling=YarnScaling(factor=8.0, original_length=8192)), mesh=MeshConfig(context=8), microbatches=4,
            evals=EvalConfig(every_steps=500, rows=64)),
    ),
  )
