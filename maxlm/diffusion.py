"""Masked diffusion: a model that fills in masked tokens, from any that are there.

The objective is that of LLaDA (Nie et al. 2025, arXiv 2502.09992) and MDLM (Sahoo et al. 2024, arXiv 2406.07524), in the
form that needs no smallest noise: of a document's L tokens, l are masked, l uniform in 1 … L, all choices of l tokens
equally likely, and the loss is L / l times the sum of their nats. Its expectation is the integral over t in (0, 1] of the
nats of tokens masked with probability t, over t (LLaDA, equations 3 and 14), and is an upper bound on the document's nats:
those of writing it in a random order, averaged over orders (Hoogeboom et al. 2022, arXiv 2110.02037, section 3).

What is filled in are the *targets* of a packed row, each where the next-token objective predicts it. So both objectives
are over the same tokens and bytes, a conversation's questions are never masked, and what a row opens with is not seen.
The length of a document is: the bound is of its tokens given how many they are.

B rows  T positions of a row  M positions, whole on every device  C positions of a block  V vocabulary
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.decode import cut, nucleus
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mla import MlaSpec
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.ops.attention import MASKED
from maxlm.sharding import axis_size, spec

DRAWS = 4  # masks that a held-out row is scored with
GOLDEN = 0.6180339887  # multiples of it, less their whole parts, are spread evenly however many they are


def check(model: DecoderConfig) -> None:
  """ValueError for a model with a mask token that cannot be trained to fill it in."""
  if model.mask_token is None:
    return
  if not 0 <= model.mask_token < model.vocab_size:
    raise ValueError(f'model.mask_token={model.mask_token} is none of the {model.vocab_size} tokens of the model: '
                     f'take one that no text has, or raise model.vocab_size')
  if model.mtp_depth:
    raise ValueError(f'model.mtp_depth={model.mtp_depth} predicts tokens after the next, and a model with mask_token has no '
                     'next one: set it to 0')
  for i, layer in enumerate(model.pattern):
    if not isinstance(layer.mixer, AttentionSpec | MlaSpec | None):
      raise ValueError(f'model.pattern[{i}].mixer is {type(layer.mixer).__name__}, which reads from left to right, and a '
                       'model with mask_token sees both ways: use AttentionSpec or MlaSpec, or leave mask_token None')


def check_corpus(model: DecoderConfig, token_bytes: np.ndarray, ends: Sequence[int]) -> None:
  """ValueError if texts may hold the mask token. token_bytes: of each token of the corpus's tokenizer, 0 of special ones;
  ends: the tokens that begin and end documents."""
  mask, known = model.mask_token, len(token_bytes)
  if mask is not None and mask < known and (token_bytes[mask] > 0 or mask in ends):
    raise ValueError(f'model.mask_token={mask} is a token of the corpus: set --config.model.mask_token to {known}, or to a '
                     f'special token that is not used, and --config.model.vocab_size to {known + 1} or more')


# -- training and evaluation


def corrupted(mask_token: int, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
  """The batch with some targets masked: tokens are those of the text, the masked ones as the mask; and loss_weights, fp32
  [B, T], L / l for those, 0 for the others.

  A document of row b, the s-th in it, has l = ceil(L q), q uniform in (0, 1]: one random number for the whole batch plus
  b / B plus GOLDEN s, less the whole part. So the shares of a batch's documents are even, and the loss varies less (MDLM,
  section 5.1). A function of key, rows and their order: on any mesh, in any microbatches, the same tokens are masked.
  """
  shift_key, score_key = jax.random.split(key)
  row_B1 = jax.lax.broadcasted_iota(jnp.float32, (len(batch['targets']), 1), 0, out_sharding=spec('BM'))
  shift_B1 = jax.random.uniform(shift_key) + row_B1 / len(batch['targets'])
  score_BM = jax.random.uniform(score_key, batch['targets'].shape, out_sharding=spec('BM'))
  return _masked(mask_token, batch, shift_B1, score_BM)


def draws(mask_token: int, batch: dict[str, jax.Array], n: int) -> dict[str, jax.Array]:
  """[n, …] of each field: the batch `corrupted` n times, always in the same ways; in a row, q is even over the n.

  What is masked in a row is a function of its tokens alone, whatever the batch that it is in.
  """
  targets_BM = jax.reshard(batch['targets'], spec('BM')).astype(jnp.uint32)
  place_M = jnp.arange(1, targets_BM.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(2654435761)
  name_B = jnp.sum((targets_BM + 1) * (place_M | 1), axis=1, dtype=jnp.uint32)

  def draw(i):
    def of_row(name):
      key = jax.random.fold_in(jax.random.key(0), name)
      return jax.random.uniform(key, (1,)) + i / n, jax.random.uniform(jax.random.fold_in(key, i), targets_BM.shape[1:])

    return _masked(mask_token, batch, *jax.vmap(of_row)(name_B))

  return jax.lax.map(draw, jnp.arange(n))


def _masked(mask_token, batch, shift_B1, score_BM):
  rows = [jax.reshard(batch[name], spec('BM')) for name in ('segment_ids', 'loss_mask')]
  weights_BM = jax.shard_map(_weights, in_specs=spec('BM'), out_specs=spec('BM'))(*rows, shift_B1, score_BM)
  weights_BT = jax.reshard(weights_BM, spec('BT'))
  return {**batch, 'tokens': jnp.where(weights_BT > 0, mask_token, batch['targets']), 'loss_weights': weights_BT}


def _weights(segment_ids_BM, counts_BM, shift_B1, score_BM):
  """L / l where a token is masked, else 0: the l of lowest score of the document's L tokens that count."""
  B, M = score_BM.shape
  place_BM = jax.lax.broadcasted_iota(jnp.int32, (B, M), 1)
  starts_BM = jnp.pad(segment_ids_BM[:, 1:] != segment_ids_BM[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  document_BM = jnp.cumsum(starts_BM, axis=1)
  first_BM = jax.lax.cummax(jnp.where(starts_BM, place_BM, 0), axis=1)
  stops_BM = jnp.pad(starts_BM[:, 1:], ((0, 0), (0, 1)), constant_values=True)
  last_BM = jax.lax.cummin(jnp.where(stops_BM, place_BM, M), axis=1, reverse=True)
  so_far_BM = jnp.cumsum(counts_BM, axis=1)
  at = functools.partial(jnp.take_along_axis, axis=1)
  L_BM = at(so_far_BM, last_BM) - at(so_far_BM - counts_BM, first_BM)
  # A document's tokens stay together when sorted by document and score, so a rank is the place less the document's first.
  score_BM = jnp.where(counts_BM > 0, score_BM, 2.0)
  *_, sorted_BM = jax.lax.sort((document_BM, score_BM, place_BM), dimension=1, num_keys=2)
  _, rank_BM = jax.lax.sort((sorted_BM, place_BM - first_BM), dimension=1, num_keys=1)
  q_BM = shift_B1 + GOLDEN * document_BM
  l_BM = 1 + jnp.minimum(jnp.floor((q_BM - jnp.floor(q_BM)) * L_BM).astype(jnp.int32), L_BM - 1)
  return jnp.where((counts_BM > 0) & (rank_BM < l_BM), L_BM / l_BM, 0.0)


# -- sampling


@dataclasses.dataclass(kw_only=True, slots=True)
class Sampling:
  """steps: passes of the model (None: one a token; fewer fill in several tokens at a time, as if these were independent).
  block: positions that are filled before those after them (None: all are one block); LLaDA, section 2.4. order: of the
  positions of a block: 'confidence', first those whose token the model is surest of (LLaDA's low-confidence remasking), or
  'random', which with a step a token and temperature 1 samples from the distribution that the bound is of."""

  steps: int | None = None
  block: int | None = None
  order: Literal['confidence', 'random'] = 'confidence'
  temperature: float = 1.0
  top_p: float = 1.0

  def check(self, max_tokens: int) -> tuple[int, int]:
    """(positions of a block, steps of a block). ValueError for what does not divide."""
    if max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f'sample: max_tokens={max_tokens} must be at least 1, temperature={self.temperature} at least 0 and '
                       f'top_p={self.top_p} in (0, 1]')
    if self.order not in ('confidence', 'random'):
      raise ValueError(f"sample: order={self.order!r} is neither 'confidence' nor 'random'")
    block = self.block or max_tokens
    if not 0 < block <= max_tokens or max_tokens % block:
      raise ValueError(f'sample: {max_tokens} tokens do not divide into blocks of {block}: choose a block that divides them')
    n_blocks = max_tokens // block
    steps = max_tokens if self.steps is None else self.steps
    if not n_blocks <= steps <= max_tokens or steps % n_blocks:
      raise ValueError(f'sample: {steps} steps for {max_tokens} tokens in {n_blocks} blocks: choose a multiple of the '
                       'blocks, and at most one step a token')
    return block, steps // n_blocks


def sample(params: Decoder, model: DecoderConfig, compute: ComputeConfig, prompts: list[list[int]], *, eos: Sequence[int],
           max_tokens: int, how: Sampling, seed: int = 0) -> list[list[int]]:
  """Continuations of prompts (token ids) to documents of `max_tokens` more, each up to, not included, the first token of
  `eos`. The first token of a prompt, which begins a document, is left out: the model has not seen such.

  The model knows how long a document is: it was trained on whole ones, and mostly ends them where they end. All positions
  are computed anew in each step; there is no cache. ValueError for what does not fit the model. Source: LLaDA, section 2.4
  and appendix A.
  """
  block, steps = how.check(max_tokens)
  if model.mask_token is None:
    raise ValueError('sample: this model predicts next tokens; it has no mask_token to fill in')
  if axis_size('T') > 1:
    raise ValueError('sample: this mesh splits rows: use mesh.with_whole_rows')
  prompts = [prompt[1:] for prompt in prompts]
  longest = max(map(len, prompts)) + max_tokens
  if model.max_positions is not None and longest > model.max_positions:
    raise ValueError(f'sample: {longest} tokens are more than the {model.max_positions} positions of the model')
  rows = len(prompts) + -len(prompts) % axis_size('B')
  tokens_BM, segment_ids_BM = np.zeros((2, rows, longest + -longest % 128), np.int32)
  starts_B = np.zeros(rows, np.int32)
  for row, prompt in enumerate(prompts):
    stop = len(prompt) + max_tokens
    tokens_BM[row, :stop] = [*prompt, *[model.mask_token] * max_tokens]
    segment_ids_BM[row, :stop], starts_B[row] = 1, len(prompt)
  place = lambda a: jax.device_put(a, spec('BM'[:a.ndim]))
  run = jax.jit(functools.partial(_fill, model, compute, how, block, steps, max_tokens // block))
  out_BM = np.asarray(jax.reshard(run(params, *map(place, (tokens_BM, segment_ids_BM, starts_B)), jax.random.key(seed)),
                                  jax.P()))
  written = [out_BM[row, len(prompt):len(prompt) + max_tokens].tolist() for row, prompt in enumerate(prompts)]
  return [cut(ids, eos) for ids in written]


def _fill(model, compute, how, block, steps, n_blocks, params, tokens_BM, segment_ids_BM, starts_B, key):
  whole = jax.P(*spec('B'), None)
  positions_BM = jax.lax.broadcasted_iota(jnp.int32, tokens_BM.shape, 1, out_sharding=spec('BM'))

  def step(i, tokens_BM):
    key_i = jax.random.fold_in(key, i)
    first_B = starts_B + (i // steps) * block
    columns_BC = jax.reshard(first_B[:, None] + jnp.arange(block), whole)
    rows = [jax.reshard(a, spec('BT')) for a in (tokens_BM, segment_ids_BM, positions_BM)]
    x_BMD = jax.reshard(params.hidden(model, compute, *rows)[0], jax.P(*whole, None))
    x_BCD = jnp.take_along_axis(x_BMD, columns_BC[..., None], axis=1)
    logits_BCV = jax.reshard(params.logits(model, x_BCD), jax.P(*whole, None))
    logits_BCV = jnp.where(jnp.arange(model.vocab_size) == model.mask_token, MASKED, logits_BCV)
    drawn_BCV = logits_BCV
    if how.temperature:
      gumbel_BCV = jax.random.gumbel(key_i, logits_BCV.shape, out_sharding=jax.P(*whole, None))
      drawn_BCV = nucleus(logits_BCV / how.temperature, how.top_p) + gumbel_BCV
    picked_BC = jnp.argmax(drawn_BCV, axis=-1).astype(jnp.int32)
    old_BC = jnp.take_along_axis(tokens_BM, columns_BC, axis=1)
    if how.order == 'random':
      sure_BC = jax.random.uniform(jax.random.fold_in(key_i, 1), picked_BC.shape, out_sharding=whole)
    else:
      sure_BC = jnp.take_along_axis(jax.nn.softmax(logits_BCV), picked_BC[..., None], axis=-1)[..., 0]
    sure_BC = jnp.where(old_BC == model.mask_token, sure_BC, -1.0)
    rank_BC = jnp.argsort(jnp.argsort(-sure_BC, axis=1), axis=1)
    count = block // steps + (i % steps < block % steps)
    new_BC = jax.reshard(jnp.where((rank_BC < count) & (old_BC == model.mask_token), picked_BC, old_BC), whole)
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))(tokens_BM, new_BC, first_B, 0)

  return jax.lax.fori_loop(0, n_blocks * steps, step, tokens_BM)
