"""Analytic parameters and FLOPs, and what the hardware could do, for MFU.

FLOPs of the model: 2 a multiply-add, backward = 2 x forward, no recomputation counted (Chowdhery et al. 2022,
arXiv 2204.02311, appendix B). Attention is counted by the pairs that the mask lets see each other, documents and
windows included, so packed rows and sliding layers are not over-reported.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.models.decoder import DecoderConfig, LayerSpec

# Dense bf16 FLOP/s of one JAX device, by the start of its device_kind. TPUs: cloud.google.com/tpu/docs system pages;
# a TPU7x chip shows as two devices. GPUs: NVIDIA data sheets, without sparsity.
PEAK_FLOPS = {
  'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5e': 197e12, 'TPU v5p': 459e12, 'TPU v5': 459e12,
  'TPU v6 lite': 918e12, 'TPU v6e': 918e12, 'TPU7x': 1153.5e12, 'TPU v7x': 1153.5e12,
  'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12, 'NVIDIA B200': 2250e12,
}


def matmul_params(model: DecoderConfig) -> int:
  """Weights that multiply a token's activations: all but norms, biases, the embedding's look-up and experts that a token is
  not sent to; the head counts."""
  ahead = model.mtp_depth * model.d_model * (2 * model.d_model + model.vocab_size)  # projections, and the head once more
  return ahead + model.d_model * model.vocab_size + sum(
    part.matmul_params(model.d_model) for layer in with_ahead(model) for part in layer.parts.values())


def with_ahead(model: DecoderConfig) -> list[LayerSpec]:
  """The layers, and those that predict further ahead."""
  return model.layers + model.mtp_depth * model.layers[-1:]


def visible_pairs(positions: np.ndarray, segment_ids: np.ndarray, window: int | None, causal: bool = True) -> int:
  """(query, key) pairs that the mask with that window admits within the documents of packed rows [B, T]."""
  seen = positions.astype(np.int64) + 1
  if window is not None:
    seen = np.minimum(seen, window)
  pairs, tokens = int(seen[segment_ids > 0].sum()), int((segment_ids > 0).sum())
  return pairs if causal else 2 * pairs - tokens  # each pair in both directions, but a token with itself once


def train_flops(model: DecoderConfig, batch: dict[str, np.ndarray]) -> float:
  """FLOPs of one training step on a host's batch of packed rows (numpy: positions, segment_ids). Padding is not work."""
  tokens = int((batch['segment_ids'] > 0).sum())
  pairs = functools.cache(lambda window: visible_pairs(batch['positions'], batch['segment_ids'], window,
                                                         model.mask_token is None))
  mixing = sum(layer.mixer.mixing_flops(tokens, pairs) for layer in with_ahead(model) if layer.mixer is not None)
  return 3.0 * (2 * matmul_params(model) * tokens + mixing)


def flops_per_token(model: DecoderConfig, seq_len: int) -> float:
  """FLOPs of a training token where every row is one document of that length."""
  row = {'positions': np.arange(seq_len)[None], 'segment_ids': np.ones((1, seq_len), np.int32)}
  return train_flops(model, row) / seq_len


def planned_flops_per_token(d_model: float, n_layers: float, seq_len: float) -> float:
  """The same before there is a model: M = 72 L d² + 12 L d s (DeepSeek LLM, arXiv 2401.02954, section 3.2), which is
  6 N with N = 12 L d², and attention as if every token saw every other. The head is not in it."""
  return 72 * n_layers * d_model**2 + 12 * n_layers * d_model * seq_len


def peak_flops(device: jax.Device) -> float | None:
  """FLOP/s the device could do: from the table in bf16; on CPU, measured on one fp32 product. None if unknown."""
  if device.platform == 'cpu':
    return measured_matmul_flops()
  kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
  return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


def measured_matmul_flops(size: int = 1024, repeats: int = 5) -> float:
  """FLOP/s of this process's default device on an fp32 [size, size] product, best of a few: about 0.2 s on 2 cores."""
  product = jax.jit(jnp.matmul)
  with jax.sharding.set_mesh(jax.make_mesh((1,), ('one',), devices=jax.devices()[:1])):
    a = jax.device_put(np.ones((size, size), np.float32), jax.P(None, None))
    product(a, a).block_until_ready()
    times = []
    for _ in range(repeats):
      start = time.perf_counter()
      product(a, a).block_until_ready()
      times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)
