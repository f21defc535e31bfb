"""A small hybrid decoder on real documentation, on a plain CPU machine.

    python -m maxlm.train

Three sliding layers to one full layer. Figures of the last verified run are in docs/LOG.md.
"""

from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  def layer(window):
    return LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=64, window=window, qk_norm='head'),
                     mlp=MlpSpec(d_ff=768))
  return Experiment(
    name='quickstart',
    model=DecoderConfig(vocab_size=4096, d_model=256, n_layers=4, tied_embeddings=True,
                        pattern=(layer(64), layer(64), layer(64), layer(None))),
    data=DataConfig(corpus='corpora/quickstart', recipe='quickstart', seq_len=256, batch_size=8),
    optim=OptimConfig(peak_lr=4e-3, warmup_tokens=45_000, decay_tokens=450_000),
    evals=EvalConfig(every_steps=200, rows=64),
    tokens=900_000,
  )
