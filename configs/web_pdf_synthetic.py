"""A small decoder on web pages, PDFs, scans and puzzles, in a mixture that is not their sizes.

    python -m maxlm.train --config=configs/web_pdf_synthetic.py
    python -m maxlm.train --config=configs/web_pdf_synthetic.py:small      # the small corpus of the tests, a minute

The corpus is built first if it is not there (docs/data.md says how long that takes). The log and metrics.jsonl have the loss
of each source. Figures of the last verified run are in docs/LOG.md.
"""

from maxlm.config import Experiment
from maxlm.data import DataConfig
from maxlm.evals import EvalConfig
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig


def get_config(arg: str = '') -> Experiment:
  if arg not in ('', 'small'):
    raise ValueError(f'web_pdf_synthetic.py:{arg}: after the colon say small, or nothing')
  small = arg == 'small'

  def layer(window):
    return LayerSpec(mixer=AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=64, window=window, qk_norm='head'),
                     mlp=MlpSpec(d_ff=768))
  return Experiment(
    name='web_pdf_synthetic',
    model=DecoderConfig(vocab_size=4096, d_model=256, n_layers=4, tied_embeddings=True,
                        pattern=(layer(128), layer(128), layer(128), layer(None))),
    data=DataConfig(corpus='corpora/web_pdf_synthetic' + '-small' * small, recipe='web_pdf_synthetic' + ':small' * small,
                    mixture={'web': 10, 'pdf': 6, 'scans': 1, 'synthetic': 3}, seq_len=256 if small else 512,
                    batch_size=8 if small else 4),
    optim=OptimConfig(peak_lr=4e-3, warmup_tokens=10_000 if small else 60_000, decay_tokens=40_000 if small else 600_000),
    evals=EvalConfig(every_steps=200, rows=64),
    tokens=100_000 if small else 1_200_000,
  )
