"""What a corpus is made of: a recipe is one Python file whose `get_recipe()` (or `get_recipe(arg)`) returns a `Recipe`."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol

from data_pipeline.dedup.exact import Exact

_BUILT_IN = pathlib.Path(__file__).parent / 'recipes'


class SourceUnavailable(OSError):
  """A source cannot be fetched on this machine: the package manager or the network is missing. Not a bad recipe."""


class Reject(ValueError):
  """A document that is left out. Its text is the reason, in a few words that are the same for all such: 'encrypted'."""


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
  """One unit of work of a source: read in one process, becomes one shard of documents. Small: it travels to a worker."""

  paths: tuple[str, ...]
  lineage: str  # what it is, for people: a package and its version, a range of files


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
  """A document as its source has it. content: its text, or the bytes that the source's `extract` makes text of."""

  url: str
  content: str | bytes
  date: str = ''  # ISO 8601, as far as it is known: '2024-05-01'
  parent: str = ''  # the id of the document that it was made from


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
  """What a source yields in the place of a document that it cannot read."""

  url: str
  reason: str  # as of `Reject`
  n_bytes: int = 0


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Limits:
  """What one document may take; one that takes more is left out, and counted."""

  max_bytes: int = 64 << 20  # of the raw document, and of its text
  cpu_seconds: float = 20.0
  wall_seconds: float = 120.0  # where it waits for something else: a disk, another program
  memory_bytes: int = 4 << 30  # address space of the process that extracts


class Source(Protocol):
  """Where documents come from: a frozen dataclass, so that its fields enter the recipe's hash.

  A source of bytes has a method more, `extract(raw: Raw) -> tuple[str, dict[str, int]]`: the text and what is to be counted
  ({'pages': 3}), or Reject. It runs in a process of its own under the source's `limits` (a member, a `Limits`; without it
  the defaults): what crashes or hangs there costs one document. A source of conversations has a member `chats`, a
  `chat.ChatFormat`: its documents are those of `chat.canonical`.
  """

  name: str  # of the source in mixtures, logs and folders: letters, digits, '-', '_', '.'

  def state(self) -> str:
    """What else decides the documents, known without fetching: e.g. a hash of sizes and times of local files."""

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    """Brings the source to this machine (into `scratch` if it must be fetched). SourceUnavailable where it cannot."""

  def read(self, unit: Input) -> Iterator[Raw | Unreadable]:
    """Each document, in an order that is always the same. Called in a worker process. Holds one document at a time."""


class Step(Protocol):
  """Judges documents after they are written: a frozen dataclass. docs/data.md lists those there are."""

  name: str  # of its folder and its line in the report; a field or a property
  # and, where it is not for all: `sources: tuple[str, ...]`, the names of those whose documents it judges ((): all)

  def state(self) -> str:
    """What decides the verdicts besides fields and documents: `shards.code_of` modules, hashes of files that it reads."""

  def judge(self, tasks, shards: list) -> list[dict]:
    """A record for each `verdicts.Shard`, of `verdicts.write`, by `tasks.run` of a `tasks.Tasks`."""


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
  name: str
  sources: tuple[Source, ...]
  steps: tuple[Step, ...] = (Exact(),)  # in this order; each sees what the ones before have kept
  vocab_size: int  # of the byte-level BPE trained on the training split; a small corpus may give fewer
  tokenizer: str = ''  # used instead of training one: a tokenizer.json, or the folder it is in, such as a run's workdir
  seq_lens: tuple[int, ...]  # row lengths to pack; each is a folder of the corpus
  length_buckets: tuple[int, ...] = ()  # texts of so many tokens or more are sources of their own: web, web.8192
  validation_fraction: float  # of documents, chosen by a hash of their text
  min_bytes: int  # shorter documents (utf-8) are dropped
  fallback: 'Recipe | None' = None  # built instead, with a notice, on a machine where a source is unavailable

  def with_tokenizer(self, path: str) -> 'Recipe':
    """The same recipe, and its fallback, for a tokenizer that there is already."""
    fallback = self.fallback and self.fallback.with_tokenizer(path)
    return dataclasses.replace(self, tokenizer=path, fallback=fallback)

  def validate(self) -> None:
    """ValueError with one line for the first field that cannot be built."""
    names = [source.name for source in self.sources]
    if not names or len(set(names)) < len(names):
      raise ValueError(f'recipe {self.name}: needs sources of different names, has {names}')
    if bad := [name for name in names if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', name)]:
      raise ValueError(f'recipe {self.name}: the source name {bad[0]!r} may hold only letters, digits, ".", "_" and "-"')
    if not 257 <= self.vocab_size < 1 << 31:
      raise ValueError(f'recipe {self.name}: vocab_size={self.vocab_size} must be at least 257: '
                       '256 bytes and the end of text')
    if not self.seq_lens or min(self.seq_lens) < 2:
      raise ValueError(f'recipe {self.name}: seq_lens={self.seq_lens} must name at least one row length, each at least 2')
    if not 0 <= self.validation_fraction < 1:
      raise ValueError(f'recipe {self.name}: validation_fraction={self.validation_fraction} must be in [0, 1)')
    if len({step.name for step in self.steps}) < len(self.steps):
      raise ValueError(f'recipe {self.name}: needs steps of different names, has {[step.name for step in self.steps]}')
    if unknown := sorted({name for step in self.steps for name in getattr(step, 'sources', ())} - {*names}):
      raise ValueError(f'recipe {self.name}: a step judges the source {unknown[0]!r}, and there are {", ".join(names)}')
    if any(a >= b for a, b in zip((1, *self.length_buckets), self.length_buckets)):
      raise ValueError(f'recipe {self.name}: length_buckets={self.length_buckets} must be ascending numbers of tokens')
    if self.length_buckets and (chats := [source.name for source in self.sources if hasattr(source, 'chats')]):
      raise ValueError(f'recipe {self.name}: length_buckets={self.length_buckets} are of texts, and {chats[0]} has '
                       'conversations: give it a recipe of its own, or leave out length_buckets')
    if self.fallback is not None:
      self.fallback.validate()


def load_recipe(path_or_name: str) -> Recipe:
  """'quickstart' (a file of data_pipeline/recipes), 'dir/my_recipe.py', either with ':arg' for get_recipe(arg).

  ValueError with one line where there is no such recipe or the file does not define one.
  """
  name, _, argument = path_or_name.partition(':')
  path = pathlib.Path(name)
  if path.suffix != '.py':
    path = _BUILT_IN / f'{name}.py'
    if not path.is_file():
      known = sorted(file.stem for file in _BUILT_IN.glob('[a-z]*.py'))
      raise ValueError(f'unknown recipe {name!r}: name one of {", ".join(known)}, or the path of a .py file')
  if not path.is_file():
    raise ValueError(f'there is no recipe file {path}')
  spec = importlib.util.spec_from_file_location(f'recipe_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_recipe'):
    raise ValueError(f'{path} defines no get_recipe(): see docs/data.md')
  if argument and not inspect.signature(module.get_recipe).parameters:
    raise ValueError(f'get_recipe() of {path} takes no argument: leave out ":{argument}"')
  recipe = module.get_recipe(argument) if argument else module.get_recipe()
  if not isinstance(recipe, Recipe):
    raise ValueError(f'get_recipe() of {path} returned a {type(recipe).__name__}, not a data_pipeline.recipe.Recipe')
  if mine := [source for source in recipe.sources if type(source).__module__ == module.__name__]:
    raise ValueError(f'{path} defines the source class {type(mine[0]).__name__} itself: put it in a module that Python can '
                     'import, where worker processes find it')
  recipe.validate()
  return recipe
