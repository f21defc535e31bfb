"""Steps that are skipped change nothing, and are those that the rule says; rewinds use each batch at most once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny
from maxlm.checkpoint import named_leaves, with_leaves
from maxlm.data import to_device
from maxlm.layers.mlp import MlpSpec
from maxlm.layers.moe import MoeSpec
from maxlm.models.decoder import DecoderConfig, LayerSpec
from maxlm.spikes import SUSTAINED, Recent, Rewind, Skips, SpikeConfig, judge, no_steps
from maxlm.step import StepConfig, TrainState, batch_digest, init_state, train_step
from tests.rows import random_batch

V = 64
SMALL = SpikeConfig(window=24, min_steps=8)


def step_config(**changes) -> StepConfig:
  """A layer of experts with selection biases, which an update moves too; a constant learning rate."""
  moe = MoeSpec(n_experts=8, k=2, experts=MlpSpec(d_ff=16), score='sigmoid', select_bias=True)
  config = tiny.get_config()
  config.model = DecoderConfig(vocab_size=V, d_model=16, n_layers=1, pattern=(LayerSpec(mixer=None, mlp=moe),))
  config.optim = dataclasses.replace(config.optim, peak_lr=0.01, warmup_tokens=0, decay_tokens=0)
  return dataclasses.replace(config.step_config('cpu', 1), **changes)


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
  return random_batch(np.random.default_rng(seed), 8, 16, V)


def easy_batch(seed: int) -> dict[str, np.ndarray]:
  """After each token comes the next number: what is soon learnt."""
  batch = batch_of(seed)
  batch['targets'] = (batch['tokens'] + 1) % V * batch['loss_mask']
  return batch


def window_of(values: np.ndarray, grad_norms: np.ndarray, config: SpikeConfig) -> Recent:
  """A window after steps that were all taken."""
  recent, n = no_steps(config), len(values)
  return dataclasses.replace(recent, loss=recent.loss.at[:n].set(values), grad_norm=recent.grad_norm.at[:n].set(grad_norms),
                             counted=recent.counted.at[:n].set(True), n=recent.n + n)


def bits(tree) -> dict[str, bytes]:
  return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()}


def stepper(config: StepConfig):
  return jax.jit(functools.partial(train_step, config))


# -- a step


@pytest.mark.parametrize('sizes', [{'fsdp': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
@pytest.mark.parametrize('why', ['loss', 'grad_norm', 'not a number'])
def test_a_skipped_step_changes_no_bit_of_parameters_and_optimizer(mesh_of, sizes, why):
  config, rng = step_config(), np.random.default_rng(0)
  low, high = rng.normal(1e-3, 1e-4, 64), rng.normal(1e3, 1e2, 64)
  with mesh_of(**sizes):
    run = stepper(config)
    state, _ = run(jax.jit(functools.partial(init_state, config))(jax.random.key(0)), to_device(batch_of(1)))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt))  # something is there to be changed
    recent = window_of(low if why == 'loss' else high, low if why == 'grad_norm' else high, config.spikes)
    state = dataclasses.replace(state, recent=recent)
    if why == 'not a number':
      scale_D = named_leaves(state.params)['final_norm.scale_D'].at[3].set(jnp.nan)
      state = dataclasses.replace(state, params=with_leaves(state.params, {'final_norm.scale_D': scale_D}))
    after, metrics = run(state, to_device(batch_of(2)))
    assert (int(metrics['skipped']), int(metrics['spike'])) == (1, 0)
    assert bits(after.params) == bits(state.params) and bits(after.opt) == bits(state.opt)
    assert int(after.step) == 2 and int(after.recent.n) == 65 and not after.recent.counted[64]
    assert (why == 'not a number') == bool(np.isinf(after.recent.loss[64])) == bool(np.isnan(metrics['loss']))


def test_a_step_that_is_taken_is_the_step_without_the_rule(mesh_of):
  """Bit for bit: the same program but for the selection."""
  with mesh_of(1):
    config = step_config()
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    run, without = stepper(config), stepper(step_config(spikes=SpikeConfig(sigmas=None)))
    other = state
    for seed in range(3):
      state, metrics = run(state, to_device(batch_of(seed)))
      other, unruled = without(other, to_device(batch_of(seed)))
      assert not int(metrics['skipped']) and bits(metrics) == bits(unruled)
  assert bits(state) == bits(other)


def test_a_batch_that_is_skipped_is_as_if_it_had_never_been(mesh_of):
  """A model that has learnt something meets rows of another kind: with the rule its weights are those without the rows."""
  config, off = step_config(spikes=SMALL), step_config(spikes=SpikeConfig(sigmas=0))
  with mesh_of(1):
    run, unruled = stepper(config), stepper(off)
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    for seed in range(60):
      state, metrics = run(state, to_device(easy_batch(seed)))
      assert not int(metrics['skipped'])
    odd, easy = ([to_device(make(seed)) for seed in (100, 101)] for make in (batch_of, easy_batch))

    def after(run, batches) -> tuple[TrainState, list[int]]:
      now, skipped = state, []
      for batch in batches:
        now, metrics = run(now, batch)
        skipped.append(int(metrics['skipped']))
      return now, skipped

    ruled, skipped = after(run, odd + easy)
    expected, none = after(run, easy)
    without, _ = after(unruled, odd + easy)
  assert skipped == [1, 1, 0, 0] and none == [0, 0]
  assert bits(ruled.params) == bits(expected.params) and bits(ruled.opt) == bits(expected.opt)
  assert bits(without.params) != bits(expected.params)


# -- the rule


def judged(config: SpikeConfig, recent: Recent, losses, norms) -> tuple[Recent, list[bool], list[bool]]:
  """What `judge` says of steps one after another: (the window after them, taken, spike)."""
  def step(recent, values):
    taken, spike, recent = judge(config, recent, *values)
    return recent, (taken, spike)
  recent, (taken, spike) = jax.jit(functools.partial(jax.lax.scan, step))(
    recent, (jnp.float32(np.asarray(losses)), jnp.float32(np.asarray(norms))))
  return recent, taken.tolist(), spike.tolist()


def decisions(config: SpikeConfig, losses, norms) -> tuple[list[bool], list[bool]]:
  """(taken, spike) of each step of a run."""
  return judged(config, no_steps(config), losses, norms)[1:]


def expected_decisions(config: SpikeConfig, losses, norms) -> tuple[list[bool], list[bool]]:
  """The rule again, on plain lists in double precision."""
  steps, taken, spikes = [], [], []  # steps: (loss, norm, counted)

  def limit(column: int, among) -> float:
    values = [step[column] for step in among if step[2]]
    return np.mean(values) + config.sigmas * np.std(values, ddof=1) if len(values) >= config.min_steps else np.inf

  for loss, norm in zip(losses, norms):
    finite = bool(np.isfinite(loss) and np.isfinite(norm))
    window = steps[-config.window:]
    taken.append(finite and bool(loss <= limit(0, window)) and bool(norm <= limit(1, window)))
    steps.append((loss if finite else np.inf, norm if finite else np.inf, taken[-1]))
    rest = limit(0, steps[-config.window:-SUSTAINED]) if len(steps) >= config.window else np.inf
    spikes.append(len(steps) >= SUSTAINED and all(loss > rest or loss == np.inf for loss, *_ in steps[-SUSTAINED:]))
  return taken, spikes


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('config', [SpikeConfig(), SpikeConfig(sigmas=3.0, window=40, min_steps=20)], ids=['6', '3'])
def test_decisions_are_those_of_the_rule_in_double_precision(config, seed):
  rng = np.random.default_rng(seed)
  losses = 5 - 2 * np.arange(700) / 700 + rng.normal(0, 0.03, 700)
  norms = np.exp(rng.normal(0, 0.2, 700))
  for start, n in ((130, 1), (131, 1), (200, 5), (300, SUSTAINED - 1), (400, 40)):
    losses[start:start + n] += rng.uniform(1, 5)
  norms[[150, 151, 260]] = 30.0, 1e6, np.inf
  losses[[3, 170]] = np.nan
  losses[500:] += 3.0  # for good
  expected = expected_decisions(config, losses, norms)
  assert decisions(config, losses, norms) == expected
  assert not all(expected[0][500:]) and np.mean(expected[0][600:]) > 0.9 and True in expected[1]


def steady(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(seed)
  return rng.normal(3, 0.02, n), rng.normal(1, 0.05, n)


def test_one_spike_does_not_hide_the_next():
  """Where skipped values count, as in OLMo-core, the second of these is within six deviations of the mean."""
  losses, norms = steady(140)
  norms[100], norms[101] = 1e4, 50.0
  taken, _ = decisions(SpikeConfig(), losses, norms)
  assert [i for i, flag in enumerate(taken) if not flag] == [100, 101]


def test_before_the_window_has_its_steps_only_what_is_no_number_is_skipped():
  losses, norms = steady(70)
  losses[63], losses[20], norms[30] = 9.0, np.nan, -np.inf
  taken, _ = decisions(SpikeConfig(min_steps=62), losses, norms)
  assert [i for i, flag in enumerate(taken) if not flag] == [20, 30]  # at 63 there are 61 that count


def test_a_spike_is_sustained_with_its_sixteenth_loss():
  losses, norms = steady(200)
  losses[150:180] += 0.5
  taken, spike = decisions(SpikeConfig(), losses, norms)
  assert not any(taken[150:180]) and spike == [165 <= i < 180 for i in range(200)]
  losses[160] -= 0.5  # one in between is as before
  assert [i for i, flag in enumerate(decisions(SpikeConfig(), losses, norms)[1]) if flag] == [176, 177, 178, 179]


def test_losses_that_are_no_numbers_are_a_sustained_spike_from_the_beginning():
  losses, norms = np.full(20, np.nan), np.ones(20)
  assert decisions(SpikeConfig(), losses, norms) == ([False] * 20, [i >= 15 for i in range(20)])
  assert decisions(SpikeConfig(), np.ones(20), losses)[1] == [i >= 15 for i in range(20)]  # nor are the gradients


@pytest.mark.parametrize('sigmas', [None, 0])
def test_turned_off_it_takes_every_step(sigmas):
  losses, norms = steady(150)
  losses[100:130], norms[5] = np.nan, np.inf
  assert decisions(SpikeConfig(sigmas=sigmas), losses, norms) == ([True] * 150, [False] * 150)


def test_what_was_no_number_while_it_was_off_does_not_count_when_it_is_on():
  losses, norms = steady(101)
  losses[50], losses[100] = np.nan, 9.0
  recent, *_ = judged(SpikeConfig(sigmas=None), no_steps(SpikeConfig()), losses[:100], norms[:100])
  assert int(recent.counted.sum()) == 99
  assert judged(SpikeConfig(), recent, losses[100:], norms[100:])[1] == [False]


@pytest.mark.parametrize('changes, message', [
  ({'sigmas': -1.0}, r'spikes.sigmas=-1.0 must be positive, or 0'), ({'min_steps': 1}, 'min_steps=1: .* at least 2'),
  ({'window': 79}, 'window=79 must be at least 80'), ({'max_rewinds': -1}, 'max_rewinds=-1 must be 0 or more')])
def test_what_has_no_meaning_is_refused(changes, message):
  SpikeConfig().check()
  with pytest.raises(ValueError, match=message):
    SpikeConfig(**changes).check()


# -- the digest of a batch


def test_the_digest_of_a_batch_is_the_same_on_every_mesh(mesh_of):
  batch, digests = batch_of(), set()
  for sizes in ({'fsdp': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 2, 'context': 4}, {'data': 8, 'fsdp': 1}):
    with mesh_of(**sizes):
      digests.add(tuple(jax.jit(batch_digest)(to_device(batch)).tolist()))
  assert len(digests) == 1


def test_the_digest_of_a_batch_tells_every_field_and_place(mesh_of):
  batch = batch_of()
  batch['source'] = np.arange(8, dtype=np.int32)
  others = {name: dict(batch, **{name: batch[name].copy()}) for name in ('tokens', 'targets', 'segment_ids', 'loss_mask',
                                                                           'source')}
  for name, other in others.items():
    other[name].flat[5] ^= 1
  others['rows in another order'] = {name: field[::-1] for name, field in batch.items()}
  others['fields in each other\'s place'] = batch | {'tokens': batch['targets'], 'targets': batch['tokens']}
  with mesh_of(1):
    digest = jax.jit(lambda batch: batch_digest(batch))
    found = {name: tuple(digest(to_device(other)).tolist()) for name, other in {'it': batch, **others}.items()}
  assert len(set(found.values())) == len(found) == 8
  assert all(0 <= word < 2**32 for pair in found.values() for word in pair)


# -- rewinds


def test_without_rewinds_each_step_takes_its_own_batch():
  assert [Skips().batch_of(step) for step in range(5)] == [0, 1, 2, 3, 4]
  assert Skips.of_json([]) == Skips() and Skips().to_json() == []


def test_a_rewind_leaves_out_the_batches_that_were_undone_and_those_after_them():
  skips = Skips().rewound(at=150, to=100, jump_steps=200)
  assert skips.to_json() == [{'at': 150, 'to': 100, 'batches': [100, 350]}]
  assert [skips.batch_of(step) for step in (99, 100, 101, 150)] == [99, 350, 351, 400]
  later = skips.rewound(at=300, to=200, jump_steps=10)
  assert later.rewinds[1].batches == (450, 560)
  assert [later.batch_of(step) for step in (99, 100, 199, 200, 201)] == [99, 350, 449, 560, 561]
  earlier = skips.rewound(at=120, to=50, jump_steps=0)  # past the first rewind, to before it
  assert earlier.rewinds[1].batches == (50, 370)
  assert [earlier.batch_of(step) for step in (49, 50, 51, 100)] == [49, 370, 371, 420]


@pytest.mark.parametrize('seed', range(20))
def test_a_run_with_rewinds_uses_no_batch_twice_and_none_that_was_skipped(seed):
  """Steps are made and undone; those that count in the end have batches in order, and a resumed run takes the same."""
  rng = np.random.default_rng(seed)
  skips, used = Skips(), []  # used[s]: the batch of step s
  for _ in range(12):
    for _ in range(int(rng.integers(1, 60))):
      used.append(Skips.of_json(skips.to_json()).batch_of(len(used)))
    at, to = len(used), int(rng.integers(0, len(used) + 1))
    skips = skips.rewound(at=at, to=to, jump_steps=int(rng.integers(0, 80)))
    undone, used = set(used[to:]), used[:to]
    first, last = skips.rewinds[-1].batches
    assert undone <= set(range(first, last))
    assert used == [skips.batch_of(step) for step in range(to)]  # the past stays as it was
  used = [skips.batch_of(step) for step in range(600)]
  skipped = set().union(*(range(*rewind.batches) for rewind in skips.rewinds))
  assert used == sorted(set(range(used[-1] + 1)) - skipped)


def test_a_checkpoint_of_undone_steps_is_told_from_one_that_counts():
  first = Skips().rewound(at=150, to=100, jump_steps=200)
  assert not first.undid(100, Skips()) and first.undid(120, Skips()) and first.undid(150, Skips())
  assert not first.undid(120, first)  # made after it
  second = first.rewound(at=130, to=50, jump_steps=0)
  assert second.undid(120, first) and second.undid(100, Skips()) and not second.undid(50, first)
  assert second.since(first) == (Rewind(at=130, to=50, batches=(50, 380)),)
  with pytest.raises(ValueError, match='of different runs'):
    first.since(second)


@pytest.mark.parametrize('plain, message', [
  ({'at': 1}, 'skips: expected'), ([{'at': 150, 'to': 100}], r'skips\[0\].batches: missing'),
  ([{'at': 150, 'to': 100, 'batches': [100, 350.5]}], r'skips\[0\].batches\[1\]: expected int'),
  ([{'at': 150, 'to': 160, 'batches': [160, 350]}], r'skips\[0\]: a run that has done 150 steps cannot go back to 160'),
  ([{'at': 150, 'to': 100, 'batches': [101, 350]}], r'batches 101 to 350 are not those that steps 100 to 150 took'),
  ([{'at': 150, 'to': 100, 'batches': [100, 149]}], r'skips\[0\]: batches 100 to 149 are not those'),
  ([{'at': 150, 'to': 100, 'batches': [100, 350]}, {'at': 300, 'to': 200, 'batches': [200, 500]}],
   r'skips\[1\]: .*450 to 550')])
def test_a_list_of_rewinds_that_cannot_have_happened_is_refused(plain, message):
  with pytest.raises(ValueError, match=message):
    Skips.of_json(plain)
