"""Sampling from a decoder with a key-value cache.

B batch  T time  M cache length  V vocabulary.  Prompts are padded on the left, so that all rows write the same column;
time is whole on every device.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.layers.rows import Past
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, empty_caches
from maxlm.sharding import axis_size, spec


def generate(params: Decoder, model: DecoderConfig, compute: ComputeConfig, prompts: list[list[int]], *,
             eos: Sequence[int], max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
             seed: int = 0) -> list[list[int]]:
  """Continuations of prompts (token ids), each up to `max_tokens` or, not included, the first token of `eos`.

  temperature 0 takes the likeliest token. top_p samples from the smallest set of tokens with that much probability
  (Holtzman et al. 2020, arXiv 1904.09751). The same seed, prompts and devices give the same text.
  """
  if not prompts or not all(prompts):
    raise ValueError('generate: every prompt needs at least one token, such as the one that begins a document')
  if temperature < 0 or not 0 < top_p <= 1:
    raise ValueError(f'generate: temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]')
  if max_tokens < 1:
    raise ValueError(f'generate: max_tokens={max_tokens} must be at least 1')
  longest = max(len(prompt) for prompt in prompts)
  if model.max_positions is not None and longest + max_tokens > model.max_positions:
    raise ValueError(f'generate: {longest} tokens and {max_tokens} new ones are more than the model has positions '
                     f'({model.max_positions})')
  padded = prompts + [[0]] * (-len(prompts) % axis_size('B'))
  tokens_BT = np.zeros((len(padded), longest), np.int32)
  segment_ids_BT = np.zeros_like(tokens_BT)
  for row, prompt in enumerate(padded):
    tokens_BT[row, longest - len(prompt):] = prompt
    segment_ids_BT[row, longest - len(prompt):] = 1
  positions_BT = np.maximum(np.cumsum(segment_ids_BT, axis=1, dtype=np.int32) - 1, 0)
  sample = jax.jit(functools.partial(_generate, model, compute, max_tokens, temperature, top_p, tuple(eos)))
  rows = [jax.device_put(a, spec('BM')) for a in (tokens_BT, segment_ids_BT, positions_BT)]
  out_BT = np.asarray(sample(params, *rows, jax.random.key(seed)))
  return [cut(row.tolist(), eos) for row in out_BT[:len(prompts)]]


def cut(tokens: list[int], eos: Sequence[int]) -> list[int]:
  """Tokens before the first that ends a document."""
  return tokens[:next((i for i, token in enumerate(tokens) if token in eos), len(tokens))]


def _generate(model, compute, max_tokens, temperature, top_p, eos, params, tokens_BT, segment_ids_BT,
              positions_BT, key):
  B, T = tokens_BT.shape
  ids_BM = jnp.concatenate([segment_ids_BT, jnp.ones((B, max_tokens), jnp.int32, out_sharding=spec('BM'))], axis=1)
  caches = empty_caches(model, compute, B, T + max_tokens)
  hidden_BTD, caches = params.extend(model, compute, tokens_BT, segment_ids_BT, positions_BT, caches, Past(ids_BM, 0))

  def pick(hidden_BTD, i):
    logits_BV = params.logits(model, hidden_BTD[:, -1:])[:, 0]
    return draw(jax.reshard(logits_BV, jax.P(*spec('B'), None)), temperature, top_p, jax.random.fold_in(key, i))

  def body(carry):
    i, token_B, caches, out_BT, done_B = carry
    out_BT = jax.lax.dynamic_update_slice_in_dim(out_BT, token_B[:, None], i, 1)
    for end in eos:
      done_B |= token_B == end
    ones_B1 = jnp.ones((B, 1), jnp.int32, out_sharding=spec('BM'))
    hidden_BTD, caches = params.extend(model, compute, token_B[:, None], ones_B1, positions_BT[:, -1:] + 1 + i, caches,
                                       Past(ids_BM, T + i))
    return i + 1, pick(hidden_BTD, i + 1), caches, out_BT, done_B

  out_BT = jnp.zeros((B, max_tokens), jnp.int32, out_sharding=spec('BM'))
  done_B = jnp.zeros((B,), bool, out_sharding=spec('B'))
  carry = (0, pick(hidden_BTD, 0), caches, out_BT, done_B)
  return jax.lax.while_loop(lambda c: (c[0] < max_tokens) & ~jnp.all(c[4]), body, carry)[3]


def draw(logits_BV: jax.Array, temperature: float, top_p: float, key: jax.Array) -> jax.Array:
  """One token a row, int32 [B]."""
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / temperature
  if top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
  gumbel_BV = jax.random.gumbel(key, logits_BV.shape, jnp.float32, out_sharding=jax.typeof(logits_BV).sharding.spec)
  return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)
