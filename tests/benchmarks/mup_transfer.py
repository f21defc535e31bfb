"""Does the best learning rate stay where it is when a model becomes wider? Standard parametrisation beside µP.

    python tests/benchmarks/mup_transfer.py --corpus=corpora/quickstart --out=runs/mup_transfer.jsonl

Decoders of two layers learn the bytes of the corpus's text for some steps at each learning rate of a grid, with AdamW, a
short warm-up and a linear decay to 0. One line of JSON a run goes to --out; a run that is there is not done again, so the
command goes on from where it was stopped. The table has the held-out loss in nats a byte, and for each width the best
learning rate: the lowest point of a parabola through the best run and its neighbours on the grid. One core is enough:
XLA_FLAGS='--xla_cpu_multi_thread_eigen=false' keeps to it. The smallest width is the base of µP, where both are the same.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from data_pipeline import loader
from data_pipeline.mixture import MixtureSchedule
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.data import to_device
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mlp import MlpSpec
from maxlm.losses import LossConfig, next_token_loss
from maxlm.models.decoder import ComputeConfig, Decoder, DecoderConfig, LayerSpec
from maxlm.optim import OptimConfig, optimizer
from maxlm.parametrisation import parametrised
from maxlm.sharding import MeshConfig, make_mesh

WARMUP, HELD_OUT_ROWS, N_BYTES = 10, 256, 1_000_000


def model_of(width: int) -> DecoderConfig:
  """Heads of 16, more of them in a wider one."""
  attention = AttentionSpec(n_heads=width // 16, n_kv_heads=width // 16, head_dim=16)
  layer = LayerSpec(mixer=attention, mlp=MlpSpec(d_ff=3 * width))
  return DecoderConfig(vocab_size=256, d_model=width, n_layers=2, pattern=(layer,))


def bytes_of(corpus: str, seq_len: int) -> np.ndarray:
  """Text of the corpus's sources, as much of each as there is of the others, from rows of seq_len tokens: about a million
  bytes."""
  opened = loader.open_corpus(corpus, seq_len)
  tokenizer = tokenizers.Tokenizer.from_file(str(opened.tokenizer_path))
  schedule = MixtureSchedule(stages=((None, {source: 1 for source in opened.sources}),))
  text = b''
  for batch in loader.batches(opened, schedule, seed=0, batch_size=8):
    text += ''.join(tokenizer.decode_batch(batch['tokens'].tolist())).encode()
    if len(text) > N_BYTES:
      return np.frombuffer(text, np.uint8)


def batch_of(rows: np.ndarray) -> dict:
  """uint8 [B, T + 1] -> a batch, every row one document."""
  ones_BT = np.ones_like(rows[:, 1:], np.int32)
  return to_device({'tokens': rows[:, :-1].astype(np.int32), 'targets': rows[:, 1:].astype(np.int32), 'segment_ids': ones_BT,
                    'loss_mask': ones_BT, 'positions': ones_BT * np.arange(ones_BT.shape[1], dtype=np.int32),
                    'source': np.zeros(len(rows), np.int32)})


def programs(model: DecoderConfig, base: DecoderConfig | None):
  """(seed -> state, (state, batch, learning rate) -> (state, loss), (params, batch) -> loss), compiled."""
  compute = ComputeConfig(dtype='float32').resolve('cpu')
  optim = optimizer(OptimConfig(peak_lr=1.0, base=base))

  def loss(weights, params, batch):
    total, _, _ = next_token_loss(with_leaves(params, weights), model, compute, LossConfig(), batch)
    return total / batch['tokens'].size

  def begin(seed):
    params = Decoder(model, jax.random.key(seed))
    return params, optim.init(named_leaves(params))

  def step(state, batch, lr):
    params, opt = state
    weights = named_leaves(params)
    value, grads = jax.value_and_grad(loss)(weights, params, batch)
    updates, opt = optim.update(grads, opt, weights)
    return (with_leaves(params, jax.tree.map(lambda w, u: w - lr * u, weights, updates)), opt), value

  score = jax.jit(lambda params, batch: loss(named_leaves(params), params, batch))
  return jax.jit(begin), jax.jit(step, donate_argnums=0), score


def train(compiled, text: np.ndarray, args, lr: float, seed: int) -> dict:
  begin, step, score = compiled
  rows = text[:len(text) // (args.seq_len + 1) * (args.seq_len + 1)].reshape(-1, args.seq_len + 1)
  rows = rows[np.random.default_rng(0).permutation(len(rows))]
  held_out, rows = batch_of(rows[:HELD_OUT_ROWS]), rows[HELD_OUT_ROWS:]
  state, started = begin(seed), time.time()
  for i in range(args.steps):
    rate = lr * min((i + 1) / WARMUP, (args.steps - i) / (args.steps - WARMUP), 1.0)
    taken = np.arange(i * args.batch_size, (i + 1) * args.batch_size) % len(rows)
    state, _ = step(state, batch_of(rows[taken]), jnp.float32(rate))
  return {'loss': float(score(state[0], held_out)), 'seconds': round(time.time() - started, 1)}


def best(lrs: list[float], losses: list[float]) -> float:
  """log2 of the learning rate at the lowest point of a parabola through the lowest loss and its two neighbours."""
  losses = [loss if np.isfinite(loss) else 1e9 for loss in losses]
  i = int(np.argmin(losses))
  if i in (0, len(lrs) - 1):
    return float(np.log2(lrs[i]))
  left, low, right = losses[i - 1:i + 2]
  return float(np.log2(lrs[i]) + 0.5 * (left - right) / (left - 2 * low + right) * np.log2(lrs[1] / lrs[0]))


def table(done: list[dict], widths: list[int], lrs: list[float]) -> str:
  lines = [f'{"":10}' + ''.join(f'{"2^" + f"{np.log2(lr):g}":>9}' for lr in lrs) + f'{"best":>10}']
  for kind in ('sp', 'mup'):
    found = []
    for width in widths:
      losses = [[run['loss'] for run in done if (run['kind'], run['width'], run['lr']) == (kind, width, lr)] for lr in lrs]
      if width == widths[0] and kind == 'mup':
        losses = [[run['loss'] for run in done if (run['kind'], run['width'], run['lr']) == ('sp', width, lr)] for lr in lrs]
      if not all(losses):
        continue
      means = [float(np.mean(of_lr)) for of_lr in losses]
      found.append(best(lrs, means))
      lines.append(f'{kind:4}{width:6}' + ''.join(f'{loss:9.4f}' for loss in means) + f'{"2^" + f"{found[-1]:.2f}":>10}')
    if len(found) > 1:
      lines.append(f'{kind}: the best learning rate moves by {found[-1] - found[0]:+.2f} powers of two\n')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--corpus', default='corpora/quickstart')
  parser.add_argument('--out', default='runs/mup_transfer.jsonl')
  parser.add_argument('--widths', default='32,64,128,256')
  parser.add_argument('--lrs', default='-10,-9,-8,-7,-6,-5,-4', help='powers of two')
  parser.add_argument('--steps', type=int, default=100)
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--seq_len', type=int, default=64)
  parser.add_argument('--seeds', type=int, default=1)
  args = parser.parse_args()
  widths, lrs = sorted(map(int, args.widths.split(','))), [2.0 ** float(power) for power in args.lrs.split(',')]
  out = Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  settings = {'steps': args.steps, 'batch_size': args.batch_size, 'seq_len': args.seq_len}
  done = [run for line in out.read_text().splitlines() if (run := json.loads(line)).items() >= settings.items()
          ] if out.exists() else []
  known = {(run['kind'], run['width'], run['lr'], run['seed']) for run in done}
  text, base = bytes_of(args.corpus, 256), model_of(widths[0])
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])), out.open('a') as log:
    for width, kind in [(widths[0], 'sp'), *itertools.product(widths[1:], ('sp', 'mup'))]:
      model = model_of(width) if kind == 'sp' else parametrised(model_of(width), base)
      compiled = functools.cache(lambda model=model, kind=kind: programs(model, base if kind == 'mup' else None))
      for lr, seed in ((lr, seed) for lr in lrs for seed in range(args.seeds)):
        if (kind, width, lr, seed) not in known:
          run = {'kind': kind, 'width': width, 'lr': lr, 'seed': seed, **settings}
          done.append(run | train(compiled(), text, args, lr, seed))
          log.write(json.dumps(done[-1]) + '\n')
          log.flush()
  print(table(done, widths, lrs))


if __name__ == '__main__':
  main()
