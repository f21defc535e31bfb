"""The recipe of all stages, on what Debian ships: resumable and the same for all runners, and a model trains on it."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import corpora
import pytest

from data_pipeline import build, shards
from data_pipeline.recipe import load_recipe
from data_pipeline.runners import RayRunner

ROOT = Path(__file__).parents[1]
SOURCES = ('web', 'pdf', 'scans', 'synthetic')

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(shutil.which('tesseract') is None, reason='needs tesseract: apt-get install tesseract-ocr')]


@pytest.fixture(scope='module')
def recipe():
  return load_recipe('web_pdf_synthetic:small')


@pytest.fixture(scope='module')
def finished(recipe, tmp_path_factory):
  return build.build(recipe, tmp_path_factory.mktemp('recipe') / 'out', workers=2)


def test_killed_again_and_again_it_ends_with_the_same_bytes(finished, tmp_path):
  """The build and its workers, at random moments until it is left alone."""
  out, chance, kills = tmp_path / 'out', random.Random(0), 0
  command = [sys.executable, '-m', 'data_pipeline.build', '--recipe=web_pdf_synthetic:small', f'--out={out}', '--workers=2']
  while True:
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
      _, said = process.communicate(timeout=chance.uniform(2, 20) if kills < 6 else 600)
      break
    except subprocess.TimeoutExpired:
      process.kill()
      process.communicate()
      kills += 1
  assert process.returncode == 0, said
  assert kills >= 3, 'it ended before it could be killed'
  assert corpora.files_of(out) == corpora.files_of(finished)


def test_ray_gives_the_same_bytes(recipe, finished, tmp_path):
  build.build(recipe, tmp_path / 'out', runner=RayRunner('local', 2))
  assert corpora.files_of(tmp_path / 'out') == corpora.files_of(finished)


def test_the_report_adds_up_and_says_what_became_of_each_source(finished):
  report = json.loads((finished / 'report.json').read_text())
  manifest = shards.read_manifest(finished)
  for source in SOURCES:
    first, last = (report['stages'][i]['sources'][source] for i in (0, -1))
    removed = sum(of['documents'] for stage in report['stages']
                  for of in stage['sources'][source]['removed'].values())
    assert first['documents'] - removed == last['kept'] == sum(
      manifest['sources'][source][split]['documents'] for split in ('train', 'validation'))
  read = report['stages'][0]['sources']
  assert read['pdf']['facts']['pages'] > 400 and read['pdf']['facts'].get('pages_ocr', 0) < 5  # pages of a logo alone
  assert read['scans']['facts']['pages_ocr'] == read['scans']['facts']['pages'] > 5


def test_a_model_trains_on_it_and_learns_from_each_source(finished, tmp_path):
  done = subprocess.run([sys.executable, '-m', 'maxlm.train', f'--config={ROOT}/configs/web_pdf_synthetic.py:small',
                         f'--config.data.corpus={finished}', f'--workdir={tmp_path}/run'], cwd=ROOT, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stderr
  records = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  for source in SOURCES:
    losses = [record[f'loss/{source}'] for record in records if f'loss/{source}' in record]
    assert losses[-1] < losses[0] - 1
  assert any(f'eval/loss/{source}' in record for record in records for source in ('web', 'pdf'))
