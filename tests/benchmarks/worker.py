"""The peer's end of cpu.py: the shape that all of them train, and a loop that runs steps when it is told to.

Peers import this in their own interpreters, so it needs only Python's standard library, 3.11 or newer.
"""

import json
import os
import sys
import time
from collections.abc import Callable

# 8.4M parameters in fp32, llama-shaped: 4 * (4 * 256 * 256 + 3 * 256 * 1024) + 2 * 8192 * 256 + norms.
N_LAYERS, D_MODEL, N_HEADS, HEAD_DIM, D_FF, VOCAB = 4, 256, 4, 64, 1024, 8192
BATCH, SEQ_LEN = 8, 512
# AdamW with decay and clipping, the same for all.
LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP = 3e-4, 0.9, 0.95, 1e-8, 0.1, 1.0


def serve(setup: Callable[[], tuple[Callable[[], float], dict]]) -> None:
  """Calls setup() -> (step, facts) and takes the first step, says so, and then takes n more for each line 'n' of stdin.

  step() runs one whole training step, waits until it is finished, and returns the loss. Answers are lines of JSON on
  the process's stdout; whatever a library prints there goes to stderr instead.
  """
  answers = os.fdopen(os.dup(sys.stdout.fileno()), 'w')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  step, facts = setup()
  print(json.dumps({'loss': step(), **facts}), file=answers, flush=True)
  for line in sys.stdin:
    seconds, cpu_seconds = [], []
    for _ in range(int(line)):
      start, cpu_start = time.perf_counter(), time.process_time()
      loss = step()
      seconds.append(time.perf_counter() - start)
      cpu_seconds.append(time.process_time() - cpu_start)
    print(json.dumps({'loss': loss, 'seconds': seconds, 'cpu_seconds': cpu_seconds}), file=answers, flush=True)
