"""What a run says of its steps: the record, the progress line, and a word where training goes wrong."""

import json
import math

import jax

from data_pipeline import loader
from maxlm import flops, hosts
from maxlm.data import Feed
from maxlm.evals import Score
from maxlm.hosts import say
from maxlm.metrics import MetricsWriter, Progress, StepClock
from maxlm.models.decoder import DecoderConfig, expert_layers
from maxlm.stages import Segment
from maxlm.start import write_atomically, writing_to


class StepLog:
  """The record and the progress line of the steps, each fetched when the next one is on its way.

  Every process fetches, and comes to the same conclusions; the first one writes.
  """

  def __init__(self, workdir, first_step: int, n_steps: int, batch_of):
    """n_steps: of the run. batch_of: the batch that a step takes (`maxlm.spikes.Skips`)."""
    self._workdir, self._batch_of = workdir, batch_of
    self._segment = self._feed = self._config = None
    self._writer = None
    if hosts.is_first():
      with writing_to(workdir):
        self._writer = MetricsWriter(workdir, resumed_from=first_step or None)
    self._progress, self._clock = Progress(n_steps), StepClock()
    self._peak = flops.peak_flops(jax.devices()[0])  # FLOP/s of one device
    self._pending = None  # step, metrics on device, FLOPs
    self.trouble = None  # (step, what) where training has gone wrong: the run may not go on from there

  def enter(self, segment: Segment, feed: Feed) -> None:
    """The steps that come are of this part of the run."""
    self._segment, self._feed, self._config, self._clock = segment, feed, segment.config, StepClock()

  @property
  def seconds_per_step(self) -> float | None:
    return self._clock.seconds_per_step

  def step(self, step: int, metrics: dict, step_flops: float) -> None:
    """Takes the metrics of a step that has been started, and records the step before it. step_flops: of all devices."""
    self.flush()
    self._pending = step, metrics, step_flops

  def flush(self) -> None:
    """Waits for the last step and records it; `trouble` is set where its loss or gradient is no number any more, or where
    the loss has left its level."""
    if self._pending is None:
      return
    (step, metrics, step_flops), self._pending = self._pending, None
    metrics = jax.device_get(metrics)
    seconds = self._clock.finished(step)
    values = {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'learning_rate')}
    for source, tokens, loss in zip(self._feed.schedule.sources, metrics['tokens_by_source'], metrics['loss_by_source']):
      values[f'tokens/{source}'] = int(tokens)
      if tokens:
        values[f'loss/{source}'] = float(loss)
    values |= router_values(self._config.model, metrics['routers'])
    values |= {f'loss_ahead/{k}': float(nll) for k, nll in enumerate(metrics['ahead'], 2)}
    values |= {f'attention/{name}': float(value) for name, value in metrics['attention'].items()}
    values['skipped'], values['tokens'] = int(metrics['skipped']), self._segment.tokens_at(step)
    if seconds:
      values['tokens_per_second'] = self._config.tokens_per_step / seconds
      if self._peak:
        values['mfu'] = self.mfu(step_flops / seconds / jax.device_count())
    batch = '{:08x}{:08x}'.format(*metrics['batch_digest'].tolist())
    if self._writer:
      with writing_to(self._workdir):
        self._writer.write(step, values, batch=batch, stage=self._segment.name)
      self._progress.show(step, values, seconds)
      if values['skipped']:
        self._progress.print(f'skipped  the update of step {step:,}: loss {values["loss"]:.4g}, gradient norm '
                             f'{values["grad_norm"]:.4g}, far above those before it')
    bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])]
    if self.trouble is None and (bad or metrics['spike']):
      what = f'{bad[0]} is {values[bad[0]]}' if bad else f'the loss has risen to {values["loss"]:.4g} and stays there'
      self.trouble = step, what
      self._keep_rows(step, values, batch)

  def mfu(self, rate: float) -> float:
    """The share of a device's peak that so many FLOP/s are. A CPU's peak was measured, perhaps while others used it, too:
    steps that do more are the better measurement."""
    if jax.default_backend() == 'cpu':
      self._peak = max(self._peak, rate)
    return rate / self._peak

  def _keep_rows(self, step: int, values: dict[str, float], batch: str) -> None:
    """Writes which rows the step was trained on, for a person to look at."""
    if not hosts.is_first():
      return
    index = self._batch_of(step - 1)
    rows = loader.row_ids(self._feed.corpus, self._feed.schedule, seed=self._feed.seed, batch_size=self._feed.batch_size,
                          step=0, cursor=self._feed.row(index))
    about = {'step': step, 'trouble': self.trouble[1], 'batch': index, 'batch_digest': batch, 'rows': rows,
             'values': {name: value if math.isfinite(value) else str(value) for name, value in values.items()}}
    with writing_to(self._workdir):
      write_atomically(self._workdir / f'trouble-{step}.json', json.dumps(about, indent=1) + '\n')
    say(f'trouble  at step {step:,}: {self.trouble[1]}; its rows are in {self._workdir}/trouble-{step}.json')

  def evaluation(self, step: int, scores: dict[str, Score], tasks: dict[str, float], of_mean: dict[str, Score] | None = None,
                 ended: bool = False) -> None:
    """Records held-out loss and bits per byte by name, and what `maxlm.tasks` gave. of_mean: loss and bits per byte of the
    running mean of the weights. ended: it is the evaluation that a stage ends with."""
    self._clock.pause()
    if not self._writer:
      return
    kinds = {'': scores} | ({} if of_mean is None else {'_ema': of_mean})
    values = {f'eval/{name}{kind}/{source}': getattr(score, name) for kind, found in kinds.items()
              for source, score in found.items() for name in ('loss', 'bits_per_byte')}
    facts = {'stage': self._segment.name} | ({'ended': self._segment.name} if ended else {})
    with writing_to(self._workdir):
      self._writer.write(step, {**values, **tasks, 'tokens': self._segment.tokens_at(step)}, **facts)
    for kind, found in kinds.items():
      self._progress.print(f'held out at step {step:,}{", mean of weights" * bool(kind)}: ' + '  '.join(
        f'{source} {score.bits_per_byte:.3f}' for source, score in found.items()) + '  bits per byte')
    if right := {name.removeprefix('eval/tasks/'): share for name, share in tasks.items() if name.startswith('eval/tasks/')}:
      self._progress.print(f'right at step {step:,}: ' + '  '.join(f'{name} {share:.0%}' for name, share in right.items()))

  def goodput(self, step: int, shares: dict[str, float]) -> None:
    """Records where the time of the run has gone so far."""
    if self._writer and shares:
      with writing_to(self._workdir):
        self._writer.write(step, {f'goodput/{name}': round(share, 5) for name, share in shares.items()})

  def close(self) -> None:
    self._progress.close()
    if self._writer:
      self._writer.close()


def router_values(model: DecoderConfig, routers: dict) -> dict[str, float]:
  """moe/<what>/<layer> of each layer with experts, to four digits; and the load violation of the worst one. What: as
  `losses.router_metrics` says."""
  layers = sorted(i for _, of_kind in expert_layers(model) for i in of_kind)
  values = {f'moe/{name}/{layer}': float(f'{value:.4g}')
            for name, value_L in routers.items() for layer, value in zip(layers, value_L)}
  return values | {'moe/load_violation': float(max(routers['load_violation']))} if layers else values
