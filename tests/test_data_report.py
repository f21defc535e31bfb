"""The report of a build: its numbers add up, the same corpus has the same, and hostile documents do not get into it."""

import collections
import html.parser
import json
import time
from pathlib import Path

import corpora
import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, pages, report, report_page, selection, shards
from data_pipeline.decontaminate import Decontaminate
from data_pipeline.dedup.exact import Exact
from data_pipeline.dedup.fuzzy import Fuzzy
from data_pipeline.filters.language import Language
from data_pipeline.filters.pii import Redact
from data_pipeline.filters.step import Filters
from data_pipeline.recipe import Recipe
from data_pipeline.sources.chat_files import ChatFiles
from data_pipeline.sources.text_files import TextFiles

HOSTILE = ('</pre></bdi></details><script>alert(1)</script><img src=x onerror="alert(2)"> \' onmouseover=alert(3) '
           '"><style>*{display:none}</style> &lt;b&gt; &#60;i&#62; <!-- --> \u202e\u2066 \x00\x1b \u2028 ]]> javascript:x')
QUESTION = ('Write a function that returns the number of pairs of neighbours in a list whose sum is a prime number, and '
            'explain why it stops for every list that it is given.')


def write_lines(path: Path, records: list[dict]) -> None:
  path.write_text('\n'.join(json.dumps(record) for record in records) + '\n', encoding='utf-8')


def english(i: int, sentences: int = 8) -> str:
  """Plain sentences, different for every i."""
  chance = np.random.default_rng(i)
  pick = lambda *words: words[chance.integers(len(words))]
  return ' '.join(f'The {pick("old", "young", "quiet", "brave", "tall")} {pick("farmer", "teacher", "sailor", "doctor")} '
                  f'{pick("walked", "travelled", "came back")} to the {pick("village", "harbour", "market", "school")} '
                  f'with {chance.integers(2, 10**6)} {pick("books", "horses", "letters", "baskets")} that '
                  f'{pick("nobody", "everybody", "my sister")} had {pick("seen", "wanted", "forgotten")} before.'
                  for _ in range(sentences))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Sources with what each kind of stage leaves out: damaged, foreign, repeated, alike, contaminated, short documents."""
  folder = tmp_path_factory.mktemp('report')
  pages = [{'text': english(i), 'url': f'https://example.org/{i}'} for i in range(40)]
  pages += [{'text': english(1000), 'url': f'https://mirror.example/{i}'} for i in range(9)]
  pages += [{'text': english(2000, 40) + f' The end of part {i}.', 'url': f'https://alike.example/{i}'} for i in range(3)]
  pages += [{'text': f'{english(3000)} {QUESTION} {english(3001)}', 'url': 'https://leak.example/?a=<b>&c="d"'}]
  pages += [{'text': f'{HOSTILE} {english(4000 + i % 2)}', 'url': f'https://evil.example/{HOSTILE}{i}'} for i in range(4)]
  pages += [{'text': 'Short.', 'url': 'https://short.example/'}]
  write_lines(folder / 'web.jsonl', pages)
  (folder / 'files').mkdir()
  for i in range(6):
    text = f'<html><body><main><p>{english(5000 + i)}</p></main></body></html>' if i else '<html><body></body></html>'
    (folder / 'files' / f'{i}.html').write_text(text)
  (folder / 'files' / 'copy.txt').write_text(english(1000))
  (folder / 'files' / 'other.txt').write_text(english(7))
  german = [{'text': f'Der alte Bauer ging mit {i} Pferden zum Markt, und niemand hatte sie vorher gesehen. ' * 3,
             'url': f'https://beispiel.de/{i}'} for i in range(20)]
  write_lines(folder / 'foreign.jsonl', german + [{'text': english(6000), 'url': 'https://beispiel.de/en'}])
  talk = lambda answer: {'messages': [{'role': 'user', 'content': english(7000, 1)},
                                      {'role': 'assistant', 'content': answer}]}
  answers = [*(english(7001 + i, 2) for i in range(6)), '<|endoftext|>']
  write_lines(folder / 'chats.jsonl', [*map(talk, answers), {'text': 'x'}])
  write_lines(folder / 'quiz.jsonl', [{'id': 'quiz/<7>', 'question': QUESTION},
                                      {'id': 'quiz/8', 'question': 'Name all planets of the sun, the largest one first, and '
                                                                   'say how long each takes for one turn around it.'}])
  return folder


def recipe(folder: Path, **changes) -> Recipe:
  sources = (TextFiles(name='web', pattern=f'{folder}/web.jsonl'), TextFiles(name='files', pattern=f'{folder}/files/*'),
             TextFiles(name='foreign', pattern=f'{folder}/foreign.jsonl'),
             ChatFiles(name='chats', pattern=f'{folder}/chats.jsonl'))
  steps = (Filters(rules=(Language(min_score=0.3), Redact())), Exact(), Fuzzy(),
           Decontaminate(against=(f'{folder}/quiz.jsonl',)))
  settings = dict(name='audited', sources=sources, steps=steps, vocab_size=400, seq_lens=(64, 256), validation_fraction=0.2,
                  min_bytes=20)
  return Recipe(**(settings | changes))


@pytest.fixture(scope='module')
def corpus(folder):
  return build.build(recipe(folder), folder / 'corpus', workers=1)


@pytest.fixture(scope='module')
def numbers(corpus):
  return json.loads((corpus / 'report.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def page(corpus):
  return (corpus / 'report.html').read_text(encoding='utf-8')


def stage_of(numbers: dict, name: str) -> dict:
  stage, = (stage for stage in numbers['stages'] if stage['name'] == name)
  return stage


# The numbers.


def test_documents_in_are_documents_kept_and_those_of_all_reasons(numbers):
  assert set(numbers['sources']) == {'web', 'files', 'foreign', 'chats'}
  for name, source in numbers['sources'].items():
    left = stage_of(numbers, 'reading')['sources'][name]['documents']
    gone = 0
    for stage in numbers['stages']:
      mine = stage['sources'][name]
      assert mine['documents'] == left
      removed = sum(of['documents'] for of in mine['removed'].values())
      assert mine['kept'] == mine['documents'] - removed
      assert mine['bytes_kept'] == mine['bytes'] - sum(of['bytes'] for of in mine['removed'].values())
      left, gone = mine['kept'], gone + removed
    kept = source['train']['documents'] + source['validation']['documents']
    assert left == kept == sum(source['lengths']['kept'].values())
    assert stage_of(numbers, 'reading')['sources'][name]['documents'] == kept + gone
    for seq_len in (64, 256):
      in_rows = sum(part['documents'] for part in numbers['rows'] if (part['of'], part['seq_len']) == (name, seq_len))
      assert in_rows + sum(numbers['not_in_rows'].get(str(seq_len), {}).get(name, {}).values()) == kept
  assert list(numbers['not_in_rows']['64']) == ['chats']


def test_the_numbers_are_those_of_the_files(corpus, numbers):
  manifest = shards.read_manifest(corpus)
  for name, source in numbers['sources'].items():
    tables = [pq.read_table(path) for path in sorted(corpus.glob(f'documents/{name}/*'))]
    verdicts = [verdict for path in sorted(corpus.glob(f'selection/{name}/*'))
                for verdict in pq.read_table(path)['verdict'].to_pylist()]
    reading = stage_of(numbers, 'reading')['sources'][name]
    assert reading['kept'] == len(verdicts)
    assert reading['bytes_kept'] == sum(sum(table['bytes'].to_pylist()) for table in tables)
    reasons = collections.Counter(verdict for verdict in verdicts if verdict not in (selection.TRAIN, selection.VALIDATION))
    told = collections.Counter()
    for stage in numbers['stages'][1:]:
      told.update({reason: of['documents'] for reason, of in stage['sources'][name]['removed'].items()})
    assert told == reasons
    for split in (selection.TRAIN, selection.VALIDATION):
      assert source[split]['documents'] == verdicts.count(split)
      parts = [part for part in manifest['sources'] if part == name or part.startswith(f'{name}.')]
      assert source[split]['tokens'] == sum(manifest['sources'][part][split]['tokens'] for part in parts)
    lengths = collections.Counter(str(n.bit_length() - 1) for table in tables for n in table['bytes'].to_pylist())
    assert source['lengths']['read'] == lengths


def test_each_reason_is_there_with_samples(numbers, page):
  removed = {(stage['name'], reason): of for stage in numbers['stages'] for mine in stage['sources'].values()
             for reason, of in mine['removed'].items()}
  expected = {('reading', 'no text'), ('filters', 'language: another'), ('exact', 'duplicate'), ('fuzzy', 'near duplicate'),
              ('contamination', 'contaminated'), ('selection', 'short')}
  assert expected <= set(removed), set(removed)
  for (_, reason), of in removed.items():
    assert 1 <= len(of['samples']) <= min(5, of['documents'])
    assert all(pages.escape(sample['url']) in page for sample in of['samples']) and pages.escape(reason) in page
  assert removed['filters', 'language: another']['documents'] == 20
  assert removed['contamination', 'contaminated']['samples'][0]['url'] == 'https://leak.example/?a=<b>&c="d"'


def test_clusters_are_counted_over_all_sources_and_named(numbers, corpus, folder, monkeypatch):
  clusters = stage_of(numbers, 'exact')['clusters']
  assert clusters['repeats'] == sum(mine['removed'].get('duplicate', {'documents': 0})['documents']
                                    for mine in stage_of(numbers, 'exact')['sources'].values())
  biggest = clusters['biggest'][0]
  assert biggest['documents'] == 10 and len(biggest['left_out']) == 3  # nine of web, one of files
  assert all('mirror.example' in url or url.endswith('copy.txt') for url in [biggest['kept'], *biggest['left_out']])
  assert len({biggest['kept'], *biggest['left_out']}) == 4
  pair, = (one for one in clusters['biggest'] if one['kept'] == 'https://example.org/7')
  assert pair['left_out'] == [f'{folder}/files/other.txt']
  assert clusters['looked_at'] == 1 and sum(clusters['sizes'].values()) == clusters['clusters']
  assert clusters['sizes']['3'] == 1  # of 8 to 15 documents
  assert stage_of(numbers, 'fuzzy')['clusters']['biggest'][0]['documents'] == 3
  monkeypatch.setattr(report, '_REPEATS', 1)  # more than can be held: whole clusters, chosen by chance
  part = stage_of(figures_of(corpus, folder), 'exact')['clusters']
  assert part['looked_at'] < 0.5 and part['clusters'] < clusters['clusters']
  assert all(one in clusters['biggest'] for one in part['biggest'])


def records_of(corpus: Path, steps: list[str]) -> dict:
  """What a build hands to the report."""
  read = lambda pattern: [json.loads(path.read_text()) for path in sorted((corpus / 'build').glob(pattern))]
  sources = sorted(read('documents-*.json'), key=lambda one: ['web', 'files', 'foreign', 'chats'].index(one['source']))
  return {'sources': sources, 'steps': [read(f'{step}-?????.json') for step in steps],
          'selection': read('selection-?????.json'), 'rows': read('rows-64-*.json') + read('rows-256-*.json')}


def figures_of(corpus: Path, folder: Path, times: int = 1) -> dict:
  records = records_of(corpus, ['filters', 'exact', 'fuzzy', 'contamination'])
  for source in records['sources']:
    source['units'] = source['units'] * times
  steps = [step * times for step in records['steps']]
  return report.figures(corpus, recipe(folder), records['sources'], steps, records['selection'] * times, records['rows'])


def test_what_evaluation_sets_have_in_documents_is_named(numbers, page):
  found = stage_of(numbers, 'contamination')
  assert found['hits']['items'] == {'quiz.jsonl': {'quiz/<7>': 1}} and found['facts']['items'] == {'quiz.jsonl': 2}
  hit, = found['hits']['surest']
  assert hit['document'] == 'https://leak.example/?a=<b>&c="d"' and 'prime number' in hit['excerpt'] and hit['score'] >= 0.8
  assert 'quiz/&lt;7&gt;' in page and 'quiz/<7>' not in page


def test_an_alarm_is_for_a_source_that_loses_nearly_all_and_for_no_other(numbers, page):
  alarm, = numbers['alarms']
  assert alarm == {'source': 'foreign', 'stage': 'filters', 'documents': 21, 'lost': 20, 'reason': 'language: another',
                   'of_reason': 20}
  assert 'foreign loses <b>95.2 %</b> of 21 documents at filters' in page


def test_facts_are_added_up_and_parameters_are_shown(numbers, page):
  languages = stage_of(numbers, 'filters')['facts']['languages']
  assert languages['de'] == 20
  assert sum(languages.values()) == sum(mine['documents'] for mine in stage_of(numbers, 'filters')['sources'].values())
  assert '>languages<' in page and 'threshold=0.8' in page and 'Language(' in page


# The page.


class Reader(html.parser.HTMLParser):
  """Tags with their attributes, and the text."""

  def __init__(self, page: str):
    super().__init__()
    self.tags, self.said, self.open = [], [], []
    self.feed(page)

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in ('meta', 'br'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.said.append(data)


def test_hostile_documents_are_text_on_the_page(page):
  reader = Reader(page)
  assert not reader.open  # every tag is closed, in order
  tags = {tag for tag, _ in reader.tags}
  assert tags <= set('html head meta title style body main section article h1 h2 h3 h4 p div span b i u small ul li table '
                     'thead tbody tr th td figure figcaption details summary cite bdi pre code br'.split())
  names = {name for _, attributes in reader.tags for name in attributes}
  assert names <= set('lang charset name content http-equiv class style title role aria-label scope'.split())
  assert sum(tag == 'style' for tag, _ in reader.tags) == 1
  said = ''.join(reader.said)
  assert '<script>alert(1)</script><img src=x onerror="alert(2)">' in said and '&lt;b&gt; &#60;i&#62;' in said
  assert not {'\0', '\x1b', '\u2028'} & set(page)


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it(page):
  reader = Reader(page)
  policy, = (attributes['content'] for _, attributes in reader.tags if attributes.get('http-equiv'))
  assert policy == "default-src 'none'; style-src 'unsafe-inline'"
  assert 'url(' not in page.partition('</style>')[0] and '@import' not in page
  assert '@media (prefers-color-scheme: dark)' in page and 'width=device-width' in page


def test_the_report_depends_on_nothing_but_the_corpus(corpus, folder, page):
  again = build.build(recipe(folder), folder / 'elsewhere', workers=2)
  for name in ('report.json', 'report.html'):
    assert (again / name).read_bytes() == (corpus / name).read_bytes()
    assert str(corpus) not in (corpus / name).read_text()
    assert shards.entry(corpus, corpus / name) in shards.read_manifest(corpus)['files']
  assert report_page.page(figures_of(corpus, folder)) == page


def test_thousands_of_shards_take_seconds(corpus, folder):
  began = time.process_time()
  numbers = figures_of(corpus, folder, times=1000)  # 4000 shards, 5 stages
  page = report_page.page(numbers)
  assert time.process_time() - began < 40
  assert stage_of(numbers, 'reading')['sources']['foreign']['documents'] == 21_000
  assert len(page) < 2 * len((corpus / 'report.html').read_text())


def test_numbers_are_short_and_never_round_to_none_or_all():
  pairs = ((0, 5), (5, 5), (1, 10**9), (10**9 - 1, 10**9), (1, 3), (0, 0))
  assert [pages.percent(*pair) for pair in pairs] == ['0 %', '100 %', '0.01 %', '99.99 %', '33.3 %', '0 %']
  assert [pages.size(n) for n in (0, 999, 1000, 999_700, 1_500_000, 7e15)] == \
    ['0 B', '999 B', '1 kB', '1,000 kB', '1.5 MB', '7,000 TB']


def test_a_corpus_without_steps_and_one_document_has_a_report(tmp_path):
  (tmp_path / 'one.txt').write_text(corpora.made_up_text(0, 200))
  one = Recipe(name='<one>', sources=(TextFiles(name='one', pattern=f'{tmp_path}/one.txt'),), steps=(), vocab_size=300,
               seq_lens=(16,), validation_fraction=0, min_bytes=0)
  one = build.build(one, tmp_path / 'out', workers=1)
  reader = Reader((one / 'report.html').read_text())
  assert not reader.open and '<one>: what became of its documents' in reader.said
