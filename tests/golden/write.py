"""Writes tests/golden/tiny_losses.json: `python -m tests.golden.write`.

Only for a change that is meant to move the first losses of configs/tiny.py; the commit says why.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline import loader
from tests.make_corpus import SEQ_LEN, make_corpus

ROOT = Path(__file__).parents[2]

with tempfile.TemporaryDirectory() as scratch:
  corpus, workdir = make_corpus(Path(scratch) / 'corpus'), Path(scratch) / 'run'
  subprocess.run([sys.executable, '-m', 'maxlm.train', '--config=configs/tiny.py', f'--config.data.corpus={corpus}',
                  f'--workdir={workdir}'], cwd=ROOT, check=True)
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  golden = {'tokenizer_sha256': loader.open_corpus(corpus, SEQ_LEN).tokenizer_sha256,
            'losses': [line['loss'] for line in lines if 'loss' in line][:20]}
(ROOT / 'tests' / 'golden' / 'tiny_losses.json').write_text(json.dumps(golden, indent=1) + '\n')
