"""The scores of a one-step generator: right on what is known, the same noise for every run, honest errors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from carv.judge import Judge, Moments, frechet_distance
from carv.judge.model import JudgeConfig, JudgeNetwork
from carv.rng import stream
from carv.tasks.distill import evaluate
from carv.tasks.distill.config import DistillConfig
from carv.tasks.distill.evaluate import Evaluation, Quality, Reference, load_evaluation
from carv.teachers.base import Condition

pytest.importorskip("sklearn")
LATENT = (1, 16, 16)


class PixelTeacher:
    """Its latents are grey pictures."""

    latent_shape, device = LATENT, torch.device("cpu")

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return Condition({"label": torch.tensor([int(prompt) for prompt in prompts])})

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(0, 1).repeat(1, 3, 1, 1)


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Random weights: its features are features all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = JudgeConfig(width=8, features=8)
        return Judge(JudgeNetwork(config), config)


@pytest.fixture(scope="module")
def evaluation(judge: Judge) -> Evaluation:
    return Evaluation(PixelTeacher(), judge, Reference.digits(judge), 400)


def grey(noise: Tensor, condition: Condition) -> Tensor:
    """Depends on noise and class, so that an order that is mixed up would be seen."""
    return torch.sigmoid(noise + condition.tensors["label"].view(-1, 1, 1, 1) / 10 - 0.5)


def test_the_samples_and_the_scores_are_the_same_for_every_run_and_batch(
    evaluation: Evaluation, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = Evaluation(PixelTeacher(), judge, evaluation.reference, 400)
    monkeypatch.setattr(evaluate, "_BATCH", 7)
    assert torch.equal(again.noise, evaluation.noise)
    first = evaluation.pictures(grey)
    assert torch.allclose(again.pictures(grey), first, atol=1e-6)
    assert torch.equal(first, grey(evaluation.noise, evaluation.condition).repeat(1, 3, 1, 1))
    assert again(SimpleNamespace(generate=grey)) == evaluation.score(first).to_dict()
    assert torch.equal(evaluation.pictures(grey, 25), first[:25])


def test_the_distance_is_that_of_the_samples_to_the_training_and_the_held_out_digits(
    evaluation: Evaluation, judge: Judge
) -> None:
    from carv.world.digits import load_digits

    pictures = evaluation.pictures(grey)
    moments = Moments.of(judge.features(pictures))
    found = evaluation.score(pictures)
    for split, value in (("train", found.frechet), ("test", found.frechet_test)):
        real = judge.features(load_digits(split).floats())
        assert value == pytest.approx(frechet_distance(moments, Moments.of(real)), rel=1e-6)


def test_samples_that_are_real_digits_are_near_and_as_varied_as_real_ones(evaluation: Evaluation) -> None:
    """400 training digits of each class in turn: diversity 1 within 4 errors, and far nearer than grey noise."""
    from carv.world.digits import load_digits

    digits = load_digits("train")
    places = [(digits.label == c).nonzero()[:40, 0] for c in range(10)]
    pictures = digits.floats()[torch.stack(places, 1).flatten()]
    real, noise = evaluation.score(pictures), evaluation.score(evaluation.pictures(grey))
    assert abs(real.diversity - 1) < 4 * real.diversity_error < 0.2
    assert real.frechet + 4 * real.frechet_error < noise.frechet - 4 * noise.frechet_error
    shuffled = pictures.roll(1, 0)  # no sample is of its class: the distance does not care, the diversity does
    assert evaluation.score(shuffled).frechet == pytest.approx(real.frechet, rel=1e-9)


def test_a_collapsed_generator_has_no_diversity(evaluation: Evaluation) -> None:
    constant = evaluation.score(evaluation.pictures(lambda noise, condition: grey(0 * noise, condition)))
    assert constant.diversity == pytest.approx(0, abs=1e-4)


def test_accuracy_is_the_share_of_samples_in_which_the_judge_sees_the_class_asked_for(evaluation: Evaluation) -> None:
    class Oracle:
        """Sees the digit that the first pixel encodes."""

        classes = 10

        def features(self, pictures: Tensor) -> Tensor:
            return evaluation.judge.features(pictures)

        def probabilities(self, pictures: Tensor) -> Tensor:
            return torch.eye(10)[(pictures[:, 0, 0, 0] * 20).round().long()]

    pictures = evaluation.pictures(grey)
    pictures[:, 0, 0, 0] = (torch.arange(400) % 10) / 20
    pictures[:100, 0, 0, 0] = ((torch.arange(100) + 1) % 10) / 20
    seen = Evaluation(PixelTeacher(), Oracle(), evaluation.reference, 400)
    found = seen.score(pictures)
    assert found.accuracy == pytest.approx(0.75)
    pictures[:, 0, 0, 0] = (torch.arange(400) % 10) / 20
    certain = seen.score(pictures)
    assert certain.accuracy == 1
    assert 0 < certain.accuracy_error < 0.01


def test_the_error_of_the_distance_is_its_spread_over_independent_samples(judge: Judge, evaluation: Evaluation) -> None:
    """40 sets of 400: the mean stated error is within 45 % of the spread (4 sd of the spread's own 11 %)."""
    found: list[Quality] = []
    for i in range(40):
        noise = torch.randn((400, *LATENT), generator=stream(i, "set").generator())
        found.append(evaluation.score(grey(noise, evaluation.condition).repeat(1, 3, 1, 1)))
    for name in ("frechet", "frechet_test", "diversity"):
        spread = torch.tensor([getattr(one, name) for one in found]).std().item()
        stated = sum(getattr(one, f"{name}_error") for one in found) / len(found)
        assert stated == pytest.approx(spread, rel=0.45), name


def test_every_group_of_the_jackknife_has_the_same_number_of_each_class(evaluation: Evaluation) -> None:
    group = torch.arange(400) // 10 % evaluate.GROUPS
    counts = torch.zeros(evaluate.GROUPS, 10).index_put((group, evaluation.label), torch.ones(400), accumulate=True)
    assert bool((counts == 2).all())


def test_samples_that_are_not_finite_or_too_few_are_refused_in_one_sentence(
    evaluation: Evaluation, judge: Judge
) -> None:
    with pytest.raises(ValueError, match="latents are not finite: its training has diverged"):
        evaluation(SimpleNamespace(generate=lambda noise, condition: grey(noise, condition) * math.nan))
    with pytest.raises(ValueError, match="an evaluation of 400 samples got 10"):
        evaluation.score(torch.zeros(10, 3, 16, 16))
    for samples in (0, 100, 401):
        with pytest.raises(ValueError, match=rf"a multiple of 200 samples \(10 classes x 20 groups\), got {samples}"):
            Evaluation(PixelTeacher(), judge, evaluation.reference, samples)


def test_a_sheet_has_a_row_for_each_class(evaluation: Evaluation, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def by_class(noise: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(noise) + condition.tensors["label"].view(-1, 1, 1, 1) / 10

    path = tmp_path / "sheets" / "0.png"
    evaluation.write_sheet(by_class, path)
    with image.open(path) as sheet:
        assert sheet.size == (12 * 16, 10 * 16)
        assert [sheet.getpixel((3, 16 * c + 5))[0] for c in range(10)] == pytest.approx(
            [25.5 * c for c in range(10)], abs=1
        )


def test_a_record_of_the_scores_is_plain_numbers(evaluation: Evaluation) -> None:
    found = evaluation(SimpleNamespace(generate=grey))
    assert found.keys() == {field.name for field in dataclasses.fields(Quality)}
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in found.values())


def test_the_judge_is_the_one_named_or_the_one_in_the_teacher_s_folder(judge: Judge, tmp_path: Path) -> None:
    config = DistillConfig(teacher=str(tmp_path), samples=200)
    assert load_evaluation(config, PixelTeacher()) is None
    with pytest.raises(ValueError, match="holds no judge"):
        load_evaluation(dataclasses.replace(config, judge=str(tmp_path / "other")), PixelTeacher())
    judge.save(tmp_path / "judge")
    found = load_evaluation(config, PixelTeacher())
    named = load_evaluation(dataclasses.replace(config, teacher="small", judge=str(tmp_path / "judge")), PixelTeacher())
    for one in (found, named):
        assert one is not None
        assert one.samples == 200
        assert one.judge.config == judge.config
