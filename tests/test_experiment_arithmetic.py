"""The arithmetic of experiments/: ratios, cross-fitting, residuals and cosines, against closed forms."""

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from carv.commands.pilot import PilotConfig, run_pilot
from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.problems import Problem, ProblemConfig, load_problem
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design
from carv.variance.jackknife import Jackknifed
from carv.variance.pilot import pilot
from carv.variance.predict import oracle_proposal, predict
from carv.variance.tables import Tables
from carv.variance.values import Value

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
cross_fit, fig_15, latent_residual, multipliers, paper, records, replicates = (
    importlib.import_module(name)
    for name in ("cross_fit", "fig_15", "latent_residual", "multipliers", "paper", "records", "replicates")
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A pilot of the toy, 16 renders."""
    config = PilotConfig(renders=16, bins=8, noises=2, antithetic=False, repetitions=6)
    return run_pilot(ProblemConfig("toy"), config, tmp_path_factory.mktemp("toy"), quiet=True)


def test_table_1_of_one_pilot_is_the_library_s_prediction(toy):
    """ECM = (V_b C_b)/(V_m C_m), with the variances of `predict` and the pilot's own cost model."""
    found = multipliers.means(multipliers.multipliers({("toy", 0): toy}, multipliers.cells({("toy", 0): toy})))
    q = toy.proposals["weight"]
    designs = {"uniform": (None, iid), "IW": (q, iid), "strata": (None, per_render), "IW + strata": (q, per_render)}
    base = predict(toy.tables, 1, 1, None, iid).variance.value * toy.cost.predict(1, 1).value
    assert list(found) == list(designs)
    for name, (proposal, coupling) in designs.items():
        for k, value in zip(paper.RENOISE, found[name], strict=True):
            theirs = predict(toy.tables, 1, k, proposal, coupling).variance.value * toy.cost.predict(1, k).value
            assert value.value == pytest.approx(base / theirs, rel=1e-9)
            assert (value.error > 0) is not (name in ("uniform", "strata") and k == 1)


def test_ecm_and_re_of_exact_tables_are_the_closed_form(toy):
    """V(K) = sigma_b^2 + sigma_w^2 / K with the toy's moments; cost alpha + K, alpha = 0 too."""
    task, base = GaussianToy(), uniform_steps(300, 340)
    exact = task.exact(base)
    q = proportional(base, task.weight)
    tables = Tables.exact(base, exact.m2, exact.within, exact.across)
    record = dataclasses.replace(toy, tables=tables, proposals={"uniform": None, "weight": q})
    pilots = {("toy", 0): record}
    cells = multipliers.cells(pilots)
    p, mean_sq = base.pmf, float(exact.mean.square().sum())
    within = float(p @ exact.within @ p)
    sigma_b, sigma_w = within - mean_sq, float(p @ exact.m2) - within
    sigma_q = float((p**2 / q.pmf) @ exact.m2) - within
    for alpha in (0.0, 4.0, 100.0):
        found = multipliers.means(multipliers.multipliers(pilots, cells, multipliers.simulated(alpha)))
        for name, sigma in (("uniform", sigma_w), ("IW", sigma_q)):
            for k, value in zip(paper.RENOISE, found[name], strict=True):
                expected = (sigma_b + sigma_w) * (alpha + 1) / ((sigma_b + sigma / k) * (alpha + k))
                assert value.value == pytest.approx(expected, rel=1e-9)
    gains = multipliers.means(multipliers.efficiencies(cells))
    expected = [(sigma_b + sigma_w / k) / (sigma_b + sigma_q / k) for k in paper.RENOISE]
    assert [value.value for value in gains["IW"]] == pytest.approx(expected, rel=1e-9)


def test_where_cost_goes_as_renders_both_anchors_agree(toy):
    """cost = 4 R + R K and variance ~ 1/R: at the method's variance, too, ECM = (V_b C_b)/(V_m C_m)."""
    pilots = {("toy", 0): toy}
    cells, at = multipliers.cells(pilots), [(1, 8), (2, 8), (4, 8)]
    cost = multipliers.simulated(4.0)
    one = multipliers.multipliers(pilots, cells, cost)["iw+strat"][3][0].value
    for anchor in ("baseline", "method"):
        found = multipliers.multipliers(pilots, cells, cost, at, anchor)["iw+strat"]
        assert [cell[0].value for cell in found] == pytest.approx([one] * 3, rel=1e-9)


def test_at_the_method_s_variance_the_baseline_pays_for_more_renders_at_its_own_cost(toy):
    """A method with a quarter of the variance costs the baseline (4, 1), with a fixed cost an estimate as well."""
    variance = predict(toy.tables, 1, 1, None, iid).variance
    quarter = Jackknifed(variance.value / 4, variance.without / 4)
    found = multipliers.multiplier(variance, (1, 8), quarter, lambda r, k: Value(30.0 + 4 * r + r * k, 0.0), "method")
    assert found.value == pytest.approx((30 + 4 * 4 + 4) / (30 + 4 + 8), rel=1e-9)


def test_a_variance_that_is_not_positive_is_a_dash_and_no_mean_leaves_it_out(toy):
    cost, bad = multipliers.measured(toy), Jackknifed(-0.1, np.full(16, -0.1))
    good = predict(toy.tables, 1, 1, None, iid).variance
    assert multipliers.multiplier(good, (1, 8), bad, cost) is None
    assert multipliers.ratio(good, bad) is None
    assert multipliers.ratio(good, good) == Value(1.0, 0.0)
    assert records.over_pilots([Value(1.0, 0.1), None]) is None
    assert records.over_pilots([Value(1.0, 0.1), Value(2.0, math.inf)]) is None
    table = records.table("a table", ["K"], {"ours": [None]}, {"theirs": [2.5]})
    assert records.text(table).splitlines()[2:] == [f"{'ours':30s}{'-':>19s}", f"{'theirs':30s}{'- [2.5]':>19s}"]
    assert records.curves([1, 2], {"all": [None, None], "some": [None, Value(1, 0.5)]}).keys() == {"some"}


def test_a_mean_has_the_error_of_its_spread_and_that_of_one_pilot_its_own():
    values = [Value(1.0, 0.3), Value(2.0, 0.4), Value(6.0, 1.2)]
    spread, own = records.over_pilots(values), records.of_these_pilots(values)
    assert (spread.value, own.value) == (3.0, 3.0)
    assert spread.error == pytest.approx(math.sqrt(7 / 3))
    assert own.error == pytest.approx(1.3 / 3)
    assert records.over_pilots(values[:1]) == records.of_these_pilots(values[:1]) == values[0]


def test_a_proposal_that_is_not_fitted_has_the_same_variance_and_error_cross_fitted_or_not(toy):
    q = toy.proposals["weight"]
    for renoise, coupling in ((1, iid), (8, per_render)):
        found = cross_fit.cross_fitted(toy.tables, lambda _: q, renoise, coupling)
        direct = predict(toy.tables, 1, renoise, q, coupling).variance
        assert found.value == pytest.approx(direct.value, rel=1e-9)
        assert found.without == pytest.approx(direct.without, rel=1e-9)


def test_no_render_judges_a_proposal_that_it_was_fitted_to(toy):
    norms = toy.tables.norm_sq
    fitted, judged = [], []

    def fit(tables):
        fitted.append({int((norms == row).all((1, 2)).nonzero()) for row in tables.norm_sq})
        return toy.proposals["weight"]

    original = cross_fit.predict

    def spy(tables, *args):
        judged.append({int((norms == row).all((1, 2)).nonzero()) for row in tables.norm_sq})
        return original(tables, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_fit, "predict", spy)
        cross_fit.cross_fitted(toy.tables, fit, 1, iid)
    assert len(fitted) == 4
    for own, rows in zip(judged[::2], fitted, strict=False):
        assert own.isdisjoint(rows)
        assert own | rows == set(range(16))


def test_a_fit_to_noise_looks_good_to_its_own_tables_and_bad_to_others():
    """An oracle from 4 draws a bin. 24 pilots: the two differ by far more than 4 standard errors (power near 1)."""
    task, base = GaussianToy(gain_std=0.05, distance=0.0), uniform_steps(20, 980)
    differences = []
    for i in range(24):
        tables = pilot(task, base, stream(i, "noise"), renders=6, bins=48, noises=2)
        q = oracle_proposal(tables, share=0)
        own = predict(tables, 1, 1, q, iid).variance.value
        other = cross_fit.cross_fitted(tables, lambda some: oracle_proposal(some, share=0), 1, iid, folds=2).value
        differences.append(other / own - 1)
    mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert mean > 4 * error > 0


def test_cross_fitting_refuses_folds_without_a_jackknife(toy):
    for folds in (1, 6):
        with pytest.raises(ValueError, match=f"at least 2 folds of at least 3 renders, got {folds} of 16"):
            cross_fit.cross_fitted(toy.tables, oracle_proposal, 1, iid, folds)


def test_the_latent_residual_s_gradient_is_the_mean_residual_of_the_renders():
    problem = load_problem(ProblemConfig("toy"))
    task = latent_residual.LatentResidual(problem.task)
    estimator = HierarchicalEstimator(TimestepSampler(problem.base), renders=3, renoise=4)
    found = estimator.estimate(task, stream(1))
    assert torch.allclose(found.gradient[0], found.f_mean.mean(0), rtol=1e-12)
    plain = estimator.estimate(problem.task, stream(1))
    assert torch.equal(found.f_mean, plain.f_mean)
    assert not torch.allclose(plain.gradient[0], found.gradient[0], rtol=1e-3)


def test_cosines_are_corrected_for_the_reference_s_noise():
    """A known mu. 600 estimates and 8 blocks as noisy as mu is long: within 4 standard errors of the truth, which the
    cosine with the reference itself misses by more than 10."""
    rng = torch.Generator().manual_seed(1)
    mu = torch.randn(40, generator=rng)
    mu = mu / mu.norm()
    g = mu + torch.randn(600, 40, generator=rng) / 40**0.5
    blocks = mu + torch.randn(8, 40, generator=rng) * (8 / 40) ** 0.5
    truth = replicates.Reference(blocks)
    products = replicates.Products((g @ g.T).double(), (g @ blocks.T).double())
    for renders in (1, 4):
        means = g.view(-1, renders, 40).mean(1)
        true = torch.nn.functional.cosine_similarity(means, mu[None]).mean().item()
        naive = torch.nn.functional.cosine_similarity(means, blocks.mean(0)[None]).mean().item()
        found = fig_15.mean_cosine(products, truth, renders)
        assert abs(found.value - true) < 4 * found.error
        assert naive < true - 0.1
        shrinkage = fig_15.shrinkage(truth)
        assert naive == pytest.approx(found.value * shrinkage.value, rel=1e-6)
        cross, norm = products.averaged(renders)
        assert torch.allclose(norm, means.double().norm(dim=1), rtol=1e-5)
        assert torch.allclose(cross, (means @ blocks.T).double(), rtol=1e-3, atol=1e-5)


def test_a_reference_that_is_nothing_but_noise_gives_no_cosine():
    blocks = torch.eye(3) - 1 / 3  # inner products of different blocks are negative
    products = replicates.Products(torch.eye(4, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64))
    assert fig_15.mean_cosine(products, replicates.Reference(blocks), 1) is None
    assert fig_15.shrinkage(replicates.Reference(blocks)) is None


def test_the_jackknife_of_a_mean_is_its_standard_error():
    blocks = np.array([1.0, 4.0, 2.0, 9.0, 4.0])
    error = fig_15.jackknife_error(lambda kept: blocks[kept].mean(), 5)
    assert error == pytest.approx(blocks.std(ddof=1) / 5**0.5)


def test_the_error_of_a_cosine_is_its_spread_over_independent_repetitions():
    """200 repetitions of both replicates and reference: the stated error is within 25 % of the actual spread (5 sd)."""
    rng = torch.Generator().manual_seed(2)
    mu = torch.ones(10, dtype=torch.float64) / 10**0.5
    values, errors = [], []
    for _ in range(200):
        g = mu + 0.3 * torch.randn(24, 10, generator=rng, dtype=torch.float64)
        blocks = mu + 0.5 * torch.randn(16, 10, generator=rng, dtype=torch.float64)
        found = fig_15.mean_cosine(replicates.Products(g @ g.T, g @ blocks.T), replicates.Reference(blocks), 1)
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.25)


def test_an_average_of_estimates_with_one_render_is_an_estimate_with_several():
    """On a toy near its optimum: E|g|^2 of 120 averages of 4 against the closed form, within 4 standard errors, each
    less than 12.5 %: half or twice the variance would be seen with near certainty."""
    task, base = GaussianToy(distance=0.1), uniform_steps(20, 980)
    problem = Problem.of(task, base, task.weight)
    one = problem.estimator(Design(1, 2, "weight", "per-render"))
    each = torch.stack([one.estimate(task, stream(0, "one", i)).gradient[0] for i in range(480)])
    square = replicates.Products(each @ each.T, each[:, :1]).averaged(4)[1].square()
    exact = task.exact(base)
    tables = Tables.exact(base, exact.m2, exact.within, exact.across)
    variance = predict(tables, 4, 2, problem.proposals["weight"], per_render).variance.value
    error = float(square.std()) / len(square) ** 0.5
    assert abs(float(square.mean()) - variance - float(exact.mean.square().sum())) < 4 * error < 0.5 * variance
