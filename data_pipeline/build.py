"""Builds a corpus: sources -> documents -> verdicts of each step -> selection -> tokenizer -> packed rows.

    python -m data_pipeline.build --recipe=quickstart --out=DIR
    python -m data_pipeline.build --recipe=my_recipe.py --out=DIR --seq_lens=512,4096
    python -m data_pipeline.build --recipe=my_recipe.py --out=DIR --runner=ray
    python -m data_pipeline.build --recipe=sft:chats.jsonl --tokenizer=runs/quickstart --out=DIR

Run again, it goes on where it was killed, rebuilds what a changed recipe, input or program touches, and leaves a finished
corpus alone. DIR/report.html says what was left out and why. docs/data.md shows what lies in DIR and how to write a recipe.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import importlib.util
import itertools
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Iterator

if __name__ == '__main__' and None in map(importlib.util.find_spec, ('numba', 'pyarrow', 'resiliparse', 'tiktoken', 'tqdm')):
  sys.exit("error: building a corpus needs the data extra: pip install -e '.[data]' (training on one does not)")

from data_pipeline import chat, documents, pack, report, report_page, rows, sandbox, selection, shards, tokenizer, verdicts
from data_pipeline.recipe import Recipe, SourceUnavailable, load_recipe
from data_pipeline.runners import LocalRunner, RayRunner
from data_pipeline.sources import text
from data_pipeline.tasks import Tasks
from data_pipeline.verdicts import Shard

_LIBRARIES = ('array-record', 'pyarrow', 'resiliparse', 'tokenizers')  # whose versions a manifest names
_BEFORE = '    done before'
_TOKENIZER_BYTES = 2 << 30  # of text, enough to train a tokenizer on


def build(recipe: Recipe, out, *, workers: int | None = None, runner=None) -> pathlib.Path:
  """Builds the corpus of `recipe` in the directory `out` and returns its path. Progress is shown on stderr.

  workers: processes of this machine (default: one a core); or runner: whoever else does the work, of `runners`.
  Resumable: every shard is committed whole, and a rerun trusts only what is recorded with the same recipe, inputs and code.
  Row lengths that the corpus already has are kept. ValueError or OSError with one line for bad input, a full disk, …
  """
  recipe.validate()
  runner = runner or LocalRunner(workers)
  root = pathlib.Path(out).absolute()
  try:
    with _locked(root), runner:
      if not any(_is_complete(candidate, root) for candidate in (recipe, recipe.fallback) if candidate):
        _build_or_fall_back(recipe, root, runner)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise OSError(error.errno, f'the disk of {root} is full: free some space and run the same command again, '
                                 'which keeps what was finished') from error
    raise
  return root


def _build_or_fall_back(recipe: Recipe, root: pathlib.Path, runner) -> None:
  try:
    _Build(recipe, root, runner).run()
  except SourceUnavailable as error:
    if recipe.fallback is None:
      raise
    if _manifest_of(root) is not None:  # a lesser corpus does not take the place of a good one
      raise SourceUnavailable(f'{error}; the corpus in {root} is left as it was') from error
    _say(f'notice: {error}\nnotice: building {recipe.fallback.name!r} instead of {recipe.name!r}')
    _Build(recipe.fallback, root, runner).run()


class _Build:
  """One build under way. Each stage reads only what the stages before have recorded."""

  def __init__(self, recipe: Recipe, root: pathlib.Path, runner):
    self.recipe, self.root, self.runner = recipe, root, runner
    self.key = _corpus_key(recipe)
    self.formats = {source.name: source.chats for source in recipe.sources if hasattr(source, 'chats')}
    self.old = _manifest_of(root)
    self.seq_lens = sorted({*recipe.seq_lens, *(self.old['seq_lens'] if self.old else ())})
    self.tasks = Tasks(root, runner, self._retire_manifest)

  def run(self) -> None:
    started = time.monotonic()
    _say(f'building corpus {self.recipe.name!r} in {self.root}, processes: {self.runner.workers}')
    sources = self._documents()
    found = [Shard(source=unit['source'], documents=shard['path'], rows=shard['rows'], hashes=(shard['xxh3'],))
             for source in sources for unit in source['units'] for shard in unit['shards']]
    found, judged = self._steps(found)
    chosen = self._selection(found)
    vocabulary = self._tokenizer(found, chosen)
    written = [record for seq_len in self.seq_lens for record in self._rows(found, chosen, vocabulary, seq_len)]
    packed = [shard for record in written for shard in record['shards']]
    reports = report.write(self.root, self.recipe, sources=sources, steps=judged, selection=chosen, rows=written)
    manifest = self._manifest(sources, judged, chosen, vocabulary, packed, reports)
    shards.write_json(self.root / 'manifest.json', manifest)
    keep = {file['path'] for file in manifest['files']} | {f'build/{name}.json' for name in self.tasks.lasting}
    shards.remove_leftovers(self.root, keep | {'build/lock'})
    _say(f'done in {time.monotonic() - started:.0f} s: {_summary(manifest)}\nwhat was left out and why: '
         f'{self.root / "report.html"}')

  def _documents(self) -> list[dict]:
    """The first stage: a record a source, with its units (shards of documents). Nothing is fetched for what is recorded."""
    _say('1 documents')
    started, tasks = time.monotonic(), []
    keys = {source.name: _source_key(source) for source in self.recipe.sources}
    missing = [source for source in self.recipe.sources
               if self.tasks.recorded(f'documents-{source.name}', keys[source.name]) is None]
    with _scratch(self.root) as scratch:
      for source in missing:
        inputs = source.fetch(scratch)
        for i, unit in enumerate(inputs):
          name = f'{source.name}/{i:05d}-of-{len(inputs):05d}'
          key = shards.key_of(keys[source.name], name, unit.lineage)
          tasks.append((f'documents-{source.name}-{i:05d}', key, source, unit, name))
      written = self.tasks.run('documents', documents.write_shards, tasks, lasting=False)
    for source in missing:
      units = [record for record in written if record['source'] == source.name]
      shards.write_record(self.root, f'documents-{source.name}', keys[source.name],
                          [file for unit in units for file in unit['files']], source=source.name, units=units)
    records = [self.tasks.recorded(f'documents-{source.name}', keys[source.name]) for source in self.recipe.sources]
    for record in records:
      units = record['units']
      origin = units[0]['lineage'] + (f' and {len(units) - 1} more' if len(units) > 1 else '')
      _say(f'    {record["source"]:20} {_total(units, "documents"):9,} documents {_total(units, "bytes") / 1e6:9.2f} MB'
           f'   {origin}')
      _say_removed(units)
    _say(f'    {_rate(_total(written, "bytes") / 1e6, "MB of text", time.monotonic() - started)}' if missing else _BEFORE)
    return records

  def _retire_manifest(self) -> None:
    """The old corpus is about to be overwritten: from here on nothing may open it."""
    if self.old is not None and self.old['key'] != self.key:
      _say('    the recipe, its inputs or the program changed: rebuilding what they touch')
      (self.root / 'manifest.json').unlink(missing_ok=True)
      self.old = None

  def _steps(self, found: list[Shard]) -> tuple[list[Shard], list[list[dict]]]:
    """The steps of the recipe: the shards with their verdicts, and a list of records (a shard each) for each step."""
    judged, found = [], list(found)
    for step in self.recipe.steps:
      _say(f'2 {step.name}')
      started = time.monotonic()
      mine = [i for i, shard in enumerate(found) if shard.source in (getattr(step, 'sources', ()) or {shard.source})]
      records = step.judge(self.tasks, [found[i] for i in mine])
      for i, record in zip(mine, records, strict=True):
        found[i] = found[i].judged(record)
      judged.append(records)
      _say(f'    of {_total(records, "documents"):,} documents, {_total(records, "bytes") / 1e6:.2f} MB, in '
           f'{time.monotonic() - started:.1f} s')
      _say_removed(records)
    return found, judged

  def _selection(self, found: list[Shard]) -> list[dict]:
    """Records of all verdicts, a shard each."""
    recipe, code, tasks = self.recipe, shards.code_of(chat, selection, verdicts), []
    for i, shard in enumerate(found):
      how = (shard.source in self.formats, recipe.min_bytes, recipe.validation_fraction)
      tasks.append((f'selection-{i:05d}', shards.key_of(shard.documents, shard.hashes, how, code), shard, *how))
    records = self.tasks.run('selection', selection.write_shard, tasks)
    counts = _verdicts([record['counts'] for record in records])
    _say(f'3 selection\n    {counts["train"]:,} documents to train on, {counts["validation"]:,} held out')
    _say_removed(records)
    if not counts['train']:
      raise ValueError(f'recipe {recipe.name}: no document is left to train on: see {self.root / "selection"}')
    return records

  def _tokenizer(self, found: list[Shard], chosen: list[dict]) -> dict:
    """The record of the tokenizer."""
    _say('4 tokenizer')
    size, started = self.recipe.vocab_size, time.monotonic()
    given = self.recipe.tokenizer
    inputs = _tokenizer_key(given) if given else ([shard.hashes for shard in found], _hashes(chosen), size)
    key = shards.key_of(inputs, shards.code_of(chat, tokenizer, selection, verdicts))
    record = self.tasks.recorded('tokenizer', key)
    done_before = record is not None
    if not done_before:
      self._retire_manifest()
      record = (tokenizer.adopt(self.root, given, 'tokenizer', key) if given else
                tokenizer.train(self.root, self._words(found, chosen), 'tokenizer', key, vocab_size=size))
    fewer = f', not {size:,}: the text has no more pairs to merge' if record['vocab_size'] < size and not given else ''
    _say(f'    {record["vocab_size"]:,} tokens{f", as in {given}" if given else fewer}')
    _say(_BEFORE if done_before else f'    in {time.monotonic() - started:.1f} s')
    return record

  def _words(self, found: list[Shard], chosen: list[dict]) -> Iterator[str]:
    """What a tokenizer is trained on: all training documents, or as many of them as have `_TOKENIZER_BYTES`."""
    n_bytes = sum(record['text_bytes'].get(selection.TRAIN, 0) for record in chosen)
    every = -(-n_bytes // _TOKENIZER_BYTES)  # th document
    for shard in found:
      texts = (text for text, _ in selection.read_split(self.root, shard, selection.TRAIN))
      words = map(chat.words, texts) if shard.source in self.formats else texts
      yield from itertools.islice(words, 0, None, max(every, 1))

  def _rows(self, found: list[Shard], chosen: list[dict], vocabulary: dict, seq_len: int) -> list[dict]:
    """Records of rows of one length, a shard of documents each."""
    _say(f'5 rows of {seq_len}')
    started, code = time.monotonic(), shards.code_of(chat, pack, rows, tokenizer, selection, verdicts)
    ends, buckets, tasks = (vocabulary['bos'], vocabulary['eot']), tuple(self.recipe.length_buckets), []
    for shard, verdict in zip(found, chosen):
      how = self.formats.get(shard.source)
      chats = None if how is None else (self._chat_template(vocabulary), how.too_long)
      key = shards.key_of(shard.documents, shard.hashes, _hashes([verdict]), vocabulary['sha256'], ends, chats, buckets,
                          seq_len, code)
      tasks.append((f'rows-{seq_len}-{shard.source}-{len(tasks):05d}', key, shard, seq_len, *ends, chats, buckets))
    done_before = None not in [self.tasks.recorded(*task[:2]) for task in tasks]
    records = self.tasks.run(f'rows of {seq_len}', rows.write_shards, tasks)
    written = [shard for record in records for shard in record['shards']]
    for part in dict.fromkeys(shard['source'] for shard in written):
      for split in (selection.TRAIN, selection.VALIDATION):
        if mine := [shard for shard in written if (shard['source'], shard['split']) == (part, split)]:
          fill = _total(mine, 'positions') / _total(mine, 'rows') / seq_len
          _say(f'    {part:20} {split:10} {_total(mine, "rows"):9,} rows {_total(mine, "tokens"):12,} tokens'
               f'   {fill:.2%} full')
    dropped = _verdicts([reasons for record in records for reasons in record['dropped'].values()])
    _say_dropped(f'conversations that do not become rows of {seq_len}', dropped)
    if not any(shard['split'] == selection.TRAIN for shard in written):
      raise ValueError(f'recipe {self.recipe.name}: no conversation is left for rows of {seq_len} tokens: {dict(dropped)}')
    _say(_BEFORE if done_before else
         f'    {_rate(_total(written, "tokens") / 1e6, "M tokens", time.monotonic() - started)}')
    return records

  def _chat_template(self, vocabulary: dict) -> str:
    """In Jinja: of the recipe's file, or the tokenizer's own, or ours."""
    named = {how.template for how in self.formats.values()} - {''}
    if len(named) > 1:
      raise ValueError(f'recipe {self.recipe.name}: its sources name {len(named)} chat templates; a model has one')
    return pathlib.Path(*named).read_text(encoding='utf-8') if named else vocabulary['chat_template'] or chat.OURS

  def _manifest(self, sources: list[dict], judged: list[list[dict]], chosen: list[dict], vocabulary: dict,
                packed: list[dict], reports: list[dict]) -> dict:
    parts = [*(record for source in sources for record in source['units']), *itertools.chain(*judged), *chosen, vocabulary]
    row_files = [{key: shard[key] for key in ('path', 'bytes', 'xxh3')} for shard in packed]
    per_source = {}
    for source, record in zip(self.recipe.sources, sources):
      facts = {'lineage': [unit['lineage'] for unit in record['units']],
               'documents': _verdicts([one['counts'] for one in chosen if one['source'] == source.name])}
      mine = [shard for shard in packed if shard['of'] == source.name]
      of_part = lambda part, split, mine=mine: [shard for shard in mine if shard['seq_len'] == self.seq_lens[0] and
                                                (shard['source'], shard['split']) == (part, split)]
      for part in dict.fromkeys(shard['source'] for shard in mine) or [source.name]:
        per_source[part] = facts | {split: {fact: _total(of_part(part, split), fact)
                                            for fact in ('documents', 'text_bytes', 'tokens')}
                                    for split in (selection.TRAIN, selection.VALIDATION)}
    return {
      'format': shards.FORMAT, 'recipe': shards.describe(self.recipe), 'key': self.key, 'code': _code_version(),
      'seq_lens': self.seq_lens,
      **{fact: vocabulary[fact] for fact in ('vocab_size', 'bos', 'eot')}, 'tokenizer_sha256': vocabulary['sha256'],
      'chat_template': self._chat_template(vocabulary) if self.formats else None,
      'sources': per_source, 'rows': packed,
      'files': [file for part in parts for file in part['files']] + row_files + reports,
      'made_with': {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in _LIBRARIES}}}


def _corpus_key(recipe: Recipe) -> str:
  """What decides a corpus but for its row lengths, which can be added, and the fallback, which is a corpus of its own."""
  facts = shards.describe(dataclasses.replace(recipe, seq_lens=(), fallback=None, tokenizer=''))
  given = _tokenizer_key(recipe.tokenizer) if recipe.tokenizer else None
  return shards.key_of(facts, given, [_source_key(source) for source in recipe.sources],
                       [step.state() for step in recipe.steps], _code_version())


def _code_version() -> str:
  return shards.code_of(chat, documents, sandbox, verdicts, selection, tokenizer, pack, rows, report, report_page)


def _tokenizer_key(given: str) -> str:
  """Of a tokenizer that is not trained here: what it is, not where."""
  file, facts = tokenizer.facts_of(given)
  return shards.key_of(shards.sha256_file(file), facts)


def _source_key(source) -> str:
  modules = [documents, sandbox, text, sys.modules[type(source).__module__], *([chat] if hasattr(source, 'chats') else [])]
  return shards.key_of(shards.describe(source), source.state(), shards.describe(documents.limits_of(source)),
                       shards.code_of(*modules))


def _hashes(records: list[dict]) -> list[str]:
  return [file['xxh3'] for record in records for file in record['files']]


def _manifest_of(root: pathlib.Path) -> dict | None:
  """The manifest that is there, if this version can read it."""
  try:
    return shards.read_manifest(root)
  except (FileNotFoundError, ValueError):
    return None


def _is_complete(recipe: Recipe, root: pathlib.Path) -> bool:
  """Says so if the corpus is there, was made from this recipe, these inputs and this program, and has these row lengths."""
  manifest = _manifest_of(root)
  complete = (manifest is not None and manifest['key'] == _corpus_key(recipe)
              and set(recipe.seq_lens) <= set(manifest['seq_lens'])
              and all(shards.is_there(root, file) for file in manifest['files']))
  if complete:
    _say(f'corpus {recipe.name!r} is complete, nothing to do: {root}: {_summary(manifest)}')
  return complete


@contextlib.contextmanager
def _locked(root: pathlib.Path):
  """The directory, made and held against a second build. Nothing is written beside somebody else's files."""
  path = root / 'build' / 'lock'
  try:
    if root.is_dir() and not path.exists() and any(entry != path.parent or any(entry.iterdir()) for entry in root.iterdir()):
      raise ValueError(f'{root} holds other files and no corpus: give --out a new or empty directory')
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, 'w')
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise OSError(error.errno, f'cannot write in {root} ({error.strerror}): choose another --out') from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f'another build is writing {root}: wait for it, or end it') from error
    for leftover in root.glob(f'{shards.TEMPORARY}*'):
      leftover.unlink()
    yield


@contextlib.contextmanager
def _scratch(root: pathlib.Path):
  """Where sources are fetched to: inside the corpus's directory, and gone afterwards."""
  scratch = root / 'scratch'
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  try:
    yield scratch
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _total(records: list[dict], fact: str) -> int:
  return sum(record.get(fact, 0) for record in records)


def _verdicts(counts: list[dict]) -> collections.Counter:
  """How many documents in all, by what became of them."""
  return sum(map(collections.Counter, counts), collections.Counter())


def _say_removed(records: list[dict]) -> None:
  """A line for each reason for which documents are left out."""
  reasons = sum((collections.Counter({reason: of['documents'] for reason, of in record['removed'].items()})
                 for record in records), collections.Counter())
  for reason, n in reasons.most_common():
    _say(f'      left out {n:9,} {reason}')


def _say_dropped(what: str, reasons: dict) -> None:
  if reasons:
    _say(f'    {what}: ' + ', '.join(f'{n:,} x {reason}' for reason, n in sorted(reasons.items())))


def _rate(amount: float, unit: str, seconds: float) -> str:
  return f'{amount:.2f} {unit} in {seconds:.1f} s: {amount / max(seconds, 1e-9):.2f} {unit.split()[0]}/s'


def _summary(manifest: dict) -> str:
  train, validation = ([source[split] for source in manifest['sources'].values()] for split in ('train', 'validation'))
  return (f'{_total(train, "tokens"):,} training and {_total(validation, "tokens"):,} validation tokens, '
          f'{_total(train, "text_bytes") / _total(train, "tokens"):.2f} bytes a token, '
          f'rows of {", ".join(map(str, manifest["seq_lens"]))}')


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _parse(argv) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog='python -m data_pipeline.build', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--recipe', required=True, help='a name in data_pipeline/recipes (quickstart) or the path of a '
                      '.py file, with :ARG for get_recipe(ARG): quickstart:python')
  parser.add_argument('--out', required=True, type=pathlib.Path, help='directory of the corpus: new, empty, or built before')
  parser.add_argument('--seq_lens', help="row lengths to pack, e.g. 512 or 512,4096 (default: the recipe's); "
                      'lengths that the corpus already has are kept')
  parser.add_argument('--tokenizer', help='use this tokenizer, of the model to train further, instead of training one: the '
                      'workdir of a run, or any folder with a tokenizer.json')
  parser.add_argument('--workers', type=int, help='processes (default: one a core)')
  parser.add_argument('--runner', choices=['local', 'ray'], default='local', help='who does the work: processes of this '
                      'machine, or a Ray cluster (extra ray)')
  parser.add_argument('--address', default='auto', help="of the Ray cluster; 'local' starts one for the while")
  return parser.parse_args(argv)


def main(argv=None) -> int:
  arguments = _parse(argv)
  try:
    recipe = load_recipe(arguments.recipe)
    if arguments.seq_lens:
      recipe = dataclasses.replace(recipe, seq_lens=_parse_lengths(arguments.seq_lens))
    if arguments.tokenizer:
      recipe = recipe.with_tokenizer(arguments.tokenizer)
    runner = RayRunner(arguments.address, arguments.workers) if arguments.runner == 'ray' else None
    build(recipe, arguments.out, workers=arguments.workers, runner=runner)
  except (ValueError, OSError) as error:
    _say(f'error: {(isinstance(error, OSError) and not error.filename and error.strerror) or error}')
    return 1
  except KeyboardInterrupt:
    _say('interrupted: run the same command again to go on')
    return 130
  return 0


def _parse_lengths(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(','))
  except ValueError as error:
    raise ValueError(f'--seq_lens={text}: give numbers with commas between them, e.g. 512,4096') from error


if __name__ == '__main__':
  sys.exit(main())
