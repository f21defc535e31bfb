"""Training data that needs a long context: texts, and questions whose answers lie far back (`data_pipeline.long_range`).

    LongRange(documents=20_000)                                                            made up sentences
    LongRange(name='books_qa', of=TextFiles(name='books', pattern='…'), documents=1_000,   real documents: facts that are put
              characters=(50_000, 200_000), tasks=('multi_key', 'counting'))               into them, words that are counted
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

from data_pipeline import long_range, shards
from data_pipeline.recipe import Input, Limits, Raw, Source, Unreadable

_DOCUMENTS_A_SHARD = 5_000


@dataclasses.dataclass(kw_only=True, frozen=True)
class LongRange:
  """Documents, each a text and up to `questions` questions on it with their answers; tasks and lengths take turns.

  documents: how many; with `of`, so many of each of its inputs at most. characters: of a text, about, beside the facts (0:
  nothing else). facts: in a text, at most, where a task has several. of: a source whose documents are the texts; without
  it sentences are made up.
  """

  name: str = 'long_range'
  tasks: tuple[str, ...] = long_range.TASKS
  documents: int
  characters: tuple[int, ...] = (300, 1_000, 3_000)
  facts: int = 8
  questions: int = 8
  of: Source | None = None
  seed: int = 0

  def __post_init__(self):
    if not self.tasks or (unknown := set(self.tasks) - {*long_range.TASKS}):
      raise ValueError(f'source {self.name}: no tasks {", ".join(sorted(unknown)) if self.tasks else "()"}: there are '
                       f'{", ".join(long_range.TASKS)}')
    most = len(long_range.VALUES)
    if not self.characters or min(self.characters) < 0 or min(self.documents, self.questions) < 1:
      raise ValueError(f'source {self.name}: documents={self.documents} and questions={self.questions} must be at least 1, '
                       f'and characters={self.characters} at least 0')
    if not 1 <= self.facts <= most:
      raise ValueError(f'source {self.name}: facts={self.facts} must be from 1 to {most}')

  @property
  def limits(self) -> Limits:
    return getattr(self.of, 'limits', Limits())

  def state(self) -> str:
    return f'{shards.code_of(long_range)} {self.of.state() if self.of else ""}'

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    if self.of:
      return self.of.fetch(scratch)
    starts = range(0, self.documents, _DOCUMENTS_A_SHARD)
    ends = [min(start + _DOCUMENTS_A_SHARD, self.documents) for start in starts]
    return [Input(paths=(str(start), str(end)), lineage=f'long range {start} to {end - 1} of seed {self.seed}')
            for start, end in zip(starts, ends)]

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    if self.of:
      for raw in itertools.islice(self.of.read(unit), self.documents):
        if not isinstance(raw, Unreadable):
          later = isinstance(raw.content, bytes)  # by `extract`
          raw = Raw(f'{raw.url}#questions', raw.content if later else self._on(raw.url, raw.content), raw.date)
        yield raw
      return
    for i in range(*map(int, unit.paths)):
      turn, task = divmod(i, len(self.tasks))
      characters = self.characters[turn % len(self.characters)]
      text = self._text(self.tasks[task], characters, f'{self.seed}/{i}')
      yield Raw(f'long_range:{self.seed}/{self.tasks[task]}/{i}', text)

  def extract(self, raw: Raw) -> tuple[str, dict[str, int]]:
    """The text of a document of `of`, with questions on it, and what that source counts."""
    url = raw.url.removesuffix('#questions')
    text, counts = self.of.extract(dataclasses.replace(raw, url=url))
    return self._on(url, text), counts

  def _on(self, url: str, text: str) -> str:
    pick = long_range.pick_of(f'{self.seed}/{url}')
    task, characters, sentences = pick(self.tasks), pick(self.characters), long_range.split_sentences(text)
    ends = list(itertools.accumulate(len(sentence) + 1 for sentence in sentences))
    n = max(1, sum(end <= characters for end in ends))
    made = long_range.problem(task, n, f'{self.seed}/{url}', facts=self._n_facts(pick), sentences=sentences)
    return made.document(self.questions)

  def _text(self, task: str, characters: int, seed: str) -> str:
    pick = long_range.pick_of(seed)
    facts, size = self._n_facts(pick), characters // (6 if task == 'common' else 40)
    return long_range.problem(task, size, seed, facts=facts).document(self.questions)

  def _n_facts(self, pick) -> int:
    return pick(range(1, self.facts + 1))
