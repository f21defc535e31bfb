"""What a build kept, and what it left out and why: report.json (all numbers) and report.html (the same, drawn).

Both are made of the records of shards, which have what is dear to find: only where documents repeat others, or hold items of
evaluation sets, are the files of verdicts read. The same corpus gives the same bytes.
"""

import collections
import heapq
import pathlib
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline import report_page, shards, verdicts
from data_pipeline import selection as chosen

_SAMPLES = 5  # of what is left out, for each reason, source and stage
_REPEATS = 20_000_000  # that are held at once, 160 MB; of more a part of the clusters is looked at
_CLUSTERS, _MEMBERS, _FILES = 10, 3, 50  # biggest, of which so many members are named, if in so many shards
_HITS = 200  # the surest, of evaluation items in documents


def write(root: pathlib.Path, recipe, *, sources: list[dict], steps: list[list[dict]], selection: list[dict],
          rows: list[dict]) -> list[dict]:
  """Commits DIR/report.json and DIR/report.html; returns the entries of both.

  The records are those of a build: a list of units for each source, a list of shards for each step, a record a shard of the
  selection and of the rows of each length.
  """
  numbers = figures(root, recipe, sources, steps, selection, rows)
  shards.write_json(root / 'report.json', numbers)
  with shards.committed(root / 'report.html') as temporary:
    temporary.write_text(report_page.page(numbers), encoding='utf-8')
  return [shards.entry(root, root / name) for name in ('report.json', 'report.html')]


def figures(root: pathlib.Path, recipe, sources: list[dict], steps: list[list[dict]], selection: list[dict],
            rows: list[dict]) -> dict:
  """What report.json holds.

  stages: of each its name, kind, parameters, facts (added up), and for each source {documents, kept, bytes, bytes_kept,
  removed: {reason: {documents, bytes, samples}}, facts}. The documents of a stage are those that the one before has kept;
  bytes are of text before edits, but of raw documents for what could not be read.
  """
  units = [unit for source in sources for unit in source['units']]
  parts = [{'name': 'reading', 'kind': '', 'parameters': {}}, *(_described(step) for step in recipe.steps),
           {'name': 'selection', 'kind': '', 'parameters': {'min_bytes': recipe.min_bytes,
                                                            'validation_fraction': recipe.validation_fraction}}]
  names = [source.name for source in recipe.sources]
  documents = [shard['path'] for unit in units for shard in unit['shards']]
  stages = [_stage(part, records, names) for part, records in zip(parts, (units, *steps, selection), strict=True)]
  for stage, records in zip(stages[1:-1], steps):
    columns = pq.read_schema(root / records[0]['files'][0]['path']).names if records else []
    if 'of' in columns:
      stage['clusters'] = _clusters(root, records, documents)
    if 'hits' in columns:
      stage['hits'] = _hits(root, records, documents)
  packed, not_in_rows = _packed(rows), {}
  for record in rows:
    for reasons in record['dropped'].values():
      more = {str(record['seq_len']): {record['source']: dict(sorted(reasons.items()))}} if reasons else {}
      verdicts.add_up(not_in_rows, more)
  return {'recipe': recipe.name, 'alarms': list(_alarms(stages)),
          'sources': {name: _source(name, units, selection, packed) for name in names},
          'stages': stages, 'rows': packed, 'not_in_rows': not_in_rows}


def _described(step) -> dict:
  facts = shards.describe(step)
  return {'name': step.name, 'kind': facts.pop('class'), 'parameters': {name: value for name, value in facts.items()
                                                                        if name != 'name'}}


def _stage(part: dict, records: list[dict], names: list[str]) -> dict:
  of_sources = {name: {'documents': 0, 'kept': 0, 'bytes': 0, 'bytes_kept': 0, 'removed': {}, 'facts': {}} for name in names}
  samples = collections.defaultdict(list)
  for record in records:
    mine = of_sources[record['source']]
    gone = {fact: sum(of[fact] for of in record['removed'].values()) for fact in ('documents', 'bytes')}
    reading = 'lineage' in record  # its documents are those that were read, of a step those that come to it
    mine['documents'] += record['documents'] + reading * gone['documents']
    mine['kept'] += record['documents'] - (not reading) * gone['documents']
    mine['bytes'] += record['bytes'] + reading * gone['bytes']
    mine['bytes_kept'] += record['bytes'] - (not reading) * gone['bytes']
    verdicts.add_up(mine['facts'], record.get('facts', {}))
    for reason, of in record['removed'].items():
      verdicts.add_up(mine['removed'].setdefault(reason, {}), {fact: of[fact] for fact in ('documents', 'bytes')})
      samples[record['source'], reason].append(of['samples'])
  for (source, reason), lists in samples.items():  # of as many shards as there are
    one_each = [some[i] for i in range(max(map(len, lists))) for some in lists if i < len(some)]
    of_sources[source]['removed'][reason]['samples'] = one_each[:_SAMPLES]
  facts = {}
  for mine in of_sources.values():
    mine['removed'] = dict(sorted(mine['removed'].items(), key=lambda item: (-item[1]['documents'], item[0])))
    verdicts.add_up(facts, mine['facts'])
  return {**part, 'sources': of_sources, 'facts': facts}


def _alarms(stages: list[dict]) -> Iterator[dict]:
  """Where a source loses nearly all at once."""
  for stage in stages:
    for source, mine in stage['sources'].items():
      lost = mine['documents'] - mine['kept']
      if lost > report_page.ALARM * mine['documents']:
        reason, of = next(iter(mine['removed'].items()))
        yield {'source': source, 'stage': stage['name'], 'documents': mine['documents'], 'lost': lost, 'reason': reason,
               'of_reason': of['documents']}


def _source(name: str, units: list[dict], selection: list[dict], packed: list[dict]) -> dict:
  """{inputs, lengths: {read, kept}, train and validation: {documents, text_bytes, tokens}}. lengths: documents by k, of
  2^k bytes and more."""
  mine, lengths, splits = [record for record in selection if record['source'] == name], {'read': {}, 'kept': {}}, {}
  for what, records in (('read', [unit for unit in units if unit['source'] == name]), ('kept', mine)):
    for record in records:
      verdicts.add_up(lengths[what], {int(k): n for k, n in record['lengths'].items()})
    lengths[what] = dict(sorted(lengths[what].items()))
  for split in (chosen.TRAIN, chosen.VALIDATION):
    splits[split] = {'documents': sum(record['counts'].get(split, 0) for record in mine),
                     'text_bytes': sum(record['text_bytes'].get(split, 0) for record in mine),
                     'tokens': sum(part['tokens'] for part in packed if part['of'] == name and part['split'] == split and
                                   part['seq_len'] == packed[0]['seq_len'])}
  return {'inputs': sum(unit['source'] == name for unit in units), 'lengths': lengths, **splits}


def _packed(rows: list[dict]) -> list[dict]:
  """Rows by length, source and its parts, and split."""
  found = {}
  for shard in (shard for record in rows for shard in record['shards']):
    which = {name: shard[name] for name in ('seq_len', 'of', 'source', 'split')}
    mine = found.setdefault(tuple(which.values()), {**which, **dict.fromkeys(
      ('documents', 'rows', 'positions', 'tokens', 'text_bytes'), 0)})
    verdicts.add_up(mine, {name: shard[name] for name in ('documents', 'rows', 'positions', 'tokens', 'text_bytes')})
  return sorted(found.values(), key=lambda one: (one['seq_len'], one['of'], one['source'], one['split']))


# Files of verdicts.


def _clusters(root: pathlib.Path, records: list[dict], documents: list[str]) -> dict:
  """Documents that one was kept of. sizes: clusters by k, of 2^k documents and more; biggest: with urls; looked_at: the
  share of the clusters that this is about."""
  paths = [record['files'][0]['path'] for record in records]
  n_repeats = [sum(of['documents'] for of in record['removed'].values()) for record in records]
  every = 1 + sum(n_repeats) // _REPEATS
  parts = [np.empty(0, np.int64)]
  for path, n in zip(paths, n_repeats):
    if n:
      kept, _ = _repeats(root / path)
      parts.append(kept[(kept * 0x9E3779B1 >> 20) % every == 0])
  kept, copies = np.unique(np.concatenate(parts), return_counts=True)
  biggest = np.lexsort((kept, -copies))[:_CLUSTERS]
  members = {place: [] for place in kept[biggest].tolist()}
  for i in np.flatnonzero(n_repeats)[:_FILES].tolist():
    of, mine = _repeats(root / paths[i])
    for place, some in members.items():
      some += [(i << 32) + int(row) for row in mine[of == place][:_MEMBERS - len(some)]]
  urls = _urls(root, documents, [place for place, some in members.items() for place in (place, *some)])
  return {'looked_at': 1 / every, 'clusters': len(kept), 'repeats': int(copies.sum()),
          'sizes': dict(sorted(collections.Counter(int(n).bit_length() - 1 for n in (copies + 1).tolist()).items())),
          'biggest': [{'documents': int(copies[i]) + 1, 'kept': urls[int(kept[i])],
                       'left_out': [urls[place] for place in members[int(kept[i])]]} for i in biggest]}


def _repeats(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """int64 [n], [n]: places, (shard << 32) + row, of the kept documents that the column `of` names, and its rows."""
  of = pq.read_table(path, columns=['of'])['of'].combine_chunks()
  rows = np.flatnonzero(pc.greater(pc.binary_length(of), 0).fill_null(False).to_numpy(zero_copy_only=False))
  places = pc.list_flatten(pc.split_pattern(of.take(rows), ':')).cast('int64').to_numpy().reshape(-1, 2)
  return (places[:, 0] << 32) + places[:, 1], rows


def _urls(root: pathlib.Path, documents: list[str], places: list[int]) -> dict[int, str]:
  """place -> url, a shard and a group of rows at a time."""
  urls, by_shard = {}, {}
  for place in places:
    by_shard.setdefault(place >> 32, []).append(place)
  for shard, mine in by_shard.items():
    file, first = pq.ParquetFile(root / documents[shard]), 0
    for group in range(file.num_row_groups):
      end = first + file.metadata.row_group(group).num_rows
      if inside := [place for place in mine if first <= place - (shard << 32) < end]:
        column = file.read_row_group(group, ['url'])['url']
        urls |= {place: column[place - (shard << 32) - first].as_py() for place in inside}
      first = end
  return urls


def _hits(root: pathlib.Path, records: list[dict], documents: list[str]) -> dict:
  """Items of evaluation sets that were found. items: {file: {item: documents}}; surest: the first of all hits by score."""
  items, surest = {}, []
  for i, record in enumerate(records):
    if record['removed']:
      column = pq.read_table(root / record['files'][0]['path'], columns=['hits'])['hits'].to_pylist()
      found = [(row, hit) for row, hits in enumerate(column) for hit in hits or ()]
      for _, hit in found:
        verdicts.add_up(items, {hit['file']: {hit['item']: 1}})
      surest = heapq.nsmallest(_HITS, [*surest, *((-round(hit['score'], 4), i, row, hit['file'], hit['item'], hit['excerpt'])
                                                  for row, hit in found)])
  urls = _urls(root, documents, [(i << 32) + row for _, i, row, *_ in surest])
  return {'items': items, 'surest': [{'score': -score, 'file': file, 'item': item, 'document': urls[(i << 32) + row],
                                      'excerpt': excerpt} for score, i, row, file, item, excerpt in surest]}
