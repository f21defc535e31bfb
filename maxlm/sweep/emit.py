"""A sweep as launches on TPU slices, which `python -m launch.tpu up --batch=F` runs, some at a time.

The first line of F is {"max_running": N}, each other one {"name": …, "args": […]}: what `launch.tpu up` is told of that run,
after `--` what maxlm.train is.
"""

import json
import re
from pathlib import Path

from maxlm import stages
from maxlm.start import write_atomically
from maxlm.sweep.runs import Run


def emit(sweep: str, runs: list[Run], workdir: str, max_running: int, words: list[str], out: Path) -> list[Path]:
  """Writes the launches and returns the files in the order in which they are to be launched: runs that leave others are in
  the second, for they begin with checkpoints of the first.

  workdir: gs://BUCKET/runs, where launched runs are. words: flags for all launches, before those of the run. ValueError for
  a run that the slice cannot train, and for a name that no slice can have.
  """
  files = {out: [run for run in runs if run.branch is None],
           out.with_name(f'{out.stem}.branches{out.suffix}'): [run for run in runs if run.branch is not None]}
  for path, members in files.items():
    lines = [{'max_running': max_running}, *(line_of(sweep, run, workdir, words) for run in members)]
    if members:
      write_atomically(path, ''.join(json.dumps(line) + '\n' for line in lines))
  return [path for path, members in files.items() if members]


def line_of(sweep: str, run: Run, workdir: str, words: list[str]) -> dict:
  """One launch."""
  if not re.fullmatch(r'[a-z][a-z0-9-]{0,38}[a-z0-9]', run.name):
    raise ValueError(f'{sweep}: {run.name} cannot be launched: a name has up to 40 of a-z, 0-9 and -, and begins '
                     'with a letter')
  pod = run.experiment.pod
  if pod:
    try:
      stages.check(run.settled, 'tpu', run.experiment.pod_devices)
    except ValueError as error:
      raise ValueError(f'{sweep}: {run.name} on {pod}: {error}') from error
  if run.branch is not None and not workdir.startswith('gs://'):
    raise ValueError(f'--workdir={workdir}: say where the launched runs are, --workdir=gs://BUCKET/runs: {run.name} leaves '
                     'one of them')
  config, _, *trained = run.arguments(sweep, workdir)  # the launcher gives the workdir
  tpu = [f'--tpu={pod}'] if pod and not any(word.startswith('--tpu') for word in words) else []
  return {'name': run.name, 'args': [*words, config, *tpu, *(['--', *trained] if trained else [])]}
