"""The laws beside Chinchilla's: published constants give published figures, and a fit finds the law that made its points."""

import numpy as np
import pytest

from configs import tiny
from maxlm import flops
from maxlm.scaling import downstream, hyper, inference, moe, optima, overtraining, repeated, schedule_law
from maxlm.scaling.chinchilla import Chinchilla

SARDANA = Chinchilla(E=1.69, A=406.4, B=410.7, alpha=.336, beta=.283)


def best_of(n: float) -> tuple[float, float]:
  """(D, loss) of Chinchilla's model of n parameters."""
  ratio = (SARDANA.alpha * SARDANA.A / (SARDANA.beta * SARDANA.B)) ** (1 / (SARDANA.alpha + SARDANA.beta))
  nd = (n / ratio) ** ((SARDANA.alpha + SARDANA.beta) / SARDANA.beta)
  n_again, d, loss = SARDANA.optimum(6 * nd)
  assert n_again == pytest.approx(n)
  return float(d), float(loss)


# -- serving


@pytest.mark.parametrize('n, served, size, data', [
  (7e9, 1e11, 6.0e9, 1.18), (30e9, 1e13, 13.6e9, 2.84), (70e9, 1e13, 41.6e9, 1.86)])
def test_cheapest_models_are_those_of_sardana(n, served, size, data):
  d, loss = best_of(n)
  choice = inference.cheapest(SARDANA, loss, inference.Cost(serve=2 * served))
  assert choice.n == pytest.approx(size, rel=.005) and choice.d / d == pytest.approx(data, rel=.005)
  assert choice.saving == pytest.approx(1 - choice.cost / (n * (6 * d + 2 * served)), abs=1e-9)
  assert float(SARDANA.loss(choice.n, choice.d)) == pytest.approx(loss, rel=1e-12)
  slope = SARDANA.alpha * SARDANA.A * choice.n**-SARDANA.alpha / (SARDANA.beta * SARDANA.B * choice.d**-SARDANA.beta)
  assert slope == pytest.approx(1 + served / (3 * choice.d), rel=1e-9)
  for other in (choice.n * .99, choice.n * 1.01):
    assert inference.Cost(serve=2 * served).of(other, inference.tokens_for(SARDANA, other, loss)) > choice.cost


def test_dollars_favour_a_smaller_model_than_flops():
  """30B quality, 1.5B requests: 16B on 3.35T tokens, 17 % cheaper. The prices that we know of the paper's come near."""
  _, loss = best_of(30e9)
  cost = inference.dollars(prompt=70 * 1.5e9, output=215 * 1.5e9, train_hour=1.5, train_peak=312e12, serve_hour=1.1,
                           serve_peak=624e12)
  choice = inference.cheapest(SARDANA, loss, cost, most_tokens_per_param=100)
  assert choice.n == pytest.approx(16e9, rel=.03) and choice.d == pytest.approx(3.35e12, rel=.06)
  assert choice.saving == pytest.approx(.17, abs=.025) and '224 tokens a parameter' in choice.advice
  in_flops = inference.cheapest(SARDANA, loss, inference.Cost(serve=2 * 285 * 1.5e9), most_tokens_per_param=100)
  assert in_flops.n > 1.5 * choice.n and in_flops.advice == ''


def test_without_demand_the_cheapest_is_the_optimum_of_training():
  n, d, loss = SARDANA.optimum(1e23)
  choice = inference.cheapest(SARDANA, float(loss), inference.Cost(serve=0))
  assert (choice.n, choice.d) == pytest.approx((float(n), float(d)), rel=1e-6)
  assert choice.saving == pytest.approx(0, abs=1e-9)
  with pytest.raises(ValueError, match='not above E'):
    inference.cheapest(SARDANA, 1.6, inference.Cost(serve=0))


# -- repeats


def test_repeated_data_is_worth_what_muennighoff_says():
  law = repeated.MUENNIGHOFF
  assert float(law.loss(6.34e9, 242e9, 25e9)) == pytest.approx(2.2256440889984477, rel=1e-12)
  assert float(law.loss(8.67e9, 178e9, 25e9)) == pytest.approx(2.2269634075087867, rel=1e-12)
  n, d = law.effective(1e9, 25e9, 25e9)
  assert (float(n), float(d)) == (1e9, 25e9)  # one epoch, and fewer parameters than the data are worth
  assert float(law.effective(1e9, 1e15, 25e9)[1]) == pytest.approx(25e9 * (1 + law.data_decay))
  assert (law.law.alpha * law.law.A / (law.law.beta * law.law.B)) ** (1 / law.law.alpha) == pytest.approx(.05099, abs=1e-5)


def test_scarce_data_moves_the_optimum_to_more_epochs_of_a_smaller_model():
  law, budget = repeated.MUENNIGHOFF, 6 * 8.67e9 * 178e9
  n, d, loss = law.optimum(budget, 25e9)
  fresh = law.law.optimum(budget)
  assert n < .8 * float(fresh[0]) and d > 1.25 * float(fresh[1]) and loss < float(law.loss(8.67e9, 178e9, 25e9))
  assert law.optimum(budget, 1e15) == pytest.approx(tuple(map(float, fresh)), rel=1e-5)


def test_decays_come_back_from_runs_and_runs_without_repeats_are_refused():
  rng = np.random.default_rng(0)
  n, unique, epochs = (np.exp(rng.uniform(*np.log(ends), 40)) for ends in ((1e7, 1e10), (1e8, 1e10), (1, 60)))
  true = repeated.Repeated(repeated.MUENNIGHOFF.law, data_decay=9, params_decay=3)
  found = repeated.fit(true.law, n, unique * epochs, unique, true.loss(n, unique * epochs, unique))
  assert (found.data_decay, found.params_decay) == pytest.approx((9, 3), rel=1e-4)
  with pytest.raises(ValueError, match='no run repeats'):
    repeated.fit(true.law, n, unique, unique, true.loss(n, unique, unique))


# -- experts


@pytest.mark.parametrize('experts, m, mu, k, nu', [
  (1, 30.3640, .1817, 53.9838, .1965), (2, 27.7982, .1780, 66.8401, .2065), (4, 24.8462, .1731, 87.7022, .2192),
  (8, 21.8330, .1676, 119.9126, .2338), (16, 19.0159, .1617, 167.5073, .2494), (32, 16.5424, .1557, 234.6726, .2652)])
def test_joint_law_reduces_to_its_published_chinchilla_laws(experts, m, mu, k, nu):
  """Table 4 of arXiv 2502.05172, from the rounded constants of its table 3."""
  law = moe.joint(experts)
  assert (law.A, law.B) == pytest.approx((m, k), rel=3e-3) and (law.alpha, law.beta) == pytest.approx((mu, nu), abs=2e-4)


def test_more_experts_want_more_tokens_a_parameter():
  (dense_n, dense_d, dense), (n, d, sparse) = (moe.joint(experts).optimum(1e21) for experts in (1, 16))
  assert sparse < dense and d / n > 2 * dense_d / dense_n


def test_saturated_experts_go_from_start_to_most():
  assert float(moe.saturated(1, 1.88, 469.982)) == pytest.approx(1.88)
  assert float(moe.saturated(1e12, 1.88, 469.982)) == pytest.approx(469.982, rel=1e-6)
  law = moe.CLARK['RL-R']
  assert law.loss(1e8, 64) < law.loss(1e8, 8) < law.loss(1e8, 1)
  assert law.loss(1e12, 512) > law.loss(1e12, 1)  # past the size where routing stops helping


def test_sparsity_helps_at_equal_parameters_only_as_far_as_abnar_says():
  """The printed constants, by hand at one point: 1e9 parameters, 1e10 tokens, S = 0.5."""
  assert float(moe.abnar(1e9, 1e10, .5)) == pytest.approx(
    16612.5 / 1e9**.5962 + 5455.67 / 1e10**.3954 + .4598 * .5**.1666 + 17.26 / (.5**.1603 * 1e9**.1595) + .94, rel=1e-12)


def test_krajewski_form_comes_back_from_noisy_points():
  rng, true = np.random.default_rng(1), moe.KRAJEWSKI
  n, d, g = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 3e9, 6), np.geomspace(2e9, 1e11, 5), [1, 2, 4, 8, 16]))
  exact = moe.fit_krajewski(n, d, g, true.loss(n, d, g))
  assert exact.gamma == pytest.approx(.58, rel=1e-4) and exact.alpha == pytest.approx(.115, rel=1e-4)
  noisy = moe.fit_krajewski(n, d, g, true.loss(n, d, g) * np.exp(.002 * rng.normal(size=len(n))))
  assert float(noisy.loss(1e10, 1e12, 32)) == pytest.approx(float(true.loss(1e10, 1e12, 32)), rel=.01)
  assert float(noisy.at(8).loss(1e9, 2e10)) == pytest.approx(float(noisy.loss(1e9, 2e10, 8)), rel=1e-12)
  with pytest.raises(ValueError, match='2 granularities'):
    moe.fit_krajewski(n[g < 4], d[g < 4], g[g < 4], true.loss(n, d, g)[g < 4])


# -- learning rate and batch


def grid(n: float, d: float, *, noise: float = 1e-3, shift: float = 0, curvature: float = .02, seed: int = 0):
  """(rates, losses, batches) of 25 runs about Step Law's optimum, or `shift` in log rate from it."""
  rate, batch = 1.79 * n**-.713 * d**.307, .58 * d**.571
  x, y = (z.ravel() for z in np.meshgrid(np.log(2) * np.arange(-2, 3) + shift, np.log(2) * np.arange(-2, 3) + .1))
  loss = 3 + curvature * (x * x + y * y - .6 * x * y) + noise * np.random.default_rng(seed).normal(size=25)
  return rate * np.exp(x), loss, batch * np.exp(y)


CELLS = [(n, d) for n in (1e8, 4e8, 1e9) for d in (2e9, 1e10, 5e10)]


def test_laws_of_rate_and_batch_come_back_from_grids():
  best = [hyper.optimum(*grid(n, d, seed=i)) for i, (n, d) in enumerate(CELLS)]
  assert not any(o.rejected for o in best)
  rate, batch = hyper.laws(best, *zip(*CELLS))
  assert rate.exponents == pytest.approx((-.713, .307), abs=.01) and batch.exponents == pytest.approx((0, .571), abs=.01)
  assert float(rate.at(7e9, 1e12)) == pytest.approx(1.79 * 7e9**-.713 * 1e12**.307, rel=.05)
  assert all(abs(e - true) < 4 * sd for e, sd, true in zip(rate.exponents, rate.sd, (-.713, .307)))


def test_optima_at_the_edge_are_rejected_and_kept_out_of_the_law():
  wrong = hyper.optimum(*grid(1e8, 2e9, shift=1.6))
  assert 'edge of the grid, learning rate' in wrong.rejected
  best = [hyper.optimum(*grid(n, d, seed=i)) for i, (n, d) in enumerate(CELLS)]
  with_wrong = hyper.laws([wrong, *best], [1e8, *(n for n, _ in CELLS)], [2e9, *(d for _, d in CELLS)])
  assert with_wrong == hyper.laws(best, *zip(*CELLS))
  with pytest.raises(ValueError, match='0 of 2 optima are to be trusted.*edge'):
    hyper.laws([wrong, wrong], [1e8, 1e8], [2e9, 2e9])


def test_curvature_that_may_be_nothing_is_rejected():
  flat = [hyper.optimum(*grid(1e8, 2e9, noise=.003, curvature=0, seed=i)) for i in range(100)]
  assert sum(not o.rejected for o in flat) <= 5
  rates = np.geomspace(1e-4, 1e-2, 7)
  turned = hyper.optimum(rates, 3 - .004 * np.log(rates / 1e-3) ** 2 + 1e-4 * np.sin(np.arange(7)))
  assert 'may be 0' in turned.rejected  # a maximum is no optimum


def test_runs_that_diverged_are_left_out_of_a_grid():
  rates = np.geomspace(5e-4, 3e-2, 9)
  loss = 3 + .03 * np.log(rates / 2e-3) ** 2 + 1e-4 * np.cos(np.arange(9))
  loss[-2:] = np.nan, 11
  best = hyper.optimum(rates, loss, np.full(9, 1e6))
  assert best.learning_rate == pytest.approx(2e-3, rel=.01) and not best.rejected and best.batch is None
  with pytest.raises(ValueError, match='a quadratic needs 4'):
    hyper.optimum(rates[:3], loss[:3])
  with pytest.raises(ValueError, match='at three learning rates and three batches'):
    hyper.optimum(np.full(9, 1e-3), loss[:1].repeat(9), np.arange(1, 10) * 1e5)


def test_power_laws_of_budgets_know_their_errors_and_refuse_what_they_cannot_tell_apart():
  rng, flops_of = np.random.default_rng(0), np.geomspace(1e17, 1e21, 12)
  hits = 0
  for _ in range(200):
    law = optima.fit_power([flops_of], .3 * flops_of**.5 * np.exp(.1 * rng.normal(size=12)), sd=np.full(12, .1))
    hits += abs(law.exponents[0] - .5) < 2.23 * law.sd[0]  # 95 % of Student's t with 10 degrees of freedom
  assert 180 <= hits <= 199
  with pytest.raises(ValueError, match='vary each'):
    optima.fit_power([flops_of, flops_of**2], flops_of)


def test_noisy_optimum_finds_the_bottom_and_refuses_a_slope():
  n = np.geomspace(1e7, 1e9, 9)
  found = optima.noisy_optimum(n, 3.2 + .05 * np.log(n / 1.2e8) ** 2)
  assert found.x == pytest.approx(1.2e8, rel=.1) and .05 < found.sd < .5 and found.inside > .9
  more = optima.noisy_optimum(n, 3.2 + .05 * np.log(n / 1.2e8) ** 2, noise=lambda loss: .1 + 0 * loss)
  assert more.sd > 1.5 * found.sd
  with pytest.raises(ValueError, match='extend the grid'):
    optima.noisy_optimum(n, 3.2 + .1 * np.log(n))


# -- schedules


MPL = schedule_law.MultiPower(L0=2.65, A=.6, alpha=.45, B=440, C=2.1, beta=.6, gamma=.65)


def rates(total: int, fall: int, end: float = 0.0) -> np.ndarray:
  found = np.full(total, 3e-4)
  found[:50] = np.linspace(0, 3e-4, 50)
  if fall:
    found[-fall:] = np.linspace(3e-4, end, fall + 1)[1:]
  return found


def test_a_trunk_and_a_cool_down_predict_other_cool_downs():
  """Rates that end at 0 too; the law that is fitted made the curves."""
  curves = [(r, np.arange(100, len(r), 40), MPL.loss(r, np.arange(100, len(r), 40)))
            for r in (rates(1500, 0), rates(1200, 300, 3e-5))]
  law = schedule_law.fit(curves)
  for other in (rates(800, 100), rates(2000, 400), rates(1500, 150, 1e-4)):
    ends = np.array([len(other) // 2, len(other) - 1])
    assert law.loss(other, ends) == pytest.approx(MPL.loss(other, ends), rel=1e-3)
  assert law.loss(rates(800, 100), [799]) < law.loss(rates(800, 0), [799]) - .02


def test_derivatives_of_the_schedule_law_are_right():
  r = rates(600, 200, 1e-5)
  parts = schedule_law._summary(r, np.arange(80, 600, 60), np.ones(9))[:-1]
  x, h = np.array([2.6, -.5, .45, 6, .7, .6, .65]), 1e-6
  values, slopes = schedule_law._curve(x, *parts)
  by_hand = [(schedule_law._curve(x + h * e, *parts)[0] - schedule_law._curve(x - h * e, *parts)[0]) / (2 * h)
             for e in np.eye(7)]
  np.testing.assert_allclose(slopes.T, by_hand, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(values, schedule_law.MultiPower(2.6, np.exp(-.5), .45, np.exp(6), np.exp(.7), .6, .65).loss(
    r, np.arange(80, 600, 60)), atol=1e-3)


def test_schedule_law_refuses_curves_that_say_nothing():
  r = rates(400, 0)
  with pytest.raises(ValueError, match='cool-down'):
    schedule_law.fit([(r, [100, 200, 300], [3, 2.9, 2.8])])
  with pytest.raises(ValueError, match='within 0 to 399'):
    MPL.loss(r, [100, 400])


# -- the rest


def test_overtraining_law_comes_back_and_moves_with_the_ratio_as_gadre_says():
  true = Chinchilla(E=1.8, A=166, B=367, alpha=.27, beta=.27)
  n = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7])
  d = n * [20, 20, 20, 20, 320]
  law = overtraining.fit(n, d, true.loss(n, d))
  assert (law.E, law.A, law.B, law.alpha) == pytest.approx((1.8, 166, 367, .27), rel=1e-5) and law.alpha == law.beta
  one, ten = (overtraining.loss_at(law, np.array([1e20, 1e21]), m) - law.E for m in (20, 640))
  assert one[0] / one[1] == pytest.approx(10**.135, rel=1e-4) and ten[0] / ten[1] == pytest.approx(10**.135, rel=1e-4)
  with pytest.raises(ValueError, match='finite'):
    overtraining.fit(n, d, [3, 3, np.nan, 3, 3])
  with pytest.raises(ValueError, match='4 or more'):
    overtraining.fit(n[:3], d[:3], [3, 3, 3])


def test_error_law_and_accuracy_curve_come_back():
  loss = np.linspace(2.5, 5, 8)
  law = overtraining.fit_error(loss, .857 - 2.2 * np.exp(-.71 * loss))
  assert (law.epsilon, law.k, law.gamma) == pytest.approx((.857, 2.2, .71), rel=1e-4)
  true = downstream.Curve(a=-.74, middle=.62, k=5, b=.999)
  x = np.linspace(.5, 1.4, 30)
  curve = downstream.fit(x, true.accuracy(x))
  assert curve.accuracy([.3, .6]) == pytest.approx(true.accuracy([.3, .6]), abs=.01)  # the point (0, 1) pulls a little
  with pytest.raises(ValueError, match='give shares'):
    downstream.fit(x, 100 * true.accuracy(x))


def test_pooled_checkpoints_are_averages_without_the_first():
  loss, accuracy = downstream.pooled([(np.arange(1, 25.), np.arange(1, 25.) / 100)], window=5, skip=.1)
  assert loss == pytest.approx(np.arange(5, 23)) and accuracy == pytest.approx(loss / 100)  # 20 averages, 3 to 22, less two
  assert downstream.wander([0, 9, .4, .6, .4, .6], last=4) == pytest.approx(.1)


def test_flops_a_token_count_the_context():
  model = tiny.get_config().model
  short, long = (flops.flops_per_token(model, t) for t in (16, 512))
  assert 6 * flops.matmul_params(model) < short < long
  batch = {'positions': np.tile(np.arange(512), (3, 1)), 'segment_ids': np.ones((3, 512), np.int32)}
  assert long == flops.train_flops(model, batch) / (3 * 512)
  assert flops.planned_flops_per_token(4096, 32, 4096) == 6 * (12 * 32 * 4096**2) + 12 * 32 * 4096 * 4096
