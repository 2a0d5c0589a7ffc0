"""`carv sds --auto`: the pilot's choice, what it refuses, and what a stop at any moment leaves.

Costs are given here instead of timed, so that a choice is a function of the seed.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from carv.checkpoint import CHECKPOINT, RunFolderError, read_checkpoint, save_checkpoint
from carv.commands import auto as auto_command
from carv.commands.advise import advise_from
from carv.commands.auto import AutoConfig, choose, settle, summary
from carv.runs.pilot_folder import PilotRecord
from carv.schedule import NoiseSchedule
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.train import Trainer, load_teacher
from carv.teachers.exact import ExactTeacher
from carv.variance.advice import Design
from carv.variance.cost import StepCost
from carv.variance.tables import Tables
from carv.variance.values import Value
from carv.world.dataset import load_world
from command_line import carv

CONFIG = SDSConfig("a chair", steps=12, teacher="world", field="voxel", resolution=8, samples=6, size=16, clip="none")
AUTO = AutoConfig(warm_up=6, renders=7, bins=8, repetitions=6)
SMALL = ("--field", "voxel", "--resolution", 8, "--samples", 6, "--size", 16, "--clip", "none")
ARGS = ("a chair", "--teacher", "world", "--steps", 12, *SMALL)
AUTO_ARGS = ("--auto", "--auto-warm-up", 6, "--auto-renders", 7, "--auto-bins", 8, "--auto-repetitions", 6)
RENDER, DRAW = 1.0, 0.01
"""Seconds."""
GENEROUS = dataclasses.replace(AUTO, budget=4.5)
"""Pays for (4, 8), whose gain over (4, 1) is certain."""


class Killed(BaseException):
    """As kill -9: no handler may write anything after it."""


def given_costs(steps, stream, **_):
    """StepCost of RENDER R + DRAW R K, with a spread of a thousandth."""
    found = {}
    for name in steps:
        r, k = map(int, name.split(","))
        seconds = RENDER * r + DRAW * r * k
        found[name] = StepCost(seconds, 0.999 * seconds, 1.001 * seconds, (seconds,) * 6, None)
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    world = load_world(size=16, views=8, cache_dir=tmp_path_factory.mktemp("world"))
    return ExactTeacher(world.images_float(), NoiseSchedule.scaled_linear(), world.mask, bandwidth=0.1)


@pytest.fixture(autouse=True)
def small_world(teacher, monkeypatch):
    monkeypatch.setattr("carv.tasks.sds.train.world_teacher", lambda config, say=None: teacher)
    monkeypatch.setattr("carv.commands.pilot.measure_cost", given_costs)
    monkeypatch.setattr("carv.commands.auto.advise_command.advise_from", few_cells)
    new_process(monkeypatch)


def few_cells(folder, config):
    """The advice from a few designs: all of them take seconds."""
    return advise_from(folder, dataclasses.replace(config, renders=(1, 4), renoise=(1, 8), couplings=("iid", "nested")))


def new_process(monkeypatch):
    """Forget the pipelines that this process has loaded."""
    monkeypatch.setattr("carv.problems._made", {})


def refuse(*_, **__):
    raise AssertionError("this must not be done again")


@pytest.fixture(scope="module")
def made(tmp_path_factory, teacher):
    """A run of `carv sds --auto --json`, without its pictures: its folder, and its document."""
    out = tmp_path_factory.mktemp("auto") / "chair"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carv.tasks.sds.train.world_teacher", lambda config, say=None: teacher)
        patch.setattr("carv.commands.pilot.measure_cost", given_costs)
        for name in ("write_turntable", "write_contact_sheet", "render_all", "write_mesh"):
            patch.setattr(f"carv.tasks.sds.run.{name}", lambda *_: 0)
        new_process(patch)
        code, said, err = carv("sds", *ARGS, *AUTO_ARGS, "--auto-budget", 4.5, "--out", out, "--json")
    assert code == 0, err
    return out, json.loads(said)


def strictly(text):
    return json.loads(text, parse_constant=refuse)


def test_the_run_uses_the_estimator_that_carv_advise_names_under_the_same_budget(made, monkeypatch):
    out, metrics = made
    choice = strictly((out / "auto" / "choice.json").read_text())
    assert metrics["auto"] == choice
    assert metrics["config"]["estimator"] == choice["estimator"]
    monkeypatch.setattr("carv.commands.auto.advise_command.advise_from", advise_from)
    code, said, err = carv("advise", out / "auto", "--budget", 4.5, "--json")
    assert code == 0, err
    advised = json.loads(said)
    assert choice["gain_is_shown"]
    assert advised["design"].items() <= choice["estimator"].items()
    assert advised["ecm"]["value"] == pytest.approx(choice["advice"]["ecm"]["value"])
    assert advised["ecm"]["interval"][0] > 1
    assert advised["cost"]["value"] <= 4.5
    assert choice["expected_run_seconds"]["value"] == pytest.approx(12 * advised["cost"]["value"])


def test_a_run_that_auto_chose_is_bit_for_bit_the_run_with_these_options_from_step_0(made):
    out, metrics = made
    tensors, described = read_checkpoint(out)
    config = dataclasses.replace(CONFIG, estimator=EstimatorConfig(**metrics["config"]["estimator"]))
    assert described == dataclasses.replace(config, clip=SDSConfig.clip).to_json()  # the judge is no part of a run
    trainer = Trainer(config, load_teacher(config))
    for _ in range(config.steps):
        trainer.step()
    for name, value in trainer.state_dict().items():
        assert torch.equal(tensors[name], value), name


def test_the_warm_up_is_the_runs_first_steps_at_its_own_rates_with_the_default_estimator(made):
    tensors, described = read_checkpoint(made[0] / "auto")
    assert described == CONFIG.to_json()
    trainer = Trainer(CONFIG, load_teacher(CONFIG))
    for _ in range(6):
        trainer.step()
    for name, value in trainer.state_dict().items():
        assert torch.equal(tensors[name], value), name


def test_the_same_command_reads_the_choice_and_measures_nothing_again(made, monkeypatch):
    out, metrics = made
    before = {path: path.read_bytes() for path in (out / "auto").iterdir()}
    monkeypatch.setattr(auto_command, "run_pilot", refuse)
    monkeypatch.setattr(auto_command, "Trainer", refuse)
    again = choose(CONFIG, GENEROUS, out, quiet=True)
    assert again.record == metrics["auto"]
    assert {path: path.read_bytes() for path in (out / "auto").iterdir()} == before


def test_the_command_says_what_it_chose_with_an_interval_and_what_the_choice_cost(made, monkeypatch):
    out, metrics = made
    monkeypatch.setattr("carv.cli.sds_run.run", lambda *_, **__: metrics)
    code, said, err = carv("sds", *ARGS, *AUTO_ARGS, "--auto-budget", 4.5, "--out", out)
    assert code == 0, err
    first, second, *_ = said.splitlines()
    assert first.startswith(f"chosen: {EstimatorConfig(**metrics['config']['estimator'])}; ECM ")
    assert "95 % interval" in first
    assert "binds" in first
    assert "6 steps of warm-up" in second
    assert "run's gradient estimates are expected to take" in second


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, teacher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carv.tasks.sds.train.world_teacher", lambda config, say=None: teacher)
        patch.setattr("carv.commands.pilot.measure_cost", given_costs)
        patch.setattr("carv.commands.auto.advise_command.advise_from", few_cells)
        new_process(patch)
        return choose(CONFIG, AUTO, tmp_path_factory.mktemp("unbroken"), quiet=True).record


WRITES = (
    "carv.commands.auto.save_checkpoint",
    "carv.variance.tables.Tables.save",
    "carv.runs.pilot_folder.write_whole",
    "carv.commands.auto.write_whole",
)


@pytest.mark.parametrize("last", range(5))
def test_a_kill_before_any_write_leaves_a_folder_from_which_the_same_call_ends_alike(
    tmp_path, monkeypatch, last, unbroken
):
    """The writes are two checkpoints of the warm-up, the pilot's two files, and the choice."""
    written = []
    with monkeypatch.context() as patch:
        for target in WRITES:
            patch.setattr(target, _counted(target, written, last))
        with pytest.raises(Killed):
            choose(CONFIG, AUTO, tmp_path, checkpoint_every=4, quiet=True)
    assert len(written) == last
    assert not (tmp_path / "auto" / "choice.json").exists()
    new_process(monkeypatch)
    record = choose(CONFIG, AUTO, tmp_path, checkpoint_every=4, quiet=True).record
    for part in ("settings", "estimator", "gain_is_shown", "tails", "warm_up_steps"):
        assert record[part] == unbroken[part], part
    for part in ("variance", "ecm", "cost"):  # up to rounding, which depends on where arrays lie in memory
        assert record["advice"][part]["value"] == pytest.approx(unbroken["advice"][part]["value"], rel=1e-9)


def test_the_default_budget_is_the_cost_of_the_standard_estimator(unbroken):
    assert unbroken["budget"]["seconds"] == pytest.approx(4 * (RENDER + DRAW))
    assert unbroken["budget"]["is"] == "the cost of (R, K) = (4, 1), uniform proposal, iid coupling"


def _counted(target, written, last):
    module, _, name = target.rpartition(".")
    owner = Tables if module.endswith(".Tables") else __import__(module, fromlist=[name])
    write = getattr(owner, name)

    def counted(*args, **kwargs):
        if len(written) >= last:
            raise Killed
        write(*args, **kwargs)
        written.append(target)

    return counted


def test_a_warm_up_that_was_stopped_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, load_teacher(CONFIG))
    for _ in range(4):
        trainer.step()
    save_checkpoint(tmp_path / "auto", trainer.state_dict(), CONFIG.to_json())
    steps = []
    own = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: (steps.append(self.steps_done), own(self))[1])
    choice = choose(CONFIG, AUTO, tmp_path, quiet=True)
    assert steps == [4, 5]
    assert "the choice took" in summary(choice)
    assert "(2 steps of warm-up" in summary(choice)
    assert "; 4 steps before a stop not counted)" in summary(choice)


def test_a_warm_up_that_went_further_than_now_asked_for_is_refused(tmp_path):
    trainer = Trainer(CONFIG, load_teacher(CONFIG))
    trainer.steps_done = 7
    save_checkpoint(tmp_path / "auto", trainer.state_dict(), CONFIG.to_json())
    with pytest.raises(RunFolderError, match="holds a run with other settings"):
        choose(CONFIG, AUTO, tmp_path, quiet=True)


def test_a_pilot_of_too_few_draws_to_check_its_tails_says_so_and_its_record_is_strict_json(tmp_path):
    choice = choose(CONFIG, dataclasses.replace(AUTO, bins=4), tmp_path, quiet=True)
    assert "fewer than 100 draws: too few to check the tails" in summary(choice)
    assert strictly((tmp_path / "auto" / "choice.json").read_text()) == choice.record


def test_other_settings_are_refused_in_the_usual_sentence_and_overwrite_starts_again(made, tmp_path, monkeypatch):
    sentence = "holds a run with other settings; give another --out, or --overwrite to start again there"
    for other in (
        (dataclasses.replace(CONFIG, seed=1), GENEROUS),
        (CONFIG, AUTO),
    ):
        with pytest.raises(RunFolderError, match=sentence):
            choose(*other, made[0], quiet=True)
    choose(CONFIG, AUTO, tmp_path, quiet=True)
    new_process(monkeypatch)
    again = choose(dataclasses.replace(CONFIG, seed=1), AUTO, tmp_path, overwrite=True, quiet=True)
    assert again.record["settings"]["run"]["seed"] == 1
    assert json.loads(read_checkpoint(tmp_path / "auto")[1])["seed"] == 1


def test_an_overwrite_that_is_killed_leaves_no_old_choice(tmp_path, monkeypatch):
    folder = tmp_path / "auto"
    folder.mkdir()
    for name in ("choice.json", "pilot.json", "tables.safetensors", CHECKPOINT):
        (folder / name).write_text("old")

    def killed(*_):
        raise Killed

    monkeypatch.setattr(auto_command, "Trainer", killed)
    with pytest.raises(Killed):
        choose(CONFIG, AUTO, tmp_path, overwrite=True, quiet=True)
    assert not list(folder.iterdir())


def test_a_process_never_takes_an_overwritten_folders_old_state_for_the_new_one(tmp_path):
    """One process keeps the pipelines that it has loaded, as long as their checkpoint is the same."""
    other = dataclasses.replace(CONFIG, seed=1)
    choose(CONFIG, AUTO, tmp_path / "out", quiet=True)
    choose(other, AUTO, tmp_path / "out", overwrite=True, quiet=True)
    choose(other, AUTO, tmp_path / "fresh", quiet=True)
    again, fresh = (PilotRecord.load(tmp_path / name / "auto") for name in ("out", "fresh"))
    assert again.fingerprint == fresh.fingerprint
    assert torch.equal(again.tables.m2, fresh.tables.m2)


def test_a_folder_of_a_run_without_auto_is_refused_before_any_work(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"steps_done": torch.tensor(3)}, CONFIG.to_json())
    monkeypatch.setattr(auto_command, "Trainer", refuse)
    with pytest.raises(RunFolderError, match="holds a run with other settings"):
        choose(CONFIG, AUTO, tmp_path, quiet=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "pilot"}', '{"kind": "choice", "format": 1, "settings": {}}'])
def test_a_damaged_choice_gets_one_sentence(tmp_path, text):
    (tmp_path / "auto").mkdir()
    (tmp_path / "auto" / "choice.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"is damaged .*; remove it to choose again"):
        choose(CONFIG, AUTO, tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (("--renders", 2), "--renders"),
        (("--renoise", 8, "--proposal", "uniform"), "--renoise, --proposal"),
        (("--coupling", "nested"), "--coupling"),
        (("--antithetic",), "--antithetic"),
    ],
)
def test_estimator_options_beside_auto_are_refused(tmp_path, option, named):
    code, _, err = carv("sds", *ARGS, *AUTO_ARGS, *option, "--out", tmp_path / "x")
    assert code == 2
    assert err == f"carv: --auto chooses the estimator: leave out {named}, or leave out --auto\n"
    assert not (tmp_path / "x").exists()


def test_the_range_of_t_and_the_micro_batch_are_kept(tmp_path):
    kept = {"micro_batch": 4, "t_min": 100, "t_max": 900}
    choice = choose(dataclasses.replace(CONFIG, estimator=EstimatorConfig(**kept)), AUTO, tmp_path, quiet=True)
    assert kept.items() <= dataclasses.asdict(choice.estimator).items()
    pilot = PilotRecord.load(tmp_path / "auto")
    assert (pilot.tables.base.low, pilot.tables.base.high) == (100, 900)
    assert pilot.settings["micro_batch"] == 4


def test_options_of_auto_without_it_are_refused(tmp_path):
    code, _, err = carv("sds", *ARGS, "--auto-renders", 8, "--out", tmp_path / "x")
    assert code == 2
    assert "options of --auto were given without it" in err


def test_a_budget_that_no_design_meets_is_said_and_another_goes_on_from_the_warm_up(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no cell costs at most 0\.5; the cheapest costs 1\.01"):
        choose(CONFIG, dataclasses.replace(AUTO, budget=0.5), tmp_path, quiet=True)
    monkeypatch.setattr(auto_command, "Trainer", refuse)
    choice = choose(CONFIG, dataclasses.replace(AUTO, budget=1.5), tmp_path, quiet=True)
    assert choice.estimator.renders == 1
    assert choice.record["budget"] == {"seconds": 1.5, "is": "given"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renders": 3}, "--auto-renders must be at least 4, got 3"),
        ({"noises": 1}, "--auto-noises must be at least 2"),
        ({"bins": 0}, "--auto-bins"),
        ({"repetitions": 5}, "--auto-repetitions"),
        ({"warm_up": 0}, "--auto-warm-up must be at least 1"),
        ({"budget": float("nan")}, "--auto-budget must be positive"),
    ],
)
def test_bad_settings_get_one_sentence_before_the_warm_up(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoConfig(**settings)


def test_the_warm_up_is_a_tenth_of_the_run_between_20_and_100_steps_and_never_more_than_it():
    found = [AutoConfig().warm_up_steps(steps) for steps in (12, 60, 500, 5000)]
    assert found == [12, 20, 50, 100]
    assert AutoConfig(warm_up=30).warm_up_steps(500) == 30


def cell(cost, *design):
    variance = SimpleNamespace(value=1.0)
    prediction = SimpleNamespace(variance=variance)
    return SimpleNamespace(design=Design(*design), cost=Value(cost, 0.0), prediction=prediction)


def test_without_a_gain_that_is_shown_the_simplest_and_then_the_cheapest_of_the_tied_is_kept():
    best = cell(3.0, 2, 8, "weight", "per-render", True)
    dear, cheap = cell(4.0, 4, 1, "uniform", "iid"), cell(2.0, 2, 2, "uniform", "iid")
    strata = cell(1.0, 1, 2, "uniform", "per-render")
    for interval, expected in (((1.1, 2.0), best), ((1.0, 2.0), cheap), ((0.7, 2.0), cheap)):
        advice = SimpleNamespace(best=best, tied=(strata, cheap, dear), gain=SimpleNamespace(interval=interval))
        assert settle(advice) is expected
    only = SimpleNamespace(best=best, tied=(), gain=SimpleNamespace(interval=(0.5, 2.0)))
    assert settle(only) is best


def test_a_choice_without_a_gain_says_so_and_names_the_best_that_was_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_command, "settle", lambda advice: advice.tied[-1])
    choice = choose(CONFIG, AUTO, tmp_path, quiet=True)
    best = Design(**choice.record["advice"]["design"])
    assert f"cannot tell apart from the best, {best}, of which it shows no gain: ECM" in summary(choice)
    assert not choice.record["gain_is_shown"]


def test_an_unknown_error_is_null_on_disk_and_infinite_in_the_summary(made):
    choice = choose(CONFIG, GENEROUS, made[0], quiet=True)
    unknown = {"value": 2.0, "error": None, "interval": [0.0, None], "baseline": "(1, 1) uniform, iid"}
    record = choice.record | {"advice": choice.record["advice"] | {"ecm": unknown}}
    assert "ECM 2(inf)x against (1, 1) uniform, iid, 95 % interval 0 to inf" in summary(
        dataclasses.replace(choice, record=record)
    )
