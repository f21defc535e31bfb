"""A mixture of experts of Qwen3-30B-A3B's shape in three stages, for 128 v5p chips. 3.3B of 30.5B parameters active.

    python -m maxlm.train --config=configs/moe_30b_a3b.py --dry_run
    python -m maxlm.train --config=configs/moe_30b_a3b.py

No recipe of this size is published whole. Stages, tokens and lengths are Qwen3's (arXiv 2505.09388, section 3.2): more than
30T of general text, about 5T of knowledge and reasoning at 4096, then hundreds of billions at 32,768, three quarters of them
of long documents, with the base of the rotary positions raised from 10,000 to 1,000,000. Its rates and batches are not
published: those here are Nemotron 3 Nano's, which has the same size (3,072 rows of 8192, 1e-3 after 8.4B tokens, constant,
then down to 1e-5). Balance is by the loss over the global batch, as theirs.

Not yet run on hardware. Planned for the pod (docs/perf.md): 25.0 s a step of the first stage, 39.6 % of the peak,
65.6 of 95.7 GiB.
"""

from configs import qwen3_30b_a3b
from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment, Ramp, Stage, Stretch
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.sharding import MeshConfig

B = 1_000_000_000


def get_config(arg: str = '') -> Experiment:
  return Experiment(
    name='moe_30b_a3b',
    pod='v5p:4x4x8',
    model=qwen3_30b_a3b.decoder(theta=10_000.0),
    compute=ComputeConfig(remat='experts'),
    data=DataConfig(corpus='corpora/moe_30b_a3b', seq_len=4096, batch_size=6144, max_epochs={'*': 4.0}),
    microbatches=6,
    optim=OptimConfig(),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=1000, rows=1024),
    checkpoint=CheckpointConfig(keep_every=5000),
    stages=(
      Stage(name='general', tokens=30_000 * B, lr=Schedule(peak_lr=1e-3, warmup_tokens=8_400_000_000),
            mixture={'web': 60, 'pdf': 15, 'code': 15, 'math': 5, 'synthetic': 5},
            ramp=(Ramp(rows=1536, until_tokens=100 * B), Ramp(rows=3072, until_tokens=300 * B))),
      Stage(name='reasoning', tokens=5_000 * B,
            lr=Schedule(peak_lr=1e-3, schedule='linear', final_lr_frac=0.01, end_lr=1e-5),
            mixture={'web': 25, 'pdf': 15, 'code': 25, 'math': 20, 'synthetic': 15}),
      Stage(name='long', tokens=300 * B, lr=Schedule(peak_lr=1e-5), seq_len=32_768, batch_size=768,
            mixture={'pdf.16384': 45, 'web.16384': 20, 'code.16384': 10, 'web': 15, 'synthetic': 10},
            full=Stretch(theta=1_000_000.0), mesh=MeshConfig(context=4), microbatches=24),
    ),
  )
