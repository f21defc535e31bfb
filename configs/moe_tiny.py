"""A small mixture of experts on real documentation, on a plain CPU machine: 2 of 16 experts, 1.3M of 5.4M parameters active.

    python -m maxlm.train --config=configs/moe_tiny.py          # a softmax router, balanced by a loss
    python -m maxlm.train --config=configs/moe_tiny.py:bias     # DeepSeek's: sigmoid, a shared expert, balanced by a bias

Verified on 2026-11-22, 2 cores: held-out loss 5.29 and 5.19 nats after 440 steps; in the last 20 no expert is dead, and the
fullest has 1.4 to 1.7 times the mean load (with the bias up to 2.5). With --config.loss.balance=0 half of the experts of
layers 1 to 3 are dead after 140 steps, and the fullest has 7 times the mean (docs/LOG.md).
"""

import dataclasses

from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  experts = MoeSpec(n_experts=16, k=2, experts=MlpSpec(d_ff=192))
  if arg == 'bias':
    experts = dataclasses.replace(experts, score='sigmoid', select_bias=True, shared=MlpSpec(d_ff=192))
  elif arg:
    raise ValueError(f"configs/moe_tiny.py:{arg}: the argument is 'bias', or none")

  def layer(window):
    return LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=32, window=window, qk_norm='head'), mlp=experts)

  return Experiment(
    name=f'moe_tiny_{arg}' if arg else 'moe_tiny',
    model=DecoderConfig(vocab_size=4096, d_model=128, n_layers=4, tied_embeddings=True, pattern=(layer(64), layer(None))),
    data=DataConfig(corpus='corpora/quickstart', recipe='quickstart', seq_len=256, batch_size=8),
    optim=OptimConfig(peak_lr=4e-3, warmup_tokens=45_000, decay_tokens=450_000),
    evals=EvalConfig(every_steps=200, rows=64),
    tokens=900_000,
  )
