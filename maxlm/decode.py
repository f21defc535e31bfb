"""Sampling from a decoder with a key-value cache.

B batch  T time  M cache length  V vocabulary.  Prompts are padded on the left, so that all rows write the same column;
time is whole on every device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.layers.rows import Past
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, empty_caches
from maxlm.sharding import axis_size, spec

ASK_EVERY = 32  # tokens between two looks at what is written


def generate(params: Decoder, model: DecoderConfig, compute: ComputeConfig, prompts: list[list[int]], *,
             eos: Sequence[int], max_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
             seed: int = 0) -> list[list[int]]:
  """Continuations of prompts (token ids), each up to `max_tokens` or, not included, the first token of `eos`.

  temperature 0 takes the likeliest token. top_p samples from the smallest set of tokens with that much probability
  (Holtzman et al. 2020, arXiv 1904.09751). The same seed, prompts and devices give the same text.
  """
  generator = Generator(model, compute, eos=eos, temperature=temperature, top_p=top_p)
  return generator(params, prompts, max_tokens=max_tokens, seed=seed)


class Generator:
  """`generate` for many batches of prompts: what was compiled for one serves all that have its shape."""

  def __init__(self, model: DecoderConfig, compute: ComputeConfig, *, eos: Sequence[int], temperature: float = 1.0,
               top_p: float = 1.0):
    if temperature < 0 or not 0 < top_p <= 1:
      raise ValueError(f'generate: temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]')
    self.max_positions, self.eos = model.max_positions, tuple(eos)
    pick = functools.partial(_pick, model, temperature, top_p)
    self._read = jax.jit(functools.partial(_read, model, compute, pick), static_argnames='max_tokens')
    self._write = jax.jit(functools.partial(_write, model, compute, pick, self.eos), donate_argnames='state')

  def __call__(self, params: Decoder, prompts: list[list[int]], *, max_tokens: int, seed: int = 0, columns: int = 0,
               enough: Callable[[list[int]], bool] | None = None) -> list[list[int]]:
    """As `generate`. columns: prompts are padded to at least so many. enough: says of a continuation so far whether it
    needs no more; it is asked every ASK_EVERY tokens, and what is returned may be longer than it needs to be."""
    if not prompts or not all(prompts):
      raise ValueError('generate: every prompt needs at least one token; begin a document with the token that begins '
                       'documents')
    if max_tokens < 1:
      raise ValueError(f'generate: max_tokens={max_tokens} must be at least 1')
    if axis_size('T') > 1:
      raise ValueError('generate: tokens come one at a time, and this mesh splits rows: use mesh.with_whole_rows')
    longest = max(len(prompt) for prompt in prompts)
    if self.max_positions is not None and longest + max_tokens > self.max_positions:
      raise ValueError(f'generate: {longest} tokens and {max_tokens} new ones are more than the {self.max_positions} '
                       'positions of the model')
    padded = prompts + [[0]] * (-len(prompts) % axis_size('B'))
    tokens_BT, segment_ids_BT = np.zeros((2, len(padded), max(longest, columns)), np.int32)
    for row, prompt in enumerate(padded):
      tokens_BT[row, -len(prompt):] = prompt
      segment_ids_BT[row, -len(prompt):] = 1
    positions_BT = np.maximum(np.cumsum(segment_ids_BT, axis=1, dtype=np.int32) - 1, 0)
    done_B, key = np.arange(len(padded)) >= len(prompts), jax.random.key(seed)
    rows = [jax.device_put(a, spec('BM'[:a.ndim])) for a in (tokens_BT, segment_ids_BT, positions_BT, done_B)]
    state = self._read(params, *rows, key, max_tokens=max_tokens)
    for stop in [*range(ASK_EVERY, max_tokens, ASK_EVERY), max_tokens] if enough else [max_tokens]:
      state = self._write(params, state, key, stop)
      out = np.asarray(jax.reshard(state.out_BT, jax.P()))  # the rows of other hosts too
      written = [cut(row[:int(state.i)], self.eos) for row in out.tolist()]
      if enough:
        done_B |= [len(row) < state.i or enough(row) for row in written]
        if done_B.all():
          break
        state = state._replace(done_B=jax.device_put(done_B, spec('B')))
    return written[:len(prompts)]


def cut(tokens: list[int], eos: Sequence[int]) -> list[int]:
  """Tokens before the first that ends a document."""
  return tokens[:next((i for i, token in enumerate(tokens) if token in eos), len(tokens))]


class State(NamedTuple):
  """What is known between two tokens."""

  i: jax.Array  # how many are written
  token_B: jax.Array  # the next ones
  out_BT: jax.Array  # those before them
  done_B: jax.Array  # rows that need no more
  caches: list
  ids_BM: jax.Array  # segments of the caches' columns
  first_B1: jax.Array  # position of the first token that is written


def _read(model, compute, pick, params, tokens_BT, segment_ids_BT, positions_BT, done_B, key, max_tokens):
  """The caches of the prompts, and the first token."""
  B, T = tokens_BT.shape
  ids_BM = jnp.concatenate([segment_ids_BT, jnp.ones((B, max_tokens), jnp.int32, out_sharding=spec('BM'))], axis=1)
  caches = empty_caches(model, compute, B, T + max_tokens)
  hidden_BTD, caches = params.extend(model, compute, tokens_BT, segment_ids_BT, positions_BT, caches, Past(ids_BM, 0))
  out_BT = jnp.zeros((B, max_tokens), jnp.int32, out_sharding=spec('BM'))
  return State(jnp.int32(0), pick(params, hidden_BTD, key, 0), out_BT, done_B, caches, ids_BM, positions_BT[:, -1:] + 1)


def _write(model, compute, pick, eos, params, state, key, stop):
  """Writes up to `stop` tokens in all, fewer if all rows are done before."""
  start = state.ids_BM.shape[1] - state.out_BT.shape[1]
  ones_B1 = jnp.ones((len(state.token_B), 1), jnp.int32, out_sharding=spec('BM'))

  def body(state):
    i, token_B1, done_B = state.i, state.token_B[:, None], state.done_B
    for end in eos:
      done_B |= state.token_B == end
    hidden_BTD, caches = params.extend(model, compute, token_B1, ones_B1, state.first_B1 + i, state.caches,
                                       Past(state.ids_BM, start + i))
    return state._replace(i=i + 1, token_B=pick(params, hidden_BTD, key, i + 1), caches=caches, done_B=done_B,
                          out_BT=jax.lax.dynamic_update_slice_in_dim(state.out_BT, token_B1, i, 1))

  return jax.lax.while_loop(lambda state: (state.i < stop) & ~jnp.all(state.done_B), body, state)


def _pick(model, temperature, top_p, params, hidden_BTD, key, i):
  logits_BV = params.logits(model, hidden_BTD[:, -1:])[:, 0]
  return draw(jax.reshard(logits_BV, jax.P(*spec('B'), None)), temperature, top_p, jax.random.fold_in(key, i))


def draw(logits_BV: jax.Array, temperature: float, top_p: float, key: jax.Array) -> jax.Array:
  """One token a row, int32 [B]."""
  if temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = nucleus(logits_BV / temperature, top_p)
  gumbel_BV = jax.random.gumbel(key, logits_BV.shape, jnp.float32, out_sharding=jax.typeof(logits_BV).sharding.spec)
  return jnp.argmax(logits_BV + gumbel_BV, axis=-1).astype(jnp.int32)


def nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
  """The logits, -inf for tokens outside the smallest set with so much probability. There may be more dims before V."""
  if top_p == 1:
    return logits_BV
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
  least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
