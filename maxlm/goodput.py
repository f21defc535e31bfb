"""Where the time of a run went, from its ledger: how much of it was training, and what the rest was.

    python -m maxlm.goodput WORKDIR [--json] [--plot=F.html]

docs/goodput.md says what the categories mean.
"""

import datetime
import json
from html import escape
from pathlib import Path
from typing import Any

from maxlm import flags, ledger
from maxlm.ledger import Account, Attempt
from maxlm.metrics import duration

JSON = flags.DEFINE_bool('json', False, 'print one JSON object instead of the table')
PLOT = flags.DEFINE_string('plot', '', 'file for a picture, .html or .svg: the time of the run, an attempt a lane')

WIDTH, LEFT, LANE, GAP = 1200, 150, 22, 6  # pixels
COLOURS = {'step': '#3f9060', 'lost': '#c8503c', 'data': '#e0a030', 'checkpoint': '#7a5aa0', 'evaluation': '#4878a8',
           'compile': '#5f8fc0', 'restore': '#a98bc8', 'init': '#8a9aac', 'finish': '#9fc0a8', 'idle': '#d8d8d8'}
LEAST = 1.5  # pixels: lines of an attempt are drawn together until they are that wide


def main(words: list[str]) -> int:
  if len(words) != 1:
    raise ValueError('say which run: python -m maxlm.goodput WORKDIR')
  if PLOT.value and not PLOT.value.endswith(('.html', '.svg')):
    raise ValueError(f'--plot={PLOT.value}: a picture is .html or .svg')
  path = Path(words[0]) / 'goodput.jsonl'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is not there: give the workdir of a run')
  account = ledger.read(path)
  if not account.wall:
    raise ValueError(f'{path} says nothing yet: the first lines come after some seconds')
  print(json.dumps(figures(account)) if JSON.value else table(account, words[0]))
  if PLOT.value:
    picture = svg(account, f'goodput of {words[0]}')
    Path(PLOT.value).write_text(picture if PLOT.value.endswith('.svg') else page(picture, f'goodput of {words[0]}'))
  return 0


def figures(account: Account) -> dict[str, Any]:
  """All that the table says, in seconds and Unix seconds."""
  return {'wall': account.wall, 'goodput': account.goodput, 'goodput_without_idle': account.goodput_without_idle,
          'seconds': account.seconds, 'shares': account.shares(), 'ignored_lines': account.ignored,
          'attempts': [{'attempt': attempt.name, 'start': attempt.start, 'end': attempt.end, 'resumed': attempt.resumed,
                        'done': attempt.done, 'how': attempt.how} for attempt in account.attempts],
          'events': account.events}


def table(account: Account, name: str) -> str:
  """What a person reads."""
  attempts = f'{len(account.attempts)} attempt{"s" * (len(account.attempts) != 1)}'
  lines = [f'{name}: {attempts}, {duration(account.wall)}',
           f'goodput {account.goodput:.1%}; {account.goodput_without_idle:.1%} without idle', '']
  seconds = sorted(account.seconds.items(), key=lambda item: -item[1])
  lines += [f'  {category:<12}{duration(value):>9}{value / account.wall:>8.1%}' for category, value in seconds if value]
  lines += ['', 'attempt   began (UTC)          took       steps                  ended']
  for attempt in account.attempts:
    began = datetime.datetime.fromtimestamp(attempt.start, datetime.UTC)
    steps = '' if attempt.resumed is None else f'{attempt.resumed:,} to {attempt.done:,}'
    lines.append(f'{attempt.name:<10}{began:%Y-%m-%d %H:%M:%S}  {duration(attempt.end - attempt.start):<10} {steps:<22} '
                 f'{attempt.how or ("killed" if attempt is not account.attempts[-1] else "not yet, or killed")}')
  if account.events:
    counts = {}
    for event in account.events:
      counts[event['event']] = counts.get(event['event'], 0) + 1
    lines += ['', 'events: ' + ', '.join(f'{count} x {kind}' for kind, count in counts.items())]
  if account.ignored:
    lines += ['', f'{account.ignored} lines could not be read: their time counts as idle']
  return '\n'.join(lines)


# -- the picture


def page(picture: str, title: str) -> str:
  """An HTML page with the picture."""
  return (f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
          f'<body style="margin:24px;font-family:sans-serif">\n{picture}\n</body>\n')


def svg(account: Account, title: str) -> str:
  """The whole run as one bar of its categories, then each attempt where it lies in time. Needs a wall time above 0."""
  room, wall = WIDTH - LEFT - 16, account.wall
  start = min(attempt.start for attempt in account.attempts)  # the clock may have been set back
  scale = room / max(wall, max(attempt.end for attempt in account.attempts) - start)
  lanes = [_lane('all, sorted', 84, _sorted_bar(account, room / wall))]
  y = 84 + LANE + 40
  for attempt in account.attempts:
    lanes.append(_lane(attempt.name, y, _attempt_bars(account, attempt, start, scale)))
    y += LANE + GAP
  marks = [f'<g><title>{escape(_fact(event))}</title><path d="M{LEFT + (event["at"] - start) * scale:.1f} 118 l4 -8 h-8 z" '
           f'fill="#222"/></g>' for event in account.events]
  anchors = [*['middle'] * 10, 'end']
  ruler = [f'<text x="{LEFT + i / 10 * room:.0f}" y="{y + 10}" font-size="10" text-anchor="{anchor}" fill="#666">'
           f'{duration(i / 10 * room / scale)}</text>' for i, anchor in enumerate(anchors)]
  legend = [f'<rect x="{LEFT + i * 100}" y="34" width="12" height="12" fill="{colour}"/>'
            f'<text x="{LEFT + i * 100 + 18}" y="45" font-size="12">{category}</text>'
            for i, (category, colour) in enumerate(COLOURS.items())]
  summary = f'{duration(wall)}, goodput {account.goodput:.1%}, {account.goodput_without_idle:.1%} without idle'
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" viewBox="0 0 {WIDTH} {y + 24}" '
          f'font-family="sans-serif">\n<rect width="{WIDTH}" height="{y + 24}" fill="white"/>\n'
          f'<text x="8" y="20" font-size="16">{escape(title)}: {summary}</text>\n'
          + '\n'.join([*legend, *lanes, *marks, *ruler]) + '\n</svg>')


def _sorted_bar(account: Account, scale: float) -> list[tuple[float, float, str, str]]:
  """(x, width, category, text) of each category of the run, in pixels."""
  bars, x = [], 0.0
  for category in COLOURS:
    seconds = account.seconds[category]
    bars.append((x, seconds * scale, category, f'{category}: {duration(seconds)}, {seconds / account.wall:.1%}'))
    x += seconds * scale
  return bars


def _attempt_bars(account: Account, attempt: Attempt, start: float, scale: float) -> list[tuple[float, float, str, str]]:
  """As of `_sorted_bar`: the lines of an attempt, neighbours drawn together where they are narrow."""
  spans = [span for span in account.spans if span.attempt == attempt.name]
  bars, seconds, x = [], {}, (attempt.start - start) * scale
  for i, span in enumerate(spans):
    for phase, value in {**span.seconds, 'lost': span.lost}.items():
      seconds[phase] = seconds.get(phase, 0.0) + value
    seconds['step'] = seconds.get('step', 0.0) - span.lost
    if sum(seconds.values()) * scale < LEAST and i + 1 < len(spans):
      continue
    for category in COLOURS:
      width = seconds.get(category, 0.0) * scale
      if width > 0:
        bars.append((x, width, category, f'{category}: {duration(seconds[category])}, to step {span.last:,}'))
        x += width
    seconds = {}
  return bars


def _lane(name: str, y: int, bars: list[tuple[float, float, str, str]]) -> str:
  label = f'<text x="{LEFT - 8}" y="{y + 15}" font-size="12" text-anchor="end">{escape(name)}</text>'
  return label + ''.join(
    f'<g><title>{escape(text)}</title><rect x="{LEFT + x:.2f}" y="{y}" width="{width:.2f}" height="{LANE}" '
    f'fill="{COLOURS[category]}"/></g>' for x, width, category, text in bars if width > 0.02)


def _fact(event: dict[str, Any]) -> str:
  of_every_line = ('kind', 'attempt', 'time', 'event', 'at')
  facts = ', '.join(f'{key} {value}' for key, value in event.items() if key not in of_every_line)
  return f'{event["event"]}: {facts}'


if __name__ == '__main__':
  flags.run(main, words=True)
