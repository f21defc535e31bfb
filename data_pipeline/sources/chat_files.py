"""A source of conversations: one's own files of JSON lines, in the forms of `data_pipeline/chat.py`."""

import dataclasses
import pathlib
from collections.abc import Iterator

from data_pipeline import chat
from data_pipeline.recipe import Input, Raw
from data_pipeline.sources.text_files import TextFiles


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class ChatFiles:
  """Files on this machine, a conversation a line. pattern: as of `TextFiles`, e.g. '/data/chats/*.jsonl'.

  A line that is no conversation does not end the build: it is rejected for a reason that is counted and shown.
  """

  name: str
  pattern: str
  chats: chat.ChatFormat = chat.ChatFormat()

  def state(self) -> str:
    template = self.chats.template and pathlib.Path(self.chats.template).read_text(encoding='utf-8')
    return TextFiles(name=self.name, pattern=self.pattern).state() + template

  def fetch(self, scratch: pathlib.Path) -> list[Input]:
    return TextFiles(name=self.name, pattern=self.pattern).fetch(scratch)

  def read(self, unit: Input) -> Iterator[Raw]:
    for path in unit.paths:
      with open(path, 'rb') as lines:
        for number, line in enumerate(lines, 1):
          if line.strip():
            yield Raw(f'{path}#{number}', chat.canonical(line))
