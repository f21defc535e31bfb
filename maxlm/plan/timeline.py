"""Draws a scheduled step as SVG: the step as a whole, then one round of each loop that takes part of it, a lane a resource.

No library: a page of HTML, or the SVG alone. Names and times show under the pointer.
"""

from html import escape

from maxlm.plan.schedule import Bar, Span

WIDTH, LEFT, LANE, GAP = 1200, 150, 22, 6  # pixels
SHOWN = 0.02  # of the step: loops that take less have no panel of their own
COLOURS = {'forward': '#4878a8', 'recomputed': '#e0a030', 'backward': '#7a5aa0', 'kernel': '#3f9060', 'link': '#c8503c',
           'copies': '#9a9a9a', 'loop': '#dfe6ee'}
LEGEND = {'forward': 'forward', 'recomputed': 'recomputed', 'backward': 'backward', 'kernel': 'kernels', 'link': 'wires',
          'copies': 'copies, sparse cores'}


def page(span: Span, title: str) -> str:
  """An HTML page with the picture."""
  return (f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
          f'<body style="margin:24px;font-family:sans-serif">\n{svg(span, title)}\n</body>\n')


def svg(span: Span, title: str) -> str:
  """The picture. All times are compiler-estimated."""
  panels, y = [], 64
  for heading, panel in [(f'the step: {_time(span.seconds)}', span), *_rounds(span, span.seconds)]:
    drawn, height = _panel(heading, panel, y)
    panels.append(drawn)
    y += height
  legend = ''.join(f'<rect x="{LEFT + i * 150}" y="34" width="12" height="12" fill="{COLOURS[key]}"/>'
                   f'<text x="{LEFT + i * 150 + 18}" y="45" font-size="12">{text}</text>'
                   for i, (key, text) in enumerate(LEGEND.items()))
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
          f'font-family="sans-serif">\n<rect width="{WIDTH}" height="{y}" fill="white"/>\n'
          f'<text x="8" y="20" font-size="16">{escape(title)} (compiler-estimated)</text>\n{legend}\n'
          + '\n'.join(panels) + '\n</svg>')


def _rounds(span: Span, total: float) -> list[tuple[str, Span]]:
  """(heading, body) of each loop that is worth a panel, and of those inside it."""
  found = []
  for bar in span.bars:
    if bar.body is not None and bar.seconds >= SHOWN * total:
      found.append((f'one round of {bar.trips}, {_contents(bar)}: {_time(bar.body.seconds)}', bar.body))
      found += _rounds(bar.body, total / bar.trips)
  return found


def _contents(bar: Bar) -> str:
  """What a loop does: the parts of the model that take most of it."""
  parts = [part for part, seconds in bar.body.parts.most_common(3) if seconds >= 0.1 * bar.body.seconds]
  return ' + '.join(sorted(parts)) or bar.part


def _panel(heading: str, span: Span, y: int) -> tuple[str, int]:
  """The lanes of a span from y on, and their height."""
  lanes = _lanes(span)
  scale = (WIDTH - LEFT - 16) / max(span.seconds, 1e-12)
  parts = [f'<text x="8" y="{y + 14}" font-size="13" font-weight="bold">{escape(heading)}</text>']
  y += 24
  bottom = y + len(lanes) * (LANE + GAP)
  for i in range(11):
    x = LEFT + i / 10 * span.seconds * scale
    anchor = 'end' if i == 10 else 'middle'
    parts.append(f'<line x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{bottom}" stroke="#e4e4e4"/>'
                 f'<text x="{x:.1f}" y="{bottom + 12}" font-size="10" text-anchor="{anchor}" fill="#666">'
                 f'{_time(i / 10 * span.seconds)}</text>')
  for i, (lane, bars) in enumerate(lanes.items()):
    top = y + i * (LANE + GAP)
    parts.append(f'<text x="{LEFT - 8}" y="{top + 15}" font-size="12" text-anchor="end">{escape(lane)}</text>')
    parts += [_bar(bar, top, scale) for bar in bars if bar.seconds * scale >= 0.15]
  return '\n'.join(parts), bottom - y + 24 + 36


def _lanes(span: Span) -> dict[str, list[Bar]]:
  """Bars by lane: the core first, with loops and kernels in it; then wires, each dimension its own; then copies."""
  lanes = {'core': []}
  for bar in span.bars:
    if bar.lane in ('core', 'loop', 'kernel'):
      lanes['core'].append(bar)
  for name in sorted({dim for bar in span.bars if _is_wires(bar) for dim in bar.lane.split()}):
    lanes[f'wires {name}'] = [bar for bar in span.bars if _is_wires(bar) and name in bar.lane.split()]
  for name in ('sparse core', 'copies', 'host'):
    if bars := [bar for bar in span.bars if bar.lane == name]:
      lanes[name] = bars
  return lanes


def _is_wires(bar: Bar) -> bool:
  return bar.lane not in ('core', 'loop', 'kernel', 'sparse core', 'copies', 'host', 'none')


def _bar(bar: Bar, top: int, scale: float) -> str:
  x, width = LEFT + bar.start * scale, max(0.4, bar.seconds * scale)
  rounds = f'{bar.trips} x ' if bar.body is not None else ''
  label = f'{bar.trips} x ({_contents(bar)})' if bar.body is not None else bar.name if bar.lane == 'kernel' else bar.part
  shown = escape(label) if len(label) * 6.5 < width - 6 else escape(label.partition(',')[0]) if width > 60 else ''
  text = f'<text x="{x + 4:.1f}" y="{top + 15}" font-size="11" fill="{_ink(bar)}">{shown}</text>' if shown else ''
  height = LANE if bar.lane in ('core', 'loop', 'kernel') else LANE - 4
  return (f'<g><title>{escape(bar.name)}: {rounds}{escape(bar.part)}, {_time(bar.seconds)}</title>'
          f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{height}" fill="{_colour(bar)}" stroke="white" '
          f'stroke-width="{0.5 if width > 3 else 0}"/>{text}</g>')


def _colour(bar: Bar) -> str:
  if bar.lane == 'core':
    return COLOURS[bar.part.rpartition(', ')[2] if ', ' in bar.part else 'forward']
  if _is_wires(bar):
    return COLOURS['link']
  return COLOURS.get(bar.lane, COLOURS['copies'])


def _ink(bar: Bar) -> str:
  return '#222' if bar.lane == 'loop' else 'white'


def _time(seconds: float) -> str:
  for unit, size in (('s', 1.0), ('ms', 1e-3)):
    if seconds >= size:
      return f'{seconds / size:.3g} {unit}'
  return f'{seconds * 1e6:.3g} us'
