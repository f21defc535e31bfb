"""The engine under documents that crash, hang and grow, workers that die, and another runner: the corpus is the same."""

import dataclasses
from pathlib import Path

import corpora
import engine_parts
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, documents, loader, shards, tokenizer, verdicts
from data_pipeline.dedup.exact import Exact
from data_pipeline.recipe import Recipe
from data_pipeline.runners import LocalRunner, RayRunner
from data_pipeline.tasks import Tasks

BAD = {'segfault': 'crashed', 'abort': 'crashed', 'exit': 'crashed', 'spin': 'out of time', 'sleep': 'out of time',
       'memory': 'out of memory', 'reject': 'not wanted', 'deep': 'nested too deeply', 'long': 'too large',
       'empty': 'no text', 'torn': 'torn', 'x' * 10_001: 'too large'}


def good(number: int) -> str:
  return corpora.made_up_text(number, 60)


def hostile_recipe() -> Recipe:
  contents = [good(0), *(one for i, bad in enumerate(BAD) for one in (bad, good(i + 1))), 'half', good(3)]
  return Recipe(name='hostile', sources=(engine_parts.Hostile(contents=tuple(contents)),), vocab_size=300, seq_lens=(32,),
                validation_fraction=0.2, min_bytes=10)


@pytest.fixture(scope='module')
def survived(tmp_path_factory):
  return build.build(hostile_recipe(), tmp_path_factory.mktemp('hostile') / 'out', workers=1)


def documents_of(corpus: Path, source: str, folder: str = 'documents', column: str = 'text') -> list:
  paths = sorted((corpus / folder / source).glob('*'), key=lambda path: (path.stem[:14], len(path.stem), path.stem))
  return [value for path in paths for value in pq.read_table(path)[column].to_pylist()]


def test_a_document_that_crashes_or_hangs_its_parser_costs_itself_alone(survived):
  expected = [good(i) for i in range(len(BAD) + 1)] + ['half  of a pair, and enough text to be kept']
  assert documents_of(survived, 'hostile')[:-1] == expected
  urls, reasons = (documents_of(survived, 'hostile', 'rejects', column) for column in ('url', 'reason'))
  rejects = dict(zip(urls, reasons))
  assert [rejects[f'{2 * i + 1}'] for i in range(len(BAD))] == list(BAD.values()) and len(rejects) == len(BAD)


def test_what_was_left_out_is_counted_and_adds_up(survived):
  record = shards.read_manifest(survived)
  counts = record['sources']['hostile']['documents']
  assert counts['duplicate'] == 1 and sum(counts.values()) == len(BAD) + 3


def test_hostile_documents_give_the_same_bytes_with_two_workers(survived, tmp_path):
  build.build(hostile_recipe(), tmp_path / 'out', workers=2)
  assert corpora.files_of(tmp_path / 'out') == corpora.files_of(survived)


def test_the_newest_of_equal_documents_is_kept(tmp_path):
  dates = [f'2024-0{i}-01' if i in (3, 5, 7) else '' for i in range(9)]
  source = engine_parts.Hostile(contents=(good(0), good(1), *[good(2)] * 6, good(1)), dates=tuple(dates))
  recipe = dataclasses.replace(hostile_recipe(), sources=(source,))
  corpus = build.build(recipe, tmp_path / 'out', workers=1)
  reasons = documents_of(corpus, 'hostile', 'verdicts/exact', 'reason')
  assert reasons == ['', '', *['duplicate'] * 5, '', 'duplicate']  # number 7 is the newest; of undated ones the first
  assert documents_of(corpus, 'hostile', 'verdicts/exact', 'of')[2:] == ['1:3'] * 5 + ['', '0:1']


def test_a_large_input_becomes_several_shards_with_the_same_documents(tmp_path, monkeypatch):
  recipe = corpora.recipe(corpora.write_files(tmp_path / 'text'))
  whole = build.build(recipe, tmp_path / 'whole', workers=1)
  monkeypatch.setattr(documents, '_BYTES_A_SHARD', 10_000)
  parts = build.build(recipe, tmp_path / 'parts', workers=1)
  assert documents_of(parts, 'web') == documents_of(whole, 'web')
  assert len(list(parts.glob('documents/web/*'))) > 4
  assert all(path.stat().st_size < 60_000 for path in parts.glob('documents/*/*'))
  tokens = [loader.open_corpus(root, 32).tokens(source) for root in (whole, parts) for source in ('web', 'books')]
  assert tokens[0] == pytest.approx(tokens[2], rel=0.02) and tokens[1] == pytest.approx(tokens[3], rel=0.02)


def run_tasks(root: Path, times: int) -> list[dict]:
  with LocalRunner(2) as runner:
    tasks = [(f'task-{i}', 'key', times) for i in range(3)]
    return Tasks(root, runner, lambda: None).run('test', engine_parts.die_once, tasks)


def test_what_a_killed_worker_was_at_is_done_by_another(tmp_path):
  assert [record['key'] for record in run_tasks(tmp_path, 1)] == ['key'] * 3


def test_a_task_that_kills_every_worker_ends_the_build_in_a_line(tmp_path):
  with pytest.raises(OSError, match='a worker process died .* fewer workers if memory was short'):
    run_tasks(tmp_path, 9)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(survived, tmp_path, monkeypatch):
  monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent))  # where the cluster's workers find a recipe's own modules
  build.build(hostile_recipe(), tmp_path / 'out', runner=RayRunner('local', 2))
  assert corpora.files_of(tmp_path / 'out') == corpora.files_of(survived)


def test_without_a_ray_cluster_one_line_says_how_to_start_one(tmp_path, capsys):
  assert build.main(['--recipe=quickstart', f'--out={tmp_path}/out', '--runner=ray', '--address=127.0.0.1:1']) == 1
  assert 'ray start --head' in capsys.readouterr().err.splitlines()[-1]


def test_edits_change_what_is_trained_on_and_buckets_are_sources(tmp_path):
  recipe = dataclasses.replace(corpora.recipe(corpora.write_files(tmp_path / 'text')), length_buckets=(100, 400),
                               steps=(Exact(), engine_parts.Censor()))
  root = build.build(recipe, tmp_path / 'out', workers=1)
  corpus, manifest = loader.open_corpus(root, 32), shards.read_manifest(root)
  assert {'web', 'web.100', 'web.400', 'web.q1.100', 'books.100', 'books.q1.100'} == set(corpus.sources)
  of_web = [facts for name, facts in manifest['sources'].items() if name.startswith('web')]
  assert sum(facts['train']['documents'] for facts in of_web) == of_web[0]['documents']['train']
  texts, words = tokenizer.load(corpus.tokenizer_path), {}
  for part in corpus.sources:
    schedule = loader.MixtureSchedule(stages=((None, {part: 1}),))
    batch = loader.batch_at(corpus, schedule, seed=0, batch_size=corpus.rows(part), step=0)
    ids = batch['tokens'][batch['segment_ids'] > 0].tolist()
    words[part] = texts.decode(ids, skip_special_tokens=False)
  assert all('the' not in text for text in words.values()) and all('é' in text for text in words.values())
  first = [text.split()[0] for text in words['web.q1.100'].split('<|endoftext|>') if text.split()]
  known = {raw.split()[0].replace('the', 'é') for raw in documents_of(root, 'web') if 'x' in raw.split()[0]}
  assert len(known & set(first)) > 5  # the others are held out


def test_edits_that_overlap_cut_what_either_cuts():
  cut = lambda *edits: verdicts.edit('0123456789é', [dict(zip(('start', 'end', 'text'), one)) for one in edits])
  assert cut() == '0123456789é' and cut((10, 12, '')) == '0123456789' and cut((0, 12, 'all')) == 'all'
  assert cut((2, 4, '<>'), (6, 8, '')) == '01<>4589é' == cut((6, 8, ''), (2, 4, '<>'))
  assert cut((2, 6, ''), (4, 8, 'X')) == '0189é' == cut((2, 8, ''), (3, 4, 'X')) and cut((3, 3, '+')) == '012+3456789é'
