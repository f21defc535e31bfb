"""Stages: pre-training, mid-training, long context and anneal as parts of one run.

A stage (`config.Stage`) says what it changes; the rest is as in the run's config. All other code sees it as an `Experiment`
of its own without stages (`flat`). Steps are counted through the run. A `Segment` is what one compiled program trains: a
stage, or of a stage whose batch grows, the steps of one batch size.

What a stage changes in the layers stays so for those after it; the parameters are the same throughout. A stage's first step
starts with an empty window of losses (`maxlm.spikes`), for the loss moves to another level.
"""

import dataclasses
import math

from maxlm.config import Experiment, Stage, validate
from maxlm.data import Feed
from maxlm.layers.attention import AttentionSpec
from maxlm.layers.mla import MlaSpec
from maxlm.layers.parallel import ParallelSpec
from maxlm.layers.rope import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling
from maxlm.models.decoder import DecoderConfig, Mixer
from maxlm.schedule import Schedule, rate_at
from maxlm.step import StepConfig
from maxlm.tasks import check as check_tasks

NAME = 'train'  # of the stage of a run that has no stages


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
  """Steps [first, stop) of a run: a stage, or the part of one with one batch size.

  config: the run as these steps see it, without stages; its tokens are those of the stage. stage: which one, from 0. tokens:
  of the run that are done before the segment, stage_tokens: of the stage. is_first, is_last: of its stage.
  """

  config: Experiment
  stage: int
  name: str
  first: int
  stop: int
  tokens: int
  stage_tokens: int
  is_first: bool
  is_last: bool

  def tokens_at(self, step: int) -> int:
    """Tokens of the run that are done after that step of the segment."""
    return self.tokens + (step - self.first) * self.config.tokens_per_step

  def step_config(self, platform: str, n_sources: int) -> StepConfig:
    """What `step.train_step` needs for these steps."""
    return dataclasses.replace(
      self.config.step_config(platform, n_sources), total_tokens=self.config.optim.horizon_tokens or self.config.tokens,
      first_step=self.first, tokens_before=self.stage_tokens)


def segments(config: Experiment) -> tuple[Segment, ...]:
  """The whole run, in order."""
  plan, first, tokens = [], 0, 0
  for i, stage in enumerate(config.stages or (None,)):
    of_stage = flat(config, i) if stage else config
    sizes, done, parts = _batch_sizes(stage, of_stage), 0, []
    for n_steps, rows in sizes:
      part = dataclasses.replace(of_stage, data=dataclasses.replace(of_stage.data, batch_size=rows))
      parts.append((part, n_steps, done))
      done += n_steps * part.tokens_per_step
    for part, n_steps, before in parts:
      plan.append(Segment(
        config=dataclasses.replace(part, tokens=done), stage=i, name=stage.name if stage else NAME,
        first=first, stop=first + n_steps, tokens=tokens, stage_tokens=before, is_first=part is parts[0][0],
        is_last=part is parts[-1][0]))
      first, tokens = first + n_steps, tokens + n_steps * part.tokens_per_step
  return tuple(plan)


def segment_of(plan: tuple[Segment, ...], step: int) -> int:
  """Which segment goes on when `step` steps are done; the last one when all are."""
  return next((i for i, segment in enumerate(plan) if step < segment.stop), len(plan) - 1)


def _batch_sizes(stage: Stage | None, config: Experiment) -> list[tuple[int, int]]:
  """(steps, rows a step) of a stage, in order."""
  steps, done, length = [], 0, config.data.seq_len
  for ramp in stage.ramp if stage else ():
    steps.append((max(0, math.ceil((min(ramp.until_tokens, config.tokens) - done) / (ramp.rows * length))), ramp.rows))
    done += steps[-1][0] * ramp.rows * length
  return [*steps, (math.ceil((config.tokens - done) / (config.data.batch_size * length)), config.data.batch_size)]


def flat(config: Experiment, i: int) -> Experiment:
  """The run as its stage i sees it, as a run without stages, with the tokens of the stage."""
  stage, model = config.stages[i], config.model
  for before in config.stages[:i + 1]:
    model = model and stretched(model, before)
  data = {name: getattr(stage, name) for name in ('corpus', 'mixture', 'seq_len', 'batch_size', 'mask')}
  changed = {name: getattr(stage, name) for name in ('mesh', 'compute', 'microbatches', 'evals')}
  schedule = {field.name: getattr(stage.lr, field.name) for field in dataclasses.fields(Schedule)}
  return dataclasses.replace(
    config, stages=(), tokens=stage.tokens, model=model, optim=dataclasses.replace(config.optim, **schedule),
    data=dataclasses.replace(config.data, **_without_none(data)), **_without_none(changed))


def _without_none(values: dict) -> dict:
  return {name: value for name, value in values.items() if value is not None}


def stretched(model: DecoderConfig, stage: Stage) -> DecoderConfig:
  """The architecture with a stage's changes of attention layers, which leave the parameters as they are."""
  pattern = tuple(dataclasses.replace(layer, mixer=_stretched(layer.mixer, stage)) for layer in model.pattern)
  return dataclasses.replace(model, pattern=pattern)


def _stretched(mixer: Mixer | None, stage: Stage) -> Mixer | None:
  match mixer:
    case ParallelSpec():
      return dataclasses.replace(mixer, mixers=tuple(_stretched(part, stage) for part in mixer.mixers))
    case AttentionSpec() | MlaSpec():
      window = getattr(mixer, 'window', None)
      how = stage.full if window is None else stage.sliding
      if how is None:
        return mixer
      changes = {'window': how.window} if how.window is not None else {}
      if mixer.rope is not None:
        changes['rope'] = dataclasses.replace(mixer.rope, **_without_none({'theta': how.theta, 'scaling': how.scaling}))
      return dataclasses.replace(mixer, **changes)
  return mixer


# -- what does not add up


def check(config: Experiment, platform: str, n_devices: int) -> None:
  """ValueError, in one line with the fix, for stages that are no recipe, and for what cannot run on that many devices of
  that platform."""
  for name, value in {'tokens': config.tokens, 'optim.peak_lr': config.optim.peak_lr}.items() if config.stages else ():
    if value:
      raise ValueError(f'{name}={value}: in a run with stages each has its own: leave it out')
  names = [stage.name for stage in config.stages]
  for i, stage in enumerate(config.stages):
    where = f'stages[{i}] ({stage.name!r})'
    if not stage.name.replace('-', '').replace('_', '').isalnum():
      raise ValueError(f'stages[{i}].name={stage.name!r}: a name has letters, digits, - and _')
    if stage.name in names[:i]:
      raise ValueError(f'{where}: there is another stage of that name')
    if stage.tokens < 1:
      raise ValueError(f'{where}.tokens={stage.tokens} must be at least 1')
    _check_ramp(where, stage, config.data.batch_size if stage.batch_size is None else stage.batch_size)
    _check_layers(where, config, i)
  longest = max(segment.config.data.seq_len for segment in segments(config))
  for segment in segments(config):
    where = f'stages[{segment.stage}] ({segment.name!r})'
    check_tasks(segment.config.evals.tasks, longest)
    if config.stages and segment.is_first:
      segment.config.optim.check_schedule(segment.config.tokens, f'{where}.lr')
    held_out = dataclasses.replace(segment.config.data, seq_len=config.data.seq_len)  # its rows are scored in every stage
    try:
      validate(segment.config, platform, n_devices)
      validate(dataclasses.replace(segment.config, data=held_out), platform, n_devices)
    except ValueError as error:
      raise ValueError(f'{where}: {error}' if config.stages else str(error)) from error


def _check_ramp(where: str, stage: Stage, batch_size: int) -> None:
  ends, rows = [ramp.until_tokens for ramp in stage.ramp], [ramp.rows for ramp in stage.ramp]
  if ends != sorted(set(ends)) or [*rows, batch_size] != sorted({*rows, batch_size}) or min(rows, default=1) < 1:
    raise ValueError(f'{where}.ramp: tokens and rows must grow from entry to entry, up to batch_size={batch_size}')
  if ends and ends[-1] >= stage.tokens:
    raise ValueError(f'{where}.ramp ends after {ends[-1]:,} tokens and the stage has {stage.tokens:,}: end it before')


def _check_layers(where: str, config: Experiment, i: int) -> None:
  """ValueError for a change of layers that changes none, and for rows that reach past what rotary positions are made for."""
  if config.model is None:  # that of the run's parent, which is not known yet
    return
  stage, model = config.stages[i], flat(config, i).model
  for kind in ('full', 'sliding'):
    alone = dataclasses.replace(stage, **{other: None for other in ('full', 'sliding') if other != kind})
    if getattr(stage, kind) is not None and stretched(config.model, alone) == config.model:
      raise ValueError(f'{where}.{kind} changes nothing in any layer of the model: leave it out')
  length = config.data.seq_len if stage.seq_len is None else stage.seq_len
  for spec in ropes(model):
    match spec.scaling:
      case YarnScaling(factor=factor, original_length=original) | Llama3Scaling(factor=factor, original_length=original):
        if length > factor * original:
          raise ValueError(f'{where}: rows of {length:,} tokens, and rotary positions that are stretched {factor:g} times '
                           f'from {original:,} reach {factor * original:,.0f}: raise scaling.factor')
      case LinearScaling(factor=factor) if length > factor * config.data.seq_len:
        raise ValueError(f'{where}: rows of {length:,} tokens, and rotary positions that are stretched {factor:g} times '
                         f'reach {factor * config.data.seq_len:,.0f}: raise scaling.factor')


def ropes(model: DecoderConfig) -> list[RopeSpec]:
  """The rotary positions of each full attention layer of the pattern that has them."""
  mixers = [part for layer in model.pattern for part in getattr(layer.mixer, 'mixers', (layer.mixer,))]
  return [mixer.rope for mixer in mixers if isinstance(mixer, AttentionSpec | MlaSpec)
          and mixer.rope is not None and getattr(mixer, 'window', None) is None]


# -- what is read of the sources


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
  """What a stage reads of a source: rows are of its length, padding included. epochs: how often it is read through; None
  where its size is not known."""

  stage: str
  corpus: str
  source: str
  tokens: int
  epochs: float | None


def draws(plan: tuple[Segment, ...], feeds: tuple[Feed, ...] | None = None) -> list[Draw]:
  """Of each stage and source of a run. feeds: None where the corpora are not there; then the config's word counts for their
  sizes, and sources without weights are not known."""
  found = {}
  for i, segment in enumerate(plan):
    data, steps = segment.config.data, segment.stop - segment.first
    tokens = steps * segment.config.tokens_per_step
    if feeds:
      feed = feeds[i]
      rows = feed.schedule.counts(feed.first_row, feed.first_row + steps * feed.batch_size)
      parts = {source: (n * data.seq_len, n / feed.corpus.rows(source)) for source, n in rows.items() if n}
    else:
      parts = {source: (tokens * weight // sum(data.mixture.values()), None) for source, weight in data.mixture.items()}
      parts = {source: (n, n / data.source_tokens[source] if source in data.source_tokens else None)
               for source, (n, _) in parts.items()}
    for source, (n, epochs) in parts.items():
      key = segment.name, data.corpus, source
      before = found.get(key, (0, 0.0))
      found[key] = before[0] + n, None if epochs is None else before[1] + epochs
  return [Draw(stage=stage, corpus=corpus, source=source, tokens=n, epochs=epochs)
          for (stage, corpus, source), (n, epochs) in found.items()]


def check_epochs(config: Experiment, drawn: list[Draw]) -> None:
  """ValueError for a source that all stages together read more often than `data.max_epochs` allows."""
  for corpus, source in dict.fromkeys((draw.corpus, draw.source) for draw in drawn):
    parts = [draw for draw in drawn if (draw.corpus, draw.source) == (corpus, source) and draw.epochs]
    epochs, allowed = sum(draw.epochs for draw in parts), config.data.max_epochs
    limit = allowed.get(source, allowed.get('*'))
    if limit is not None and epochs > limit * 1.0001:
      said = ', '.join(f'{draw.epochs:.2f} in {draw.stage}' for draw in parts)
      raise ValueError(f'source {source!r} of {corpus} is read {epochs:.2f} times in this run ({said}) and data.max_epochs '
                       f'allows {limit:g}: lower its weight or the tokens of these stages, or raise the limit')


# -- parts of a recipe


def chosen(config: Experiment, names: tuple[str, ...]) -> Experiment:
  """The run with its first stages only: those of these names. ValueError if they are not the first ones."""
  known = [stage.name for stage in config.stages]
  if list(names) != known[:len(names)]:
    raise ValueError(f'--stages={",".join(names)}: a run begins with its first stage; this config has {_list(known)}. A '
                     'later one begins from a checkpoint of the stage before: --branch=WORKDIR@STEP')
  return dataclasses.replace(config, stages=config.stages[:len(names)])


def branched(config: Experiment, step: int, names: tuple[str, ...]) -> Experiment:
  """The run that leaves this one after `step` steps, for the stages of these names.

  They follow the stage that the step belongs to, or begin with it, to go on with it. The steps before are as they were: the
  stage that is left ends there. ValueError where these stages do not come next, and where the learning rate is on its way
  down.
  """
  plan, known = segments(config), [stage.name for stage in config.stages]
  segment = next((s for s in plan if s.first < step <= s.stop), None)
  if segment is None:
    raise ValueError(f'--branch: step {step:,} is none of the {plan[-1].stop:,} of this config')
  here = segment.stage
  if unknown := [name for name in names if name not in known]:
    raise ValueError(f'--stages={",".join(names)}: there is no stage {unknown[0]!r} in this config, it has {_list(known)}')
  at = known.index(names[0])
  if list(names) != known[at:at + len(names)] or at not in (here, here + 1):
    follows = f', after it {known[here + 1]!r}' if here + 1 < len(known) else ', the last one'
    raise ValueError(f'--branch: step {step:,} is in stage {known[here]!r}{follows}; --stages={",".join(names)} '
                     f'needs a checkpoint of stage {known[max(at - 1, 0)]!r}, or stages in their order')
  if at == here:
    return dataclasses.replace(config, stages=config.stages[:at + len(names)])
  stage, ended = config.stages[here], segment.is_last and step == segment.stop
  done = segment.stage_tokens + (step - segment.first) * segment.config.tokens_per_step
  if not ended:
    total = stage.lr.horizon_tokens or segment.config.tokens
    rate, peak = rate_at(segment.config.optim, done, total), stage.lr.peak_lr
    if rate < 0.99 * peak:
      raise ValueError(f'--branch: at step {step:,} the learning rate of stage {stage.name!r} is {rate:.3g}, below its peak '
                       f'of {peak:.3g}: branch from its stable part, or from its end, step {_end(plan, here):,}')
    steady = dataclasses.replace(stage.lr, schedule='wsd', decay_tokens=0, horizon_tokens=None, end_lr=None)
    ramp = tuple(ramp for ramp in stage.ramp if ramp.until_tokens < done)
    rows = segment.config.data.batch_size
    own = None if stage.batch_size is None and rows == config.data.batch_size else rows  # written as the trunk has it
    stage = dataclasses.replace(stage, tokens=done, lr=steady, ramp=ramp, batch_size=own)
  return dataclasses.replace(config, stages=(*config.stages[:here], stage, *config.stages[at:at + len(names)]))


def _end(plan: tuple[Segment, ...], stage: int) -> int:
  return max(segment.stop for segment in plan if segment.stage == stage)


def _list(names: list[str]) -> str:
  return ', '.join(names) or 'no stages'
