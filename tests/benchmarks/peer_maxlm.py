"""One training step of MaxLM, as train.py runs it. Started by cpu.py."""

import functools

import jax
import numpy as np
import worker

from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig
from maxlm.sharding import MeshConfig, make_mesh, spec
from maxlm.spikes import SpikeConfig
from maxlm.step import StepConfig, init_state, train_step

TOKENS = worker.BATCH * worker.SEQ_LEN
CONFIG = StepConfig(
  lora=None,
  model=DecoderConfig(vocab_size=worker.VOCAB, d_model=worker.D_MODEL, n_layers=worker.N_LAYERS, pattern=(LayerSpec(
    mixer=AttentionSpec(n_heads=worker.N_HEADS, n_kv_heads=worker.N_HEADS, head_dim=worker.HEAD_DIM),
    mlp=MlpSpec(d_ff=worker.D_FF)),)),
  compute=ComputeConfig(unroll=worker.N_LAYERS).resolve('cpu'),
  optim=OptimConfig(peak_lr=worker.LEARNING_RATE, b1=worker.BETA1, b2=worker.BETA2, eps=worker.EPS,
                    weight_decay=worker.WEIGHT_DECAY, clip_norm=worker.CLIP),
  loss=LossConfig(), spikes=SpikeConfig(), tokens_per_step=TOKENS, total_tokens=10**4 * TOKENS, microbatches=1, n_sources=1)


def setup():
  jax.set_mesh(make_mesh(MeshConfig()))
  state = jax.jit(functools.partial(init_state, CONFIG))(jax.random.key(0))
  run = jax.jit(functools.partial(train_step, CONFIG), donate_argnums=0)
  rng = np.random.default_rng(0)
  shape = (worker.BATCH, worker.SEQ_LEN)

  def step() -> float:
    nonlocal state
    tokens = rng.integers(worker.VOCAB, size=(worker.BATCH, worker.SEQ_LEN + 1), dtype=np.int32)
    batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': np.ones(shape, np.int32),
             'positions': np.broadcast_to(np.arange(worker.SEQ_LEN, dtype=np.int32), shape),
             'loss_mask': np.ones(shape, np.int32), 'source': np.zeros(worker.BATCH, np.int32)}
    state, metrics = run(state, {name: jax.device_put(a, spec('BT'[:a.ndim])) for name, a in batch.items()})
    jax.block_until_ready(state)
    return float(metrics['loss'])

  return step, {'versions': f'jax {jax.__version__}', 'parameters': sum(w.size for w in jax.tree.leaves(state.params))}


worker.serve(setup)
