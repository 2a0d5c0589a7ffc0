"""A cell of a sweep: its settings, its hash, and the record of what was measured."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from carv.problems import ProblemConfig, load_problem
from carv.rng import stream
from carv.runs.cell import Cell, StopConfig, block_means, run_cell
from carv.variance import measure as measuring
from carv.variance.advice import Design
from carv.variance.stopping import fixed_count, paper_rule, target_error

from toy_cells import FEW, TOY, cell, numbers


def test_a_cell_survives_json_and_keeps_its_hash():
    for one in (cell(), cell(stop=StopConfig()), cell(stop=StopConfig("paper"), seed=2**70)):
        again = Cell.from_dict(json.loads(json.dumps(one.to_dict())))
        assert again == one
        assert again.hash == one.hash
    # Written down, so that stores of today can be resumed tomorrow.
    assert Cell(TOY, Design(1, 8, "weight", "per-render"), 0).hash == "39f76a776a6901ee"


def test_every_setting_changes_the_hash():
    others = [
        replace(cell(), problem=ProblemConfig(t_min=21)),
        cell(renders=2),
        cell(renoise=4),
        cell(proposal="weight"),
        cell(coupling="global"),
        cell(seed=1),
        cell(stop=StopConfig("fixed", cap=121)),
        cell(stop=StopConfig("target")),
        replace(cell(), design=Design(1, 2, "uniform", "iid", True)),
    ]
    assert len({cell().hash, *(one.hash for one in others)}) == len(others) + 1


def test_what_is_not_a_cell_is_refused_with_a_sentence():
    good = cell().to_dict()
    for wrong in ({}, good | {"design": {"renders": 1}}, good | {"stop": {"rule": "fixed", "often": 1}}):
        with pytest.raises(ValueError, match="does not describe a cell"):
            Cell.from_dict(wrong)


def test_stop_settings_make_the_rules_they_name_and_refuse_what_a_rule_does_not_have():
    assert StopConfig().build() == target_error()
    assert StopConfig("target", 0.1, 50, 10, 500).build() == target_error(0.1, 50, 10, 500)
    assert StopConfig("paper").build() == paper_rule()
    assert StopConfig("fixed", cap=7).build() == fixed_count(7)
    for wrong, words in [
        ({"rule": "luck"}, "unknown stop rule"),
        ({"rule": "paper", "cap": 100}, "'paper' has no setting 'cap'"),
        ({"rule": "fixed", "relative": 0.1}, "'fixed' has no setting 'relative'"),
        ({"relative": -0.1}, "positive"),
    ]:
        with pytest.raises(ValueError, match=words):
            StopConfig(**wrong)


def test_a_record_holds_what_measure_found_and_how_it_was_made():
    one = cell(2, 4, "weight", "per-render")
    found = run_cell(one)

    problem = load_problem(TOY)
    truth = measuring.measure(
        problem.task, problem.estimator(one.design), stream(0, "measure"), stop=fixed_count(FEW.cap)
    )
    low, high = truth.variance.interval()
    assert found["variance"] == {"value": truth.variance.value, "error": truth.variance.error, "interval": [low, high]}
    assert found["latent_variance"]["value"] == truth.latent_variance.value
    assert found["mean_norm_squared"]["error"] == truth.mean_norm_squared.error
    assert found["counts"] == asdict(truth.counts) == {"upstream": 240, "teacher": 960, "backward": 240, "encoder": 0}
    assert (found["replicates"], found["converged"], found["stopped"]) == (120, True, "120 replicates, as asked")
    assert found["tails"]["verdict"] == truth.tails.verdict
    assert found["tails"]["trusted"] == truth.tails.trusted
    assert (found["kind"], found["format"], found["hash"], found["cell"]) == ("cell", 1, one.hash, one.to_dict())
    assert {"carv", "source", "torch", "device"} <= found["provenance"].keys()
    assert found["fingerprint"] == {}
    assert found["spent"]["seconds"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_cell_gives_the_same_numbers_again_and_cells_share_their_renders_and_noise():
    """With almost the same proposal the means of |g - c|^2 over 10 blocks are almost the same: a correlation above 0.9,
    which 10 independent pairs reach twice in 10 000.
    """
    long = StopConfig("fixed", cap=500)
    first = run_cell(cell(1, 4, "weight", stop=long))
    other = run_cell(cell(1, 4, "defensive", stop=long))
    a, b = (torch.tensor(found["squares"]["means"], dtype=torch.float64) for found in (first, other))
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9
    assert numbers(run_cell(cell())) == numbers(run_cell(cell()))
    assert run_cell(cell(seed=1))["variance"] != run_cell(cell())["variance"]


def test_blocks_of_squares_are_in_order_of_replicate_and_only_whole_ones_are_kept():
    squares = torch.arange(120, dtype=torch.float64)
    assert block_means(squares) == [24.5, 74.5]
    assert block_means(squares[:49]) == []

    problem, at = load_problem(TOY), stream(0, "measure")
    estimator = problem.estimator(cell().design)
    centre = measuring.pilot_centre(problem.task, estimator, at)
    draw = measuring.replicate_of(problem.task, estimator)
    by_hand = [float((draw(at.child("replicate", i)).gradient - centre.gradient).square().sum()) for i in range(100)]
    found = run_cell(cell())["squares"]
    assert found["block"] == 50
    assert found["means"] == pytest.approx([sum(by_hand[:50]) / 50, sum(by_hand[50:]) / 50], rel=1e-12)


def test_squares_are_in_order_of_replicate_in_whatever_order_parts_were_merged():
    def draw(at):
        return torch.randn(3, generator=at.generator(), dtype=torch.float64)

    at = stream(5)
    centre = measuring.pilot_centre(draw, None, at)
    a, b, c = (measuring.collect(draw, None, at, first, 4, centre=centre) for first in (0, 4, 8))
    whole = measuring.conclude(a.merge(b).merge(c), "").squares
    assert torch.equal(measuring.conclude(c.merge(a).merge(b), "").squares, whole)
    assert float(whole[9]) == pytest.approx(float((draw(at.child("replicate", 9)) - centre.gradient).square().sum()))


def test_what_is_not_finite_is_null_in_a_record(monkeypatch):
    broken = measuring.measure(lambda at: torch.ones(2), None, stream(0), stop=fixed_count(4))
    broken = replace(broken, tails=replace(broken.tails, kurtosis=float("nan"), top_share=float("inf")))
    monkeypatch.setattr("carv.runs.cell.measure", lambda *args, **options: broken)
    found = run_cell(cell())
    assert (found["tails"]["kurtosis"], found["tails"]["top_share"]) == (None, None)
    assert (found["latent_variance"], found["counts"]) == (None, None)
    json.dumps(found, allow_nan=False)
