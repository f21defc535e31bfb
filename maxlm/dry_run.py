"""What a run would be, before a dollar is spent: its stages, what they read, what they cost (`maxlm.train --dry_run`).

A config that does not add up is refused with the reason, as `maxlm.train` would refuse it (`stages.check`). A config that is
meant for a pod is checked for it, whatever this machine is. Where a corpus is there, its sizes count; where not, those that
the config declares (`data.source_tokens`).
"""

from pathlib import Path

import jax
import numpy as np

from data_pipeline import loader
from maxlm import flops, stages
from maxlm.config import Experiment
from maxlm.data import Feed, feeds
from maxlm.metrics import si
from maxlm.models.decoder import Decoder
from maxlm.schedule import rate_at
from maxlm.sharding import AXES, abstract_mesh
from maxlm.stages import Segment
from maxlm.start import Parent


def dry_run(config: Experiment, parent: Parent | None) -> str:
  """The tables, for people. ValueError for a run that would be refused; nothing is built or written."""
  platform, n_devices = ('tpu', config.pod_devices) if config.pod else (jax.default_backend(), jax.device_count())
  stages.check(config, platform, n_devices)
  plan = stages.segments(config)
  drawn = stages.draws(plan, known_feeds(config, plan))
  stages.check_epochs(config, drawn)
  with jax.sharding.use_abstract_mesh(abstract_mesh(plan[0].config.mesh, n_devices)):
    params = jax.eval_shape(lambda: Decoder(config.model, jax.random.key(0)))
  n_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
  where = f'for {config.pod}' if config.pod else 'for this machine'
  total = sum(flops_of(segment) for segment in plan)
  tokens = sum(s.config.tokens for s in plan if s.is_last)
  lines = [f'{config.name}: {n_parameters:,} parameters, {where}, {n_devices} devices; {si_tokens(tokens)} tokens in '
           f'{plan[-1].stop:,} steps, {total:.3g} FLOPs', '', *stage_table(plan, n_devices), '', *source_table(drawn), '',
           *lineage_lines(plan, parent)]
  return '\n'.join(lines)


def known_feeds(config: Experiment, plan: tuple[Segment, ...]) -> tuple[Feed, ...] | None:
  """Where the batches come from, if all corpora are there; they are not built."""
  opened = {}
  for data in (segment.config.data for segment in plan):
    if not (Path(data.corpus) / 'manifest.json').exists():
      return None
    key = data.corpus, data.seq_len
    opened[key] = opened.get(key) or loader.open_corpus(*key)
  return feeds([(segment.config.data, segment.stop - segment.first) for segment in plan],
               [opened[segment.config.data.corpus, segment.config.data.seq_len] for segment in plan], config.seed)


def stage_table(plan: tuple[Segment, ...], n_devices: int) -> list[str]:
  """A line for each part of the run: a stage, or the steps of one batch size of it."""
  rows = [('stage', 'steps', 'tokens', 'rows x length', 'tokens/step', 'learning rate', 'mesh', 'FLOPs')]
  for segment in plan:
    data, schedule = segment.config.data, segment.config.optim
    over = schedule.horizon_tokens or segment.config.tokens
    done = segment.stage_tokens + (segment.stop - segment.first) * segment.config.tokens_per_step
    begin = rate_at(schedule, segment.stage_tokens + segment.config.tokens_per_step, over)
    rates = dict.fromkeys(f'{rate:.3g}' for rate in (begin, peak_within(segment, over), rate_at(schedule, done, over)))
    sizes = zip(AXES, segment.config.mesh.shape(n_devices))
    mesh = ' '.join(f'{axis}={size}' for axis, size in sizes if size > 1) or 'one device'
    rows.append((segment.name, f'{segment.stop - segment.first:,}', si_tokens(done - segment.stage_tokens),
                 f'{data.batch_size} x {data.seq_len}', si_tokens(segment.config.tokens_per_step), ' > '.join(rates),
                 mesh, f'{flops_of(segment):.3g}'))
  return aligned(rows)


def peak_within(segment: Segment, over: int) -> float:
  """The highest learning rate of its steps."""
  schedule, per_step = segment.config.optim, segment.config.tokens_per_step
  steps = np.unique(np.linspace(1, segment.stop - segment.first, 64).astype(np.int64))
  tokens = [segment.stage_tokens + int(n) * per_step for n in steps]
  tokens += [schedule.warmup_tokens] * (tokens[0] < schedule.warmup_tokens < tokens[-1])
  return max(rate_at(schedule, n, over) for n in tokens)


def source_table(drawn: list[stages.Draw]) -> list[str]:
  """A line for each stage and source."""
  if not drawn:
    return ['sources   all of the corpus by their sizes; it is not there, so they are not known']
  rows = [('stage', 'source', 'share', 'tokens', 'epochs')]
  for draw in drawn:
    whole = sum(other.tokens for other in drawn if other.stage == draw.stage)
    epochs = 'size not known' if draw.epochs is None else f'{draw.epochs:.3g}'
    rows.append((draw.stage, draw.source, f'{draw.tokens / whole:.1%}', si_tokens(draw.tokens), epochs))
  sums = {}
  for draw in drawn:
    if draw.epochs is not None:
      sums.setdefault((draw.corpus, draw.source), []).append(draw)
  rows += [('all', source, '', si_tokens(sum(d.tokens for d in of)), f'{sum(d.epochs for d in of):.3g}')
           for (_, source), of in sums.items() if len(of) > 1]
  return aligned(rows)


def lineage_lines(plan: tuple[Segment, ...], parent: Parent | None) -> list[str]:
  """From which checkpoint each stage goes on."""
  ends = {segment.name: segment for segment in plan if segment.is_last}
  lines, before = [], None
  if parent is not None:
    how = 'goes on from' if parent.is_trunk else 'weights of'
    before = f'{how} step {parent.step:,} of {parent.workdir}'
  for name, segment in ends.items():
    begun = next(s.first for s in plan if s.name == name)
    if parent is not None and parent.is_trunk and segment.stop <= parent.step:
      lines.append((f'{name}', 'done', f'in {parent.workdir}'))
      continue
    lines.append((name, f'steps {begun:,} to {segment.stop:,}', before or 'fresh weights'))
    before = f'goes on from step {segment.stop:,} of {name}'
  return aligned([('stage', '', 'begins with'), *lines])


def flops_of(segment: Segment) -> float:
  """Of all its steps, where each row is one document: of packed rows attention has less to do."""
  config, steps = segment.config, segment.stop - segment.first
  return flops.flops_per_token(config.model, config.data.seq_len) * config.tokens_per_step * steps


def si_tokens(n: int) -> str:
  """si_tokens(5_930_000_000_000) == '5.93T'."""
  return f'{n / 1e12:.4g}T' if n >= 1e12 else f'{n / 1e9:.4g}B' if n >= 1e9 else si(n)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
