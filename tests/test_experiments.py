"""The scripts of experiments/: each from end to end on a tiny world, their runs, and what they are compared with."""

import dataclasses
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from carv.commands.pilot import PilotConfig
from carv.report.experiment import Experiment
from carv.runs.pilot_folder import PilotRecord
from carv.schedule import NoiseSchedule
from carv.teachers.exact import ExactTeacher
from carv.training.data import HELD_OUT
from carv.world.captions import parse_prompt
from carv.world.dataset import load_world

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
locks, paper, records, sds_pilots, sds_setting = (
    importlib.import_module(name) for name in ("locks", "paper", "records", "sds_pilots", "sds_setting")
)

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
    with locks.alone(tmp_path / "run") as mine:
        assert mine
        with locks.alone(tmp_path / "run", wait=False) as too:
            assert not too
        with locks.alone(tmp_path / "other", wait=False) as other:
            assert other
    with locks.alone(tmp_path / "run", wait=False) as mine:
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
