"""The corpus that tests train on: made-up text of two sources through the real build, the same bytes on any machine.

    python -m tests.make_corpus DIR      # to try configs/tiny.py by hand
"""

import json
import random
import sys
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.recipe import Recipe
from data_pipeline.sources.text_files import TextFiles

SEQ_LEN, VOCAB_SIZE = 64, 512

WHO = ('the captain, an old woman, her brother, the clerk, a stranger, the miller, two children, the doctor, a fisherman, '
       'our neighbour, the gardener, a young soldier').split(', ')
DID = 'found, carried, sold, forgot, painted, wanted, hid, repaired, counted, asked for, described, borrowed'.split(', ')
WHAT = ('a lantern, the map, seven coins, a wooden horse, the letter, some bread, the clock, a blue door, an empty bottle, '
        'the violin, a pair of gloves, the keys').split(', ')
WHEN = 'at night, before the storm, in the market, after supper, by the river, twice, without a word, today'.split(', ')


def story(pick, sentences: int) -> str:
  lines = [f'{pick(WHO)} {pick(DID)} {pick(WHAT)} {pick(WHEN)}.' for _ in range(sentences)]
  return ' '.join(line[0].upper() + line[1:] for line in lines)


def inventory(pick, rows: int) -> str:
  lines = [f'  {pick(range(100))} x {pick(WHAT)}, {pick(WHEN)}' for _ in range(rows)]
  return '\n'.join([f'Inventory no. {pick(range(1000))}', *lines])


def make_corpus(directory: Path, seq_lens: tuple[int, ...] = (SEQ_LEN,)) -> Path:
  """Builds it in `directory`, which is returned. Documents from much shorter to several times longer than a row."""
  numbers = random.Random(0)
  pick = lambda options: options[int(numbers.random() * len(options))]  # the sequence of random() is promised to stay
  text = directory.with_name(f'{directory.name}-text')
  text.mkdir(parents=True, exist_ok=True)
  for name, write, n_documents in (('stories', story, 300), ('inventories', inventory, 150)):
    with open(text / f'{name}.jsonl', 'w', encoding='utf-8') as file:
      for _ in range(n_documents):
        file.write(json.dumps({'text': write(pick, pick((1, 2, 3, 5, 8, 13, 21)))}) + '\n')
  sources = tuple(TextFiles(name=name, pattern=str(text / f'{name}.jsonl')) for name in ('stories', 'inventories'))
  recipe = Recipe(name='tests', sources=sources, vocab_size=VOCAB_SIZE, seq_lens=seq_lens, validation_fraction=0.1,
                  min_bytes=20)
  return build(recipe, directory, workers=1)


if __name__ == '__main__':
  make_corpus(Path(sys.argv[1]))
