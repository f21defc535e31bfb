"""Text out of HTML against the text that the HTML was made from: pages of python3.11-doc and their reStructuredText.

    PYTHONPATH=. python tests/benchmarks/extraction.py [--peer=VENV/bin/python] [--every=1]

Mean over pages of precision, recall and F1 of words (as bags, lower case), and MB of HTML a CPU second; the peer is
trafilatura in the interpreter that is named, in the same run. "unmarked" are the same pages without role="main",
which tells any extractor where the content is. The source is freed of markup and given the words that each directive
becomes ("New in version"); what is left of it, and what no page shows, costs every extractor the same.
"""

import argparse
import collections
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path

from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.text import html_to_text

PEER = '''
import json, pathlib, sys, time, trafilatura
pages = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).iterdir())]
for name, options in (('fast', {'fast': True}), ('default', {}), ('favor_precision', {'favor_precision': True})):
  started = time.process_time()
  texts = [trafilatura.extract(page, **options) or '' for page in pages]
  print(json.dumps([f'trafilatura {trafilatura.__version__}, {name}', texts, time.process_time() - started]))
'''

_SAID = {'versionadded': 'New in version', 'versionchanged': 'Changed in version', 'deprecated': 'Deprecated since version',
         'class': 'class', 'exception': 'exception', 'seealso': 'See also', 'note': 'Note', 'warning': 'Warning'}
_OPTIONS = ('synopsis|platform|noindex|class|maxdepth|numbered|hidden|name|caption|language|lines|start-after|'
            'emphasize-lines|alt|linenothreshold|width|header|widths|local|async|abstractmethod|classmethod|'
            'staticmethod|property|source|depth')
_UNSEEN = 'index|sectionauthor|moduleauthor|highlight|module|currentmodule|toctree|contents|include|literalinclude|image'


def words_of_source(text: str) -> collections.Counter:
  """The words that a page made from this reStructuredText shows."""
  text = re.sub(rf'\.\. ({"|".join(_SAID)})::', lambda directive: _SAID[directive[1]], text)
  text = re.sub(r':(pep|rfc|issue):`', lambda role: f'{role[1].replace("issue", "bpo")} :{role[1]}:`', text)
  text = re.sub(r'(?ms)^\.\. (?![\w:-]+::|_|\|).*?(?=^\S|\Z)', '', text)  # comments
  text = re.sub(rf'(?m)^( *)\.\. ({_UNSEEN}|_.*?|\|.*?)::?.*(\n\1 +\S.*|\n(?=\n\1 ))*', '', text)
  text = re.sub(rf'(?m)^ *:({_OPTIONS}):.*$', '', text)
  text = re.sub(r'\.\. [\w:-]+::|(?m:^[=~^#*"+-]{3,}$)', '', text)
  text = re.sub(r':[\w:+-]+:`([^`<]*?)(?:\s*<[^`>]*>)?`', lambda role: (
    role[1].rpartition('.')[2] if role[1].startswith('~') else role[1].lstrip('!').strip()), text)
  return words(re.sub(r'`([^`<]*?)\s*<[^`>]*>`__?', r'\1', text))


def words(text: str) -> collections.Counter:
  return collections.Counter(re.findall(r'\w+', text.lower()))


def score(texts: list[str], truths: list[collections.Counter]) -> tuple[float, float, float]:
  """(precision, recall, F1), means over pages."""
  rows = []
  for text, truth in zip(texts, truths):
    found = words(text)
    common = (found & truth).total()
    precision, recall = common / max(found.total(), 1), common / max(truth.total(), 1)
    rows.append((precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)))
  return tuple(sum(column) / len(rows) for column in zip(*rows))


def measure(peer: str = '', every: int = 1) -> list[dict]:
  """A row for each extractor: name, precision, recall, f1, mb_per_s. peer: an interpreter with trafilatura, or ''."""
  with tempfile.TemporaryDirectory() as scratch:
    package = DebianPackage(name='python3.11-doc', pages='*/html/*')
    unit, = package.fetch(Path(scratch))
    members = {raw.url.partition('/html/')[2]: raw.content for raw in package.read(unit)}
  pairs = [(members[name.removeprefix('_sources/').removesuffix('.rst.txt') + '.html'], source.decode())
           for name, source in sorted(members.items()) if name.endswith('.rst.txt')
           and name.removeprefix('_sources/').removesuffix('.rst.txt') + '.html' in members][::every]
  pages, truths = [page for page, _ in pairs], [words_of_source(source) for _, source in pairs]
  unmarked = [page.replace(b' role="main"', b'') for page in pages]
  rows, n_bytes = [], sum(map(len, pages))

  def add(name, texts, seconds):
    precision, recall, f1 = score(texts, truths)
    rows.append(dict(name=name, pages=len(pages), precision=precision, recall=recall, f1=f1,
                     mb_per_s=n_bytes / 1e6 / seconds))

  for name, given, main_content in (('ours, main_content', pages, True), ('ours, main_content, unmarked', unmarked, True),
                                    ('ours, whole page', pages, False)):
    started = time.process_time()
    texts = [html_to_text(page, main_content) for page in given]
    add(name, texts, time.process_time() - started)
  for what, given in (('', pages), (', unmarked', unmarked)) if peer else ():
    with tempfile.TemporaryDirectory() as folder:
      for i, page in enumerate(given):
        (Path(folder) / f'{i:05d}.html').write_bytes(page)
      done = subprocess.run([peer, '-c', PEER, folder], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
      name, texts, seconds = json.loads(line)
      add(name + what, texts, seconds)
  return rows


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--peer', default='', help='a Python with trafilatura')
  parser.add_argument('--every', type=int, default=1, help='take every n-th page')
  arguments = parser.parse_args()
  rows = measure(arguments.peer, arguments.every)
  print(f'{rows[0]["pages"]} pages of python3.11-doc\n\n| | precision | recall | F1 | MB/s/core |\n|---|---|---|---|---|')
  for row in rows:
    print(f'| {row["name"]} | {row["precision"]:.4f} | {row["recall"]:.4f} | {row["f1"]:.4f} | {row["mb_per_s"]:.1f} |')


if __name__ == '__main__':
  main()
