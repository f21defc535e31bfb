"""Marin 8B (Marin's retrospective, docs/reports/marin-8b-retro.md of marin-community/marin), for 1,024 v4 chips.

    python -m maxlm.train --config=configs/marin_8b.py --dry_run
    python -m maxlm.train --config=configs/marin_8b.py

Llama 3.1 8B's shape, 12.7T tokens: constant rates with two cool-downs, a rewarming between them, and batches that grow. The
names are Marin's, so are tokens, rates, batches and mixtures. They were not planned: each was decided on as the run went, as
one may here, for stages that have not begun can still be changed. What is different, and why:

- kestrel had a short decay every 10,000, then 20,000 steps (WSD-S), and came back up after each: left out, for they were to
  look at the model. A branch does that without touching the run: --branch=RUN@STEP --stages=jellyfish.
- The z-loss of 1e-4 came with starling, after the head's norm had exploded in a deep cool-down; they have had it from the
  first step since, and so has this.
- ocelot corrects the rotary positions, from those of Llama 2 to those of Llama 3.
- The mixtures of phoenix are 'by tokens' in the text: here in the proportions that starling has for the same sources.

Not yet run on hardware. Planned for the pod (docs/perf.md): 1.44 s a step of the first stage, 49.9 % of the peak, 4.6
of 30.8 GiB.
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment, Stage, Stretch
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import Llama3Scaling, RopeSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.schedule import Schedule
from maxlm.sharding import MeshConfig

# Percent times ten.
DCLM = {'dclm': 926, 'starcoder': 61, 'proofpile2': 13}
COOLDOWN = {'dclm_hq': 678, 'pes2o': 108, 'finemath': 63, 'arxiv': 52, 'stackexchange': 32, 'starcoder': 22,
            'algebraic_stack': 21, 'open_web_math': 9, 'megawika': 8, 'wikipedia': 7}
NEMOTRON = {'nemotron_medium': 221, 'nemotron_hq_synthetic': 178, 'nemotron_medium_low': 101, 'nemotron_hq': 60,
            'nemotron_medium_high': 54, 'nemotron_low': 46, 'nemotron_low_synthetic': 41, 'starcoder': 45}
STARLING = NEMOTRON | {
  'arxiv_markdown': 52, 'pes2o': 52, 'proofpile2': 45, 'finemath': 30, 'flan': 30, 'stackexchange': 15,
  'stackexchange_markdown': 15, 'dolmino_math': 8, 'wikipedia_markdown': 3, 'dolmino_wiki': 3, 'science_qa': 1}
T = 1_000_000_000_000
WARM = 2000 * 3072 * 4096  # tokens of the rewarming


def get_config(arg: str = '') -> Experiment:
  layer = LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=8, head_dim=128, rope=RopeSpec(theta=10_000.0)),
                    mlp=MlpSpec(d_ff=14_336))
  hot = Schedule(peak_lr=1.7e-3)
  return Experiment(
    name='marin_8b',
    pod='v4:8x8x16',
    model=DecoderConfig(vocab_size=128_256, d_model=4096, n_layers=32, pattern=(layer,), norm=NormSpec(eps=1e-5)),
    compute=ComputeConfig(remat='attention'),
    mesh=MeshConfig(data=4),
    data=DataConfig(corpus='corpora/marin_8b', mixture=DCLM, seq_len=4096, batch_size=3072),
    optim=OptimConfig(weight_decay=0.05),
    loss=LossConfig(z_loss=1e-4),
    evals=EvalConfig(every_steps=1000, rows=1024),
    checkpoint=CheckpointConfig(keep_every=20_000),
    stages=(
      Stage(name='kestrel', tokens=2_700_000_000_000, batch_size=1024,
            lr=Schedule(peak_lr=1e-3, warmup_tokens=4_194_304_000)),
      Stage(name='ocelot', tokens=3_780_000_000_000 - 2_700_000_000_000, lr=hot,
            full=Stretch(theta=500_000.0, scaling=Llama3Scaling(factor=8.0, original_length=8192))),
      Stage(name='jellyfish', tokens=T, mixture=COOLDOWN,
            lr=Schedule(peak_lr=1.7e-3, schedule='linear', final_lr_frac=0.1, end_lr=1.7e-4)),
      Stage(name='phoenix_transition', tokens=WARM, mixture=DCLM | NEMOTRON,
            lr=Schedule(peak_lr=1.7e-3, warmup_tokens=WARM, warmup_from_lr=1.7e-4)),
      Stage(name='phoenix', tokens=11_100_000_000_000 - 4_780_000_000_000 - WARM, mixture=NEMOTRON, lr=hot),
      Stage(name='starling', tokens=80_000 * 4096 * 4096, mixture=STARLING, batch_size=4096,
            lr=Schedule(peak_lr=1.7e-3, schedule='linear', final_lr_frac=0.01, end_lr=1.7e-5)),
      Stage(name='dessert', tokens=300_000_000_000, mixture=STARLING, batch_size=4096, lr=Schedule(peak_lr=1.7e-5)),
    ),
  )
