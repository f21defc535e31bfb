"""Filters: every count against plain Python, every rule at its limits, and what they do to a corpus that is built."""

import ast
import dataclasses
import json
import random
import time
from pathlib import Path

import corpora
import judging
import numpy as np
import plain_filters as plain
import pyarrow as pa
import pytest

from data_pipeline import build, verdicts
from data_pipeline.dedup.exact import Exact
from data_pipeline.filters import heuristics, kernels, pii, quality
from data_pipeline.filters.heuristics import C4Lines, C4Pages, Compression, FineWeb, GopherQuality, GopherRepetition
from data_pipeline.filters.language import Language
from data_pipeline.filters.pii import Redact
from data_pipeline.filters.step import Filters, Texts, _View
from data_pipeline.filters.urls import Urls
from data_pipeline.recipe import Recipe
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.text import clean
from data_pipeline.sources.text_files import TextFiles

PROSE = """The harbour lay quiet that morning, and the boats moved only a little with the tide. An old man mended nets on the
steps, as he had done for many years, while two children watched him and asked what each of the knots was for. He told them
that a net is a kind of map: whoever reads it knows where the fish have been. They did not believe him at first.

Later the wind turned to the west. The gulls, which had been sitting on the roofs, rose all at once and went out with it over
the bay. "You see," the old man said, "they have read it too." Nobody answered; but on the next day both of the children came
back with a piece of string, and they wanted to be shown how such a map is begun."""


def judge(rule, *texts: str, urls=None):
  texts = Texts.of([text.encode() for text in texts], urls)
  return rule.judge(texts, np.arange(len(texts.urls)))


def reason(rule, text: str) -> str:
  return judge(rule, text).reasons[0]


def applied(rule, text: str) -> str:
  edits = judge(rule, text).edits.get(0, [])
  return verdicts.edit(text, [{'start': start, 'end': end, 'text': new} for start, end, new in edits])


def strange_texts(n: int) -> list[str]:
  """Few different words, lines and marks, so that all repeats; white space, letters and punctuation of many scripts."""
  chance = random.Random(5)
  texts = ['', ' ', '\n\n \n', 'x', '…', '...', 'a\n' * 50, '漢字。', '\u3000\u2028 a', '# #\n- \n• …']
  pieces = ('the', 'The', 'to', 'be,', '"and"', 'résumé', 'ÉTÉ', 'слово', '漢字', 'かな。', '...', '…', '#', '-', '•', '—',
            '42', "don't", '(x)', '“q.”', '😀', 'javascript', 'Use Cookies', 'x' * 40, '१२', '{', 'ß', '!?', '\u0301')
  spaces = (' ', ' ', ' ', ' ', '  ', '\t', '\u00a0', '\u3000', '\u2009', '\u2028', '\x85', '\u200b', '\n', '\n', '\n\n',
            '\n \n', '\n\n\n')
  for i in range(n):
    some = chance.sample(pieces, chance.randint(2, len(pieces)))
    text = ''.join(chance.choice(some) + chance.choice(spaces) for _ in range(chance.randint(1, 120)))
    if i % 3 == 0:
      text += chance.choice(('\n', '\n\n', ' ')) + text[len(text) // 3:] + text.upper()
    texts.append(text)
  return texts


def as_texts(texts: list[str]):
  texts = Texts.of([text.encode() for text in texts])
  return texts.data, texts.offsets, np.arange(len(texts.urls))


# Counts, against plain Python.

TEXTS = [*strange_texts(400), PROSE, *(corpora.made_up_text(i, 150) for i in range(20))]


def test_words_lines_and_their_lengths_are_those_of_str():
  for text in TEXTS:
    data = np.frombuffer(text.encode(), np.uint8)
    hashes, words, lines = kernels.tables(data, np.array([0, len(data)]), np.arange(1))
    n_words, n_lines = kernels.scan(data, kernels.classes(), hashes, words, lines)
    assert n_words <= len(hashes) and n_lines <= lines.shape[1]
    assert words[kernels.WORD_CHARACTERS, :n_words].tolist() == list(map(len, plain.words(text)))
    assert lines[kernels.LINE_CHARACTERS, :n_lines].tolist() == list(map(len, plain.lines(text)))
    assert lines[kernels.LINE_WORDS, :n_lines].tolist() == [len(line.split()) for line in plain.lines(text)]
    spans = zip(lines[kernels.LINE_START, :n_lines].tolist(), lines[kernels.LINE_END, :n_lines].tolist())
    assert [text.encode()[start:end].decode() for start, end in spans] == plain.lines(text)
    of = {}
    for word, key in zip(map(plain.compared, plain.words(text)), hashes[:n_words].tolist()):
      assert of.setdefault(word, key) == key
    assert len(set(of.values())) == len(of)


def test_counts_of_gopher_are_those_of_plain_python():
  stop_words = GopherQuality().stop_words
  keys = np.array(list(map(kernels.hash_of_word, stop_words)), np.uint64)
  found = kernels.quality(*as_texts(TEXTS), kernels.classes(), keys)
  np.testing.assert_allclose(found, [plain.quality(text, stop_words) for text in TEXTS], rtol=1e-12)


def test_shares_of_repetition_are_those_of_plain_python():
  found = kernels.repetition(*as_texts(TEXTS), kernels.classes())
  np.testing.assert_allclose(found, [plain.repetition(text) for text in TEXTS], rtol=1e-12)
  assert (found[:, :13] > 0).any(axis=0).all()  # every one of them was tried


def test_shares_of_lines_are_those_of_plain_python():
  found = kernels.line_shares(*as_texts(TEXTS), kernels.classes(), kernels.codes('.!?"。'), 12)
  np.testing.assert_allclose(found, [plain.line_shares(text, '.!?"。', 12) for text in TEXTS], rtol=1e-12)


@pytest.mark.parametrize('rule', [C4Lines(), C4Lines(terminal='', min_words=2, max_word_length=30),
                                  C4Lines(terminal='.…"', min_words=0, phrases=())])
def test_lines_are_cut_as_plain_python_cuts_them(rule):
  cut = [applied(rule, text) for text in TEXTS]
  assert cut == [plain.cut_lines(text, rule.terminal, rule.min_words, rule.max_word_length, rule.phrases) for text in TEXTS]
  assert cut != TEXTS


def test_sentences_and_phrases_are_those_of_plain_python():
  phrases = heuristics._packed(('{', 'THE to'))
  sentences, has_phrase = kernels.sentences_and_phrases(*as_texts(TEXTS), kernels.classes(), *phrases)
  assert sentences.tolist() == [plain.sentences(text) for text in TEXTS]
  assert has_phrase.tolist() == ['{' in text or 'the to' in plain.small(text) for text in TEXTS]
  assert 0 < has_phrase.sum() < len(TEXTS)


def test_a_compiled_function_calls_none_of_another_file():
  """Numba caches it until its own file changes, and would go on with the old one of the other file."""
  for path in sorted(Path(build.__file__).parent.rglob('*.py')):
    tree = ast.parse(path.read_text())
    ours = {(name.asname or name.name) for node in tree.body if isinstance(node, ast.ImportFrom)
            and node.module.startswith('data_pipeline') for name in node.names}
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)
                     and any('njit' in ast.unparse(one) for one in node.decorator_list)]:
      assert not ours & {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}, (path.name, function.name)


# Rules.


def test_prose_passes_every_rule():
  for rule in (GopherQuality(), GopherRepetition(), FineWeb(), C4Pages(), Language(), Urls(), Compression()):
    assert reason(rule, PROSE) == '', rule
  assert applied(C4Lines(terminal=''), PROSE) == applied(Redact(), PROSE) == PROSE


@pytest.mark.parametrize('rule, text, why', [
  (GopherQuality(), ' '.join(PROSE.split()[:49]), 'gopher: few words'),
  (GopherQuality(max_words=100), PROSE, 'gopher: many words'),
  (GopherQuality(), 'a of to be ' * 20, 'gopher: short words'),
  (GopherQuality(), 'internationalisations ' * 60, 'gopher: long words'),
  (GopherQuality(), PROSE.replace('the ', '# the # '), 'gopher: hashes'),
  (GopherQuality(), PROSE.replace('the ', 'the… ').replace('and', 'and...').replace('he ', 'he... '), 'gopher: ellipses'),
  (GopherQuality(), '\n'.join(f'• {line}' for line in PROSE.replace('\n', ' ').split('. ')), 'gopher: bullet lines'),
  (GopherQuality(), '...\n'.join(PROSE.split('. ')), 'gopher: ellipsis lines'),
  (GopherQuality(), PROSE + ' 12345' * 40, 'gopher: few letters'),
  (GopherQuality(), 'Der Hafen lag still da und kaum ein Boot regte sich. ' * 6, 'gopher: few stop words'),
  (FineWeb(), PROSE.replace('.', ',').replace('\n', ' ') + '\nno end' * 9, 'fineweb: few lines end in punctuation'),
  (FineWeb(), PROSE + '\nShort one, with an end.' * 40, 'fineweb: short lines'),
  (FineWeb(), PROSE + 3 * ('\n' + PROSE.split('\n')[1]), 'fineweb: duplicate lines'),
  (FineWeb(short_line=5), '\n'.join(f'word{i} next.' for i in range(30)), 'fineweb: many lines'),
  (C4Pages(), PROSE[:200], 'c4: few sentences'),
  (C4Pages(), PROSE + ' Lorem IPSUM dolor.', 'c4: forbidden phrase'),
  (Compression(), PROSE * 100, 'compression: repetitive'),
  (Compression(), ''.join(map(chr, np.random.default_rng(0).integers(33, 127, 20_000))), 'compression: noise'),
  (Language(), 'Der Hafen lag an diesem Morgen still, und die Boote bewegten sich kaum mit der Flut.', 'language: another'),
  (Language(), '0x1f 0x2e 77 -- == ;; 12 [] 9', 'language: unclear')])
def test_a_rule_leaves_out_what_it_is_for_and_says_why(rule, text, why):
  assert reason(rule, text) == why
  if isinstance(rule, (GopherQuality, FineWeb)):  # and only the one limit does
    limits = [field.name for field in dataclasses.fields(rule) if field.name.startswith(('min_', 'max_'))]
    assert reason(dataclasses.replace(rule, **dict.fromkeys(limits)), text) == ''


def test_each_share_of_repetition_has_its_own_limit():
  names = [field.name for field in dataclasses.fields(GopherRepetition)]
  text = PROSE + '\n\n' + PROSE.replace('nets', 'sails')
  shares = kernels.repetition(*as_texts([text]), kernels.classes())[0]
  none = dict.fromkeys(names)
  for name, share in zip(names, shares.tolist()):
    assert share > 0, name
    assert reason(GopherRepetition(**none | {name: share}), text) == ''
    assert reason(GopherRepetition(**none | {name: share - 1e-9}), text).startswith('repetition: ')


@pytest.mark.parametrize('text, language', [
  (PROSE, 'en'), ('Das Boot liegt im Hafen, und niemand weiß, wann es wieder ausläuft.', 'de'),
  ('Le bateau est au port et personne ne sait quand il repartira.', 'fr'),
  ('El barco está en el puerto y nadie sabe cuándo volverá a salir.', 'es'),
  ('船停在港口，没有人知道它什么时候再出海。', 'zh'),
  ('Лодка стоит в гавани, и никто не знает, когда она снова выйдет в море.', 'ru')])
def test_languages_are_told_apart(text, language):
  found = judge(Language(keep=()), text, text[:10] + '\n' + text)
  assert found.columns['language'] == [language] * 2 and found.facts == {'languages': {language: 2}}


def test_pieces_of_all_of_a_long_text_decide_its_language():
  german = 'Das Boot liegt im Hafen, und niemand weiß, wann es wieder ausläuft. ' * 100
  contents = '1.2 ........ 17\n' * 60
  assert judge(Language(), contents + PROSE * 5, PROSE * 2 + german).columns['language'] == ['en', 'de']
  assert judge(Language(), '漢é' * 5000, 'x' + '漢' * 3001).columns['language'][1] == 'zh'  # cut between characters


def test_addresses_are_blocked_by_domain_and_by_word(tmp_path):
  (tmp_path / 'domains').write_text('# a list\nBad.example  # why\n\nworse.test\n')
  rule = Urls(domains=(str(tmp_path / 'domains'),), words=('casino',))
  urls = ['http://bad.example/a', 'https://www.BAD.example:8080/', 'http://notbad.example', 'http://x.worse.test',
          'casino.txt', 'http://a.org/Best-Casino/1', 'http://a.org/casinos', 'http://[bad', '', 'bad.example']
  found = judge(rule, *['text'] * len(urls), urls=urls)
  domain, word = 'url: blocked domain', 'url: blocked word'
  assert found.reasons.tolist() == [domain, domain, '', domain, word, word, '', '', '', '']
  state = rule.state()
  (tmp_path / 'domains').write_text('worse.test\n')
  assert rule.state() != state and judge(rule, 'text', urls=urls[:1]).reasons.tolist() == ['']
  with pytest.raises(ValueError, match='no/such.*cannot be read'):
    Urls(word_lists=('no/such',)).state()


# Redaction. No address here is one that anybody has: reserved domains, and numbers made from their checksums.

PERSONAL = {
  'email': ['ann@example.org', 'a.b+c-d@mail.example.co.uk', 'O_o%x@x1.example', 'müller@straße.example'],
  'ip': ['93.184.216.34', '151.101.193.140', '2606:4700:4700::1111', '2a00:1450:4001:82f:0:0:0:200e', '2600::'],
  'phone': ['+49 30 1234567', '+1 (212) 555-0123', '+442079460958', '(212) 555-0123', '212-555-0123', '212.555.0123'],
  'card': ['4111 1111 1111 1111', '4111111111111111', '5555-5555-5555-4444', '3782 822463 10005', '378282246310005'],
  'iban': ['DE89 3704 0044 0532 0130 00', 'GB29NWBK60161331926819', 'FR14 2004 1010 0505 0001 3M02 606']}
HARMLESS = ['@app.route', 'x @ y.org', 'a@localhost', '10.0.0.12', '192.168.100.200', '127.000.000.001', '1.2.3.4',
            '8.14.5.12', 'v151.101.193.140', '151.101.193.140.7', '999.101.193.140', '12:34:56', 'std::vector', '::1',
            '2001:db8::1', 'fe80::1:2', '2024-01-02', '1234567890', '555 1234', '212-5550-123',
            '4111 1111 1111 1112', '4111111111111112',
            '0.4111111111111111', '1234 5678 9012 3452', 'DE88 3704 0044 0532 0130 00', 'DE893704004405320130001',
            'ABCD1234EFGH5678', '978-3-16-148410-0', '1+1 2+2 3+3 4+4']


@pytest.mark.parametrize('kind, one', [(kind, one) for kind, some in PERSONAL.items() for one in some])
def test_what_is_personal_is_replaced_wherever_it_stands(kind, one):
  around = (('', ''), ('see ', ' now'), ('(', ')'), ('“', '”'), ('é\n', '\né'), ('', '. And'), ('to: ', ', or'))
  for before, after in around:
    assert applied(Redact(), f'{before}{one}{after}') == f'{before}[{kind}]{after}'
  assert applied(Redact(kinds=tuple({*pii.KINDS} - {kind})), f'see {one} now') == f'see {one} now'


@pytest.mark.parametrize('text', HARMLESS)
def test_what_looks_like_it_stays(text):
  assert applied(Redact(), f'see {text}') == f'see {text}' and applied(Redact(), text) == text


def test_places_to_look_at_are_all_places():
  """The whole text searched for every form gives the same as the places that one pass over its bytes finds."""
  chance, texts = random.Random(3), []
  pieces = [*(one for some in PERSONAL.values() for one in some), *HARMLESS, *'é漢“(+:7.,@', 'text']
  for _ in range(1500):
    some = chance.choices(pieces, k=chance.randint(1, 12))
    texts.append(''.join(one + chance.choice(('', ' ', ' ', ' ', '\n', ', ')) for one in some))
  assert [applied(Redact(), text) for text in texts] == [plain.redacted(text) for text in texts]


def test_checksums_are_those_of_the_standards():
  assert pii.luhn('79927398713') and not any(pii.luhn(f'7992739871{d}') for d in '012456789')
  assert [str(n) for n in range(100) if pii.checks(f'GB{n:02d}WEST12345698765432')] == ['82']


# The step: edits of many rules refer to the text on disk, and each rule sees what those before have left.


def test_edits_one_after_the_other_come_to_the_same_as_all_at_once():
  chance = random.Random(7)
  for _ in range(300):
    text = ''.join(chance.choice('ab é漢😀\n') for _ in range(chance.randint(0, 40)))
    view = _View(pa.RecordBatch.from_pydict({'text': ['other', text], 'url': ['', '']}), [])
    for _ in range(chance.randint(1, 4)):
      now = view.texts.bytes(1).decode()
      inside = {i + k for i in range(len(now)) if now.startswith('[x]', i) for k in (1, 2)}  # a placeholder goes as a whole
      marks = sorted({chance.randint(0, len(now)) for _ in range(4)} - inside)
      edits = [(len(now[:a].encode()), len(now[:b].encode()), chance.choice(('', '', '[x]')))
               for a, b in zip(marks[::2], marks[1::2])]
      view.edit({1: edits})
      expected = now
      for start, end, new in reversed(edits):
        expected = (expected.encode()[:start] + new.encode() + expected.encode()[end:]).decode()
      assert view.texts.bytes(1).decode() == expected
    assert verdicts.edit(text, view.edits.get(1, [])) == view.texts.bytes(1).decode()
    assert view.texts.bytes(0) == b'other'


PAGES = 'A page about nets, and what the boats that come in have to do with it. Write to ann{i}@example.org today.'
RULES = (Urls(words=('blocked',)), GopherQuality(min_words=10), C4Lines(terminal=''), FineWeb(max_lines_a_word=None),
         Redact())


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """Files, some of which each rule is against."""
  folder = tmp_path_factory.mktemp('pages') / 'files'
  folder.mkdir()
  for i in range(60):
    text = f'{PROSE}\n\nWe use cookies here.\n\n{PAGES.format(i=i)} Number {i}.'
    if i % 10 == 3:
      text = f'too short {i}'
    if i % 10 == 4:
      text = PROSE + f'\nand this one goes on without an end {i}' * 90
    (folder / f'{"blocked" if i % 10 == 5 else "page"}-{i:02d}.txt').write_text(text)
  return folder


def recipe(pages, *steps, **changes):
  settings = dict(name='filtered', sources=(TextFiles(name='web', pattern=f'{pages}/*.txt'),), steps=steps, vocab_size=300,
                  seq_lens=(64,), validation_fraction=0.1, min_bytes=5)
  return Recipe(**(settings | changes))


def test_a_build_filters_counts_and_edits_the_same_with_any_number_of_workers(pages, tmp_path):
  steps = (Filters(rules=RULES), Exact())
  one = build.build(recipe(pages, *steps), tmp_path / 'one', workers=1)
  two = build.build(recipe(pages, *steps), tmp_path / 'two', workers=2)
  assert corpora.files_of(one) == corpora.files_of(two)
  record = json.loads((one / 'build' / 'filters-00000.json').read_text())
  removed = {why: of['documents'] for why, of in record['removed'].items()}
  assert removed == {'url: blocked word': 6, 'gopher: few words': 6, 'fineweb: few lines end in punctuation': 6}
  assert record['documents'] == 60 and record['facts'] == {
    'c4: lines cut': 42, 'c4: bytes cut': 42 * len('We use cookies here.\n\n'), 'redacted': {'email': 42}}
  kept = [row for row in judging.trained(one) if row['reason'] == '']
  assert len(kept) == 42
  for row in kept:
    number = row['trained'].rpartition('Number ')[2]
    assert row['trained'] == f'{PROSE}\n\n{PAGES.replace("ann{i}@example.org", "[email]")} Number {number}'


def test_a_later_step_sees_what_an_earlier_one_has_left(pages, tmp_path):
  steps = (Filters(name='lines', rules=(C4Lines(terminal='', phrases=('cookies',)), Redact())),
           Filters(name='after', rules=(C4Pages(min_sentences=0, phrases=('[email]',)),)),
           Filters(name='more', rules=(C4Lines(terminal='', min_words=12, phrases=()),)))
  corpus = build.build(recipe(pages, *steps), tmp_path / 'corpus', workers=1)
  records = [json.loads((corpus / 'build' / f'{name}-00000.json').read_text()) for name in ('lines', 'after', 'more')]
  assert {why: of['documents'] for why, of in records[1]['removed'].items()} == {'c4: forbidden phrase': 48}
  left = [row for row in judging.trained(corpus) if row['reason'] == '']
  assert len(left) == 12 and all(row['trained'] == plain.cut_lines(row['text'], '', 12, 1000, ()) for row in left)


def test_a_line_that_begins_with_what_an_earlier_step_replaced_is_cut_with_it(tmp_path):
  (tmp_path / 'page.txt').write_text('ann@example.org\n' + PROSE)
  steps = (Filters(name='first', rules=(Redact(),)), Filters(name='then', rules=(C4Lines(terminal=''),)))
  corpus = build.build(recipe(tmp_path, *steps), tmp_path / 'corpus', workers=1)
  assert judging.trained(corpus)[0]['trained'] == PROSE


def test_a_changed_list_or_limit_judges_again_and_nothing_else_does(pages, tmp_path, capsys):
  (tmp_path / 'words').write_text('nothing\n')
  of_words = lambda: recipe(pages, Filters(rules=(Urls(word_lists=(str(tmp_path / 'words'),)),)))
  corpus = build.build(of_words(), tmp_path / 'corpus', workers=1)
  build.build(of_words(), tmp_path / 'corpus', workers=1)
  assert 'nothing to do' in capsys.readouterr().err
  (tmp_path / 'words').write_text('blocked\n')
  build.build(of_words(), tmp_path / 'corpus', workers=1)
  record = json.loads((corpus / 'build' / 'filters-00000.json').read_text())
  assert record['removed']['url: blocked word']['documents'] == 6


# Input that is meant to hurt.


HOSTILE = ('@', 'a@', ':', 'ab:', '+1', '1 ', '(', 'DE12', 'x', '漢', '\n', '# ', '…', '1.', 'ha ', '\u0301', 'a\n', '4',
           'A1 ', 'a.', '4111 ')


@pytest.mark.parametrize('rule', [GopherQuality(), GopherRepetition(), FineWeb(), C4Lines(), C4Pages(), Compression(),
                                  Language(), Urls(), Redact()], ids=lambda rule: type(rule).__name__)
def test_no_text_takes_long_or_breaks_a_rule(rule):
  judge(rule, PROSE)  # compiles
  for text in (*(one * 60_000 for one in HOSTILE), 'a.' * 60_000 + '@' + 'b.' * 60_000):
    started = time.process_time()
    judge(rule, text, urls=[text[:5000]])
    assert time.process_time() - started < 2, text[:20]


# Real text, of packages that are fetched by name.


def pages_of(package: str, pages: str, folder: Path) -> list[tuple[str, str]]:
  """(path in the package, text) of its HTML pages that have a paragraph of text."""
  source = DebianPackage(name=package, pages=pages)
  unit, = source.fetch(folder)
  found = [(raw.url, clean(source.extract(raw)[0])) for raw in source.read(unit)]
  return [(url, text) for url, text in found if len(text) > 500]


@pytest.mark.slow
def test_languages_of_a_manual_that_is_there_in_nineteen(tmp_path):
  """Pages that are not translated are in English, whatever their folder says."""
  pages = pages_of('installation-guide-amd64', '*/*.html', tmp_path)
  labels = [url.split('/')[-2].partition('_')[0] for url, _ in pages]
  found = judge(Language(keep=(), min_score=0), *(text for _, text in pages)).columns['language']
  assert len(set(labels)) > 15
  right = {label: np.mean([f in (label, 'en') for f, l in zip(found, labels) if l == label]) for label in set(labels)}
  print(right, 'in English:', np.mean([f == 'en' for f, l in zip(found, labels) if l != 'en']))
  assert min(right.values()) > 0.98, right


@pytest.mark.slow
def test_essays_pass_and_are_told_from_a_manual(tmp_path):
  essays, manual = (pages_of(name, '*/html/*.html', tmp_path) for name in ('anarchism', 'postgresql-doc-15'))
  texts = [text for _, text in essays]
  for rule in (GopherQuality(), GopherRepetition(), FineWeb(), C4Pages(phrases=('lorem ipsum',)), Compression(), Language()):
    assert np.mean(judge(rule, *texts).reasons == '') > 0.95, rule
  for name, some in (('essays', texts), ('manual', [text for _, text in manual])):
    pieces = [text[i:i + 3000] for text in some for i in range(0, len(text), 3000)]
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps({'text': piece}) + '\n' for piece in pieces))
  found = quality.train([f'{tmp_path}/essays.jsonl'], [f'{tmp_path}/manual.jsonl'], tmp_path / 'model.npz')
  print(found)
  assert found['accuracy'] > 0.98 and min(found['held_out']) > 300
