import math
from functools import cache

import pytest

from carv.density import uniform_steps
from carv.proposals import proportional
from carv.rng import stream
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.advice import advise, best_renoise, cost_ratio
from carv.variance.cost import CostModel, SimulatedCost
from carv.variance.four_numbers import FourNumberModel
from carv.variance.pilot import pilot
from carv.variance.predict import predict
from carv.variance.tables import Tables
from carv.variance.values import Value

# Table 1 of arXiv 2605.21489v2 (CC BY 4.0): ECM on SDS.
PAPER_K = (1, 2, 4, 8, 16, 32)
PAPER = {
    "uniform": (1.0, 1.57, 2.24, 2.63, 2.52, 1.98),
    "iw": (1.24, 1.93, 2.68, 3.01, 2.75, 2.09),
    "strat": (1.0, 1.66, 2.47, 2.96, 2.75, 2.08),
    "iw+strat": (1.24, 2.05, 2.94, 3.29, 2.94, 2.18),
}

TOY = GaussianToy(dim=4, gain_std=0.15)
BASE = uniform_steps(20, 79)
COST = SimulatedCost(20.0)
IID = {"iid": iid}


@cache
def exact(antithetic=False):
    closed = TOY.exact(BASE)
    anti = 2 * closed.within.diagonal() - closed.m2 if antithetic else None
    return Tables.exact(BASE, closed.m2, closed.within, closed.across, anti)


def product(tables, k, cost=COST):
    return predict(tables, 1, k, None, iid).variance.value * cost.predict(1, k).value


def test_the_best_renoise_is_where_brute_search_finds_it():
    found = best_renoise(exact(), COST)
    search = min(range(1, 200), key=lambda k: product(exact(), k))
    assert abs(found.value - search) <= 1
    assert found.error == 0


def test_the_formula_is_that_of_the_two_variances():
    closed, p = TOY.exact(BASE), BASE.pmf
    power = (p @ closed.within @ p).item()
    between, within = power - closed.mean.square().sum().item(), (p @ closed.m2).item() - power
    assert best_renoise(exact(), COST).value == pytest.approx(math.sqrt(20 * within / between), rel=1e-9)


def test_with_neither_budget_nor_target_the_advice_is_the_largest_ecm():
    renoise = tuple(range(1, 65))
    advice = advise(exact(), COST, couplings=IID, renoise=renoise)
    search = min(renoise, key=lambda k: product(exact(), k))
    assert advice.best.design.renoise == search
    assert advice.best.design.renders == 1  # all R are equally efficient, and the cheapest is named
    assert advice.gain.value.value == pytest.approx(product(exact(), 1) / product(exact(), search), rel=1e-9)
    assert {cell.design.renders for cell in advice.tied} == {2, 4, 8}
    assert {cell.design.renoise for cell in advice.tied} == {search}


def test_a_budget_is_kept_and_the_variance_is_the_least_within_it():
    advice = advise(exact(), COST, budget=100, cost="teacher calls")
    assert advice.best.cost.value <= 100
    least = min(c.prediction.variance.value for c in advice.cells if c.cost.value <= 100)
    assert advice.best.prediction.variance.value == least
    assert advice.gain.cost == "teacher calls"
    assert advice.gain.anchor == "method"
    assert not advice.gain.extrapolated
    assert "uniform, iid" in advice.gain.baseline


def test_a_target_is_met_at_the_least_cost():
    target = predict(exact(), 4, 1, None, iid).variance.value
    advice = advise(exact(), COST, target_variance=target)
    meeting = [c for c in advice.cells if c.prediction.variance.value <= target]
    assert advice.best.cost.value == min(c.cost.value for c in meeting)
    assert advice.best in meeting


def test_what_cannot_be_met_is_refused_with_what_can():
    with pytest.raises(ValueError, match="cheapest costs 21"):
        advise(exact(), COST, budget=5)
    with pytest.raises(ValueError, match="the least is"):
        advise(exact(), COST, target_variance=1e-12, renders=(1,), renoise=(1,))
    with pytest.raises(ValueError, match="not both"):
        advise(exact(), COST, budget=5, target_variance=1)


def test_strata_win_where_they_can_and_the_split_says_what_binds():
    advice = advise(exact(), COST, budget=500)
    assert advice.best.design.coupling != "iid"
    split = advice.best.prediction.split
    parts = {"render": split.render.value, "timestep": split.timestep.value, "noise": split.noise.value}
    assert advice.binds == max(parts, key=parts.get)
    assert advice.binds_clearly
    assert f"the {advice.binds} binds" in advice.reason
    assert str(advice.best.design) in str(advice)


def test_the_bound_is_reached_by_the_oracle_and_by_infinite_renoising():
    advice = advise(exact(), COST, couplings={"per-render": per_render})
    best = advice.best.prediction
    assert advice.bound.infinite.value == pytest.approx(best.split.render.value / best.variance.value)
    assert 0 < advice.bound.oracle.value <= 1
    single = advise(exact(), COST, couplings=IID, renoise=(1,), proposals={"iw": proportional(BASE, TOY.weight)})
    law = (BASE.pmf * exact().m2.sqrt()).sum() ** 2 - exact().mean_sq  # Eq. 24
    shares = single.bound.oracle.value * single.best.prediction.variance.value
    assert shares == pytest.approx(law.item() / single.best.design.renders, rel=0.02)


def test_antithetic_pairs_are_offered_where_the_tables_have_them():
    with_pairs = advise(exact(True), COST, couplings=IID)
    without = advise(exact(), COST, couplings=IID)
    assert {c.design.antithetic for c in with_pairs.cells} == {False, True}
    assert all(c.design.renoise % 2 == 0 for c in with_pairs.cells if c.design.antithetic)
    assert not any(c.design.antithetic for c in without.cells)
    # The toy's residual is linear in the noise, so pairs remove all of it.
    assert with_pairs.best.design.antithetic
    assert with_pairs.best.prediction.split.noise.value == pytest.approx(0, abs=1e-9)


def test_designs_that_are_one_by_definition_are_listed_once():
    cells = advise(exact(), COST, renoise=(1, 2), renders=(1, 2)).cells
    named = {
        (r, k): {c.design.coupling for c in cells if (c.design.renders, c.design.renoise) == (r, k)}
        for r, k in ((1, 1), (1, 2), (2, 1), (2, 2))
    }
    assert named[1, 1] == {"iid"}
    assert named[1, 2] == {"iid", "per-render"}
    assert named[2, 1] == {"iid", "global"}
    assert named[2, 2] == {"iid", "per-render", "global", "nested"}


def test_a_pilot_gives_intervals_that_hold_the_exact_figures_and_names_ties():
    tables = pilot(TOY, BASE, stream(4, "advice"), renders=40, bins=12)
    advice = advise(tables, COST, couplings={"iid": iid, "per-render": per_render})
    design = advice.best.design
    coupling = {"iid": iid, "per-render": per_render}[design.coupling]
    truth = predict(exact(), design.renders, design.renoise, None, coupling).variance.value
    low, high = advice.best.prediction.interval
    assert low < truth < high
    low, high = advice.gain.interval
    assert low < product(exact(), 1) / (truth * COST.predict(design.renders, design.renoise).value) < high
    assert advice.best_renoise.error > 0
    assert advice.tied
    assert all(cell is not advice.best for cell in advice.tied)


def test_without_variance_between_renders_reuse_has_no_limit():
    closed = GaussianToy(dim=4, gain_std=0.0).exact(BASE)
    tables = Tables.exact(BASE, closed.m2, closed.across, closed.across)
    assert best_renoise(tables, COST).value > 1e4


def test_the_cost_ratio_is_read_off_any_model():
    zero = Value(0.0, 0.0)
    model = CostModel(Value(3.0, 0.0), Value(10.0, 0.0), Value(2.0, 0.0), ((0.0,) * 3,) * 3, math.nan)
    assert cost_ratio(model) == pytest.approx(5)
    assert cost_ratio(COST) == pytest.approx(20)
    assert cost_ratio(CostModel(zero, Value(1.0, 0.0), zero, ((0.0,) * 3,) * 3, math.nan)) == math.inf


def test_four_numbers_reproduce_table_1_within_5_percent():
    model = FourNumberModel.fit(PAPER_K, PAPER)
    for name, column in PAPER.items():
        assert model.column(name, PAPER_K) == pytest.approx(column, rel=0.05)
    assert max(PAPER_K, key=model.ecm) == 8


def test_a_fit_finds_the_numbers_that_made_the_columns():
    truth = FourNumberModel(r=7.0, g=12.0, a=0.7, s=0.6)
    found = FourNumberModel.fit(PAPER_K, {name: truth.column(name, PAPER_K) for name in PAPER})
    assert [found.r, found.g, found.a, found.s] == pytest.approx([7.0, 12.0, 0.7, 0.6], rel=1e-4)


def test_a_uniform_column_alone_cannot_tell_r_from_g_but_a_timing_can():
    model, swapped = FourNumberModel(r=5.0, g=20.0), FourNumberModel(r=20.0, g=5.0)
    column = model.column("uniform", PAPER_K)
    assert column == pytest.approx(swapped.column("uniform", PAPER_K))
    found = FourNumberModel.fit(PAPER_K, {"uniform": column})
    assert (found.r, found.g) == pytest.approx((5.0, 20.0), rel=1e-3)
    timed = FourNumberModel.fit(PAPER_K, {"uniform": column}, cost_ratio=5.0)
    assert (timed.r, timed.g) == (pytest.approx(20.0, rel=1e-4), 5.0)


def test_one_stratum_does_nothing_and_the_peak_is_at_the_geometric_mean():
    model = FourNumberModel(r=5.0, g=20.0, a=0.8, s=0.5)
    assert model.left(1) == 1
    assert model.ecm(1, stratified=True) == model.ecm(1) == 1
    assert model.ecm(10) == max(model.ecm(k) for k in range(1, 200))
    assert model.best_renoise() == pytest.approx(10)


def test_the_four_number_model_is_the_tables_own_ecm_for_iid_draws():
    one = predict(exact(), 1, 1, None, iid)
    r = (one.variance.value - one.split.render.value) / one.split.render.value
    model = FourNumberModel(r=r, g=20.0)
    for k in PAPER_K:
        assert model.ecm(k) == pytest.approx(product(exact(), 1) / product(exact(), k), rel=1e-9)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="needed"):
        FourNumberModel(r=-1.0, g=1.0)
    with pytest.raises(ValueError, match="methods are"):
        FourNumberModel.fit(PAPER_K, {"best": PAPER["iw"]})
    with pytest.raises(ValueError, match="positive ECM"):
        FourNumberModel.fit(PAPER_K, {"uniform": (1.0, 2.0)})
