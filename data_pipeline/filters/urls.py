"""Documents left out by their address, before anything is read of them."""

import dataclasses
import functools
import os
import pathlib
import re
import urllib.parse

import numpy as np

from data_pipeline.filters.step import Found, Rule, Texts, first_reason, hash_of


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Urls(Rule):
  """domains: paths of lists, a domain a line ('#' begins a comment); those below it are blocked too. words: a document goes
  whose address has one of these between its punctuation; word_lists: paths of lists of more."""

  domains: tuple[str, ...] = ()
  words: tuple[str, ...] = ('porn', 'porno', 'xxx', 'nsfw', 'hentai', 'escorts', 'camgirls', 'casino', 'casinos', 'viagra',
                            'warez')
  word_lists: tuple[str, ...] = ()

  def state(self) -> str:
    return ' '.join(map(hash_of, (*self.domains, *self.word_lists)))

  def judge(self, texts: Texts, rows: np.ndarray) -> Found:
    urls = [texts.urls[row].lower() for row in rows]
    domains, words = map(_lines_of, self.domains), [frozenset(self.words), *map(_lines_of, self.word_lists)]
    blocked, worded = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for some in domains:
      blocked |= [not some.isdisjoint(_domains_of(url)) for url in urls]
    for some in words:
      worded |= [not some.isdisjoint(re.findall(r'[^\W_]+', url)) for url in urls]
    return Found(first_reason(len(rows), ('url: blocked domain', blocked), ('url: blocked word', worded)))


def _domains_of(url: str) -> list[str]:
  """'http://a.b.org:80/' -> a.b.org, b.org, org"""
  try:
    parts = (urllib.parse.urlsplit(url).hostname or '').rstrip('.').split('.')
  except ValueError:  # brackets that hold no address
    return []
  return ['.'.join(parts[i:]) for i in range(len(parts))]


def _lines_of(path: str) -> frozenset[str]:
  return _lines(path, os.stat(path).st_mtime_ns)


@functools.lru_cache(8)
def _lines(path: str, changed: int) -> frozenset[str]:
  """changed: when the file was, so that what is remembered is of the file as it is."""
  text = pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
  lines = (line.partition('#')[0].strip().lower() for line in text.splitlines())
  return frozenset(line for line in lines if line)
