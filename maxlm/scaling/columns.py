"""What every law asks of its data before it is fitted."""

import numpy as np


def columns(least: int, *values) -> list[np.ndarray]:
  """Each as float64 [M]. ValueError unless they are as long, finite, positive, and at least so many."""
  found = [np.atleast_1d(np.asarray(value, np.float64)) for value in values]
  sizes = [len(column) for column in found]
  if len({*sizes}) > 1 or sizes[0] < least:
    raise ValueError(f'columns of {", ".join(map(str, sizes))} points: give each as many, {least} or more')
  if not all(np.all(np.isfinite(column) & (column > 0)) for column in found):
    raise ValueError('a value is not finite or not positive: drop the runs that failed')
  return found
