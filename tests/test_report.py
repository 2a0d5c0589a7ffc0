"""The report: what it reads, what it says, and a page that is safe to open anywhere."""

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from carv.density import uniform_steps
from carv.problems import ProblemConfig
from carv.proposals import defensive, proportional
from carv.report import findings, page
from carv.report.checks import checks
from carv.report.commands import commands
from carv.report.headline import headline
from carv.report.methods import UNIFORM, Method, variance_ratio
from carv.report.plate import interval, shown, times
from carv.report.plates import cost, profile
from carv.report.profile import norms
from carv.report.sensitivity import RATIOS, sensitivity
from carv.report.style import COLOURS, drawn, legend_above
from carv.report.summary import summary
from carv.rng import stream
from carv.runs.cell import Cell, StopConfig, run_cell
from carv.runs.pilot_folder import PilotRecord, cost_to_dict
from carv.strata import COUPLINGS, iid, per_render
from carv.tasks.toy import GaussianToy
from carv.variance.advice import Design, canonical
from carv.variance.cost import CostModel, StepCost
from carv.variance.pilot import pilot
from carv.variance.predict import predict
from carv.variance.tables import Tables
from carv.variance.values import Value

TOY = GaussianToy(dim=4, gain_std=0.15)
BASE = uniform_steps(20, 79)
WEIGHT = proportional(BASE, TOY.weight)
SCRIPT = "<script>document.title='run'</script>\"'$x$"
PROVENANCE = {"carv": "0", "source": "a" * 16, "torch": "2", "python": "3.11", "device": "cpu (x)", "threads": 1}


def exact_tables():
    closed = TOY.exact(BASE)
    return Tables.exact(BASE, closed.m2, closed.within, closed.across)


def cost_model(upstream=0.02, denoise=0.001, c0=0.0, error=0.0):
    terms = [Value(c, error * c) for c in (c0, upstream, denoise)]
    covariance = tuple(tuple((terms[i].error ** 2 if i == j else 0.0) for j in range(3)) for i in range(3))
    return CostModel(*terms, covariance, 1.0)


def pilot_record(tables, problem=None, model=None, proposals=None, fingerprint=None):
    step = StepCost(0.02, 0.019, 0.021, (0.02,) * 6, None)
    known = {"uniform": None, "weight": WEIGHT, "defensive": defensive(BASE, WEIGHT), **(proposals or {})}
    weight = ("1 - acp", tuple(TOY.weight(tables.t).tolist()))
    problem = problem or ProblemConfig("toy", t_min=20, t_max=79)
    model = model or cost_model()
    return PilotRecord(
        problem, tables, known, weight, {(1, 1): step}, model, 0, {"renders": 12}, fingerprint or {}, PROVENANCE
    )


def cell_record(design, value, problem=None, error=0.02, seed=0, means=None, **changed):
    problem = problem or ProblemConfig("toy", t_min=20, t_max=79)
    cell = Cell(problem, design, seed, StopConfig("fixed", cap=1500))
    figure = {"value": value, "error": error * value, "interval": [value * (1 - 2 * error), value * (1 + 2 * error)]}
    known = {"kind": "cell", "format": 1, "hash": cell.hash, "cell": cell.to_dict(), "fingerprint": {}}
    return known | {
        "provenance": PROVENANCE,
        "variance": figure,
        "latent_variance": None,
        "mean_norm_squared": figure,
        "tails": {"trusted": True, "kurtosis": 3.0, "top_share": 0.05, "verdict": "The tails are moderate."},
        "replicates": 1500,
        "converged": True,
        "stopped": "1500 replicates, as asked",
        "counts": None,
        "not_finite": 0,
        "clipped": 0,
        "policy": "",
        "squares": {"block": 50, "means": means or []},
        "spent": {"seconds": 1.0},
        **changed,
    }


def designs(renders=(1, 2, 4), renoise=(1, 2, 4, 8)):
    for proposal in ("uniform", "weight"):
        for coupling in ("iid", "per-render"):
            for r in renders:
                for k in renoise:
                    if not (coupling == "per-render" and k == 1):
                        yield Design(r, k, proposal, coupling)


def exact_variance(design):
    proposal = None if design.proposal == "uniform" else WEIGHT
    return predict(exact_tables(), design.renders, design.renoise, proposal, COUPLINGS[design.coupling]).variance.value


def cells(factor=1.0, problem=None, noise=0.02, **changed):
    rng = random.Random(1)
    return [cell_record(d, exact_variance(d) * factor * rng.gauss(1, noise), problem, **changed) for d in designs()]


def write_records(folder, records, tail=""):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


@pytest.fixture(scope="module")
def measured_tables():
    return pilot(TOY, BASE, stream(5, "report"), renders=24, bins=12)


@pytest.fixture(scope="module")
def full(tmp_path_factory, measured_tables):
    """A pilot and its cells, with a prompt, a proposal and a folder that would do harm if they were not escaped."""
    here = tmp_path_factory.mktemp("full")
    problem = ProblemConfig("sds", prompt=SCRIPT, t_min=20, t_max=79)
    folder = here / "<img src=x onerror=alert(1)>"
    pilot_record(measured_tables, problem, cost_model(error=0.05), {SCRIPT: WEIGHT}).save(folder)
    write_records(folder, cells(problem=problem))
    return findings.load([folder])


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, full):
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(full, path)
    return path


def exact_pilot(folder, **changed):
    pilot_record(exact_tables(), **changed).save(folder)
    return folder


class Elements(HTMLParser):
    """Names, ids, references and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.attributes, self.texts = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value)
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name == "href" and (value or "").startswith("#"):
                self.references.add(value[1:])

    def handle_data(self, data):
        self.texts.append(data)


# What is read


def test_a_record_that_a_sweep_writes_is_read(tmp_path):
    problem = ProblemConfig("toy")
    made = run_cell(Cell(problem, Design(1, 2, "weight", "per-render"), 3, StopConfig("fixed", cap=100)))
    found = findings.load([write_records(tmp_path, [made])]).studies[0]
    cell = found.study.cells[0]
    assert (cell.design, cell.seed, cell.replicates) == (Design(1, 2, "weight", "per-render"), 3, 100)
    assert cell.variance == Value(made["variance"]["value"], made["variance"]["error"])
    assert cell.blocks == made["squares"]


def test_pilot_and_cells_of_one_problem_are_put_together(full):
    assert len(full.studies) == 1
    assert len(full.studies[0].study.cells) == len(list(designs()))
    assert not full.notes


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    whole = cells()
    for tail in ('{"kind": "ce', "{\n"):
        found = findings.load([write_records(tmp_path, whole, tail)])
        assert len(found.studies[0].study.cells) == len(whole)
        assert "last line was not finished" in found.notes[0]


def test_a_file_that_ends_with_a_newline_has_no_torn_line(tmp_path):
    assert findings.load([write_records(tmp_path, cells())]).notes == ()


def test_unknown_kinds_and_repeated_cells_are_counted(tmp_path):
    whole = cells()
    odd = [{"kind": "weather", "hash": str(i)} for i in range(3)]
    found = findings.load([write_records(tmp_path, whole + odd + whole[:2])])
    assert len(found.studies[0].study.cells) == len(whole)
    assert "3 records of kind 'weather' skipped" in found.notes[0]
    assert "2 cells skipped" in found.notes[1]


def without(record, *path):
    copy = json.loads(json.dumps(record))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return copy


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: without(record, "variance"),
        lambda record: without(record, "cell", "design", "renders"),
        lambda record: without(record, "cell", "problem", "task"),
        lambda record: record | {"format": 2},
        lambda record: record | {"tails": None},
        lambda record: record | {"variance": {"value": None, "error": None, "interval": None}},
        lambda record: record | {"variance": {"value": -1.0, "error": 0.1, "interval": None}},
    ],
)
def test_a_damaged_record_is_one_sentence_with_file_and_line(tmp_path, damage):
    first, second, *_ = cells()
    write_records(tmp_path, [first, damage(second), first])
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2, is damaged"):
        findings.load([tmp_path])


def test_folders_without_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one folder"):
        findings.load([])
    with pytest.raises(ValueError, match=r"holds neither pilot\.json, records\.jsonl nor experiment\.json"):
        findings.load([tmp_path])
    with pytest.raises(ValueError, match="nothing to report"):
        findings.load([write_records(tmp_path, [])])
    exact_pilot(tmp_path / "pilot")
    (tmp_path / "pilot" / "tables.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        findings.load([tmp_path / "pilot"])


def test_records_of_another_state_of_the_problem_are_not_compared(tmp_path):
    pilot_folder = exact_pilot(tmp_path / "pilot", fingerprint={"checkpoint": "old"})
    changed = [record | {"fingerprint": {"checkpoint": "new"}} for record in cells()]
    found = findings.load([pilot_folder, write_records(tmp_path / "sweep", changed)])
    assert len(found.studies) == 2
    assert not found.studies[0].coverage
    assert "another state" in found.notes[0]


def test_a_cost_record_gives_cells_without_a_pilot_their_seconds(tmp_path):
    problem = ProblemConfig("toy", t_min=20, t_max=79).to_dict()
    timed = {"kind": "cost", "hash": "c", "problem": problem, "fingerprint": {}, "cost": cost_to_dict(cost_model())}
    found = findings.load([write_records(tmp_path, [*cells(), timed])]).studies[0]
    assert (found.costing.unit, found.costing.assumed) == ("seconds", False)
    assert found.measured[UNIFORM][0].cost.value == pytest.approx(0.021)


def test_at_most_six_curves_are_drawn_with_the_advised_one_among_them(full):
    found = full.studies[0]
    best = Method.of(found.advice.best.design)
    assert len(found.methods) <= 6
    assert best.at(1, 8) in {method.at(1, 8) for method in found.methods}


def test_a_variance_without_a_known_error_is_shown_as_such(tmp_path):
    made = cells()[:6]
    made[0]["variance"] = {"value": 2.5, "error": None, "interval": None}
    found = findings.load([write_records(tmp_path, made)])
    assert shown(found.studies[0].study.cells[0].variance) == "2.5 (error not known)"
    assert json.dumps(summary(found), allow_nan=False)
    assert "2.5 (error not known)" in page.render(found)


# What is said


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


# The page


def test_the_page_holds_every_figure_with_its_caption_and_numbers(page_file):
    elements = Elements(page_file.read_text())
    names = ("split", "cost", "ecm", "re", "coverage", "norms", "proposals", "sensitivity")
    assert [f"s0-{name}" for name in names if f"s0-{name}" not in elements.ids] == []
    assert elements.tags.count("svg") == elements.tags.count("figcaption") == len(names)
    assert elements.tags.count("details") == len(names) + 1
    labels = [value for tag, name, value in elements.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == len(names)
    assert all(len(label) > 20 for label in labels)


def test_ids_are_unique_and_every_reference_has_its_target(page_file):
    elements = Elements(page_file.read_text())
    assert len(elements.ids) == len(set(elements.ids))
    assert elements.references
    assert elements.references <= set(elements.ids)


def test_nothing_is_loaded_and_nothing_can_run(page_file):
    elements = Elements(page_file.read_text())
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "metadata", "foreignobject"} & set(
        elements.tags
    )
    assert not [name for _, name, _ in elements.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(value.startswith("#") for _, name, value in elements.attributes if name == "href")
    assert not re.search(r"https?://|@import|url\((?!#)", page_file.read_text())
    policy = next(value for tag, _, value in elements.attributes if tag == "meta" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_prompts_proposals_and_paths_are_shown_as_they_are_written(page_file):
    text = page_file.read_text()
    assert SCRIPT not in text
    shown_text = "".join(Elements(text).texts)
    assert f"sds: {SCRIPT}" in shown_text
    assert f"IW ({SCRIPT})" in shown_text
    assert "<img src=x onerror=alert(1)>" in shown_text


def test_the_same_records_make_the_same_figures_to_the_byte(page_file, full):
    text = page_file.read_text()
    for name, make in (("cost", cost.plate), ("norms", profile.norms_plate)):
        assert make(full.studies[0], f"s0-{name}").svg in text


def test_every_colour_of_a_figure_is_one_of_the_page(page_file):
    text = page_file.read_text()
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--ink)" in svgs
    assert not re.findall(r"(?:fill|stroke|color): ?#[0-9a-fA-F]{3,6}", svgs)


@pytest.mark.parametrize(("scheme", "paper"), [(0, "#fdfcfa"), (1, "#14171a")])
def test_colours_stand_out_from_their_paper(scheme, paper):
    """WCAG 2.1: 4.5 for text, 3 for graphics."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, pair in COLOURS.items():
        high, low = sorted((luminance(pair[scheme]), luminance(paper)), reverse=True)
        least = {"ink": 4.5, "soft": 4.5, "line": 1.0}.get(name, 3.0)
        assert (high + 0.05) / (low + 0.05) >= least, name


def test_a_pilot_alone_makes_a_page_without_coverage(tmp_path):
    text = page.render(findings.load([exact_pilot(tmp_path)]))
    ids = Elements(text).ids
    assert "s0-split" in ids
    assert "s0-coverage" not in ids
    assert "carv pilot" in text


def test_cells_alone_make_a_page_in_teacher_calls(tmp_path):
    found = findings.load([write_records(tmp_path, cells())])
    text = page.render(found)
    ids = Elements(text).ids
    assert {"s0-cost", "s0-ecm", "s0-re", "s0-sensitivity"} <= set(ids)
    assert not {"s0-split", "s0-norms", "s0-proposals", "s0-coverage"} & set(ids)
    assert "teacher calls, one render as one" in text
    assert found.studies[0].costing.assumed


def test_a_single_cell_makes_a_page(tmp_path):
    found = findings.load([write_records(tmp_path, cells()[:1])])
    assert "1 cell was measured" in page.render(found)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = findings.load([write_records(tmp_path / "records", cells()[:1])])
    target = tmp_path / "new" / "report.html"
    page.write(found, target)
    before = target.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            page.write(found, target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    found = findings.load([write_records(tmp_path, cells()[:2])])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"carv\[report\]"):
        page.write(found, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def chromium(*arguments, folder):
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here to open the page with")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile")
    found = subprocess.run([program, *flags, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-500:]
    return found


def test_a_browser_opens_the_page_without_an_error_and_runs_nothing(page_file, tmp_path):
    found = chromium("--enable-logging=stderr", "--dump-dom", page_file.as_uri(), folder=tmp_path)
    assert "CONSOLE" not in found.stderr
    elements = Elements(found.stdout)
    assert "script" not in elements.tags
    assert elements.tags.count("svg") == 8
    title = re.search("<title>(.*?)</title>", found.stdout, flags=re.DOTALL)[1]
    assert title.startswith("carv report: sds:")


def test_a_phone_needs_no_sideways_scrolling_and_the_switch_turns_colours_over(page_file, tmp_path):
    """Opened in a frame of 360 pixels, with all tables unfolded."""
    harness = tmp_path / "harness.html"
    harness.write_text(
        f"""<iframe id="f" src="{page_file.as_uri()}" width="360" height="800"></iframe><pre id="o"></pre><script>
        f.onload = () => {{
          const d = f.contentDocument, style = () => f.contentWindow.getComputedStyle(d.querySelector(".page"))
          const paper = () => style().backgroundColor
          const before = paper()
          d.querySelectorAll("details").forEach(x => x.open = true)
          const wide = [...d.querySelectorAll("svg")].filter(x => x.getBoundingClientRect().right > 360).length
          d.querySelector("#scheme").click()
          o.textContent = JSON.stringify({{scroll: d.documentElement.scrollWidth, width: f.contentWindow.innerWidth,
            wide, before, after: paper()}})
        }}</script>"""
    )
    found = chromium("--allow-file-access-from-files", "--dump-dom", harness.as_uri(), folder=tmp_path)
    seen = json.loads(re.search(r'<pre id="o">(\{.*?\})</pre>', found.stdout)[1])
    assert seen["scroll"] <= seen["width"] <= 360
    assert seen["wide"] == 0
    assert {seen["before"], seen["after"]} == {"rgb(253, 252, 250)", "rgb(20, 23, 26)"}


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


def test_a_name_in_a_legend_is_no_formula_and_no_markup():
    def draw(axes):
        axes.plot([1, 2], [1, 2], label="$x_1$ <b>")
        legend_above(axes)

    svg = drawn(draw, "key", 'a "figure"')
    assert ">$x_1$ &lt;b&gt;</text>" in svg
    assert 'aria-label="a &quot;figure&quot;"' in svg
