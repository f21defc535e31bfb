"""Building a corpus: resumable, the same bytes whatever happened on the way, and one clear line where it cannot."""

import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import corpora
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, loader, selection, shards
from data_pipeline.recipe import Recipe, SourceUnavailable, load_recipe
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.text import clean, html_to_text
from data_pipeline.sources.text_files import TextFiles

ROOT = Path(__file__).parents[1]

RECIPE_FILE = """
import sys
sys.path.insert(0, {tests!r})
import corpora
def get_recipe():
  return corpora.recipe({folder!r})
"""


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  return corpora.write_files(tmp_path_factory.mktemp('text') / 'files')


@pytest.fixture(scope='module')
def finished(text):
  """A corpus built without interruption, to look at and to copy."""
  return build.build(corpora.recipe(text), text.parent / 'finished', workers=1)


def recipe_file(folder: Path, text: Path) -> Path:
  path = folder / 'my_recipe.py'
  path.write_text(RECIPE_FILE.format(tests=str(ROOT / 'tests'), folder=str(text)))
  return path


def command(*arguments, **options) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, '-m', 'data_pipeline.build', *map(str, arguments)], cwd=ROOT, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)


def fails(capsys, *arguments) -> str:
  """The one line with which the command ends; it must have failed."""
  assert build.main(list(map(str, arguments))) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith('error: ')
  return line


# Resuming.


def test_a_finished_corpus_is_left_alone_and_says_so(finished, text, capsys):
  before = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.name != 'lock'}
  build.build(corpora.recipe(text), finished)
  assert 'complete, nothing to do' in capsys.readouterr().err
  assert before == {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.name != 'lock'}


def test_the_bytes_do_not_depend_on_place_or_processes(finished, text, tmp_path):
  build.build(corpora.recipe(text), tmp_path / 'elsewhere', workers=2)
  assert corpora.files_of(tmp_path / 'elsewhere') == corpora.files_of(finished)


@pytest.mark.parametrize('records', [0, 1, 4, 6])  # in stage 1, after its first shard, before the tokenizer, among the rows
def test_a_killed_build_leaves_nothing_trusted_and_reruns_to_the_same_bytes(finished, text, tmp_path, records):
  out = tmp_path / 'out'
  process = command(f'--recipe={recipe_file(tmp_path, text)}', f'--out={out}', '--workers=2', start_new_session=True)
  while process.poll() is None and len(list((out / 'build').glob('*.json'))) < records + (not out.exists()):
    time.sleep(0.001)
  process.kill()
  process.wait()
  process.stderr.close()
  assert process.returncode == -signal.SIGKILL, 'it finished before it could be killed'
  with pytest.raises(FileNotFoundError, match='never finished|not there'):
    loader.open_corpus(out, 32)
  wait_until_dead(process.pid)
  build.build(corpora.recipe(text), out, workers=1)
  assert corpora.files_of(out) == corpora.files_of(finished)


def wait_until_dead(session: int) -> None:
  """Workers of a killed build end by themselves: none is left to write, and none waits for ever."""
  deadline = time.monotonic() + 20
  while True:
    try:
      os.killpg(session, 0)
    except ProcessLookupError:
      return
    assert time.monotonic() < deadline, 'workers of a killed build are still there'
    time.sleep(0.05)


def test_a_changed_recipe_or_input_rebuilds_what_it_touches(finished, text, tmp_path):
  out, mine = tmp_path / 'out', tmp_path / 'text'
  shutil.copytree(text, mine)
  build.build(corpora.recipe(mine), out, workers=1)
  documents = {path: path.stat().st_ino for path in out.glob('documents/*/*')}
  manifest = shards.read_manifest(out)

  build.build(corpora.recipe(mine, min_bytes=200), out, workers=1)  # other verdicts, the same documents
  assert documents == {path: path.stat().st_ino for path in out.glob('documents/*/*')}
  assert shards.read_manifest(out)['sources']['web']['documents']['short'] > manifest['sources']['web']['documents']['short']

  (mine / 'web' / '000.txt').write_text('Something else altogether, and long enough to be a document of its own.')
  build.build(corpora.recipe(mine), out, workers=1)
  changed = {path.parent.name for path, inode in documents.items() if path.stat().st_ino != inode}
  assert changed == {'web'}
  fresh = build.build(corpora.recipe(mine), tmp_path / 'fresh', workers=1)
  assert corpora.files_of(out) == corpora.files_of(fresh)


def test_a_rebuild_that_fails_does_not_leave_the_old_manifest_over_new_files(finished, text, tmp_path):
  out = shutil.copytree(finished, tmp_path / 'out')
  with pytest.raises(ValueError, match='no document is left'):
    build.build(corpora.recipe(text, min_bytes=10**6), out, workers=1)
  with pytest.raises(FileNotFoundError, match='never finished'):
    loader.open_corpus(out, 32)


def test_a_changed_program_rebuilds_and_a_changed_comment_does_not(tmp_path):
  module = types.SimpleNamespace(__file__=str(tmp_path / 'stage.py'))

  def code(source):
    Path(module.__file__).write_text(source)
    return shards.code_of(module)

  assert code('"""Doc."""\nx = 1  # why\n') == code('"""Other."""\n\nx = (1)\n') != code('"""Doc."""\nx = 2\n')


def test_row_lengths_are_added_beside_the_old(finished, text, tmp_path):
  shutil.copytree(finished, tmp_path / 'out')
  build.build(corpora.recipe(text, seq_lens=(48,)), tmp_path / 'out', workers=1)
  assert shards.read_manifest(tmp_path / 'out')['seq_lens'] == [32, 48]
  assert loader.open_corpus(tmp_path / 'out', 48).tokens('web') == loader.open_corpus(finished, 32).tokens('web')
  before, after = corpora.files_of(finished), corpora.files_of(tmp_path / 'out')
  old_rows = {name for name in before if name.startswith('rows-32/')}
  assert old_rows and all(before[name] == after[name] for name in old_rows)


# What is in it.


def test_duplicates_and_short_documents_are_dropped_and_counted(finished):
  counts = shards.read_manifest(finished)['sources']['web']['documents']
  assert counts['duplicate'] == 1 and counts['short'] == 1 and counts['train'] + counts['validation'] == 61
  documents = pq.read_table(finished / 'documents/web/00000-of-00001.parquet')
  verdicts = pq.read_table(finished / 'selection/web/00000-of-00001.parquet')
  assert documents['id'] == verdicts['id']
  dropped = {Path(url).name for url, verdict in zip(documents['url'].to_pylist(), verdicts['verdict'].to_pylist())
             if verdict in ('duplicate', 'short')}
  assert dropped == {'copy.txt', 'short.txt'} or dropped == {'003.txt', 'short.txt'}


def test_the_split_of_a_document_depends_on_nothing_but_its_text(finished, tmp_path):
  more = corpora.write_files(tmp_path / 'text', documents=90)
  splits = []
  for corpus in (finished, build.build(corpora.recipe(more), tmp_path / 'out', workers=1)):
    splits.append({})
    for path in corpus.glob('selection/*/*'):
      table = pq.read_table(path)
      splits[-1].update({key: verdict for key, verdict in zip(table['id'].to_pylist(), table['verdict'].to_pylist())
                         if verdict in ('train', 'validation')})
  common = splits[0].keys() & splits[1].keys()
  assert len(common) > 60 and all(splits[0][key] == splits[1][key] for key in common)
  fractions = [selection.split_of(f'{i * 2654435761 % 2**32:08x}{0:024x}', 0.15) == 'validation' for i in range(4000)]
  assert 0.13 < sum(fractions) / 4000 < 0.17


def test_verify_finds_one_changed_byte(finished, tmp_path, capsys):
  assert shards.main(['verify', str(finished)]) == 0
  assert 'all as built' in capsys.readouterr().out
  for name in ('rows-32/books/train-00000-of-00001.arrayrecord', 'documents/web/00000-of-00001.parquet'):
    out = shutil.copytree(finished, tmp_path / name.replace('/', '-'))
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    loader.open_corpus(out, 32)  # sizes agree
    assert shards.main(['verify', str(out)]) == 1
    assert f'{name} differs from what was built' in capsys.readouterr().err


def test_pages_lose_their_navigation_and_keep_their_content():
  page = '''<html><head><title>T</title></head><body><div class="navheader"><a href="x">Prev</a></div><h1>Gotchas</h1>
    <ul><li>one</li><li>two</li></ul><pre>   1&nbsp;#!/bin/sh\n   2&nbsp;echo 10</pre><p>caf&eacute;&nbsp;au   lait</p>
    <div class="NAVFOOTER">Next</div><script>x = 1</script></body></html>'''.encode('latin-1')
  text = clean(html_to_text(page))
  assert 'Prev' not in text and 'Next' not in text and 'x = 1' not in text
  assert 'Gotchas' in text and 'one' in text and 'two' in text and '#!/bin/sh\necho 10' in text and 'café au lait' in text
  assert clean('a \r\nb\u200b\x00\n\n\n\nc\u00a0d\n') == 'a\nb\n\nc d'


def test_a_pattern_without_files_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='no file matches'):
    TextFiles(name='mine', pattern=f'{tmp_path}/*.doc').state()


# Where it cannot.


@dataclasses.dataclass(frozen=True)
class Unreachable:
  name: str

  def state(self):
    return ''

  def fetch(self, scratch):
    raise SourceUnavailable('no network')


def test_an_unavailable_source_gives_way_to_the_fallback_once_and_for_all(text, tmp_path, capsys):
  fallback = corpora.recipe(text)
  wanted = Recipe(name='wanted', sources=(Unreachable('far'),), vocab_size=400, seq_lens=(32,), validation_fraction=0.1,
                  min_bytes=20, fallback=fallback)
  build.build(wanted, tmp_path / 'out', workers=1)
  assert "notice: no network\nnotice: building 'tiny' instead of 'wanted'" in capsys.readouterr().err
  build.build(wanted, tmp_path / 'out', workers=1)
  assert 'complete, nothing to do' in capsys.readouterr().err
  with pytest.raises(SourceUnavailable, match='left as it was'):  # a corpus that is there is not replaced by a lesser one
    build.build(dataclasses.replace(wanted, fallback=dataclasses.replace(fallback, min_bytes=30)), tmp_path / 'out')
  assert loader.open_corpus(tmp_path / 'out', 32).sources == ('web', 'books')
  with pytest.raises(SourceUnavailable, match='no network'):
    build.build(dataclasses.replace(wanted, fallback=None), tmp_path / 'other')


def test_without_apt_the_quickstart_is_what_python_says_of_itself(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  build.build(dataclasses.replace(load_recipe('quickstart'), vocab_size=300), tmp_path / 'out', workers=1)
  assert 'abs-guide needs apt-get and dpkg-deb' in capsys.readouterr().err
  corpus = loader.open_corpus(tmp_path / 'out', 256)
  assert corpus.sources == ('python-reference', 'python-library')
  assert corpus.text_bytes('python-reference') > 300_000 and corpus.text_bytes('python-library') > 1_000_000


def test_a_full_disk_leaves_nothing_trusted_and_a_rerun_goes_on(finished, text, tmp_path):
  recipe, disk = recipe_file(tmp_path, text), tmp_path / 'disk'
  disk.mkdir()

  def on_a_disk_of(size, kept, *words):  # what is on the disk afterwards is in `kept`
    script = ('mount -t tmpfs -o size=$1 tmpfs "$2" || exit 99; disk=$2; kept=$3; shift 3; '
              '"$@"; code=$?; cp -r "$disk" "$kept"; exit $code')
    return subprocess.run(['unshare', '-rm', 'sh', '-c', script, 'sh', size, str(disk), str(kept), *words], cwd=ROOT,
                          capture_output=True, text=True)

  if on_a_disk_of('1m', tmp_path / 'probe', 'true').returncode:
    pytest.skip('this machine lets no user mount a small disk')
  for size in ('8k', '40k', '72k', '120k'):
    kept = tmp_path / f'kept-{size}'
    done = on_a_disk_of(size, kept, sys.executable, '-m', 'data_pipeline.build', f'--recipe={recipe}', f'--out={disk}/out',
                        '--workers=1')
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f'error: the disk of {disk}/out is full: free some space'), done.stderr
    assert 'Traceback' not in done.stderr and not list(kept.rglob(f'{shards.TEMPORARY}*'))
    with pytest.raises(FileNotFoundError, match='never finished|not there'):
      loader.open_corpus(kept / 'out', 32)
    build.build(corpora.recipe(text), kept / 'out', workers=1)
    assert corpora.files_of(kept / 'out') == corpora.files_of(finished)


def test_bad_input_ends_in_one_line_that_names_the_fix(text, tmp_path, capsys):
  recipe, out = recipe_file(tmp_path, text), tmp_path / 'out'
  said = fails(capsys, '--recipe=quickstrat', f'--out={out}')
  assert 'quickstart, sft, staged_tiny, web_pdf_synthetic, or the path' in said
  assert 'there is no recipe file' in fails(capsys, '--recipe=nowhere/r.py', f'--out={out}')
  assert 'say debian or python' in fails(capsys, '--recipe=quickstart:fedora', f'--out={out}')
  assert 'takes no argument: leave out ":x"' in fails(capsys, f'--recipe={recipe}:x', f'--out={out}')
  assert 'give numbers with commas' in fails(capsys, f'--recipe={recipe}', f'--out={out}', '--seq_lens=a')
  assert 'seq_lens=(1,)' in fails(capsys, f'--recipe={recipe}', f'--out={out}', '--seq_lens=1')
  assert 'at least 1' in fails(capsys, f'--recipe={recipe}', f'--out={out}', '--workers=0')
  (tmp_path / 'file').write_text('')
  assert 'choose another --out' in fails(capsys, f'--recipe={recipe}', f'--out={tmp_path}/file/out')
  assert 'holds other files and no corpus' in fails(capsys, f'--recipe={recipe}', f'--out={tmp_path}')
  (tmp_path / 'empty.py').write_text('x = 1')
  assert 'defines no get_recipe()' in fails(capsys, f'--recipe={tmp_path}/empty.py', f'--out={out}')
  (tmp_path / 'wrong.py').write_text('def get_recipe():\n  return 1')
  assert 'returned a int, not' in fails(capsys, f'--recipe={tmp_path}/wrong.py', f'--out={out}')
  assert not out.exists()


@pytest.mark.parametrize(('changes', 'complaint'), [
  ({'sources': ()}, 'needs sources of different names'),
  ({'sources': (TextFiles(name='a', pattern='x'), TextFiles(name='a', pattern='y'))}, 'different names'),
  ({'sources': (TextFiles(name='../a', pattern='x'),)}, 'may hold only letters'),
  ({'vocab_size': 256}, 'at least 257'),
  ({'validation_fraction': 1.0}, 'validation_fraction=1.0'),
  ({'sources': (TextFiles(name='a', pattern='/nowhere/*'),)}, 'no file matches'),
  ({'min_bytes': 10**6}, 'no document is left to train on'),
])
def test_a_recipe_that_cannot_be_built_is_refused(text, tmp_path, changes, complaint):
  with pytest.raises(ValueError, match=complaint) as caught:
    build.build(corpora.recipe(text, **changes), tmp_path / 'out', workers=1)
  assert '\n' not in str(caught.value)


def test_a_directory_that_is_somebody_elses_is_left_alone(text, tmp_path):
  for name in ('build/program.o', 'documents/thesis.txt'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('mine')
  with pytest.raises(ValueError, match='holds other files and no corpus'):
    build.build(corpora.recipe(text), tmp_path)
  assert sorted(path.name for path in tmp_path.rglob('*') if path.is_file()) == ['program.o', 'thesis.txt']


def test_two_builds_do_not_write_one_directory(text, tmp_path):
  (tmp_path / 'out' / 'build').mkdir(parents=True)
  with open(tmp_path / 'out' / 'build' / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match='another build is writing'):
      build.build(corpora.recipe(text), tmp_path / 'out')


@pytest.mark.slow
def test_debian_packages_are_fetched_and_read(tmp_path):
  source = DebianPackage(name='abs-guide')
  unit, = source.fetch(tmp_path)
  documents = {raw.url: source.extract(raw)[0] for raw in source.read(unit)}
  assert len(documents) > 100 and 'abs-guide' in unit.lineage
  page, = (text for url, text in documents.items() if url.endswith('/gotchas.html'))
  assert len(page) > 10_000 and 'Prev' not in page
  with pytest.raises(SourceUnavailable, match='no-such-package'):
    DebianPackage(name='no-such-package').fetch(tmp_path)
  with pytest.raises(ValueError, match='damaged'):
    Path(unit.paths[0]).write_bytes(Path(unit.paths[0]).read_bytes()[:100_000])
    list(source.read(unit))
