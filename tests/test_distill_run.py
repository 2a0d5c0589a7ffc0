"""A distillation run: resumable, refused where it goes wrong, the same over several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import socket

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file

from carv.checkpoint import CHECKPOINT, RunFolderError, read_checkpoint, save_checkpoint
from carv.problems import ProblemConfig, load_problem
from carv.rng import stream
from carv.tasks.distill import run as run_module
from carv.tasks.distill.config import DistillConfig, TermEstimator
from carv.tasks.distill.data import RealLatents, load_real
from carv.tasks.distill.networks import Classes
from carv.tasks.distill.run import HISTORY, restore, run, summary
from carv.tasks.distill.train import Trainer
from carv.teachers.diffusers import DiffusersTeacher

from distillations import CLASSES, shaken, tiny_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_dit(tmp_path_factory.mktemp("tiny") / "dit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "latents.safetensors"
    rng = torch.Generator().manual_seed(0)
    save_file({"latents": torch.randn(30, 4, 8, 8, generator=rng), "labels": torch.arange(30) % CLASSES}, path)
    return path


@pytest.fixture
def config(folder, data):
    return DistillConfig(
        teacher=str(folder),
        data=str(data),
        steps=4,
        fake_steps=2,
        renders=2,
        evaluate_every=2,
        generator=TermEstimator(2, "adaptive", "per-render"),
        fake=TermEstimator(2, coupling="global", t_min=0, t_max=999),
        generator_rate=1e-3,
    )


def norm(trainer):
    """An evaluation: the size of what is generated from one fixed noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"norm": trainer.generate(noise, trainer.dmd.classes.null).norm()}


def checkpoint(out):
    """All of a run's state but the time it took."""
    tensors = load_file(out / CHECKPOINT)
    del tensors["seconds"]
    return tensors


def history(out):
    return [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_run_leaves_a_network_that_diffusers_loads_and_a_history(config, folder, tmp_path):
    metrics = run(config, tmp_path / "out", quiet=True, evaluation=norm)
    assert metrics == json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = history(tmp_path / "out")
    assert [row["step"] for row in rows] == [2, 4]
    assert metrics["last"] == rows[-1]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    assert rows[1]["seconds"] == pytest.approx(sum(rows[1]["phases"].values()))
    assert metrics["fake_steps"] == 8
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "generator")
    average = restore(tmp_path / "out").average.denoiser.network
    assert_same(network.state_dict(), average.state_dict())
    before = DiffusersTeacher.from_pretrained(folder).network.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_run_that_was_stopped_anywhere_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    run(config, tmp_path / "whole", checkpoint_every=1, quiet=True, evaluation=norm)
    real_fake, real_generator = Trainer.fake_update, Trainer.generator_update

    def stop_in_a_fake_update(trainer):
        if trainer.fake_done == 3:
            raise KeyboardInterrupt
        real_fake(trainer)

    def stop_while_weights_change(trainer):
        if trainer.steps_done == 2:
            trainer.whole = False
            with torch.no_grad():
                torch._foreach_mul_(list(trainer.generator.parameters()), 2.0)
            raise KeyboardInterrupt
        real_generator(trainer)

    def stop_in_an_evaluation(trainer):
        raise KeyboardInterrupt

    out = tmp_path / "stopped"
    for name, stop, at in (
        ("fake_update", stop_in_a_fake_update, [1, 3]),
        ("generator_update", stop_while_weights_change, [2, 4]),
        ("", stop_in_an_evaluation, [4, 8]),
    ):
        with monkeypatch.context() as patch:
            if name:
                patch.setattr(Trainer, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run(config, out, checkpoint_every=1, quiet=True, evaluation=norm if name else stop)
        assert load_file(out / CHECKPOINT)["done"].tolist() == at
    with (out / HISTORY).open("a") as file:
        file.write('{"step": 4, "no')  # what a crash may leave
    run(config, out, checkpoint_every=1, quiet=True, evaluation=norm)
    assert_same(checkpoint(out), checkpoint(tmp_path / "whole"))
    assert [(r["step"], r["norm"]) for r in history(out)] == [
        (r["step"], r["norm"]) for r in history(tmp_path / "whole")
    ]


def test_a_teacher_that_turns_to_nan_stops_with_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    run(dataclasses.replace(config, steps=2), tmp_path / "good", quiet=True)
    predict = DiffusersTeacher.predict_noise
    calls = []

    def broken(self, z_t, t, conditions):
        calls.append(len(t))
        found = predict(self, z_t, t, conditions)
        return [part * torch.nan for part in found] if len(calls) > 2 else found

    monkeypatch.setattr(DiffusersTeacher, "predict_noise", broken)
    with pytest.raises(ValueError, match=r"DMD.contribution is not finite at t ="):
        run(config, tmp_path / "out", checkpoint_every=100, quiet=True)
    tensors = load_file(tmp_path / "out" / CHECKPOINT)
    assert tensors["done"].tolist() == [2, 6]
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    good = checkpoint(tmp_path / "good")
    assert all(torch.equal(tensors[name], value) for name, value in good.items() if name.startswith("generator."))


def test_a_fake_score_that_diverges_is_refused_before_its_weights_change(config, tmp_path):
    run(config, tmp_path / "out", quiet=True)
    trainer = restore(tmp_path / "out")
    trainer.real = RealLatents(torch.full((3, 4, 8, 8), torch.nan), torch.arange(3))
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    with pytest.raises(ValueError, match="the fake update 4 has a gradient that is not finite"):
        trainer.fake_update()
    assert trainer.whole
    assert_same(before, trainer.state_dict())


def test_another_runs_folder_is_refused_and_overwritten_when_asked(config, tmp_path):
    run(config, tmp_path, quiet=True)
    with pytest.raises(RunFolderError, match="other settings"):
        run(dataclasses.replace(config, seed=1), tmp_path, quiet=True)
    run(dataclasses.replace(config, seed=1), tmp_path, overwrite=True, quiet=True, evaluation=norm)
    assert [row["step"] for row in history(tmp_path)] == [2, 4]


def test_without_the_adversarial_term_no_data_is_needed(config, tmp_path):
    metrics = run(dataclasses.replace(config, gan_weight=0, data="nowhere"), tmp_path, quiet=True)
    assert metrics["steps"] == 4
    with pytest.raises(ValueError, match="no data 'nowhere'"):
        run(dataclasses.replace(config, data="nowhere"), tmp_path / "gan", quiet=True)


def test_micro_batches_change_nothing_but_rounding(config, tmp_path):
    config = dataclasses.replace(config, generator=TermEstimator(4), gan=TermEstimator(3), fake=TermEstimator(5))
    run(config, tmp_path / "whole", quiet=True)
    run(dataclasses.replace(config, micro_batch=3), tmp_path / "parts", quiet=True)
    whole, parts = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    for name, value in whole.items():
        if name.startswith(("generator.", "fake.")):
            torch.testing.assert_close(parts[name], value, rtol=0, atol=5e-4, msg=name)


def test_bfloat16_computes_and_keeps_float32_weights(config, tmp_path):
    run(dataclasses.replace(config, autocast=True, teacher_dtype="bfloat16", steps=2), tmp_path, quiet=True)
    tensors = load_file(tmp_path / CHECKPOINT)
    assert {value.dtype for name, value in tensors.items() if name.startswith(("generator.", "fake."))} == {
        torch.float32
    }


def test_scalars_are_written_for_tensorboard_when_asked(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(run_module, "_SCALARS_EVERY", 1)
    run(dataclasses.replace(config, tensorboard=True), tmp_path, quiet=True, evaluation=norm)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_the_settings_own_evaluation_is_used_when_asked_and_leaves_a_sheet(config, tmp_path, monkeypatch):
    class Judged:
        def __call__(self, trainer):
            return {"frechet": 12.3456, "frechet_error": 0.4321, "samples": 200}

        def write_sheet(self, generate, path):
            path.write_bytes(b"picture")

    monkeypatch.setattr(run_module, "load_evaluation", lambda config, teacher: Judged())
    metrics = run(config, tmp_path, quiet=True, evaluate=True)
    assert (tmp_path / "samples.png").exists()
    text = summary(metrics, tmp_path)
    assert "4 updates of the generator" in text
    assert "frechet: 12.35 +- 0.43" in text


# Real latents


def test_a_folder_of_pictures_is_encoded_at_the_teachers_size_with_its_classes(folder, tmp_path):
    teacher = DiffusersTeacher.from_pretrained(folder)
    for name, grey in (("1", 40), ("3", 200), ("other", 0)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(tmp_path / name / "a.png")
    real = load_real(str(tmp_path), teacher, Classes.of(teacher))
    assert real.label.tolist() == [1, 3]
    torch.testing.assert_close(real.z[:1], teacher.encode(torch.full((1, 3, 16, 16), 40 / 255)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        load_real(str(tmp_path / "empty"), teacher, Classes.of(teacher))


def test_real_latents_of_another_shape_or_other_classes_are_refused(folder, data, tmp_path):
    teacher = DiffusersTeacher.from_pretrained(folder)
    two = load_real(str(data), teacher, Classes.of(teacher, ["3", "1"]))
    assert set(two.label.tolist()) == {0, 1}
    assert len(two.z) == 15
    save_file({"latents": torch.zeros(2, 4, 4, 4), "labels": torch.arange(2)}, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"needs latents \[N, 4, 8, 8\]"):
        load_real(str(tmp_path / "small.safetensors"), teacher, Classes.of(teacher))
    save_file({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.tensor([7, 8])}, tmp_path / "far.safetensors")
    with pytest.raises(ValueError, match=r"no latent of .* is of a class that is distilled"):
        load_real(str(tmp_path / "far.safetensors"), teacher, Classes.of(teacher))
    (tmp_path / "torn.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_real(str(tmp_path / "torn.safetensors"), teacher, Classes.of(teacher))


def test_real_latents_are_drawn_with_their_own_class(folder):
    teacher = DiffusersTeacher.from_pretrained(folder)
    z = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 4, 8, 8)
    trainer = Trainer(DistillConfig(teacher=str(folder), renders=50), teacher)
    renders = trainer.estimators["gan"].renders_of(stream(0))
    drawn = RealLatents(z, torch.arange(20) % CLASSES).draw(renders, trainer.dmd.classes)
    assert torch.equal(drawn.z[:, 0, 0, 0].long() % CLASSES, drawn.label)
    assert torch.equal(drawn.condition.tensors["label"], drawn.label)
    assert len(drawn.z[:, 0, 0, 0].unique()) > 10


# Several processes


def worker(rank, port, config, out):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    run(config, out, quiet=True, evaluation=norm)


def test_two_processes_make_the_run_of_one_with_twice_the_renders(config, tmp_path):
    """In SGD's place AdamW divides by each gradient's size, so rounding shows where a gradient is almost zero."""
    config = dataclasses.replace(config, steps=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, config, tmp_path / "two"), nprocs=2)
    assert not dist.is_initialized()
    run(dataclasses.replace(config, renders=4), tmp_path / "one", quiet=True, evaluation=norm)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    start = DiffusersTeacher.from_pretrained(config.teacher).network.state_dict()
    for module in ("generator.denoiser.network", "fake.network"):
        moved = sum(float((one[f"{module}.{k}"] - v).square().sum()) for k, v in start.items())
        apart = sum(float((one[f"{module}.{k}"] - two[f"{module}.{k}"]).square().sum()) for k in start)
        assert apart < 1e-4 * moved
    torch.testing.assert_close(one["adaptive.generator.sum"], two["adaptive.generator.sum"], rtol=1e-3, atol=0)
    assert history(tmp_path / "two")[-1]["norm"] == pytest.approx(history(tmp_path / "one")[-1]["norm"], rel=1e-4)


def test_distill_is_measured_at_the_checkpoint_of_a_run_which_is_read_once(config, folder, tmp_path, monkeypatch):
    trainer, reads = Trainer(config, DiffusersTeacher.from_pretrained(folder)), []
    shaken(trainer.dmd.fake, 1)
    save_checkpoint(tmp_path, trainer.state_dict(), config.to_json())
    monkeypatch.setattr("carv.problems.read_checkpoint", lambda out: reads.append(out) or read_checkpoint(out))
    monkeypatch.delattr(run_module, "read_checkpoint")
    problem = load_problem(ProblemConfig("distill", run=tmp_path))
    assert reads == [tmp_path]
    assert problem.fingerprint["checkpoint"]
    assert_same(problem.task.fake.state_dict(), trainer.dmd.fake.state_dict())
    assert not problem.task.classes.balance  # the pilot's upstream states are independent
