"""The laws beside Chinchilla's on public runs: what their papers published comes out, to the digits that were printed.

The runs lie beside the repository where somebody has put them (`shared/scaling_data`), and are not part of it.
"""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from maxlm.scaling import chinchilla, downstream, optima, overtraining, schedule_law
from maxlm.scaling.solve import Huber

FOUND = [path for parent in Path(__file__).parents for path in parent.glob('shared/scaling_data')]
pytestmark = pytest.mark.skipif(not FOUND, reason='no shared/scaling_data beside the repository')


def rows(name: str, **wanted: str) -> list[dict[str, str]]:
  path = FOUND[0] / name
  with gzip.open(path, 'rt') if path.suffix == '.gz' else open(path) as file:
    return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in wanted.items())]


def numbers(found: list[dict[str, str]], *names: str) -> list[np.ndarray]:
  return [np.array([float(row[name]) for row in found]) for name in names]


# -- Gadre et al.: five small runs forecast large ones

TASKS = ('bigbench_operators pubmed_qa_labeled hellaswag_zeroshot boolq arc_easy coqa bigbench_dyck_languages '
         'lambada_openai bigbench_novel_concepts winograd bigbench_cs_algorithms commonsense_qa bigbench_qa_wikidata '
         'hellaswag copa squad piqa')  # the 17 of the paper


def test_gadre_five_small_runs_forecast_1b_at_640_tokens_a_parameter_and_7b():
  runs = {(row['model'], float(row['tokens_per_param'])): row
          for row in rows('gadre_overtraining/models_losses_evals.csv', train_dataset='rpj')}
  small = [('d=96_l=8_h=4', 20), ('d=512_l=8_h=4', 20), ('d=576_l=24_h=8', 20), ('d=1024_l=24_h=8', 20),
           ('d=96_l=8_h=4', 320)]
  law = overtraining.fit(*numbers([runs[key] for key in small], 'N_total', 'D_tokens', 'loss_c4_val'))
  assert (law.E, law.A, law.alpha) == pytest.approx((1.8366, 166.21, .27285), rel=1e-4)
  assert law.B * 6 ** (law.alpha / 2) == pytest.approx(366.69, rel=1e-4)  # as the paper writes the second coefficient

  def error(row):
    return 1 - np.mean([float(row[f'acc_{task}']) for task in TASKS.split()])

  fitted = [runs[key] for key in [*small, ('open_lm_1b', 20)]]
  errors = overtraining.fit_error(*numbers(fitted, 'loss_c4_val'), [error(row) for row in fitted])
  for key, of_loss, of_error in ((('open_lm_1b', 640), .7103, 3.6365), (('open_lm_7b', 20), .7320, .0464)):
    (n,), (d,), (actual,) = numbers([runs[key]], 'N_total', 'D_tokens', 'loss_c4_val')
    predicted = law.loss(n, d)
    assert 100 * (predicted / actual - 1) == pytest.approx(of_loss, abs=1e-4)
    assert 100 * (errors.error(predicted) / error(runs[key]) - 1) == pytest.approx(of_error, abs=1e-4)


# -- Porian et al.: exponents from optima, and the optima from isoFLOP curves

SETTING = 'dataset', 'hparams', 'warmup', 'decay', 'param_count', 'val', 'file'


def test_porian_exponents_of_all_fifteen_settings():
  settings = rows('porian/published_fits.csv')
  assert len(settings) == 15
  for published in settings:
    best = [row for row in rows('porian/optimal_pairs.csv', **{key: published[key] for key in SETTING})
            if row['n'] not in ('', 'nan')]
    for name, sd in (('n', 'n_star_std'), ('t', 't_star_std'), ('multiplier', 'n_star_std')):
      flops, y, noise = numbers(best, 'flops', name, sd)
      for kind, weights in (('basic', None), ('weighted', noise)):
        law = optima.fit_power([flops], y, weights)
        assert law.exponents[0] == pytest.approx(float(published[f'{kind}.{name}_exponent']), rel=1e-9)
        assert law.coefficient == pytest.approx(float(published[f'{kind}.{name}_coef']), rel=1e-9)


def test_porian_noisy_optima_of_isoflop_curves():
  """With a noise of .005 at every loss, which is what the released medians show."""
  setting = dict(zip(SETTING, ('rw', 'tuned', 'short', 'const', 'standard', 'val', 'summary_df')))
  published, curves = rows('porian/optimal_pairs.csv', **setting), rows('porian/isoflop_points.csv', **setting)
  found = [optima.noisy_optimum(*numbers([row for row in curves if row['flops'] == best['flops']], 'N', 'loss'),
                                noise=lambda loss: np.full_like(loss, .005)) for best in published]
  flops, n = numbers(published, 'flops', 'n')
  assert len(found) > 8 and np.abs(np.log([o.x for o in found] / n)).max() < .02
  assert optima.fit_power([flops], [o.x for o in found]).exponents[0] == pytest.approx(.497, abs=.003)


# -- Luo et al.: the multi-power law over schedules

HELD_OUT = 'constant_72000', 'cosine_72000', 'wsd_20000_24000', 'wsdld_20000_24000', 'wsdcon_3', 'wsdcon_18'
PUBLISHED = {  # their fits; mean R², MAE and worst relative error over the six held-out curves
  25: ((3.04045406, .52468604, .50786857, 363.78751622, 2.06560812, .58279013, .64142257), (.9988, .00376, .00409)),
  100: ((2.6514477, .60115152, .45295811, 437.9464276, 2.13245612, .59785199, .65523644), (.9983, .00435, .00583)),
  400: ((2.37474466, .65421216, .42878731, 523.42464371, 2.02462735, .59350493, .63472457), (.9978, .00484, .00995)),
}


def curve(size: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(learning rates of all steps, steps measured, losses), with the schedules of the paper."""
  kind, number = name.split('_')[:2]
  total = {'wsdcon': 16_000, 'wsd': 24_000, 'wsdld': 24_000}.get(kind) or int(number)
  rates, step, peak, end = np.full(total, 3e-4), np.arange(total), 3e-4, 3e-5
  fallen = np.clip((step - 20_000) / 4000, 0, 1)
  if kind == 'cosine':
    rates = end + (peak - end) * (1 + np.cos(np.pi * (step - 2160) / (total - 2160))) / 2
  elif kind == 'wsdcon':
    rates[8000:] = int(number) * 1e-5
  elif kind == 'wsd':
    rates = peak ** (1 - fallen) * end**fallen
  elif kind == 'wsdld':
    rates = peak + (end - peak) * fallen
  rates[:2160] = np.linspace(0, peak, 2160)
  steps, lr, losses = numbers(rows(f'multipowerlaw/{size}M_{name}.csv'), 'step', 'lr', 'loss')
  steps = steps.astype(int)
  inside = steps < total
  np.testing.assert_allclose(rates[steps[inside]], lr[inside], rtol=1e-9)
  return rates, steps[inside], losses[inside]


def scores(law: schedule_law.MultiPower, size: int) -> np.ndarray:
  found = []
  for rates, steps, losses in (curve(size, name) for name in HELD_OUT):
    off = law.loss(rates, steps) - losses
    found.append((1 - off @ off / np.square(losses - losses.mean()).sum(), np.abs(off).mean(), np.abs(off / losses).max()))
  return np.mean(found, axis=0)


@pytest.mark.parametrize('size', PUBLISHED)
def test_multi_power_law_predicts_held_out_schedules_as_published(size):
  constants, published = PUBLISHED[size]
  found = scores(schedule_law.MultiPower(*constants), size)
  assert [round(float(x), digits) for x, digits in zip(found, (4, 5, 5))] == list(published)


@pytest.mark.parametrize('size', PUBLISHED)
def test_multi_power_fit_is_lower_than_the_published_and_forecasts_as_well(size):
  constants, published = PUBLISHED[size]
  train = [curve(size, name) for name in ('cosine_24000', 'constant_24000', 'wsdcon_9')]
  law = schedule_law.fit(train)

  def value(law):
    return sum(Huber(1e-3).value(np.log(law.loss(rates, steps) / losses)) for rates, steps, losses in train)

  assert value(law) < .6 * value(schedule_law.MultiPower(*constants))
  r2, mae, worst = scores(law, size)
  assert r2 > .996 and mae < 1.3 * published[1] and worst < published[2]


# -- the OLMo ladder: 16 runs to 1.3B forecast tasks at 7B and 13B

MMLU = {'stem': .215, 'humanities': .335, 'social_sciences': .219, 'other': .231}  # shares of the questions


def task(found: list[dict[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
  """(bits per byte of the right answers, accuracy) of checkpoints."""
  keys = [f'downstream_bpb/{name}_bpb', f'downstream/{name}_len_norm']
  if 'mmlu' not in name:
    return tuple(numbers(found, *keys))
  return tuple(sum(share * numbers(found, key.replace('mmlu', f'mmlu_{part}'))[0] for part, share in MMLU.items())
               for key in keys)


@pytest.fixture(scope='module')
def ladder() -> dict[tuple[str, str], list[dict[str, str]]]:
  runs = {}
  for row in rows('olmo_ladder/all_checkpoints.csv.gz', set='peteish-moreeval'):
    runs.setdefault((row['model'], row['length']), []).append(row)
  return {key: sorted(found, key=lambda row: float(row['D_tokens'])) for key, found in runs.items()}


@pytest.mark.parametrize('name, points', [('mmlu_test_rc_5shot', (1, 1)), ('hellaswag_val_rc_5shot', (1.2, 2.0)),
                                          ('piqa_val_rc_5shot', (.8, .8)), ('socialiqa_val_rc_5shot', (1.2, 2.75))])
def test_olmo_ladder_forecasts_tasks_of_7b_and_13b(ladder, name, points):
  """points: off by at most so many, of 100, at 7B with 4T tokens and 13B with 5T."""
  runs = [ladder[model, length] for model in ('190M', '370M', '760M', '1B') for length in ('1xC', '2xC', '5xC', '10xC')]
  tasks = [task(found, name) for found in runs]
  n, d = numbers([found[-1] for found in runs], 'N', 'D_tokens')
  law = chinchilla.fit(n, d, [loss[-5:].mean() for loss, _ in tasks]).law
  accuracy = downstream.fit(*downstream.pooled(tasks))
  for key, most in zip((('peteish7', 'eval_anneal'), ('peteish13', 'eval_final')), points):
    (n,), (d,) = numbers(ladder[key][-1:], 'N', 'D_tokens')
    assert 100 * abs(accuracy.accuracy(law.loss(n, d)) - task(ladder[key], name)[1][-1]) < most + .05
