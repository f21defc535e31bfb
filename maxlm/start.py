"""How a run begins: from fresh weights, from those of another run, or where it was left.

A run belongs to its workdir. The first time, `init_from` names the model that it starts from, and a config without an
architecture takes that model's. From then on its own checkpoints have all that it needs, but for the weights under the
adapters of LoRA, which stay where they are.
"""

import contextlib
import dataclasses
import difflib
import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipeline import loader, shards
from maxlm import diffusion, hosts, lora, stages, typed_json
from maxlm.checkpoint import Checkpoints, Damaged, find, lineage, parse
from maxlm.config import Experiment
from maxlm.data import DataConfig, Feed, feeds
from maxlm.hosts import say
from maxlm.metrics import has_end
from maxlm.models.decoder import Decoder, DecoderConfig
from maxlm.redact import redact_json
from maxlm.restore import COMPANIONS, base_of, load_params, model_of
from maxlm.sharding import make_mesh
from maxlm.spikes import Skips
from maxlm.stages import Segment
from maxlm.step import StepConfig, TrainState, begin, init_state

# Keys that a rerun may not change.
OF_THE_WORKDIR = ('model.', 'data.', 'seed', 'init_', 'lora', 'optim.freeze', 'optim.base', 'optim.optimizer', 'optim.ema',
                  'spikes.window')
MAY_MOVE = ('data.corpus', 'data.recipe', 'data.max_epochs', 'data.source_tokens')
OF_THE_MACHINE = ('corpus', 'mesh', 'compute', 'microbatches', 'evals')  # of a stage, may change on its way


@dataclasses.dataclass(kw_only=True, slots=True)
class Parent:
  """The checkpoint that a run starts from. meta: what was saved with it. is_trunk: the run goes on with its state and its
  steps, as a branch; else it takes the weights."""

  checkpoints: Checkpoints
  step: int
  meta: dict[str, Any]
  is_trunk: bool = False

  @property
  def workdir(self) -> Path:
    return Path(self.checkpoints.directory).parent


def settle(config: Experiment, workdir: Path, branch: str = '', chosen: str = '') -> tuple[Experiment, Parent | None]:
  """The config with its architecture and the stages that are asked for; and, for a run that has not begun and has one, the
  parent.

  branch: WORKDIR@STEP that the run leaves; chosen: names of stages, with commas. ValueError or FileNotFoundError, in one
  line, where there is no such model or stage.
  """
  if branch:
    return branch_off(config, workdir, branch, chosen)
  if chosen:
    config = stages.chosen(config, tuple(chosen.split(',')))
  parent, meta = None, newest_meta(Checkpoints(workdir / 'checkpoints'))
  if meta is not None:
    model = model_of(meta)
  elif config.init_from:
    parent = find_parent(config.init_from, workdir)
    model = model_of(parent.meta)
  elif config.model is not None:
    return config, None
  else:
    raise ValueError('this config has no model of its own: name the run it starts from, --config.init_from=WORKDIR')
  if config.model is None:
    config = dataclasses.replace(config, model=model)
  elif parent is not None:
    for name, before, after in differences(model, config.model, DecoderConfig):
      say(f'changed  model.{name}: {before} -> {after}')
  return config, parent


def branch_off(config: Experiment, workdir: Path, branch: str, chosen: str) -> tuple[Experiment, Parent | None]:
  """The run that leaves another at a step, with all of its state there, for other stages of the same config."""
  if parse(branch)[1] is None or not chosen or config.init_from:
    raise ValueError(f'--branch={branch}: name a checkpoint, WORKDIR@STEP, and what comes then, --stages=NAME,…; without '
                     'init_from')
  checkpoints, step = find(branch)
  trunk = Path(checkpoints.directory).parent
  if trunk.absolute() == workdir.absolute():
    raise ValueError(f'--branch={branch} --workdir={workdir}: a branch has a workdir of its own')
  meta = checkpoints.meta(step)
  begun = typed_json.decode(meta['config'], Experiment, 'config')
  if not begun.stages:
    raise ValueError(f'--branch={branch}: that run has no stages; to start from its weights, give --config.init_from')
  config = stages.branched(config, step, tuple(chosen.split(',')))
  if newest_meta(Checkpoints(workdir / 'checkpoints')) is not None:
    return config, None
  check_same_run(trunk, meta, {}, dataclasses.replace(config, seed=begun.seed))
  return config, Parent(checkpoints=checkpoints, step=step, meta=meta, is_trunk=True)


def newest_meta(checkpoints: Checkpoints) -> dict[str, Any] | None:
  """What was saved with the newest checkpoint that can be read, None if there is none. Damaged ones are set aside."""
  while (step := hosts.agree('newest', checkpoints.latest)) is not None:
    try:
      return checkpoints.meta(step)
    except Damaged as error:
      set_aside(checkpoints, step, error)
  return None


def set_aside(checkpoints: Checkpoints, step: int, error: Damaged) -> None:
  """Gives up a damaged checkpoint for the one before it. ValueError where it is the only one."""
  checkpoints.set_aside(step, str(error))
  say(f'DAMAGED  {error}\n         it is set aside, and the run goes on from the checkpoint before it')


def find_parent(init_from: str, workdir: Path) -> Parent:
  """The checkpoint of WORKDIR, WORKDIR@STEP, or of a Hugging Face directory, which is imported into `workdir` first."""
  named, step = parse(init_from)
  folder = Path(named)
  if not folder.is_dir():
    near = difflib.get_close_matches(folder.name, os.listdir(folder.parent) if folder.parent.is_dir() else [], n=1)
    hint = f'; did you mean {folder.with_name(near[0])}?' if near else ': name the workdir of a run, or a Hugging Face model'
    raise FileNotFoundError(f'--config.init_from={init_from}: there is no such directory{hint}')
  config = folder / 'config.json'
  if not (folder / 'checkpoints').exists() and config.is_file() and '"model_type"' in config.read_text(encoding='utf-8'):
    folder, step = imported(folder, workdir / 'imported'), None
  checkpoints, step = find(f'{folder}' if step is None else f'{folder}@{step}')
  return Parent(checkpoints=checkpoints, step=step, meta=checkpoints.meta(step))


def imported(source: Path, target: Path) -> Path:
  """Makes the workdir `target` of a Hugging Face model, once; in a process of its own, for the core knows no formats."""
  command = ['-m', 'maxlm.hf', 'import', str(source), str(target)]
  if not Checkpoints(target / 'checkpoints').steps():
    if jax.process_count() > 1:
      raise ValueError(f'{source} is a Hugging Face model: import it first, python {" ".join(command)}, and name {target}')
    say(f'import   {source} into {target}')
    if subprocess.run(['env', 'JAX_PLATFORMS=cpu', sys.executable, *command], check=False).returncode:
      raise ValueError(f'{source} was not imported: see the lines above; again with: python {" ".join(command)}')
  return target


def open_feeds(config: Experiment, plan: tuple[Segment, ...],
               model: Path | None) -> tuple[tuple[Feed, ...], loader.Corpus]:
  """Where the batches of each part of a run come from, and the corpus whose held-out rows are scored. Corpora are built
  first if they are not there.

  model: workdir of the model whose tokenizer they must have; None: any will do.
  """
  parts, opened = [segment.config.data for segment in plan], {}
  for data in (*parts, config.data):
    if (data.corpus, data.seq_len) not in opened:
      lengths = sorted({other.seq_len for other in (*parts, config.data) if other.corpus == data.corpus})
      opened[data.corpus, data.seq_len] = open_corpus(config, data, lengths, model)
  first, *others = opened.values()
  for other in others:
    if other.tokenizer_sha256 != first.tokenizer_sha256:
      raise ValueError(f'the corpora in {first.directory} and {other.directory} were made with different tokenizers: build '
                       f'one again with --tokenizer={first.directory}')
  of_parts = feeds([(segment.config.data, segment.stop - segment.first) for segment in plan],
                   [opened[data.corpus, data.seq_len] for data in parts], config.seed)
  return of_parts, opened[config.data.corpus, config.data.seq_len]


def open_corpus(config: Experiment, data: DataConfig, lengths: list[int], model: Path | None) -> loader.Corpus:
  """The corpus, built first if it is not there and the config names a recipe. lengths: of rows, that the run needs of it."""
  directory, seq_len = data.corpus, data.seq_len
  command = ['-m', 'data_pipeline.build', f'--recipe={data.recipe or "…"}', f'--out={directory}',
             f'--seq_lens={",".join(map(str, lengths))}', *([f'--tokenizer={model}'] if model else [])]

  def build():
    if data.recipe and not (Path(directory) / 'manifest.json').exists():
      say(f'corpus   {directory} is not there: building it with recipe {data.recipe!r}')
      if subprocess.run([sys.executable, *command], check=False).returncode:
        raise ValueError(f'the corpus was not built: see the lines above; again with: python {" ".join(command)}')

  hosts.agree('corpus', build)
  build()  # by hosts that do not see the first one's disk
  corpus = loader.open_corpus(directory, seq_len)
  if model and not (model / 'tokenizer.json').is_file():
    raise FileNotFoundError(f'the model in {model} came without tokenizer.json: put the file into that directory')
  if model and shards.sha256_file(model / 'tokenizer.json') != corpus.tokenizer_sha256:
    raise ValueError(f'the corpus in {directory} was made with another tokenizer than the model in {model}: name another '
                     f'--config.data.corpus, or build this one again: python {" ".join(command)}')
  if not any(corpus.rows(source, 'validation') for source in corpus.sources):
    raise ValueError(f'the corpus in {directory} holds no rows out to evaluate on: build it of more documents, or with a '
                     'higher validation_fraction in the recipe')
  if corpus.vocab_size > config.model.vocab_size:
    raise ValueError(f'the corpus in {directory} has {corpus.vocab_size} tokens, more than model.vocab_size='
                     f'{config.model.vocab_size}: set --config.model.vocab_size to {corpus.vocab_size} or more')
  diffusion.check_corpus(config.model, corpus.token_bytes, (corpus.bos, corpus.eot))
  return corpus


def start_or_resume(config: Experiment, plan: tuple[Segment, ...], feeds: tuple[Feed, ...], workdir: Path,
                    checkpoints: Checkpoints, parent: Parent | None) -> tuple[TrainState, dict[str, Any], Skips]:
  """The state of the newest whole checkpoint, or that before the first step; what is saved beside it; and which batches
  the run leaves out. The mesh is then that of the steps that come next.

  ValueError where the workdir or the parent is of another kind than the config.
  """
  corpus, names = feeds[0].corpus, [segment.name for segment in plan]
  meta = {'config': as_saved(config), 'tokenizer': corpus.tokenizer_sha256, 'bos': corpus.bos,
          'eot': corpus.eot, 'skips': [], 'rows': {f'{name}/{source}': feed.corpus.contents.get(source)
                                                   for name, feed in zip(names, feeds) for source in feed.schedule.sources}}
  skips = hosts.agree('rewinds', functools.partial(read_rewinds, workdir))
  undo(checkpoints, Skips.of_json(skips))
  while (saved := newest_meta(checkpoints)) is not None:
    step = saved['step']
    check_same_run(workdir, saved, {**meta, 'corpus': corpus.directory}, config)
    if step > plan[-1].stop:
      raise ValueError(f'{workdir} is at step {step:,}, past the {plan[-1].stop:,} steps of this config: '
                       'raise --config.tokens')
    try:
      state = restore(plan[stages.segment_of(plan, step)], checkpoints, step, saved)
    except Damaged as error:
      set_aside(checkpoints, step, error)
      continue
    say(f'resumed  at step {step:,} from {workdir}')
    skips = max(skips, saved['skips'], key=len)
    return state, {**saved, **meta, 'skips': skips}, Skips.of_json(skips)
  hosts.agree('begin', functools.partial((workdir / 'rewinds.json').unlink, missing_ok=True))  # of a run that was removed
  if parent is None:
    like, step_config = state_like(plan[0])
    state = jax.jit(functools.partial(init_state, step_config))(jax.random.key(config.seed))
    return state, {**meta, 'lineage': hosts.agree('run', lineage)}, Skips()
  say(f'start    from step {parent.step:,} of {parent.workdir}')
  meta |= hosts.agree('run', functools.partial(inheritance, parent, workdir))
  if parent.is_trunk:
    skips = parent.meta['skips']
    segment = plan[stages.segment_of(plan, parent.step)]
    state = restore(segment, parent.checkpoints, parent.step, parent.meta)
    return state, {**meta, 'skips': skips}, Skips.of_json(skips)
  return from_parent(config, plan, parent), meta, Skips()


def part_to_begin(plan: tuple[Segment, ...], checkpoints: Checkpoints, step: int, workdir: Path) -> int:
  """The segment that a run goes on with after a checkpoint: the one that comes next; or the one that ended there, where the
  evaluation at the end of its stage is missing, for a stop came during it or the stage was the last one then."""
  part = stages.segment_of(plan, step)
  if part == 0 or not plan[part].is_first or step > plan[part].first:
    return part
  is_own = lambda: step in checkpoints.steps()  # and not that of a run which this one branches from
  return part - hosts.agree('its end', lambda: is_own() and not has_end(workdir / 'metrics.jsonl', step))


def state_like(segment: Segment) -> tuple[TrainState, StepConfig]:
  """The state as shapes with shardings, for the mesh of that part of the run, which is set; and what its steps need."""
  jax.set_mesh(make_mesh(segment.config.mesh))
  step_config = segment.step_config(jax.default_backend(), 1)
  return jax.eval_shape(functools.partial(init_state, step_config), jax.random.key(segment.config.seed)), step_config


def restore(segment: Segment, checkpoints: Checkpoints, step: int, saved: dict[str, Any]) -> TrainState:
  """The state that was saved after a step, verified, on the mesh of that part of the run. `Damaged` where it is not what was
  saved. saved: its meta."""
  like, step_config = state_like(segment)
  params, opt, recent, ema = checkpoints.restore(step, what_is_saved(like.params), like.opt, recent=like.recent,
                                                 ema=like.ema)
  if step_config.lora is not None:
    params = lora.assemble(like.params, load_params(*base_of(checkpoints, saved)), params)
  return TrainState(step=jax.device_put(np.int32(step), jax.P()), params=params, opt=opt, recent=recent, ema=ema)


# -- a rewind: the list of them is in WORKDIR/rewinds.json as soon as one is decided, and in every later checkpoint


def read_rewinds(workdir: Path) -> list:
  """The rewinds of the run, as `Skips.to_json` has them. ValueError if the file is none."""
  path = workdir / 'rewinds.json'
  if not path.exists():
    return []
  try:
    return Skips.of_json(json.loads(path.read_text())).to_json()
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}): write the "skips" of the newest checkpoint there') from error


def write_rewinds(workdir: Path, skips: Skips) -> None:
  with writing_to(workdir):
    write_atomically(workdir / 'rewinds.json', json.dumps(skips.to_json(), indent=1) + '\n')


def undo(checkpoints: Checkpoints, skips: Skips) -> None:
  """Removes the checkpoints of steps that the newest rewind undid, also where a kill came between the two."""
  def is_undone(step):
    try:
      return skips.undid(step, Skips.of_json(checkpoints.meta(step)['skips']))
    except Damaged:
      return False  # it is not resumed from either: who looks for the newest one sets it aside, and says so

  for step in hosts.agree('undone', lambda: [*filter(is_undone, checkpoints.steps())]) if skips.rewinds else ():
    checkpoints.remove(step)


def from_parent(config: Experiment, plan: tuple[Segment, ...], parent: Parent) -> TrainState:
  """The state before the first step, with the parent's weights, and its optimizer state if that is asked for."""
  like, step_config = state_like(plan[0])
  if config.init_optimizer:
    try:
      _, opt = parent.checkpoints.restore(parent.step, like.params, like.opt)
    except ValueError as error:
      raise ValueError(f'init_optimizer=True goes on with the state of the same trained weights: {error}') from error
  params = load_params(parent.checkpoints, parent.step, config.model)
  key = jax.random.key(config.seed)
  state = jax.jit(functools.partial(begin, step_config), donate_argnums=0)(params, key)
  return dataclasses.replace(state, opt=opt) if config.init_optimizer else state


def inheritance(parent: Parent, workdir: Path) -> dict[str, Any]:
  """What a run's meta has of its parent: the lineage, and the Hugging Face config of an imported model."""
  where = {'path': str(parent.workdir.absolute()), 'from_here': os.path.relpath(parent.workdir, workdir)}
  of_parent = {'run': parent.meta['lineage']['run'], 'step': parent.step, **where}
  return {'lineage': lineage(of_parent), **({'hf': parent.meta['hf']} if 'hf' in parent.meta else {})}


def what_is_saved(params: Decoder) -> Any:
  """What of the parameters a checkpoint holds: the adapters, if there are any, for the rest does not change."""
  return lora.adapters(params) or params


def write_description(config: Experiment, workdir: Path, corpus: loader.Corpus, parent: Parent | None) -> None:
  """Writes what makes the workdir all that using the model needs: config, tokenizer, and what else belongs to it."""
  if not hosts.is_first():
    return
  with writing_to(workdir):
    for name in COMPANIONS if parent else ():
      if (parent.workdir / name).is_file():
        shutil.copyfile(parent.workdir / name, workdir / name)
    if corpus.chat_template is not None:
      write_atomically(workdir / 'chat_template.jinja', corpus.chat_template)
    write_atomically(workdir / 'tokenizer.json', corpus.tokenizer_path.read_text(encoding='utf-8'))
    write_atomically(workdir / 'config.json', json.dumps(as_saved(config), indent=2, allow_nan=False) + '\n')


def check_same_run(workdir: Path, saved: dict, now: dict, config: Experiment) -> None:
  """ValueError where what belongs to a workdir is not as it was saved: the config (JSON), stages that have begun, and where
  they are known the tokenizer and the rows of the corpora. Says what else of the config has changed."""
  begun = typed_json.decode(saved['config'], Experiment, 'config')
  for name, before, after in differences(as_saved(begun), as_saved(config), Experiment):
    if name.startswith(OF_THE_WORKDIR) and name not in MAY_MOVE or is_over(name, begun, saved.get('step')):
      raise ValueError(f'{workdir} was begun with {name}={before} and this config has {after}: '
                       'give a new --workdir, or set it back')
    say(f'changed  {name}: {before} -> {after}')
  if 'tokenizer' in now and saved['tokenizer'] != now['tokenizer']:
    raise ValueError(f'{workdir} was begun with another tokenizer than {now["corpus"]} has: give a new --workdir, or the '
                     'old --config.data.corpus')
  rows = now.get('rows', {})
  if other := [name for name in rows.keys() & saved.get('rows', {}).keys() if rows[name] != saved['rows'][name]]:
    raise ValueError(f'{workdir} was begun with other rows than {now["corpus"]} has ({", ".join(sorted(other))}): give a '
                     'new --workdir, or the old --config.data.corpus')


def is_over(name: str, config: Experiment, step: int | None) -> bool:
  """Whether a key of the config, such as stages[0].tokens, is of what a run has done by that step (None: not known)."""
  matched = re.match(r'stages\[(\d+)\]\.(\w+)', name)
  if not matched or matched[2] in OF_THE_MACHINE or step is None:
    return name == 'stages'  # a run without stages, and now it has some; or the reverse
  plan = stages.segments(config)
  segment = plan[stages.segment_of(plan, step)]
  return int(matched[1]) < segment.stage or int(matched[1]) == segment.stage and matched[2] not in ('tokens', 'lr')


def as_saved(config: Experiment) -> dict[str, Any]:
  """The config as JSON, in files that others read: without secrets."""
  return redact_json(typed_json.encode(config, Experiment))


def differences(before, after, cls: type) -> list[tuple[str, Any, Any]]:
  """(key, value before, value after) of each leaf in which two instances of `cls`, or the JSON of such, differ."""
  trees = (typed_json.decode(tree, cls) if isinstance(tree, dict) else tree for tree in (before, after))  # fields since then
  old, new = (typed_json.flat(typed_json.encode(tree, cls)) for tree in trees)
  return [(name, old.get(name, 'absent'), new.get(name, 'absent')) for name in sorted(old.keys() | new.keys())
          if old.get(name, 'absent') != new.get(name, 'absent')]


def is_done(workdir: Path, config: Experiment, n_steps: int) -> bool:
  """Whether the run has ended with as many steps as are asked for. ValueError if it was another run."""
  def steps_done():
    return json.loads((workdir / 'DONE').read_text())['steps'] if (workdir / 'DONE').exists() else 0

  if hosts.agree('done', steps_done) < n_steps:
    return False
  check_same_run(workdir, {'config': json.loads((workdir / 'config.json').read_text())}, {}, config)
  return True


@contextlib.contextmanager
def held(workdir: Path):
  """The workdir, held against a second run in it while the context lasts. ValueError if one is there."""
  def lock():
    with writing_to(workdir):
      workdir.mkdir(parents=True, exist_ok=True)
    directory = os.open(workdir, os.O_RDONLY)
    stack.callback(os.close, directory)
    try:
      fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill lets it go
    except BlockingIOError as error:
      raise ValueError(f'another process is running in {workdir}: wait for it, end it, or give another --workdir') from error
    except OSError as error:
      say(f'warning  {workdir} is on a file system without locks ({error.strerror}): nothing keeps a second run out of it')

  with contextlib.ExitStack() as stack:
    hosts.agree('workdir', lock)
    yield


# -- small things


@contextlib.contextmanager
def writing_to(workdir: Path):
  """OSErrors inside it name the workdir."""
  try:
    yield
  except OSError as error:
    raise OSError(f'cannot write to {workdir} ({error.strerror}): give another --workdir') from error


def write_atomically(path: Path, text: str) -> None:
  partial = path.with_suffix('.partial')
  with open(partial, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
