"""Puzzles as a source: problems that are worked out, with answers that a program can check (`data_pipeline.puzzles`)."""

import dataclasses
import pathlib
import random
from collections.abc import Iterator

from data_pipeline import puzzles, shards
from data_pipeline.recipe import Input, Raw

_DOCUMENTS_A_SHARD = 20_000


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Puzzles:
  """`documents` documents of about `characters` characters, each of one kind and level, which take turns.

  A document of 'retrieval' is one table of that length and questions on it: characters=200_000 is long context. Other
  documents hold as many problems as it takes.
  """

  name: str = 'puzzles'
  kinds: tuple[str, ...] = ('arithmetic', 'algebra', 'sorting', 'code_trace', 'retrieval')
  levels: tuple[int, ...] = (1, 2, 3)
  documents: int
  characters: int = 1500
  seed: int = 0

  def __post_init__(self):
    if not self.kinds or (unknown := set(self.kinds) - {*puzzles.PROBLEMS, 'retrieval'}):
      raise ValueError(f'source {self.name}: no puzzles of kind {", ".join(unknown) if self.kinds else "()"}: there are '
                       f'{", ".join(puzzles.PROBLEMS)}, retrieval')
    if not self.levels or not 1 <= min(self.levels) <= max(self.levels) <= 10:
      raise ValueError(f'source {self.name}: levels={self.levels} must be numbers from 1 to 10')
    if self.documents < 1 or self.characters < 1:
      raise ValueError(f'source {self.name}: documents={self.documents} and characters={self.characters} must be at least 1')

  def state(self) -> str:
    return shards.code_of(puzzles)

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    starts = range(0, self.documents, _DOCUMENTS_A_SHARD)
    ends = [min(start + _DOCUMENTS_A_SHARD, self.documents) for start in starts]
    return [Input(paths=(str(start), str(end)), lineage=f'puzzles {start} to {end - 1} of seed {self.seed}')
            for start, end in zip(starts, ends)]

  def read(self, unit: Input) -> Iterator[Raw]:
    for i in range(*map(int, unit.paths)):
      turn, kind = divmod(i, len(self.kinds))
      level = self.levels[turn % len(self.levels)]
      place = f'{self.kinds[kind]}/{level}/{i}'
      numbers = random.Random(f'{self.seed}/{place}')
      pick = lambda options: options[int(numbers.random() * len(options))]  # the sequence of random() is promised to stay
      yield Raw(f'puzzle:{self.seed}/{place}', puzzles.document(self.kinds[kind], level, self.characters, pick))
