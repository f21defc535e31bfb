"""Files of a corpus: written whole or not at all, entered in a manifest, verified by hash.

    python -m data_pipeline.shards verify DIR      # reads every byte of a corpus and compares it with its manifest

Every file is written under a temporary name, synced, renamed, and then entered in a record (JSON) with its size, its hash
and the key of what it was made from. A rerun trusts a record whose key and files match, and never a file name.
"""

import argparse
import ast
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import sys

from array_record.python import array_record_module

from data_pipeline import pack

FORMAT = 2  # of the manifest and of rows; a reader refuses others, but for 1: the same without masks and chats
TEMPORARY = '.partial-'


@contextlib.contextmanager
def committed(path: pathlib.Path):
  """Yields a temporary path to write; renames it to `path` once its bytes are on disk, removes it on any failure."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'{TEMPORARY}{os.getpid()}-{path.name}')
  try:
    yield temporary
    with open(temporary, 'rb+') as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)


def write_json(path: pathlib.Path, value) -> None:
  with committed(path) as temporary:
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def entry(root: pathlib.Path, path: pathlib.Path) -> dict:
  """What records and manifests say of a finished file: {path, bytes, xxh3}."""
  return {'path': path.relative_to(root).as_posix(), 'bytes': path.stat().st_size, 'xxh3': hash_file(path)}


def hash_file(path: pathlib.Path) -> str:
  import xxhash  # training opens a corpus without it
  digest = xxhash.xxh3_128()
  with open(path, 'rb') as file:
    while block := file.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def sha256_file(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def write_rows(path: pathlib.Path, records) -> None:
  """Commits an ArrayRecord of these records, one a group so that any is read alone."""
  with committed(path) as temporary:
    try:
      writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1,zstd:1')
      for record in records:
        writer.write(record)
      writer.close()  # the library reports a failed write, a full disk too, only here
    except RuntimeError as error:
      code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
      raise OSError(code, f'cannot write {path}: {error}') from error


# What a build has already done: a record a unit of work.


def key_of(*parts) -> str:
  """A key of everything that decides a unit's output: JSON-able values, canonical."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def describe(value) -> object:
  """A recipe or a part of it as plain JSON values, with the names of its classes: what its key is made of."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {'class': type(value).__qualname__, **fields}
  if isinstance(value, (list, tuple)):
    return [describe(item) for item in value]
  if value is not None and not isinstance(value, (str, int, float, bool)):
    raise ValueError(f'a recipe is made of dataclasses, tuples, texts and numbers, and {value!r} is none of them')
  return value


def code_of(*modules) -> str:
  """A hash of what these modules do: of their source without comments, docstrings and layout."""
  digest = hashlib.sha256()
  for module in modules:
    tree = ast.parse(pathlib.Path(module.__file__).read_text(encoding='utf-8'))
    for node in ast.walk(tree):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
        node.body[0] = ast.Pass()
    digest.update(ast.unparse(tree).encode())
  return digest.hexdigest()[:16]


def is_there(root: pathlib.Path, file: dict) -> bool:
  """Whether a recorded file exists with its recorded size."""
  path = root / file['path']
  return path.is_file() and path.stat().st_size == file['bytes']


def read_record(root: pathlib.Path, name: str, key: str) -> dict | None:
  """The record of a unit if it was finished with this key and its files are all there; else None: do it again."""
  path = root / 'build' / f'{name}.json'
  if not path.exists():
    return None
  record = json.loads(path.read_text(encoding='utf-8'))
  return record if record['key'] == key and all(is_there(root, file) for file in record['files']) else None


def write_record(root: pathlib.Path, name: str, key: str, files: list[dict], **facts) -> dict:
  record = {'key': key, 'files': files, **facts}
  write_json(root / 'build' / f'{name}.json', record)
  return record


def remove_leftovers(root: pathlib.Path, keep: set[str]) -> None:
  """Removes what killed builds and earlier recipes left in the corpus's own folders: files that nothing lists."""
  for folder in ('documents', 'rejects', 'verdicts', 'selection', 'build', *(path.name for path in root.glob('rows-*'))):
    for path in sorted((root / folder).rglob('*'), reverse=True):
      if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
      elif path.is_file() and path.relative_to(root).as_posix() not in keep:
        path.unlink()


# The manifest.


def read_manifest(root: pathlib.Path) -> dict:
  """DIR/manifest.json. FileNotFoundError or ValueError with one line where there is no finished corpus."""
  path = root / 'manifest.json'
  if not path.exists():
    reason = 'was never finished (no manifest.json)' if (root / 'build').exists() else 'is not there (no manifest.json)'
    raise FileNotFoundError(f'the corpus at {root} {reason}: build it with `python -m data_pipeline.build '
                            f'--recipe=… --out={root}`')
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}): remove it and build the corpus again') from error
  if manifest.get('format') == 1:
    rows = [{'masked': False} | entry for entry in manifest['rows']]
    manifest |= {'format': FORMAT, 'bos': manifest['eot'], 'chat_template': None, 'rows': rows}
  if manifest.get('format') != FORMAT:
    raise ValueError(f'the corpus at {root} has format {manifest.get("format")} and this version reads {FORMAT}: '
                     'build it again')
  return manifest


def verify(root: pathlib.Path) -> str:
  """Reads every file that the manifest lists. ValueError names the first that differs; else a line to print."""
  manifest = read_manifest(root)
  for file in manifest['files']:
    path = root / file['path']
    if not path.is_file():
      raise ValueError(f'{path} is missing: build the corpus again')
    if entry(root, path) != file:
      raise ValueError(f'{path} differs from what was built: remove it and build the corpus again')
  if sha256_file(root / 'tokenizer.json') != manifest['tokenizer_sha256']:
    raise ValueError(f'{root / "tokenizer.json"} differs from what was built: build the corpus again')
  tokens = 0
  for rows in manifest['rows']:
    tokens += _verify_rows(root, rows, manifest)
  size = sum(file['bytes'] for file in manifest['files'])
  return f'{root}: {len(manifest["files"])} files, {size:,} bytes, {tokens:,} tokens in rows: all as built'


def _verify_rows(root: pathlib.Path, rows: dict, manifest: dict) -> int:
  """Tokens (targets that are trained on) of one shard, recounted. ValueError where they are not as the manifest says."""
  reader = array_record_module.ArrayRecordReader(str(root / rows['path']))
  n_rows, tokens = reader.num_records(), 0
  for start in range(0, n_rows, 1024):
    records = reader.read(list(range(start, min(start + 1024, n_rows))))
    batch = pack.decode_rows(records, rows['seq_len'], pack.token_dtype(manifest['vocab_size']), rows['masked'])
    tokens += int(batch['loss_mask'].sum())
  if n_rows != rows['rows'] or tokens != rows['tokens']:
    raise ValueError(f'{root / rows["path"]} has {n_rows} rows of {tokens} tokens and the manifest says {rows["rows"]} '
                     f'of {rows["tokens"]}: build the corpus again')
  return tokens


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog='python -m data_pipeline.shards', description=__doc__.partition('\n')[0])
  parser.add_argument('command', choices=['verify'])
  parser.add_argument('directory', type=pathlib.Path, help='a corpus built by data_pipeline.build')
  arguments = parser.parse_args(argv)
  try:
    print(verify(arguments.directory))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
