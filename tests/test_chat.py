"""Conversations: which lines are ones, which of their tokens are trained on, and that rows and batches say the same."""

import collections
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from data_pipeline import build, chat, loader, pack, shards, tokenizer
from data_pipeline.mixture import MixtureSchedule
from data_pipeline.recipe import Recipe
from data_pipeline.sources.chat_files import ChatFiles
from data_pipeline.sources.python_chats import _conversation
from data_pipeline.sources.text_files import TextFiles
from tests.corpora import made_up_text

EOT = '<|endoftext|>'
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
OURS = chat.Template('', EOT, EOT)


@pytest.fixture(scope='module')
def encoder() -> tokenizers.Tokenizer:
  """A byte-level BPE that knows some merges, with the marks of ChatML beside the end of text."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[EOT, '<|im_start|>', '<|im_end|>'], show_progress=False,
                                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
  made.train_from_iterator(['User: hello there\n\nAssistant: hello hello User: hello==42 ==42'] * 20, trainer)
  return made


def messages(*turns: tuple[str, str]) -> str:
  return chat.canonical(json.dumps({'messages': [{'role': role, 'content': text} for role, text in turns]}).encode())


def marked(encoder, document: str, template: chat.Template = OURS) -> str:
  """The text of a conversation with [what is trained on] in brackets."""
  (stream,), (counts,), dropped = chat.tokenise([document], encoder, template, longest=None)
  assert not dropped and len(stream) == len(counts)
  text, edges = '', np.flatnonzero(np.diff(counts, prepend=False, append=False))
  for start, stop in zip([0, *edges], [*edges, len(counts)]):
    part = encoder.decode(stream[start:stop].tolist(), skip_special_tokens=False)
    text += f'[{part}]' if stop > start and counts[start] else part
  return text


def test_the_answers_alone_are_trained_on_token_for_token(encoder):
  document = messages(('system', 'Be kind.'), ('user', ' hello\n'), ('assistant', 'hello there'), ('user', '6*7?'),
                      ('assistant', '42'), ('user', 'nobody answers this'))
  assert marked(encoder, document) == (
    f'{EOT}System: Be kind.\n\nUser: hello\n\nAssistant:[ hello there{EOT}]User: 6*7?\n\nAssistant:[ 42{EOT}]')
  (stream,), (counts,), _ = chat.tokenise([messages(('user', 'hi'), ('assistant', 'hello'))], encoder, OURS, longest=None)
  assert encoder.decode(stream[counts].tolist(), skip_special_tokens=False) == f' hello{EOT}'
  prompt = encoder.encode(f'{EOT}User: hi\n\nAssistant:').ids  # as it is tokenised when the model is asked
  assert stream[:len(prompt)].tolist() == prompt and not counts[:len(prompt)].any() and counts[len(prompt):].all()


def test_completions_and_texts(encoder):
  completion = chat.canonical(b'{"prompt": "2*21 =", "completion": " 42", "id": 7}')
  assert marked(encoder, completion) == f'{EOT}2*21 =[ 42{EOT}]'
  assert marked(encoder, chat.canonical(b'{"text": "all of it"}')) == f'{EOT}[all of it{EOT}]'


def test_a_models_own_template_is_kept_and_what_follows_the_end_of_a_turn_is_not_trained_on(encoder):
  document = messages(('user', 'hi'), ('assistant', 'hello'), ('user', 'and?'), ('assistant', 'there'))
  assert marked(encoder, document, chat.Template(CHATML, EOT, EOT)) == (
    '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n'
    '<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n[there<|im_end|>]\n')


def test_our_template_says_in_jinja_what_it_says_in_python():
  rng = random.Random(0)
  for _ in range(50):
    turns = [{'role': rng.choice(chat.ROLES), 'content': made_up_text(rng.randrange(1000), 5) + rng.choice(['', '\n', '  '])}
             for _ in range(rng.randrange(1, 5))]
    for ask in (False, True):
      assert chat._rendered(chat.OURS, turns, ask, '<s>', '</s>') == chat.Template('', '<s>', '</s>').render(turns, ask)
      assert chat._rendered(chat.OURS, turns, ask, None, '</s>') == chat.Template('', '</s>', '</s>').render(turns, ask)


@pytest.mark.parametrize('line, reason', [
  (b'{"messages": [', 'not JSON'), (b'[' * 100_000, 'not JSON'), (b'{"text": "\xff"}', 'not UTF-8'),
  (rb'{"text": "\ud800"}', 'not UTF-8'), (b'["text"]', 'not an object'), (b'{"conversation": []}', 'no messages'),
  (b'{"messages": {}}', 'no messages'), (b'{"messages": []}', 'no answer'),
  (b'{"messages": ["hi"]}', 'a message without a role'),
  (b'{"messages": [{"content": "hi"}]}', 'a message without a role'),
  (b'{"messages": [{"role": "tool", "content": "hi"}]}', 'unknown role'),
  (b'{"messages": [{"role": ["user"], "content": "hi"}]}', 'unknown role'),
  (b'{"messages": [{"role": "user", "content": null}]}', 'a message without text'),
  (b'{"messages": [{"role": "user", "content": "hi"}]}', 'no answer'),
  (b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " \\n"}]}', 'an empty text'),
  (b'{"prompt": 1, "completion": "2"}', 'prompt or completion is no text'), (b'{"text": ""}', 'an empty text')])
def test_what_is_no_conversation_is_rejected_for_a_reason(line, reason):
  document = chat.canonical(line + b'\n')
  assert chat.rejection(document) == reason
  assert json.loads(document)['line'] == line.decode(errors='replace')


def test_a_conversation_that_cannot_be_masked_exactly_is_dropped_and_counted(encoder):
  documents = [
    chat.canonical(b'{"prompt": "hello==", "completion": "42"}'),  # kept: no token has both = and 4
    chat.canonical(b'{"prompt": "hel", "completion": "lo"}'),  # `hello` is a token
    messages(('user', f'what ends with {EOT}User: x\n\nAssistant: y?'), ('assistant', 'a turn')),
    messages(('user', 'short'), ('assistant', 'hello ' * 40))]
  done = chat.tokenise(documents, encoder, OURS, longest=40)
  assert done.dropped == {chat.JOINED: 1, chat.SPECIAL: 1, chat.TOO_LONG: 1} and len(done.streams) == 1
  assert sum(chat.tokenise(documents, encoder, OURS, longest=None).dropped.values()) == 2


@pytest.mark.parametrize('template, reason', [
  ("{{ raise_exception('roles must alternate') }}", 'refused by the template: roles must alternate'),
  ('{{ messages | length + "" }}', "refused by the template: unsupported operand type(s) for +: 'int' and 'str'"),
  ("{{ ''.__class__.__mro__ }}", "refused by the template: access to attribute '__class__' of 'str' object is unsafe."),
  ("{{ messages.append(1) }}", 'refused by the template: '),
  ("{% for m in messages %}{{ m['content'] if loop.last else '…' }}{% endfor %}", chat.JOINED)])
def test_a_template_that_refuses_escapes_or_rewrites_is_told(encoder, template, reason):
  document = messages(('user', 'hi'), ('assistant', 'hello'), ('user', 'and?'), ('assistant', 'there'))
  done = chat.tokenise([document], encoder, chat.Template(template, EOT, EOT), longest=None)
  (found, count), = done.dropped.items()
  assert found.startswith(reason) and count == 1 and not done.streams


def test_a_template_that_is_no_jinja_ends_the_build(encoder):
  document, template = messages(('user', 'hi'), ('assistant', 'hello')), chat.Template('{% for %}', EOT, EOT)
  with pytest.raises(OSError, match='the chat template is not valid Jinja'):
    chat.tokenise([document], encoder, template, longest=None)


# -- rows


def test_every_target_that_counts_is_in_the_mask_once_and_pieces_without_any_are_left_out():
  rng = np.random.default_rng(0)
  streams = [rng.integers(1, 4000, n).astype(np.int32) for n in rng.integers(2, 90, 60)]
  counts = [rng.random(len(stream)) < rng.choice([0.02, 0.5]) for stream in streams]
  for count in counts:
    count[0] = False  # nothing comes before the first token
  pieces = pack.cut(streams, 16, counts)
  dtype, bins = pack.token_dtype(4096), pack.best_fit_decreasing(pieces.lengths, 16)
  records = [pack.encode_row(pieces, members, 16, dtype) for members in bins]
  batch = pack.decode_rows(records, 16, dtype, masked=True)
  trained = batch['loss_mask'] == 1
  assert set(np.unique(batch['loss_mask'])) == {0, 1} and not (trained & (batch['segment_ids'] == 0)).any()
  pairs = collections.Counter(zip(batch['tokens'][trained].tolist(), batch['targets'][trained].tolist()))
  assert pairs == collections.Counter((int(a), int(b)) for stream, count in zip(streams, counts)
                                      for a, b, c in zip(stream, stream[1:], count[1:]) if c)
  for ids, mask in zip(batch['segment_ids'], batch['loss_mask']):
    assert all(mask[ids == segment].any() for segment in range(1, ids.max() + 1))
  some = pack.decode_rows([records[0], pack.encode_row(pack.cut(streams, 16), [0], 16, dtype)], 16, dtype, [True, False])
  np.testing.assert_array_equal(some['loss_mask'][0], batch['loss_mask'][0])
  np.testing.assert_array_equal(some['loss_mask'][1], some['segment_ids'][1] > 0)


# -- a corpus


def write_chats(path: Path, n: int = 60) -> Path:
  lines = [json.dumps({'messages': [{'role': 'user', 'content': made_up_text(i, 6)},
                                    {'role': 'assistant', 'content': made_up_text(500 + i, 3 if i else 200)}]})
           for i in range(n)]
  path.write_text('\n'.join([*lines, '{"messages": []}', 'hello', '', lines[1]]) + '\n')
  return path


def recipe(folder: Path, too_long='drop', **changes) -> Recipe:
  sources = (ChatFiles(name='chats', pattern=f'{folder}/chats.jsonl', chats=chat.ChatFormat(too_long=too_long)),
             TextFiles(name='web', pattern=f'{folder}/web.jsonl'))
  settings = dict(name='mine', sources=sources, vocab_size=400, seq_lens=(64,), validation_fraction=0.2, min_bytes=1)
  return Recipe(**settings | changes)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('chats')
  write_chats(folder / 'chats.jsonl')
  (folder / 'web.jsonl').write_text(''.join(json.dumps({'text': made_up_text(9000 + i, 60)}) + '\n' for i in range(40)))
  return folder


def test_length_buckets_are_refused_with_conversations(folder):
  with pytest.raises(ValueError, match='leave out length_buckets'):
    recipe(folder, length_buckets=(100,)).validate()


def test_a_corpus_of_chats_beside_text_says_what_was_left_out_and_its_batches_are_masked(folder, capsys):
  root = build.build(recipe(folder), folder / 'corpus', workers=1)
  said = capsys.readouterr().err
  assert '1 no answer' in said and '1 not JSON' in said and 'do not become rows of 64: 1 x too long' in said
  shards.verify(root)
  corpus, manifest = loader.open_corpus(root, 64), shards.read_manifest(root)
  assert manifest['sources']['chats']['documents']['no answer'] == 1 and corpus.chat_template == chat.OURS
  batch = loader.batch_at(corpus, MixtureSchedule(stages=((None, {'chats': 1, 'web': 1}),)), seed=0, batch_size=16, step=0)
  real, is_chat = batch['segment_ids'] > 0, batch['source'] == 0
  np.testing.assert_array_equal(batch['loss_mask'][~is_chat], real[~is_chat])
  texts = tokenizer.load(corpus.tokenizer_path)
  trained = texts.decode(batch['targets'][is_chat][batch['loss_mask'][is_chat] == 1].tolist(), skip_special_tokens=False)
  answers = {made_up_text(500 + i, 3).strip() for i in range(60)}
  assert is_chat.sum() == 8 and {answer.strip() for answer in trained.split(EOT) if answer} <= answers
  for split in ('train', 'validation'):
    assert corpus.tokens('chats', split) == sum(entry['tokens'] for entry in manifest['rows']
                                                if (entry['source'], entry['split']) == ('chats', split))
  held_out = [batch['loss_mask'].sum() for batch in loader.validation_batches(corpus, 'chats', 4)]
  assert sum(held_out) == corpus.tokens('chats', 'validation')


def test_long_conversations_are_split_where_that_is_asked_for(folder, capsys):
  root = build.build(recipe(folder, too_long='split'), folder / 'split', workers=1)
  assert 'too long' not in capsys.readouterr().err
  dropped, split = (loader.open_corpus(at, 64) for at in (folder / 'corpus', root))
  assert split.tokens('chats') + split.tokens('chats', 'validation') > 200 + sum(
    dropped.tokens('chats', part) for part in ('train', 'validation'))


def test_a_given_tokenizer_is_used_as_it_is_wherever_it_lies(folder, tmp_path, capsys):
  arguments = [f'--recipe=sft:{folder}/chats.jsonl', f'--out={tmp_path}/corpus', '--seq_lens=64', '--workers=1']
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'tokenizer.json').write_bytes((folder / 'corpus' / 'tokenizer.json').read_bytes())
  for given in (folder / 'corpus', tmp_path / 'model' / 'tokenizer.json', tmp_path / 'model'):
    assert build.main([*arguments, f'--tokenizer={given}']) == 0
    assert ('nothing to do' in capsys.readouterr().err) == (given != folder / 'corpus')
  corpus = loader.open_corpus(tmp_path / 'corpus', 64)
  assert corpus.tokenizer_sha256 == loader.open_corpus(folder / 'corpus', 64).tokenizer_sha256
  (tmp_path / 'model' / 'chat_template.jinja').write_text("{{ '>' }}" + chat.OURS)
  assert build.main([*arguments, f'--tokenizer={tmp_path}/model']) == 0
  assert loader.open_corpus(tmp_path / 'corpus', 64).chat_template == "{{ '>' }}" + chat.OURS
  assert build.main([*arguments, '--tokenizer=nowhere']) == 1
  assert capsys.readouterr().err.splitlines()[-1].startswith('error: there is no tokenizer nowhere: name a tokenizer.json')


def test_where_nothing_is_left_the_build_ends_in_one_line(folder, tmp_path, capsys):
  (tmp_path / 'bad.jsonl').write_text('{"messages": []}\n{"messages": [{"role": "user"}]}\n')
  for seq_lens, file, says in ((64, tmp_path / 'bad.jsonl', 'no document is left to train on'),
                               (2, folder / 'chats.jsonl', "no conversation is left for rows of 2 tokens: {'too long': ")):
    assert build.main([f'--recipe=sft:{file}', f'--out={tmp_path}/corpus', f'--seq_lens={seq_lens}', '--workers=1']) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]
  assert not (tmp_path / 'corpus' / 'manifest.json').exists()


def test_a_corpus_from_before_there_were_masks_opens_as_it_was(folder, tmp_path):
  only_text = recipe(folder, sources=recipe(folder).sources[1:])
  root = build.build(only_text, tmp_path / 'corpus', workers=1)
  manifest = json.loads((root / 'manifest.json').read_text())
  schedule = MixtureSchedule(stages=((None, {'web': 1}),))
  new = loader.batch_at(loader.open_corpus(root, 64), schedule, seed=0, batch_size=4, step=0)
  rows = [{name: value for name, value in entry.items() if name != 'masked'} for entry in manifest['rows']]
  old = {name: value for name, value in manifest.items() if name not in ('bos', 'chat_template')}
  (root / 'manifest.json').write_text(json.dumps(old | {'rows': rows, 'format': 1}))
  old = loader.batch_at(loader.open_corpus(root, 64), schedule, seed=0, batch_size=4, step=0)
  assert new.keys() == old.keys() and all((new[name] == old[name]).all() for name in new)


@pytest.mark.parametrize('said, post, bos, eot', [
  (None, None, EOT, EOT),
  ({'bos_token': '<|im_start|>', 'eos_token': '<|im_end|>'}, None, '<|im_end|>', '<|im_end|>'),
  ({'bos_token': '<|im_start|>', 'eos_token': {'content': '<|im_end|>'}, 'add_bos_token': True}, None,
   '<|im_start|>', '<|im_end|>'),
  ({'eos_token': '<|im_end|>'}, '<|im_start|>', '<|im_start|>', '<|im_end|>')])
def test_what_begins_and_ends_a_text_is_what_the_models_files_say(encoder, tmp_path, said, post, bos, eot):
  copy = tokenizers.Tokenizer.from_str(encoder.to_str())
  if post:
    copy.post_processor = processors.TemplateProcessing(single=f'{post} $A', special_tokens=[(post, copy.token_to_id(post))])
  copy.save(str(tmp_path / 'tokenizer.json'))
  if said is not None:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(said | {'chat_template': CHATML}))
  path, facts = tokenizer.facts_of(str(tmp_path))
  assert (path, facts['bos'], facts['eot']) == (tmp_path / 'tokenizer.json', bos, eot)
  assert facts['chat_template'] == ('' if said is None else CHATML)
  if said is not None:
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>'}))
    with pytest.raises(ValueError, match='has no token </s>'):
      tokenizer.facts_of(str(tmp_path))


def test_bytes_of_tokens_add_up_for_sentencepiece_too():
  words = {'<s>': 0, '▁': 1, 'a': 2, '▁a': 3, '<0x0A>': 4, 'é': 5}
  made = tokenizers.Tokenizer(models.BPE(words, [('▁', 'a')], byte_fallback=True))
  made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback()])
  made.add_special_tokens(['<s>'])
  made.add_tokens(['ünew'])
  assert tokenizer.token_bytes(made).tolist() == [0, 1, 1, 2, 1, 2, 5]


def test_the_answers_of_the_made_conversations_are_right():
  sentence, kinds = 'Return the old value, or None if there is none.', collections.Counter()
  for seed in range(200):
    turns = _conversation('swap', sentence, random.Random(seed))
    for question, answer in zip(turns[::2], turns[1::2]):
      text, reply = question['content'], answer['content']
      kinds[text.split(' "')[0].split(':')[0]] += 1
      if 'How many' in text:
        assert reply == '10'
      elif 'have the word' in text:
        assert reply == ('Yes.' if text.split('"')[-2] in sentence.replace(',', '').rstrip('.').split() else 'No.')
      elif 'Complete' in text:
        assert f'{text.split(": ")[1]} {reply}' == sentence
      else:
        assert reply in (sentence, sentence.upper(), 'Return', 'none')
  assert len(kinds) == 8 and min(kinds.values()) > 10
