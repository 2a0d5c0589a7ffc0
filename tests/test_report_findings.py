"""What the report says: predictions, gains, coverage, sensitivity, warnings and commands."""

import json
import math
import random
import shlex
from dataclasses import replace

import numpy as np
import pytest

from carv.report import findings
from carv.report.checks import checks
from carv.report.commands import commands
from carv.report.headline import headline
from carv.report.methods import UNIFORM, Method, variance_ratio
from carv.report.plate import interval, shown, times
from carv.report.profile import norms
from carv.report.sensitivity import RATIOS, sensitivity
from carv.report.summary import summary
from carv.strata import COUPLINGS, iid, per_render
from carv.variance.advice import Design, canonical
from carv.variance.predict import predict
from carv.variance.values import Value

from sweep_records import (
    BASE,
    PROVENANCE,
    SCRIPT,
    TOY,
    WEIGHT,
    cell_record,
    cells,
    cost_model,
    designs,
    exact_pilot,
    exact_tables,
    exact_variance,
    hostile_findings,
    pilot_record,
    pilot_tables,
    write_records,
)


@pytest.fixture(scope="module")
def measured_tables():
    return pilot_tables()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return hostile_findings(tmp_path_factory.mktemp("full"))


def test_designs_that_are_one_by_definition_have_one_name():
    def name(r, k, coupling, antithetic=False):
        return canonical(Design(r, k, "uniform", coupling, antithetic)).coupling

    assert name(4, 1, "per-render") == name(1, 1, "global") == name(1, 1, "nested") == "iid"
    assert name(1, 8, "global") == name(1, 8, "nested") == "per-render"
    assert name(4, 1, "nested") == name(4, 1, "global") == "global"
    assert name(4, 2, "per-render", True) == "iid"
    assert name(2, 8, "per-render") == "per-render"
    assert name(2, 8, "nested") == "nested"


def test_same_designs_are_predicted_the_same():
    tables = exact_tables()
    for coupling in ("per-render", "global", "nested"):
        for r, k in ((1, 1), (4, 1), (1, 8), (2, 4)):
            there = canonical(Design(r, k, "uniform", coupling)).coupling
            a, b = (predict(tables, r, k, WEIGHT, COUPLINGS[one]).variance.value for one in (coupling, there))
            assert a == pytest.approx(b, rel=1e-9)


def test_the_ecm_is_the_product_of_both_ratios_where_cost_goes_with_renders(tmp_path):
    found = findings.load([exact_pilot(tmp_path)]).studies[0]
    one = exact_variance(Design(1, 1, "uniform", "iid"))
    for method in (UNIFORM, Method("weight", "per-render")):
        for gain in found.gains[method]:
            k = gain.entry.design.renoise
            expected = one * 21 / (exact_variance(gain.entry.design) * (20 + k))
            assert gain.ecm.value.value == pytest.approx(expected, rel=1e-9)
            assert not gain.ecm.extrapolated
            assert gain.ecm.anchor == "method"


def test_a_fixed_cost_is_paid_once_by_the_baseline_too(tmp_path):
    model = cost_model(c0=0.1)
    found = findings.load([exact_pilot(tmp_path, model=model)]).studies[0]
    gain = next(gain for gain in found.gains[UNIFORM] if gain.entry.design.renoise == 8)
    needed = exact_variance(Design(1, 1, "uniform", "iid")) / gain.entry.variance.value
    low, high = (model.predict(r, 1).value for r in (math.floor(needed), math.ceil(needed)))
    share = math.log(needed / math.floor(needed)) / math.log(math.ceil(needed) / math.floor(needed))
    cost = low ** (1 - share) * high**share
    assert gain.ecm.value.value == pytest.approx(cost / model.predict(1, 8).value, rel=1e-9)


def test_re_compares_at_the_same_renders_and_renoise(tmp_path):
    found = findings.load([exact_pilot(tmp_path)]).studies[0]
    for gain in found.gains[Method("weight", "per-render")]:
        design = gain.entry.design
        uniform = exact_variance(Design(1, design.renoise, "uniform", "iid"))
        assert gain.efficiency.value == pytest.approx(uniform / exact_variance(design), rel=1e-9)


def test_the_headline_and_the_gain_curve_agree_with_the_advice(tmp_path):
    found = findings.load([exact_pilot(tmp_path)]).studies[0]
    best, gain = found.advice.best.design, found.advice.gain
    assert gain.value.value >= max(g.ecm.value.value for several in found.gains.values() for g in several)
    first = headline(found)
    assert first.advice.startswith(f"Run {Method.of(best).name} at (R, K) = ({best.renders}, {best.renoise}): ")
    assert shown(gain.value) in first.advice
    assert ("Gain", f"{times(gain.value)}, {interval(gain.interval)}") in first.facts


def test_a_gain_that_is_not_told_apart_from_none_is_not_promised(tmp_path):
    model = cost_model(error=2.0)
    first = headline(findings.load([exact_pilot(tmp_path, model=model)]).studies[0])
    assert "is not told apart from none" in first.advice
    assert "times less compute" not in first.advice


def test_exact_measurements_of_an_exact_pilot_are_all_covered(tmp_path):
    folder = exact_pilot(tmp_path)
    found = findings.load([write_records(folder, cells(noise=0.0))]).studies[0]
    assert len(found.coverage) == len(list(designs()))
    assert all(one.covered and one.ratio.value == pytest.approx(1) for one in found.coverage)


def test_coverage_counts_honest_errors_95_in_100_and_warns_of_a_bias(tmp_path):
    """600 cells with normal errors of 2 %: 95 % -+ 0.9 % are covered, so [0.915, 0.98] has 4 standard errors."""
    rng, design = random.Random(7), Design(1, 4, "uniform", "iid")
    folder, truth = exact_pilot(tmp_path), exact_variance(design)

    def measured(seed, bias):
        value = truth * (bias + 0.02 * rng.gauss(0, 1))
        ends = [value - 1.96 * 0.02 * truth, value + 1.96 * 0.02 * truth]
        figure = {"value": value, "error": 0.02 * truth, "interval": ends}
        return cell_record(design, value, seed=seed) | {"variance": figure}

    honest = findings.load([write_records(folder, [measured(i, 1.0) for i in range(600)])]).studies[0]
    share = sum(one.covered for one in honest.coverage) / 600
    assert 0.915 <= share <= 0.98
    biased = findings.load([write_records(folder, [measured(i, 1.2) for i in range(40)])]).studies[0]
    assert not any(one.covered for one in biased.coverage)
    assert any(check.serious and "40 of 40 predictions" in check.text for check in checks(biased))


def test_cells_with_common_random_numbers_are_compared_more_tightly(tmp_path):
    rng = np.random.default_rng(0)
    shared = 1 + 0.1 * rng.standard_normal(30)
    means = {"a": shared, "b": shared + 0.01 * rng.standard_normal(30)}
    a = cell_record(Design(1, 2, "uniform", "iid"), 1.0, means=means["a"].tolist())
    b = cell_record(Design(1, 2, "weight", "iid"), 1.0, means=means["b"].tolist())
    plain = [cell_record(Design(1, 2, p, "iid"), 1.0) for p in ("uniform", "weight")]

    def error(records, **changed):
        found = findings.load([write_records(tmp_path, [record | changed for record in records])]).studies[0]
        first, second = (found.measured[Method(p, "iid")][0] for p in ("uniform", "weight"))
        return variance_ratio(first, second).error

    assert error([a, b]) < 0.4 * error(plain)
    other = cell_record(Design(1, 2, "weight", "iid"), 1.0, seed=1, means=means["b"].tolist())
    assert error([a, other]) == pytest.approx(error(plain))


def test_the_best_k_rises_with_the_cost_of_a_render_and_is_the_best_of_those_measured(tmp_path):
    found = findings.load([exact_pilot(tmp_path)]).studies[0]
    curves = {one.method: one for one in sensitivity(found.predicted)}
    uniform = curves[UNIFORM]
    assert list(uniform.renoise) == sorted(uniform.renoise)
    variance = {k: exact_variance(Design(1, k, "uniform", "iid")) for k in (1, 2, 4, 8, 16, 32)}
    for alpha, k, value in zip(RATIOS, uniform.renoise, uniform.ecm, strict=True):
        products = {n: (alpha + n) * v for n, v in variance.items()}
        assert products[k] == min(products.values())
        assert value.value == pytest.approx(products[1] / products[k], rel=1e-9)


def test_the_parts_of_the_norm_add_up_to_the_closed_forms():
    seen, closed = norms(exact_tables()), TOY.exact(BASE)
    assert [f.value**2 for f in seen.total] == pytest.approx(closed.m2.tolist())
    assert [f.value**2 for f in seen.mean] == pytest.approx(closed.across.diagonal().tolist())
    parts = zip(seen.mean, seen.render, seen.noise, strict=True)
    assert [sum(f.value**2 for f in row) for row in parts] == pytest.approx(closed.m2.tolist())


def test_norms_without_a_render_are_those_of_a_pilot_without_it(measured_tables):
    """The mean part is a statistic of pairs: leaving one render out takes its row and its column."""
    tables, left = measured_tables, 3
    keep = [r for r in range(tables.renders) if r != left]
    n = tables.renders
    diagonal = tables.across.diagonal(dim1=1, dim2=2)
    expected = (n * diagonal.mean(0) - 2 * diagonal[left]) / (n - 2)
    total = norms(tables).total
    assert [f.without[left] ** 2 for f in norms(tables).mean] == pytest.approx(expected.clamp(min=0).tolist())
    assert [f.without[left] ** 2 for f in total] == pytest.approx(tables.norm_sq[keep].mean((0, 2)).tolist())


def test_what_could_be_wrong_is_said_and_serious_things_first(tmp_path):
    made = cells()
    made[0]["tails"] |= {"trusted": False, "verdict": "The tails are too heavy for this variance."}
    made[1] |= {"converged": False, "stopped": "the cap of 1500 replicates was reached"}
    made[2] |= {"not_finite": 7}
    made[3] |= {"clipped": 5, "policy": "draws above 3 are clipped"}
    made[4] |= {"provenance": PROVENANCE | {"carv": "1"}}
    said = checks(findings.load([write_records(tmp_path, made)]).studies[0])
    for words in ("tails too heavy", "cap of 1500", "7 contributions", "draws above 3 are clipped", "different carv"):
        assert sum(words in check.text for check in said) == 1
    assert sorted(said, key=lambda check: not check.serious) == list(said)
    serious = " ".join(check.text for check in said if check.serious)
    assert "tails too heavy" in serious
    assert "7 contributions" in serious
    assert "cap of 1500" not in serious


def test_heavy_tails_of_a_pilot_are_serious(tmp_path, measured_tables):
    norm_sq = measured_tables.norm_sq.clone()
    norm_sq[0, 0, 0] = 1e3 * norm_sq.sum()
    pilot_record(replace(measured_tables, norm_sq=norm_sq)).save(tmp_path)
    said = checks(findings.load([tmp_path]).studies[0])
    assert any(check.serious and "tails are too heavy" in check.text for check in said)
    assert any(check.serious and "One of 24 renders" in check.text for check in said)


def test_costs_that_are_not_told_apart_from_0_are_serious(tmp_path):
    model = replace(cost_model(), c_denoise=Value(0.001, 0.001))
    said = checks(findings.load([exact_pilot(tmp_path, model=model)]).studies[0])
    assert any(check.serious and "cost of a teacher draw" in check.text for check in said)


def test_draws_that_cost_nothing_ask_for_the_largest_k(tmp_path):
    found = findings.load([exact_pilot(tmp_path, model=cost_model(denoise=0.0))]).studies[0]
    assert found.ratio is None
    assert found.advice is not None
    assert found.advice.best.design.renoise == 32
    assert "One more draw cost nothing that could be measured" in found.advice.reason


def test_the_commands_can_be_pasted_into_a_shell(full):
    lines = commands(full.studies[0].study, full.folders)
    words = [shlex.split(line) for line in lines]
    assert [line[:2] for line in words] == [["carv", "pilot"], ["carv", "sweep"], ["carv", "report"]]
    for line in words[:2]:
        assert line[line.index("--prompt") + 1] == SCRIPT
    sweep = words[1]
    assert sweep[sweep.index("--renders") + 1 :][:3] == ["1", "2", "4"]
    assert sweep[sweep.index("--max-draws") + 1] == "32"


def test_the_summary_is_json_and_has_an_interval_for_each_number(full):
    made = json.loads(json.dumps(summary(full), allow_nan=False))
    study = made["studies"][0]
    assert study["advice"]["gain"].keys() >= {"value", "error", "interval", "anchor", "baseline"}
    assert study["coverage"]["cells"] == len(list(designs()))
    for cell in study["predicted"] + study["measured"]:
        assert len(cell["variance"]["interval"]) == 2


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((1.9, 2.4), "1.9 to 2.4"),
        ((0.98765, 0.98799), "0.98765 to 0.98799"),
        ((2.0, 2.0), "2 (exact)"),
        ((0.0, math.inf), "not known"),
    ],
)
def test_intervals_have_the_digits_that_their_width_resolves(ends, text):
    assert interval(ends) == text


def test_predicted_cells_do_not_depend_on_what_else_is_drawn(tmp_path):
    """A user's further proposal changes no figure of the others."""
    plain = findings.load([exact_pilot(tmp_path / "a")]).studies[0]
    more = findings.load([exact_pilot(tmp_path / "b", proposals={"mine": WEIGHT})]).studies[0]
    for method in plain.predicted:
        if method in more.predicted:
            assert [e.variance.value for e in plain.predicted[method]] == [
                e.variance.value for e in more.predicted[method]
            ]
    assert predict(exact_tables(), 1, 1, None, iid).variance.value == pytest.approx(
        predict(exact_tables(), 1, 1, None, per_render).variance.value
    )


def test_the_best_ecm_lies_in_its_own_interval(full):
    for one in sensitivity(full.studies[0].predicted):
        for value, (low, high) in zip(one.ecm, one.interval, strict=True):
            assert low <= value.value <= high
            assert (low < high) == (value.error > 0)
