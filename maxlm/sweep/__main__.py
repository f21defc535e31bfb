"""Runs many experiments as one, and makes a table of them: python -m maxlm.sweep

    python -m maxlm.sweep --sweep=configs/sweeps/x.py[:arg] --workdir=DIR [--jobs=2]
    python -m maxlm.sweep --sweep=configs/sweeps/x.py --workdir=DIR --collect
    python -m maxlm.sweep --sweep=configs/sweeps/x.py --workdir=gs://BUCKET/runs --jobs=4 --emit=launch --out=F [-- FLAGS]

Each run is a `maxlm.train` in DIR/<name>. Run again, finished runs are left alone and others go on where they were. Ctrl-C
or SIGTERM: all save, exit code 75. A run that fails does not stop the rest: exit code 1 at the end. The table is in
DIR/runs.csv and runs.parquet (docs/sweep.md). With --emit nothing runs here: `python -m launch.tpu up --batch=F` runs it.
"""

import sys
from pathlib import Path

import jax

from maxlm import flags, start
from maxlm.sweep import design, emit, table
from maxlm.sweep import runs as of_sweep
from maxlm.sweep.runner import Runner

SWEEP = flags.DEFINE_string('sweep', '', 'the Python file with get_sweep(), and :arg for its argument')
WORKDIR = flags.DEFINE_string('workdir', '', 'where the runs are, each in a directory of its name (default: runs/<file>)')
JOBS = flags.DEFINE_integer('jobs', 1, 'runs at a time; here each has its part of the cores')
EMIT = flags.DEFINE_enum('emit', None, ['launch'], 'train nothing: write launches on TPU slices to --out')
OUT = flags.DEFINE_string('out', '', 'file of the launches')
COLLECT = flags.DEFINE_bool('collect', False, 'train nothing: write the table of what is there')


def main(words: list[str]) -> int:
  if not SWEEP.value:
    raise ValueError('say which sweep: --sweep=configs/sweeps/x.py')
  if JOBS.value < 1:
    raise ValueError(f'--jobs={JOBS.value} must be at least 1')
  if bool(EMIT.value) != bool(OUT.value) or words and not EMIT.value:
    raise ValueError('--emit=launch, --out=F and flags for the launcher after -- go together')
  jax.config.update('jax_platforms', 'cpu')  # devices are for the runs
  runs = of_sweep.load(SWEEP.value)
  workdir = WORKDIR.value or f'runs/{Path(SWEEP.value.partition(":")[0]).stem}'
  if not COLLECT.value:
    for line in design.advice(runs):
      print('note:', line, file=sys.stderr)
  if EMIT.value:
    written = emit.emit(SWEEP.value, runs, workdir, JOBS.value, words, Path(OUT.value))
    print(f'{len(runs)} launches; in this order, each when the one before it is through:')
    print('\n'.join(f'  python -m launch.tpu up --batch={path} --bucket=gs://… --zones=…' for path in written))
    return 0
  if '://' in workdir:
    raise ValueError(f'--workdir={workdir}: mount the bucket (gcsfuse) and give the path; --emit=launch takes it as it is')
  workdir = Path(workdir)
  if COLLECT.value:
    return finish(runs, workdir, 0)
  with start.held(workdir), Runner(SWEEP.value, runs, workdir, JOBS.value) as runner:
    return finish(runs, workdir, runner.run())


def finish(runs: list[of_sweep.Run], workdir: Path, code: int) -> int:
  """Writes the table and says what is in it."""
  if not workdir.is_dir():
    raise FileNotFoundError(f'{workdir} is not there: without --collect the sweep is run in it')
  rows = table.collect(runs, workdir)
  paths = table.write(rows, workdir)
  print('\n'.join(table.for_people(rows)))
  counts = {status: sum(row['status'] == status for row in rows) for status in ('finished', 'running', 'failed', 'missing')}
  print(f'{", ".join(f"{n} {status}" for status, n in counts.items() if n)}: {" and ".join(map(str, paths))}')
  return code


if __name__ == '__main__':
  flags.run(main, words=True)
