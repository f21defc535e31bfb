"""Draws report.json as one page of HTML: no script, nothing from elsewhere, light or dark as the reader's machine is.

Texts and addresses of documents are hostile: all that is shown passes `_text`, and the page's own policy lets nothing run.
"""

import html
import re

_CONTROLS = {i: '\ufffd' for i in (*range(32), *range(127, 160), 0x2028, 0x2029) if chr(i) not in '\n\t'}
_BARS, _SHOWN_HITS = 20, 40  # of a chart, of the table of hits; report.json has them all
ALARM = 0.9  # of a source's documents, left out by one stage: rather a wrong rule than bad documents
_COLOURS = 8  # of stages; then they begin again
_STYLE = """
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


def page(numbers: dict) -> str:
  """numbers: of `report.figures`."""
  stages, sources = numbers['stages'], numbers['sources']
  title = f'{numbers["recipe"]}: what became of its documents'
  body = [f'<h1>{_text(title)}</h1>', _headline(sources, stages), _alarms(numbers['alarms']), _fates(sources, stages),
          f'<section><h2>Stage by stage</h2>{"".join(map(_stage, stages))}</section>', _lengths(sources), _rows(numbers)]
  return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
          '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">\n'
          '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
          f'<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n'
          + '\n'.join(filter(None, body)) + '\n</main>\n</body>\n</html>\n')


def _text(text) -> str:
  """Anything as text of HTML, in quoted attributes too."""
  return html.escape(str(text).translate(_CONTROLS))


def _bytes(n: float) -> str:
  for size, unit in ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if n >= size:
      return f'{n / size:.3g} {unit}' if n < 999.5 * size else f'{n / size:,.0f} {unit}'
  return f'{n} B'


def _share(part: float, whole: float) -> str:
  """A percentage that is 0 or 100 only where it is."""
  percent = 100 * part / whole if whole else 0
  if percent in (0, 100):
    return f'{percent:.0f} %'
  return f'{min(max(percent, 0.01), 99.99):.{2 if percent < 1 or percent > 99 else 1}f} %'


def _short(n: float) -> str:
  for size, unit in ((1e12, ' T'), (1e9, ' G'), (1e6, ' M')):
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:,}'


def _table(head: list[str], rows: list[list[str]], caption: str = '') -> str:
  """Cells are HTML. A column is set as text where its head begins with a tab, else as numbers."""
  kinds = [' class="text"' * name.startswith('\t') for name in head]
  top = ''.join(f'<th scope="col"{kind}>{name.strip()}</th>' for kind, name in zip(kinds, head))
  lines = ''.join(f'<tr><th scope="row">{first}</th>'
                  + ''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(kinds[1:], rest)) + '</tr>'
                  for first, *rest in rows)
  caption = f'<p class="soft">{caption}</p>' * bool(caption)
  return f'{caption}<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _bars(title: str, counts: dict) -> str:
  """A bar for each: in order where the names are numbers (0.80, 2 to 3, q07), else the most first."""
  if all(re.match(r'[a-z]?\d', str(name)) for name in counts):
    items = sorted(counts.items(), key=lambda item: [float(part) for part in re.findall(r'\d+(?:\.\d+)?', str(item[0]))])
  else:
    items = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    if len(items) > _BARS:
      items[_BARS - 1:] = [(f'{len(items) - _BARS + 1} others', sum(n for _, n in items[_BARS - 1:]))]
  most, total = max(counts.values(), default=0) or 1, sum(counts.values())
  lines = ''.join(f'<tr><th scope="row">{_text(name) or "none"}</th><td>{_bar(n / most)}</td>'
                  f'<td>{n:,} <span class="soft">{_share(n, total)}</span></td></tr>' for name, n in items)
  return f'<figure><figcaption>{title}</figcaption><table class="bars"><tbody>{lines}</tbody></table></figure>'


def _bar(share: float) -> str:
  return f'<i><b style="width:{100 * min(share, 1):.2f}%"></b></i>' if share else ''


# The parts of the page, from above.


def _headline(sources: dict, stages: list[dict]) -> str:
  come = sum(mine['documents'] for mine in stages[0]['sources'].values())
  train, held = ({fact: sum(mine[split][fact] for mine in sources.values())
                  for fact in ('documents', 'text_bytes', 'tokens')} for split in ('train', 'validation'))
  kept, text = (train[fact] + held[fact] for fact in ('documents', 'text_bytes'))
  tiles = ((f'{come:,}', 'documents come in'), (f'{kept:,}', f'are kept: {_share(kept, come)}'),
           (_bytes(text), 'of text kept'), (_short(train['tokens']), 'tokens to train on'),
           (_short(held['tokens']), 'tokens held out'),
           (f'{text / max(train["tokens"] + held["tokens"], 1):.2f}', 'bytes a token'))
  return (f'<p class="soft">{len(sources)} source{"s" * (len(sources) > 1)}, {len(stages)} stages. report.json has '
          'all numbers, by source; verdicts/ and selection/ say what became of each document.</p><div class="tiles">'
          + ''.join(f'<div><b>{value}</b><span>{name}</span></div>' for value, name in tiles) + '</div>')


def _alarms(alarms: list[dict]) -> str:
  if not alarms:
    return ''
  lines = ''.join(f'<li>{_text(one["source"])} loses <b>{_share(one["lost"], one["documents"])}</b> of {one["documents"]:,} '
                  f'documents at {_text(one["stage"])}, {one["of_reason"]:,} of them as “{_text(one["reason"])}”</li>'
                  for one in alarms)
  return f'<div class="alarms" role="alert"><span class="bad">Look at this first</span><ul>{lines}</ul></div>'


def _fates(sources: dict, stages: list[dict]) -> str:
  """Of each source a bar of what became of its documents, and the same as a table."""
  kinds = [('kept', 'to train on'), ('held', 'held out'),
           *((f's{i % _COLOURS}', f'left out at {stage["name"]}') for i, stage in enumerate(stages))]
  bars, rows = [], []
  for name, mine in sources.items():
    of = [stage['sources'][name] for stage in stages]
    come = of[0]['documents']
    amounts = [mine['train']['documents'], mine['validation']['documents'], *(one['documents'] - one['kept'] for one in of)]
    parts = [(kind, what, n) for (kind, what), n in zip(kinds, amounts) if n]
    pieces = ''.join(f'<i class="{kind}" style="width:{100 * n / come:.3f}%" title="{_text(what)}: {n:,}, '
                     f'{_share(n, come)}"></i>' for kind, what, n in parts)
    told = ', '.join(f'{n:,} {what}' for _, what, n in parts)
    bars.append(f'<span>{_text(name)}</span><div class="stack" role="img" aria-label="{_text(name)}: {_text(told)}">'
                f'{pieces}</div>')
    text = mine['train']['text_bytes'] + mine['validation']['text_bytes']
    cut = f'<small>−{_share(of[-1]["bytes_kept"] - text, of[-1]["bytes_kept"])}</small>' * (text < of[-1]['bytes_kept'])
    left = [_funnel_cell(one, stage, name) for one, stage in zip(of, stages)]
    rows.append([_text(name), f'{come:,}', *left, f'{amounts[1]:,}', _bytes(text) + cut, _short(mine['train']['tokens'])])
  keys = ''.join(f'<li><i class="{kind}"></i>{_text(what)}</li>' for kind, what in kinds)
  head = ['source', 'come in', *(_text(stage['name']) for stage in stages), 'held out', 'text', 'tokens']
  return (f'<section><h2>From source to corpus</h2><ul class="legend">{keys}</ul><div class="fate">{"".join(bars)}</div>'
          + _table(head, rows, 'Documents that are left after each stage (a point: it does not judge them), and the share '
                   'that it leaves out; of these, those held out; text, and the share of it that steps cut out; tokens to '
                   'train on')
          + '</section>')


def _funnel_cell(mine: dict, stage: dict, source: str) -> str:
  if source not in (stage['parameters'].get('sources') or [source]):
    return '·'  # the step does not judge it
  lost, come = mine['documents'] - mine['kept'], mine['documents']
  kind = ' class="bad"' * (lost > ALARM * come)
  return f'{mine["kept"]:,}' + f'<small{kind}>−{_share(lost, come)}</small>' * bool(lost)


def _stage(stage: dict) -> str:
  of = {name: mine for name, mine in stage['sources'].items() if mine['documents']}
  come, kept, come_bytes, kept_bytes = (sum(mine[fact] for mine in of.values())
                                        for fact in ('documents', 'kept', 'bytes', 'bytes_kept'))
  reasons = {}
  for name, mine in of.items():
    for reason, removed in mine['removed'].items():
      reasons.setdefault(reason, {})[name] = removed
  counts = {reason: sum(removed['documents'] for removed in by.values()) for reason, by in reasons.items()}
  order = sorted(counts, key=lambda reason: (-counts[reason], reason))
  rows = [[_text(reason), f'{counts[reason]:,}', f'{_share(counts[reason], come)} {_bar(counts[reason] / come)}',
           _bytes(sum(removed['bytes'] for removed in reasons[reason].values())),
           ', '.join(f'{_text(name)} {removed["documents"]:,}' for name, removed in reasons[reason].items())]
          for reason in order]
  removed = 'none of' if come == kept else f'{come - kept:,} ({_share(come - kept, come)}) of'
  size = f'{_bytes(come_bytes - kept_bytes)} of ' * (come > kept) + _bytes(come_bytes)
  parts = [f'<h3>{_text(stage["name"])}</h3><p>Leaves out {removed} {come:,} documents, {size}.</p>']
  if rows:
    parts.append(_table(['reason', 'documents', 'share', 'size', '\tby source'], rows))
  parts += [_samples({reason: reasons[reason] for reason in order}), _facts(stage, of), _clusters(stage.get('clusters')),
            _hits(stage.get('hits')), _parameters(stage)]
  return f'<article>{"".join(parts)}</article>'


def _samples(reasons: dict) -> str:
  lists = []
  for reason, by in reasons.items():
    lines = ''.join(f'<li><cite><bdi>{_text(sample["url"])}</bdi></cite> <small>{_text(name)}</small>'
                    + (f'<pre><bdi>{_text(sample["text"])}</bdi></pre>' if sample['text'] else '') + '</li>'
                    for name, removed in by.items() for sample in removed['samples'])
    lists.append(f'<h4>{_text(reason)}</h4><ul class="samples">{lines}</ul>')
  return f'<details><summary>Samples of what was left out</summary>{"".join(lists)}</details>' if lists else ''


def _facts(stage: dict, of: dict) -> str:
  """Counts as a table, a line a source; histograms as bars, of all sources and of each."""
  label = lambda name: _text(name.replace('_', ' '))
  plain = [name for name, value in stage['facts'].items() if not isinstance(value, dict)]
  drawn = {name: value for name, value in stage['facts'].items() if isinstance(value, dict) and any(value.values())}
  parts = []
  if plain:
    lines = [(name, mine['facts']) for name, mine in of.items() if any(key in mine['facts'] for key in plain)]
    lines = [*lines, ('all', stage['facts'])] if len(lines) > 1 else lines
    cells = [[_text(name), *(f'{facts.get(key, 0):,}' for key in plain)] for name, facts in lines]
    parts.append('<h4>Counted</h4>' + _table(['source', *map(label, plain)], cells))
  if drawn:
    charts = ''.join(_bars(f'<b>{label(name)}</b>', counts) for name, counts in drawn.items())
    parts.append(f'<div class="grid">{charts}</div>')
    each = [(source, name, mine['facts'][name]) for name in drawn for source, mine in of.items()
            if mine['facts'].get(name)]
    if len({source for source, *_ in each}) > 1:
      charts = ''.join(_bars(f'<b>{label(name)}</b> of {_text(source)}', counts) for source, name, counts in each)
      parts.append(f'<details><summary>By source</summary><div class="grid">{charts}</div></details>')
  return ''.join(parts)


def _clusters(found: dict | None) -> str:
  if not found or not found['clusters']:
    return ''
  sizes = {f'{2**k} to {2**(k + 1) - 1}': n for k, n in found['sizes'].items()}
  about = '' if found['looked_at'] == 1 else f' (of {_share(found["looked_at"], 1)} of them, chosen by chance)'
  lines = ''.join(f'<li><b>{one["documents"]:,}</b> documents: kept <cite><bdi>{_text(one["kept"])}</bdi></cite>'
                  + ''.join(f'<br><small>left out <bdi>{_text(url)}</bdi></small>' for url in one['left_out']) + '</li>'
                  for one in found['biggest'])
  many = f'{found["clusters"]:,} cluster{"s" * (found["clusters"] != 1)}{about}'
  chart = _bars(f'<b>documents in a cluster</b>, {many}', sizes)
  return (f'<div class="grid">{chart}</div><details><summary>The biggest clusters</summary><ul class="samples">{lines}</ul>'
          '</details>')


def _hits(found: dict | None) -> str:
  if not found or not found['surest']:
    return ''
  items = {file: len(by) for file, by in found['items'].items()}
  rows = [[f'{_text(hit["file"])} <bdi>{_text(hit["item"])}</bdi>', f'{hit["score"]:.2f}',
           f'<bdi>{_text(hit["document"])}</bdi>', f'<bdi>{_text(hit["excerpt"])}</bdi>']
          for hit in found['surest'][:_SHOWN_HITS]]
  table = _table(['item', 'score', '\tdocument', '\twhat the document says'], rows)
  return (f'<div class="grid">{_bars("<b>items found</b>, by file", items)}</div>'
          f'<details><summary>The surest hits</summary>{table}</details>')


def _parameters(stage: dict) -> str:
  if not stage['parameters']:
    return ''
  return f'<details><summary>Parameters</summary><code>{_text(_flat(stage["parameters"]))}</code></details>'


def _flat(value) -> str:
  """Parameters as a recipe would write them."""
  if isinstance(value, dict):
    fields = ', '.join(f'{name}={_flat(inner)}' for name, inner in value.items() if name != 'class')
    return f'{value["class"]}({fields})' if 'class' in value else fields
  return f'[{", ".join(map(_flat, value))}]' if isinstance(value, list) else repr(value)


def _lengths(sources: dict) -> str:
  charts = ''.join(_histogram(name, **mine['lengths']) for name, mine in sources.items() if mine['lengths']['read'])
  return ('<section><h2>Lengths</h2><p>Documents by the bytes of their text; each column is twice the one before.</p>'
          '<ul class="legend"><li><i class="read"></i>read</li><li><i class="kept"></i>kept, after edits</li></ul>'
          f'<div class="grid">{charts}</div></section>')


def _histogram(name: str, read: dict, kept: dict) -> str:
  ks = range(min((*read, *kept)), max((*read, *kept)) + 1)
  most = max(*read.values(), *kept.values(), 1)
  top = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power >= most)
  label = lambda k: f'{2**(k % 10)} {("B", "KiB", "MiB", "GiB")[k // 10]}'
  columns = ''.join(
    f'<div title="{label(k)} to {label(k + 1)}: {read.get(k, 0):,} read, {kept.get(k, 0):,} kept">'
    + ''.join(f'<i class="{kind}" style="height:{100 * n[k] / top:.2f}%"></i>'
              for kind, n in (('read', read), ('kept', kept)) if k in n) + '</div>' for k in ks)
  every = 2 if len(ks) <= 14 else 4
  ticks = ''.join(f'<span style="grid-column:{i + 1}">{label(k)}</span>' for i, k in enumerate(ks) if k % every == 0)
  lines = ''.join(f'<u style="bottom:{100 * n / top:g}%"><span>{_short(n)}</span></u>'
                  for n in dict.fromkeys((0, top // 2, top)))
  told = (f'{name}: {sum(read.values()):,} documents read, {sum(kept.values()):,} kept, of {label(ks[0])} to '
          f'{label(ks[-1] + 1)}')
  return (f'<figure role="img" aria-label="{_text(told)}"><figcaption><b>{_text(name)}</b>, documents</figcaption>'
          f'<div class="plot">{lines}{columns}</div>'
          f'<div class="ticks" style="grid-template-columns:repeat({len(ks)},1fr)">{ticks}</div></figure>')


def _rows(numbers: dict) -> str:
  lines = [[_text(one['source']), f'{one["seq_len"]:,}', _text(one['split']), f'{one["documents"]:,}', f'{one["rows"]:,}',
            f'{one["tokens"]:,}', _bytes(one['text_bytes']), f'{one["text_bytes"] / max(one["tokens"], 1):.2f}',
            f'{100 * one["positions"] / one["rows"] / one["seq_len"]:.2f} %'] for one in numbers['rows']]
  dropped = ''.join(f'<p>Of {_text(source)}, these conversations become no rows of {int(length):,} tokens: '
                    + ', '.join(f'{n:,} x {_text(reason)}' for reason, n in reasons.items()) + '.</p>'
                    for length, by in numbers['not_in_rows'].items() for source, reasons in by.items())
  head = ['source and part', 'row length', '\tsplit', 'documents', 'rows', 'tokens', 'text', 'bytes a token', 'filled']
  return f'<section><h2>Rows</h2>{_table(head, lines)}{dropped}</section>'
