"""Training speed on one NVIDIA GPU (made for an H200): MaxLM beside PyTorch, on the same card in one run.

    python tests/benchmarks/gpu.py --torch_python=PYTHON [--cases=dense,moe,packed] [--rows=8] [--json=F]
    python tests/benchmarks/gpu.py --tiny --torch_python=PYTHON        # two steps of small ones on a CPU: does it run?

First the kernels of attention and experts are compared with their references, values and gradients. Then each model is
trained by MaxLM's own `train_step`, and after a pause by a PyTorch model of the same shape (gpu_torch.py: torch.compile,
SDPA, fused AdamW, grouped_mm), each in a process of its own: 20 steps to warm up, 50 timed in spans of 10.

dense     1.14B parameters, 8 rows of 4096 random tokens a step, fp32 weights, bf16 products
moe       0.99B of 2.95B parameters active: 4 of 16 experts, routed by routers that learn
packed    dense, with 8 documents a row that do not see each other; MaxLM only

MFU is of the FLOPs that the model needs (`maxlm.flops`), the same for both, against the data sheet's dense bf16 peak. Memory
is the allocator's peak. Power and clock are sampled once a second where nvidia-smi is: a throttled card is unkind to both.
What MaxLM needs: pip install -e '.[gpu,kernels]'. Settings: SETTINGS below, and layers unrolled.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gpu_shapes as shapes

HERE, COOL_DOWN = Path(__file__).parent, 10.0
# Of a single GPU: no collectives to hide. Most of the card to one process; layers are unrolled, so no loop to double-buffer.
SETTINGS = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92', 'JAX_OPTIMIZATION_LEVEL': 'O1'}


def run(python: str, script: str, argument: str, tiny: bool) -> dict:
  """What a worker reports; {'error': …} with the end of what it said, if it dies."""
  environment = os.environ | ({'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''} if tiny else SETTINGS)
  with tempfile.TemporaryFile('w+') as errors, Sampler() as sampler:
    process = subprocess.Popen([python, HERE / script, argument], env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=errors)
    lines = process.communicate()[0].strip().splitlines()
    if process.returncode or not lines:
      errors.seek(0)
      return {'error': errors.read()[-3000:]}
  return {**json.loads(lines[-1]), 'card': sampler.medians()}


class Sampler:
  """Power [W] and clock [MHz] of the card while something runs; nothing where there is no nvidia-smi."""

  def __enter__(self):
    self._samples, self._stop = [], threading.Event()
    self._thread = threading.Thread(target=self._sample, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._stop.set()
    self._thread.join(10)

  def _sample(self):
    query = ['nvidia-smi', '--query-gpu=power.draw,clocks.sm', '--format=csv,noheader,nounits', '--id=0']
    while not self._stop.wait(1.0):
      try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        self._samples.append(tuple(map(float, said.split(','))))
      except (OSError, subprocess.CalledProcessError, ValueError):
        return

  def medians(self) -> dict[str, float]:
    busy = [sample for sample in self._samples if sample[0] > 300]
    return dict(zip(('watts', 'mhz'), map(statistics.median, zip(*busy)))) if busy else {}


def show_checks(checks: dict) -> bool:
  """Prints the comparison of kernels; whether all are within the limit."""
  if 'error' in checks:
    print(f'kernels  could not be compared:\n{checks["error"]}')
    return False
  good = True
  print(f'kernels  on {checks["device"]}, off by at most, in parts of the largest (limit {checks["limit"]:g})')
  for name, errors in checks['errors'].items():
    is_good = max(errors.values()) <= checks['limit']
    good &= is_good
    print(f'  {name:32} {"  ".join(f"{of} {error:.1e}" for of, error in errors.items())}{"" if is_good else "  <- WRONG"}')
  return good


def figures(result: dict, case: shapes.Case, flops: float, peak: float | None) -> dict:
  seconds = statistics.median(result['seconds'])
  return {'tokens_per_second': case.tokens / seconds, 'mfu': flops / seconds / peak if peak else None,
          'gigabytes': result['peak_bytes'] / 1e9 if result['peak_bytes'] else None, 'seconds': seconds,
          'spread': (min(result['seconds']), max(result['seconds']))}


def table(results: dict[str, dict]) -> str:
  lines = [f'{"":8} {"":6} {"tokens/s":>10} {"MFU":>6} {"GB":>6} {"s/step":>7} {"spread":>13} {"first step":>10} {"W":>5} '
           f'{"MHz":>6}']
  for name, ends in results.items():
    for end, result in ends.items():
      if 'error' in result:
        lines.append(f'{name:8} {end:6} failed: {result["error"].strip().splitlines()[-1][:100]}')
        continue
      f, card = result['figures'], result['card']
      shown = lambda value, form: format(value, form) if value is not None else ''
      lines.append(f'{name:8} {end:6} {f["tokens_per_second"]:10,.0f} {shown(f["mfu"], ".1%"):>6} '
                   f'{shown(f["gigabytes"], ".1f"):>6} {f["seconds"]:7.3f} '
                   f'{"{:.3f}–{:.3f}".format(*f["spread"]):>13} {result["first_step_seconds"]:8.1f} s '
                   f'{shown(card.get("watts"), ".0f"):>5} {shown(card.get("mhz"), ".0f"):>6}  {result["versions"]}')
    if all('figures' in ends.get(end, {}) for end in ('maxlm', 'torch')):
      ours, theirs = (ends[end]['figures']['tokens_per_second'] for end in ('maxlm', 'torch'))
      lines.append(f'{"":8} MaxLM is {ours / theirs:.2f}x')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--torch_python', default='', help='interpreter that has torch 2.10 or newer; else MaxLM runs alone')
  parser.add_argument('--cases', default=','.join(shapes.CASES), help='of dense, moe and packed')
  parser.add_argument('--rows', type=int, default=shapes.DENSE.rows, help='of 4096 tokens a step')
  parser.add_argument('--attention', default='', help="MaxLM's kernel, instead of the one it chooses")
  parser.add_argument('--experts', default='', help="MaxLM's kernel, instead of the one it chooses")
  parser.add_argument('--tiny', action='store_true', help='small models and two steps, on a CPU')
  parser.add_argument('--json', default='', help='write everything that was measured here')
  args = parser.parse_args()
  if unknown := set(args.cases.split(',')) - set(shapes.CASES):
    parser.error(f'--cases: {", ".join(sorted(unknown))} is none of {", ".join(shapes.CASES)}')
  checks = run(sys.executable, 'gpu_maxlm.py', 'check-tiny' if args.tiny else 'check', args.tiny)
  good = show_checks(checks)
  results = {}
  for name in args.cases.split(','):
    case = dataclasses.replace(shapes.CASES[name], rows=args.rows, attention=args.attention, experts=args.experts)
    case = shapes.tiny(case) if args.tiny else case
    ends = {'maxlm': (sys.executable, 'gpu_maxlm.py')}
    if args.torch_python and case.documents == 1:
      ends['torch'] = args.torch_python, 'gpu_torch.py'
    results[name] = {}
    for end, (python, script) in ends.items():
      print(f'{name}: {end} …', file=sys.stderr)
      time.sleep(0 if args.tiny else COOL_DOWN)
      results[name][end] = run(python, script, json.dumps(dataclasses.asdict(case)), args.tiny)
    ours = results[name]['maxlm']
    for end, result in results[name].items():
      if 'error' in result:
        print(f'{name}: {end} failed:\n{result["error"]}', file=sys.stderr)
      elif 'error' not in ours:
        result['figures'] = figures(result, case, ours['flops'], ours['peak_flops'])
      else:
        result['figures'] = figures(result, case, 0.0, None)
    sizes = {end: result['parameters'] for end, result in results[name].items() if 'error' not in result}
    assert len(set(sizes.values())) <= 1, f'not the same model: {sizes} parameters'
    if args.json:
      Path(args.json).write_text(json.dumps({'checks': checks, 'results': results}, indent=2) + '\n')
  print(table(results))
  sys.exit(0 if good and not any('error' in result for ends in results.values() for result in ends.values()) else 1)


if __name__ == '__main__':
  main()
