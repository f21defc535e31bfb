"""Conversations to fine-tune a model on, with that model's tokenizer.

    python -m data_pipeline.build --recipe=sft --tokenizer=runs/quickstart --out=DIR
    python -m data_pipeline.build --recipe=sft:chats.jsonl --tokenizer=runs/quickstart --out=DIR

Without a file: some thousands about Python's documentation, which every machine has (`sources/python_chats.py`). The forms
that the lines of a file may have are in `data_pipeline/chat.py`.
"""

from data_pipeline.recipe import Recipe
from data_pipeline.sources.chat_files import ChatFiles
from data_pipeline.sources.python_chats import PythonChats


def get_recipe(pattern: str = '') -> Recipe:
  source = ChatFiles(name='chats', pattern=pattern) if pattern else PythonChats()
  return Recipe(name='sft', sources=(source,), vocab_size=4096, seq_lens=(256,), validation_fraction=0.05, min_bytes=1)
