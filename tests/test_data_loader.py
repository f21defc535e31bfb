"""Rows -> batches: a pure function of (seed, global row), whatever the hosts, the batch size and the kills."""

import collections
import json
import shutil

import corpora
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, loader, shuffle, tokenizer
from data_pipeline.mixture import MixtureSchedule

SEQ_LEN = 32
MIXTURE = MixtureSchedule(stages=((41, {'web': 3, 'books': 1}), (None, {'web': 1, 'books': 2})))


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  return build.build(corpora.recipe(corpora.write_files(folder / 'text')), folder / 'out', workers=1)


@pytest.fixture(scope='module')
def corpus(directory):
  return loader.open_corpus(directory, SEQ_LEN)


def take(n, corpus, schedule=MIXTURE, **options) -> list[dict]:
  batches = loader.batches(corpus, schedule, **({'seed': 0, 'batch_size': 8, 'num_threads': 0} | options))
  taken = [next(batches) for _ in range(n)]
  batches.close()
  return taken


def rows_of(batches) -> dict[str, np.ndarray]:
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(one: dict, other: dict) -> None:
  assert one.keys() == other.keys()
  for name in one:
    np.testing.assert_array_equal(one[name], other[name])


# The shuffle.


@pytest.mark.parametrize('n', [1, 2, 3, 5, 16, 17, 100, 997, 10_007])
def test_the_shuffle_is_a_permutation(n):
  for key in range(4):
    assert np.array_equal(np.sort(shuffle.permute(np.arange(n), n, key)), np.arange(n))


def test_the_shuffle_of_a_very_large_range_has_no_collisions_and_fills_it_evenly():
  n = 2**40 + 17
  places = shuffle.permute(np.arange(100_000), n, 7)
  assert len(np.unique(places)) == len(places) and places.min() >= 0 and places.max() < n
  counts, _ = np.histogram(places, 20, (0, n))
  assert abs(counts / 5000 - 1).max() < 0.06  # four standard deviations


def test_where_a_row_and_its_neighbour_go_is_uniform_over_keys():
  n, keys = 24, shuffle.epoch_keys(5, np.arange(24_000))
  places = np.stack([shuffle.permute(np.full(len(keys), i), n, keys) for i in range(n)])
  for counts in ([np.bincount(row, minlength=n) for row in places],
                 [np.bincount(row, minlength=n)[1:] for row in (places[1:] - places[:-1]) % n]):
    expected = len(keys) / len(counts[0])
    chi_square = ((np.stack(counts) - expected)**2 / expected).mean()
    assert 0.8 < chi_square < 1.2


# Purity.


PARTS = {'one host': [range(8)], 'two': [range(4), range(4, 8)], 'two on a torus': [(0, 1, 4, 5), (2, 3, 6, 7)],
         'four, two and two alike': [range(4), range(4), range(4, 8), range(4, 8)]}


@pytest.mark.parametrize('parts', PARTS.values(), ids=PARTS)
def test_each_host_reads_its_part_of_the_batch_of_one_host(corpus, parts):
  whole = take(6, corpus)
  for part in parts:
    for batch, of_host in zip(whole, take(6, corpus, part=part)):
      assert_equal({name: value[list(part)] for name, value in batch.items()}, of_host)


def test_the_ids_of_rows_say_where_they_come_from(corpus):
  ids = loader.row_ids(corpus, MIXTURE, seed=0, batch_size=8, step=3)
  batch = loader.batch_at(corpus, MIXTURE, seed=0, batch_size=8, step=3)
  for i, where in enumerate(ids):
    table = corpus.table(where['source'], 'train')
    row = loader.pack.decode_rows(table.read(np.array([where['row']])), SEQ_LEN, np.dtype('uint16'), False)
    assert (row['tokens'][0] == batch['tokens'][i]).all()
    assert MIXTURE.sources[batch['source'][i]] == where['source'] and where['epoch'] >= 0


def test_rows_do_not_depend_on_the_batch_size_or_on_threads(corpus):
  rows = rows_of(take(12, corpus, batch_size=8))
  assert_equal(rows, rows_of(take(6, corpus, batch_size=16)))
  assert_equal(rows, rows_of(take(32, corpus, batch_size=3)))
  assert_equal(rows, rows_of(take(12, corpus, batch_size=8, num_threads=3)))


@pytest.mark.parametrize('cursor', [8, 40, 43])
def test_the_cursor_resumes_anywhere_even_with_another_batch_size(corpus, cursor):
  rows = rows_of(take(20, corpus, batch_size=8))
  resumed = rows_of(take(16, corpus, batch_size=6, cursor=cursor))
  assert_equal(resumed, {name: value[cursor:cursor + 96] for name, value in rows.items()})


def test_the_cursor_is_the_next_global_row_on_every_host(corpus):
  batches = loader.batches(corpus, MIXTURE, seed=0, batch_size=8, cursor=16, part=range(4, 8))
  assert batches.cursor == 16
  for _ in range(3):
    batch = next(batches)
  assert batches.cursor == 40 and len(batch['tokens']) == 4
  assert_equal(next(batches), take(1, corpus, cursor=40, part=range(4, 8))[0])
  batches.close()


def test_any_batch_can_be_made_again_from_its_step(corpus):
  for step, batch in enumerate(take(4, corpus)):
    assert_equal(batch, loader.batch_at(corpus, MIXTURE, seed=0, batch_size=8, step=step))


def test_seed_epoch_and_source_each_change_the_order(corpus):
  epoch = corpus.rows('web')
  web = MixtureSchedule(stages=((None, {'web': 1}),))
  first, second = (rows_of(take(epoch, corpus, web, batch_size=1, cursor=start))['tokens'] for start in (0, epoch))
  reseeded = rows_of(take(epoch, corpus, web, batch_size=1, seed=1))['tokens']
  rows = [collections.Counter(map(bytes, tokens)) for tokens in (first, second, reseeded)]
  assert rows[0] == rows[1] == rows[2]
  assert not np.array_equal(first, second) and not np.array_equal(first, reseeded)
  assert shuffle.key_of(0, 'web') != shuffle.key_of(0, 'books')


# What is read is what was written.


def test_an_epoch_has_every_token_of_every_training_document_as_a_target_once(corpus):
  encoder = tokenizer.load(corpus.tokenizer_path)
  for source in corpus.sources:
    shard, = (corpus.directory / 'documents' / source).glob('*.parquet')
    texts = pq.read_table(shard)['text'].to_pylist()
    verdicts = pq.read_table(corpus.directory / 'selection' / source / shard.name)['verdict'].to_pylist()
    expected = collections.Counter()
    for text, verdict in zip(texts, verdicts):
      if verdict == 'train':
        ids = encoder.encode(text).ids
        expected.update(zip([corpus.eot, *ids], [*ids, corpus.eot]))
    epoch = rows_of(take(corpus.rows(source), corpus, MixtureSchedule(stages=((None, {source: 1}),)), batch_size=1))
    real = epoch['segment_ids'] > 0
    assert collections.Counter(zip(epoch['tokens'][real].tolist(), epoch['targets'][real].tolist())) == expected
    assert real.sum() == corpus.tokens(source) == sum(expected.values())
    assert corpus.token_bytes[epoch['targets'][real]].sum() == corpus.text_bytes(source)


def test_rows_of_each_source_equal_the_schedule(corpus):
  rows = rows_of(take(25, corpus))
  counts = MIXTURE.counts(0, 200)
  assert {name: int((rows['source'] == i).sum()) for i, name in enumerate(MIXTURE.sources)} == counts


def test_a_text_that_spells_the_end_of_text_does_not_end_a_document(corpus):
  ids = tokenizer.load(corpus.tokenizer_path).encode('one <|endoftext|> two').ids
  assert corpus.eot not in ids and corpus.token_bytes[ids].sum() == len('one <|endoftext|> two')


def test_a_schedule_that_ends_ends_the_batches(corpus):
  schedule = MixtureSchedule(stages=((20, {'web': 1}),))
  assert len(list(loader.batches(corpus, schedule, seed=0, batch_size=8))) == 2
  assert not list(loader.batches(corpus, schedule, seed=0, batch_size=8, cursor=64))


@pytest.mark.parametrize(('limit', 'n_hosts'), [(None, 1), (5, 1), (None, 2), (5, 2)])
def test_validation_is_finite_fixed_and_filled_up_with_empty_rows(corpus, limit, n_hosts):
  n = 8 // n_hosts
  slices = [list(loader.validation_batches(corpus, 'web', 8, limit, range(i * n, (i + 1) * n))) for i in range(n_hosts)]
  n_rows = corpus.rows('web', 'validation') if limit is None else limit
  assert [len(batches) for batches in slices] == [-(-n_rows // 8)] * n_hosts
  rows = rows_of([rows_of(list(batches)) for batches in zip(*slices)])
  assert rows['tokens'].shape == (len(slices[0]) * 8, SEQ_LEN)
  assert rows['segment_ids'][:n_rows].any(axis=1).all() and not rows['segment_ids'][n_rows:].any()
  assert_equal(rows, rows_of(list(loader.validation_batches(corpus, 'web', 8, limit))))
  if limit is None:
    assert (rows['segment_ids'] > 0).sum() == corpus.tokens('web', 'validation')
    assert corpus.token_bytes[rows['targets']].sum() == corpus.text_bytes('web', 'validation')


# Bad input: one line that names cause and fix.


def refused(error, match, function, *arguments, **options):
  with pytest.raises(error, match=match) as caught:
    function(*arguments, **options)
  assert '\n' not in str(caught.value)


def test_what_does_not_fit_the_corpus_is_refused(corpus):
  options = dict(seed=0, batch_size=8)
  refused(ValueError, 'offsets into a batch of 8 rows', loader.batches, corpus, MIXTURE, part=(6, 7, 8), **options)
  refused(ValueError, 'names wiki, which .* it has web, books', loader.batches, corpus,
          MixtureSchedule(stages=((None, {'wiki': 1}),)), **options)
  refused(ValueError, 'cursor=-1', loader.batches, corpus, MIXTURE, cursor=-1, **options)
  refused(ValueError, 'no source .*wiki.* with a split', corpus.rows, 'wiki')
  refused(ValueError, 'rows of 32 tokens, not 64: .* --seq_lens=64', loader.open_corpus, corpus.directory, 64)


def test_a_corpus_that_is_missing_or_unfinished_is_refused(directory, tmp_path):
  refused(FileNotFoundError, 'is not there .*: build it with', loader.open_corpus, tmp_path / 'nothing', SEQ_LEN)
  shutil.copytree(directory, tmp_path / 'unfinished')
  (tmp_path / 'unfinished' / 'manifest.json').unlink()
  refused(FileNotFoundError, 'was never finished .*: build it with', loader.open_corpus, tmp_path / 'unfinished', SEQ_LEN)


def test_a_tokenizer_or_shard_that_is_not_the_manifests_is_refused(directory, tmp_path):
  def damaged(name, damage):
    copy = tmp_path / name
    shutil.copytree(directory, copy)
    damage(copy)
    return copy

  def other_tokenizer(copy):
    path = copy / 'tokenizer.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"ka"', '"kb"') + ' ', encoding='utf-8')

  def shard_of_another_tokenizer(copy):
    manifest = json.loads((copy / 'manifest.json').read_text(encoding='utf-8'))
    manifest['rows'][1]['tokenizer_sha256'] = '0' * 64
    (copy / 'manifest.json').write_text(json.dumps(manifest), encoding='utf-8')

  shard = 'rows-32/web/train-00000-of-00001.arrayrecord'
  for name, damage, error, match in (
    ('tokenizer', other_tokenizer, ValueError, 'not the tokenizer that the corpus was built with'),
    ('hash', shard_of_another_tokenizer, ValueError, 'made with another tokenizer .sha256 000000000000…'),
    ('missing', lambda copy: (copy / shard).unlink(), FileNotFoundError, f'{shard} is missing'),
    ('short', lambda copy: (copy / shard).write_bytes((copy / shard).read_bytes()[:-1]), FileNotFoundError, 'bytes long'),
    ('json', lambda copy: (copy / 'manifest.json').write_text('{'), ValueError, 'is not JSON'),
    ('format', lambda copy: (copy / 'manifest.json').write_text('{"format": 99}'), ValueError, 'has format 99'),
  ):
    refused(error, match, loader.open_corpus, damaged(name, damage), SEQ_LEN)
