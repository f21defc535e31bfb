"""One training step of MaxText through its own set-up and train_step. Started by cpu.py.

Its defaults are made for a TPU; these are the ones that are fastest for it on a CPU: no remat, plain attention, fp32.
"""

import importlib.metadata
import tempfile

import jax
import worker
from flax import nnx
from flax.linen import partitioning
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

OPTIONS = dict(
  hardware='cpu', skip_jax_distributed_system=True, dataset_type='synthetic', enable_checkpointing=False,
  enable_tensorboard=False, steps=10**6, decoder_block='llama2', base_num_decoder_layers=worker.N_LAYERS,
  base_emb_dim=worker.D_MODEL, base_num_query_heads=worker.N_HEADS, base_num_kv_heads=worker.N_HEADS,
  head_dim=worker.HEAD_DIM, base_mlp_dim=worker.D_FF, vocab_size=worker.VOCAB, logits_via_embedding=False,
  per_device_batch_size=worker.BATCH, max_target_length=worker.SEQ_LEN, dtype='float32', weight_dtype='float32',
  attention='dot_product', remat_policy='none', learning_rate=worker.LEARNING_RATE, adam_b1=worker.BETA1,
  adam_b2=worker.BETA2, adam_eps=worker.EPS, adam_weight_decay=worker.WEIGHT_DECAY,
  gradient_clipping_threshold=worker.CLIP)


def setup():
  flags = [f'{name}={value}' for name, value in OPTIONS.items()]
  config, recorder = train.initialize(['train', 'run_name=benchmark', f'base_output_directory={tempfile.mkdtemp()}', *flags])
  _, _, shardings, _, mesh, _, _, loader, _, _, state = train_utils.setup_train_loop(config, recorder)
  graph, state = nnx.split(state)
  param_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
  train_step, _ = train_utils.jit_train_and_eval_step(config, graph, mesh, state, shardings, train.train_step,
                                                      train.eval_step, None, param_shardings)
  n_parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(state.model, nnx.Param, ...)[1]))

  def step() -> float:
    nonlocal state
    batch = loader.load_next_batch()
    with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
      state, metrics = train_step(state, batch)
    jax.block_until_ready(state)
    return float(metrics['scalar']['learning/loss'])

  return step, {'versions': f'maxtext {importlib.metadata.version("maxtext")}, jax {jax.__version__}',
                'parameters': n_parameters}


worker.serve(setup)
