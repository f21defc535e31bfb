"""Log-probabilities of given tokens: `python -m maxlm.score --checkpoint=WORKDIR --tokens=IN.npy --out=OUT.npz [--logits]`.

IN.npy: integers [rows, T], each row one document from its first token on (begin it with the end-of-text token to score the
first word too); negative numbers at the end of a row are padding. OUT.npz: `log_probs` fp32 [rows, T], the natural logarithm
of each token's probability after those before it, NaN for the first and for padding; with --logits also `logits` fp32
[rows, T, V], those that follow each token. Everything is computed in fp32.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import flags
from maxlm.load import Model, load
from maxlm.ops.xent import cross_entropy
from maxlm.sharding import axis_size, spec

CHECKPOINT = flags.DEFINE_string('checkpoint', '', 'WORKDIR of a run (its newest checkpoint) or WORKDIR@STEP')
TOKENS = flags.DEFINE_string('tokens', '', 'a .npy file of integers [rows, T]; negative: padding at the end of a row')
OUT = flags.DEFINE_string('out', '', 'the .npz file to write')
LOGITS = flags.DEFINE_bool('logits', False, 'write the logits too: rows x T x vocabulary x 4 bytes')
BATCH = flags.DEFINE_integer('batch_size', 8, 'rows at a time')


def main() -> int:
  for flag in (CHECKPOINT, TOKENS, OUT):
    if not flag.value:
      raise ValueError(f'give --{flag.name}: {flag.help}')
  if BATCH.value < 1:
    raise ValueError(f'--batch_size={BATCH.value} must be at least 1')
  tokens = read_tokens(TOKENS.value)
  if not Path(OUT.value).absolute().parent.is_dir():
    raise FileNotFoundError(f'--out={OUT.value}: its directory does not exist')
  jax.config.update('jax_default_matmul_precision', 'highest')
  model = load(CHECKPOINT.value, dtype='float32')
  model.check_next_token()
  if tokens.max(initial=0) >= model.model.vocab_size:
    raise ValueError(f'{TOKENS.value} has token {tokens.max()}, and the model knows 0 … {model.model.vocab_size - 1}')
  model.check_length(tokens.shape[1])
  out = score(model, tokens, batch_size=BATCH.value, logits=LOGITS.value)
  with open(OUT.value, 'wb') as file:
    np.savez(file, **out)
  scored = np.isfinite(out['log_probs'])
  print(f'{OUT.value}: {scored.sum():,} tokens of {len(tokens):,} rows, {-out["log_probs"][scored].mean():.4f} nats a token')
  return 0


def read_tokens(path: str) -> np.ndarray:
  """int32 [rows, T] of a .npy file, padding as -1. ValueError unless it is integers, padded at the ends of rows."""
  tokens = np.load(path)
  if getattr(tokens, 'ndim', 0) != 2 or not np.issubdtype(tokens.dtype, np.integer) or tokens.shape[1] < 2:
    raise ValueError(f'{path}: must be one array of integers [rows, T] with T >= 2')
  real = tokens >= 0
  torn = (real[:, 1:] & ~real[:, :-1]).any(axis=1)
  if torn.any():
    raise ValueError(f'{path}: row {int(torn.argmax())} has padding before a token: pad at the end only')
  return np.where(real, tokens, -1).astype(np.int32)


def score(model: Model, tokens: np.ndarray, *, batch_size: int, logits: bool = False) -> dict[str, np.ndarray]:
  """{'log_probs': fp32 [rows, T], and 'logits': fp32 [rows, T, V] if asked for} of int32 tokens [rows, T], -1 in padding."""
  n_rows, length = tokens.shape
  batch_size += -batch_size % axis_size('B')
  padded = np.pad(tokens, ((0, -n_rows % batch_size), (0, -length % 128)), constant_values=-1)
  run = jax.jit(functools.partial(_score, model.model, model.compute, logits))
  parts = [run(model.params, jax.device_put(padded[i:i + batch_size], spec('BT')))
           for i in range(0, len(padded), batch_size)]
  names = ('log_probs', 'logits')[:1 + logits]
  return {name: np.concatenate([np.asarray(part[name]) for part in parts])[:n_rows, :length] for name in names}


def _score(config, compute, logits, params, tokens_BT):
  B, T = tokens_BT.shape
  positions_BT = jax.lax.broadcasted_iota(jnp.int32, (B, T), 1, out_sharding=spec('BT')) * (tokens_BT >= 0)
  x_BTD, _ = params.hidden(config, compute, jnp.maximum(tokens_BT, 0), (tokens_BT >= 0).astype(jnp.int32), positions_BT)
  next_BT = jnp.roll(jax.reshard(tokens_BT, spec('BM')), -1, axis=1)  # M: time is whole
  scored_BT = jax.reshard((next_BT >= 0) & (jnp.arange(T) < T - 1), spec('BT'))
  next_BT = jax.reshard(jnp.maximum(next_BT, 0), spec('BT'))
  _, nll_BT = cross_entropy(x_BTD, params.head_DV(), next_BT, scored_BT.astype(jnp.float32), softcap=config.logits_softcap)
  after_BT = jax.reshard(jnp.where(scored_BT, -nll_BT, jnp.nan), spec('BM'))
  out = {'log_probs': jnp.concatenate([jnp.full_like(after_BT[:, :1], jnp.nan), after_BT[:, :-1]], axis=1)}
  return {**out, 'logits': params.logits(config, x_BTD)} if logits else out


if __name__ == '__main__':
  flags.run(main)
