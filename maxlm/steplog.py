"""What a run says of its steps: the record, the progress line, and a word where training goes wrong."""

import json
import math

import jax

from data_pipeline import loader
from maxlm import flops, hosts
from maxlm.config import Experiment
from maxlm.data import mixture
from maxlm.evals import Score, total
from maxlm.hosts import say
from maxlm.metrics import MetricsWriter, Progress, StepClock
from maxlm.models.decoder import DecoderConfig, expert_layers
from maxlm.start import write_atomically, writing_to


class StepLog:
  """The record and the progress line of the steps, each fetched when the next one is on its way.

  Every process fetches, and comes to the same conclusions; the first one writes.
  """

  def __init__(self, config: Experiment, workdir, corpus: loader.Corpus, first_step: int, batch_of):
    """batch_of: the batch that a step takes (`maxlm.spikes.Skips`)."""
    self._config, self._workdir, self._corpus, self._batch_of = config, workdir, corpus, batch_of
    self._sources = mixture(config.data, corpus).sources
    self._writer = None
    if hosts.is_first():
      with writing_to(workdir):
        self._writer = MetricsWriter(workdir, resumed_from=first_step or None)
    self._progress, self._clock = Progress(config.n_steps), StepClock()
    self._peak = flops.peak_flops(jax.devices()[0])  # FLOP/s of one device
    self._pending = None  # step, metrics on device, FLOPs
    self.trouble = None  # (step, what) where training has gone wrong: the run may not go on from there

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
    for source, tokens, loss in zip(self._sources, metrics['tokens_by_source'], metrics['loss_by_source']):
      values[f'tokens/{source}'] = int(tokens)
      if tokens:
        values[f'loss/{source}'] = float(loss)
    values |= router_values(self._config.model, metrics['routers'])
    values['skipped'] = int(metrics['skipped'])
    if seconds:
      values['tokens_per_second'] = self._config.tokens_per_step / seconds
      if self._peak:
        values['mfu'] = step_flops / seconds / (self._peak * jax.device_count())
    batch = '{:08x}{:08x}'.format(*metrics['batch_digest'].tolist())
    if self._writer:
      with writing_to(self._workdir):
        self._writer.write(step, values, batch=batch)
      self._progress.show(step, values, seconds)
      if values['skipped']:
        self._progress.print(f'skipped  the update of step {step:,}: loss {values["loss"]:.4g}, gradient norm '
                             f'{values["grad_norm"]:.4g}, far above those before it')
    bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])]
    if self.trouble is None and (bad or metrics['spike']):
      what = f'{bad[0]} is {values[bad[0]]}' if bad else f'the loss has risen to {values["loss"]:.4g} and stays there'
      self.trouble = step, what
      self._keep_rows(step, values, batch)

  def _keep_rows(self, step: int, values: dict[str, float], batch: str) -> None:
    """Writes which rows the step was trained on, for a person to look at."""
    if not hosts.is_first():
      return
    index = self._batch_of(step - 1)
    rows = loader.row_ids(self._corpus, mixture(self._config.data, self._corpus), seed=self._config.seed,
                          batch_size=self._config.data.batch_size, step=index)
    about = {'step': step, 'trouble': self.trouble[1], 'batch': index, 'batch_digest': batch, 'rows': rows,
             'values': {name: value if math.isfinite(value) else str(value) for name, value in values.items()}}
    with writing_to(self._workdir):
      write_atomically(self._workdir / f'trouble-{step}.json', json.dumps(about, indent=1) + '\n')
    say(f'trouble  at step {step:,}: {self.trouble[1]}; its rows are in {self._workdir}/trouble-{step}.json')

  def evaluation(self, step: int, scores: dict[str, Score]) -> None:
    """Records held-out loss and bits per byte of each source and of all."""
    self._clock.pause()
    if not self._writer:
      return
    scores = {**scores, 'all': total(scores)}
    with writing_to(self._workdir):
      self._writer.write(step, {f'eval/{name}/{source}': getattr(score, name)
                                for source, score in scores.items() for name in ('loss', 'bits_per_byte')})
    self._progress.print(f'held out at step {step:,}: ' + '  '.join(
      f'{source} {score.bits_per_byte:.3f}' for source, score in scores.items()) + '  bits per byte')

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
