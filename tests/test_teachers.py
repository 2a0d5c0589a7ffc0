"""Teachers: what a network predicts, and guidance over renders and re-noisings."""

from __future__ import annotations

from collections.abc import Sequence

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from carv.schedule import NoiseSchedule, Prediction
from carv.teachers.base import Condition
from carv.teachers.guidance import Guided
from carv.teachers.prediction import to_epsilon, to_sample

from teacher_cases import SCHEDULES, column, normal

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction", "flow")


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
