"""What the report reads: records of pilots and cells, torn, damaged, repeated or without one another."""

import json

import pytest

from carv.problems import ProblemConfig
from carv.report import findings, page
from carv.report.methods import UNIFORM, Method
from carv.report.plate import shown
from carv.report.summary import summary
from carv.runs.cell import Cell, StopConfig, run_cell
from carv.runs.pilot_folder import cost_to_dict
from carv.variance.advice import Design
from carv.variance.values import Value

from sweep_records import cells, cost_model, designs, exact_pilot, hostile_findings, write_records


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return hostile_findings(tmp_path_factory.mktemp("full"))


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
