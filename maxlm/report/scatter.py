"""Points, curves with bands, and maps over two axes: figures of HTML with the looks of `maxlm.report.charts`, no script.

Unlike a line of a run, points come in any order and each has a tooltip of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.pages import escape
from maxlm.report.charts import HEIGHT, WIDTH, Scale, axes, points

RAMP = 10  # colours of what is ordered, such as budgets: classes r0 … r9
STYLE = ''.join(f'.r{i} {{ color: color-mix(in oklch increasing hue, var(--s4), var(--s1) {100 * i / (RAMP - 1):.0f}%); }}\n'
                for i in range(RAMP)) + """
.chart path.dots { stroke-width: 7; }
.chart path.dots:hover { stroke: var(--ink); }
.chart path.dots.ring { stroke-width: 10; }
.chart path.hole { stroke: var(--back); stroke-width: 5.5; pointer-events: none; }
.chart path.cloud { stroke-width: 4; opacity: 0.5; }
.chart path.band { stroke: none; }
.chart path.far { stroke-dasharray: 5 4; }
.chart path.cells { fill: currentColor; stroke: none; shape-rendering: crispEdges; }
"""
PAD = 0.04  # of the span, around what is drawn
LEVELS = 12  # of a map


@dataclasses.dataclass(kw_only=True, slots=True)
class Dots:
  """tips: the tooltip of each; without them they are one cloud, as where there are a thousand. colour: a class of STYLE,
  here or in `charts`. ring: hollow."""

  x: np.ndarray
  y: np.ndarray
  tips: Sequence[str] = ()
  colour: str = 'c0'
  ring: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class Curve:
  """x rises. low, high: of the band around it. colour: 'faint' has none, 'c0 far' is dashed, as beyond the data."""

  x: np.ndarray
  y: np.ndarray
  low: np.ndarray | None = None
  high: np.ndarray | None = None
  colour: str = 'c0'


def scatter(title: str, dots: Sequence[Dots], curves: Sequence[Curve] = (), *, x_label: Callable[[float], str],
            y_label: Callable[[float], str], log_x: bool = False, log_y: bool = False, tall: bool = False) -> str:
  """A figure; '' where nothing has a number. title: HTML. x_label, y_label: how to say a value."""
  banded = [one for one in curves if one.low is not None]
  xs = np.concatenate([one.x for one in (*dots, *curves)])
  ys = np.concatenate([*(one.y for one in (*dots, *curves)), *(end for one in banded for end in (one.low, one.high))])
  if not (np.isfinite(xs).any() and np.isfinite(ys).any()):
    return ''
  x, y = scale_of(xs, log_x), scale_of(ys, log_y)
  bands = ''.join(f'<path class="{one.colour} band" d="M{points(x(one.x), y(one.high))}L'
                  f'{points(x(one.x)[::-1], y(one.low)[::-1])}Z"/>' for one in banded)
  lines = ''.join(f'<path class="{one.colour}" d="M{points(x(one.x), y(one.y))}"/>' for one in curves)
  marks = ''.join(_dots(one, x, y) for one in dots)
  return figure(title, bands + lines + marks, x, y, x_label, y_label, tall)


def heat(title: str, x: np.ndarray, y: np.ndarray, values: np.ndarray, dots: Sequence[Dots] = (), *,
         x_label: Callable[[float], str], y_label: Callable[[float], str], say: Callable[[float], str]) -> str:
  """A map of values [len(y), len(x)], above 0, over the centres x, y of its cells: strongest where they are least, by their
  logarithms. say: how to say a value, in the tooltip of each of its levels."""
  across, up = (Scale(v[0] - (v[1] - v[0]) / 2, v[-1] + (v[1] - v[0]) / 2) for v in (x, y))
  edges = np.geomspace(values.min(), values.max() * (1 + 1e-9), LEVELS + 1)
  level = np.clip(np.searchsorted(edges, values, side='right') - 1, 0, LEVELS - 1)
  wide, high, cells = WIDTH / len(x), HEIGHT / len(y), ''
  for i in range(LEVELS):
    rows, columns = np.nonzero(level == i)
    d = ''.join(f'M{c * wide:.1f} {HEIGHT - (r + 1) * high:.1f}h{wide:.1f}v{high:.1f}h{-wide:.1f}z'
                for r, c in zip(rows.tolist(), columns.tolist()))
    if d:
      cells += (f'<path class="c0 cells" opacity="{1 - i / LEVELS:.2f}" d="{d}">'
                f'<title>{escape(say(float(edges[i])))} to {escape(say(float(edges[i + 1])))}</title></path>')
  return figure(title, cells + ''.join(_dots(one, across, up) for one in dots), across, up, x_label, y_label, True)


def figure(title: str, drawn: str, x: Scale, y: Scale, x_label, y_label, tall: bool) -> str:
  grid, under = axes(x, y, x_label, y_label, tall)
  return (f'<figure><figcaption>{title}</figcaption><div class="chart{" tall" * tall}">{grid}<svg class="open" '
          f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{drawn}</svg></div>{under}</figure>')


def scale_of(values: np.ndarray, is_log: bool) -> Scale:
  """One that has room for all numbers among them."""
  values = values[np.isfinite(values) & (values > 0 if is_log else True)]
  low, high = float(values.min()), float(values.max())
  if is_log:
    pad = max((high / low) ** PAD, 1.02)
    return Scale(low / pad, high * pad, True)
  pad = PAD * (high - low) or 0.05 * abs(low) or 1.0
  return Scale(low - pad, high + pad)


def ramp(i: int, n: int) -> str:
  """The colour of the i-th of n that are ordered."""
  return f'r{round(i * (RAMP - 1) / max(n - 1, 1))}'


def _dots(dots: Dots, x: Scale, y: Scale) -> str:
  at = np.isfinite(x(dots.x)) & np.isfinite(y(dots.y))
  places = points(x(dots.x)[at], y(dots.y)[at]).split('L') if at.any() else []
  if not len(dots.tips):
    return f'<path class="{dots.colour} dots cloud" d="{"".join(f"M{place}h0" for place in places)}"/>' * bool(places)
  kind = dots.colour + ' ring' * dots.ring
  tips = [tip for tip, shown in zip(dots.tips, at) if shown]
  return ''.join(f'<path class="{kind} dots" d="M{place}h0"><title>{escape(tip)}</title></path>'
                 + f'<path class="hole" d="M{place}h0"/>' * dots.ring for place, tip in zip(places, tips))
