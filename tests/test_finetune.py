"""Fine-tuning: what a run starts from, what it trains and what not, which tokens count; whole runs, resumed and moved."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import tiny
from configs.finetune import sft
from data_pipeline import build, chat, loader
from data_pipeline.recipe import Recipe
from data_pipeline.sources.chat_files import ChatFiles
from maxlm import flags, peft, stages, start, train, typed_json
from maxlm.checkpoint import Checkpoints, named_leaves
from maxlm.config import Experiment, validate
from maxlm.data import to_device
from maxlm.hf.convert import export_directory
from maxlm.lora import LoraConfig
from maxlm.restore import load_params
from maxlm.step import StepConfig, gradients, init_state, train_step
from maxlm.trained import first_rows
from tests.make_corpus import make_corpus
from tests.rows import pack, random_batch

ROOT = Path(__file__).parents[1]
PLAIN = tiny.get_config().model.pattern[1:2]


# -- one step


def step_config(n_layers=1, **optim) -> StepConfig:
  config = tiny.get_config()
  config.model.n_layers, config.model.pattern = n_layers, PLAIN
  config.optim = dataclasses.replace(config.optim, **optim)
  return config.step_config('cpu', 1)


def arrays(tree) -> dict[str, np.ndarray]:
  return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def masked_batch() -> dict[str, np.ndarray]:
  """Rows of 64 of which less than half of the targets count."""
  batch = random_batch(np.random.default_rng(1), 8, 64, 512)
  batch['loss_mask'] &= (np.random.default_rng(2).random((8, 64)) < 0.4).astype(np.int32)
  return batch


@pytest.fixture(scope='module')
def loss_and_gradients(mesh_of):
  """batch -> (mean loss, {name: gradient}) of one model on one device."""
  config = step_config()
  with mesh_of(1):
    params = jax.jit(functools.partial(init_state, config))(jax.random.key(0)).params
    run = jax.jit(lambda batch: gradients(config, params, batch, jnp.sum(batch['loss_mask']).astype(jnp.float32)))

    def of(batch):
      with mesh_of(1):
        grads, sums = run(to_device(batch))
        return float(sums['nll_by_source'].sum()), arrays(grads), int(sums['tokens_by_source'].sum())
    yield of


def test_what_is_not_an_answer_carries_no_gradient(loss_and_gradients):
  batch = masked_batch()
  loss, grads, tokens = loss_and_gradients(batch)
  assert tokens == batch['loss_mask'].sum() < (batch['segment_ids'] > 0).sum() / 2
  counted = batch['loss_mask'] == 1
  other = {**batch, 'targets': np.where(counted, batch['targets'], (batch['targets'] + 7) % 512)}
  loss_other, grads_other, _ = loss_and_gradients(other)
  assert loss_other == loss and all(grads_other[name].tobytes() == grads[name].tobytes() for name in grads)
  row, column = np.argwhere(counted)[3]
  other['targets'][row, column] = (batch['targets'][row, column] + 7) % 512
  loss_other, grads_other, _ = loss_and_gradients(other)
  assert abs(loss_other - loss) > 1e-3 and all((grads_other[name] != grads[name]).any() for name in grads)


def test_conversations_in_one_row_are_as_each_alone(loss_and_gradients):
  """Sums over counted targets: nll of both, and gradients, which are of the mean."""
  rng = np.random.default_rng(0)
  documents, masks = [rng.integers(0, 512, n + 1) for n in (23, 30)], [rng.random(n) < 0.5 for n in (23, 30)]

  def batch(rows):
    made = pack([[documents[i] for i in row] for row in rows], 64)
    for r, row in enumerate(rows):
      mask = np.concatenate([masks[i] for i in row])
      made['loss_mask'][r, :len(mask)] = mask
    return made

  loss, grads, tokens = loss_and_gradients(batch([[0, 1]]))
  alone = [loss_and_gradients(batch([[i]])) for i in (0, 1)]
  assert tokens == sum(n for *_, n in alone) and loss == pytest.approx(sum(one for one, *_ in alone), rel=2e-6)
  for name in grads:
    expected = sum(n * g[name] for _, g, n in alone) / tokens
    np.testing.assert_allclose(grads[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize('optim, frozen, n_rows', [
  (dict(freeze=('embed_VD', '*.mlp.w_*')), ('embed_VD', 'stacks.0.mlp.w_'), 0),
  (dict(freeze_layers=2, freeze=('final_norm.*',)), ('final_norm.scale_D',), 2),
  (dict(freeze_layers=3), ('stacks.',), 0)], ids=['patterns', 'first layers', 'all layers'])
def test_what_is_frozen_keeps_its_bits_and_has_no_moments(mesh_of, optim, frozen, n_rows):
  config = step_config(n_layers=3, **optim)
  with mesh_of(1):
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    before, moments = arrays(state.params), {name: leaf.shape for name, leaf in named_leaves(state.opt).items()}
    new, _ = jax.jit(functools.partial(train_step, config))(state, to_device(masked_batch()))
  after = arrays(new.params)
  frozen = {name for name in before if name.startswith(frozen)}
  for name in before:
    first = before[name].shape[0] if name in frozen else n_rows if name.startswith('stacks.') else 0
    assert after[name][:first].tobytes() == before[name][:first].tobytes(), name
    for moment in ('mu', 'nu'):
      shape = moments.pop(f'1.{moment}.{name}', None)
      assert shape == (None if name in frozen else (before[name].shape[0] - first, *before[name].shape[1:])), name
    if name not in frozen:
      rest = (after[name] != before[name])[first:]
      assert rest.reshape(len(rest), -1).any(axis=1).all() or name == 'embed_VD', name
  assert list(moments) == ['1.count']


@pytest.mark.parametrize('optim, says', [
  (dict(freeze=('embeding_VD',)), "no weight matches 'embeding_VD'; there are embed_VD"),
  (dict(freeze=('*.attention.*',)), "no weight matches '*.attention.*'; there are"),
  (dict(freeze=('*',)), 'leave nothing to train'), (dict(freeze_layers=1, freeze=('*e*',)), 'leave nothing to train')])
def test_patterns_that_freeze_nothing_or_everything_are_refused(mesh_of, optim, says):
  config = step_config(**optim)
  with mesh_of(1), pytest.raises(ValueError) as error:
    jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
  assert says in str(error.value) and '\n' not in str(error.value)


# -- runs


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
  """A directory with a run of 12 steps on text, runs/parent, and chats whose answers can be learned, corpora/chats."""
  home = tmp_path_factory.mktemp('finetune')
  corpus = make_corpus(home / 'corpora' / 'tiny')
  config = tiny.get_config()
  config.model.n_layers, config.model.pattern, config.data.corpus = 1, PLAIN, str(corpus)
  config.model.logits_softcap = None  # so that it is a llama
  config.tokens, config.checkpoint.every_steps = 12 * config.tokens_per_step, 8
  assert train.run(config, home / 'runs' / 'parent') == 0
  colours = ('red', 'green', 'blue', 'white')
  lines = [json.dumps({'messages': [{'role': 'user', 'content': f'{n} {colours[n % 4]}?'},
                                    {'role': 'assistant', 'content': f'It is {colours[n % 4]}.'}]}) for n in range(400)]
  (home / 'chats.jsonl').write_text('\n'.join(lines))
  recipe = Recipe(name='chats', sources=(ChatFiles(name='chats', pattern=str(home / 'chats.jsonl')),), vocab_size=512,
                  seq_lens=(64,), validation_fraction=0.1, min_bytes=1, tokenizer=str(home / 'runs' / 'parent'))
  build.build(recipe, home / 'corpora' / 'chats', workers=1)
  return home


def config_of(home: Path, n_steps=8, **changes) -> Experiment:
  """configs/finetune/sft.py, small: no model, no recipe."""
  config = sft.get_config()
  config.data.corpus, config.data.recipe, config.data.seq_len = str(home / 'corpora' / 'chats'), '', 64
  config.optim.peak_lr, config.optim.warmup_tokens = 1e-2, 0
  config.evals.every_steps, config.evals.rows, config.checkpoint.every_steps = 0, 8, 4
  config.tokens = n_steps * config.tokens_per_step
  return dataclasses.replace(config, init_from=str(home / 'runs' / 'parent'), **changes)


def state_of(config: Experiment, workdir: Path):
  """(state, meta) of the run before its next step, on the current mesh."""
  config, parent = start.settle(config, workdir)
  plan = stages.segments(config)
  feeds, _ = start.open_feeds(config, plan, None)
  return start.start_or_resume(config, plan, feeds, workdir, Checkpoints(workdir / 'checkpoints'), parent)[:2]


def same(one: dict, other: dict) -> bool:
  return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_a_run_starts_with_the_weights_of_its_parent_and_a_new_or_its_optimizer(home, mesh_of, tmp_path):
  parent = Checkpoints(home / 'runs' / 'parent' / 'checkpoints')
  with mesh_of(1):
    fresh, meta = state_of(config_of(home), tmp_path / 'run')
    kept, _ = state_of(config_of(home, init_optimizer=True), tmp_path / 'run')
    old, _ = state_of(dataclasses.replace(config_of(home), init_from=f'{home}/runs/parent@8'), tmp_path / 'run')
    params, opt = parent.restore(12, fresh.params, fresh.opt)
    params_8 = parent.restore_params(8, fresh.params)
    assert same(arrays(fresh.params), arrays(params)) and same(arrays(old.params), arrays(params_8))
    assert not same(arrays(params), arrays(params_8))
    assert same(arrays(kept.params), arrays(params)) and same(arrays(kept.opt), arrays(opt))
    assert not any(leaf.any() for leaf in arrays(fresh.opt).values()) and arrays(kept.opt)['1.count'] == 12
    assert int(fresh.step) == int(kept.step) == 0
  of_parent = parent.meta(12)['lineage']
  assert {name: meta['lineage']['parent'][name] for name in ('run', 'step')} == {'run': of_parent['run'], 'step': 12}
  assert meta['lineage']['run'] != of_parent['run']


@pytest.fixture(scope='module')
def tuned(home) -> Path:
  """The workdir of a finished fine-tuning."""
  assert train.run(config_of(home), home / 'runs' / 'tuned') == 0
  return home / 'runs' / 'tuned'


def test_fine_tuning_improves_the_held_out_loss_and_says_so(home, tuned):
  done = json.loads((tuned / 'DONE').read_text())
  assert done['before'].keys() == done['loss'].keys() == {'chats', 'all'}
  assert done['loss']['chats'] < 0.7 * done['before']['chats']
  record = [json.loads(line) for line in (tuned / 'metrics.jsonl').read_text().splitlines()]
  assert record[0]['step'] == 0 and record[0]['eval/loss/all'] == done['before']['all']
  assert record[-1]['eval/loss/all'] == done['loss']['all']
  corpus, parent = loader.open_corpus(home / 'corpora' / 'chats', 64), home / 'runs' / 'parent'
  assert (tuned / 'chat_template.jinja').read_text() == chat.OURS
  assert (tuned / 'tokenizer.json').read_bytes() == (parent / 'tokenizer.json').read_bytes()
  model = typed_json.loads((parent / 'config.json').read_text(), Experiment).model
  assert typed_json.loads((tuned / 'config.json').read_text(), Experiment).model == model
  assert corpus.tokens('chats') < 0.7 * sum(corpus.rows('chats', split) for split in ('train', 'validation')) * 64


def test_the_workdir_is_all_that_asking_the_model_needs(tuned):
  command = [sys.executable, '-m', 'maxlm.generate', f'--checkpoint={tuned}', '--chat=3 white?', '--max_tokens=8', '--json']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  tokenizer = tokenizers.Tokenizer.from_file(str(tuned / 'tokenizer.json'))
  prompt = tokenizer.encode('<|endoftext|>User: 3 white?\n\nAssistant:').ids
  assert json.loads(done.stdout)['prompt_tokens'] == prompt


def test_a_hugging_face_directory_is_imported_on_the_way_and_what_belongs_to_it_goes_along(home, mesh_of, tmp_path):
  parent = home / 'runs' / 'parent'
  with mesh_of(1):
    export_directory(str(parent), tmp_path / 'hf')
    (tmp_path / 'hf' / 'generation_config.json').write_text('{"eos_token_id": 0, "max_length": 64}')
    config = dataclasses.replace(config_of(home), init_from=str(tmp_path / 'hf'))
    state, meta = state_of(config, tmp_path / 'run')
    assert same(arrays(state.params), arrays(load_params(Checkpoints(parent / 'checkpoints'), 12)))
    settled, origin = start.settle(config, tmp_path / 'run')
    start.write_description(settled, tmp_path / 'run', loader.open_corpus(config.data.corpus, 64), origin)
  assert meta['hf']['config']['model_type'] == 'llama' and meta['lineage']['parent']['step'] == 0
  assert (tmp_path / 'run' / 'generation_config.json').read_text() == '{"eos_token_id": 0, "max_length": 64}'
  assert origin.workdir == tmp_path / 'run' / 'imported'


def resumed_from(finished: Path, step: int, to: Path) -> Path:
  """A copy of a run as it was when that step had just been saved."""
  shutil.copytree(finished, to, ignore=shutil.ignore_patterns('DONE'))
  for saved in Checkpoints(to / 'checkpoints').steps():
    if saved > step:
      shutil.rmtree(to / 'checkpoints' / str(saved))
  return to


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
  """Everything in a checkpoint."""
  loaded = Checkpoints(workdir / 'checkpoints')._load(step, {'params': None, 'opt': None})
  return {f'{item}.{name}': np.asarray(leaf) for item, leaves in loaded.items() for name, leaf in leaves.items()}


def test_a_resumed_fine_tuning_ends_with_the_same_bits_and_does_not_need_its_parent(home, tuned, tmp_path):
  run = resumed_from(tuned, 4, tmp_path / 'run')
  away = (home / 'runs' / 'parent').rename(home / 'runs' / 'elsewhere')
  try:
    assert train.run(config_of(home), run) == 0
  finally:
    away.rename(home / 'runs' / 'parent')
  assert same(saved(run, 8), saved(tuned, 8))
  assert json.loads((run / 'DONE').read_text())['before'] == json.loads((tuned / 'DONE').read_text())['before']


def test_a_lora_run_saves_adapters_alone_resumes_to_the_same_bits_and_is_a_model_for_others(home, mesh_of, tmp_path):
  runs = tmp_path / 'runs'
  shutil.copytree(home / 'runs' / 'parent', runs / 'parent')
  config = dataclasses.replace(config_of(home, lora=LoraConfig(rank=2, dora=True)), init_from=str(runs / 'parent'))
  assert train.run(config, runs / 'lora') == 0
  done = json.loads((runs / 'lora' / 'DONE').read_text())
  assert done['loss']['chats'] < done['before']['chats'] - 0.1
  items = saved(runs / 'lora', 8)
  assert {name for name in items if '.lora_' not in name} == {'opt.1.count'} and len(items) == 1 + 3 * 3 * 7
  resumed = resumed_from(runs / 'lora', 4, runs / 'resumed')
  assert train.run(config, resumed) == 0 and same(saved(resumed, 8), items)
  with mesh_of(1):
    peft.merge(str(runs / 'lora'), runs / 'merged')
    merged = arrays(load_params(Checkpoints(runs / 'lora' / 'checkpoints'), 8))
    assert same(arrays(load_params(Checkpoints(runs / 'merged' / 'checkpoints'), 0)), merged)
    metas = [Checkpoints(runs / name / 'checkpoints').meta(step) for name, step in (('lora', 8), ('merged', 0))]
    assert metas[1]['config'] == metas[0]['config'] | {'lora': None} and metas[1]['bos'] == metas[0]['eot'] == 0
    base = arrays(load_params(Checkpoints(runs / 'parent' / 'checkpoints'), 12))
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert changed == {name for name in base if '.w_' in name}
    child, meta = state_of(dataclasses.replace(config, lora=None, init_from=str(runs / 'lora')), runs / 'child')
    there = arrays(load_params(Checkpoints(runs / 'lora' / 'checkpoints'), 8))  # a run is on all devices
    assert same(arrays(child.params), there) and meta['lineage']['parent']['step'] == 8
  with mesh_of(1):
    shutil.move(runs, tmp_path / 'moved')  # together they can be moved, and not alone
    assert same(arrays(load_params(Checkpoints(tmp_path / 'moved' / 'lora' / 'checkpoints'), 8)), merged)
    shutil.move(tmp_path / 'moved' / 'parent', tmp_path / 'gone')
    with pytest.raises(ValueError, match=r'adapters for step 12 of the run that was in .*runs/parent, and it is not there'):
      load_params(Checkpoints(tmp_path / 'moved' / 'lora' / 'checkpoints'), 8)


@pytest.mark.parametrize('changes, says', [
  (dict(init_from='{home}/runs/parrent'), 'there is no such directory; did you mean {home}/runs/parent?'),
  (dict(init_from='{home}/runs'), 'no checkpoint in {home}/runs/checkpoints'),
  (dict(init_from='{home}/runs/parent@7'), 'no checkpoint of step 7 in {home}/runs/parent/checkpoints: it has 8, 12'),
  (dict(init_from=''), 'no model of its own: name the run it starts from, --config.init_from=WORKDIR'),
  (dict(init_from='', model='wide', lora=LoraConfig()), 'lora needs a model to start from: give --config.init_from=WORKDIR'),
  (dict(init_optimizer=True, lora=LoraConfig()), 'init_optimizer=True has no meaning with lora'),
  (dict(init_optimizer=True, freeze=('embed_VD',)), 'init_optimizer=True goes on with the state of the same trained'),
  (dict(model='wide'), 'architecture: embed_VD is of shape (512, 64) there, of shape (512, 128) in this config'),
  (dict(lora=LoraConfig(targets=('*.q_proj',))), "lora.targets: no weight matches '*.q_proj'"),
  (dict(freeze=('nothing',)), "optim.freeze: no weight matches 'nothing'"),
  (dict(corpus='other'), 'was made with another tokenizer than the model in {home}/runs/parent'),
], ids=lambda value: str(sorted(value)) if isinstance(value, dict) else '')
def test_mistakes_are_one_line_and_leave_nothing_to_trust(home, tmp_path, changes, says):
  config = config_of(home)
  if changes.get('corpus'):
    other = Recipe(name='chats', sources=(ChatFiles(name='chats', pattern=str(home / 'chats.jsonl')),), vocab_size=300,
                   seq_lens=(64,), validation_fraction=0.1, min_bytes=1)
    config.data.corpus = str(build.build(other, tmp_path / 'corpus', workers=1))
  if 'freeze' in changes:
    config.optim.freeze = changes['freeze']
  if 'model' in changes:
    config.model = dataclasses.replace(tiny.get_config().model, n_layers=1, pattern=PLAIN, d_model=128)
  if 'init_from' in changes:
    config.init_from = changes['init_from'].format(home=home)
  config = dataclasses.replace(config, **{name: changes[name] for name in ('init_optimizer', 'lora') if name in changes})
  with pytest.raises((ValueError, OSError)) as error:
    train.run(config, tmp_path / 'run')
  assert says.format(home=home) in str(error.value) and '\n' not in str(error.value)
  assert flags.is_for_user(error.value) and not (tmp_path / 'run' / 'config.json').exists()


def test_what_belongs_to_a_workdir_is_not_changed(home, tuned, tmp_path):
  run = resumed_from(tuned, 4, tmp_path / 'run')
  for changes, says in ((dict(init_optimizer=True), 'begun with init_optimizer=False and this config has True'),
                        (dict(lora=LoraConfig()), 'begun with lora=None and this config has absent')):
    with pytest.raises(ValueError, match=says):
      train.run(config_of(home, **changes), run)
  config = config_of(home)
  config.optim.freeze = ('embed_VD',)
  with pytest.raises(ValueError, match=r'begun with optim.freeze=\[\] and this config has absent'):
    train.run(config, run)


# -- configs


@pytest.mark.parametrize('arg', ['', 'lora', 'dora'])
def test_the_config_fits_the_quickstarts_model(mesh_of, arg):
  config = flags.load_config(f'{ROOT}/configs/finetune/sft.py' + f':{arg}' * bool(arg))
  assert config.model is None and typed_json.loads(typed_json.dumps(config), Experiment) == config
  config.model = flags.load_config(f'{ROOT}/configs/quickstart.py').model
  config.init_from = 'runs/quickstart'
  validate(config, 'cpu', 1)
  with mesh_of(1):
    step_config, batch = config.step_config('cpu', 1), random_batch(np.random.default_rng(0), 8, 256, 512)
    state = jax.eval_shape(functools.partial(init_state, step_config), jax.random.key(0))
    jax.eval_shape(functools.partial(train_step, step_config), state, to_device(batch))
    n_trained = sum(w.size for name, w in named_leaves(state.params).items()
                    if name in first_rows(config.optim, config.model, state.params))
  assert (n_trained < 0.15 * 4_197_120) == bool(arg)
