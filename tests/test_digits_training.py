"""carv's own small DiT on real digits: its data, every stage at a tiny size, the folder it leaves, and what ships."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from carv.checkpoint import RunFolderError
from carv.judge import Judge, JudgeNetwork
from carv.rng import stream
from carv.schedule import NoiseSchedule
from carv.teachers import small
from carv.teachers.diffusers import DiffusersTeacher
from carv.training import loop
from carv.training.digits import data
from carv.training.digits.card import model_card
from carv.training.digits.config import GUIDANCE_SCALES, SIZES, DigitsConfig
from carv.training.digits.data import AugmentedDigits, augmented, distorted
from carv.training.digits.denoiser import NULL_CLASS, DitLoss, build_dit, build_scheduler, close_table
from carv.training.digits.evaluate import (
    Reference,
    asked_classes,
    load_pipeline,
    real_quality,
    sample,
    write_samples,
)
from carv.training.digits.judge import JudgeLoss, judge_config, noisy
from carv.training.digits.train import train
from carv.training.train import initialised_from
from carv.world.digits import Digits, load_digits

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

TINY = DigitsConfig(
    size="tiny", autoencoder_steps=6, denoiser_steps=6, judge_steps=6, sampling_steps=1, samples_per_class=3
)
CPU = torch.device("cpu")


def silent(line: str) -> None:
    pass


# The digits.


def test_the_digits_are_scikit_learns_enlarged_in_grey() -> None:
    digits = load_digits("all")
    assert digits.pictures.shape == (1797, 3, 16, 16)
    assert digits.pictures.dtype == torch.uint8
    assert (digits.pictures == digits.pictures[:, :1]).all()
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    assert digits.label.tolist() == raw.target.tolist()
    small_again = functional.avg_pool2d(digits.floats()[:, 0], 2)
    assert (small_again - torch.as_tensor(raw.images / 16)).abs().mean() < 0.05


def test_the_split_is_a_fixed_fifth_of_each_digit_and_loses_none() -> None:
    train_split, test_split, everything = (load_digits(name) for name in ("train", "test", "all"))
    assert (len(train_split), len(test_split)) == (1438, 359)
    shares = torch.bincount(test_split.label) / torch.bincount(everything.label)
    assert shares.sub(0.2).abs().max() < 0.003
    rows = [sorted(map(bytes, part.pictures.flatten(1).numpy())) for part in (train_split, test_split, everything)]
    assert sorted(rows[0] + rows[1]) == rows[2]
    assert not set(rows[0]) & set(rows[1])  # no picture is in both
    assert test_split.label[:20].tolist() == [4, 7, 8, 4, 1, 7, 3, 1, 0, 8, 0, 6, 5, 5, 0, 7, 1, 3, 7, 9]


def test_another_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train', 'test' or 'all'"):
        load_digits("validation")  # type: ignore[arg-type]


# Copies of them.


def test_the_first_of_each_copies_is_the_real_picture_and_the_others_resemble_it() -> None:
    digits = load_digits("test")
    seen = augmented(digits, 4, stream(0, "copies"))
    assert torch.equal(seen.images[::4], digits.pictures)
    assert torch.equal(seen.label, digits.label.repeat_interleave(4))
    pictures = seen.images.float().reshape(len(digits), 4, -1) / 255
    apart = (pictures[:, 1:] - pictures[:, :1]).square().mean(dim=2).sqrt()
    strangers = (pictures[1:, 0] - pictures[:-1, 0]).square().mean(dim=1).sqrt()
    assert apart.min() > 0.005
    assert apart.mean() < 0.4 * strangers.mean()


def dots(count: int) -> Tensor:
    """A round blob right of the middle."""
    axis = torch.arange(16) - 7.5
    blob = torch.exp(-((axis[None] - 3) ** 2 + axis[:, None] ** 2) / 4)
    return blob.expand(count, 3, 16, 16)


def middles(pictures: Tensor) -> Tensor:
    """[N, 2] down and right, in pixels from the middle."""
    axis, mass = torch.arange(16) - 7.5, pictures[:, 0] / pictures[:, 0].sum(dim=(1, 2), keepdim=True)
    return torch.stack([mass.sum(dim=2) @ axis, mass.sum(dim=1) @ axis], dim=1)


def only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in {"TURN", "SCALE", "SHEAR", "MOVE"} - {name}:
        monkeypatch.setattr(data, other, 0.0)


def test_a_distortion_of_size_zero_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "none")
    pictures = load_digits("test").floats()[:9]
    torch.testing.assert_close(distorted(pictures, stream(0, "d")), pictures, atol=1e-5, rtol=0)


def test_each_distortion_has_the_size_it_is_said_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest of 2000 uniform draws is within 1% of the bound, except once in e^20 runs.
    start = middles(dots(1))[0]
    for name, size in (("MOVE", 0.5), ("TURN", 3 * torch.pi * 8 / 180), ("SCALE", 3 * 0.06), ("SHEAR", 0.0)):
        with monkeypatch.context() as patch:
            only(patch, name)
            moved = middles(distorted(dots(2000), stream(0, name))) - start
            largest = moved.abs().amax(dim=0)
        if name == "MOVE":
            assert largest.tolist() == pytest.approx([size, size], rel=0.05)
        if name == "TURN":
            assert float(largest[0]) == pytest.approx(size, rel=0.05)
            assert float(moved[:, 0].mean()) == pytest.approx(0, abs=0.03)  # both ways: 4 standard errors
        if name == "SCALE":
            assert float(largest[1]) == pytest.approx(size, rel=0.1)
        if name == "SHEAR":  # about the middle: what lies to its right stays
            assert largest.max() < 0.05


def test_an_epoch_shows_every_picture_once() -> None:
    seen = augmented(load_digits("test"), 2, stream(0, "copies"))
    each = len(seen) // 50
    drawn = torch.cat([seen.batch(step, 50, stream(0, "data")) for step in range(each)])
    assert len(drawn.unique()) == len(drawn) == 50 * each
    again = torch.cat([seen.batch(each + step, 50, stream(0, "data")) for step in range(each)])
    assert not torch.equal(again, drawn)


# The networks.


@pytest.fixture
def network() -> Any:
    with initialised_from(stream(0, "dit")):
        return build_dit(SIZES["tiny"])


def loss_of(network: Any, latents: Tensor, label: Tensor, batch: int, drop: float) -> DitLoss:
    pictures = AugmentedDigits(torch.zeros(len(label), 3, 16, 16, dtype=torch.uint8), label, 1)
    rng = stream(0, "denoiser")
    return DitLoss(network, latents, pictures, build_scheduler().alphas_cumprod, batch, drop, rng, CPU, False)


class Oracle(nn.Module):
    """Knows that every latent is the same one, and so predicts v without error."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z
        self.classes: Tensor | None = None

    def forward(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.classes = class_labels
        scheduler = build_scheduler()
        alpha = scheduler.alphas_cumprod[timestep].sqrt()[:, None, None, None]
        noise = (noisy - alpha * self.z) / (1 - alpha**2).sqrt()
        velocity = scheduler.get_velocity(self.z.expand_as(noise), noise, timestep)
        return type("Output", (), {"sample": velocity})()


def test_the_dits_target_is_the_v_of_diffusers_and_some_classes_are_the_null_class() -> None:
    z = torch.randn(4, 8, 8, generator=stream(0, "z").generator())
    oracle = Oracle(z)
    loss = loss_of(oracle, z.expand(500, -1, -1, -1), torch.full((500,), 7), 400, 0.1)
    assert loss(3).item() < 1e-5
    assert oracle.classes is not None
    assert set(oracle.classes.tolist()) == {7, NULL_CLASS}
    # 40 expected with a standard deviation of 6: four of them, one false alarm in 16,000 runs.
    assert 16 < int((oracle.classes == NULL_CLASS).sum()) < 64


def test_training_drops_no_class_by_itself_and_leaves_the_global_generator_alone(network: Any) -> None:
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    network.train()
    z, t = torch.zeros(200, 4, 8, 8), torch.full((200,), 500)
    state = torch.get_rng_state()
    out = network(z, timestep=t, class_labels=torch.full((200,), 3)).sample
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, out[:1].expand_as(out))  # at diffusers' own 10%, twenty would differ


def test_rows_of_no_digit_stay_zero_in_training_and_then_mean_any_digit(network: Any) -> None:
    loss = loss_of(network, torch.ones(50, 4, 8, 8), torch.arange(50) % 10, 50, 0.2)
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
    for step in range(5):
        loss(step).backward()
        optimiser.step()
    table = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert (table[10:NULL_CLASS] == 0).all()
    assert (table[:10].abs().sum(dim=1) > 0).all()
    assert table[NULL_CLASS].abs().sum() > 0
    close_table(network)
    assert torch.equal(table[10:NULL_CLASS], table[NULL_CLASS].expand(990, -1))
    assert not torch.equal(table[9], table[NULL_CLASS])


def test_the_last_timestep_is_nearly_pure_noise_and_can_be_divided_by() -> None:
    scheduler = build_scheduler()
    schedule = NoiseSchedule.from_diffusers(dict(scheduler.config))
    assert 0.01 < float(scheduler.alphas_cumprod[-1].sqrt()) < 0.02
    assert float(schedule.alpha(torch.tensor(999))) == pytest.approx(float(scheduler.alphas_cumprod[-1].sqrt()))
    scheduler.set_timesteps(25)
    assert int(scheduler.timesteps[0]) == 999


def test_the_judge_learns_in_some_steps_and_its_noise_stays_within_pictures() -> None:
    digits = load_digits("test")
    shown = noisy(digits.floats(), stream(0, "noise"))
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    clean = (shown == digits.floats()).flatten(1).all(dim=1).float().mean()
    assert 0.35 < float(clean) < 0.65  # half of 359: the standard error is 0.026
    with initialised_from(stream(0, "judge")):
        judge = JudgeNetwork(judge_config(SIZES["tiny"]))
    loss = JudgeLoss(judge, augmented(digits, 1, stream(0)), 64, stream(0, "judge"), CPU)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=1e-2)
    losses = []
    for step in range(25):
        value = loss(step)
        losses.append(value.item())
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


# The measures.


@pytest.fixture(scope="module")
def reference() -> Reference:
    with initialised_from(stream(0, "judge")):
        judge = JudgeNetwork(judge_config(SIZES["tiny"]))
    seen = augmented(load_digits("train"), 2, stream(0, "copies"))
    return Reference.of(Judge(judge, judge_config(SIZES["tiny"])), seen, stream(0, "order"))


def test_the_test_split_measures_as_itself(reference: Reference) -> None:
    own = reference.quality(reference.test.floats(), reference.test.label)
    assert own["frechet_test"]["value"] < 1e-6 < own["frechet_train"]["value"]
    assert own["diversity"]["value"] == pytest.approx(1)
    assert own["near_known"]["value"] == pytest.approx(0.5, abs=0.01)
    assert all("standard_error" in value or "low" in value for value in own.values())


def test_copies_of_the_training_and_one_picture_for_all_are_found_out(reference: Reference) -> None:
    asked = torch.arange(10).repeat(4)
    first = reference.known.reshape(-1, 3, 16, 16)[1:81:2]  # distorted ones
    copies = reference.quality(first, asked)
    assert copies["near_known"]["value"] == 1
    same = reference.quality(first[:1].expand(40, -1, -1, -1), asked)
    assert same["diversity"]["value"] < 1e-5
    assert same["accuracy"]["value"] == 0.1  # it is one class of ten


def test_real_pictures_are_measured_in_equal_numbers_of_each_digit(reference: Reference) -> None:
    real = real_quality(reference, 6)
    assert real["accuracy"]["count"] == 60
    assert "frechet_train" not in real


def test_every_class_is_asked_for_equally_often_in_random_order() -> None:
    asked = asked_classes(5, stream(0, "asked"))
    assert torch.bincount(asked).tolist() == [5] * 10
    assert asked.tolist() != sorted(asked.tolist())


def test_the_sheet_has_digits_across_and_samples_down(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    labels = torch.arange(10).repeat(2)
    shown = (labels / 10)[:, None, None, None].expand(20, 3, 16, 16)
    write_samples(tmp_path / "sheet.png", shown, labels)
    sheet = image.open(tmp_path / "sheet.png")
    assert sheet.size == (10 * 34, 2 * 34)
    assert sheet.getpixel((34 * 3 + 17, 34 + 17)) == (round(0.3 * 255),) * 3


# The whole run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    train(TINY, out, say=silent)
    return out


def test_the_pipeline_of_diffusers_and_carvs_teacher_both_read_the_folder(trained: Path) -> None:
    pipeline = load_pipeline(trained, CPU)
    assert pipeline.get_label_ids(["3", "0"]) == [3, 0]
    asked = torch.tensor([3, 0, 3])
    together = sample(pipeline, asked, 2, 1.5, stream(0, "samples"))
    assert together.shape == (3, 3, 16, 16)
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    torch.testing.assert_close(sample(pipeline, asked[:1], 2, 1.5, stream(0, "samples")), together[:1])
    teacher = DiffusersTeacher.from_pretrained(trained)
    assert teacher.latent_shape == (4, 8, 8)
    assert teacher.picture_shape == (3, 16, 16)
    z, t = torch.randn(2, 4, 8, 8, generator=stream(0, "z").generator()), torch.tensor([10, 900])
    conditions = [teacher.encode_prompts([name] * 2) for name in ("", "3", "57")]
    empty, three, no_digit = teacher.predict_noise(z, t, conditions)
    assert torch.equal(empty, no_digit)
    table = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert torch.equal(table[57], table[NULL_CLASS])
    assert table[NULL_CLASS].abs().sum() > 0
    expected = pipeline.transformer(z, timestep=t, class_labels=torch.tensor([3, 3])).sample
    noise = build_scheduler().get_velocity  # v = alpha eps - sigma z, so eps = alpha v + sigma z_t
    torch.testing.assert_close(three, noise(-z, expected, t), atol=1e-4, rtol=1e-4)


def test_latents_of_the_saved_autoencoder_have_unit_scale_in_each_channel(trained: Path) -> None:
    teacher = DiffusersTeacher.from_pretrained(trained)
    latents = teacher.encode(load_digits("train").floats()[:400])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert latents.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.1


def test_weights_are_float16_safetensors_and_nothing_is_pickled(trained: Path) -> None:
    files = [path for path in trained.rglob("*") if path.is_file() and "training" not in path.parts]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert sorted(path.parent.name for path in weights) == ["judge", "transformer", "vae"]
    assert all(tensor.dtype == torch.float16 for path in weights for tensor in load_file(path).values())


def test_the_card_says_how_it_was_made_and_every_figure_has_its_error(trained: Path) -> None:
    card = (trained / "README.md").read_text()
    assert "--autoencoder-steps 6 --denoiser-steps 6 --judge-steps 6" in card
    assert "CC BY 4.0" in card
    rows = [line for line in card.splitlines() if line.startswith(("| class acc", "| Frechet", "| divers", "| nearer"))]
    assert len(rows) == 5
    for row in rows:
        cells = [cell for cell in row.split("|")[2:-1] if cell.strip()]
        assert len(cells) >= len(GUIDANCE_SCALES)
        assert all("[" in cell or "+-" in cell for cell in cells)
    assert "nan" not in card


class Killed(BaseException):
    pass


def killed(monkeypatch: pytest.MonkeyPatch, saves: int, work: Callable[[], Any]) -> None:
    """Do the work until the process dies, right after it has saved so many checkpoints."""
    real, calls = loop.save_checkpoint, 0

    def save(*args: Any) -> None:
        nonlocal calls
        real(*args)
        calls += 1
        if calls == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        with pytest.raises(Killed):
            work()


def test_a_run_killed_in_every_stage_ends_with_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)
    for _ in range(3):  # each time five steps further: in the autoencoder, the transformer, and the judge
        killed(monkeypatch, 5, lambda: train(TINY, tmp_path, say=silent))
    train(TINY, tmp_path, say=silent)
    for part in ("vae", "transformer", "judge"):
        [name] = [path.relative_to(trained) for path in (trained / part).glob("*.safetensors")]
        first, second = load_file(trained / name), load_file(tmp_path / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    figures = [json.loads((folder / "quality.json").read_text())["quality"] for folder in (trained, tmp_path)]
    assert figures[0] == figures[1]


def test_other_settings_are_refused_unless_told_to_start_again(trained: Path) -> None:
    with pytest.raises(RunFolderError, match="--overwrite"):
        train(DigitsConfig(**{**vars(TINY), "seed": 1}), trained, say=silent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minutes": 0.0}, "minutes must be positive"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1"),
        ({"samples_per_class": 2}, "at least 3 to have errors"),
        ({"judge_steps": -1}, "judge_steps must not be negative"),
        ({"drop_classes": 1.0}, "drop_classes is a share"),
        ({"size": "huge"}, "unknown size 'huge'"),
    ],
)
def test_bad_settings_get_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsConfig(**settings)


# What ships.


def test_the_package_holds_the_dit_as_data_and_its_card_is_made_from_its_measured_quality() -> None:
    folder = small.small_dit()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}
    assert sum(path.stat().st_size for path in files) < 8e6
    assert (folder / "samples.png").stat().st_size < 60_000
    assert (folder / "README.md").read_text() == model_card(json.loads((folder / "quality.json").read_text()))


def test_a_package_without_the_dit_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small, "__file__", str(tmp_path / "small.py"))
    with pytest.raises(FileNotFoundError, match="`carv teachers train digits --out DIR`"):
        small.small_dit()


def test_the_shipped_judge_knows_digits_that_it_has_not_seen() -> None:
    test = load_digits("test")
    found = Judge.from_pretrained(small.small_dit() / "judge").probabilities(test.floats()).argmax(dim=1)
    assert float((found == test.label).float().mean()) > 0.97


def test_the_shipped_dit_draws_the_digit_asked_for() -> None:
    folder = small.small_dit()
    asked = torch.arange(10).repeat(3)
    pictures = sample(load_pipeline(folder, CPU), asked, 10, 2.0, stream(0, "shipped"))
    found = Judge.from_pretrained(folder / "judge").probabilities(pictures).argmax(dim=1)
    assert int((found == asked).sum()) >= 27


def test_the_shipped_autoencoder_gives_pictures_back() -> None:
    teacher = DiffusersTeacher.from_pretrained(small.small_dit())
    pictures = load_digits("test").floats()[:50]
    error = (teacher.decode(teacher.encode(pictures)) - pictures).square().mean()
    assert float(-10 * error.log10()) > 28


def test_classes_that_are_no_digits_are_the_shipped_teachers_null_class() -> None:
    teacher = DiffusersTeacher.from_pretrained(small.small_dit())
    z, t = torch.randn(1, 4, 8, 8, generator=stream(0, "z").generator()), torch.tensor([700])
    empty, three, no_digit = teacher.predict_noise(z, t, [teacher.encode_prompts([name]) for name in ("", "3", "57")])
    assert torch.equal(empty, no_digit)
    assert not torch.allclose(empty, three, atol=1e-2)


def test_digits_are_a_dataclass_of_bytes_and_labels() -> None:
    digits = Digits(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8), torch.tensor([1, 2]))
    assert len(digits) == 2
    assert float(digits.floats().max()) == 1
