"""Training speed on this machine's CPU: MaxLM beside MaxText and transformers/PyTorch, in one run.

    python tests/benchmarks/cpu.py [--maxtext_python=PYTHON] [--torch_python=PYTHON] [--rounds=5] [--steps=3] [--json=F]

Everybody trains the model of worker.py (8.4M parameters, fp32, batch 8 x 512, random tokens, AdamW, clipping), each in
its own interpreter; one that is not given is reported as absent. Three columns:

first step   seconds from the start of the process to its first finished step, with an empty compile cache and again with
             the cache it left behind. PyTorch runs eagerly and has none.
tokens/s     of whole steps, from the second on. Peers take turns, a few steps each, in an order that rotates, so that a
             noisy machine is unkind to all of them alike. The median over all steps; the spread is the 10th to 90th
             percentile.
CPU s        seconds of CPU that a step takes, all cores together, median: what other programs on the machine change least.

Peers' environments: `pip install torch transformers` for one, `pip install 'maxtext[tpu]'` for the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import worker

HERE = Path(__file__).parent
TOKENS = worker.BATCH * worker.SEQ_LEN


class Peer:
  """A process that takes training steps on demand."""

  def __init__(self, name: str, python: str, cache: str):
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1', 'TOKENIZERS_PARALLELISM': 'false'}
    self.name, self.errors, start = name, tempfile.TemporaryFile('w+'), time.perf_counter()
    self.process = subprocess.Popen([python, HERE / f'peer_{name}.py'], env=environment, text=True, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=self.errors)
    self.facts = self.answer()
    self.first_step_seconds = time.perf_counter() - start

  def answer(self) -> dict:
    line = self.process.stdout.readline()
    if not line:
      self.errors.seek(0)
      raise RuntimeError(f'{self.name} died:\n{self.errors.read()[-3000:]}')
    return json.loads(line)

  def steps(self, n: int) -> list[tuple[float, float]]:
    """Takes n steps; (seconds, seconds of CPU) of each."""
    print(n, file=self.process.stdin, flush=True)
    answer = self.answer()
    return list(zip(answer['seconds'], answer['cpu_seconds'], strict=True))

  def stop(self) -> None:
    self.process.stdin.close()
    self.process.wait(60)
    self.process.stdout.close()
    self.errors.close()


def start(name: str, python: str, cache: str) -> tuple[Peer, dict]:
  """The peer after its second start, and what the two starts took."""
  cold = Peer(name, python, cache)
  cold.stop()
  warm = Peer(name, python, cache)
  return warm, {**cold.facts, 'first_step_cold': cold.first_step_seconds, 'first_step_warm': warm.first_step_seconds}


def measure(pythons: dict[str, str], rounds: int, steps: int) -> dict[str, dict]:
  """name -> versions, parameters, first_step_cold, first_step_warm, steps, tokens_per_second, spread, cpu_seconds."""
  with tempfile.TemporaryDirectory() as caches:
    peers, results, timed = [], {}, {name: [] for name in pythons}
    for name, python in pythons.items():
      print(f'{name}: starting, cold and warm …', file=sys.stderr)
      peer, results[name] = start(name, python, f'{caches}/{name}')
      peers.append(peer)
    for turn in range(rounds + 1):
      print(f'round {turn} of {rounds}{" (warm-up)" if turn == 0 else ""}', file=sys.stderr)
      for peer in peers[turn % len(peers):] + peers[:turn % len(peers)]:
        taken = peer.steps(steps)
        timed[peer.name] += taken if turn else []
    for peer in peers:
      peer.stop()
  for name, taken in timed.items():
    seconds, cpu_seconds = zip(*taken, strict=True)
    deciles = statistics.quantiles(seconds, n=10, method='inclusive')
    results[name] |= {'steps': len(taken), 'tokens_per_second': TOKENS / statistics.median(seconds),
                      'spread': (TOKENS / deciles[-1], TOKENS / deciles[0]), 'cpu_seconds': statistics.median(cpu_seconds)}
  return results


def table(results: dict[str, dict], absent: list[str]) -> str:
  lines = [f'{"":8} {"tokens/s":>9} {"spread":>13} {"MaxLM is":>9} {"CPU s":>6} {"first step, cold":>17} {"warm":>7}']
  ours = results['maxlm']['tokens_per_second']
  for name, r in results.items():
    spread = '{:,.0f}–{:,.0f}'.format(*r['spread'])
    lines.append(f'{name:8} {r["tokens_per_second"]:9,.0f} {spread:>13} {ours / r["tokens_per_second"]:8.2f}x '
                 f'{r["cpu_seconds"]:6.1f} {r["first_step_cold"]:15.1f} s {r["first_step_warm"]:5.1f} s   {r["versions"]}')
  return '\n'.join(lines + [f'{name:8}    absent: give --{name}_python=…' for name in absent])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--maxtext_python', default='', help='interpreter that has maxtext')
  parser.add_argument('--torch_python', default='', help='interpreter that has torch and transformers')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=3, help='steps of each peer in a round')
  parser.add_argument('--json', default='', help='write the results here too')
  args = parser.parse_args()
  if args.rounds < 1 or args.steps < 1 or args.rounds * args.steps < 2:
    parser.error('--rounds times --steps must be at least 2')
  pythons = {'maxlm': sys.executable, 'maxtext': args.maxtext_python, 'torch': args.torch_python}
  given = {name: python for name, python in pythons.items() if python}
  results = measure(given, args.rounds, args.steps)
  sizes = {name: r['parameters'] for name, r in results.items()}
  assert len(set(sizes.values())) == 1, f'not the same model: {sizes} parameters'
  print(f'{sizes["maxlm"] / 1e6:.2f}M parameters, fp32, {worker.BATCH} x {worker.SEQ_LEN} tokens a step, '
        f'{os.cpu_count()} cores, {results["maxlm"]["steps"]} steps each')
  print(table(results, [name for name in pythons if name not in given]))
  if args.json:
    Path(args.json).write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  main()
