"""The whole recipe of configs/staged_tiny.py on real documents, from nothing to its end; and again, killed in each stage.

    python -m tests.chaos.staged --out=DIR

Prints what was held out at the end of each stage, fails where a stage does not give what it is for, and where the killed run
has another record or another bit in its last checkpoint. Twice some minutes; a finished run under --out is not done again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from maxlm.checkpoint import Checkpoints
from tests.jobs import ROOT, has_saved, record

KILLS = (300, 1300, 1700)  # a step of each stage
SHOWN = ('bits_per_byte/web.1024', 'bits_per_byte/reasoning', 'bits_per_byte/recall', 'bits_per_byte/all',
         'bits_per_byte_ema/all', 'tasks/needle/96', 'tasks/needle/1024', 'tasks/multi_key/1024')


def begin(folder: Path, workdir: str) -> subprocess.Popen:
  command = [sys.executable, '-m', 'maxlm.train', f'--config={ROOT}/configs/staged_tiny.py', f'--workdir={folder / workdir}',
             '--config.checkpoint.every_steps=100', f'--config.data.corpus={folder}/corpus']
  with open(folder / f'{workdir}.log', 'a') as log:
    return subprocess.Popen(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, cwd=folder, stdout=log, stderr=log)


def killed(folder: Path) -> None:
  for step in KILLS:
    process = begin(folder, 'killed')
    while not has_saved(folder / 'killed', step)():
      assert process.poll() is None, f'it ended before step {step}: see {folder}/killed.log'
      time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f'killed after step {step}', flush=True)


def held_out(workdir: Path) -> dict[str, dict]:
  """What was held out at the end of each stage, by its name."""
  lines = [line for line in map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines()) if 'eval/loss/all' in line]
  ends = {line['ended']: line for line in lines if 'ended' in line} | {lines[-1]['stage']: lines[-1]}
  return {stage: {name.removeprefix('eval/'): value for name, value in line.items()} for stage, line in ends.items()}


def check(scores: dict[str, dict]) -> None:
  """Bounds far from the figures of docs/LOG.md: 4.65 to 1.17, 0 to 50 %, 1.02, 0.97."""
  pretrain, mid, long = scores['pretrain'], scores['mid'], scores['long']
  assert mid['bits_per_byte/reasoning'] < 0.5 * pretrain['bits_per_byte/reasoning']  # what it is for
  assert long['tasks/needle/1024'] > mid['tasks/needle/1024'] + 0.2  # at four times the rows of pre-training
  assert pretrain['tasks/needle/96'] > 0.4 > mid['tasks/needle/1024']
  for source in ('web.1024', 'reasoning', 'recall', 'all'):  # at short rows, no source is worse by more than 3 %
    assert long[f'bits_per_byte/{source}'] < 1.03 * mid[f'bits_per_byte/{source}'], source
  assert pretrain['bits_per_byte_ema/all'] < pretrain['bits_per_byte/all']  # the mean of weights, at a constant rate


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=Path, required=True)
  folder = parser.parse_args().out.absolute()
  folder.mkdir(parents=True, exist_ok=True)
  assert begin(folder, 'whole').wait() == 0, f'see {folder}/whole.log'
  scores = held_out(folder / 'whole')
  print(f'{"":<26}', *(f'{stage:>10}' for stage in scores))
  for name in SHOWN:
    print(f'{name:<26}', *(f'{of[name]:10.3f}' for of in scores.values()), flush=True)
  check(scores)
  if not (folder / 'killed' / 'DONE').exists():
    killed(folder)
    assert begin(folder, 'killed').wait() == 0, f'see {folder}/killed.log'
  last = max(Checkpoints(folder / 'whole' / 'checkpoints').steps())
  digests = [Checkpoints(folder / run / 'checkpoints').digests(last) for run in ('killed', 'whole')]
  assert digests[0] == digests[1], 'the killed run ended with other bits'
  assert record(folder / 'killed') == record(folder / 'whole'), 'the killed run has another record'
  print(f'killed in each stage: the same {sum(map(len, digests[0].values()))} arrays at step {last}, the same record')


if __name__ == '__main__':
  main()
