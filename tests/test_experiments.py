"""The scripts of experiments/: each from end to end on a tiny world, their records, and their arithmetic."""

import dataclasses
import importlib
import math
import shutil
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
from carv.report.experiment import Experiment
from carv.rng import stream
from carv.runs.pilot_folder import PilotRecord
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import iid, per_render
from carv.tasks.toy import GaussianToy
from carv.teachers.exact import ExactTeacher
from carv.training.data import HELD_OUT
from carv.variance.advice import Design
from carv.variance.jackknife import Jackknifed
from carv.variance.pilot import pilot
from carv.variance.predict import oracle_proposal, predict
from carv.variance.tables import Tables
from carv.variance.values import Value
from carv.world.captions import parse_prompt
from carv.world.dataset import load_world

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
cross_fit, fig_15, latent_residual, multipliers, paper, records, replicates, sds_pilots, sds_setting = (
    importlib.import_module(name)
    for name in (
        "cross_fit", "fig_15", "latent_residual", "multipliers", "paper", "records", "replicates", "sds_pilots",
        "sds_setting",
    )
)  # fmt: skip

SCRIPTS = (
    "tables_1_2_7", "table_6", "fig_1_22", "fig_13", "fig_14", "fig_15", "fig_16", "fig_20", "fig_21", "fig_24",
)  # fmt: skip
TINY = {
    "prompts": ("a red chair",),
    "checkpoints": (1, 2, 3),
    "size": 16,
    "samples": 4,
    "resolution": 6,
    "teacher": "world",
    "field": "voxel",
    "guidance_scale": 5.0,
    "pilot": PilotConfig(renders=8, bins=4, noises=2, antithetic=False, repetitions=6),
}


QUICK_COMPARISON = {**TINY, "seconds": 0.4, "snapshots": 3}


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def runs(tmp_path_factory, patch):
    """One folder for all scripts, with a teacher of few small pictures."""
    world = load_world(size=16, views=2, cache_dir=tmp_path_factory.mktemp("world"))

    def select(prompt):  # there are too few pictures for view words
        return world.mask(prompt.split(",")[0])

    teacher = ExactTeacher(world.images_float(), NoiseSchedule.scaled_linear(), select, bandwidth=0.1)
    for module in ("carv.problems", "sds_pilots", "carv.tasks.sds.compare"):
        patch.setattr(f"{module}.load_teacher", lambda config, say=None: teacher)
    patch.setattr(sds_setting, "QUICK", TINY)
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A pilot of the toy, 16 renders."""
    config = PilotConfig(renders=16, bins=8, noises=2, antithetic=False, repetitions=6)
    return run_pilot(ProblemConfig("toy"), config, tmp_path_factory.mktemp("toy"), quiet=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_its_record_holds(name, runs, capsys):
    script = importlib.import_module(name)
    script.main(script.Settings(runs=runs, quick=True))
    printed = capsys.readouterr().out
    found = Experiment.load(runs / name)
    assert found.tables
    for table in found.tables:
        assert records.text(table) in printed
    assert found.finding in printed
    assert found.config["runs"] == str(runs)
    assert found.provenance["torch"] == torch.__version__
    # No number of ours without its error but for 1 of a baseline, 0 for what it gains, and w(t).
    rows = [row for table in found.tables for label, row in table.rows.items() if label != "weight w(t)"]
    exact = [one.value for row in rows for one in row if one.value is not None and one.error is None]
    assert exact == pytest.approx([round(value) for value in exact], abs=1e-9)


def test_a_comparison_at_equal_time_is_shown_with_its_pictures_and_not_made_again(runs, capsys, monkeypatch):
    script = importlib.import_module("fig_7_8")
    settings = script.Settings(runs=runs, quick=True)
    monkeypatch.setattr(script.Settings, "sized", lambda self, **own: dataclasses.replace(self, **QUICK_COMPARISON))
    script.main(settings)
    found = Experiment.load(runs / "fig_7_8")
    assert [chart.y_label for chart in found.charts] == ["PSNR", "SSIM", "CLIP score", "R-precision"]
    assert list(found.pictures.values()) == ["renders.png"]
    assert all(records.text(table) in capsys.readouterr().out for table in found.tables[:1])
    monkeypatch.setattr(script, "compare", None)  # a second one would fail
    script.main(settings)
    again = Experiment.load(runs / "fig_7_8")
    assert (again.tables, again.charts) == (found.tables, found.charts)


def test_finished_runs_and_pilots_are_used_again_and_give_the_same_record(runs, capsys, monkeypatch):
    script = importlib.import_module("tables_1_2_7")
    settings = script.Settings(runs=runs, quick=True)
    script.main(settings)
    first = Experiment.load(runs / "tables_1_2_7")
    for name in ("run_pilot", "Trainer", "load_problem"):
        monkeypatch.setattr(sds_pilots, name, lambda *_, **__: pytest.fail("made once more"))
    script.main(dataclasses.replace(settings, out=runs / "again"))
    again = Experiment.load(runs / "again")
    assert (again.tables, again.charts, again.finding) == (first.tables, first.charts, first.finding)
    capsys.readouterr()


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


def test_a_stopped_run_goes_on_from_its_last_checkpoint_to_the_same_field(runs):
    setting = sds_setting.Setting(runs=runs, quick=True).sized()
    folders = sds_pilots.checkpoints(setting, ("a red chair", 0))
    assert list(folders) == [1, 2, 3]
    whole = folders[3] / "checkpoint.safetensors"
    before = whole.read_bytes()
    shutil.move(whole, runs / "aside")
    sds_pilots.checkpoints(setting, ("a red chair", 0))
    assert whole.read_bytes() == before
    for step in (1, 2):
        (folders[step] / "checkpoint.safetensors").unlink()
    sds_pilots.checkpoints(setting, ("a red chair", 0))
    assert whole.read_bytes() == before


def test_other_settings_have_other_folders_and_a_pilot_under_a_wrong_name_is_refused(runs):
    setting = sds_setting.Setting(runs=runs, quick=True).sized()
    subject = ("a red chair", 0)
    here = sds_pilots.checkpoints(setting, subject)[3]
    assert here != sds_pilots.checkpoints(dataclasses.replace(setting, samples=5), subject)[3]
    assert here != sds_pilots.checkpoints(setting, subject, setting.low_guidance)[3]
    record = dataclasses.replace(setting, seeds=(0,))
    ((_, pilot_record),) = sds_pilots.pilots(record).items()
    (folder,) = here.glob("pilot-*")
    dataclasses.replace(pilot_record, settings={"renders": 99}).save(folder)
    with pytest.raises(ValueError, match="holds a pilot with other settings"):
        sds_pilots.pilots(record)
    pilot_record.save(folder)
    assert PilotRecord.load(folder).settings == pilot_record.settings


def test_runs_of_a_teacher_that_was_trained_anew_are_refused(tmp_path, monkeypatch):
    for part in ("text_encoder", "unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "model.safetensors").write_bytes(b"one")
    monkeypatch.setattr(sds_pilots, "small_pipeline", lambda: tmp_path)
    for _ in range(2):
        sds_pilots._check_teacher(tmp_path / "run", "small")
    (tmp_path / "unet" / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match=r"trained anew since .*run was made; give another --runs"):
        sds_pilots._check_teacher(tmp_path / "run", "small")
    sds_pilots._check_teacher(tmp_path / "run", "world")
    sds_pilots._check_teacher(tmp_path / "other", "small")


def test_what_one_process_is_at_another_leaves_for_the_end(tmp_path):
    with sds_pilots._alone(tmp_path / "run") as mine:
        assert mine
        with sds_pilots._alone(tmp_path / "run", wait=False) as too:
            assert not too
        with sds_pilots._alone(tmp_path / "other", wait=False) as other:
            assert other
    with sds_pilots._alone(tmp_path / "run", wait=False) as mine:
        assert mine


def test_every_subject_has_draws_of_its_own_and_the_same_ones_at_every_guidance_and_step():
    setting = sds_setting.Setting()
    seeds = {setting.pilot_of(prompt, seed).seed for prompt in setting.prompts for seed in setting.seeds}
    assert len(seeds) == 10
    assert setting.pilot_of("a red chair", 0) == dataclasses.replace(setting, guidance_scale=2.0).pilot_of(
        "a red chair", 0
    )


def test_one_of_the_five_prompts_is_an_object_that_the_teacher_has_never_seen():
    prompts = [parse_prompt(prompt) for prompt in sds_setting.PROMPTS]
    assert len(prompts) == len(paper.TABLE_7) == 5
    assert sum((prompt.shape, prompt.colour) in HELD_OUT for prompt in prompts) == 1


def test_the_paper_s_numbers_agree_with_each_other():
    """Averages of Table 7 are Table 1's row; ECM ratios of Table 1 are Table 2; both to the digits printed."""
    for k in range(6):
        mean = np.mean([row[k] for row in paper.TABLE_7.values()])
        assert mean == pytest.approx(paper.TABLE_1["iw+strat"][k], abs=0.02)
        for method, row in paper.TABLE_1.items():
            assert row[k] / paper.TABLE_1["uniform"][k] == pytest.approx(paper.TABLE_2[method][k], abs=0.02)
    assert 4 * (paper.COST_RATIO + 1) == paper.COST_RATIO + 16


def test_low_guidance_has_a_quarter_of_omega():
    setting = sds_setting.Setting(guidance_scale=101.0)
    assert setting.low_guidance - 1 == (setting.guidance_scale - 1) / 4
    assert setting.run("a red chair", 0, setting.low_guidance).guidance_scale == 26.0
