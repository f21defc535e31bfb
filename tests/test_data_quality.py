"""The classifier that tells good documents from others, and the buckets that it puts them in."""

import json
import random

import judging
import numpy as np
import pytest

from data_pipeline import build, shards
from data_pipeline.filters import kernels, quality
from data_pipeline.filters.quality import Quality
from data_pipeline.filters.step import Filters, Texts
from data_pipeline.recipe import Recipe
from data_pipeline.sources.text_files import TextFiles


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """Good documents and others, which share most of their words; and the model that was trained on them, twice."""
  folder, chance = tmp_path_factory.mktemp('quality'), random.Random(9)
  common, good = [f'word{i}' for i in range(300)], [f'term{i}' for i in range(60)]
  for side, share in (('good', 0.12), ('other', 0.03), ('unseen', 0.03)):
    with open(folder / f'{side}.jsonl', 'w') as file:
      for _ in range(600):
        words = [chance.choice(good if chance.random() < share else common) for _ in range(chance.randint(40, 200))]
        print(json.dumps({'text': ' '.join(words)}), file=file)
  found = [quality.train([f'{folder}/good.jsonl'], [f'{folder}/other.jsonl'], folder / f'{name}.npz', n_buckets=5)
           for name in ('model', 'again')]
  assert found[0] == found[1] and (folder / 'model.npz').read_bytes() == (folder / 'again.npz').read_bytes()
  return folder, found[0]


def test_training_tells_good_from_other_on_documents_it_has_not_seen(model):
  _, found = model
  assert 80 < min(found['held_out']) and sum(found['positives_of_buckets']) == found['held_out'][0]
  assert 0.9 < found['accuracy'] <= 1 and 0.95 < found['area_under_curve'] <= 1
  assert found['positives_of_buckets'][-1] > 0.8 * found['held_out'][0] and found['bounds'] == sorted(found['bounds'])


def test_scores_are_mean_weights_of_words_and_pairs_of_words(model):
  folder, _ = model
  learnt = dict(np.load(folder / 'model.npz'))
  texts = ['', 'term1', 'Term1 word2, term1', 'word7 ' * 3000]
  packed = Texts.of([text.encode() for text in texts])
  of = packed.data, packed.offsets, np.arange(len(texts))
  found = kernels.score(*of, kernels.classes(), learnt['weights'], float(learnt['bias']), 2000)
  expected = []
  for text in texts:
    keys = [kernels.hash_of_word(word) for word in text.split()[:2000]]
    mixed = lambda a, b: int(kernels.mixed(np.uint64((a * 0x9e3779b97f4a7c15 + b) % 2**64)))
    features = [key % 2**20 for key in keys + [mixed(a, b) for a, b in zip(keys, keys[1:])]]
    expected.append(float(learnt['bias']) + sum(float(learnt['weights'][f]) for f in features) / max(len(features), 1))
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_buckets_become_sources_with_the_weights_of_the_curve(model, tmp_path):
  folder, _ = model
  curve = (0, 1, 1, 2, 4)
  sources = tuple(TextFiles(name=name, pattern=f'{folder}/{name}.jsonl') for name in ('unseen', 'good'))
  steps = Filters(rules=(Quality(model=str(folder / 'model.npz'), curve=curve),))
  recipe = Recipe(name='filtered', sources=sources, steps=(steps,), vocab_size=300, seq_lens=(64,), validation_fraction=0.1,
                  min_bytes=5)
  corpus = build.build(recipe, tmp_path / 'corpus', workers=1)
  rows = judging.trained(corpus, 'unseen')
  shares = [np.mean([row['bucket'] == f'q{i:02d}' for row in rows]) for i in range(5)]
  assert all(0.13 < share < 0.27 for share in shares), shares  # of documents like those of training a fifth each
  assert all((row['reason'] == 'quality') == (row['bucket'] == 'q00') for row in rows)
  assert all((a['quality'] < b['quality']) for a in rows for b in rows if a['bucket'] < b['bucket'])
  tokens = {part: facts['train']['tokens'] for part, facts in shards.read_manifest(corpus)['sources'].items()}
  found = quality.weights(corpus, 'unseen', curve)
  assert set(found) == {'unseen.q01', 'unseen.q02', 'unseen.q03', 'unseen.q04'} and abs(sum(found.values()) - 1000) < 4
  for part, weight in found.items():
    seen = weight / tokens[part] / (found['unseen.q01'] / tokens['unseen.q01'])
    assert abs(seen / curve[int(part[-1])] - 1) < 0.02
  assert tokens['good.q04'] > tokens.get('good.q01', 0)
  record = json.loads((corpus / 'build' / 'filters-00000.json').read_text())
  assert sum(record['facts']['quality'].values()) == 600
  with pytest.raises(ValueError, match='only 3 weights'):
    quality.weights(corpus, 'unseen', (1, 1, 1))
  with pytest.raises(ValueError, match="no tokens in buckets of 'none'"):
    quality.weights(corpus, 'none', curve)


def test_the_training_command_reports_and_refuses_in_one_line(model, tmp_path, capsys):
  folder, found = model
  command = ['train', f'--positive={folder}/good.jsonl', f'--out={tmp_path}/q.npz', '--buckets=5']
  assert quality.main([*command, f'--negative={folder}/other.jsonl', '--json']) == 0
  assert json.loads(capsys.readouterr().out) == found
  (tmp_path / 'few.jsonl').write_text('{"text": "one"}\n')
  for arguments, why in ((['few.jsonl'], 'too few'), (['no.jsonl'], 'no file matches'), ([f'{folder}/other.jsonl',
                                                                                         '--buckets=1'], '2 to 100')):
    assert quality.main([*command, f'--negative={tmp_path / arguments[0]}', *arguments[1:]]) == 1
    assert why in capsys.readouterr().err


def test_what_is_no_model_is_refused(model, tmp_path):
  folder, _ = model
  (tmp_path / 'text.npz').write_text('no model')
  np.savez(tmp_path / 'other.npz', x=1)
  for path in ('text.npz', 'other.npz'):
    with pytest.raises(ValueError, match='no model of quality'):
      Quality(model=str(tmp_path / path)).state()
  with pytest.raises(ValueError, match='cannot be read'):
    Quality(model=str(tmp_path / 'missing.npz')).state()
  for curve in ((1, 2), (0,) * 5, (-1, 1, 1, 1, 1)):
    with pytest.raises(ValueError, match='5 buckets'):
      Quality(model=str(folder / 'model.npz'), curve=curve).state()
