"""Documents -> tokens by the quick engine: the same as of the tokenizers library, on every text."""

import json
import random
import time

import corpora
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline import loader, shards, tokenizer
from data_pipeline.build import build

ODD = (' ', '  ', '\n', '\t', '\r\n', '\r', '\x0b', '\x85', '\xa0', '\u2003', '\u2028', '\u3000', '\0', '\x1c', '\ufeff',
       '\ufffd', '\ufffe', '\U0010ffff', '\ue000', '\u200d', '\u200b', '\u202e', '\u0301', '\u0338', 'e\u0301', '\u212a',
       '\u037e', "'s", "'S", "'\u017f", "'\u212a", "'ll", 'ﬁ', 'İ', 'ß', 'ǅ', '0', '٣', '½', 'Ⅷ', '12345',
       '\U0001f469\u200d\U0001f467', '\U0001f1e6\U0001f1f6', '한국', '中文', 'ไทย', 'हिन्दी', 'עברית', 'العربية',
       '<|endoftext|>', '<call>', '<cal', '!!', '...', '_', '`', '\\', '\x7f')


def made(pattern: str | None, **changes) -> tokenizers.Tokenizer:
  """A byte-level BPE trained on made-up text. pattern: None for that of ByteLevel."""
  made = tokenizers.Tokenizer(models.BPE())
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
  made.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence([
    pre_tokenizers.Split(tokenizers.Regex(pattern), behavior='isolated'), level])
  made.decoder = decoders.ByteLevel()
  texts = [corpora.made_up_text(i, 300) for i in range(30)] + [''.join(random.Random(0).choices(ODD, k=20_000))]
  made.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=900, special_tokens=[] if changes.get('ignore_merges') else ['<|endoftext|>'], show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
  made.model.ignore_merges = changes.get('ignore_merges', False)
  if changes.get('composes'):
    made.normalizer = normalizers.NFC()
  made.add_tokens(changes.get('added', []))
  made.add_special_tokens(['<|endoftext|>'])
  made.encode_special_tokens = True
  return made


OURS, THREES, GPT2 = tokenizer._COMPARED
KINDS = {'ours': lambda: made(OURS), 'llama': lambda: made(THREES, ignore_merges=True), 'gpt2': lambda: made(None),
         'qwen': lambda: made(OURS, composes=True, added=['<call>'])}


@pytest.fixture(scope='module', params=KINDS)
def kind(request):
  return KINDS[request.param]()


def check(some: tokenizers.Tokenizer, texts: list[str]) -> None:
  theirs = some.encode_batch_fast(texts, add_special_tokens=False)
  for text, ids, expected in zip(texts, tokenizer.encode(some, texts), theirs, strict=True):
    assert ids.tolist() == expected.ids, repr(text[:200])


def odd_texts(some: tokenizers.Tokenizer, n: int) -> list[str]:
  """Of odd characters; of tokens, which merges nearly make; of one script after another; of few letters."""
  chance, texts = random.Random(7), []
  tokens = [token for token in (some.decode([i]) for i in range(some.get_vocab_size())) if '\ufffd' not in token]
  for i in range(n):
    low = chance.randrange(0x30000)
    script = [chr(low + j) for j in range(150) if not 0xd800 <= low + j < 0xe000] or ['x']
    texts.append(''.join(chance.choices((ODD, tokens, script, 'abcde ')[i % 4], k=chance.randrange(60))))
  return texts


def test_every_text_has_the_tokens_that_the_tokenizers_library_gives_it(kind):
  assert tokenizer._engine(kind.to_str()) is not None
  check(kind, ['', *odd_texts(kind, 6000), *(corpora.made_up_text(i, 400) for i in range(20))])


def characters(planes: int, every: int) -> list[str]:
  return [chr(i) for i in range(0, planes << 16, every) if not 0xd800 <= i < 0xe000]


@pytest.mark.parametrize('around', ['a%sa', '%s', '  %s\n', "1%s '%s"])
def test_both_libraries_have_the_same_classes_of_characters(kind, around):
  check(kind, [around.replace('%s', character) for character in characters(2, 7)])


@pytest.mark.slow
@pytest.mark.parametrize('around', ['a%sa', '%s', '  %s\n', '1%s ', "'%s", 'x %s%s x', '.%s\n'])
def test_both_libraries_have_the_same_classes_of_all_characters(kind, around):
  every = characters(17, 1)
  for start in range(0, len(every), 10_000):
    check(kind, [around.replace('%s', character) for character in every[start:start + 10_000]])


def test_long_runs_without_spaces_take_no_longer_than_text_does():
  kind = made(OURS)
  runs = ('a', 'ab', '中', '!?', '7', '\n', ' \t')
  long = [corpora.made_up_text(0, 200) * 300, *(run * (400_000 // len(run)) for run in runs),
          ''.join(random.Random(0).choices('abcdefgh', k=400_000)),
          'x' + ' ' * 1_100_000 + 'x', ' ' * 990_000 + 'x', '\u3000' * 1_100_000]
  check(kind, long)
  def seconds(encode, text):
    began = time.process_time()
    encode(text)
    return time.process_time() - began

  plain = seconds(kind.encode, long[0])
  taken = [seconds(lambda text: list(tokenizer.encode(kind, [text])), text) for text in long]
  assert max(taken) < 20 * plain, [round(value / plain, 2) for value in taken]  # quadratic: thousands


def test_what_is_not_known_to_be_the_same_is_left_to_the_tokenizers_library():
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = [('a', 'b'), ('b', 'c'), ('a', 'bc')]  # by ids abc would be ab + c, which is no pair of the list
  vocab = {token: i for i, token in enumerate([*letters, 'ab', 'bc', 'abc'])}
  unlike = made(OURS)
  unlike.model = models.BPE(vocab, merges)
  shuffled = made(OURS)
  shuffled.model = models.BPE({**vocab, 'ab': vocab['bc'], 'bc': vocab['ab']}, merges[:2])
  whole = made(OURS)
  whole.model = models.BPE({**vocab, 'cab': len(vocab)}, [('a', 'b'), ('b', 'c')], ignore_merges=True)
  prefixed = made(None)
  prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  words = made(None)
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  digits = made(r'\p{N}|\P{N}+')
  for other in (unlike, shuffled, whole, prefixed, words, digits):
    assert tokenizer._engine(other.to_str()) is None
    check(other, ['', 'abc cab  abcab 7 x', *ODD])
  assert [ids.tolist() for ids in tokenizer.encode(unlike, ['abc'])] == [[vocab['ab'], vocab['c']]]


def test_a_token_that_is_spelt_in_a_text_is_one_only_where_it_is_not_special():
  some = made(OURS, composes=True, added=['<call>', '<\u212a>'])  # NFC makes a K of the second's letter
  call, = (token for token in json.loads(some.to_str())['added_tokens'] if token['content'] == '<call>')
  texts = ['a <call> b', 'a <|endoftext|> b', '<\u212a>', '<K>', '<call\u0338>']
  check(some, texts)
  ids = [ids.tolist() for ids in tokenizer.encode(some, texts)]
  assert call['id'] in ids[0] and some.token_to_id('<|endoftext|>') not in ids[1]


def test_texts_that_spell_special_tokens_hold_none_and_the_manifest_says_so(tmp_path):
  folder = corpora.write_files(tmp_path / 'text')
  (folder / 'web' / 'chat.txt').write_text('<|im_start|>user Who wrote this?<|im_end|> <|endoftext|> is spelt here. ' * 9)
  root = build(corpora.recipe(folder), tmp_path / 'plain', workers=1)
  with_chat = tokenizers.Tokenizer.from_file(str(root / 'tokenizer.json'))
  with_chat.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  with_chat.save(str(tmp_path / 'tokenizer.json'))
  root = build(corpora.recipe(folder, tokenizer=str(tmp_path / 'tokenizer.json')), tmp_path / 'chat', workers=1)
  rows = shards.read_manifest(root)['rows']
  assert rows and {row['special_tokens'] for row in rows} == {0}
  corpus = loader.open_corpus(root, 32)
  special = {with_chat.token_to_id(token) for token in ('<|im_start|>', '<|im_end|>')}
  schedule = loader.MixtureSchedule(stages=((None, {'web': 1}),))
  batches = [loader.batch_at(corpus, schedule, seed=0, batch_size=corpus.rows('web'), step=0),
             *loader.validation_batches(corpus, 'web', 64)]
  ids = np.concatenate([batch['tokens'][batch['segment_ids'] > 0] for batch in batches])
  assert not special & set(ids.tolist()) and 'im_start' in with_chat.decode(ids.tolist())
  is_end = ids == corpus.eot  # each begins a document or is the first of a row that goes on
  assert is_end.sum() <= sum(len(np.unique(row)) for batch in batches for row in batch['segment_ids'])
