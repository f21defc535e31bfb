"""Small corpora for tests: files of made-up text in two sources, and the recipe that builds them in about a second."""

import json
import random
from pathlib import Path

from data_pipeline.recipe import Recipe
from data_pipeline.sources.text_files import TextFiles

_SYLLABLES = ('ka', 'to', 'mi', 'ren', 'sol', 'ba', 'qu', 'is', 'né', 'ö', 'x', 'ing', 'er', 'un', 'the', '42', '7')


def made_up_text(seed: int, words: int) -> str:
  """Words, sentences and paragraphs with digits, accents and line breaks; the same for a seed, always."""
  chance = random.Random(seed)
  vocabulary = [''.join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(200)]
  ends, weights = (' ', ', ', '. ', '\n', '\n\n'), (80, 8, 8, 3, 1)
  text = [chance.choice(vocabulary) + chance.choices(ends, weights)[0] for _ in range(words)]
  return ''.join(text).strip()


def write_files(folder: Path, documents: int = 60) -> Path:
  """folder/web/*.txt, among them a long one, two equal ones, a short one; folder/books.jsonl. Returns the folder."""
  (folder / 'web').mkdir(parents=True)
  for i in range(documents):
    (folder / 'web' / f'{i:03d}.txt').write_text(made_up_text(i, 2000 if i == 3 else 20 + 7 * i % 150), encoding='utf-8')
  (folder / 'web' / 'copy.txt').write_text(made_up_text(3, 2000), encoding='utf-8')
  (folder / 'web' / 'marker.txt').write_text('A text may spell <|endoftext|> and goes on: it ends where it ends.')
  (folder / 'web' / 'short.txt').write_text('too short')
  lines = [json.dumps({'text': made_up_text(1000 + i, 120), 'url': f'book:{i}'}) for i in range(documents // 2)]
  (folder / 'books.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return folder


def recipe(folder: Path, **changes) -> Recipe:
  """The recipe for what write_files wrote."""
  sources = (TextFiles(name='web', pattern=f'{folder}/web/*.txt'), TextFiles(name='books', pattern=f'{folder}/books.jsonl'))
  settings = dict(name='tiny', sources=sources, vocab_size=400, seq_lens=(32,), validation_fraction=0.15, min_bytes=20)
  return Recipe(**(settings | changes))


def files_of(corpus: Path) -> dict[str, bytes]:
  """Every file of a corpus by name, but for the lock: two corpora are the same if these are."""
  return {path.relative_to(corpus).as_posix(): path.read_bytes() for path in sorted(corpus.rglob('*'))
          if path.is_file() and path.name != 'lock'}
