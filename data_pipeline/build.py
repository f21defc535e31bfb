"""Builds a corpus: sources -> documents -> selection -> tokenizer -> packed rows.

    python -m data_pipeline.build --recipe=quickstart --out=DIR
    python -m data_pipeline.build --recipe=my_recipe.py --out=DIR --seq_lens=512,4096
    python -m data_pipeline.build --recipe=sft:chats.jsonl --tokenizer=runs/quickstart --out=DIR

Run again, it goes on where it was killed, rebuilds what a changed recipe, input or program touches, and leaves a finished
corpus alone. docs/data.md shows what lies in DIR and how to write a recipe.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import importlib.util
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Iterator

if __name__ == '__main__' and not all(map(importlib.util.find_spec, ('pyarrow', 'resiliparse', 'xxhash'))):
  sys.exit("error: building a corpus needs the data extra: pip install -e '.[data]' (training on one does not)")

from data_pipeline import chat, documents, pack, rows, selection, shards, tokenizer
from data_pipeline import recipe as recipes
from data_pipeline.recipe import Recipe, SourceUnavailable, load_recipe
from data_pipeline.runners import LocalRunner
from data_pipeline.sources import text

_LIBRARIES = ('array-record', 'pyarrow', 'resiliparse', 'tokenizers')  # whose versions a manifest names
_BEFORE = '    done before'


def build(recipe: Recipe, out, *, workers: int | None = None) -> pathlib.Path:
  """Builds the corpus of `recipe` in the directory `out` and returns its path. Progress is shown on stderr.

  Resumable: every shard is committed whole, and a rerun trusts only what is recorded with the same recipe, inputs and code.
  Row lengths that the corpus already has are kept. ValueError or OSError with one line for bad input, a full disk, …
  """
  recipe.validate()
  runner, root = LocalRunner(workers), pathlib.Path(out).absolute()
  try:
    with _locked(root):
      if not any(_is_complete(candidate, root) for candidate in (recipe, recipe.fallback) if candidate):
        _build_or_fall_back(recipe, root, runner)
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise OSError(error.errno, f'the disk of {root} is full: free some space and run the same command again, '
                                 'which keeps what was finished') from error
    raise
  return root


def _build_or_fall_back(recipe: Recipe, root: pathlib.Path, runner: LocalRunner) -> None:
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

  def __init__(self, recipe: Recipe, root: pathlib.Path, runner: LocalRunner):
    self.recipe, self.root, self.runner = recipe, root, runner
    self.key = _corpus_key(recipe)
    self.formats = {source.name: source.chats for source in recipe.sources if hasattr(source, 'chats')}
    self.old = _manifest_of(root)
    self.seq_lens = sorted({*recipe.seq_lens, *(self.old['seq_lens'] if self.old else ())})
    self.records_used = set()  # those of single shards of documents only bridge a killed build, and go when it ends

  def run(self) -> None:
    started = time.monotonic()
    _say(f'building corpus {self.recipe.name!r} in {self.root}, processes: {self.runner.workers}')
    sources = self._documents()
    units = [unit for source in sources for unit in source['units']]
    chosen = self._selection(units)
    vocabulary = self._tokenizer(units, chosen)
    packed = [shard for seq_len in self.seq_lens for shard in self._rows(units, chosen, vocabulary, seq_len)]
    manifest = self._manifest(sources, chosen, vocabulary, packed)
    shards.write_json(self.root / 'manifest.json', manifest)
    keep = {file['path'] for file in manifest['files']} | {f'build/{name}.json' for name in self.records_used}
    shards.remove_leftovers(self.root, keep | {'build/lock'})
    _say(f'done in {time.monotonic() - started:.0f} s: {_summary(manifest)}')

  def _recorded(self, name: str, key: str) -> dict | None:
    self.records_used.add(name)
    return shards.read_record(self.root, name, key)

  def _run_tasks(self, function, tasks: list[tuple]) -> list[dict]:
    """Records of tasks (name, key, *arguments), in order; those not yet recorded are run as function(root, *task)."""
    todo = [(self.root, *task) for task in tasks if shards.read_record(self.root, *task[:2]) is None]
    if todo:
      self._retire_manifest()
    told = time.monotonic()
    for done, _ in enumerate(self.runner.run(function, todo), 1):
      if time.monotonic() - told > 5:
        told = time.monotonic()
        _say(f'    {done} of {len(todo)} shards')
    return [shards.read_record(self.root, *task[:2]) for task in tasks]

  def _documents(self) -> list[dict]:
    """Stage 1: a record a source, with its units (shards of documents). Nothing is fetched for what is recorded."""
    _say('1/4 documents')
    started, tasks = time.monotonic(), []
    keys = {source.name: _source_key(source) for source in self.recipe.sources}
    missing = [source for source in self.recipe.sources
               if self._recorded(f'documents-{source.name}', keys[source.name]) is None]
    with _scratch(self.root) as scratch:
      for source in missing:
        inputs = source.fetch(scratch)
        for i, unit in enumerate(inputs):
          path = f'documents/{source.name}/{i:05d}-of-{len(inputs):05d}.parquet'
          key = shards.key_of(keys[source.name], path, unit.lineage)
          tasks.append((f'documents-{source.name}-{i:05d}', key, source, unit, path))
      written = self._run_tasks(documents.write_shard, tasks)
    for source in missing:
      units = [record for record in written if record['source'] == source.name]
      shards.write_record(self.root, f'documents-{source.name}', keys[source.name],
                          [file for unit in units for file in unit['files']], source=source.name, units=units)
    records = [self._recorded(f'documents-{source.name}', keys[source.name]) for source in self.recipe.sources]
    for record in records:
      units = record['units']
      origin = units[0]['lineage'] + (f' and {len(units) - 1} more' if len(units) > 1 else '')
      _say(f'    {record["source"]:20} {_total(units, "documents"):9,} documents {_total(units, "bytes") / 1e6:9.2f} MB'
           f'   {origin}')
    _say(f'    {_rate(_total(written, "bytes") / 1e6, "MB of text", time.monotonic() - started)}' if missing else _BEFORE)
    return records

  def _retire_manifest(self) -> None:
    """The old corpus is about to be overwritten: from here on nothing may open it."""
    if self.old is not None and self.old['key'] != self.key:
      _say('    the recipe, its inputs or the program changed: rebuilding what they touch')
      (self.root / 'manifest.json').unlink(missing_ok=True)
      self.old = None

  def _selection(self, units: list[dict]) -> dict:
    """Stage 2: the record of all verdicts."""
    recipe, paths = self.recipe, [unit['files'][0]['path'] for unit in units]
    chats = [unit['source'] in self.formats for unit in units]
    key = shards.key_of(_hashes(units), chats, recipe.min_bytes, recipe.validation_fraction, shards.code_of(chat, selection))
    record = self._recorded('selection', key)
    if record is None:
      self._retire_manifest()
      record = selection.select(self.root, paths, 'selection', key, chats=chats, min_bytes=recipe.min_bytes,
                                validation_fraction=recipe.validation_fraction)
    counts = _verdicts(record['counts'])
    _say(f'2/4 selection\n    {counts["train"]:,} documents to train on, {counts["validation"]:,} held out; dropped '
         f'{counts["duplicate"]:,} exact duplicates and {counts["short"]:,} shorter than {recipe.min_bytes} bytes')
    _say_dropped('no conversation', {reason: n for reason, n in counts.items() if reason not in selection.VERDICTS})
    if not counts['train']:
      raise ValueError(f'recipe {recipe.name}: no document is left to train on: see {self.root / "selection"}')
    return record

  def _tokenizer(self, units: list[dict], chosen: dict) -> dict:
    """Stage 3: the record of the tokenizer."""
    _say('3/4 tokenizer')
    size, started = self.recipe.vocab_size, time.monotonic()
    given = self.recipe.tokenizer
    inputs = _tokenizer_key(given) if given else (_hashes(units), _hashes([chosen]), size)
    key = shards.key_of(inputs, shards.code_of(chat, tokenizer, selection))
    record = self._recorded('tokenizer', key)
    done_before = record is not None
    if not done_before:
      self._retire_manifest()
      record = (tokenizer.adopt(self.root, given, 'tokenizer', key) if given else
                tokenizer.train(self.root, self._words(units), 'tokenizer', key, vocab_size=size))
    fewer = f', not {size:,}: the text has no more pairs to merge' if record['vocab_size'] < size and not given else ''
    _say(f'    {record["vocab_size"]:,} tokens{f", as in {given}" if given else fewer}')
    _say(_BEFORE if done_before else f'    in {time.monotonic() - started:.1f} s')
    return record

  def _words(self, units: list[dict]) -> Iterator[str]:
    """What a tokenizer is trained on."""
    for unit in units:
      texts = selection.read_split(self.root, unit['files'][0]['path'], 'train')
      yield from map(chat.words, texts) if unit['source'] in self.formats else texts

  def _rows(self, units: list[dict], chosen: dict, vocabulary: dict, seq_len: int) -> list[dict]:
    """Stage 4: shards of rows of one length."""
    _say(f'4/4 rows of {seq_len}')
    started, code = time.monotonic(), shards.code_of(chat, pack, rows, tokenizer, selection)
    ends, tasks = (vocabulary['bos'], vocabulary['eot']), []
    for unit, verdicts in zip(units, chosen['files']):
      how = self.formats.get(unit['source'])
      chats = None if how is None else (self._chat_template(vocabulary), how.too_long)
      key = shards.key_of(_hashes([unit]), verdicts['xxh3'], vocabulary['sha256'], ends, chats, seq_len, code)
      path = unit['files'][0]['path']
      tasks.append((f'rows-{seq_len}-{unit["source"]}-{len(tasks):05d}', key, unit['source'], path, seq_len, *ends, chats))
    done_before = None not in [self._recorded(*task[:2]) for task in tasks]
    records = self._run_tasks(rows.write_shards, tasks)
    written = [shard for record in records for shard in record['shards']]
    for source in self.recipe.sources:
      for split in (selection.TRAIN, selection.VALIDATION):
        if mine := [shard for shard in written if (shard['source'], shard['split']) == (source.name, split)]:
          fill = _total(mine, 'positions') / _total(mine, 'rows') / seq_len
          _say(f'    {source.name:20} {split:10} {_total(mine, "rows"):9,} rows {_total(mine, "tokens"):12,} tokens'
               f'   {fill:.2%} full')
    dropped = _verdicts([reasons for record in records for reasons in record['dropped'].values()])
    _say_dropped(f'conversations that do not become rows of {seq_len}', dropped)
    if not any(shard['split'] == selection.TRAIN for shard in written):
      raise ValueError(f'recipe {self.recipe.name}: no conversation is left for rows of {seq_len} tokens: {dict(dropped)}')
    _say(_BEFORE if done_before else
         f'    {_rate(_total(written, "tokens") / 1e6, "M tokens", time.monotonic() - started)}')
    return written

  def _chat_template(self, vocabulary: dict) -> str:
    """In Jinja: of the recipe's file, or the tokenizer's own, or ours."""
    named = {how.template for how in self.formats.values()} - {''}
    if len(named) > 1:
      raise ValueError(f'recipe {self.recipe.name}: its sources name {len(named)} chat templates; a model has one')
    return pathlib.Path(*named).read_text(encoding='utf-8') if named else vocabulary['chat_template'] or chat.OURS

  def _manifest(self, sources: list[dict], chosen: dict, vocabulary: dict, packed: list[dict]) -> dict:
    counts, per_source = iter(chosen['counts']), {}
    for source, record in zip(self.recipe.sources, sources):
      verdicts = [next(counts) for _ in record['units']]
      mine = [shard for shard in packed if shard['source'] == source.name and shard['seq_len'] == self.seq_lens[0]]
      per_source[source.name] = {
        'lineage': [unit['lineage'] for unit in record['units']],
        'documents': _verdicts(verdicts),
        **{split: {fact: _total([shard for shard in mine if shard['split'] == split], fact)
                   for fact in ('documents', 'text_bytes', 'tokens')}
           for split in (selection.TRAIN, selection.VALIDATION)}}
    parts = [*sources, chosen, vocabulary]
    row_files = [{key: shard[key] for key in ('path', 'bytes', 'xxh3')} for shard in packed]
    return {
      'format': shards.FORMAT, 'recipe': recipes.describe(self.recipe), 'key': self.key, 'code': _code_version(),
      'seq_lens': self.seq_lens,
      **{fact: vocabulary[fact] for fact in ('vocab_size', 'bos', 'eot')}, 'tokenizer_sha256': vocabulary['sha256'],
      'chat_template': self._chat_template(vocabulary) if self.formats else None,
      'sources': per_source, 'rows': packed, 'files': [file for part in parts for file in part['files']] + row_files,
      'made_with': {'python': platform.python_version(), **{name: importlib.metadata.version(name) for name in _LIBRARIES}}}


def _corpus_key(recipe: Recipe) -> str:
  """What decides a corpus but for its row lengths, which can be added, and the fallback, which is a corpus of its own."""
  facts = recipes.describe(dataclasses.replace(recipe, seq_lens=(), fallback=None, tokenizer=''))
  given = _tokenizer_key(recipe.tokenizer) if recipe.tokenizer else None
  return shards.key_of(facts, given, [_source_key(source) for source in recipe.sources], _code_version())


def _code_version() -> str:
  return shards.code_of(chat, documents, selection, tokenizer, pack, rows)


def _tokenizer_key(given: str) -> str:
  """Of a tokenizer that is not trained here: what it is, not where."""
  file, facts = tokenizer.facts_of(given)
  return shards.key_of(shards.sha256_file(file), facts)


def _source_key(source) -> str:
  code = shards.code_of(documents, text, sys.modules[type(source).__module__], *([chat] if hasattr(source, 'chats') else []))
  return shards.key_of(recipes.describe(source), source.state(), code)


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
  return parser.parse_args(argv)


def main(argv=None) -> int:
  arguments = _parse(argv)
  try:
    recipe = load_recipe(arguments.recipe)
    if arguments.seq_lens:
      recipe = dataclasses.replace(recipe, seq_lens=_parse_lengths(arguments.seq_lens))
    if arguments.tokenizer:
      recipe = recipe.with_tokenizer(arguments.tokenizer)
    build(recipe, arguments.out, workers=arguments.workers)
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
