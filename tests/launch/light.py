"""Stands in for maxlm.train where a test is of the launcher alone: counts steps into metrics.jsonl, goes on where it was.

--exits=CODE@STEP,…: ends so, once, when it gets there. --always=CODE@STEP: whenever it gets there. --seconds: of a step.
--waits_for=FILE: the last step waits until it exists. SIGTERM ends it with 75.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 24
flags = dict(word[2:].partition('=')[::2] for word in sys.argv[1:])
workdir = Path(flags['workdir'])
workdir.mkdir(parents=True, exist_ok=True)
path = workdir / 'metrics.jsonl'
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
step = done[-1]['step'] if done else 0
print('resumed' if step else 'begun', 'at step', step, os.environ.get('HF_TOKEN', ''), flush=True)
codes = {int(at): int(code) for code, at in (word.split('@') for word in flags.get('exits', '').split(',') if word)}
always = {int(at): int(code) for code, at in (word.split('@') for word in flags.get('always', '').split(',') if word)}
while step < STEPS:
  time.sleep(float(flags.get('seconds', 0.02)))
  if step == STEPS - 1 and 'waits_for' in flags:
    while not Path(flags['waits_for']).exists():
      time.sleep(0.1)
  once = workdir / f'exited-{step}'
  if step in always or step in codes and not once.exists():
    once.touch()
    print(f'error: step {step} does not go', flush=True)
    sys.exit(always.get(step, codes.get(step)))
  step += 1
  with open(path, 'a') as record:
    record.write(json.dumps({'step': step, 'pid': os.getpid()}) + '\n')
