"""Text that a model writes from documents of a finished corpus: rephrased, distilled, asked about.

The five tasks are those of Nemotron-CC (Su et al. 2024, arXiv 2412.02595, section 2.3); the prompts are our own. The model
is behind any OpenAI-compatible endpoint: a hosted one, vLLM, or `python -m maxlm.serve` on a checkpoint.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import urllib.parse
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline import selection, shards, verdicts
from data_pipeline.recipe import Input, Raw, Reject, Unreadable
from data_pipeline.sources import journal

_ANSWERS_A_SHARD = 10_000
_LEAST = 50  # characters of an answer
_WINDOW = 8  # words that are a repetition where they come again
_COPIED, _REPEATED = 0.8, 0.3  # of an answer's windows, what may be its source's, and what may have been there before

_SYSTEM = 'You are a careful editor. You follow the instructions exactly and answer with the requested text alone.'


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
  characters: int  # of a document at a time, at most: longer ones are asked about piece by piece
  max_tokens: int  # of an answer
  instructions: str


_TASKS = {
  'rephrase': _Task(2000, 1024, '''\
Rewrite the passage below in clear, well-formed prose, in the neutral voice of an encyclopedia. Keep every fact, name and \
number, and the meaning of each statement. Leave out menus, advertisements and broken fragments. Add nothing that the \
passage does not say.'''),
  'diverse_qa': _Task(4000, 1024, '''\
Write up to eight questions about the passage below, each with its answer. Mix the kinds: yes or no, a single fact, a \
definition, a comparison, a choice between options that you list, a reason, a consequence. Everything that is asked must be \
answered by the passage alone. Write each pair on two lines, which begin with "Question:" and "Answer:", and leave an empty \
line between pairs.'''),
  'distill': _Task(8000, 1536, '''\
Shorten the passage below to its substance. Keep the important facts, terms, numbers and the reasoning that joins them, in \
whole sentences that can be read without the original. Leave out repetition, asides and what only decorates. Do not speak \
of "the passage" or of its author.'''),
  'extract_knowledge': _Task(5600, 1024, '''\
Take from the passage below what is worth knowing: facts, definitions, explanations, methods. Write it as a section of a \
textbook would, in paragraphs that stand on their own. Leave out opinions, promotion, personal details and everything that \
only matters to the page it stands on.'''),
  'knowledge_list': _Task(4000, 768, '''\
List the facts and concepts that the passage below teaches. Write one on each line, beginning with "- ", as a full sentence \
that is understood without the others and names what it is about. No headings and no comments.'''),
}
_OPENING = re.compile(r"(?i)\s*(sure|certainly|of course|okay|here (is|are|'s)|below (is|are))\b[^\n]{0,200}[:!.]\s*\n")
_REFUSAL = re.compile(r"(?i)\W*((i'm |i am )?sorry|i apologi[sz]e|i can(no|')t|(i'm|i am) (unable|not able)|as an ai\b|"
                      r'as a language model)')
_THOUGHT = re.compile(r'(?s)\s*<think>.*?</think>')  # that reasoning models put before an answer
_PAIR = re.compile(r'(?ms)^\W*Question:\W*(\S.*?)\s*^\W*Answer:\W*(\S.*?)\s*(?=^\W*Question:|\Z)')
_ITEM = re.compile(r'(?m)^\s*(?:[-*•]|\d+[.)])\s+(\S.*)$')


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Rewritten:
  """What `model` at `endpoint` (…/v1) makes of the training documents of the corpus `documents`; `parent` is their id.

  task: 'rephrase', 'diverse_qa' (the document, then questions and answers), 'distill', 'extract_knowledge' or
  'knowledge_list'. of: the sources that are taken, or their buckets: ('web', 'books.q19'); all texts where empty.
  max_documents: so many of them, chosen by their ids (0: all). journal: a folder of answers that outlives the corpus and is
  never paid for twice. key_file: a file with the API key and nothing else.
  """

  name: str
  documents: str
  task: str
  endpoint: str
  model: str
  journal: str
  of: tuple[str, ...] = ()
  max_documents: int = 0
  key_file: str = ''
  concurrency: int = 16  # requests at a time
  requests_per_second: float = 0.0  # at most; 0: as fast as answers come
  temperature: float = 0.5
  top_p: float = 0.9

  def __post_init__(self):
    url = urllib.parse.urlsplit(self.endpoint)
    if self.task not in _TASKS:
      raise ValueError(f'source {self.name}: there is no task {self.task!r}: name one of {", ".join(_TASKS)}')
    if url.scheme not in ('http', 'https') or not url.hostname:
      raise ValueError(f'source {self.name}: an endpoint is a URL such as http://127.0.0.1:8000/v1')
    if url.username is not None or url.query:
      raise ValueError(f'source {self.name}: the URL of an endpoint is no place for a password or key: key_file names a '
                       'file with it')
    if self.concurrency < 1 or self.requests_per_second < 0 or self.max_documents < 0:
      raise ValueError(f'source {self.name}: concurrency must be at least 1, requests_per_second and max_documents at least '
                       '0')

  def state(self) -> str:
    files = [file for file in _manifest(pathlib.Path(self.documents))['files']
             if file['path'].split('/')[0] in ('documents', 'verdicts', 'selection')]
    return shards.key_of([(file['path'], file['xxh3']) for file in files], shards.code_of(journal, selection, verdicts))

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    """Asks for what the journal lacks, then lays out the answers in the order of the documents."""
    asked = {}  # keys, in the order of the documents

    def requests():
      for document_id, url, date, text in self._training_documents():
        for part, piece in enumerate(_pieces(text, _TASKS[self.task].characters), 1):
          body = self._body(piece)
          key = xxhash.xxh3_128_digest(json.dumps(body, sort_keys=True).encode())
          if key not in asked:
            asked[key] = None
            yield key, body, {'url': f'{url}#{self.task}-{part}', 'document': document_id, 'date': date, 'text': piece}

    with journal.Journal(pathlib.Path(self.journal).expanduser()) as answers:
      failed = journal.ask_all(requests(), answers, endpoint=self.endpoint, key_file=self.key_file,
                               concurrency=self.concurrency, requests_per_second=self.requests_per_second,
                               what=f'{self.name}: {self.task}')
      if not asked:
        raise ValueError(f'source {self.name}: {self.documents} has no training document'
                         f'{" of " + ", ".join(self.of) if self.of else ""} to rewrite')
      (scratch / self.name).mkdir()
      lines = (json.dumps(failed[key]).encode() + b'\n' if key in failed else answers.line(key) for key in asked)
      return [self._unit(scratch / self.name / f'{i:05d}.jsonl', batch)
              for i, batch in enumerate(itertools.batched(lines, _ANSWERS_A_SHARD))]

  def _unit(self, path: pathlib.Path, lines: tuple[bytes, ...]) -> Input:
    path.write_bytes(b''.join(lines))
    return Input(paths=(str(path),), lineage=f'{self.task} by {self.model}, answers {shards.hash_file(path)[:16]}')

  def _body(self, piece: str) -> dict:
    task = _TASKS[self.task]
    messages = [{'role': 'system', 'content': _SYSTEM},
                {'role': 'user', 'content': f'{task.instructions}\n\nPassage:\n\n{piece}'}]
    return {'model': self.model, 'messages': messages, 'max_tokens': task.max_tokens, 'temperature': self.temperature,
            'top_p': self.top_p}

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    with open(*unit.paths, 'rb') as lines:
      for record in map(json.loads, lines):
        if 'failed' in record:
          yield Unreadable(record['url'], record['failed'])
          continue
        try:
          yield Raw(record['url'], usable(self.task, record), record['date'], record['document'])
        except Reject as reject:
          yield Unreadable(record['url'], str(reject), len(record['answer']))

  def _training_documents(self) -> Iterator[tuple[str, str, str, str]]:
    """(id, url, date, text) of those that are wanted, in the order of the corpus."""
    root = pathlib.Path(self.documents)
    shards_, chats = _shards(root)
    known = {shard.source for shard in shards_}
    if unknown := {name for name in self.of if name not in known and name.rpartition('.')[0] not in known}:
      raise ValueError(f'source {self.name}: {root} has no source {", ".join(sorted(unknown))}, only '
                       f'{", ".join(sorted(known))}')
    texts = [shard for shard in shards_ if shard.source not in chats]
    chosen, n = np.empty(0, np.uint64), self.max_documents
    for shard in texts if n else ():
      chosen = np.sort(np.concatenate([chosen, self._wanted(root, shard)[1]]))[:n]
    last = chosen[-1] if n and len(chosen) == n else None
    for shard in texts:
      rows, ranks = self._wanted(root, shard)
      if rows := set((rows if last is None else rows[ranks <= last]).tolist()):
        facts = pq.read_table(root / shard.documents, columns=['id', 'url', 'date'])
        for kept, text in verdicts.edited(root, shard):
          mine = [i for i, row in enumerate(kept.tolist()) if row in rows]
          yield from ((*of.values(), text[i]) for i, of in zip(mine, facts.take(pa.array(kept[mine])).to_pylist()))

  def _wanted(self, root: pathlib.Path, shard: verdicts.Shard) -> tuple[np.ndarray, np.ndarray]:
    """(rows, ranks by which max_documents are chosen) of the training documents of a shard that are in `of`."""
    columns = ['id', 'verdict', selection.BUCKET]
    table = pq.read_table(root / 'selection' / shard.documents.partition('/')[2], columns=columns).to_pydict()
    rows = [row for row, (verdict, bucket) in enumerate(zip(table['verdict'], table[selection.BUCKET]))
            if verdict == selection.TRAIN and (not self.of or {shard.source, f'{shard.source}.{bucket}'} & {*self.of})]
    # the half of the id that does not decide whether it is held out
    return np.array(rows, np.int64), np.array([int(table['id'][row][16:], 16) for row in rows], np.uint64)


def _manifest(root: pathlib.Path) -> dict:
  manifest = shards.read_manifest(root)
  if 'steps' not in manifest['recipe']:
    raise ValueError(f'the corpus at {root} was built before there were steps, and says too little of its documents: '
                     'build it again')
  return manifest


def _shards(root: pathlib.Path) -> tuple[list[verdicts.Shard], set[str]]:
  """The documents of a finished corpus with all that was said of them, and the sources that are conversations."""
  manifest = _manifest(root)
  return verdicts.of_corpus(root, manifest), {rows['of'] for rows in manifest['rows'] if rows['masked']}


def _pieces(text: str, characters: int) -> Iterator[str]:
  """The text in pieces of about one length and at most so many characters, cut where a paragraph, line or sentence ends."""
  start = 0
  while len(text) - start > characters:
    goal = (len(text) - start) // -(-(len(text) - start) // characters)
    first, last = start + goal // 2, start + min(goal + goal // 4, characters)
    cuts = [at + len(end) for end in ('\n\n', '\n', '. ', ' ') if (at := text.rfind(end, first, last)) > 0]
    cut = cuts[0] if cuts else start + characters
    yield text[start:cut].strip()
    start = cut
  yield text[start:].strip()


# -- what is kept of an answer


def usable(task: str, record: dict) -> str:
  """The text of an answer without what frames it. Reject where there is none worth keeping."""
  if record['finish'] == 'length':
    raise Reject('cut off')
  answer = _OPENING.sub('', _THOUGHT.sub('', record['answer'], count=1), count=1).strip()
  if record['finish'] == 'content_filter' or _REFUSAL.match(answer):
    raise Reject('refusal')
  if len(answer) < _LEAST:
    raise Reject('too short')
  said = _windows(answer)
  if not _windows(f'{_SYSTEM} {_TASKS[task].instructions}').isdisjoint(said):
    raise Reject('repeats the prompt')
  n_words = len(re.findall(r'\w+', answer))
  if n_words >= _WINDOW and 1 - len(said) / (n_words - _WINDOW + 1) > _REPEATED:
    raise Reject('repeats itself')
  if task == 'diverse_qa':
    pairs = [f'Question: {question}\nAnswer: {answer}' for question, answer in _PAIR.findall(answer)]
    if not pairs:
      raise Reject('no questions')
    return '\n\n'.join([record['text'], *pairs])
  if len(said & _windows(record['text'])) > _COPIED * len(said):
    raise Reject('copies its source')
  if task == 'knowledge_list':
    items = _ITEM.findall(answer)
    if not items:
      raise Reject('no list')
    return '\n'.join(items)
  return answer


def _windows(text: str) -> set[tuple[str, ...]]:
  words = re.findall(r'\w+', text.lower())
  return {tuple(words[i:i + _WINDOW]) for i in range(len(words) - _WINDOW + 1)}
