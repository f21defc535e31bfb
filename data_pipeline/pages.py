"""Pages of HTML with figures in them: no script, nothing from elsewhere, light or dark as the reader's machine is.

What is shown may come from hostile places: all of it passes `escape`, and a page's own policy lets nothing run.
"""

import html

_CONTROLS = {i: '\ufffd' for i in (*range(32), *range(127, 160), 0x2028, 0x2029) if chr(i) not in '\n\t'}
STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f7f9; --ink: #1b232e; --soft: #56616f; --line: #d5dbe2;
  --kept: #2b7a59; --held: #86bfa3; --bar: #4878a8; --bad: #b3261e; --s0: #8b929b; --s1: #d08a2e; --s2: #7a5aa0;
  --s3: #c8503c; --s4: #4878a8; --s5: #a8893a; --s6: #b05c86; --s7: #5f6f3f; }
@media (prefers-color-scheme: dark) { :root { --back: #12161c; --card: #1a2028; --ink: #e4e8ed; --soft: #9ca7b4;
  --line: #323b47; --kept: #4fae86; --held: #2f6b53; --bar: #6c9bcb; --bad: #ff8a7a; --s0: #6d7681; --s1: #dd9c45;
  --s2: #9d80c4; --s3: #dd6a56; --s4: #6c9bcb; --s5: #c2a557; --s6: #c97ba2; --s7: #8a9d62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1120px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 8px; }
h3 { font-size: 16px; margin: 0 0 2px; }
h4 { font-size: 14px; margin: 16px 0 4px; }
p { margin: 4px 0 12px; max-width: 75ch; }
small, .soft, figcaption { color: var(--soft); }
small { font-size: 12px; font-weight: 400; }
.bad { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; white-space: normal; }
th:first-child, .text { text-align: left; }
th:first-child { padding-left: 0; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 20em; }
tbody tr:last-child > * { border-bottom: 0; }
td small { display: block; }
td i { display: inline-block; width: 70px; height: 10px; margin-left: 8px; text-align: left; }
td i b { display: block; height: 100%; min-width: 1px; background: var(--bar); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 20px 0; }
.tiles div { padding: 10px 14px; }
.tiles div, article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
article { padding: 16px; margin: 12px 0; }
article > :last-child { margin-bottom: 0; }
.alarms { border-left: 4px solid var(--bad); padding: 8px 14px; background: var(--card); }
.alarms ul { margin: 4px 0; padding-left: 20px; }
.fate { display: grid; grid-template-columns: max-content 1fr; gap: 8px 12px; align-items: center; margin-bottom: 24px; }
.stack { display: flex; height: 22px; border-radius: 3px; overflow: hidden; }
.stack i { min-width: 1px; box-shadow: inset -1px 0 var(--back); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 0 0 12px; padding: 0;
  list-style: none; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 20px 28px;
  margin: 12px 0; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; margin-bottom: 6px; }
figcaption b { color: var(--ink); }
.bars { width: 100%; font-size: 13px; table-layout: fixed; }
.bars th, .bars td { border: 0; padding: 1px 0; }
.bars th { font-weight: 400; width: 32%; padding-right: 10px; overflow: hidden; text-overflow: ellipsis; }
.bars td { text-align: left; }
.bars td:last-child { width: 30%; text-align: right; }
.bars td i { display: block; width: auto; height: 14px; margin: 3px 0 0; }
.plot { position: relative; height: 150px; margin: 12px 0 0 52px; display: grid; grid-auto-flow: column;
  grid-auto-columns: 1fr; gap: 1px; border-bottom: 1px solid var(--soft); }
.plot u { position: absolute; left: 0; right: 0; border-top: 1px solid var(--line); text-decoration: none; }
.plot u span { position: absolute; right: 100%; top: -9px; padding-right: 6px; font-size: 11px; color: var(--soft);
  white-space: nowrap; }
.plot div { position: relative; }
.plot i { position: absolute; bottom: 0; left: 0; right: 0; min-height: 1px; }
.ticks { display: grid; margin: 2px 0 0 52px; font-size: 11px; color: var(--soft); }
.ticks span { grid-row: 1; width: 0; padding-left: 3px; border-left: 1px solid var(--soft); white-space: nowrap; }
.read { background: color-mix(in srgb, var(--s0) 45%, transparent); }
.kept { background: var(--kept); }
.held { background: var(--held); }
.s0 { background: var(--s0); } .s1 { background: var(--s1); } .s2 { background: var(--s2); } .s3 { background: var(--s3); }
.s4 { background: var(--s4); } .s5 { background: var(--s5); } .s6 { background: var(--s6); } .s7 { background: var(--s7); }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--bar); }
code, cite { font-size: 13px; font-style: normal; overflow-wrap: anywhere; }
.samples { list-style: none; padding: 0; margin: 0; }
.samples li { margin: 6px 0; overflow-wrap: anywhere; }
pre { margin: 2px 0 8px; padding: 8px 10px; max-height: 11em; overflow-y: auto; font-size: 12px; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; background: var(--back); border: 1px solid var(--line);
  border-radius: 4px; }
@media (max-width: 600px) { .fate { grid-template-columns: 1fr; gap: 2px; } .stack { margin-bottom: 8px; }
  th, td { padding: 4px 6px; } article { padding: 12px; } }
"""


def document(title: str, body: list[str], style: str = '') -> str:
  """A whole page. title: any text. body: pieces of HTML; empty ones are left out. style: beside STYLE."""
  return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">\n'
          '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
          f'<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n'
          + '\n'.join(filter(None, body)) + '\n</main>\n</body>\n</html>\n')


def escape(text) -> str:
  """Anything as text of HTML, in quoted attributes too."""
  return html.escape(str(text).translate(_CONTROLS))


def size(n: float) -> str:
  """Of bytes."""
  for one, unit in ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if n >= one:
      return f'{n / one:.3g} {unit}' if n < 999.5 * one else f'{n / one:,.0f} {unit}'
  return f'{n} B'


def percent(part: float, whole: float) -> str:
  """A percentage that is 0 or 100 only where it is."""
  share = 100 * part / whole if whole else 0
  if share in (0, 100):
    return f'{share:.0f} %'
  return f'{min(max(share, 0.01), 99.99):.{2 if share < 1 or share > 99 else 1}f} %'


def short(n: float) -> str:
  """Of a count."""
  for one, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M')):
    if n >= one:
      return f'{n / one:.3g}{unit}'
  return f'{n:,}'


def table(head: list[str], rows: list[list[str]], caption: str = '') -> str:
  """Cells are HTML. A column is set as text where its head begins with a tab, else as numbers."""
  kinds = [' class="text"' * name.startswith('\t') for name in head]
  top = ''.join(f'<th scope="col"{kind}>{name.strip()}</th>' for kind, name in zip(kinds, head))
  lines = ''.join(f'<tr><th scope="row">{first}</th>'
                  + ''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds[1:], rest)) + '</tr>'
                  for first, *rest in rows)
  caption = f'<p class="soft">{caption}</p>' * bool(caption)
  return f'{caption}<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
