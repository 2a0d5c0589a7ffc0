"""The SDS task, its training loop, and the commands around it, on real (if small) teachers and fields."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from carv import weights
from carv.checkpoint import CHECKPOINT, RunFolderError, load_checkpoint, save_checkpoint
from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Renders
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.tasks.sds.compare import CompareConfig
from carv.tasks.sds.compare_scores import Examiner, reached, speed_up, time_ratio
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.evaluate import TrueObject
from carv.tasks.sds.export import write_mesh
from carv.tasks.sds.field import VoxelField
from carv.tasks.sds.run import run, summary
from carv.tasks.sds.task import SDS
from carv.tasks.sds.train import GradientNoise, Trainer
from carv.teachers.exact import ExactTeacher
from carv.world.cameras import WORLD_RANGE
from carv.world.dataset import load_world

SCHEDULE = NoiseSchedule.scaled_linear()
SMALL = {"teacher": "world", "field": "voxel", "resolution": 8, "samples": 6, "size": 16}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    world = load_world(size=16, views=16, cache_dir=tmp_path_factory.mktemp("world"))
    return ExactTeacher(world.images_float(), SCHEDULE, world.mask, bandwidth=0.1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where commands that run in processes of their own keep the world's pictures."""
    return tmp_path_factory.mktemp("cache")


def carv(cache, *args, check=True, **kwargs):
    """The real command, in a process of its own."""
    env = os.environ | {"CARV_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "carv.cli", *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False, **kwargs)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_sds_gradient_is_autograd_through_the_surrogate_loss(teacher):
    """Eq. 44-45: 0.5 |z - sg(z - w r)|^2 summed over the latent, divided by R; view words and guidance included."""
    field, weight = VoxelField(8, 6), weights.sds(SCHEDULE)
    task = SDS(teacher, field, "a red chair", weight, 3.0, WORLD_RANGE, size=16)
    base = uniform_steps(20, 980)
    estimator = HierarchicalEstimator(TimestepSampler(base, proportional(base, weight), w=weight), 2, 3)
    found = estimator.estimate(task, stream(0))
    draws = estimator.sampler.sample(2, 3, stream(0, "timesteps").generator())
    streams = tuple(stream(0, "render", r) for r in range(2))
    state = task.upstream(Renders(streams, 0, 2))
    negative = teacher.encode_prompts([""])
    loss = torch.zeros(())
    for r, word in enumerate(state.cameras.words()):
        condition = teacher.encode_prompts([f"a red chair, {word} view"])
        eps = torch.randn((8, *task.latent_shape), generator=streams[r].child("noise", 0).generator())
        for k in range(3):
            t, z = draws.t[r, k : k + 1], state.z[r : r + 1]
            z_t = SCHEDULE.alpha(t) * z.detach() + SCHEDULE.sigma(t) * eps[k]
            e_u, e_c = teacher.predict_noise(z_t, t, [negative, condition])
            grad = (1 - SCHEDULE.acp[t]).float() * (e_u + 3.0 * (e_c - e_u) - eps[k])
            target = (z - draws.weight[r, k] * grad).detach()
            loss = loss + 0.5 * (z - target).square().sum() / (2 * 3)
    for a, b in zip(found.gradient, torch.autograd.grad(loss, task.parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_training_raises_agreement_with_the_true_object(teacher):
    torch.manual_seed(0)
    estimator = EstimatorConfig(renoise=8)
    config = SDSConfig(
        "a red chair", estimator, 120, teacher="world", field="voxel", resolution=16, samples=12, size=16
    )
    trainer, truth = Trainer(config, teacher), TrueObject("a red chair", views=3, size=32)
    before = truth.agreement(trainer.field)
    for _ in range(config.steps):
        trainer.step()
    after = truth.agreement(trainer.field)
    assert after.psnr.mean() > before.psnr.mean() + 2
    assert after.ssim.mean() > before.ssim.mean()
    assert trainer.noise.share is not None


@pytest.mark.parametrize("proposal", ["weight", "adaptive"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(teacher, tmp_path, proposal):
    config = SDSConfig("a red chair", EstimatorConfig(renoise=4, proposal=proposal), steps=6, **SMALL)
    whole, first = Trainer(config, teacher), Trainer(config, teacher)
    for _ in range(6):
        whole.step()
    for _ in range(3):
        first.step()
    save_checkpoint(tmp_path, first.state_dict(), config.to_json())
    second = Trainer(config, teacher)
    second.load_state_dict(load_checkpoint(tmp_path, config.to_json()))
    for _ in range(3):
        second.step()
    for a, b in zip(whole.field.parameters(), second.field.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_folder_of_another_run_or_a_damaged_checkpoint_is_refused(tmp_path):
    assert load_checkpoint(tmp_path, "{}") is None
    save_checkpoint(tmp_path, {"x": torch.ones(3)}, "{}")
    with pytest.raises(RunFolderError, match="holds a run with other settings; give another --out, or --overwrite"):
        load_checkpoint(tmp_path, '{"seed": 1}')
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunFolderError, match="is damaged"):
        load_checkpoint(tmp_path, "{}")
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT], "no temporary file is left"


def test_gradient_noise_is_the_share_of_the_norm_that_is_noise():
    """g = mu + noise with |mu|^2 = 1 and E|noise|^2 = 4: a share of 0.8, here +- 0.1 (smoothed over ~10 steps)."""
    noise, rng = GradientNoise(), torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        noise.update(torch.full((400,), 0.05) + 0.1 * torch.randn(400, generator=rng))
        shares.append(noise.share)
    assert shares[5] is None
    assert sum(shares[50:]) / len(shares[50:]) == pytest.approx(0.8, abs=0.05)


def test_time_to_the_baselines_final_score_is_interpolated_between_snapshots():
    assert time_ratio([0, 5, 10], [1.0, 2.0, 3.0], [0, 5, 10], [1.0, 5.0, 6.0]) == pytest.approx(4.0)
    assert time_ratio([0, 10], [1.0, 3.0], [0, 10], [1.0, 2.0]) is None


def test_equal_curves_are_no_speed_up_even_where_both_stand_still_at_the_end():
    times, plateau = [0.0, 5.0, 10.0, 15.0], [0.0, 1.0, 1.0, 1.0]
    assert time_ratio(times, plateau, times, plateau) == 1.0
    assert time_ratio(times, [0.5] * 4, times, [0.5] * 4) is None, "there from the start: no time to compare"


def test_runs_that_reach_the_baselines_end_at_any_snapshot_are_counted():
    times = [0.0, 5.0, 10.0]
    baseline = {"seconds": [times] * 3, "psnr": [[1.0, 2.0, 3.0]] * 3}
    ours = {"seconds": [times] * 3, "psnr": [[1.0, 3.5, 2.0], [1.0, 2.0, 2.5], [3.0, 3.0, 3.0]]}
    assert reached(baseline, ours, "psnr") == 2
    assert speed_up(baseline, ours, "psnr") == [pytest.approx(2.5), None, None]


def test_no_two_runs_of_a_comparison_share_their_noise():
    config = CompareConfig(("a red chair", "a blue car"), seeds=3)
    assert config.runs == [("a red chair", 0), ("a red chair", 1), ("a red chair", 2)] + [
        ("a blue car", seed) for seed in (3, 4, 5)
    ]


def test_a_prompt_that_nothing_can_score_is_refused_before_any_training():
    with pytest.raises(ValueError, match="'a wooden boat' describes no object of carv's world"):
        Examiner("a wooden boat", exact=False, cameras="world", clip=None)
    with pytest.raises(ValueError, match="wooden"):
        Examiner("a wooden boat", exact=True, cameras="world", clip=None)


def test_a_prompt_outside_the_worlds_language_ends_in_metrics_too(tmp_path):
    pytest.importorskip("diffusers")
    config = SDSConfig("a wooden boat", EstimatorConfig(renoise=1), steps=1, **SMALL | {"teacher": "small"})
    metrics = run(config, tmp_path, quiet=True)
    assert metrics["agreement_with_true_object"] is metrics["held_out"] is None
    assert metrics["clip"]["model"] == "small"
    assert metrics["clip"]["r_precision"] is None
    assert summary(metrics, tmp_path).startswith("CLIP score (small) over 8 views, mean and standard deviation: ")


def test_an_empty_field_has_no_mesh(tmp_path):
    field = VoxelField(8, 6)
    with torch.no_grad():
        field.density.fill_(-20.0)
    assert write_mesh(tmp_path / "mesh.glb", field, 16) == 0
    assert not (tmp_path / "mesh.glb").exists()


BAD_CONFIGS = [
    (lambda: SDSConfig("a chair", steps=0), "steps must be at least 1"),
    (lambda: SDSConfig("a chair", weight="sdss"), "unknown weight 'sdss'; known weights: sds"),
    (lambda: CompareConfig(seeds=1), "at least 2 seeds"),
    (lambda: CompareConfig(seconds=0.0), "seconds must be positive"),
    (lambda: CompareConfig(("a red chair", "a red chair")), "at least one prompt, and each once"),
]


@pytest.mark.parametrize(("make", "message"), BAD_CONFIGS)
def test_bad_settings_get_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The commands themselves


def test_carv_sds_writes_a_turntable_a_sheet_a_mesh_and_metrics(cache, tmp_path):
    import imageio.v3 as imageio
    import trimesh

    out = tmp_path / "chair"
    args = ["sds", "a red chair", "--out", out, "--steps", 12, "--renoise", 2, "--field", "voxel"]
    args += ["--resolution", 12, "--samples", 12]
    done = carv(cache, *args)
    assert "PSNR" in done.stdout
    assert len(imageio.imread(out / "turntable.gif", index=None)) == 36
    assert imageio.imread(out / "contact_sheet.png").shape[2] == 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert metrics["bias"].startswith("none")
    assert {"carv", "torch", "python", "device"} <= metrics.keys()
    assert metrics["config"]["estimator"]["renoise"] == 2
    assert metrics["held_out"] is False
    assert metrics["clip"]["model"] == "small"
    assert metrics["clip"]["r_precision"].keys() == {"mean", "std_over_views", "hits"}
    assert (metrics["clip"]["views"], metrics["clip"]["captions"]) == (8, 128)
    if metrics["mesh_faces"]:
        assert len(trimesh.load(out / "mesh.glb", force="mesh").faces) == metrics["mesh_faces"]
    again = carv(cache, *args, "--json")
    assert json.loads(again.stdout)["steps"] == 12, "a finished run is only written out again"
    other = carv(cache, *args[:-1], 8, check=False)
    assert other.returncode == 2
    assert "holds a run with other settings" in other.stderr


def test_an_unknown_word_gets_one_sentence_that_lists_what_the_teacher_knows(cache, tmp_path):
    done = carv(cache, "sds", "a red dragon", "--teacher", "world", "--out", tmp_path / "x", check=False)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert "dragon" in sentence
    assert all(word in sentence for word in ("chair", "mushroom", "blue", "overhead"))
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_run_that_is_killed_and_then_interrupted_ends_where_an_unbroken_one_does(cache, tmp_path):
    args = ["--renoise", 2, "--resolution", 8, "--samples", 8, "--size", 32, "--checkpoint-every", 5, "--steps", 60]
    args += ["--teacher", "world", "--field", "voxel", "--clip", "none"]
    command = [sys.executable, "-m", "carv.cli", "sds", "a blue car", "--out", tmp_path / "broken", *args]
    env = os.environ | {"CARV_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    checkpoint = tmp_path / "broken" / CHECKPOINT
    for how in (signal.SIGKILL, signal.SIGINT):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(how)
        stderr = process.communicate()[1].decode()
        if how == signal.SIGINT and process.returncode != 0:  # it may have ended before the signal
            assert process.returncode == 130
            assert "goes on from the last checkpoint" in stderr
    for folder in ("broken", "whole"):
        carv(cache, "sds", "a blue car", "--out", tmp_path / folder, *args)
    assert checkpoint.read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_folder_that_cannot_be_written_is_said_before_any_training(cache, tmp_path):
    (tmp_path / "file").write_text("in the way")
    args = ["--out", tmp_path / "file" / "x", "--teacher", "world", "--clip", "none"]
    done = carv(cache, "sds", "a red chair", *args, check=False)
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_carv_compare_writes_a_figure_and_a_record_with_a_spread(cache, tmp_path):
    args = ["--seconds", 1, "--seeds", 2, "--snapshots", 3, "--renoise", 2, "--teacher", "world", "--field", "voxel"]
    done = carv(cache, "compare", "a green mushroom", "--out", tmp_path, *args)
    assert "+-" in done.stdout
    assert "sooner" in done.stdout or "runs" in done.stdout
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert len(record["curves"]) == 2
    for curve in record["curves"].values():
        assert [len(run) for run in curve["psnr"]] == [3, 3]
    for score in ("psnr", "ssim", "clip_score", "r_precision"):
        assert all(len(curve[score]) == 2 for curve in record["curves"].values())
        assert all(final[score]["standard_error"] >= 0 for final in record["final"].values())
        assert record["reached_baseline_final"][score] in range(3)
    assert [run["held_out"] for run in record["runs"]] == [False, False]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    without = carv(cache, "compare", "a chair", "--out", tmp_path, *args, check=False)
    assert without.returncode == 2
    assert "colour" in without.stderr
