"""The scripts for attribution: their arithmetic against brute force, and each from end to end on a tiny random Wan."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scipy import stats

from carv.report.experiment import Experiment
from carv.rng import stream

from tiny_pipelines import wan_of_plain_latents

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
finetune, gradients, laws, racing, records, retrieval, setting, splits, trials = (
    importlib.import_module(name)
    for name in (
        "attribution_finetune", "attribution_gradients", "attribution_laws", "attribution_racing", "records",
        "attribution_retrieval", "attribution_setting", "attribution_splits", "attribution_trials",
    )
)  # fmt: skip

CELLS = 24


def normal(seed, *shape):
    return torch.randn(*shape, generator=stream(seed, "test").generator(), dtype=torch.float64).numpy()


def smooth(cells=CELLS):
    """Means over t of three columns."""
    u = (np.arange(cells) + 0.5) / cells
    return np.stack([np.sin(3 * u), u**2, 1 - u], 1)


# Variances


@pytest.mark.parametrize("design", ["iid", "strata", "systematic"])
@pytest.mark.parametrize("budget", [2, 5, 8, CELLS])
def test_the_variance_of_a_design_is_that_of_many_samplings_of_the_bank(design, budget):
    """20 000 samplings: their variance has a relative error of 1 % or so; 5 % would be seen, e.g. 1/B for 1/(B - 1)."""
    h = smooth() + 0.3 * normal(0, CELLS, 3)
    weights = trials.shares(design, budget, 20_000, CELLS, stream(1, design, budget))
    exact = laws.variance(laws.Terms.fixed(h), design, budget)
    assert (weights @ h).var(0) == pytest.approx(exact, rel=0.05, abs=1e-12)
    assert (weights @ h).mean(0) == pytest.approx(h.mean(0), abs=5 * np.sqrt(exact.max() / 20_000) + 1e-12)


def test_the_variance_with_a_proposal_is_that_of_many_weighted_draws():
    h, budget = smooth() + 0.3 * normal(0, CELLS, 3), 5
    q = np.linspace(1, 3, CELLS) / np.linspace(1, 3, CELLS).sum()
    rng = np.random.default_rng(0)
    u = (np.arange(budget) + rng.random((40_000, budget))) / budget
    for design, at in (("strata", u), ("iid", rng.random((40_000, budget)))):
        cell = np.searchsorted(np.cumsum(q)[:-1], at, side="right")
        found = (h / (CELLS * q[:, None]))[cell].mean(1)
        assert found.mean(0) == pytest.approx(h.mean(0), abs=0.01)
        assert found.var(0) == pytest.approx(laws.variance(laws.Terms.fixed(h), design, budget, q), rel=0.05)


@pytest.mark.parametrize("design", ["iid", "strata", "systematic"])
def test_the_variance_with_fresh_noise_is_right_on_average_over_banks(design):
    """Two noises for each cell leave no bias: 1000 banks, against the truth from the means and variances themselves.

    With 8 cells, so that taking a square of a mean for the mean's square would add an eighth of the noise's share.
    """
    cells, budget = 8, 4
    mean, spread = smooth(cells), 0.2 + 0.5 * smooth(cells) ** 2
    truth = laws.variance(laws.Terms(mean**2 + spread**2, mean, mean), design, budget)
    noise = normal(0, 1000, 2, cells, 3)
    found = [laws.variance(laws.Terms.fresh(*(mean + spread * x for x in pair)), design, budget) for pair in noise]
    error = np.std(found, 0) / np.sqrt(1000)
    assert (np.abs(np.mean(found, 0) - truth) < 4 * error).all()
    assert (error < 0.03 * truth).all()


def test_strata_of_all_cells_have_no_variance_with_fixed_noise_and_all_of_the_noise_s_with_fresh():
    h, noise = smooth(), 0.5 * normal(0, CELLS, 3)
    assert laws.variance(laws.Terms.fixed(h + noise), "strata", CELLS) == pytest.approx(0, abs=1e-12)
    fresh = laws.variance(laws.Terms.fresh(h + noise, h - noise), "strata", CELLS)
    assert fresh == pytest.approx(2 * (noise**2).mean(0) / CELLS)


def test_the_parts_of_a_variance_are_found():
    """h = m(t) + a eps + b (eps^2 - 1): odd part a^2, even part 2 b^2; 3000 cells, so an error of a few percent."""
    cells = 3000
    u = (np.arange(cells) + 0.5)[:, None] / cells
    eps, other = normal(0, cells, 1), normal(1, cells, 1)

    def h(x):
        return np.sin(6 * u) + 0.7 * x + 0.4 * (x**2 - 1)

    three = [h(eps), h(-eps), h(other)]
    found = splits.split(*(one - np.mean(three) for one in three))
    assert found.timesteps == pytest.approx(np.var(np.sin(6 * u)), rel=0.15)
    assert found.odd == pytest.approx(0.49, rel=0.15)
    assert found.even == pytest.approx(0.32, rel=0.15)
    assert found.total == pytest.approx(found.timesteps + found.noise)


def test_a_proposal_follows_the_root_of_the_moment_and_keeps_its_share_of_p():
    moment = np.repeat([1.0, 4.0, 9.0, -1.0], 6)
    q = splits.root_proposal(moment, 4, 0.1)
    assert q.sum() == pytest.approx(1)
    assert q[::6] * CELLS == pytest.approx(0.9 * np.array([1, 2, 3, 0]) * 4 / 6 + 0.1)


def test_what_ranks_see_keeps_the_ranks_and_no_more():
    cosines = normal(0, 5, 4, 4)
    seen = splits.ranked_terms(cosines).reshape(5, 4, 3)
    assert seen.sum(-1) == pytest.approx(0, abs=1e-12)
    assert (seen.argsort(-1) == trials.leave_one_out(cosines).argsort(-1)).all()


# Trials


@pytest.mark.parametrize("design", ["iid", "strata", "systematic"])
@pytest.mark.parametrize("budget", [3, 8, CELLS])
def test_every_cell_is_as_likely_as_any_other(design, budget):
    weights = trials.shares(design, budget, 8000, CELLS, stream(0, design, budget))
    assert weights.sum(1) == pytest.approx(1)
    error = weights.std(0).max() / np.sqrt(8000)
    assert np.abs(weights.mean(0) - 1 / CELLS).max() < 5 * error + 1e-12


def test_strata_as_many_as_cells_are_the_whole_bank():
    assert trials.shares("strata", CELLS, 10, CELLS, stream(0)) == pytest.approx(1 / CELLS)
    assert (trials.shares("iid", CELLS, 10, CELLS, stream(0)) == 0).any()


def test_rank_correlations_are_scipy_s():
    cosines, weights = normal(0, 7, 3, 5), trials.shares("iid", 4, 6, 7, stream(0))
    reference = cosines.mean(0)
    found = trials.rank_correlations(cosines, reference, weights)
    for t, row in enumerate(weights):
        scores = np.einsum("m,mqn->qn", row, cosines)
        theirs = [stats.spearmanr(a, b).statistic for a, b in zip(scores, reference, strict=True)]
        assert found[t] == pytest.approx(theirs)


def test_a_query_s_own_score_is_left_out():
    scores = np.arange(9.0).reshape(3, 3)
    assert trials.leave_one_out(scores).tolist() == [[1, 2], [3, 5], [6, 7]]


def test_the_matching_budget_is_read_off_the_curve_and_not_beyond_it():
    budgets, curve = [2, 8, 32], np.array([0.1, 0.5, 0.9])
    assert trials.matching_budget(budgets, curve, 0.5) == pytest.approx(8)
    assert trials.matching_budget(budgets, curve, 0.3) == pytest.approx(4)
    assert trials.matching_budget(budgets, curve, 0.95) is None
    assert trials.matching_budget(budgets, curve, 0.05) is None
    assert trials.matching_budget(budgets, np.array([0.1, 0.5, 0.4]), 0.45) == pytest.approx(2 * 4 ** (0.35 / 0.4))


def test_an_error_is_over_sets_and_a_set_without_a_number_leaves_none():
    found = setting.over_sets([1.0, 2.0, 6.0])
    assert (found.value, found.error) == pytest.approx((3, np.std([1, 2, 6], ddof=1) / np.sqrt(3)))
    assert setting.over_sets([1.0, None]) is None


def test_settings_without_errors_are_refused():
    with pytest.raises(ValueError, match="at least 2 sets"):
        setting.Setting(sets=1)


# Retrieval


def test_the_share_of_the_top_is_counted_by_hand():
    scores = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    same = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    assert retrieval.top_shares(scores, same, 2).tolist() == [0.5, 0.5]
    assert retrieval.top_shares(np.stack([scores, -scores]), same, 1).tolist() == [[1, 1], [1, 1]]


def test_halving_costs_what_its_rounds_cost():
    plan = racing.halving(100, 5, 2, 64)
    assert plan == racing.Plan((2, 4, 8, 16, 32), (100, 50, 25, 13, 10))
    assert plan.cost == pytest.approx((200 + 100 + 100 + 8 * 13 + 160 + 32) / 101)
    assert racing.Plan((8,), (100,)).cost == pytest.approx(8)


def test_a_race_without_noise_finds_the_top_and_one_with_noise_compares_shared_draws():
    truth = np.arange(20.0)[::-1] / 20
    plan = racing.halving(20, 3, 1, 8)
    assert racing.survivors_top(np.tile(truth, (8, 1)), range(8), plan, 3) == [0, 1, 2]
    # What all candidates of a draw have in common moves no rank, as long as each is judged by the same draws.
    shared = np.tile(truth, (8, 1)) + 100 * normal(0, 8, 1)
    assert racing.survivors_top(shared, range(8), plan, 3) == [0, 1, 2]


# Scripts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny random Wan."""
    folder = tmp_path_factory.mktemp("wan")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
        wan_of_plain_latents(layers=1, scheduler=scheduler, model_max_length=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("attribution")


@pytest.mark.parametrize("name", ["table_4", "fig_29", "attribution_designs", "attribution_value", "attribution_lds"])
def test_a_script_prints_what_its_record_holds(name, teacher, runs, capsys):
    script = importlib.import_module(name)
    script.main(script.Settings(runs=runs, quick=True, teacher=teacher))
    printed = capsys.readouterr().out
    found = Experiment.load(runs / name)
    assert found.tables
    for table in found.tables:
        assert records.text(table) in printed
    assert found.finding in printed
    # No number of ours without its error but for 1 and 0 by definition.
    rows = [row for table in found.tables for row in table.rows.values()]
    exact = [one.value for row in rows for one in row if one.value is not None and one.error is None]
    assert exact == pytest.approx([round(value) for value in exact], abs=1e-9)


def test_gradients_are_made_once_and_those_of_a_thinned_bank_are_those_of_the_bank(teacher, runs, monkeypatch):
    own = setting.Setting(runs=runs, teacher=teacher, quick=True).sized()
    loaded, clips = own.load_teacher(), own.all_clips()
    whole = gradients.gradients(own, loaded, clips, gradients.BankSettings())
    thinned = gradients.gradients(own, loaded, clips, gradients.BankSettings(every=3))
    assert torch.equal(whole.cells(1, 3).t, thinned.t)
    assert torch.allclose(whole.cells(1, 3).vectors, thinned.vectors, atol=1e-6)
    assert torch.equal(torch.cat([whole.cells(i, 2).t for i in (0, 1)]).sort().values, whole.t)
    third = gradients.gradients(replace(own, cells=own.cells // 3), loaded, clips, gradients.BankSettings())
    assert torch.allclose(third.t, thinned.t)
    monkeypatch.setattr(gradients.ExampleGradients, "__call__", lambda *_: pytest.fail("made once more"))
    again = gradients.gradients(own, loaded, clips, gradients.BankSettings())
    assert torch.equal(again.vectors, whole.vectors)


def test_fine_tuning_lowers_the_loss_of_its_clips_and_is_undone_bit_for_bit(teacher):
    loaded = setting.Setting(teacher=teacher).load_teacher()
    clips = finetune.Encoded.of(loaded, setting.make_clips(4, 0, lengths=(9,)))
    before = {name: value.clone() for name, value in loaded.network.state_dict().items()}
    first = finetune.mean_losses(loaded, clips, range(4), 16, 0, 2.0)
    with finetune.kept(loaded):
        finetune.fine_tune(loaded, clips, torch.arange(2), finetune.Tuning(10, 4, 3e-3, 2.0), stream(0))
        after = finetune.mean_losses(loaded, clips, range(4), 16, 0, 2.0)
    assert (after[:2] < first[:2]).all()
    assert all(torch.equal(before[name], value) for name, value in loaded.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert torch.equal(finetune.mean_losses(loaded, clips, range(4), 16, 0, 2.0), first)
