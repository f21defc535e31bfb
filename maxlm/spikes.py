"""Spikes of loss and gradient: the step that is skipped, and the rewind past data that go on making them.

On the device, without the host: a step whose loss or gradient norm is far above those of the last steps, or no number,
leaves parameters and optimizer state as they are (`judge`; the rule is that of OLMo-core's SkipStep optimizers, OLMo 2,
arXiv 2501.00656, section 3). On the host: where the loss stays up, the run goes back to a checkpoint and takes other
batches from there (PaLM, arXiv 2204.02311, section 5.1); `Skips` is the list of such rewinds, and which batch a step takes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maxlm import typed_json

SUSTAINED = 16  # steps that a loss stays up before the run is to go back


@dataclasses.dataclass(kw_only=True, slots=True)
class SpikeConfig:
  """sigmas: a step is skipped whose loss or gradient norm is more than so many standard deviations above the mean of the
  last ones; 0 or None: never, nor does the run go back. window: last steps that count. min_steps: of those before any is
  skipped. max_rewinds: of a run, then it stops. rewind_steps: how far the run goes back at least, where the loss stays up.
  jump_steps: batches that are left out there, after those that were undone.
  """

  sigmas: float | None = 6.0
  window: int = 128
  min_steps: int = 64
  max_rewinds: int = 3
  rewind_steps: int = 100
  jump_steps: int = 200

  def check(self) -> None:
    """ValueError for what has no meaning."""
    if self.sigmas is not None and self.sigmas < 0:
      raise ValueError(f'spikes.sigmas={self.sigmas} must be positive, or 0 to skip no step')
    if self.min_steps < 2:
      raise ValueError(f'spikes.min_steps={self.min_steps}: a standard deviation needs at least 2')
    if self.window < self.min_steps + SUSTAINED:
      raise ValueError(f'spikes.window={self.window} must be at least {self.min_steps + SUSTAINED}: min_steps + {SUSTAINED}')
    for name in ('max_rewinds', 'rewind_steps', 'jump_steps'):
      if getattr(self, name) < 0:
        raise ValueError(f'spikes.{name}={getattr(self, name)} must be 0 or more')


# -- on the device: which step is skipped


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Recent:
  """The last steps, in rings: step i is at i % window. Replicated."""

  loss: jax.Array  # fp32 [window]; inf where it or the gradient norm was no number
  grad_norm: jax.Array  # fp32 [window]; the same
  counted: jax.Array  # bool [window]: finite, and not skipped
  n: jax.Array  # int32: steps that were entered


def no_steps(config: SpikeConfig) -> Recent:
  """The window before the first step."""
  values = jnp.zeros(config.window, jnp.float32)
  return Recent(loss=values, grad_norm=values, counted=jnp.zeros(config.window, bool), n=jnp.zeros((), jnp.int32))


def judge(config: SpikeConfig, recent: Recent, loss: jax.Array,
          grad_norm: jax.Array) -> tuple[jax.Array, jax.Array, Recent]:
  """(whether to take the step: bool, whether a spike is sustained: bool, the window with the step), to be traced.

  A step is taken if loss and gradient norm (fp32 scalars) are finite and neither exceeds mean + sigmas * std of those of
  the window that were taken, once it has min_steps of them. What was skipped does not count: one spike must not hide the
  next. So a loss that stays on another level is taken again when less than min_steps of the window are from before. A spike
  is sustained if each of the last 16 losses exceeds the limit of the rest of a full window, or is no number, whatever the
  rest.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  taken = finite & (loss <= _limit(config, recent.loss, recent.counted)) & (
    grad_norm <= _limit(config, recent.grad_norm, recent.counted))
  if not config.sigmas:
    taken = jnp.ones((), bool)
  window = recent.loss.shape[0]
  place, n = jnp.arange(window), recent.n + 1
  here = place == recent.n % window
  recent = Recent(loss=jnp.where(here, jnp.where(finite, loss, jnp.inf), recent.loss),
                  grad_norm=jnp.where(here, jnp.where(finite, grad_norm, jnp.inf), recent.grad_norm),
                  counted=jnp.where(here, finite & taken, recent.counted), n=n)
  last = (recent.n - 1 - place) % window < SUSTAINED
  limit = jnp.where(n >= window, _limit(config, recent.loss, recent.counted & ~last), jnp.inf)
  above = ~jnp.isfinite(recent.loss) | (recent.loss > limit)
  spike = jnp.all(above | ~last) & (n >= SUSTAINED)
  return taken, spike if config.sigmas else jnp.zeros((), bool), recent


def _limit(config: SpikeConfig, values: jax.Array, counted: jax.Array) -> jax.Array:
  """mean + sigmas * std of those that count; inf where they are too few."""
  n = jnp.sum(counted)
  mean = jnp.sum(jnp.where(counted, values, 0)) / jnp.maximum(n, 1)
  variance = jnp.sum(jnp.where(counted, values - mean, 0)**2) / jnp.maximum(n - 1, 1)
  return jnp.where(n >= config.min_steps, mean + (config.sigmas or 0) * jnp.sqrt(variance), jnp.inf)


# -- on the host: which batch a step takes


@dataclasses.dataclass(frozen=True, slots=True)
class Rewind:
  """After `at` steps the run went back to where `to` were done. batches: [first, last) that are not used from there on."""

  at: int
  to: int
  batches: tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Skips:
  """The rewinds of a run, in the order they happened. ValueError where one does not follow from those before it.

  Batches are used in their order, those left out that any rewind skipped: so no batch is used twice by the steps that
  count, and a rewind to before another one does not jump twice.
  """

  rewinds: tuple[Rewind, ...] = ()

  def __post_init__(self):
    for i, rewind in enumerate(self.rewinds):
      (first, last), before = rewind.batches, self.rewinds[:i]
      if not 0 <= rewind.to <= rewind.at:
        raise ValueError(f'skips[{i}]: a run that has done {rewind.at} steps cannot go back to {rewind.to}')
      undone = _batch_of(before, rewind.to), _batch_of(before, rewind.at)
      if first != undone[0] or last < undone[1]:
        raise ValueError(f'skips[{i}]: batches {first} to {last} are not those that steps {rewind.to} to {rewind.at} took: '
                         f'{undone[0]} to {undone[1]}')

  def batch_of(self, step: int) -> int:
    """The batch that is taken when `step` steps are done: the step-th (from 0) of those that are not skipped."""
    return _batch_of(self.rewinds, step)

  def rewound(self, *, at: int, to: int, jump_steps: int) -> 'Skips':
    """These, and one more: after `at` steps back to `to`, past the batches of the steps undone and so many more."""
    batches = self.batch_of(to), self.batch_of(at) + jump_steps
    return Skips((*self.rewinds, Rewind(at=at, to=to, batches=batches)))

  def undid(self, step: int, saved: 'Skips') -> bool:
    """Whether a checkpoint of that step, with the skips that were saved in it, is of steps that were undone since."""
    return any(rewind.to < step for rewind in self.since(saved))

  def since(self, earlier: 'Skips') -> tuple[Rewind, ...]:
    """The rewinds after those of an earlier list. ValueError if that is not the beginning of this one."""
    n = len(earlier.rewinds)
    if self.rewinds[:n] != earlier.rewinds:
      raise ValueError(f'these rewinds are of different runs: {self.to_json()} does not begin with {earlier.to_json()}')
    return self.rewinds[n:]

  def to_json(self) -> list:
    """[{'at': 150, 'to': 100, 'batches': [100, 350]}, …], for the checkpoint's meta and WORKDIR/rewinds.json."""
    return typed_json.encode(self.rewinds, tuple[Rewind, ...])

  @classmethod
  def of_json(cls, plain) -> 'Skips':
    """What `to_json` gave. ValueError, naming the entry, for anything else."""
    return cls(typed_json.decode(plain, tuple[Rewind, ...], 'skips'))


def _batch_of(rewinds: tuple[Rewind, ...], step: int) -> int:
  batch, end = step, 0
  for first, last in sorted(rewind.batches for rewind in rewinds):
    first = max(first, end)  # ranges may overlap
    if first <= batch and first < last:
      batch += last - first
    end = max(end, last)
  return batch
