"""Stein control variates: the hierarchical estimator is unbiased around them, and noise is less where it should be.

Latents are 2x2 pictures of a field with one parameter an entry, and the teacher is the exact one of a few images, so
that an estimate takes a millisecond.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carv import weights
from carv.density import ShiftedUniform, uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Renders
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.tasks.sds.stein import Stein, _with_gradient
from carv.tasks.sds.task import SDS, RenderState
from carv.variance.measure import measure
from carv.variance.stopping import fixed_count
from carv.variance.values import Value, ratio
from carv.world.cameras import WORLD_RANGE

from tiny_sds import DESIGNS, SCHEDULE, WEIGHT, Picture, compare, design, distillation, few_images, with_a_past


def upper_against_lower(z_t: Tensor, t: Tensor) -> Tensor:
    """A baseline: how bright the upper row is against the lower one, and not linear."""
    return torch.tanh((z_t[:, :, 0] - z_t[:, :, 1]).sum((1, 2))) * (1 + t / 1000)


def one_render() -> Renders:
    return Renders((stream(0, "render"),), 0, 1)


def one_call(task: Any, draws: int = 6) -> tuple[RenderState, Tensor, Tensor]:
    """A state, t and noise, as the estimator hands them to a task."""
    rng = stream(0, "call").generator()
    t = torch.randint(20, 980, (1, draws), generator=rng)
    return task.upstream(one_render()), t, torch.randn(1, draws, *task.latent_shape, generator=rng)


def call(task: Any) -> Tensor:
    return task.contribution(*one_call(task))


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_with_control_variates_has_the_mean_of_naive_iid_sds(name):
    """A bias of 10 % of |mu| is excluded with 95 % confidence; 1 in 1000 such tests alarms falsely."""
    task = with_a_past(Stein(distillation(), [upper_against_lower], bins=5))
    report = compare(DESIGNS[name], task, task.task, name)
    assert report.verdict == "pass", report.describe()


class _Mutant(Stein):
    """What is subtracted has no longer mean zero, except where the kind is "none"."""

    def __init__(self, kind: str) -> None:
        super().__init__(distillation(), [upper_against_lower], bins=5)
        self.kind = kind
        self._b = torch.tensor([-0.3, -0.3], dtype=torch.float64).expand(5, 2)

    def _members(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        seen = noise.roll(1, 1) if self.kind == "h at another draw's noise" else noise
        h, gradient = _with_gradient(
            upper_against_lower, SCHEDULE.add_noise(z[:, None], t, seen).flatten(0, 1), t.flatten()
        )
        sigma = 0.0 if self.kind == "no gradient term" else SCHEDULE.sigma(t)[..., None, None, None]
        w = WEIGHT(t).float()[..., None, None, None]
        return w * torch.stack([noise, h.view(w.shape) * noise - sigma * gradient.view(noise.shape)])

    def contribution(self, state: RenderState, t: Tensor, noise: Tensor) -> Tensor:
        if self.kind != "b from the draw itself":
            return super().contribution(state, t, noise)
        f = self.task.contribution(state, t, noise)
        own = (f * noise).sum((2, 3, 4), keepdim=True) / noise.square().sum((2, 3, 4), keepdim=True)
        return f - own * noise


MUTANTS = {
    "none": "pass",
    "no gradient term": "fail",
    "h at another draw's noise": "fail",
    "b from the draw itself": "fail",
}


@pytest.mark.parametrize("kind", MUTANTS)
def test_a_control_variate_without_mean_zero_is_seen_as_a_bias(kind):
    """With b = -0.3 throughout. The bias of a b from the draw itself is 1/d: 8.3 % for 12 entries."""
    mutant = _Mutant(kind)
    report = compare(design(), mutant, mutant.task, "mutants", tolerance=0.1 if kind == "none" else 0.05)
    assert report.verdict == MUTANTS[kind], report.describe()


def test_the_members_have_mean_zero_at_every_single_t_and_render():
    """Each entry of s_j over 10^5 noises at fixed (x, t): within 4.8 standard errors.

    72 of them: 1 in 8000 such tests fails by chance. A mean of 1.6 % of the standard deviation is seen.
    """
    task, count = Stein(distillation(), [upper_against_lower]), 100_000
    z = task.upstream(one_render()).z.detach()
    noise = torch.randn(1, count, 3, 2, 2, generator=stream(0, "noise").generator())
    for at in (20, 300, 700):
        members = task._members(z, torch.full((1, count), at), noise)[:, 0].double()
        scores = members.mean(1) / members.std(1) * count**0.5
        assert float(scores.abs().max()) < 4.8


# What they are for


def test_they_take_out_what_noise_there_is_with_a_gaussian_teacher():
    """There f is linear in eps, with one factor for all entries: of the whole variance at K = 1 camera and t are left.

    Seen: a factor of 16.8(7).
    """
    teacher = few_images(torch.zeros(1, 3, 2, 2), bandwidth=0.7)
    task = SDS(teacher, Picture(), "red", weights.uniform(SCHEDULE), 1.0, WORLD_RANGE, size=2)
    estimator = HierarchicalEstimator(TimestepSampler(uniform_steps(100, 199)), 1, 1)
    controlled = with_a_past(Stein(task), estimator)
    without, within = (
        measure(source, estimator, stream(3, "measure"), stop=fixed_count(400)).variance
        for source in (task, controlled)
    )
    factor = ratio(without, within)
    assert factor.value - 3 * factor.error > 5, factor.times()


def test_a_baseline_linear_in_z_t_takes_out_noise_that_antithetic_pairs_leave():
    """Two images and a z_t between them: f bends along their difference. At fixed (x, t). Seen: a factor of 1.87(4)."""
    teacher = few_images(torch.stack([torch.full((3, 1, 1), 0.2), torch.full((3, 1, 1), -0.2)]), bandwidth=0.05)
    task = SDS(teacher, Picture(1), "a", weights.uniform(SCHEDULE), 1.0, WORLD_RANGE, size=1)
    with torch.no_grad():
        task.parameters[0].fill_(0.7)
    controlled, pairs = Stein(task, [lambda z_t, t: z_t.flatten(1).mean(1)], bins=1), 10_000
    state, t = task.upstream(one_render()), torch.full((1, 2 * pairs), 100)

    def variance(source: SDS | Stein, name: str) -> Value:
        noise = torch.randn(1, pairs, 1, 3, 1, 1, generator=stream(0, name).generator())
        f = source.contribution(state, t, torch.cat([noise, -noise], 2).flatten(1, 2))
        square = (lambda mean: (mean - mean.mean(0)).square().sum(1))(f.view(pairs, 2, 3).mean(1))
        return Value(float(square.mean()), float(square.std()) / pairs**0.5)

    with torch.no_grad():
        variance(controlled, "past")
        controlled.learn()
        factor = ratio(variance(task, "now"), variance(controlled, "now"))
    assert factor.value - 3 * factor.error > 1.4, factor.times()


def test_sds_is_the_member_h_1_with_the_coefficient_1():
    """Put back with b = -1, what is left is w eps_hat; the two differ by a control variate."""
    task = Stein(distillation())
    task._b = torch.full((20, 1), -1.0, dtype=torch.float64)
    state, t, noise = one_call(task)
    eps_hat = state.guided(SCHEDULE.add_noise(state.z.detach()[:, None], t, noise), t)
    expected = WEIGHT(t).float()[..., None, None, None] * eps_hat
    torch.testing.assert_close(task.contribution(state, t, noise), expected)


def test_with_antithetic_noise_h_1_changes_nothing():
    task = with_a_past(Stein(distillation()))
    estimates = [design(2, 4, antithetic=True).estimate(source, stream(1)) for source in (task, task.task)]
    torch.testing.assert_close(estimates[0].f_mean, estimates[1].f_mean)


# The coefficients


def test_coefficients_solve_the_least_squares_problem_of_past_draws():
    task = Stein(distillation(), [upper_against_lower], bins=1)
    state, t, noise = one_call(task, draws=4000)
    f = task.contribution(state, t, noise)
    task.learn()
    members = task._members(state.z.detach(), t, noise)
    expected = torch.linalg.lstsq(members.flatten(1).T.double(), f.detach().flatten()[:, None].double()).solution[:, 0]
    torch.testing.assert_close(task.coefficients[0], expected, rtol=0, atol=0.01)


def test_a_step_does_not_use_what_it_draws_itself():
    task = Stein(distillation(), bins=4)
    state, t, noise = one_call(task)
    with torch.no_grad():
        plain = task.task.contribution(state, t, noise)
        assert torch.equal(task.contribution(state, t, noise), plain)
        assert torch.equal(task.contribution(state, t, noise), plain)
        task.learn()
        assert not torch.equal(task.contribution(state, t, noise), plain)


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_what_is_subtracted_is_bounded_in_units_of_the_noise_whatever_the_size_of_h(size):
    task = Stein(distillation(), [lambda z_t, t: size * upper_against_lower(z_t, t)], bins=1, bound=1e-4)
    state, t, noise = one_call(task, draws=500)
    task.contribution(state, t, noise)
    task.learn()
    parts = task.coefficients[0, :, None] * task._members(state.z.detach(), t, noise).flatten(1)
    eps = (WEIGHT(t)[..., None, None, None] * noise).square().mean().sqrt()
    # Far below what would be best, so that both are at the bound.
    torch.testing.assert_close(parts.square().mean(1).sqrt(), (1e-4 * eps).expand(2), rtol=1e-4, atol=0)


def test_a_bin_without_draws_and_a_draw_that_is_not_finite_leave_no_trace():
    task = Stein(distillation(), bins=4)
    state, t, noise = one_call(task)
    task.contribution(state, t.clamp(max=200), noise)
    task.learn()
    before = task.coefficients
    assert bool((before[0] != 0).all())
    assert bool((before[1:] == 0).all())
    noise[0, 0] = float("nan")
    task.contribution(state, t, noise)
    task.learn()
    assert bool(task.coefficients.isfinite().all())


@pytest.mark.parametrize("batches", [{"micro_batch": 3}, {"render_batch": 1}])
def test_what_is_learned_does_not_depend_on_batches(batches):
    tasks = [Stein(distillation(), [upper_against_lower]) for _ in range(2)]
    sampler = design().sampler
    for task, options in zip(tasks, ({}, batches), strict=True):
        with_a_past(task, HierarchicalEstimator(sampler, 3, 4, **options), steps=3)
    torch.testing.assert_close(tasks[0].coefficients, tasks[1].coefficients, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_coefficients_of_one_that_never_stopped():
    whole = with_a_past(Stein(distillation()))
    resumed = Stein(distillation())
    resumed.load_state_dict(whole.state_dict())
    for task in (whole, resumed):
        design().estimate(task, stream(1))
        task.learn()
    assert torch.equal(whole.coefficients, resumed.coefficients)
    with pytest.raises(ValueError, match=r"3 bins and 0 baselines have a state \[3, 3\]"):
        Stein(distillation(), bins=3).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        resumed.load_state_dict({"past": whole.state_dict()["past"] * float("nan")})


def test_flows_have_their_t_between_0_and_1_in_bins_too():
    schedule = NoiseSchedule.flow()
    task = Stein(distillation(schedule=schedule), bins=4)
    estimator = HierarchicalEstimator(TimestepSampler(ShiftedUniform(0.02, 0.98)), 2, 8)
    estimator.estimate(task, stream(0))
    task.learn()
    assert bool((task.coefficients != 0).all())


def blind(z_t: Tensor, t: Tensor) -> Tensor:
    return z_t.detach().flatten(1).mean(1)


BAD = {
    "at least 1 bin": lambda: Stein(distillation(), bins=0),
    "must be a positive number, got 0": lambda: Stein(distillation(), bound=0.0),
    "no gradient flows": lambda: call(Stein(distillation(), [blind])),
    r"one number a draw, \[6\], this one gave \[6, 12\]": lambda: call(
        Stein(distillation(), [lambda z_t, t: z_t.flatten(1)])
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_gets_one_clear_sentence(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
