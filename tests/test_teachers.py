"""Teachers: what a network predicts, guidance over renders and re-noisings, the exact denoiser of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carv.schedule import NoiseSchedule, Prediction
from carv.teachers.base import Condition, Teacher
from carv.teachers.exact import ExactTeacher
from carv.teachers.guidance import Guided
from carv.teachers.prediction import to_epsilon, to_sample

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction", "flow")
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "flow": NoiseSchedule.flow(),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(values.shape + (1,) * (like.ndim - values.ndim))


# Predictions


def outputs_of(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> dict[Prediction, Tensor]:
    """What a perfect network of each kind outputs."""
    return {"epsilon": eps, "sample": z, "v_prediction": alpha * eps - sigma * z, "flow": eps - z}


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    u=st.floats(0.01, 0.99),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None)
def test_all_predictions_mean_the_same_epsilon(name: str, u: float, batch: tuple[int, ...], seed: int) -> None:
    schedule = SCHEDULES[name]
    z, eps = normal(2, *batch, 3, 4, seed=seed)
    t = torch.full(batch, u, dtype=torch.float64) if schedule.continuous else torch.full(batch, int(1000 * u))
    alpha, sigma = (column(c, z) for c in (schedule.alpha(t, torch.float64), schedule.sigma(t, torch.float64)))
    z_t = schedule.add_noise(z, t, eps)
    for prediction, output in outputs_of(z, eps, alpha, sigma).items():
        torch.testing.assert_close(to_epsilon(output, z_t, t, schedule, prediction), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(to_sample(output, z_t, t, schedule, prediction), z, rtol=1e-9, atol=1e-6)


def test_predictions_are_those_of_diffusers() -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    z, eps = normal(2, 4, 3, 8, 8).float()
    t = torch.tensor([0, 20, 500, 999])
    z_t, v = scheduler.add_noise(z, eps, t), scheduler.get_velocity(z, eps, t)
    torch.testing.assert_close(to_epsilon(v, z_t, t, schedule), eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_sample(v, z_t, t, schedule), z, rtol=1e-4, atol=1e-4)


def test_v_and_flow_are_regular_at_both_ends() -> None:
    z, eps = normal(2, 2, 5)
    flow, t = NoiseSchedule.flow(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    z_t = flow.add_noise(z, t, eps)
    torch.testing.assert_close(to_epsilon(eps - z, z_t, t, flow), eps)
    torch.testing.assert_close(to_sample(eps - z, z_t, t, flow), z)
    table, t = NoiseSchedule("v_prediction", 2, torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.tensor([0, 1])
    z_t, v = table.add_noise(z, t, eps), torch.stack([eps[0], -z[1]])
    torch.testing.assert_close(to_epsilon(v, z_t, t, table), eps)
    torch.testing.assert_close(to_sample(v, z_t, t, table), z)


def test_divisions_by_zero_are_refused() -> None:
    schedule, t, x = NoiseSchedule("sample", 2, torch.tensor([1.0, 0.0])), torch.tensor([0, 1]), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"sigma\(t\) = 0"):
        to_epsilon(x, x, t, schedule)
    with pytest.raises(ValueError, match=r"alpha\(t\) = 0"):
        to_sample(x, x, t, schedule, "epsilon")
    assert bool(to_epsilon(x, x, t, schedule, "v_prediction").isfinite().all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_precision_ends_at_the_edge(prediction: Prediction) -> None:
    schedule, t, z_t = NoiseSchedule.linear(), torch.tensor([700, 20]), normal(2, 6).float()
    output = normal(2, 6, seed=1).to(torch.bfloat16)
    for convert in (to_epsilon, to_sample):
        result = convert(output, z_t, t, schedule, prediction)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, convert(output.float(), z_t, t, schedule, prediction))
    assert to_epsilon(output, z_t.double(), t, schedule, prediction).dtype == torch.float64


def test_outputs_of_another_shape_are_refused() -> None:
    z_t, t = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="first half of the channels"):
        to_epsilon(torch.zeros(2, 8, 8, 8), z_t, t, NoiseSchedule.linear())
    with pytest.raises(ValueError, match="leading dimensions"):
        to_epsilon(z_t, z_t, torch.tensor([1, 2, 3]), NoiseSchedule.linear())


# Guidance


class Fingerprint:
    """A teacher whose eps_hat tells which z_t, t and condition row each of its rows was made of."""

    def __init__(self) -> None:
        self.schedule = NoiseSchedule.linear()
        self.latent_shape: tuple[int, ...] = (3,)
        self.asked: list[int] = []

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return Condition({"id": torch.tensor([float(len(prompt)) for prompt in prompts], dtype=torch.float64)})

    def predict_noise(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        self.asked.append(len(conditions))
        assert all(len(condition) == len(z_t) == len(t) for condition in conditions)
        return [self.value(z_t, t, condition.tensors["id"]) for condition in conditions]

    @staticmethod
    def value(z_t: Tensor, t: Tensor, row: Tensor) -> Tensor:
        """One row `[N, 3]`: t, the condition and z_t each in a place of their own, and products of them."""
        return torch.stack([t + row**2, row * z_t[..., 0], z_t[..., 1] * t + z_t[..., 2]], -1)


# Mutants of `Guided` and of `Condition.repeat_rows` that were tried by hand; each fails the next test:
# `repeat` in place of `repeat_interleave`; conditional and unconditional swapped (in the formula, and in
# the order asked for); s - 1 or s + 1 in place of s; `e_c + s (e_c - e_u)`; t flattened column-major; the
# result reshaped to [K, R] and transposed; the condition's rows used for the negative; row 0 for all renders.
@given(
    renders=st.integers(1, 4),
    draws=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1.0]) | st.floats(-2, 100),
    share_condition=st.booleans(),
    share_negative=st.booleans(),
)
@settings(deadline=None)
def test_guidance_keeps_renders_draws_and_conditions_apart(
    renders: int, draws: int, scale: float, share_condition: bool, share_negative: bool
) -> None:
    teacher = Fingerprint()
    condition = 1 + torch.arange(1 if share_condition else renders, dtype=torch.float64)
    negative = -11 - 3 * torch.arange(1 if share_negative else renders, dtype=torch.float64)
    z_t = normal(renders, draws, 3)
    t = torch.randperm(1000, generator=torch.Generator().manual_seed(1))[: renders * draws].view(renders, draws)
    guided = Guided(teacher, scale, Condition({"id": condition}), Condition({"id": negative}))(z_t, t)
    assert guided.shape == z_t.shape
    assert teacher.asked == [1 if scale in (0, 1) else 2]
    for r in range(renders):
        for k in range(draws):
            e_c = teacher.value(z_t[r, k], t[r, k], condition[0 if share_condition else r])
            e_u = teacher.value(z_t[r, k], t[r, k], negative[0 if share_negative else r])
            torch.testing.assert_close(guided[r, k], e_u + scale * (e_c - e_u), rtol=1e-9, atol=1e-6)
            omega = scale - 1  # the paper's form, Eq. 19
            torch.testing.assert_close(guided[r, k], (1 + omega) * e_c - omega * e_u, rtol=1e-9, atol=1e-6)


def test_guidance_from_prompts() -> None:
    teacher, z_t, t = Fingerprint(), normal(2, 3, 3), torch.arange(6).view(2, 3)
    with_negative = Guided.from_prompts(teacher, ["a", "abc"], 7.5, "ab")
    assert with_negative.negative is not None
    assert with_negative.negative.tensors["id"].tolist() == [2]
    by_hand = Guided(teacher, 7.5, teacher.encode_prompts(["a", "abc"]), teacher.encode_prompts(["ab", "ab"]))
    assert torch.equal(with_negative(z_t, t), by_hand(z_t, t))
    assert not torch.equal(with_negative(z_t, t), Guided.from_prompts(teacher, ["a", "abc"], 7.5)(z_t, t))


def test_no_guidance_needs_no_negative() -> None:
    teacher, z_t, t = Fingerprint(), normal(2, 3, 3), torch.arange(6).view(2, 3)
    condition = teacher.encode_prompts(["a"])
    assert Guided(teacher, 1.0, condition)(z_t, t).shape == z_t.shape
    with pytest.raises(ValueError, match="unconditional or negative"):
        Guided(teacher, 7.5, condition)
    with pytest.raises(ValueError, match="finite"):
        Guided(teacher, float("nan"), condition, condition)


def test_guidance_has_no_gradient() -> None:
    teacher = Fingerprint()
    guided = Guided.from_prompts(teacher, ["a"], 7.5)
    assert not guided(normal(2, 3, 3).requires_grad_(), torch.arange(6).view(2, 3)).requires_grad


@pytest.mark.parametrize(("rows", "against", "role"), [(3, 1, "condition"), (2, 3, "negative"), (6, 2, "condition")])
def test_a_wrong_number_of_rows_is_refused(rows: int, against: int, role: str) -> None:
    teacher = Fingerprint()
    guided = Guided(teacher, 2.0, teacher.encode_prompts(["a"] * rows), teacher.encode_prompts([""] * against))
    with pytest.raises(ValueError, match=rf"{role} has \d rows for 2 renders"):
        guided(normal(2, 3, 3), torch.arange(6).view(2, 3))


@pytest.mark.parametrize(("z_shape", "t_shape"), [((2, 3, 4), (2, 3)), ((2, 3, 3), (3, 2)), ((2, 3), (2,))])
def test_batches_that_do_not_fit_are_refused(z_shape: tuple[int, ...], t_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z_t \[R, K, 3\] and t \[R, K\]"):
        Guided.from_prompts(Fingerprint(), ["a"], 2.0)(torch.zeros(z_shape), torch.zeros(t_shape, dtype=torch.long))


# The exact denoiser


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
