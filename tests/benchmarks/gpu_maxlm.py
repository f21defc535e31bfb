"""MaxLM's end of gpu.py: `train_step` as train.py runs it; or, with 'check', its kernels beside their references.

Started by gpu.py: python gpu_maxlm.py CASE_AS_JSON or python gpu_maxlm.py check
"""

import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import gpu_shapes as shapes
import jax
import jax.numpy as jnp
import numpy as np

from maxlm import flops
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.layers.norm import NormSpec
from maxlm.layers.rope import RopeSpec
from maxlm.losses import LossConfig
from maxlm.models.decoder import ComputeConfig, DecoderConfig, LayerSpec
from maxlm.ops.attention import attention
from maxlm.ops.grouped_matmul import grouped_matmul, grouped_matmul_reference
from maxlm.optim import OptimConfig
from maxlm.sharding import MeshConfig, make_mesh, spec
from maxlm.spikes import SpikeConfig
from maxlm.step import StepConfig, init_state, train_step

# -- kernels

ATTENTION = {  # name -> (tokens, heads, key-value heads, head dim, window, documents of a row)
  'causal': (512, 4, 4, 64, None, 1), 'grouped queries': (512, 8, 2, 128, None, 1), 'window': (1024, 4, 2, 128, 128, 1),
  'packed': (1024, 4, 2, 128, None, 7), 'packed, window': (1024, 4, 2, 64, 100, 20),
  'more documents than are packed': (512, 4, 2, 64, None, 60)}
GROUPS = {  # name -> rows of each group, of 1024
  'even': [128] * 8, 'uneven': [0, 700, 1, 0, 23, 300, 0, 0], 'all in one': [0, 0, 0, 1024, 0, 0, 0, 0],
  'rows past the groups': [0, 100, 0, 401, 33, 0, 0, 77]}


def check(tiny: bool) -> None:
  """Prints, for each case, by how much values and gradients are off, in parts of their largest. tiny: of one case each."""
  platform = jax.default_backend()
  dtype = jnp.float32 if platform == 'cpu' else jnp.bfloat16
  limit = 1e-5 if platform == 'cpu' else 2e-2
  kernel, grouped = ('cudnn', 'tokamax') if platform == 'gpu' else ('chunked', 'blocked')
  attentions, groups = ([*cases.items()][-1:] if tiny else [*cases.items()] for cases in (ATTENTION, GROUPS))
  errors = {f'{kernel}: {name}': attention_error(kernel, dtype, *case) for name, case in attentions}
  errors |= {f'{grouped}: {name}': grouped_error(grouped, dtype, sizes) for name, sizes in groups}
  shapes.report({'device': jax.devices()[0].device_kind, 'limit': limit, 'errors': errors})


def attention_error(kernel, dtype, T, N, K, H, window, n_documents) -> dict[str, float]:
  rng = np.random.default_rng(0)
  q, k, v, dout = (jnp.asarray(rng.normal(size=(2, T, heads, H)), dtype) for heads in (N, K, K, N))
  starts = np.sort(rng.choice(np.arange(1, T), (2, n_documents - 1)), axis=1)
  segments = 1 + (np.arange(T)[:, None] >= starts[:, None]).sum(axis=-1).astype(np.int32)
  if n_documents > 1:
    segments[:, T - T // 16:] = 0  # padding
  place = lambda x, dims: jax.device_put(x, spec(dims))

  def run(kernel, dtype):
    @jax.jit
    def values(q, k, v, dout, segments):
      out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, window=window, scale=H**-0.5, kernel=kernel), q, k, v)
      return dict(zip(('out', 'dq', 'dk', 'dv'), (out, *pull(dout))))

    args = (place(x.astype(dtype), dims) for x, dims in ((q, 'BTNH'), (k, 'BSKH'), (v, 'BSKH'), (dout, 'BTNH')))
    return values(*args, place(segments, 'BT'))

  with jax.default_matmul_precision('highest'):
    expected = run('reference', jnp.float32)
  return off_by(run(kernel, dtype), expected)


def grouped_error(kernel, dtype, sizes, P=1024, D=256, F=384) -> dict[str, float]:
  rng = np.random.default_rng(0)
  x, w, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((P, D), (len(sizes), D, F), (P, F)))
  used_P1, sizes = (np.arange(P) < sum(sizes))[:, None], np.array(sizes, np.int32)

  def values(run, x, w, dy):
    y, pull = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
    return dict(zip(('y', 'dx', 'dw'), (y, *pull(dy))))

  with jax.default_matmul_precision('highest'):
    expected = jax.jit(values, static_argnums=0)(grouped_matmul_reference, *(a.astype(jnp.float32) for a in (
      x, w, jnp.where(used_P1, dy, 0))))
  garbage = jnp.where(used_P1, x, jnp.nan), w, jnp.where(used_P1, dy, jnp.nan)
  return off_by(jax.jit(values, static_argnums=0)(functools.partial(grouped_matmul, kernel=kernel), *garbage), expected)


def off_by(actual, expected) -> dict[str, float]:
  """A result that is not a number is off by infinity."""
  errors = {name: float(jnp.max(jnp.abs(actual[name].astype(jnp.float32) - value)) / jnp.max(jnp.abs(value)))
            for name, value in expected.items()}
  return {name: error if np.isfinite(error) else float('inf') for name, error in errors.items()}


# -- training


def step_config(case: shapes.Case, platform: str) -> StepConfig:
  attention = AttentionSpec(n_heads=case.n_heads, n_kv_heads=case.n_kv_heads, head_dim=case.head_dim, qk_norm='head',
                            rope=RopeSpec(theta=shapes.ROPE_THETA))
  mlp = MlpSpec(d_ff=case.d_ff)
  if case.n_experts:
    mlp = MoeSpec(n_experts=case.n_experts, k=case.k, experts=mlp)
  model = DecoderConfig(vocab_size=case.vocab, d_model=case.d_model, n_layers=case.n_layers,
                        pattern=(LayerSpec(mixer=attention, mlp=mlp),), norm=NormSpec(eps=shapes.NORM_EPS))
  compute = ComputeConfig(unroll=case.n_layers, kernel=case.attention or None, experts_kernel=case.experts or None)
  return StepConfig(
    model=model, lora=None, compute=compute.resolve(platform, model),
    optim=OptimConfig(peak_lr=shapes.LEARNING_RATE, b1=shapes.BETA1, b2=shapes.BETA2, eps=shapes.EPS,
                      weight_decay=shapes.WEIGHT_DECAY, clip_norm=shapes.CLIP),
    loss=LossConfig(), spikes=SpikeConfig(), tokens_per_step=case.tokens, total_tokens=10**4 * case.tokens,
    microbatches=1, n_sources=1)


def batch_of(case: shapes.Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
  tokens = rng.integers(case.vocab, size=(case.rows, case.seq_len + 1), dtype=np.int32)
  shape, length = (case.rows, case.seq_len), case.seq_len // case.documents
  place = np.broadcast_to(np.arange(case.seq_len, dtype=np.int32), shape)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'segment_ids': 1 + place // length,
          'positions': place % length, 'loss_mask': np.ones(shape, np.int32), 'source': np.zeros(case.rows, np.int32)}


def train(case: shapes.Case) -> None:
  config, rng = step_config(case, jax.default_backend()), np.random.default_rng(0)
  state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
  run = jax.jit(functools.partial(train_step, config), donate_argnums=0)

  def steps(state, n):
    for _ in range(n):
      batch = {name: jax.device_put(a, spec('BT'[:a.ndim])) for name, a in batch_of(case, rng).items()}
      state, metrics = run(state, batch)
    return state, float(metrics['loss'])  # waits

  started = time.perf_counter()
  state, first_loss = steps(state, 1)
  first_seconds = time.perf_counter() - started
  state, _ = steps(state, case.warm_up - 1) if case.warm_up > 1 else (state, None)
  seconds = []
  for _ in range(case.spans):
    started = time.perf_counter()
    state, loss = steps(state, case.steps)
    seconds.append((time.perf_counter() - started) / case.steps)
  device = jax.devices()[0]
  memory = (device.memory_stats() or {}).get('peak_bytes_in_use')
  shapes.report({
    'versions': f'jax {jax.__version__}', 'device': device.device_kind, 'seconds': seconds,
    'first_step_seconds': first_seconds, 'first_loss': first_loss, 'loss': loss, 'peak_bytes': memory,
    'attention': config.compute.kernel, 'experts': config.compute.experts_kernel if case.n_experts else None,
    'flops': flops.train_flops(config.model, batch_of(case, rng)), 'peak_flops': flops.peak_flops(device),
    'parameters': sum(w.size for w in jax.tree.leaves(state.params))})


if __name__ == '__main__':
  with jax.set_mesh(make_mesh(MeshConfig())):
    if sys.argv[1].startswith('check'):
      check(tiny=sys.argv[1] == 'check-tiny')
    else:
      train(shapes.case_of_argv())
