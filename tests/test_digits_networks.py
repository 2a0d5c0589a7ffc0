"""The small DiT of digits, its judge, and the measures of its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carv.judge import Judge, JudgeNetwork
from carv.rng import stream
from carv.schedule import NoiseSchedule
from carv.training.digits.config import SIZES
from carv.training.digits.data import AugmentedDigits, augmented
from carv.training.digits.denoiser import NULL_CLASS, DitLoss, build_dit, build_scheduler, close_table
from carv.training.digits.evaluate import Reference, asked_classes, real_quality, write_samples
from carv.training.digits.judge import JudgeLoss, judge_config, noisy
from carv.training.stages import initialised_from
from carv.world.digits import load_digits

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

CPU = torch.device("cpu")


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
