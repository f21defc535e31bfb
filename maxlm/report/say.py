"""How the page says values."""

import datetime
import math
import re

from maxlm.metrics import duration, si


def count(n: float) -> str:
  """As the progress line has it: 12.3k; above 10^12 too."""
  return f'{n / 1e12:.3g}T' if n >= 0.9995e12 else si(n) if n >= 1000 else f'{n:,.0f}'


def value(v: float) -> str:
  return 'no number' if not math.isfinite(v) else f'{v:.4g}' if abs(v) < 1000 else count(v) if v > 0 else f'{v:,.0f}'


def tick(v: float) -> str:
  if v == 0 or v >= 1000:
    return count(v)
  return f'{v:.3g}' if abs(v) >= 0.001 else f'{v:.1e}'.replace('.0e', 'e').replace('e-0', 'e-')


def share(v: float) -> str:
  return f'{100 * v:.3g} %'


def time_ticks(seconds: float) -> list[float]:
  """Places on an axis of time, up to eight, that are easy to say."""
  steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)
  step = next((step for step in steps if seconds <= 6 * step), 86400 * math.ceil(seconds / 6 / 86400))
  return [float(i * step) for i in range(math.floor(seconds / step) + 1)]


def clock(seconds: float) -> str:
  """'1h 30m' where there are two units, '5m' where the second has nothing."""
  return re.sub(r' 0+[a-z]$', '', duration(seconds)) if seconds else '0'


def moment(seconds: float) -> str:
  return f'{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC'


def name_of(name: str) -> str:
  """'tokens_per_second' as words."""
  return name.replace('_', ' ')
