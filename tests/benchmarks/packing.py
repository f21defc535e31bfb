"""Requests of lm-evaluation-harness: packed into rows, against a row for each.

    PYTHONPATH=. python tests/benchmarks/packing.py [--requests=2000] [--least=16] [--most=160] [--d_model=256] [--rounds=3]

A model with random weights answers requests whose lengths are drawn evenly (continuations: 1 to 12 tokens). "arrival": a row
for each, a batch padded to its longest one. "sorted": the longest first, so that there is less padding, as the harness's
own HFLM does it. "packed": as `maxlm.evaluate --tasks` does it. All have as many positions in a batch; rows of one request
have multiples of 32, so that few programs are compiled. Compiling is not counted. CPU seconds,
of all cores, vary less than seconds on a busy machine.
"""

import argparse
import time

import jax
import numpy as np

from configs import quickstart
from maxlm import continuations
from maxlm.continuations import Scorer
from maxlm.load import Model
from maxlm.models.decoder import Decoder
from maxlm.sharding import MeshConfig, make_mesh


def one_a_row(scorer: Scorer, params, requests, rows: int, in_order: bool) -> dict:
  """Answers with rows of one request each, `rows` at a time."""
  inputs = [np.array([*context, *continuation][:-1], np.int32) for context, continuation in requests]
  targets = [np.array(continuation, np.int32) for _, continuation in requests]
  order = range(len(inputs)) if in_order else sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
  riders, answers = {i: [i] for i in order}, {}
  for start in range(0, len(inputs), rows):
    batch = list(order)[start:start + rows]
    longest = max(len(inputs[i]) for i in batch)
    answers |= scorer._answer(params, [[i] for i in batch], rows, longest + -longest % 32, inputs, targets, riders)
  return answers


def main():
  parser = argparse.ArgumentParser()
  for name, value in (('requests', 2000), ('least', 16), ('most', 160), ('d_model', 256), ('rounds', 3)):
    parser.add_argument(f'--{name}', type=int, default=value)
  args = parser.parse_args()
  config = quickstart.get_config()
  config.model.d_model = args.d_model
  for layer in config.model.pattern:
    layer.mixer.n_heads, layer.mixer.n_kv_heads, layer.mlp.d_ff = args.d_model // 64, args.d_model // 128, 3 * args.d_model
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(1, config.model.vocab_size, n).tolist()
  requests = [(draw(rng.integers(args.least, args.most + 1)), draw(rng.integers(1, 13))) for _ in range(args.requests)]
  n_tokens = sum(len(context) + len(continuation) - 1 for context, continuation in requests)
  with jax.set_mesh(make_mesh(MeshConfig())):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    model = Model(model=config.model, config=config, compute=config.compute.resolve(jax.default_backend()), params=params,
                  tokenizer=None, tokenizer_text=None, bos=0, begins=True, eos=(0,), max_length=2048, step=0)
    print(f'{len(requests)} requests, {n_tokens} tokens, {jax.devices()[0].device_kind}, d_model {args.d_model}')
    scorer = Scorer(model.model, model.compute, max_length=2048, batch_size=2)
    rows = continuations.rows_at_a_time(scorer.batch_size, args.most + 12)
    ways = {name: lambda name=name: one_a_row(scorer, params, requests, rows, name == 'arrival')
            for name in ('arrival', 'sorted')}
    ways['packed'] = lambda: dict(scorer(params, requests))
    times = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
      for name, way in ways.items():
        start = time.perf_counter(), time.process_time()
        way()
        if turn:
          times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for name, taken in times.items():
      wall, cpu = np.median(taken, axis=0)
      print(f'{name:12} {wall:7.2f} s {cpu:7.2f} CPU s')


if __name__ == '__main__':
  main()
