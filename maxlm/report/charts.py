"""Line charts for pages of HTML: an SVG that stretches with the page, and labels beside it that do not.

No script: what a chart says at a place is the tooltip of a column of it. A line of many points is drawn from as many as the
chart has room for: its smoothed course, and behind it a band from the lowest to the highest value of each bucket, so that
no peak is lost. A value that is no number is a gap with a mark above it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np

from data_pipeline.pages import escape

COLOURS = 8  # of STYLE; then they begin again, dashed
ROOM, COLUMNS = 320, 48  # buckets of a line, columns with a tooltip
WIDTH, HEIGHT = 1000, 300  # of the drawing, which is stretched
LABEL = 0.08  # of the width: what the name of a stage takes
SMOOTH = 0.01  # of a line's points: how far an average reaches
BEGIN = 0.02  # of the width: what falls from high up there may leave the chart at its top
FAR = 1.5  # of the height of what most values of a band have: what lies further off leaves the chart too
STYLE = """
.c0 { color: var(--s4); } .c1 { color: var(--s1); } .c2 { color: var(--kept); } .c3 { color: var(--s2); }
.c4 { color: var(--s6); } .c5 { color: var(--s5); } .c6 { color: var(--s7); } .c7 { color: var(--s0); }
.lines i { background: currentColor; }
.lines i.dashed { background: repeating-linear-gradient(90deg, currentColor 0 4px, transparent 4px 6px); }
.chart { position: relative; height: 190px; margin: 12px 14px 0 56px; border-bottom: 1px solid var(--soft); }
.tall { height: 320px; }
.chart svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.chart svg.open { overflow: visible; }
.chart path { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.chart path.band { fill: currentColor; stroke-width: 0.8; opacity: 0.26; }
.chart path.dots { stroke-width: 6; }
.chart path.dashed { stroke-dasharray: 5 4; }
.chart path.faint { stroke: var(--soft); stroke-dasharray: 2 4; stroke-width: 1.2; }
.chart rect { fill: transparent; }
.chart rect:hover { fill: var(--ink); opacity: 0.1; }
.chart u { position: absolute; left: 0; right: 0; border-top: 1px solid var(--line); text-decoration: none; }
.chart u span { position: absolute; right: 100%; top: -9px; padding-right: 6px; font-size: 11px; color: var(--soft);
  white-space: nowrap; }
.chart s { position: absolute; top: 0; bottom: 0; border-left: 1px dashed var(--soft); text-decoration: none; }
.chart s span { position: absolute; left: 4px; top: -2px; font-size: 11px; color: var(--soft); white-space: nowrap; }
.chart s.late span { left: auto; right: 4px; }
.chart em { position: absolute; width: 9px; margin-left: -4px; font: 9px/9px system-ui, sans-serif; text-align: center;
  color: var(--soft); cursor: default; z-index: 1; }
.chart em.bad { color: var(--bad); }
.chart em.above { top: -2px; } .chart em.below { bottom: -10px; }
.under { position: relative; height: 30px; margin: 0 14px 0 56px; font-size: 11px; color: var(--soft); }
.under span { position: absolute; top: 10px; transform: translateX(-50%); white-space: nowrap; }
.under span.last { transform: translateX(-100%); }
"""


@dataclasses.dataclass(kw_only=True, slots=True)
class Line:
  """x rises. smooth: the average of the last values is drawn, instead of each. band: behind it, how far they go. faint: for
  comparison, without a colour of its own. left_out: which of the values the average is not of."""

  name: str
  x: np.ndarray
  y: np.ndarray
  colour: int = 0
  smooth: bool = False
  band: bool = False
  dots: bool = False
  faint: bool = False
  left_out: np.ndarray | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class Mark:
  """Something that happened at x. kind: 'line' (through the chart, with its text), 'above' or 'below' (a sign with a
  tooltip). bad: it went wrong."""

  x: float
  text: str
  kind: str
  bad: bool = False


@dataclasses.dataclass(slots=True)
class Scale:
  """From values to parts of the chart, from its left or its lower end."""

  low: float
  high: float
  is_log: bool = False

  def __call__(self, value):
    if self.is_log:
      with np.errstate(divide='ignore', invalid='ignore'):
        return (np.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
    return (np.asarray(value, np.float64) - self.low) / (self.high - self.low)

  def ticks(self, n: int) -> list[float]:
    """About n values that are easy to say."""
    if self.is_log:
      tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
      factors = (1,) if len(tens) > 3 else (1, 3) if len(tens) == 3 else (1, 2, 5)
      found = [m * 10.0**k for k in tens for m in factors if self.low <= m * 10.0**k <= self.high]
      if len(found) > 2 or self.high > 10 * self.low:
        return found[::math.ceil(len(found) / (n + 2))]
    step = nice_step(self.high - self.low, n)
    first = math.ceil(self.low / step - 1e-9)
    return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(span: float, n: int) -> float:
  """The least of 1, 2, 5 times a power of ten of which not more than n fit into the span."""
  ten = 10.0 ** math.floor(math.log10(span / n))
  return next(m * ten for m in (1, 2, 5, 10) if m * ten * n >= span * 0.999)


def smoothed(y: np.ndarray, left_out: np.ndarray | None = None) -> np.ndarray:
  """The average of the values around each, with weights that fall to 1/e over SMOOTH of them all to either side; at the end
  that is the exponential moving average. A value that is no number has no weight, and is none here either. left_out: of the
  values, which have no weight."""
  whole = np.isfinite(y)
  weights = whole if left_out is None else whole & ~left_out
  keep = math.exp(-1 / max(1.0, SMOOTH * len(y)))
  both = np.stack([np.where(weights, y, 0.0), weights.astype(np.float64)])  # sums, and what they weigh
  sums = decayed(both, keep) + decayed(both[:, ::-1], keep)[:, ::-1] - both
  with np.errstate(invalid='ignore'):
    return np.where(whole & (sums[1] > 0), sums[0] / sums[1], math.nan)


def decayed(values: np.ndarray, keep: float) -> np.ndarray:
  """Of [2, n]: sums along n, in which each place leaves `keep` of what came before it."""
  out, one, other = np.empty_like(values), 0.0, 0.0
  for i, (a, b) in enumerate(values.T.tolist()):
    one, other = keep * one + a, keep * other + b
    out[0, i], out[1, i] = one, other
  return out


def buckets(x: np.ndarray, low: float, high: float, n: int) -> np.ndarray:
  """Where in x each of up to n buckets of equal width begins that has a point."""
  place = np.clip(((x - low) / (high - low) * n).astype(np.int64), 0, n - 1)
  return np.flatnonzero(np.diff(place, prepend=-1))


def envelope(y: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(lowest, highest) number of each bucket; NaN where it has none."""
  finite = np.where(np.isfinite(y), y, math.nan)
  return np.fmin.reduceat(finite, starts), np.fmax.reduceat(finite, starts)


def chart(title: str, lines: Iterable[Line], *, x_label: Callable[[float], str], y_label: Callable[[float], str],
          marks: Iterable[Mark] = (), x_end: float | None = None, tall: bool = False, floor: float | None = None,
          top: float | None = None, x_ticks: list[float] | None = None, log: bool = False, log_x: bool = False) -> str:
  """A figure of HTML; '' where no line has a number. title: HTML. x_end: where the x axis ends, if later than the lines.
  floor, top: where the y axis begins and ends (None: where the values do). log: a y axis of powers, if all values are above
  0 and span more than a factor of 20."""
  lines = [line for line in lines if np.isfinite(line.y).any()]
  if not lines:
    return ''
  x = x_scale(lines, x_end, log_x)
  drawn = [smoothed(line.y, line.left_out) if line.smooth or line.band else line.y for line in lines]
  y, above = y_scale(lines, drawn, x, floor, top, log)
  paths = ''.join(path_of(line, course, x, y) for line, course in zip(lines, drawn))
  grid, under = axes(x, y, x_label, y_label, tall, x_ticks)
  more = f' <small>(up to {escape(y_label(above))})</small>' if above is not None else ''
  is_open = '' if any(line.smooth or line.band for line in lines) else ' class="open"'
  told = '; '.join(f'{line.name or "it"} from {y_label(ends[0])} to {y_label(ends[1])}' for line, course in
                   list(zip(lines, drawn))[:8] if (ends := course[np.isfinite(course)][[0, -1]]) is not None)
  nans = [Mark(x=float(line.x[i]), text=f'{line.name}: no number at {x_label(float(line.x[i]))}', kind='above', bad=True)
          for line in lines if not line.faint for i in np.flatnonzero(~np.isfinite(line.y)).tolist()]
  return (f'<figure role="img" aria-label="{escape(told)}"><figcaption>{title}{more}</figcaption>'
          f'<div class="chart{" tall" * tall}">{grid}'
          f'<svg{is_open} viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{paths}'
          f'{tooltips(lines, drawn, x, x_label, y_label)}</svg>{signs([*marks, *nans], x, tall)}</div>{under}</figure>')


def axes(x: Scale, y: Scale, x_label, y_label, tall: bool, x_ticks: list[float] | None = None) -> tuple[str, str]:
  """The lines of a chart with what they stand for, and what is written under it."""
  grid = ''.join(f'<u style="bottom:{100 * y(v):.2f}%"><span>{escape(y_label(v))}</span></u>'
                 for v in y.ticks(5 if tall else 4))
  places = x.ticks(8 if tall else 6) if x_ticks is None else x_ticks
  under = ''.join(f'<span{" class=last" * (p > 0.93)} style="left:{100 * p:.2f}%">{escape(x_label(v))}</span>'
                  for p, v in zip((float(x(v)) for v in places), places))
  return grid, f'<div class="under">{under}</div>'


def x_scale(lines: list[Line], x_end: float | None, log_x: bool) -> Scale:
  low = min(float(line.x[0]) for line in lines)
  high = max(x_end or low, *(float(line.x[-1]) for line in lines))
  if not log_x and low < 0.5 * high:
    low = 0.0
  return Scale(low, high if high > low else low + 1.0, log_x and high > low > 0)


def y_scale(lines: list[Line], drawn: list[np.ndarray], x: Scale, floor: float | None, top: float | None,
            log: bool) -> tuple[Scale, float | None]:
  """The y axis, and the highest value where it does not reach that: at the beginning of a band, or of a rare peak."""
  lows, highs, highest = [], [], []
  for line, course in zip(lines, drawn):
    of_all = line.y[np.isfinite(line.y)]
    if line.smooth or line.band:
      late = x(line.x) >= min(BEGIN, float(x(line.x[-1])) / 2)
      seen = line.y if line.band else course
      late = late if np.isfinite(seen[late]).any() else np.isfinite(seen)
      low, high = envelope(seen[late], buckets(x(line.x[late]), 0.0, 1.0, ROOM))
      low, high = low[np.isfinite(low)], high[np.isfinite(high)]
      middle = np.quantile(low, 0.1), np.quantile(high, 0.9)
      reach = FAR * (middle[1] - middle[0])
      highs.append(high[high <= middle[1] + reach].max())
      lows.append(low[low >= middle[0] - reach].min())
      of_all = seen[np.isfinite(seen)]
    else:
      lows.append(of_all.min())
      highs.append(of_all.max())
    highest.append(of_all.max())
  low, high = float(min(lows)), float(max(highs))
  is_log = log and low > 0 and high / low > 20
  low = low if floor is None else min(floor, low)
  high = high if top is None else top
  if not high > low:
    low, high = low - 0.05 * abs(low) - 1e-12, high + 0.05 * abs(high) + 1e-12
  pad = 0.04 * (high - low)
  if is_log:
    scale = Scale(low / 1.15, high * 1.15, True)
  else:
    scale = Scale(low if floor is not None else low - pad, high if top is not None else high + pad)
  return scale, max(highest) if max(highest) > scale.high else None


def path_of(line: Line, course: np.ndarray, x: Scale, y: Scale) -> str:
  """The line of a chart as SVG."""
  kind = ' '.join([f'c{line.colour % COLOURS}', *['faint'] * line.faint, *['dashed'] * (line.colour >= COLOURS)])
  starts = buckets(x(line.x), 0.0, 1.0, ROOM)
  lasts = np.append(starts[1:], len(line.x)) - 1
  out = ''
  if line.band:
    low, high = envelope(line.y, starts)
    middle = x((line.x[starts] + line.x[lasts]) / 2)
    for part in runs_of(np.isfinite(low)):
      there = points(middle[part], y(high[part]))
      out += f'<path class="{kind} band" d="M{there}L{points(middle[part][::-1], y(low[part])[::-1])}"/>'
  if line.dots:
    whole = np.isfinite(course)
    out += ''.join(f'<path class="{kind} dots" d="M{place}h0"/>'
                   for place in points(x(line.x[whole]), y(course[whole])).split('L'))
  at = np.arange(len(course)) if len(course) <= ROOM else lasts
  for part in runs_of(np.isfinite(course[at])):
    out += f'<path class="{kind}" d="M{points(x(line.x[at][part]), y(course[at][part]))}{"h0" * (len(part) == 1)}"/>'
  return out


def points(x: np.ndarray, y: np.ndarray) -> str:
  """'x y L x y …' of parts of the chart."""
  x, y = x * WIDTH, (1 - np.clip(y, -1, 2)) * HEIGHT
  return 'L'.join(f'{a:.1f} {b:.1f}' for a, b in zip(x.tolist(), y.tolist()))


def runs_of(flags: np.ndarray) -> list[np.ndarray]:
  """The places of each stretch in which the flags are set."""
  places = np.flatnonzero(flags)
  return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if places.size else []


def tooltips(lines: list[Line], drawn: list[np.ndarray], x: Scale, x_label, y_label) -> str:
  """Columns of the chart, each of which says what the lines are there."""
  places = np.unique(np.concatenate([x(line.x) for line in lines if not line.faint] or [x(lines[0].x)]))
  if len(places) > COLUMNS:
    places = (np.arange(COLUMNS) + 0.5) / COLUMNS
  edges = [0.0, *((places[1:] + places[:-1]) / 2).tolist(), 1.0]
  out = []
  for left, right in zip(edges, edges[1:]):
    said, where = [], None
    for line, course in zip(lines, drawn):
      inside = np.flatnonzero((x(line.x) >= left) & (x(line.x) <= right))
      if inside.size and np.isfinite(course[inside]).any():
        last = inside[np.isfinite(course[inside])][-1]
        where = float(line.x[last]) if where is None else where
        text = f'{line.name} {y_label(float(course[last]))}'.strip()
        if line.band and inside.size > 1:
          text += f' ({y_label(float(np.nanmin(line.y[inside])))} to {y_label(float(np.nanmax(line.y[inside])))})'
        said.append(text)
    if said:
      out.append(f'<rect x="{left * WIDTH:.1f}" y="0" width="{(right - left) * WIDTH:.1f}" height="{HEIGHT}">'
                 f'<title>{escape(x_label(where))}\n{escape(chr(10).join(said))}</title></rect>')
  return ''.join(out)


def signs(marks: list[Mark], x: Scale, tall: bool) -> str:
  """Lines of stages, and signs above and below: of those at one place the first, with how many there are."""
  out, near, labelled = [], {}, -1.0
  for mark in sorted(marks, key=lambda mark: mark.x):
    place = float(x(mark.x))
    if not -1e-9 <= place <= 1 + 1e-9:
      continue
    if mark.kind == 'line':
      label = f'<span>{escape(mark.text)}</span>' * (tall and place - labelled > LABEL)
      labelled = place if label else labelled
      late = ' class="late"' * (place > 0.8)
      out.append(f'<s{late} style="left:{100 * place:.2f}%" title="{escape(mark.text)}">{label}</s>')
    else:
      near.setdefault((mark.kind, mark.bad, round(100 * place)), []).append((place, mark.text))
  for (kind, bad, _), found in near.items():
    more = f' and {len(found) - 1} more' * (len(found) > 1)
    out.append(f'<em class="{kind}{" bad" * bad}" style="left:{100 * found[0][0]:.2f}%" title="{escape(found[0][1])}{more}">'
               f'{"▼" if kind == "above" else "▲"}</em>')
  return ''.join(out)


def legend(names: list[str], first: int = 0) -> str:
  """What colours stand for; '' for one."""
  if len(names) < 2:
    return ''
  items = ''.join(f'<li><i class="c{i % COLOURS}{" dashed" * (i >= COLOURS)}"></i>{escape(name)}</li>'
                  for i, name in enumerate(names, first))
  return f'<ul class="legend lines">{items}</ul>'
