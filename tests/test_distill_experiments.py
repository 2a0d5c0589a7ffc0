"""The distillation experiments: each from end to end on a tiny random teacher, and their arithmetic."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from carv.judge import Judge
from carv.judge.model import JudgeConfig, JudgeNetwork
from carv.report.experiment import Experiment
from carv.tasks.distill.evaluate import load_evaluation
from carv.tasks.distill.run import HISTORY, run
from carv.tasks.distill.train import load_teacher
from carv.variance.values import Value

from tiny_pipelines import dit_nowhere_zero

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
distill_curves, distill_phases, distill_runs, distill_setting, fig_26_27, nested, paper, table_3 = (
    importlib.import_module(name)
    for name in (
        "distill_curves",
        "distill_phases",
        "distill_runs",
        "distill_setting",
        "fig_26_27",
        "nested",
        "paper",
        "table_3",
    )
)

SCRIPTS = ("table_3", "fig_26_27", "distill_hypotheses")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A random DiT of ten classes on 4x8x8 latents, with a random judge; no weight is zero."""
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = dit_nowhere_zero(10, layers=1)
        config = JudgeConfig(width=8, features=8)
        judge = Judge(JudgeNetwork(config), config)
    pipeline.save_pretrained(folder)
    judge.save(folder / "judge")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All scripts share their runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_experiment_runs_end_to_end_and_leaves_a_record(name, runs, teacher, capsys) -> None:
    script = importlib.import_module(name)
    script.main(script.Settings(runs=runs, teacher=str(teacher), quick=True, **getattr(script, "TINY", {})))
    experiment = Experiment.load(runs / name)
    assert experiment.tables
    assert experiment.charts
    assert experiment.provenance
    assert experiment.finding in capsys.readouterr().out


def test_a_second_run_of_a_script_trains_nothing_and_says_the_same(runs, teacher, monkeypatch, capsys) -> None:
    settings = fig_26_27.Settings(runs=runs, teacher=str(teacher), quick=True)
    fig_26_27.main(settings)
    first = Experiment.load(runs / "fig_26_27")
    monkeypatch.setattr(distill_runs, "_train", None)
    monkeypatch.setattr(distill_runs, "measure_cost", None)
    fig_26_27.main(settings)
    again = Experiment.load(runs / "fig_26_27")
    assert (again.tables, again.charts, again.finding) == (first.tables, first.charts, first.finding)


# Nested variances


def replicates(inputs: int, estimates: int, seed: int) -> object:
    """g = x + noise in 3 dimensions: across 3 x 2^2 = 12, within 3 x 1.5^2 = 6.75."""
    rng = torch.Generator().manual_seed(seed)
    found = nested.Replicates()
    for _ in range(inputs):
        x = 2 * torch.randn(3, generator=rng) + 5
        found.add(x + 1.5 * torch.randn(estimates, 3, generator=rng))
    return found.nested()


def test_across_and_within_are_unbiased_and_their_errors_are_their_spread() -> None:
    """100 repetitions of 24 inputs: means within 4 standard errors (a bias of 10 % of across would be seen); stated
    errors within 25 % of the spread (3.5 sd of the spread's own 7 %). Within / M forgotten is +2.25 across: 19 %."""
    found = [replicates(24, 3, seed) for seed in range(100)]
    for name, truth in (("across", 12.0), ("within", 6.75), ("variance", 18.75)):
        values = np.array([getattr(one, name).value for one in found])
        errors = np.array([getattr(one, name).error for one in found])
        assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / 10, name
        assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.25), name


def test_the_scatter_without_an_input_is_the_scatter_of_the_others() -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (x @ x.T).numpy()
    assert nested._scatter(gram) == pytest.approx(float(x.var(0).sum()))
    without = [float(x[[j for j in range(6) if j != i]].var(0).sum()) for i in range(6)]
    assert nested._scatters_without(gram) == pytest.approx(without)


# Table 3


@pytest.fixture(scope="module")
def trainer(teacher):
    settings = table_3.Settings(teacher=str(teacher), quick=True)
    made = distill_runs.trainer_of(settings.config(renders=2))
    with torch.no_grad():
        for parameter in made.fake.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made


def test_the_score_difference_that_is_measured_is_the_contribution_that_trains(trainer) -> None:
    dmd = trainer.dmd
    renders = distill_runs_renders(2)
    state = dmd.upstream(renders)
    t = torch.tensor([[100, 900, 500], [30, 700, 20]])
    noise = torch.randn((2, 3, *dmd.latent_shape), generator=torch.Generator().manual_seed(0))
    teacher_part, difference = table_3.signals(dmd, state, t, noise)
    assert torch.allclose(difference, dmd.contribution(state, t, noise), rtol=1e-5, atol=1e-9)
    assert torch.allclose(teacher_part.abs().flatten(2).sum(-1), torch.ones(2, 3))  # its weight is its own L1 norm


def distill_runs_renders(count: int):
    from carv.gradient import Renders
    from carv.rng import stream

    return Renders(tuple(stream(0, "test", r) for r in range(count)), 0, count)


def test_estimates_of_one_input_are_independent_and_strata_are_within_each(trainer) -> None:
    from carv.rng import stream

    t, noise = distill_phases.draws(trainer.dmd, 16, "per-render", 4, stream(0))
    assert t.shape == (1, 64)
    assert noise.shape == (1, 64, *trainer.dmd.latent_shape)
    strata = (t.view(4, 16) - 20) * 16 // 961
    assert torch.equal(strata, torch.arange(16).expand(4, 16))
    assert len({tuple(row) for row in t.view(4, 16).tolist()}) == 4


def test_a_fake_score_call_is_a_part_of_what_a_draw_costs(trainer) -> None:
    """The phases that are timed are the ones that training runs: their outputs are the two denoisers'."""
    dmd, state = trainer.dmd, trainer.dmd.upstream(distill_runs_renders(2))
    t = torch.tensor([[100, 900], [500, 30]])
    noise = torch.randn((2, 2, *dmd.latent_shape), generator=torch.Generator().manual_seed(0))
    real, fake = dmd.denoised(state, t, noise)
    schedule = dmd.teacher.schedule
    from carv.teachers.prediction import to_sample

    z_t = schedule.add_noise(state.z.detach()[:, None], t, noise)
    called = distill_phases.teacher_call(dmd, state, t, noise)
    assert torch.allclose(to_sample(called, z_t, t, schedule, "epsilon"), real, atol=1e-5)
    assert torch.allclose(to_sample(distill_phases.fake_call(dmd, state, t, noise), z_t, t, schedule), fake, atol=1e-5)


def test_costs_add_up_to_the_step() -> None:
    exact = {
        "generator forward": 8.0, "generator backward": 16.0, "AdamW of the generator": 2.0, "fake-score update": 30.0,
        "teacher, K = 1": 5.0, "teacher, K = 16": 65.0, "fake score, K = 1": 3.0, "fake score, K = 16": 33.0,
        "discriminator, K = 1": 1.0, "discriminator, K = 16": 9.0,
    }  # fmt: skip
    costs = distill_phases.Costs.of({name: Value(seconds, 0.0) for name, seconds in exact.items()}, 5)
    assert costs.draw.value == pytest.approx((60 + 30) / (8 * 15))
    assert costs.step(1).value == pytest.approx(8 + 16 + 2 + 5 * 30 + 5 + 3 + 1)
    assert costs.step(16).value == pytest.approx(8 + 16 + 2 + 5 * 30 + 65 + 33 + 1)
    assert costs.ratio.value == pytest.approx(3 / 0.75)
    assert costs.ratio_with_fake.value == pytest.approx((costs.step(1).value - 6) / 8 / 0.75)


def test_classes_of_a_measurement_are_independent_and_those_of_training_balanced(teacher) -> None:
    settings = table_3.Settings(teacher=str(teacher), quick=True)
    config = settings.config()
    tensors = distill_runs.trainer_of(config).state_dict()
    restored = table_3._restored(config, tensors)
    assert config.balance
    assert not restored.dmd.classes.balance
    assert restored.adversarial.dmd is restored.dmd


def test_the_paper_s_table_3_is_what_its_text_says() -> None:
    one, many, strata = (paper.TABLE_3[name] for name in table_3.DESIGNS)
    assert one[0] / many[0] == pytest.approx(3.4, abs=0.05)
    assert one[2] / many[2] == pytest.approx(16.4, abs=0.05)
    assert one[2] / strata[2] == pytest.approx(32, abs=0.1)
    within = (one[2] - many[2]) / (1 - 1 / 16)
    assert (one[2] - within) / one[2] == pytest.approx(-0.002, abs=5e-4)
    seconds = paper.DISTILLATION_STEP_SECONDS
    draw = (seconds["(8, 16)"] - seconds["(8, 1)"]) / 15
    assert seconds["(8, 1)"] / draw == pytest.approx(paper.DISTILLATION_COST_RATIO, abs=0.5)


# Curves


def history(values, every=10.0, cost=0.5):
    step = np.arange(len(values)) * every
    return distill_curves.History(step, np.array(values, dtype=float), cost)


def test_best_is_the_smallest_so_far_and_nothing_is_extrapolated() -> None:
    one = history([9, 5, 7, 3])
    assert one.best.tolist() == [9, 5, 5, 3]
    assert one.at(15, "steps") == 5
    assert one.at(15, "steps", best=False) == 6
    assert one.at(7.5, "seconds", best=False) == 6
    assert one.at(15, "seconds") == 3
    assert one.at(15.1, "seconds") is None
    assert one.at(30.1, "steps") is None


def test_the_time_to_a_distance_is_where_the_best_first_gets_there() -> None:
    one = history([9, 5, 7, 3])
    assert one.reaches(9, "steps") == 0
    assert one.reaches(7, "steps") == 5
    assert one.reaches(7, "seconds") == 2.5
    assert one.reaches(4, "steps") == 25
    assert one.reaches(3, "steps") == 30
    assert one.reaches(2.9, "steps") is None


def test_a_difference_is_taken_seed_by_seed_with_student_s_interval() -> None:
    other = {seed: history([10 + 5 * seed, 8 + 5 * seed]) for seed in range(4)}
    ours = {seed: history([10 + 5 * seed, 7 + 5 * seed + shift]) for seed, shift in enumerate((0, 0.2, -0.2, 0.4))}
    found = distill_curves.difference(ours, other, distill_curves.best_by(10, "steps"))
    values = np.array([-1, -0.8, -1.2, -0.6])
    error = values.std(ddof=1) / 2
    assert found.mean.value == pytest.approx(values.mean())
    assert found.mean.error == pytest.approx(error)
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - 3.182446 * error, values.mean() + 3.182446 * error)
    )
    assert found.seeds == 4
    assert distill_curves.difference(ours, other, distill_curves.best_by(11, "steps")) is None
    assert distill_curves.over_seeds(other, distill_curves.best_by(10, "steps")) == Value(
        15.5, np.std([8, 13, 18, 23], ddof=1) / 2
    )


def test_a_band_is_one_standard_deviation_over_seeds_where_all_runs_are() -> None:
    runs = {0: history([4, 2, 2]), 1: history([8, 6])}
    curve = distill_curves.band(runs, "steps", points=3)
    assert curve.x == (0, 5, 10)
    assert curve.y == pytest.approx((6, 5, 4))
    assert np.array(curve.high) - np.array(curve.y) == pytest.approx([math.sqrt(8)] * 3)
    assert distill_curves.common_end([runs], "seconds") == 5


def test_a_run_of_the_experiments_is_the_run_of_carv_distill(teacher, tmp_path) -> None:
    """Step by step the same numbers, so that whoever repeats one with the command line finds them."""
    settings = distill_setting.DistillSetting(teacher=str(teacher), samples=200)
    config = dataclasses.replace(settings.config(2, 2), steps=2, evaluate_every=1, fake_steps=1)
    rows = distill_runs._train(config)
    evaluation = load_evaluation(config, load_teacher(config))
    run(config, tmp_path / "out", quiet=True, evaluation=evaluation)
    lines = [json.loads(line) for line in (tmp_path / "out" / HISTORY).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line, row in zip(lines, rows, strict=True):
        assert {name: line[name] for name in row} == row


def test_every_configuration_gets_the_seconds_it_is_given() -> None:
    setting = distill_setting.DistillSetting(seconds=60.0, evaluations=10)
    for cost in (0.2, 0.31, 1.0):
        config = distill_runs.timed(setting, setting.config(), Value(cost, 0.01))
        assert config.steps == 10 * config.evaluate_every
        assert config.steps * cost == pytest.approx(60, rel=0.05)


def test_runs_of_other_weights_have_other_folders(teacher, tmp_path) -> None:
    import shutil

    other = shutil.copytree(teacher, tmp_path / "dit")
    assert distill_runs.weights_digest(str(other)) == distill_runs.weights_digest(str(teacher))
    weights = next((other / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert distill_runs.weights_digest(str(other)) != distill_runs.weights_digest(str(teacher))


def test_settings_make_the_configurations_that_their_names_say() -> None:
    configs = fig_26_27.configurations(distill_setting.DistillSetting())
    kinds = {name: (c.renders, c.generator.renoise, c.fake.renoise) for name, c in configs.items()}
    assert kinds == {
        "(8, 1)": (8, 1, 1), "(8, 8)": (8, 8, 1), "(8, 16)": (8, 16, 1), "(48, 1)": (48, 1, 1),
        "(8, 8) in the fake score": (8, 1, 8), "(8, 16) in the fake score": (8, 1, 16),
    }  # fmt: skip
    for config in configs.values():
        for term in (config.generator, config.fake):
            assert term.coupling == ("per-render" if term.renoise > 1 else "iid")
        assert (config.fake.t_min, config.fake.t_max) == (0, 999)
