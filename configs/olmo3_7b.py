"""OLMo 3 7B (arXiv 2512.13961), for a v5p cube of 64 chips: pre-training, mid-training and long context as one run.

    python -m maxlm.train --config=configs/olmo3_7b.py --dry_run
    python -m maxlm.train --config=configs/olmo3_7b.py

Three layers of four see 4096 tokens, the fourth all. The numbers are those of the paper's tables and of OLMo-core's
scripts (src/scripts/official/OLMo3), as of June 2026. They run as four scripts; what is different there, and why not here:

- `pretrain` and `pretrain2`: the cosine was made for 5T tokens, and at step 597,046 its second half was stretched to end at
  7T; one epoch of the data ended at step 1,413,814. Both schedules are laid over more than they have, so each says where it
  ends. The scripts' formula gives 3.9e-5 there; the paper's table has 3e-5.
- `mid`: 2.0712e-4 in the scripts, 2.074e-4 in the paper's table 35; the scripts ran.
- `long`: the script kept pre-training's duration of 5T tokens and its stop at step 597,046, so that its linear decay
  over 11,921 steps hardly begins (OLMo-core issue 627). Here it is laid over the 50B tokens of the stage.
- Theirs concatenates and chunks documents that see each other until the long stage (`mask='row'`); ours are packed whole.

The mixtures are the paper's: Dolma 3 by the sizes of its sources, Dolmino and Longmino in hundredths of a percent.

Not yet run on hardware. Planned for the pod (docs/perf.md): 10.4 s a step of the first stage, 63.8 % of the peak,
59.5 of 95.7 GiB.
"""

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

STEP = 512 * 8192  # tokens
DOLMA3 = {'web': 4_510_000_000_000, 'pdf': 805_000_000_000, 'code': 409_000_000_000, 'math': 152_000_000_000,
          'arxiv': 50_800_000_000, 'wikipedia': 2_510_000_000}
DOLMINO = {'web_high_quality': 2250, 'dolmino_math': 1070, 'code_fim': 1000, 'crane_code': 1000, 'reddit_flashcards': 590,
           'crane_math': 563, 'pdf_high_quality': 500, 'stem_crawl': 500, 'nemotron_qa': 500, 'flan': 500, 'wiki_rcqa': 300,
           'qwq_traces': 187, 'general_traces': 187, 'mega_matt': 173, 'llama_nemotron_traces': 125, 'open_thoughts2': 125,
           'tulu3': 110, 'tiny_math_mind': 90, 'omr': 85, 'code_meta': 46, 'math_meta': 38, 'gemini_traces': 25,
           'tiny_math_pot': 24, 'verifiable': 16}
LONGMINO = {'midtraining': 6610, 'pdf.8192': 455, 'pdf.16384': 370, 'pdf.32768': 963, 'word_aggregation': 388, 'rex': 1220}


def get_config(arg: str = '') -> Experiment:
  rope = RopeSpec(theta=500_000.0)
  def layer(window):
    return LayerSpec(mixer=AttentionSpec(n_heads=32, n_kv_heads=32, head_dim=128, window=window, rope=rope, qk_norm='all'),
                     mlp=MlpSpec(d_ff=11_008), norm='post')
  return Experiment(
    name='olmo3_7b',
    pod='v5p:4x4x4',
    # The vocabulary is the tokenizer's 100,278, rounded up to a multiple of 128, as in OLMo-core.
    model=DecoderConfig(vocab_size=100_352, d_model=4096, n_layers=32,
                        pattern=(layer(4096), layer(4096), layer(4096), layer(None))),
    compute=ComputeConfig(remat='products'),
    data=DataConfig(corpus='corpora/dolma3', mixture={name: size // 10_000_000 for name, size in DOLMA3.items()},
                    seq_len=8192, batch_size=512, mask='row', source_tokens=DOLMA3, max_epochs={'*': 1.01}),
    microbatches=4,
    optim=OptimConfig(),
    loss=LossConfig(z_loss=1e-5),
    evals=EvalConfig(every_steps=1000, rows=512),
    checkpoint=CheckpointConfig(keep_every=10_000),
    stages=(
      Stage(name='pretrain', tokens=597_046 * STEP,
            lr=Schedule(peak_lr=3e-4, schedule='cosine', warmup_tokens=2000 * STEP, final_lr_frac=0.1,
                        horizon_tokens=5_000_000_000_000, end_lr=1.65e-4)),
      Stage(name='pretrain2', tokens=(1_413_814 - 597_046) * STEP,
            lr=Schedule(peak_lr=1.65e-4, final_lr_frac=0.1 / 0.55, decay_shape='half_cosine',
                        decay_tokens=7_000_000_000_000 - 597_046 * STEP, horizon_tokens=7_000_000_000_000 - 597_046 * STEP,
                        end_lr=3.93e-5)),
      Stage(name='mid', tokens=47_684 * STEP // 2, lr=Schedule(peak_lr=2.0712e-4, schedule='linear', end_lr=0.0),
            corpus='corpora/dolmino', mixture=DOLMINO, batch_size=256, microbatches=2),
      Stage(name='long', tokens=11_921 * STEP,
            lr=Schedule(peak_lr=2.0712e-4, schedule='linear', warmup_tokens=200 * STEP, end_lr=0.0),
            corpus='corpora/longmino', mixture=LONGMINO, seq_len=65_536, batch_size=64, mask='document',
            full=Stretch(scaling=YarnScaling(factor=8.0, original_length=8192)), mesh=MeshConfig(context=8), microbatches=8,
            evals=EvalConfig(every_steps=500, rows=64)),
    ),
  )
