"""The smallest model with every kind of layer, for tests: seconds a run.

    python -m tests.make_corpus corpora/tiny && python -m maxlm.train --config=configs/tiny.py

Its first 20 losses are checked in (tests/golden/tiny_losses.json).
"""

from maxlm.checkpoint import CheckpointConfig
from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  plain = LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=16), mlp=MlpSpec(d_ff=128))
  sliding = LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=16, window=24, qk_norm='head', qkv_bias=True,
                                              out_bias=True, softcap=20.0, sinks=True),
                      mlp=MlpSpec(d_ff=96, activation='relu2', gated=False, bias=True), norm='sandwich')
  post = LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=4, head_dim=16, rope=None),
                   mlp=MlpSpec(d_ff=128, activation='gelu'), norm='post')
  return Experiment(
    name='tiny',
    model=DecoderConfig(vocab_size=512, d_model=64, n_layers=5, pattern=(sliding, plain, post), logits_softcap=30.0),
    data=DataConfig(corpus='corpora/tiny', mixture={'stories': 3, 'inventories': 1}, seq_len=64, batch_size=8),
    optim=OptimConfig(peak_lr=3e-3, schedule='cosine', warmup_tokens=2_048),
    loss=LossConfig(z_loss=1e-4),
    evals=EvalConfig(every_steps=25, rows=16),
    checkpoint=CheckpointConfig(every_steps=10),
    tokens=60 * 8 * 64,
  )
