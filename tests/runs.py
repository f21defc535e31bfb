"""Workdirs of runs that never were: a record of three stages with tasks, a ledger, a config; no checkpoints."""

import json
import math
import random
from pathlib import Path

STAGES = (('pretrain', 300, 256), ('midtrain', 120, 256), ('long', 80, 1024))  # name, steps, length of rows
BATCH_TOKENS = 2048
LENGTHS, TASKS = (256, 512, 1024), ('needle', 'variable_tracking')


def record(step: int, seed: int = 0, gain: float = 1.0, stage: str = 'train', **changes) -> dict:
  """Of a step, as maxlm.train writes it; the same whenever it is asked for."""
  noise = random.Random(step * 1000 + seed).gauss
  loss = 2.5 + 4 * math.exp(-step / (60 * gain)) + noise(0, 0.1)
  return {'step': step, 'time': 1.79e9 + 0.5 * step, 'stage': stage, 'tokens': step * BATCH_TOKENS, 'loss': loss,
          'loss/web': loss + 0.3, 'tokens/web': 1536, 'loss/pdf': loss - 0.4, 'tokens/pdf': 512,
          'grad_norm': 0.5 + abs(noise(0, 0.2)), 'learning_rate': 1e-3 * min(1, step / 20) * (1 - step / 600), 'skipped': 0,
          'tokens_per_second': 4000 + noise(0, 100), 'mfu': 0.4 + noise(0, 0.01), 'batch': f'{step:016x}'} | changes


def evaluation(step: int, stage: str = 'train', gain: float = 1.0) -> dict:
  done = 1 - math.exp(-step / (150 * gain))
  long = 1.0 if stage == 'long' else 0.0
  right = {f'eval/tasks/{task}/{length}': min(1.0, max(0.1 if task == 'needle' else 0.0, done * (
    1 if length == 256 else 0.9 * long + 0.2) * (1 if task == 'needle' else 0.7))) for task in TASKS for length in LENGTHS}
  chance = {f'eval/chance/needle/{length}': 0.1 for length in LENGTHS}
  bits = {f'eval/{kind}/{source}': (b - 1.2 * done) * scale for source, b in (('web', 3.0), ('pdf', 3.4), ('all', 3.1))
          for kind, scale in (('bits_per_byte', 1.0), ('loss', 2.3))}
  return {'step': step, 'time': 1.79e9 + 0.5 * step, 'stage': stage, 'tokens': step * BATCH_TOKENS, **bits, **right,
          **chance}


def staged_records(seed: int = 0, gain: float = 1.0) -> list[dict]:
  """With an evaluation before each stage, as that stage, and after each."""
  records, step = [], 0
  for name, steps, _ in STAGES:
    records.append(evaluation(step, name, gain))
    for _ in range(steps):
      step += 1
      records.append(record(step, seed, gain, name))
      if step % 60 == 0:
        records.append(evaluation(step, name, gain))
    if step % 60:
      records.append(evaluation(step, name, gain))
  return records


def ledger_lines(last: int) -> list[dict]:
  """Of two attempts, the first of which was killed at step 200 after a checkpoint at 180, an hour before the second."""
  first, second = {'attempt': 'a' * 8}, {'attempt': 'b' * 8}
  return [
    {'kind': 'start', **first, 'time': 1.79e9 - 10}, {'kind': 'time', **first, 'seconds': {'init': 5, 'compile': 5},
                                                      'from': 0, 'to': 0},
    {'kind': 'resumed', **first, 'step': 0},
    {'kind': 'time', **first, 'seconds': {'step': 95, 'data': 5}, 'from': 0, 'to': 200},
    {'kind': 'start', **second, 'time': 1.79e9 + 3700},
    {'kind': 'time', **second, 'seconds': {'init': 5}, 'from': 0, 'to': 0},
    {'kind': 'resumed', **second, 'step': 180},
    {'kind': 'event', **second, 'event': 'save failed', 'reason': 'disk <full>'},
    {'kind': 'time', **second, 'seconds': {'step': 150, 'checkpoint': 4, 'evaluation': 6}, 'from': 180, 'to': last},
    {'kind': 'end', **second, 'how': 'finished'}]


def config(name: str, **changes) -> dict:
  stages = [{'name': stage, 'tokens': steps * BATCH_TOKENS, 'seq_len': length} for stage, steps, length in STAGES]
  return {'name': name, 'seed': 0, 'tokens': BATCH_TOKENS, 'data': {'batch_size': 8, 'seq_len': 256},
          'optim': {'peak_lr': 1e-3}, 'stages': stages} | changes


def write_lines(path: Path, records: list) -> None:
  path.write_text(''.join(json.dumps(one) + '\n' for one in records), encoding='utf-8')


def write_run(workdir: Path, records: list[dict] | None = None, **changes) -> Path:
  """changes: of the config."""
  workdir.mkdir(parents=True)
  records = staged_records() if records is None else records
  write_lines(workdir / 'metrics.jsonl', records)
  write_lines(workdir / 'goodput.jsonl', ledger_lines(max(one['step'] for one in records)))
  (workdir / 'config.json').write_text(json.dumps(config(workdir.name, **changes)))
  return workdir
