"""The table of a sweep, DIR/runs.csv and runs.parquet: a row a run, in the order of the sweep, made of the workdirs alone.

The same finished runs give the same bytes. docs/sweep.md says what the columns are.
"""

import csv
import fcntl
import hashlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import sha256_file
from maxlm import hosts, start
from maxlm.config import Experiment
from maxlm.dry_run import aligned
from maxlm.metrics import si
from maxlm.redact import redact
from maxlm.report import record
from maxlm.start import write_atomically
from maxlm.sweep.count import parameters, total_flops, total_tokens
from maxlm.sweep.runs import Run

TEXT = ('name', 'group', 'status', 'reason', 'workdir', 'git', 'config_hash', 'tokenizer', 'corpus', 'optimizer',
        'branch_of')
REAL = ('peak_lr', 'weight_decay', 'flops', 'flops_6nd', 'loss', 'bits_per_byte', 'train_loss', 'seconds')
LAST = ('branch_of', 'branch_step', 'seconds')  # of the columns
SMOOTHED = 0.05  # of the steps, over which train_loss is the mean
EXITED = 'maxlm.sweep: exit code '  # the last line of the log of an attempt that failed
CHANGED = 'it was begun with'
# A finished run that was trained with others of these is still the run that the sweep means.
MAY_DIFFER = (*start.MAY_MOVE, 'compute', 'mesh', 'microbatches', 'health', 'checkpoint', 'evals.every_steps')


def collect(runs: list[Run], workdir: Path) -> list[dict[str, Any]]:
  """The rows. What a run that is not finished does not have is None."""
  rows = [row_of(run, workdir) for run in runs]
  sources = list(dict.fromkeys(name.partition('/')[2] for row in rows for name in row if name.startswith('loss/')))
  measured = [f'{kind}/{source}' for kind in ('loss', 'bits_per_byte', 'train_loss') for source in sources]
  columns = [name for name in rows[0] if '/' not in name and name not in LAST] + measured + [*LAST]
  return [{name: row.get(name) for name in columns} for row in rows]


def row_of(run: Run, workdir: Path) -> dict[str, Any]:
  """What the config says of the run, and its workdir of how it went."""
  status, reason = state_of(run, workdir)
  config, plan = run.settled, run.plan
  last, optim, tokens = plan[-1].config, plan[-1].config.optim, total_tokens(config)
  params, non_embedding, active = parameters(last.model)
  row = {'name': run.name, 'group': run.group, 'status': status, 'reason': reason, 'workdir': run.name, 'seed': config.seed,
         'git': None, 'config_hash': config_hash(config), 'tokenizer': None, 'corpus': None, 'd_model': last.model.d_model,
         'n_layers': last.model.n_layers, 'seq_len': last.data.seq_len, 'batch_tokens': last.tokens_per_step,
         'steps': plan[-1].stop, 'tokens': tokens, 'peak_lr': max(part.config.optim.peak_lr for part in plan),
         'optimizer': optim.optimizer, 'weight_decay': optim.weight_decay,
         'warmup_tokens': plan[0].config.optim.warmup_tokens,
         'decay_tokens': optim.decay_tokens if optim.schedule == 'wsd' else last.tokens - optim.warmup_tokens,
         'params': params, 'params_non_embedding': non_embedding, 'params_active': active, 'flops': total_flops(config),
         'flops_6nd': 6.0 * non_embedding * tokens, 'loss': None, 'bits_per_byte': None, 'train_loss': None}
  row |= dict(zip(LAST, (*(run.branch or (None, None)), None)))
  return row | results(workdir / run.name, plan[-1].stop) if status == 'finished' else row


def results(directory: Path, steps: int) -> dict[str, Any]:
  """What only a finished run has."""
  found = record.read(directory)
  contents = {name.partition('/')[2]: rows for name, rows in found.meta.get('rows', {}).items()}
  evaluated = next((e.values for e in reversed(found.evaluations) if e.step == steps), {})
  row = {'git': found.meta.get('lineage', {}).get('code'), 'tokenizer': sha256_file(directory / 'tokenizer.json'),
         'corpus': hosts.fingerprint(json.dumps(contents, sort_keys=True)) if contents else None,
         'train_loss': smoothed(found, 'loss', steps)}
  for name, value in evaluated.items():
    kind, _, source = name.partition('/')
    if kind in ('loss', 'bits_per_byte'):
      row[kind if source == 'all' else name] = value
      if kind == 'loss' and source != 'all' and f'loss/{source}' in found.series:
        row[f'train_loss/{source}'] = smoothed(found, f'loss/{source}', steps)
  seconds = found.account and round(found.account.wall - found.account.seconds['idle'], 1)
  return row | {'seconds': seconds}


def smoothed(found: record.Run, name: str, steps: int) -> float | None:
  """Mean over the last steps, which keep the noise of single batches out."""
  series = found.series[name]
  values = series.values[series.steps > steps - max(1, math.ceil(SMOOTHED * steps))]
  return float(np.mean(values)) if len(values) else None


def config_hash(config: Experiment) -> str:
  """Sixteen hex digits of what is trained: the config as a run's config.json has it, without its name."""
  saved = start.as_saved(config)
  saved.pop('name')
  return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:16]


def state_of(run: Run, workdir: Path) -> tuple[str, str]:
  """(status, reason): 'finished', 'running', 'failed' (it can go on where the reason is seen to) or 'missing'."""
  directory, config, steps = workdir / run.name, run.settled, run.plan[-1].stop
  done, notes = record.read_json(directory / 'DONE', []), []
  saved = record.read_json(directory / 'config.json', notes)
  if saved:
    changed = [what for what in start.differences(saved, start.as_saved(config), Experiment)
               if not what[0].startswith(('name', *MAY_DIFFER))]
    if changed:
      key, before, after = changed[0]
      return 'failed', f'{CHANGED} {key}={before} and the sweep says {after}: set it back, or remove {directory}'
  if done.get('steps') == steps:
    return 'finished', ''
  if is_held(directory):
    return 'running', ''
  if error := last_error(log_of(workdir, run.name)):
    return 'failed', error
  if not (directory / 'metrics.jsonl').is_file():
    return 'missing', ''
  return 'failed', 'stopped: the same command goes on from its last checkpoint'


def log_of(workdir: Path, name: str) -> Path:
  """What a run says while it is trained, every attempt of it."""
  return workdir / 'logs' / f'{name}.log'


def last_error(log: Path) -> str:
  """The last line of a log that ends with an error; '' where it does not."""
  if not log.is_file():
    return ''
  lines = [line.strip() for line in log.read_text(errors='replace').splitlines() if line.strip()]
  if lines and lines[-1].startswith(EXITED):
    said = [line for line in lines[-30:-1] if line.startswith('error: ') or 'Error' in line]
    return redact(said[-1].removeprefix('error: ') if said else lines[-1])
  return ''




def is_held(directory: Path) -> bool:
  """Whether a process trains in it (`start.held`)."""
  if not directory.is_dir():
    return False
  opened = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # a file system without locks
    return False
  finally:
    os.close(opened)
  return False


# -- for people, and files


def for_people(rows: list[dict[str, Any]]) -> list[str]:
  """A line a run, the best of each group marked; then why runs failed."""
  columns = {'params': si, 'tokens': si, 'flops': '{:.3g}'.format, 'peak_lr': '{:.3g}'.format,
             'weight_decay': '{:.3g}'.format, 'batch_tokens': '{:,}'.format, 'loss': '{:.4f}'.format,
             'bits_per_byte': '{:.4f}'.format, 'train_loss': '{:.4f}'.format, 'seconds': '{:,.0f}'.format}
  best = {}
  for row in rows:
    if row['loss'] is not None:
      best[row['group']] = min(row['loss'], best.get(row['group'], math.inf))
  cells = [('group', 'name', *columns, '')]
  for row in rows:
    last = row['status'] if row['loss'] is None else 'best' if row['loss'] == best[row['group']] else ''
    shown = ('' if row[name] is None else show(row[name]) for name, show in columns.items())
    cells.append((row['group'], row['name'], *shown, last))
  failed = [f'failed: {row["name"]}: {row["reason"]}' for row in rows if row['status'] == 'failed']
  return aligned(cells) + failed




def write(rows: list[dict[str, Any]], workdir: Path) -> list[Path]:
  """runs.csv, and with pyarrow runs.parquet; their paths. Floats are written with all their digits."""
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  writer.writeheader()
  writer.writerows({name: repr(value) if isinstance(value, float) else value for name, value in row.items()} for row in rows)
  write_atomically(workdir / 'runs.csv', text.getvalue())
  try:
    import pyarrow as pa
    import pyarrow.parquet as pq
  except ImportError:
    return [workdir / 'runs.csv']
  schema = pa.schema([(name, pa.string() if name in TEXT else pa.float64() if name in REAL or '/' in name else pa.int64())
                      for name in rows[0]])
  partial = workdir / 'runs.parquet.partial'
  pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial)
  os.replace(partial, workdir / 'runs.parquet')
  return [workdir / 'runs.csv', workdir / 'runs.parquet']
