"""One bit of one file changes: what is read is what was written, or one line says what is damaged. A thousand times.

The quick versions run with all other tests; `pytest -m slow -n 0 -s tests/chaos/test_flips.py` is the campaign, with counts.
"""

import collections
import contextlib
import random
import resource
from pathlib import Path

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import build, loader, shards
from maxlm.checkpoint import Checkpoints, Damaged
from maxlm.digest import named_leaves

QUICK_AND_SLOW = [pytest.param(40, id='quick'), pytest.param(1000, id='campaign', marks=pytest.mark.slow)]


@contextlib.contextmanager
def flipped(path: Path, chance: random.Random):
  """The file with one bit changed: half of the time one of a byte that is not zero, for some files are mostly padding."""
  before = path.read_bytes()
  content = bytearray(before)
  places = [i for i, byte in enumerate(before) if byte] if chance.random() < 0.5 else range(len(before))
  content[chance.choice(places)] ^= 1 << chance.randrange(8)
  path.write_bytes(content)
  try:
    yield
  finally:
    path.write_bytes(before)


def pick(files: list[Path], chance: random.Random) -> Path:
  """Half of the time by size, as a cosmic ray would; half of the time any, for most bytes are in few files."""
  return chance.choice(files) if chance.random() < 0.5 else chance.choices(files, [file.stat().st_size for file in files])[0]


def peak_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(name: str, counts: collections.Counter) -> None:
  print(f'\n{name}: ' + ', '.join(f'{n} {what}' for what, n in sorted(counts.items())))


def bits(trees) -> list[dict[str, bytes]]:
  return [{name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()} for tree in trees]


@pytest.mark.parametrize('n_flips', QUICK_AND_SLOW)
def test_a_flip_in_a_checkpoint_is_found_or_changes_nothing(tmp_path, n_flips):
  params = {'layers': [{'w': jax.random.normal(jax.random.key(i), (64, 96)), 'scale': jnp.ones(64, jnp.bfloat16)}
                       for i in range(3)]}
  opt = {'count': jnp.int32(7), 'mu': jax.tree.map(lambda x: x / 8, params)}
  recent = {'loss': jnp.linspace(2, 3, 16), 'n': jnp.int32(3)}
  meta = {'cursor': 123, 'config': {'lr': 1e-3, 'name': 'ü'}, 'skips': [1, None, True]}
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(5, params=params, opt=opt, recent=recent, meta=meta)
  checkpoints.close()
  as_saved, files = bits((params, opt, recent)), sorted(path for path in (tmp_path / '5').rglob('*') if path.stat().st_size)
  files = [path for path in files if path.is_file()]
  assert bits(checkpoints.restore(5, params, opt, recent=recent)) == as_saved
  chance, counts, memory = random.Random(n_flips), collections.Counter(), peak_bytes()
  for _ in range(n_flips):
    path = pick(files, chance)
    with flipped(path, chance):
      try:
        meta_read = Checkpoints(tmp_path).meta(5)
        read = Checkpoints(tmp_path).restore(5, params, opt, recent=recent)
      except Damaged as error:
        assert f'{tmp_path}/5 is damaged' in str(error) and '\n' not in str(error)
        counts['of Orbax' if error.__cause__ else 'by a digest'] += 1
        continue
      assert bits(read) == as_saved and meta_read == meta, f'a flip in {path} went through'
      counts['without effect'] += 1
  report('checkpoint', counts)
  assert counts['by a digest'] > n_flips / 8 and peak_bytes() < memory + (1 << 30)
  assert bits(checkpoints.restore(5, params, opt, recent=recent)) == as_saved


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('corpus')
  return build.build(corpora.recipe(corpora.write_files(folder / 'text')), folder / 'out', workers=1)


def rows(corpus: Path) -> dict[tuple[str, str], list[bytes]]:
  """Every row there is, by source and split, through what training reads."""
  opened = loader.open_corpus(corpus, 32)
  return {(source, split): opened.table(source, split).read(np.arange(opened.rows(source, split)))
          for source in opened.sources for split in ('train', 'validation')}


@pytest.mark.parametrize('n_flips', QUICK_AND_SLOW)
def test_a_flip_in_a_shard_is_found_when_it_changes_a_row(corpus, n_flips):
  as_built, files = rows(corpus), sorted(corpus.glob('rows-*/**/*.arrayrecord'))
  assert sum(map(len, as_built.values())) > 100 and len(files) >= 4
  chance, counts, memory = random.Random(n_flips), collections.Counter(), peak_bytes()
  for _ in range(n_flips):
    path = pick(files, chance)
    with flipped(path, chance):
      try:
        read = rows(corpus)
      except ValueError as error:
        assert str(error).startswith(f'{path} cannot be read: ') and 'python -m data_pipeline.shards verify' in str(error)
        assert '\n' not in str(error)
        counts['found'] += 1
      else:
        assert read == as_built, f'a flip in {path} went through'
        counts['without effect'] += 1
      with pytest.raises(ValueError, match=f'^{path} differs from what was built'):
        shards.verify(corpus)
  report('shards', counts)
  assert counts['found'] > n_flips / 4 and peak_bytes() < memory + (1 << 30)
  assert rows(corpus) == as_built and 'all as built' in shards.verify(corpus)


def test_training_stops_at_a_row_that_cannot_be_read_with_one_line(corpus):
  """The reader's error comes out of the prefetch threads as it is, and not hung up in them."""
  path, = corpus.glob('rows-*/web/train-*')
  before = path.read_bytes()
  path.write_bytes(before[:64] + bytes(byte ^ 1 for byte in before[64:2048]) + before[2048:])
  opened = loader.open_corpus(corpus, 32)
  schedule = loader.MixtureSchedule(stages=((None, {source: 1 for source in opened.sources}),))
  batches = loader.batches(opened, schedule, seed=0, batch_size=8)
  with pytest.raises(ValueError, match=f'{path} cannot be read: .*python -m data_pipeline.shards verify'):
    for _ in range(1000):
      next(batches)
  batches.close()
  path.write_bytes(before)
