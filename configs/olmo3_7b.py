"""OLMo 3 7B (arXiv 2512.13961), for a v5p cube of 64 chips: three layers of four see 4096 tokens, the fourth all.

    python -m maxlm.train --config=configs/olmo3_7b.py --config.data.corpus=DIR
    python -m maxlm.train --config=configs/olmo3_7b.py:long --config.data.corpus=DIR --config.init_from=RUN

The recipe is that of the paper's tables and OLMo-core's script: 4.2M tokens a step, 3e-4 after 2,000 steps, a cosine
to a tenth. (Theirs was stretched half-way, from 5T to 7T tokens, and stopped at 5.93T.) `long` is a long-context
stage of rows of 128k, each on 16 chips, where theirs were of 64k: the full layers' positions are stretched by YaRN,
the sliding layers' are not. `window1024` is the same stage of a model whose windows are a quarter as long, to see
what they cost.

Not yet run on hardware, nor compiled whole: the contract test type-checks its step on the abstract pod.
"""

import dataclasses

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.rope import RopeSpec, YarnScaling
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sharding import MeshConfig


def get_config(arg: str = '') -> Experiment:
  match arg:
    case '':
      return pretraining()
    case 'long':
      return long_context(window=4096)
    case 'window1024':
      return long_context(window=1024)
  raise ValueError(f'configs/olmo3_7b.py:{arg}: the argument is long, window1024 or nothing')


def model(*, window: int = 4096, full_rope: RopeSpec | None = None) -> DecoderConfig:
  rope = RopeSpec(theta=500_000.0)
  sliding = LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=32, head_dim=128, window=window, rope=rope, qk_norm='all'),
                      mlp=MlpSpec(d_ff=11_008), norm='post')
  full = dataclasses.replace(sliding, mixer=dataclasses.replace(sliding.mixer, window=None, rope=full_rope or rope))
  return DecoderConfig(vocab_size=100_352, d_model=4096, n_layers=32, pattern=(sliding, sliding, sliding, full))


def pretraining() -> Experiment:
  return Experiment(
    name='olmo3_7b',
    pod='v5p:4x4x4',
    model=model(),  # the vocabulary is the tokenizer's 100,278, rounded up to a multiple of 128, as in OLMo-core
    compute=ComputeConfig(remat='attention'),
    data=DataConfig(corpus='corpora/olmo3_7b', seq_len=8192, batch_size=512),
    microbatches=4,
    optim=OptimConfig(peak_lr=3e-4, schedule='cosine', warmup_tokens=8_388_608_000, final_lr_frac=0.1),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=1000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    tokens=5_930_000_000_000,
  )


def long_context(window: int) -> Experiment:
  stretched = RopeSpec(theta=500_000.0, scaling=YarnScaling(factor=16.0, original_length=8192))
  return dataclasses.replace(
    pretraining(),
    name=f'olmo3_7b_long_window{window}',
    model=model(window=window, full_rope=stretched),
    mesh=MeshConfig(context=16),
    data=DataConfig(corpus='corpora/olmo3_7b_long', seq_len=131_072, batch_size=32),
    microbatches=8,
    optim=OptimConfig(peak_lr=2.0712e-4, schedule='linear', warmup_tokens=838_860_800),
    evals=EvalConfig(every_steps=500, rows=32),
    tokens=50_000_000_000,
  )
