"""The exact denoiser of a data set: its definition, its score and density, and its ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.teachers.base import Condition, Teacher
from carv.teachers.exact import ExactTeacher
from carv.teachers.guidance import Guided

from teacher_cases import SCHEDULES, column, normal


def select_of(count: int, classes: int = 3) -> Callable[[str], Tensor]:
    """Images i = c mod `classes` for the prompt "c", all for the empty prompt, none for "none"."""

    def select(prompt: str) -> Tensor:
        if prompt == "none":
            return torch.zeros(count, dtype=torch.bool)
        return torch.arange(count) % classes == int(prompt) if prompt else torch.ones(count, dtype=torch.bool)

    return select


def direct(
    images: Tensor, schedule: NoiseSchedule, h: float, z_t: Tensor, t: Tensor, selected: Tensor
) -> tuple[Tensor, Tensor]:
    """eps_hat and the logits of the images, by the definition: float64 differences, one draw at a time."""
    results, all_logits = [], []
    for z, at, chosen in zip(z_t.double(), t, selected, strict=True):
        x = images.double()[chosen]
        alpha, sigma = schedule.alpha(at, torch.float64), schedule.sigma(at, torch.float64)
        v = (alpha * h) ** 2 + sigma**2
        logits = -(z - alpha * x).flatten(1).square().sum(1) / (2 * v)
        mean = (logits.softmax(0)[:, None] * x.flatten(1)).sum(0).view(z.shape)
        results.append((sigma / v) * (z - alpha * mean))
        all_logits.append(logits)
    return torch.stack(results), torch.cat(all_logits)


def fixture(
    schedule: NoiseSchedule, t: Tensor, seed: int = 0, shape: tuple[int, ...] = (3, 16, 16)
) -> tuple[Tensor, Tensor, list[str]]:
    """60 images in [-1, 1] among which 20 are near-duplicates of others; z_t from them; one prompt a draw."""
    images = normal(60, *shape, seed=seed).tanh()
    images[40:] = images[:20] + 2e-3 * normal(20, *shape, seed=seed + 1)
    images = images.float()
    z_t = schedule.add_noise(images[: len(t)].double(), t, normal(len(t), *shape, seed=seed + 2)).float()
    return images, z_t, [str(i % 3) if i % 4 else "" for i in range(len(t))]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("bandwidth", [0.0, 0.05])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_exact_teacher_is_the_definition(name: str, bandwidth: float, precision: torch.dtype) -> None:
    schedule = SCHEDULES[name]
    times = [1e-3, 0.01, 0.3, 0.9, 0.999, 1.0] if schedule.continuous else [0, 1, 20, 300, 500, 900, 998, 999]
    t = torch.tensor(times)
    images, z_t, prompts = fixture(schedule, t)
    teacher = ExactTeacher(images, schedule, select_of(60), bandwidth, precision)
    condition = teacher.encode_prompts(prompts)
    (eps,) = teacher.predict_noise(z_t, t, [condition])
    expected, _ = direct(images, schedule, bandwidth, z_t, t, condition.tensors["selected"])
    assert eps.dtype == z_t.dtype
    # z_t itself is rounded to float32, which is 6e-8 / sigma of noise: hence the tolerance at small t.
    sigma = column(schedule.sigma(t, torch.float64), expected)
    assert bool(((eps - expected).abs() < 2e-6 + 4e-7 / sigma).all())


def test_exact_teacher_tells_near_duplicates_apart() -> None:
    """Logits a few units apart from squares of size 1e7: float32 dot products would miss them by units."""
    schedule, t = NoiseSchedule.linear(), torch.zeros(6, dtype=torch.long)
    images = 1 + normal(2, 3, 32, 32).tanh().float()
    images[1] = images[0]
    images[1, 0, :4, :4] += 0.01
    z_t = schedule.add_noise(images[:1].double(), t, normal(6, 3, 32, 32, seed=1)).float()
    selected = torch.ones(6, 2, dtype=torch.bool)
    expected, logits = direct(images, schedule, 0.0, z_t, t, selected)
    gaps = logits.view(6, 2).diff(dim=1).abs()
    assert 0.5 < float(gaps.min()) < float(gaps.max()) < 20
    (eps,) = ExactTeacher(images, schedule, select_of(2)).predict_noise(z_t, t, [Condition({"selected": selected})])
    torch.testing.assert_close(eps.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("bandwidth", [0.0, 0.3])
def test_epsilon_is_minus_sigma_times_the_score(name: str, bandwidth: float) -> None:
    schedule = SCHEDULES[name]
    t = torch.tensor([0.02, 0.3, 0.7, 1.0] if schedule.continuous else [0, 200, 600, 999])
    images, z_t, prompts = fixture(schedule, t, shape=(2, 3))
    teacher = ExactTeacher(images, schedule, select_of(60), bandwidth, torch.float64)
    condition, z_t = teacher.encode_prompts(prompts), z_t.double().requires_grad_()
    (score,) = torch.autograd.grad(teacher.log_density(z_t, t, condition).sum(), z_t)
    (eps,) = teacher.predict_noise(z_t, t, [condition])
    assert not eps.requires_grad
    torch.testing.assert_close(eps, -column(schedule.sigma(t, torch.float64), score) * score, rtol=1e-8, atol=1e-8)


def test_log_density_is_normalised() -> None:
    teacher = ExactTeacher(torch.tensor([[-1.0], [0.2], [1.5]]), NoiseSchedule.flow(), select_of(3), 0.2)
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    for time in (0.0, 0.3, 1.0):
        for prompt in ("", "1"):
            condition = teacher.encode_prompts([prompt]).repeat_rows(len(grid))
            density = teacher.log_density(grid, torch.full((len(grid),), time), condition).exp()
            assert abs(float(torch.trapezoid(density, grid[:, 0])) - 1) < 1e-6


@given(u=st.floats(0.001, 0.999), seed=st.integers(0, 2**20), name=st.sampled_from(sorted(SCHEDULES)))
@settings(deadline=None)
def test_of_one_image_the_noise_is_known(u: float, seed: int, name: str) -> None:
    schedule = SCHEDULES[name]
    image, eps = normal(2, 1, 4, seed=seed)
    t = torch.tensor([u], dtype=torch.float64) if schedule.continuous else torch.tensor([int(1000 * u)])
    teacher = ExactTeacher(image, schedule, select_of(1), precision=torch.float64)
    z_t = schedule.add_noise(image, t, eps)
    torch.testing.assert_close(teacher.predict_noise(z_t, t, [teacher.encode_prompts([""])])[0], eps)


def test_both_ends_of_t() -> None:
    """No noise: eps_hat = 0 (with a bandwidth). Only noise: eps_hat = z_t, whatever the images."""
    schedule, t = NoiseSchedule("epsilon", 2, torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.tensor([0, 1])
    teacher = ExactTeacher(normal(5, 4).float(), schedule, select_of(5), 0.1)
    z_t = normal(2, 4, seed=3).float()
    (eps,) = teacher.predict_noise(z_t, t, [teacher.encode_prompts(["", "1"])])
    assert torch.equal(eps, torch.stack([torch.zeros(4), z_t[1]]))


@pytest.mark.parametrize(("schedule", "t"), [(NoiseSchedule.flow(), 0.0), (NoiseSchedule("flow", 1, torch.ones(1)), 0)])
def test_no_noise_and_no_bandwidth_are_refused(schedule: NoiseSchedule, t: float) -> None:
    teacher = ExactTeacher(torch.ones(2, 3), schedule, select_of(2))
    condition, time = teacher.encode_prompts([""]), torch.tensor([t])
    with pytest.raises(ValueError, match="at t = 0 there is no noise"):
        teacher.predict_noise(torch.ones(1, 3), time, [condition])
    with pytest.raises(ValueError, match="at t = 0 there is no noise"):
        teacher.log_density(torch.ones(1, 3), time, condition)


def test_neither_chunks_nor_company_change_the_answer() -> None:
    schedule, t = NoiseSchedule.linear(), torch.tensor([0, 3, 400, 700, 950, 999])
    images, z_t, prompts = fixture(schedule, t)
    answers = []
    for memory in (1, 20_000, 2**26):
        teacher = ExactTeacher(images, schedule, select_of(60), 0.02, memory=memory)
        conditions = [
            teacher.encode_prompts(prompts),
            teacher.encode_prompts([""] * 6),
            teacher.encode_prompts(["2"] * 6),
        ]
        together = teacher.predict_noise(z_t, t, conditions)
        alone = [teacher.predict_noise(z_t, t, [condition])[0] for condition in conditions]
        rows = [
            torch.cat([teacher.predict_noise(z_t[[n]], t[[n]], [c.rows(torch.tensor([n]))])[0] for n in range(6)])
            for c in conditions
        ]
        answers += [torch.stack(together), torch.stack(alone), torch.stack(rows)]
    assert not torch.allclose(answers[0][0], answers[0][1])
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-4, atol=2e-5)
    assert [part.shape for part in teacher.predict_noise(z_t[:0], t[:0], [c.rows(t[:0]) for c in conditions])] == [
        z_t[:0].shape
    ] * 3


def test_exact_teacher_under_guidance() -> None:
    """Renders with prompts of their own: each is drawn towards its own images."""
    schedule, images = NoiseSchedule.linear(), normal(6, 4).float()
    teacher: Teacher = ExactTeacher(images, schedule, select_of(6))
    t = torch.tensor([[30, 500], [900, 100]])
    z_t = normal(2, 2, 4, seed=5).float()
    guided = Guided.from_prompts(teacher, ["0", "2"], 20.0)(z_t, t)
    for r, prompt in enumerate(("0", "2")):
        for k in range(2):
            e_c, e_u = (
                direct(images, schedule, 0.0, z_t[r, [k]], t[r, [k]], teacher.encode_prompts([p]).tensors["selected"])[
                    0
                ]
                for p in (prompt, "")
            )
            torch.testing.assert_close(guided[r, [k]].double(), e_u + 20 * (e_c - e_u), rtol=1e-4, atol=1e-3)


def test_what_the_exact_teacher_refuses() -> None:
    schedule, images = NoiseSchedule.linear(), torch.zeros(4, 2)
    teacher = ExactTeacher(images, schedule, select_of(4))
    with pytest.raises(ValueError, match="'none' selects none of the teacher's 4 images"):
        teacher.encode_prompts(["", "none"])
    with pytest.raises(ValueError, match=r"bool tensor \[4\]"):
        ExactTeacher(images, schedule, lambda prompt: torch.ones(4)).encode_prompts([""])
    for bad in (torch.zeros(0, 2), torch.zeros(4), torch.zeros(4, 2, dtype=torch.long), torch.full((1, 2), torch.nan)):
        with pytest.raises(ValueError, match="finite floating-point"):
            ExactTeacher(bad, schedule, select_of(4))
    for h in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bandwidth"):
            ExactTeacher(images, schedule, select_of(4), h)
    condition, t = teacher.encode_prompts([""]), torch.tensor([5])
    with pytest.raises(ValueError, match=r"z_t \[N, 2\]"):
        teacher.predict_noise(torch.zeros(1, 3), t, [condition])
    with pytest.raises(ValueError, match=r"z_t \[N, 2\]"):
        teacher.predict_noise(torch.zeros(2, 2), t, [condition])
    with pytest.raises(ValueError, match="1 rows for 2 draws"):
        teacher.predict_noise(torch.zeros(2, 2), torch.tensor([5, 6]), [condition])
