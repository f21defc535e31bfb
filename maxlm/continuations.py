"""Log-probabilities of continuations: many requests in a row.

A request is two lists of tokens, a context and a continuation whose probability after it is asked for. Benchmarks ask
thousands of short ones. They are packed like training documents: rows are full, and of one length, for which XLA compiles
one program. An input that begins another one is not computed again (choices that differ in their last token are one
input), and the head is applied to the tokens asked for only.

B batch  T time  D width  V vocabulary  C tokens of each row whose logits are held at a time
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.pack import best_fit_decreasing
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig
from maxlm.ops.context import to_natural, to_zigzag
from maxlm.sharding import axis_size, spec

ROW = 2048  # tokens: rows that are shorter are more at a time, longer ones fewer
HELD_LOGITS = 1 << 26  # logits at a time: 256 MiB in fp32

Request = tuple[Sequence[int], Sequence[int]]  # context, continuation


class Answer(NamedTuple):
  log_prob: float  # natural logarithm of the probability of the continuation
  greedy: bool  # each of its tokens was the likeliest one


class Scorer:
  """Answers requests; what was compiled for one call serves the next ones.

  compute: resolved. max_length: tokens that the model is given at most. batch_size: rows at a time, of ROW tokens.
  """

  def __init__(self, model: DecoderConfig, compute: ComputeConfig, *, max_length: int, batch_size: int):
    if model.max_positions is not None and max_length > model.max_positions:
      raise ValueError(f'rows of {max_length} tokens are longer than the {model.max_positions} positions of this model')
    if model.mask_token is not None:
      raise ValueError('a model that was trained by masked diffusion has no probabilities of next tokens: tasks are for '
                       'models that have')
    self.model, self.max_length, self.batch_size = model, max_length, batch_size
    self._hidden = jax.jit(functools.partial(_hidden, model, compute))
    self._judge = jax.jit(functools.partial(_judge, model))

  def __call__(self, params: Decoder, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
    """Yields (index of a request, its answer) of all requests, batch by batch, in another order.

    Where context and continuation have more than max_length + 1 tokens, the first ones are left out (the last one is not
    given to the model). ValueError for a continuation of more than max_length tokens.
    """
    inputs, targets = [], []
    for context, continuation in requests:
      assert context and continuation, 'nothing precedes the first token of a context, and nothing is asked of no token'
      if len(continuation) > self.max_length:
        raise ValueError(f'a continuation of {len(continuation)} tokens is longer than what the model is given at most, '
                         f'{self.max_length} tokens: give a larger --max_length')
      tokens = np.array([*context, *continuation][-self.max_length - 1:], np.int32)
      inputs.append(tokens[:-1])
      targets.append(tokens[-len(continuation):])
    riders = shared(inputs)
    hosts = sorted(riders)
    lengths = [len(inputs[host]) for host in hosts]
    T, rows = packed(lengths, self.model.d_model) if hosts else (1, [])
    rows = [[hosts[i] for i in members] for members in rows]
    at_a_time = rows_at_a_time(self.batch_size, T)
    for start in range(0, len(rows), at_a_time):
      batch = rows[start:start + at_a_time]
      B = min(at_a_time, 1 << (len(batch) - 1).bit_length())  # of the last batch: one more program, not one for each number
      yield from self._answer(params, batch, B + -B % axis_size('B'), T, inputs, targets, riders)

  def _answer(self, params, rows, B, T, inputs, targets, riders):
    tokens_BT, segment_ids_BT, positions_BT = np.zeros((3, B, T), np.int32)
    asked = [([], [], []) for _ in range(B)]  # of each row: columns, targets, whose
    for row, hosts in enumerate(rows):
      start = 0
      for segment, host in enumerate(hosts, 1):
        stop = start + len(inputs[host])
        tokens_BT[row, start:stop] = inputs[host]
        segment_ids_BT[row, start:stop] = segment
        positions_BT[row, start:stop] = np.arange(stop - start)
        for request in riders[host]:
          end = start + len(inputs[request])
          columns, wanted, owners = asked[row]
          columns.extend(range(end - len(targets[request]), end))
          wanted.extend(targets[request])
          owners.extend([request] * len(targets[request]))
        start = stop
    x_BTD = self._hidden(params, *(_put(a, 'BT') for a in (tokens_BT, segment_ids_BT, positions_BT)))
    C = max(1, min(T, HELD_LOGITS // (B * self.model.vocab_size)))
    n_asked = max(len(columns) for columns, *_ in asked)
    columns, wanted, owners = np.full((3, B, n_asked + -n_asked % C), -1, np.int32)
    for row, lists in enumerate(asked):
      for array, values in zip((columns, wanted, owners), lists):
        array[row, :len(values)] = values
    parts = [self._judge(params, x_BTD, *(_put(a[:, i:i + C], 'BM') for a in (columns, wanted)))
             for i in range(0, n_asked, C)]
    log_probs, likeliest = (np.concatenate([np.asarray(part) for part in two], axis=1) for two in zip(*parts))
    requests, whose = np.unique(owners[owners >= 0], return_inverse=True)
    sums = np.bincount(whose, log_probs[owners >= 0])  # in fp64
    missed = np.bincount(whose, ~likeliest[owners >= 0])
    for request, log_prob, misses in zip(requests.tolist(), sums.tolist(), missed.tolist()):
      yield request, Answer(log_prob, misses == 0)


def shared(inputs: Sequence[np.ndarray]) -> dict[int, list[int]]:
  """{an input that begins no other one: [itself, and those it begins with]}, by index; of equal ones, one is the key."""
  keys = [tokens.astype('>i4').tobytes() for tokens in inputs]  # in the order of the tokens, for they are not negative
  riders, host = {}, None
  for i in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):  # what begins an input comes right after it
    if host is None or not keys[host].startswith(keys[i]):
      host = i
    riders.setdefault(host, []).append(i)
  return riders


def packed(lengths: Sequence[int], d_model: int) -> tuple[int, list[list[int]]]:
  """The length of rows, a multiple of 128 (for splash), and which inputs each row holds.

  A row of T tokens costs about 24 T D^2 FLOPs a layer for the weights and 2 T^2 D for attention, which looks past the ends
  of documents: long rows have less padding, short ones less attention.
  """
  longest, choices = max(lengths), {}
  for doublings in range(max(2, (ROW // longest).bit_length())):
    T = longest << doublings
    T += -T % 128
    rows = best_fit_decreasing(lengths, T)
    choices[len(rows) * T * (12 * d_model + T)] = T, rows
  return choices[min(choices)]


def rows_at_a_time(batch_size: int, length: int) -> int:
  """Rows of `length` tokens that have together no more than `batch_size` of ROW tokens; at least one."""
  return max(1, batch_size * ROW // length)


def _put(array: np.ndarray, dims: str) -> jax.Array:
  """An array that every host has, split over the devices of all."""
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec(dims))
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _hidden(config, compute, params, *rows_BT):
  x_BTD, _ = params.hidden(config, compute, *(to_zigzag(row_BT) for row_BT in rows_BT))
  return jax.reshard(to_natural(x_BTD), jax.P(*spec('B'), None, None))


def _judge(config, params, x_BTD, columns_BC, targets_BC):
  """The log-probability of each target after its column, fp32 [B, C], and whether it is the likeliest token, everywhere."""
  x_BCD = jnp.take_along_axis(x_BTD, columns_BC[..., None], axis=1)
  logits_BCV = jax.reshard(params.logits(config, x_BCD), jax.P(*spec('B'), None, None))
  log_probs_BC1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BCV), targets_BC[..., None], axis=-1)
  found = log_probs_BC1[..., 0], jnp.argmax(logits_BCV, axis=-1) == targets_BC
  return tuple(jax.reshard(a_BC, jax.P(None, None)) for a_BC in found)
