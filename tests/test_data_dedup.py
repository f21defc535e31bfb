"""Near duplicates and repeated passages: what goes has its like among what stays, and nothing else goes."""

import collections
import itertools
import json
import random
import re
import unicodedata
from pathlib import Path

import corpora
import judging
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from data_pipeline import build, verdicts, words
from data_pipeline.decontaminate import CONTAMINATED, Decontaminate
from data_pipeline.dedup import fuzzy, substring
from data_pipeline.dedup.exact import Exact
from data_pipeline.dedup.fuzzy import Fuzzy
from data_pipeline.dedup.substring import Substrings
from data_pipeline.recipe import Input
from data_pipeline.shards import read_manifest
from data_pipeline.sources.debian import DebianPackage
from data_pipeline.sources.text import clean

# Words.

GAPS = r'\x00-/:-@\[-`{-\x7f\x80-\xbf\u2000-\u2bff\u3000-\u303f\U0001f000-\U0001ffff'
ALONE = (r'\u3040-\u9fff\u0e00-\u0eff\u1000-\u10bf\u1780-\u17ff\U00020000-\U0003ffff')
WORD = re.compile(f'[{ALONE}]|[^{GAPS}{ALONE}]+')


def slow_words(text: str) -> list[str]:
  return WORD.findall(unicodedata.normalize('NFKC', text).lower())


def texts_of_many_scripts(n: int) -> list[str]:
  chance = random.Random(7)
  letters = ['abcXYZ019', ' _.,-\n\t"\\', 'éßÖñ', 'Ωжא', '中文字かナ', '한국', 'ไทยລາວ', '“”—…•→', '😀🚀', '𠀀𝐀', 'ﬁＡ①',
             '\u00a0\u3000。']
  return [''.join(chance.choice(chance.choice(letters)) for _ in range(chance.randint(0, 60))) for _ in range(n)]


def test_words_are_those_of_a_slow_reference_in_any_script():
  texts = texts_of_many_scripts(3000)
  normal = words.normal(pa.array(texts))
  hashes, first = words.hashes(normal)
  meaning = {}
  for i, text in enumerate(texts):
    expected, data = slow_words(text), normal[i].as_py().encode()
    assert [data[a:b].decode() for a, b in words.spans(data)] == expected, text
    for one, number in zip(expected, hashes[first[i]:first[i + 1]].tolist(), strict=True):
      assert meaning.setdefault(number, one) == one
  assert len(set(meaning.values())) == len(meaning) > 1000  # a hash a word, a word a hash


@pytest.mark.parametrize('n', [1, 3, 5])
def test_ngrams_are_the_same_where_the_words_are(n):
  texts = texts_of_many_scripts(500) + ['one two', 'a b c d e f', '', '?!']
  texts += [text.upper() for text in texts if text.isascii()]
  grams, first = words.ngrams(words.normal(pa.array(texts)).slice(0), n)
  assert (words.ngrams(words.normal(pa.array(['x', *texts])).slice(1), n)[0] == grams).all()  # a slice of a column
  meaning = {}
  for i, text in enumerate(texts):
    found = slow_words(text)
    expected = [tuple(found[j:j + n]) for j in range(max(1, len(found) - n + 1))] if found else []
    for gram, number in zip(expected, grams[first[i]:first[i + 1]].tolist(), strict=True):
      assert meaning.setdefault(number, gram) == gram
  assert len(set(meaning.values())) == len(meaning)


# Near duplicates.

VOCABULARY = [f'w{i}' for i in range(3000)]


def made_up(n_families: int = 100, seed: int = 0) -> list[dict]:
  """Families of texts that differ in a few words, some more, some less; dates and lengths differ as well."""
  chance, found = random.Random(seed), []
  for _ in range(n_families):
    first = chance.choices(VOCABULARY, k=chance.randint(30, 300))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
      mine = list(first)
      for _ in range(chance.randint(0, 1 + len(first) // 25)):
        mine[chance.randrange(len(mine))] = chance.choice(VOCABULARY)
      del mine[len(mine) - chance.choice((0, 0, 5)):]
      found.append({'text': ' '.join(mine), 'date': chance.choice(('', '2021', '2023-04-05', '2023-04-06'))})
  found += [{'text': ''}, {'text': '…'}, {'text': 'too short'}, {'text': 'Too  short!'}]
  chance.shuffle(found)
  return found


def likeness(texts: list[str], n: int) -> np.ndarray:
  """[texts, texts] Jaccard similarities of the sets of n-grams of slow_words: all pairs, without any hash."""
  number, rows = {}, []
  for text in texts:
    found = slow_words(text)
    grams = {tuple(found[j:j + n]) for j in range(max(1, len(found) - n + 1))} if found else set()
    rows.append([number.setdefault(gram, len(number)) for gram in grams])
  lengths = np.array([len(row) for row in rows])
  ends = np.cumsum([0, *lengths])
  matrix = scipy.sparse.csr_array((np.ones(ends[-1], np.int32), np.concatenate(rows).astype(int), ends))
  shared = (matrix @ matrix.T).toarray()
  return shared / np.maximum(lengths[:, None] + lengths - shared, 1)


def greedy(documents: list[dict], alike: np.ndarray, threshold: float) -> set[int]:
  """Who goes: from the best to the worst, whoever is like one that is kept."""
  ids = [judging.id_of(one['text']) for one in documents]
  newest = [-int(one.get('date', '').replace('-', '').ljust(8, '0')) for one in documents]
  order = sorted(range(len(documents)), key=lambda i: (newest[i], -len(documents[i]['text'].encode()), ids[i], i))
  kept, gone = [], set()
  for i in order:
    if any(alike[i, j] >= threshold for j in kept):
      gone.add(i)
    else:
      kept.append(i)
  return gone


def split(documents: list[dict], n: int) -> list[list[dict]]:
  bounds = [len(documents) * i // n for i in range(n + 1)]
  return [documents[a:b] for a, b in itertools.pairwise(bounds)]


def judged(root: Path, shards_: list, step, workers: int = 1) -> tuple[list[str], list]:
  """(reasons of all documents in order, tables a shard)."""
  records, after = judging.judge(root, step, shards_, workers)
  tables = [judging.table(root, shard) for shard in after]
  return sum((table['reason'].to_pylist() for table in tables), []), tables


@pytest.mark.parametrize(('threshold', 'ngram'), [(0.8, 5), (0.6, 3)])
def test_what_goes_is_what_an_exhaustive_search_would_let_go(tmp_path, threshold, ngram):
  documents = made_up()
  alike = likeness([one['text'] for one in documents], ngram)
  expected = greedy(documents, alike, threshold)
  assert len(expected) > 40
  reasons, tables = judged(tmp_path, judging.write(tmp_path, split(documents, 3)), Fuzzy(threshold=threshold, ngram=ngram))
  assert {i for i, reason in enumerate(reasons) if reason} == expected and set(reasons) == {'', fuzzy.NEAR}
  first = np.cumsum([0, *map(len, tables)])
  column = lambda name: sum((table[name].to_pylist() for table in tables), [])
  for i, (of, jaccard) in enumerate(zip(column('of'), column('jaccard'))):
    if reasons[i]:
      shard, row = map(int, of.split(':'))
      kept = first[shard] + row
      assert not reasons[kept] and jaccard == pytest.approx(alike[i, kept], abs=1e-6) and jaccard >= threshold
    else:
      assert of == '' and jaccard is None


def test_the_verdicts_do_not_depend_on_shards_workers_or_partitions(tmp_path, monkeypatch):
  documents = made_up(seed=1)
  once = judged(tmp_path / 'a', judging.write(tmp_path / 'a', split(documents, 1)), Fuzzy())[0]
  assert fuzzy.NEAR in once
  assert judged(tmp_path / 'b', judging.write(tmp_path / 'b', split(documents, 7)), Fuzzy(), workers=2)[0] == once
  files = {path.name: path.read_bytes() for path in tmp_path.glob('b/verdicts/fuzzy/web/*')}
  for name, value in (('_BANDS_A_PARTITION', 200), ('_PAIRS_AT_ONCE', 10), ('_EDGES_A_SAMPLE', 3)):
    monkeypatch.setattr(fuzzy, name, value)
  assert judged(tmp_path / 'c', judging.write(tmp_path / 'c', split(documents, 7)), Fuzzy())[0] == once
  assert files == {path.name: path.read_bytes() for path in tmp_path.glob('c/verdicts/fuzzy/web/*')}
  assert len(list(tmp_path.glob('c/build/steps/fuzzy/pairs-*'))) >= 20


def test_a_finished_step_needs_nothing_that_it_made_on_the_way(tmp_path):
  of = judging.write(tmp_path, split(made_up(20), 2))
  for step in (Exact(), Fuzzy(), Substrings()):
    first, _ = judging.judge(tmp_path, step, of)
    for path in (tmp_path / 'build/steps').rglob('*.npy'):
      path.unlink()
    assert judging.judge(tmp_path, step, of)[0] == first
    assert not list((tmp_path / 'build/steps').rglob('*.npy'))


def test_a_chain_of_likenesses_does_not_empty_a_source(tmp_path):
  """Each text is like its neighbours, and only to them: every second one or so stays."""
  chance = random.Random(0)
  stream = chance.choices(VOCABULARY, k=3000)
  documents = [{'text': ' '.join(stream[12 * i:12 * i + 200]), 'date': f'2020-01-{1 + i % 28:02d}'} for i in range(200)]
  alike = likeness([one['text'] for one in documents], 5)
  assert (np.diag(alike, 1) > 0.8).all() and (np.diag(alike, 2) < 0.8).all()
  reasons, _ = judged(tmp_path, judging.write(tmp_path, split(documents, 2)), Fuzzy())
  kept = [i for i, reason in enumerate(reasons) if not reason]
  assert 67 <= len(kept) <= 100 and max(np.diff(kept)) <= 3


def test_texts_of_one_template_are_told_apart_in_linear_time(tmp_path):
  """Half of each is the same, so buckets are large; the copies among them are found, and pairs do not grow as squares."""
  chance = random.Random(0)
  template, n = chance.choices(VOCABULARY, k=300), 1200
  documents = [{'text': ' '.join(template + chance.choices(VOCABULARY, k=100))} for _ in range(n)]
  copies = [{'text': one['text'] + ' and five words more here'} for one in documents[::40]]
  of = judging.write(tmp_path, split(documents + copies, 2))
  records, after = judging.judge(tmp_path, Fuzzy(), of)
  reasons = sum((judging.table(tmp_path, shard)['reason'].to_pylist() for shard in after), [])
  assert {i for i, reason in enumerate(reasons) if reason} == set(range(0, n, 40))  # the longer of two stays
  assert sum(record['facts']['pairs_compared'] for record in records) < 12 * n < n * n // 50


@pytest.mark.parametrize('size', [250, 2000])
def test_in_a_bucket_of_any_size_those_that_agree_are_paired_wherever_they_are(size):
  """A fifth of its members are copies of one 99 before; the last tenth, of the first member."""
  signatures = np.random.default_rng(0).integers(0, 256, (size, 126), np.uint8)
  expected = {(i, i - 99) for i in range(100, size - size // 10, 5)} | {(i, 0) for i in range(size - size // 10, size)}
  for i, other in sorted(expected):
    signatures[i] = signatures[other]
  pairs = fuzzy._pairs(np.zeros(size, np.uint64), signatures, np.arange(size), 85, 117, 6)
  assert expected <= {tuple(pair) for pair in pairs.tolist()} and len(pairs) <= 22 * 16 * size
  assert all((signatures[i] == signatures[other]).all() and other < i for i, other in pairs)


def test_ten_thousand_equal_documents_make_ten_thousand_pairs(tmp_path):
  of = judging.write(tmp_path, [[{'text': 'the same words over and over again', 'url': str(i)} for i in range(10_000)]])
  record, = judging.judge(tmp_path, Fuzzy(), of)[0]
  assert record['removed'][fuzzy.NEAR]['documents'] == record['facts']['pairs_compared'] == 9999
  assert record['facts']['near_copies'] == {'8192 to 16383': 1}


def test_signatures_estimate_the_likeness_of_sets():
  """Without bias, and with the deviation of independent hashes: sqrt(J (1 - J) / n)."""
  chance, errors = np.random.default_rng(0), []
  a, b = fuzzy._permutations(128)
  for likeness_ in (0.2, 0.5, 0.8, 0.95):
    found = []
    for _ in range(200):
      union = chance.integers(0, 2**64, 400, np.uint64)
      shared = int(400 * likeness_)
      half = (400 - shared) // 2
      sets = np.concatenate([union[:shared + half], union[:shared], union[shared + half:]])
      minima = fuzzy._minima(sets, np.array([0, shared + half, len(sets)]), a, b)
      found.append((minima[0] == minima[1]).mean())
    deviation = (likeness_ * (1 - likeness_) / 128)**0.5
    errors.append((np.mean(found) - likeness_) / (deviation / 200**0.5))
    assert 0.8 * deviation < np.std(found) < 1.25 * deviation
  assert np.abs(errors).max() < 4


def test_bands_are_as_long_as_the_recall_allows():
  for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
    bands, rows = Fuzzy(threshold=threshold).bands
    assert 1 - (1 - threshold**rows)**bands >= 0.99 and bands * rows <= 128
    assert rows == 16 or 1 - (1 - threshold**(rows + 1))**(128 // (rows + 1)) < 0.99
  for wrong in ({'threshold': 0.1}, {'threshold': 1.1}, {'ngram': 0}, {'hashes': 8}):
    with pytest.raises(ValueError, match='fuzzy: '):
      Fuzzy(**wrong)


def test_of_equal_texts_the_newest_stays_and_near_duplicates_of_what_is_gone_stay_too(tmp_path):
  text = ' '.join(VOCABULARY[:100])
  of = judging.write(tmp_path, [[{'text': text, 'date': '2020'}, {'text': 'x'}], [{'text': text, 'date': '2022-01-01'}],
                                [{'text': text + ' more', 'date': '2019'}]])
  _, after = judging.judge(tmp_path, Exact(), of)
  assert [judging.table(tmp_path, shard)['reason'].to_pylist() for shard in after] == [['duplicate', ''], [''], ['']]
  _, after = judging.judge(tmp_path, Fuzzy(), after)
  assert [judging.table(tmp_path, shard)['reason'].to_pylist() for shard in after] == [['duplicate', ''], [''], [fuzzy.NEAR]]
  assert judging.table(tmp_path, after[2])['of'].to_pylist() == ['1:0']


# Repeated passages.

L = 80


def prose(chance: random.Random, n_bytes: int) -> str:
  """Words, most of them of more than a byte a letter here and there."""
  found, size = [], 0
  while size < n_bytes:
    found.append(chance.choice(('día', 'gähn', '語', 'naïve', '')) + str(chance.random())[2:chance.randint(4, 12)])
    found.append(chance.choice('\n    '))
    size += len(found[-2].encode()) + 1
  return ''.join(found)


def with_repeats(seed: int, n: int = 40) -> list[str]:
  """Texts in which some passages occur several times: in one text, in several, overlapping, one after the other."""
  chance = random.Random(seed)
  passages = [prose(chance, chance.choice((40, 100, 100, 400))) for _ in range(12)]
  passages += [passages[0] + passages[5], passages[5] + passages[6], passages[9][50:], 'la la ' * 60]
  one = lambda: prose(chance, chance.randint(0, 150)) + chance.choice([*passages, ''])
  return [''.join(one() for _ in range(chance.randint(0, 6))) for _ in range(n)]


def cut(root: Path, texts: list[str], n_shards: int = 1, **settings) -> tuple[list[str], list[list[dict]]]:
  """(texts as they are trained on, edits) after `Substrings`."""
  of = judging.write(root, split([{'text': text} for text in texts], n_shards))
  _, after = judging.judge(root, Substrings(min_bytes=L, **settings), of)
  edits = sum((judging.table(root, shard)['edits'].to_pylist() for shard in after), [])
  return [text for shard in after for _, some in verdicts.edited(root, shard) for text in some], [one or [] for one in edits]


def windows(texts: list[str]) -> collections.Counter:
  """How often each passage of L bytes occurs."""
  data = [text.encode() for text in texts]
  return collections.Counter(one[i:i + L] for one in data for i in range(len(one) - L + 1))


@pytest.mark.parametrize('seed', range(4))
def test_each_passage_that_was_repeated_is_still_there_and_hardly_twice(tmp_path, seed):
  texts = with_repeats(seed)
  after, edits = cut(tmp_path, texts, n_shards=3)
  before, left = windows(texts), windows(after)
  repeated = {window for window, n in before.items() if n > 1}
  assert len(repeated) > 500 and sum(map(len, edits)) > 20
  assert repeated <= left.keys()  # the first place of each is whole
  extra = lambda counts: sum(counts[window] - 1 for window in repeated)
  assert extra(left) < 0.1 * extra(before)  # some are left where a cut would be within a word or a first place
  for text, of_text in zip(texts, edits):
    data = text.encode()
    for one in of_text:
      assert one['end'] - one['start'] >= 64 and one['text'] == ''
      data[:one['start']].decode(), data[one['start']:one['end']].decode()  # between characters
      covered = set().union(*(range(i, i + L) for i in range(one['start'] - L, one['end'])
                              if i >= 0 and before[data[i:i + L]] > 1))
      assert covered >= set(range(one['start'], one['end']))  # only what is repeated is cut


def test_without_repeats_nothing_is_cut_and_what_is_shorter_stays(tmp_path):
  chance = random.Random(0)
  shared = prose(chance, 200).encode()[:L - 1].decode(errors='ignore')
  texts = [prose(chance, 300) + chr(97 + i) + shared + chr(97 + i) + prose(chance, 300) for i in range(20)]
  assert cut(tmp_path, texts) == (texts, [[]] * 20)


def test_repeats_do_not_cross_the_end_of_a_document(tmp_path):
  """Two documents that follow one another, twice: their ends and beginnings are no passage, however often they meet."""
  a, b = 'a' + 'bc ' * 13, 'x' + 'yz ' * 13
  assert cut(tmp_path, [a, b, 'between', a, b]) == ([a, b, 'between', a, b], [[]] * 5)


def test_groups_are_of_bounded_size_and_of_whole_documents(tmp_path):
  chance = random.Random(0)
  passage = prose(chance, 400)
  texts = [prose(chance, 100) + passage for _ in range(12)]
  after, edits = cut(tmp_path / 'a', texts, n_shards=2, group_bytes=2000)  # less than a shard
  n_groups = len(list((tmp_path / 'a/build/steps/substrings').glob('found-*')))
  assert n_groups >= 4 and sum(not one for one in edits) == n_groups
  assert cut(tmp_path / 'b', texts, n_shards=6, group_bytes=1 << 20)[1] == cut(tmp_path / 'c', texts, group_bytes=1 << 20)[1]
  for wrong in ({'min_bytes': 10}, {'group_bytes': 1 << 31}):
    with pytest.raises(ValueError, match='substrings: '):
      Substrings(**wrong)


def test_what_was_cut_or_left_out_before_is_no_first_place_and_conversations_stay_whole(tmp_path):
  chance = random.Random(0)
  passage = prose(chance, 300).strip()
  talk = json.dumps({'messages': [{'role': 'user', 'content': passage}]}, ensure_ascii=False)
  texts = [passage + ' one', passage + ' two', passage + ' three', passage + ' four', talk, talk]
  of, = judging.write(tmp_path, [texts])
  edits = pa.array([None, [{'start': 20, 'end': len(passage.encode()) - 20, 'text': ' '}], *[None] * 4], verdicts.EDITS)
  record = verdicts.write(tmp_path, 'before', 'key', 'before', of, {0: 'bad'}, {'edits': edits})
  _, (after,) = judging.judge(tmp_path, Substrings(min_bytes=L), [of.judged(record)])
  left = [text for _, some in verdicts.edited(tmp_path, after) for text in some]
  assert len(left[0].encode()) == 45 and left[1] == texts[2] and left[2].strip() == 'four' and left[3:] == [talk] * 2


def test_cuts_lie_between_words_where_there_are_blanks():
  text = b'the dogs\nboilerplate here and now\nfishes'
  for start, end, expected in ((7, 37, b'boilerplate here and now'), (9, len(text), b'boilerplate here and now\nfishes'),
                               (0, 9, b'the dogs\n')):
    a, b = substring._between_words(text, start, end)
    assert text[a:b] == expected
  text = '語' * 100
  a, b = substring._between_words(text.encode(), 4, 200)
  assert text.encode()[a:b].decode() == '語' * 64


# All steps in a build.


def test_a_build_with_all_steps_has_the_same_bytes_with_any_workers_and_nothing_left_over(tmp_path):
  text = corpora.write_files(tmp_path / 'text', documents=30)
  notice = corpora.made_up_text(99, 80)
  for i in range(1, 30, 3):
    path = text / 'web' / f'{i:03d}.txt'
    path.write_text(f'{path.read_text()}\n\n{notice}\n\n{corpora.made_up_text(500 + i, 30)}')
  (text / 'web' / 'near.txt').write_text((text / 'web' / '004.txt').read_text() + ' and a little more of it')
  (text / 'evals.jsonl').write_text(json.dumps({'question': corpora.made_up_text(8, 76)}))
  steps = (Exact(), Fuzzy(), Substrings(min_bytes=200), Decontaminate(against=(str(text / 'evals.jsonl'),)))
  recipe = corpora.recipe(text, steps=steps)
  one = build.build(recipe, tmp_path / 'one', workers=1)
  counts = read_manifest(one)['sources']['web']['documents']
  assert (counts['duplicate'], counts[fuzzy.NEAR], counts[CONTAMINATED]) == (1, 1, 1)
  kept = [text for path in one.glob('documents/web/*') for text in trained_on(one, path)]
  assert sum(notice[100:300] in text for text in kept) == 1
  assert corpora.files_of(build.build(recipe, tmp_path / 'two', workers=2)) == corpora.files_of(one)
  assert not (one / 'build/steps').exists()


def trained_on(root: Path, path: Path) -> list[str]:
  judged = tuple(f'verdicts/{name}/web/{path.name}' for name in ('exact', 'fuzzy', 'substrings', 'contamination'))
  n_rows = pq.read_metadata(path).num_rows
  shard = verdicts.Shard(source='web', documents=f'documents/web/{path.name}', rows=n_rows, hashes=(), verdicts=judged)
  return [text for _, some in verdicts.edited(root, shard) for text in some]


# Two versions of a manual.


@pytest.mark.slow
def test_all_near_duplicates_of_two_llvm_manuals_are_found_and_nothing_else_goes(tmp_path):
  """llvm-14-doc and llvm-15-doc, against all pairs compared exhaustively."""
  of = []
  for name in ('llvm-14-doc', 'llvm-15-doc'):
    source = DebianPackage(name=name, pages='*.html')
    unit, = source.fetch(tmp_path)
    assert isinstance(unit, Input)
    of.append([{'text': clean(source.extract(raw)[0]), 'url': raw.url} for raw in source.read(unit)])
  documents = of[0] + of[1]
  alike = likeness([one['text'] for one in documents], 5)
  pairs = [(i, j) for i, j in zip(*np.nonzero(np.triu(alike, 1) >= 0.8)) if alike[i, j]]
  records, after = judging.judge(tmp_path, Fuzzy(), judging.write(tmp_path, of), workers=2)
  tables = [judging.table(tmp_path, shard) for shard in after]
  reasons = sum((table['reason'].to_pylist() for table in tables), [])
  gone = {i for i, reason in enumerate(reasons) if reason}
  found = sum(i in gone or j in gone for i, j in pairs)
  wrong = [i for i, of in enumerate(sum((table['of'].to_pylist() for table in tables), [])) if of and
           alike[i, int(of.split(':')[1]) + len(tables[0]) * int(of.split(':')[0])] < 0.8]
  similar = sum(record['facts']['pairs_similar'] for record in records)
  print(f'{len(documents)} documents, {len(pairs)} pairs with J >= 0.8: {found} with one of the two gone; {similar} pairs '
        f'proposed and verified; {len(gone)} documents gone, {len(wrong)} of them like none that is kept')
  assert len(pairs) > 1000 and found >= 0.95 * len(pairs) and not wrong
  assert gone == greedy(documents, alike, 0.8)
