"""What a corpus is made of: a recipe is one Python file whose `get_recipe()` (or `get_recipe(arg)`) returns a `Recipe`."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol

_BUILT_IN = pathlib.Path(__file__).parent / 'recipes'


class SourceUnavailable(OSError):
  """A source cannot be fetched on this machine: the package manager or the network is missing. Not a bad recipe."""


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
  """One unit of work of a source: read in one process, becomes one shard of documents. Small: it travels to a worker."""

  paths: tuple[str, ...]
  lineage: str  # what it is, for people: a package and its version, a range of files


class Source(Protocol):
  """Where documents come from: a frozen dataclass, so that its fields enter the recipe's hash.

  A source of conversations has one more member, `chats`, a `chat.ChatFormat`: its documents are those of `chat.canonical`.
  """

  name: str  # of the source in mixtures, logs and folders: letters, digits, '-', '_', '.'

  def state(self) -> str:
    """What else decides the documents, known without fetching: e.g. a hash of sizes and times of local files."""

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    """Brings the source to this machine (into `scratch` if it must be fetched). SourceUnavailable where it cannot."""

  def read(self, unit: Input) -> Iterator[tuple[str, str]]:
    """(url, text) of each document, in an order that is always the same. Called in a worker process."""


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
  name: str
  sources: tuple[Source, ...]
  vocab_size: int  # of the byte-level BPE trained on the training split; a small corpus may give fewer
  tokenizer: str = ''  # used instead of training one: a tokenizer.json, or the folder it is in, such as a run's workdir
  seq_lens: tuple[int, ...]  # row lengths to pack; each is a folder of the corpus
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


def describe(value) -> object:
  """A recipe or a part of it as plain JSON values, with the names of its classes: what its hash is made of."""
  if dataclasses.is_dataclass(value):
    fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {'class': type(value).__qualname__, **fields}
  if isinstance(value, (list, tuple)):
    return [describe(item) for item in value]
  if value is not None and not isinstance(value, (str, int, float, bool)):
    raise ValueError(f'a recipe is made of dataclasses, tuples, texts and numbers, and {value!r} is none of them')
  return value
