"""The runs that a law is fitted to, read from the table of a sweep or from any CSV.

    points = points.read('runs/sweep')                                      # runs.parquet or runs.csv in it
    points = points.read('x.csv', columns={'params': 'Model Size', 'flops': 'Training FLOP'})
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

COUNTS = 'params', 'params_non_embedding', 'params_active'
GAP, TIGHT = 1.25, 1.5  # budgets are this far apart; the FLOPs of one lie within this factor
BIN = 10 ** .5  # where they do not


@dataclass(frozen=True, slots=True)
class Points:
  """M finished runs. n: parameters, d: tokens, loss: of the target, flops, budget: FLOPs that stand for the run's group
  (the geometric mean), all [M] float64. cluster [M]: runs with one trunk share it. isoflop: whether budgets are compute
  budgets, or half decades of runs with compute of any size. left_out: rows that are not
  finished, and trunks."""
  n: np.ndarray
  d: np.ndarray
  loss: np.ndarray
  flops: np.ndarray
  budget: np.ndarray
  cluster: np.ndarray
  name: np.ndarray
  tokenizer: np.ndarray
  target: str
  isoflop: bool
  left_out: int

  @property
  def flops_per_nd(self) -> float:
    """FLOPs a parameter and token at the largest budget: 6 where FLOPs are 6ND, other where attention is counted."""
    last = self.budget == self.budget.max()
    return float(np.median((self.flops / self.n / self.d)[last]))


def read(path, count: str = 'params', target: str = 'loss', columns: dict[str, str] | None = None) -> Points:
  """Reads runs.csv, runs.parquet, or a directory with one of them. count: the column of parameters; target: of the loss.

  columns: the name that a file has for a column, by ours: params (any count), tokens, flops, loss (any target), name,
  status, branch_of, tokenizer. Of tokens and flops one may lack: flops = 6 N D. Rows whose status is not 'finished' are
  left out, and so are trunks that others leave. Raises ValueError naming the columns that lack, and for a value that is
  no number.
  """
  rows = _rows(Path(path))
  columns = columns or {}
  named = {'params': count, 'loss': target, **columns}
  has = set(rows[0]) if rows else set()
  lacking = [named[key] for key in ('params', 'loss') if named[key] not in has]
  if columns.get('tokens', 'tokens') not in has and columns.get('flops', 'flops') not in has:
    lacking.append('tokens (or flops)')
  if lacking:
    raise ValueError(f'{path} has no column {", ".join(lacking)}: name it with --columns=ours=theirs; '
                     f'it has {", ".join(sorted(has)) or "no rows"}')

  def text(key: str, otherwise: str) -> list[str]:
    key = named.get(key, key)
    return [str(row[key]) if row.get(key) not in (None, '') else otherwise for row in rows]

  trunks = set(text('branch_of', ''))  # they end at a constant rate, where no loss of a whole run is
  kept = [status == 'finished' and name not in trunks
          for status, name in zip(text('status', 'finished'), text('name', 'a row'))]
  left_out = kept.count(False)
  rows = [row for row, keep in zip(rows, kept) if keep]

  def numbers(key: str) -> np.ndarray | None:
    name = named.get(key, key)
    if name not in has:
      return None
    try:
      return np.array([float(row[name]) if row[name] not in (None, '') else np.nan for row in rows])
    except ValueError as error:
      raise ValueError(f'{path}, column {name}: {error}') from None

  n, d, flops = numbers('params'), numbers('tokens'), numbers('flops')
  d = flops / (6 * n) if d is None else d
  flops = 6 * n * d if flops is None else flops
  names = text('name', '')
  names = [name or f'row {i}' for i, name in enumerate(names)]
  budget, isoflop = budgets(flops)
  return Points(n=n, d=d, loss=numbers('loss'), flops=flops, budget=budget, isoflop=isoflop,
                cluster=np.array([of or name for name, of in zip(names, text('branch_of', ''))]), name=np.array(names),
                tokenizer=np.array(text('tokenizer', '')), target=named['loss'], left_out=left_out)


def budgets(flops) -> tuple[np.ndarray, bool]:
  """(budget [M], isoflop): FLOPs parted where they leave a gap; in half decades if that leaves groups that are too wide."""
  log = np.log(np.where(np.asarray(flops) > 0, flops, np.nan))
  if not np.isfinite(log).all() or not log.size:
    return np.exp(log), False  # alarms.check says what is wrong
  order = np.argsort(log)
  group = np.empty(len(log), int)
  group[order] = np.concatenate([[0], np.cumsum(np.diff(log[order]) > np.log(GAP))])
  tight = all(np.ptp(log[group == g]) <= np.log(TIGHT) for g in np.unique(group))
  if not tight:
    group = np.floor((log - log.min()) / np.log(BIN)).astype(int)
  return np.array([np.exp(log[group == g].mean()) for g in group]), tight


def _rows(path: Path) -> list[dict]:
  if path.is_dir():
    found = [path / name for name in ('runs.csv', 'runs.parquet') if (path / name).is_file()]
    if not found:
      raise ValueError(f'{path} has no runs.csv: collect it first, python -m maxlm.sweep --collect')
    path = found[0]
  if path.suffix == '.parquet':
    try:
      import pyarrow.parquet as pq
    except ImportError:
      raise ValueError("a .parquet file is read with pyarrow: pip install 'maxlm[data]', or give the .csv") from None
    return pq.read_table(path).to_pylist()
  with path.open(newline='') as file:
    return list(csv.DictReader(file))
