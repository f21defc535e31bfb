"""generate, score and evaluate on a checkpoint, as a user types them. One untrained tiny model serves all."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import tiny
from data_pipeline import loader
from maxlm import typed_json
from maxlm.checkpoint import Checkpoints, lineage
from maxlm.models.decoder import Decoder
from tests.make_corpus import make_corpus

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, mesh_of):
  """A workdir with one checkpoint of step 3, and the corpus beside it."""
  where = tmp_path_factory.mktemp('commands')
  corpus = make_corpus(where / 'corpus')
  config = tiny.get_config()
  config.data.corpus = str(corpus)
  (where / 'run').mkdir()
  (where / 'run' / 'tokenizer.json').write_bytes((corpus / 'tokenizer.json').read_bytes())
  checkpoints = Checkpoints(where / 'run' / 'checkpoints')
  with mesh_of(1):
    params = jax.jit(lambda key: Decoder(config.model, key))(jax.random.key(0))
    checkpoints.save(3, params=params, opt={}, meta={'step': 3, 'cursor': 24, 'lineage': lineage(),
                                                     'config': json.loads(typed_json.dumps(config))})
    checkpoints.close()
  return where / 'run'


def run(module: str, *flags: str, code: int = 0) -> str:
  """stdout of a command that ends well, stderr of one that does not."""
  done = subprocess.run([sys.executable, '-m', f'maxlm.{module}', *flags], cwd=ROOT, capture_output=True, text=True,
                        timeout=300)
  assert done.returncode == code, done.stderr
  return done.stdout if code == 0 else done.stderr


def test_scores_are_the_log_softmax_of_the_logits_and_padding_changes_nothing(workdir, tmp_path):
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 512, (3, 21))
  tokens[1, 13:] = -1
  np.save(tmp_path / 'in.npy', tokens)
  run('score', f'--checkpoint={workdir}', f'--tokens={tmp_path}/in.npy', f'--out={tmp_path}/out.npz', '--logits',
      '--batch_size=2')
  out = np.load(tmp_path / 'out.npz')
  assert out['log_probs'].shape == (3, 21) and out['logits'].shape == (3, 21, 512) and out['logits'].dtype == np.float32
  logits = out['logits'].astype(np.float64)
  expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = np.take_along_axis(expected[:, :-1], np.maximum(tokens, 0)[:, 1:, None], 2)[..., 0]
  scored = tokens[:, 1:] >= 0
  np.testing.assert_allclose(out['log_probs'][:, 1:][scored], expected[scored], atol=2e-5)
  assert np.isnan(out['log_probs'][:, 0]).all() and np.isnan(out['log_probs'][:, 1:][~scored]).all()
  np.save(tmp_path / 'short.npy', tokens[1:2, :13])
  run('score', f'--checkpoint={workdir}@3', f'--tokens={tmp_path}/short.npy', f'--out={tmp_path}/short.npz')
  np.testing.assert_allclose(np.load(tmp_path / 'short.npz')['log_probs'][0, 1:], out['log_probs'][1, 1:13], atol=2e-5)


def test_evaluate_agrees_with_score_on_the_same_rows(workdir, tmp_path):
  report = json.loads(run('evaluate', f'--checkpoint={workdir}', '--rows=4', '--json'))
  corpus = loader.open_corpus(workdir.parent / 'corpus', 64)
  documents = {}
  for source in corpus.sources:
    batch, = loader.validation_batches(corpus, source, 8, 4)
    documents[source] = [np.append(batch['tokens'][row][here], batch['targets'][row][here][-1])
                         for row in range(8) for segment in range(1, batch['segment_ids'][row].max(initial=0) + 1)
                         if (here := batch['segment_ids'][row] == segment).any()]
  everything = [document for source in corpus.sources for document in documents[source]]
  padded = np.full((len(everything), 65), -1)
  for row, document in enumerate(everything):
    padded[row, :len(document)] = document
  np.save(tmp_path / 'in.npy', padded)
  run_score(workdir, tmp_path)
  out, row = np.load(tmp_path / 'out.npz'), 0
  for source in corpus.sources:
    nats = tokens = text_bytes = hits = 0
    for document in documents[source]:
      n = len(document)
      nats -= out['log_probs'][row, 1:n].sum(dtype=np.float64)
      hits += (out['logits'][row, :n - 1].argmax(-1) == document[1:]).sum()
      tokens += n - 1
      text_bytes += corpus.token_bytes[document[1:]].sum()
      row += 1
    got = report['sources'][source]
    assert (got['tokens'], got['bytes']) == (tokens, text_bytes)
    assert got['loss'] == pytest.approx(nats / tokens, rel=1e-5)
    assert got['bits_per_byte'] == pytest.approx(nats / np.log(2) / text_bytes, rel=1e-5)
    assert got['accuracy'] == pytest.approx(hits / tokens, abs=1.5 / tokens)


def test_generate_is_repeatable_and_greedy_is_the_models_own_choice(workdir, tmp_path):
  flags = f'--checkpoint={workdir}', '--prompt=The old woman', '--max_tokens=8', '--json'
  twice = [run('generate', *flags, '--samples=2', '--seed=4') for _ in range(2)]
  assert twice[0] == twice[1] and len(twice[0].splitlines()) == 2
  greedy = json.loads(run('generate', *flags, '--temperature=0'))
  tokens = np.array([greedy['prompt_tokens'] + greedy['tokens']])
  np.save(tmp_path / 'in.npy', tokens)
  run_score(workdir, tmp_path)
  best = np.load(tmp_path / 'out.npz')['logits'][0].argmax(-1)
  n = len(greedy['prompt_tokens'])
  np.testing.assert_array_equal(best[n - 1:n - 1 + len(greedy['tokens'])], greedy['tokens'])
  assert greedy['text'].startswith('The old woman')


def test_an_imported_model_is_scored_as_where_it_comes_from(tmp_path):
  source = ROOT / 'tests' / 'golden' / 'hf' / 'llama_tied'
  golden = np.load(source / 'golden.npz')
  assert 'llama, ' in run('hf', 'import', str(source), str(tmp_path / 'run'))
  np.save(tmp_path / 'in.npy', golden['tokens'])
  run_score(tmp_path / 'run', tmp_path)
  np.testing.assert_allclose(np.load(tmp_path / 'out.npz')['logits'], golden['logits'], atol=1e-4)


def run_score(workdir, tmp_path):
  run('score', f'--checkpoint={workdir}', f'--tokens={tmp_path}/in.npy', f'--out={tmp_path}/out.npz', '--logits')


@pytest.mark.parametrize('command, says', [
  (('generate',), 'give --checkpoint'),
  (('generate', '--checkpoint=nowhere'), 'no checkpoint in'),
  (('generate', '--checkpoint={workdir}@99'), 'no checkpoint of step 99'),
  (('generate', '--checkpoint={workdir}', '--top_p=0'), 'top_p=0.0 in (0, 1]'),
  (('evaluate', '--checkpoint={workdir}', '--data=nowhere'), 'nowhere'),
  (('evaluate', '--checkpoint={workdir}', '--row=3'), '--rows'),
  (('score', '--checkpoint={workdir}', '--tokens=nowhere.npy', '--out=x.npz'), 'nowhere.npy'),
  (('score', '--checkpoint={workdir}', '--tokens={bad}', '--out=x.npz'), 'one array of integers [rows, T]'),
  (('score', '--checkpoint={workdir}', '--tokens={big}', '--out=/tmp/x.npz'), 'the model knows 0 … 511'),
  (('hf',), 'say `import HF_DIR DIR` or'),
  (('hf', 'export', '{workdir}', 'x', '--family=llama'), 'llama cannot express'),
  (('generate', '--checkpoint={hugging_face}'), 'is a Hugging Face model: import it first'),
], ids=lambda value: value if isinstance(value, str) else ' '.join(value)[:40])
def test_mistakes_are_one_line(workdir, tmp_path, command, says):
  np.save(tmp_path / 'bad.npy', np.zeros(4))
  np.save(tmp_path / 'big.npy', np.full((1, 4), 600))
  (tmp_path / 'model.safetensors').write_bytes(b'')
  module, *flags = [word.format(workdir=workdir, bad=tmp_path / 'bad.npy', big=tmp_path / 'big.npy', hugging_face=tmp_path)
                    for word in command]
  error = run(module, *flags, code=2)
  lines = [line for line in error.splitlines() if not line.startswith(('W', 'I'))]
  assert len(lines) == 1 and says in lines[0], error
