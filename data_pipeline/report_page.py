"""Draws report.json as one page of HTML: no script, nothing from elsewhere, light or dark as the reader's machine is.

Texts and addresses of documents are hostile: all that is shown passes `escape`, and the page's own policy lets nothing run.
"""

import re

from data_pipeline.pages import document, escape, percent, short, size, table

_BARS, _SHOWN_HITS = 20, 40  # of a chart, of the table of hits; report.json has them all
ALARM = 0.9  # of a source's documents, left out by one stage: rather a wrong rule than bad documents
_COLOURS = 8  # of stages; then they begin again


def page(numbers: dict) -> str:
  """numbers: of `report.figures`."""
  stages, sources = numbers['stages'], numbers['sources']
  title = f'{numbers["recipe"]}: what became of its documents'
  body = [f'<h1>{escape(title)}</h1>', _headline(sources, stages), _alarms(numbers['alarms']), _fates(sources, stages),
          f'<section><h2>Stage by stage</h2>{"".join(map(_stage, stages))}</section>', _lengths(sources), _rows(numbers)]
  return document(title, body)


def _bars(title: str, counts: dict) -> str:
  """A bar for each: in order where the names are numbers (0.80, 2 to 3, q07), else the most first."""
  if all(re.match(r'[a-z]?\d', str(name)) for name in counts):
    items = sorted(counts.items(), key=lambda item: [float(part) for part in re.findall(r'\d+(?:\.\d+)?', str(item[0]))])
  else:
    items = sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    if len(items) > _BARS:
      items[_BARS - 1:] = [(f'{len(items) - _BARS + 1} others', sum(n for _, n in items[_BARS - 1:]))]
  most, total = max(counts.values(), default=0) or 1, sum(counts.values())
  lines = ''.join(f'<tr><th scope="row">{escape(name) or "none"}</th><td>{_bar(n / most)}</td>'
                  f'<td>{n:,} <span class="soft">{percent(n, total)}</span></td></tr>' for name, n in items)
  return f'<figure><figcaption>{title}</figcaption><table class="bars"><tbody>{lines}</tbody></table></figure>'


def _bar(share: float) -> str:
  return f'<i><b style="width:{100 * min(share, 1):.2f}%"></b></i>' if share else ''


# The parts of the page, from above.


def _headline(sources: dict, stages: list[dict]) -> str:
  come = sum(mine['documents'] for mine in stages[0]['sources'].values())
  train, held = ({fact: sum(mine[split][fact] for mine in sources.values())
                  for fact in ('documents', 'text_bytes', 'tokens')} for split in ('train', 'validation'))
  kept, text = (train[fact] + held[fact] for fact in ('documents', 'text_bytes'))
  tiles = ((f'{come:,}', 'documents come in'), (f'{kept:,}', f'are kept: {percent(kept, come)}'),
           (size(text), 'of text kept'), (short(train['tokens']), 'tokens to train on'),
           (short(held['tokens']), 'tokens held out'),
           (f'{text / max(train["tokens"] + held["tokens"], 1):.2f}', 'bytes a token'))
  return (f'<p class="soft">{len(sources)} source{"s" * (len(sources) > 1)}, {len(stages)} stages. report.json has '
          'all numbers, by source; verdicts/ and selection/ say what became of each document.</p><div class="tiles">'
          + ''.join(f'<div><b>{value}</b><span>{name}</span></div>' for value, name in tiles) + '</div>')


def _alarms(alarms: list[dict]) -> str:
  if not alarms:
    return ''
  lines = ''.join(f'<li>{escape(one["source"])} loses <b>{percent(one["lost"], one["documents"])}</b> of '
                  f'{one["documents"]:,} documents at {escape(one["stage"])}, {one["of_reason"]:,} of them as '
                  f'“{escape(one["reason"])}”</li>'
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
    pieces = ''.join(f'<i class="{kind}" style="width:{100 * n / come:.3f}%" title="{escape(what)}: {n:,}, '
                     f'{percent(n, come)}"></i>' for kind, what, n in parts)
    told = ', '.join(f'{n:,} {what}' for _, what, n in parts)
    bars.append(f'<span>{escape(name)}</span><div class="stack" role="img" aria-label="{escape(name)}: {escape(told)}">'
                f'{pieces}</div>')
    text = mine['train']['text_bytes'] + mine['validation']['text_bytes']
    cut = f'<small>−{percent(of[-1]["bytes_kept"] - text, of[-1]["bytes_kept"])}</small>' * (text < of[-1]['bytes_kept'])
    left = [_funnel_cell(one, stage, name) for one, stage in zip(of, stages)]
    rows.append([escape(name), f'{come:,}', *left, f'{amounts[1]:,}', size(text) + cut, short(mine['train']['tokens'])])
  keys = ''.join(f'<li><i class="{kind}"></i>{escape(what)}</li>' for kind, what in kinds)
  head = ['source', 'come in', *(escape(stage['name']) for stage in stages), 'held out', 'text', 'tokens']
  return (f'<section><h2>From source to corpus</h2><ul class="legend">{keys}</ul><div class="fate">{"".join(bars)}</div>'
          + table(head, rows, 'Documents that are left after each stage (a point: it does not judge them), and the share '
                   'that it leaves out; of these, those held out; text, and the share of it that steps cut out; tokens to '
                   'train on')
          + '</section>')


def _funnel_cell(mine: dict, stage: dict, source: str) -> str:
  if source not in (stage['parameters'].get('sources') or [source]):
    return '·'  # the step does not judge it
  lost, come = mine['documents'] - mine['kept'], mine['documents']
  kind = ' class="bad"' * (lost > ALARM * come)
  return f'{mine["kept"]:,}' + f'<small{kind}>−{percent(lost, come)}</small>' * bool(lost)


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
  rows = [[escape(reason), f'{counts[reason]:,}', f'{percent(counts[reason], come)} {_bar(counts[reason] / come)}',
           size(sum(removed['bytes'] for removed in reasons[reason].values())),
           ', '.join(f'{escape(name)} {removed["documents"]:,}' for name, removed in reasons[reason].items())]
          for reason in order]
  removed = 'none of' if come == kept else f'{come - kept:,} ({percent(come - kept, come)}) of'
  amount = f'{size(come_bytes - kept_bytes)} of ' * (come > kept) + size(come_bytes)
  parts = [f'<h3>{escape(stage["name"])}</h3><p>Leaves out {removed} {come:,} documents, {amount}.</p>']
  if rows:
    parts.append(table(['reason', 'documents', 'share', 'size', '\tby source'], rows))
  parts += [_samples({reason: reasons[reason] for reason in order}), _facts(stage, of), _clusters(stage.get('clusters')),
            _hits(stage.get('hits')), _parameters(stage)]
  return f'<article>{"".join(parts)}</article>'


def _samples(reasons: dict) -> str:
  lists = []
  for reason, by in reasons.items():
    lines = ''.join(f'<li><cite><bdi>{escape(sample["url"])}</bdi></cite> <small>{escape(name)}</small>'
                    + (f'<pre><bdi>{escape(sample["text"])}</bdi></pre>' if sample['text'] else '') + '</li>'
                    for name, removed in by.items() for sample in removed['samples'])
    lists.append(f'<h4>{escape(reason)}</h4><ul class="samples">{lines}</ul>')
  return f'<details><summary>Samples of what was left out</summary>{"".join(lists)}</details>' if lists else ''


def _facts(stage: dict, of: dict) -> str:
  """Counts as a table, a line a source; histograms as bars, of all sources and of each."""
  label = lambda name: escape(name.replace('_', ' '))
  plain = [name for name, value in stage['facts'].items() if not isinstance(value, dict)]
  drawn = {name: value for name, value in stage['facts'].items() if isinstance(value, dict) and any(value.values())}
  parts = []
  if plain:
    lines = [(name, mine['facts']) for name, mine in of.items() if any(key in mine['facts'] for key in plain)]
    lines = [*lines, ('all', stage['facts'])] if len(lines) > 1 else lines
    cells = [[escape(name), *(f'{facts.get(key, 0):,}' for key in plain)] for name, facts in lines]
    parts.append('<h4>Counted</h4>' + table(['source', *map(label, plain)], cells))
  if drawn:
    charts = ''.join(_bars(f'<b>{label(name)}</b>', counts) for name, counts in drawn.items())
    parts.append(f'<div class="grid">{charts}</div>')
    each = [(source, name, mine['facts'][name]) for name in drawn for source, mine in of.items()
            if mine['facts'].get(name)]
    if len({source for source, *_ in each}) > 1:
      charts = ''.join(_bars(f'<b>{label(name)}</b> of {escape(source)}', counts) for source, name, counts in each)
      parts.append(f'<details><summary>By source</summary><div class="grid">{charts}</div></details>')
  return ''.join(parts)


def _clusters(found: dict | None) -> str:
  if not found or not found['clusters']:
    return ''
  sizes = {f'{2**k} to {2**(k + 1) - 1}': n for k, n in found['sizes'].items()}
  about = '' if found['looked_at'] == 1 else f' (of {percent(found["looked_at"], 1)} of them, chosen by chance)'
  lines = ''.join(f'<li><b>{one["documents"]:,}</b> documents: kept <cite><bdi>{escape(one["kept"])}</bdi></cite>'
                  + ''.join(f'<br><small>left out <bdi>{escape(url)}</bdi></small>' for url in one['left_out']) + '</li>'
                  for one in found['biggest'])
  many = f'{found["clusters"]:,} cluster{"s" * (found["clusters"] != 1)}{about}'
  chart = _bars(f'<b>documents in a cluster</b>, {many}', sizes)
  return (f'<div class="grid">{chart}</div><details><summary>The biggest clusters</summary><ul class="samples">{lines}</ul>'
          '</details>')


def _hits(found: dict | None) -> str:
  if not found or not found['surest']:
    return ''
  items = {file: len(by) for file, by in found['items'].items()}
  rows = [[f'{escape(hit["file"])} <bdi>{escape(hit["item"])}</bdi>', f'{hit["score"]:.2f}',
           f'<bdi>{escape(hit["document"])}</bdi>', f'<bdi>{escape(hit["excerpt"])}</bdi>']
          for hit in found['surest'][:_SHOWN_HITS]]
  surest = table(['item', 'score', '\tdocument', '\twhat the document says'], rows)
  return (f'<div class="grid">{_bars("<b>items found</b>, by file", items)}</div>'
          f'<details><summary>The surest hits</summary>{surest}</details>')


def _parameters(stage: dict) -> str:
  if not stage['parameters']:
    return ''
  return f'<details><summary>Parameters</summary><code>{escape(_flat(stage["parameters"]))}</code></details>'


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
  lines = ''.join(f'<u style="bottom:{100 * n / top:g}%"><span>{short(n)}</span></u>'
                  for n in dict.fromkeys((0, top // 2, top)))
  told = (f'{name}: {sum(read.values()):,} documents read, {sum(kept.values()):,} kept, of {label(ks[0])} to '
          f'{label(ks[-1] + 1)}')
  return (f'<figure role="img" aria-label="{escape(told)}"><figcaption><b>{escape(name)}</b>, documents</figcaption>'
          f'<div class="plot">{lines}{columns}</div>'
          f'<div class="ticks" style="grid-template-columns:repeat({len(ks)},1fr)">{ticks}</div></figure>')


def _rows(numbers: dict) -> str:
  lines = [[escape(one['source']), f'{one["seq_len"]:,}', escape(one['split']), f'{one["documents"]:,}', f'{one["rows"]:,}',
            f'{one["tokens"]:,}', size(one['text_bytes']), f'{one["text_bytes"] / max(one["tokens"], 1):.2f}',
            f'{100 * one["positions"] / one["rows"] / one["seq_len"]:.2f} %'] for one in numbers['rows']]
  dropped = ''.join(f'<p>Of {escape(source)}, these conversations become no rows of {int(length):,} tokens: '
                    + ', '.join(f'{n:,} x {escape(reason)}' for reason, n in reasons.items()) + '.</p>'
                    for length, by in numbers['not_in_rows'].items() for source, reasons in by.items())
  head = ['source and part', 'row length', '\tsplit', 'documents', 'rows', 'tokens', 'text', 'bytes a token', 'filled']
  return f'<section><h2>Rows</h2>{table(head, lines)}{dropped}</section>'
