"""Small conversations about real sentences: what Python's documentation says of its functions, and tasks with one answer.

They teach a small model the form of a conversation and a few skills that can be checked: to copy a part of what was said,
to spell in capitals, to count, to answer yes or no. Made from the docstrings on this machine: no network, and the same for
the same version of Python.
"""

import ast
import dataclasses
import json
import pathlib
import platform
import random
import re
import warnings
from collections.abc import Iterator

from data_pipeline import chat
from data_pipeline.recipe import Input, Raw
from data_pipeline.sources.python_docs import library_files

_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()/-]+\.")
_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class PythonChats:
  """A conversation of one or two questions for each function and class of the standard library that says in a plain
  sentence what it does."""

  name: str = 'python-chats'
  chats: chat.ChatFormat = chat.ChatFormat()

  def state(self) -> str:
    return platform.python_version()

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return [Input(paths=tuple(map(str, library_files('.py'))), lineage=f'Python {platform.python_version()}')]

  def read(self, unit: Input) -> Iterator[Raw]:
    for path in map(pathlib.Path, unit.paths):
      for place, name, sentence in _sentences(path):
        messages = _conversation(name, sentence, random.Random(f'{path.stem}.{place}'))
        yield Raw(f'python:chat/{path.stem}.{place}', chat.canonical(json.dumps({'messages': messages}).encode()))


def _sentences(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
  """(a name that is unique in the file, name as people say it, first sentence of the docstring) of what is defined there."""
  try:
    with warnings.catch_warnings(action='ignore', category=SyntaxWarning):
      tree = ast.parse(path.read_bytes())
  except SyntaxError:
    return  # the library ships a few files that are wrong on purpose
  for node in ast.walk(tree):
    if isinstance(node, _DEFINITION) and (text := ast.get_docstring(node)):
      first = re.match(r'.+?\.(?=\s|$)', ' '.join(text.split('\n\n')[0].split()))
      sentence = first.group() if first else ''
      if _PLAIN.fullmatch(sentence) and 4 <= len(sentence.split()) <= 16:
        yield f'{node.name}:{node.lineno}', node.name, sentence


def _conversation(name: str, sentence: str, chance: random.Random) -> list[dict]:
  """A question about the sentence, and for every third one a second question."""
  pick = lambda options: options[int(chance.random() * len(options))]  # the sequence of random() is promised to stay
  tasks = _tasks(name, sentence, pick)
  first = pick(range(len(tasks)))
  chosen = [tasks[first], tasks[(first + 1) % len(tasks)]][:1 + (chance.random() < 1 / 3)]
  return [{'role': role, 'content': text} for task in chosen for role, text in zip(('user', 'assistant'), task)]


def _tasks(name: str, sentence: str, pick) -> list[tuple[str, str]]:
  """(question, answer) of each kind of task, about one sentence. Each can be asked alone."""
  words = re.findall(r"[A-Za-z0-9'-]+", sentence)
  middle = len(sentence.split()) // 2
  begin, end = ' '.join(sentence.split()[:middle]), ' '.join(sentence.split()[middle:])
  there = pick(words)
  return [
    (f'What does {name} do?', sentence),
    (f'What is the first word of "{sentence}"?', words[0]),
    (f'Write in capital letters: {sentence}', sentence.upper()),
    (f'What is the last word of "{sentence}"?', words[-1]),
    (f'Does "{sentence}" have the word "{there}"?', 'Yes.'),
    (f'Complete the sentence about {name}: {begin}', end),
    (f'How many words are in "{sentence}"?', f'{len(words)}'),
    (f'Does "{sentence}" have the word "{there}s"?', 'Yes.' if there + 's' in words else 'No.'),
    (f'Repeat: {sentence}', sentence),
  ]
