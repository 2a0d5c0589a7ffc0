import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from carv.adaptive import AdaptiveProposal
from carv.density import ShiftedUniform, uniform_steps
from carv.estimator import Clip, HierarchicalEstimator
from carv.gradient import Renders
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.tasks.toy import GaussianToy

from laws import COUPLINGS

BASE = uniform_steps(20, 980)
TOY = GaussianToy()
IW = proportional(BASE, TOY.weight)


def sampler(coupling="per-render", proposal=IW, antithetic=False):
    return TimestepSampler(BASE, proposal, coupling=COUPLINGS[coupling], antithetic=antithetic)


class Renderer:
    """A small nonlinear upstream network with two parameters, and a nonlinear, non-linear-in-t teacher; float64."""

    def __init__(self, schedule=None):
        rng = torch.Generator().manual_seed(0)
        self.first = torch.randn(5, 4, generator=rng, dtype=torch.float64).requires_grad_()
        self.second = torch.randn(12, 5, generator=rng, dtype=torch.float64).requires_grad_()
        self.schedule = schedule or NoiseSchedule.scaled_linear()
        self.latent_shape, self.device, self.dtype = (3, 2, 2), torch.device("cpu"), torch.float64
        self.calls = []

    def upstream(self, renders: Renders):
        x = torch.stack([torch.randn(4, generator=s.child("x").generator(), dtype=self.dtype) for s in renders])
        return (torch.tanh(x @ self.first.T) @ self.second.T).view(-1, 3, 2, 2)

    def contribution(self, state, t, noise):
        self.calls.append(t.numel())
        z_t = self.schedule.add_noise(state[:, None], t, noise)
        scale = self.schedule.sigma(t, self.dtype)[..., None, None, None]
        return scale * (torch.sin(3 * z_t) - noise)

    def pull_back(self, state, f, retain=False):
        return torch.autograd.grad(state, [self.first, self.second], f, retain_graph=retain)


def naive(task, estimator, at):
    """The surrogate loss of Eq. 44-45, one draw at a time, differentiated by autograd."""
    found = estimator.estimate(task, at)
    rng = at.child("timesteps").generator()
    draws = estimator.sampler.sample(estimator.renders, estimator.renoise, rng)
    loss = torch.zeros((), dtype=task.dtype)
    for r in range(estimator.renders):
        render = at.child("render", r)
        z = task.upstream(Renders((render,), r, estimator.renders))
        for k in range(estimator.renoise):
            if estimator.sampler.antithetic:
                half = torch.randn(
                    (4, *task.latent_shape), generator=render.child("noise", k // 8).generator(), dtype=task.dtype
                )
                eps = half[(k % 8) // 2] * (1 - 2 * (k % 2))
            else:
                block = torch.randn(
                    (8, *task.latent_shape), generator=render.child("noise", k // 8).generator(), dtype=task.dtype
                )
                eps = block[k % 8]
            f = task.contribution(z.detach(), draws.t[r : r + 1, k : k + 1], eps[None, None])[0]
            target = (z - draws.weight[r, k].double() * f).detach()
            loss = loss + 0.5 * (z - target).square().sum() / (estimator.renders * estimator.renoise)
    parameters = [task.first, task.second] if isinstance(task, Renderer) else [task.theta]
    return found, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(("renders", "renoise"), [(1, 2), (3, 4), (2, 18)])
def test_estimator_equals_autograd_through_the_naive_loop_for_the_same_draws(coupling, antithetic, renders, renoise):
    estimator = HierarchicalEstimator(sampler(coupling, antithetic=antithetic), renders, renoise)
    found, expected = naive(Renderer(), estimator, stream(1, "naive"))
    for a, b in zip(found.gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_flow_matching_estimator_equals_the_naive_loop():
    base = ShiftedUniform(0.02, 0.98)
    law = TimestepSampler(base, proportional(base, lambda t: t, cells=50))
    found, expected = naive(Renderer(NoiseSchedule.flow()), HierarchicalEstimator(law, 2, 5), stream(2))
    for a, b in zip(found.gradient, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 40), st.integers(1, 4), st.sampled_from([1, 3, 7, 16]), st.booleans())
def test_micro_batching_and_render_batching_change_nothing(micro_batch, render_batch, half, antithetic):
    law = sampler(antithetic=antithetic)
    whole = HierarchicalEstimator(law, 3, 2 * half).estimate(Renderer(), stream(3))
    parts = HierarchicalEstimator(law, 3, 2 * half, micro_batch, render_batch).estimate(Renderer(), stream(3))
    for a, b in zip(whole.gradient, parts.gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(whole.f_norm_sq, parts.f_norm_sq)
    assert torch.equal(whole.draws.t, parts.draws.t)


def test_micro_batches_bound_the_teachers_batch():
    task = Renderer()
    HierarchicalEstimator(sampler(), 2, 50, micro_batch=8).estimate(task, stream(0))
    assert max(task.calls) <= 8
    assert sum(task.calls) == 100


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_splitting_over_ranks_changes_nothing(coupling):
    law = sampler(coupling)
    whole = HierarchicalEstimator(law, 6, 4).estimate(Renderer(), stream(4))
    for world in (2, 3):
        each = HierarchicalEstimator(law, 6 // world, 4)
        parts = [each.estimate(Renderer(), stream(4), rank=rank, world=world) for rank in range(world)]
        for i, expected in enumerate(whole.gradient):
            mean = torch.stack([part.gradient[i] for part in parts]).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-13)


def test_the_first_renoisings_do_not_depend_on_how_many_follow():
    few, many = (HierarchicalEstimator(sampler("iid"), 1, k) for k in (3, 16))
    seen = []

    class Spy(Renderer):
        def contribution(self, state, t, noise):
            seen.append(noise.clone())
            return super().contribution(state, t, noise)

    few.estimate(Spy(), stream(5))
    many.estimate(Spy(), stream(5))
    assert torch.equal(seen[0], seen[1][:, :3])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_mean_of_estimates_is_the_closed_form_gradient(coupling, antithetic):
    """500 estimates of (2, 4) on the Gaussian toy: a bias of about 4 % of any of 8 entries is caught; false alarm
    below 1e-4 (|z| < 5, 80 entries in all)."""
    estimator = HierarchicalEstimator(sampler(coupling, antithetic=antithetic), 2, 4)
    g = torch.stack([estimator.estimate(TOY, stream(6, i)).gradient[0] for i in range(500)])
    z = (g.mean(0) - TOY.exact(BASE).mean) / (g.std(0) / math.sqrt(len(g)))
    assert z.abs().max() < 5


def test_variance_for_iid_draws_is_what_the_closed_form_says():
    """Var(R, K) = sigma_b^2 / R + sigma_w^2 / (R K); 1,000 estimates, standard error of the variance about 4 %."""
    exact = TOY.exact(BASE)
    p = BASE.pmf
    mean_norm = exact.mean.square().sum()
    across = (p @ exact.within @ p) - mean_norm
    for proposal, q in ((None, p), (IW, IW.pmf)):
        inside = (p**2 / q * exact.m2).sum() - (p @ exact.within @ p)
        estimator = HierarchicalEstimator(sampler("iid", proposal), 2, 3)
        g = torch.stack([estimator.estimate(TOY, stream(7, i)).gradient[0] for i in range(1_000)])
        measured = (g - exact.mean).square().sum(1)
        expected = across / 2 + inside / 6
        assert abs(measured.mean() - expected) < 5 * measured.std() / math.sqrt(len(g))
        assert measured.std() / math.sqrt(len(g)) < 0.08 * expected


def test_adaptive_estimates_stay_unbiased_while_they_learn():
    """Given the past each estimate is unbiased; the mean over 600 learning steps, |z| < 5."""
    proposal = AdaptiveProposal(BASE, warmup=16)
    estimator = HierarchicalEstimator(TimestepSampler(BASE, proposal), 1, 4)
    g = torch.stack([estimator.estimate(TOY, stream(8, i)).gradient[0] for i in range(600)])
    z = (g.mean(0) - TOY.exact(BASE).mean) / (g.std(0) / math.sqrt(len(g)))
    assert z.abs().max() < 5
    assert proposal.law is not BASE


def test_adaptive_on_several_ranks_without_torch_distributed_is_refused():
    estimator = HierarchicalEstimator(TimestepSampler(BASE, AdaptiveProposal(BASE)), 1, 2)
    with pytest.raises(ValueError, match=r"needs torch\.distributed"):
        estimator.estimate(TOY, stream(0), rank=0, world=2)


class Broken(GaussianToy):
    """NaN where t > 900."""

    def contribution(self, state, t, noise):
        f = super().contribution(state, t, noise)
        return torch.where((t > 900)[..., None], float("nan"), f)


def test_a_teacher_that_is_not_finite_gets_one_sentence_with_the_draw():
    estimator = HierarchicalEstimator(sampler(), 2, 8, micro_batch=4)
    with pytest.raises(ValueError, match=r"Broken.contribution is not finite at t = 9\d\d \(render 0, re-noising 7; "):
        estimator.estimate(Broken(), stream(0))


def test_draws_that_are_not_finite_count_as_zero_only_when_asked_and_it_is_said():
    estimator = HierarchicalEstimator(sampler(), 2, 8, on_not_finite="zero")
    estimate = estimator.estimate(Broken(), stream(0))
    assert bool(torch.isfinite(estimate.gradient[0]).all())
    assert estimate.not_finite == (estimate.draws.t > 900).sum() > 0
    assert "biases" in estimate.policy
    ignored = HierarchicalEstimator(sampler(), 2, 8, on_not_finite="ignore").estimate(Broken(), stream(0))
    assert bool(torch.isnan(ignored.gradient[0]).any())


@pytest.mark.parametrize("by", ["norm", "value"])
@pytest.mark.parametrize("stage", ["draw", "mean"])
def test_a_clip_bounds_what_it_says_and_the_report_says_it_biases(by, stage):
    limit = 0.05
    plain = HierarchicalEstimator(sampler(proposal=None), 2, 8).estimate(TOY, stream(9))
    clipped = HierarchicalEstimator(sampler(proposal=None), 2, 8, clip=Clip(limit, by, stage)).estimate(TOY, stream(9))
    size = clipped.f_mean.norm(dim=1) if by == "norm" else clipped.f_mean.abs().amax(1)
    assert bool((size <= limit * (1 + 1e-12)).all())
    assert clipped.clipped > 0
    assert plain.clipped == 0
    assert plain.policy == ""
    assert "biases" in clipped.policy
    assert ("draw" in clipped.policy) == (stage == "draw")
    loose = HierarchicalEstimator(sampler(proposal=None), 2, 8, clip=Clip(1e9, by, stage)).estimate(TOY, stream(9))
    torch.testing.assert_close(loose.gradient, plain.gradient)


def test_clipping_each_draw_targets_the_same_thing_for_every_proposal():
    """It is applied before p/q: the mean of 700 estimates agrees between proposals, |z| < 5."""
    means = []
    for proposal in (None, IW):
        estimator = HierarchicalEstimator(sampler(proposal=proposal), 1, 4, clip=Clip(0.2))
        g = torch.stack([estimator.estimate(TOY, stream(10, i)).gradient[0] for i in range(700)])
        means.append((g.mean(0), g.var(0) / len(g)))
    z = (means[0][0] - means[1][0]) / (means[0][1] + means[1][1]).sqrt()
    assert z.abs().max() < 5


class WrongShape(GaussianToy):
    def contribution(self, state, t, noise):
        return super().contribution(state, t, noise).mean(1)


class Scalar(GaussianToy):
    def __init__(self):
        super().__init__()
        self.latent_shape = ()


BAD = [
    (lambda: HierarchicalEstimator(sampler(), 0, 4), "renders must be at least 1, got 0"),
    (lambda: HierarchicalEstimator(sampler(), 1, 0), "renoise must be at least 1, got 0"),
    (lambda: HierarchicalEstimator(sampler(), 1, 4, micro_batch=0), "micro_batch must be at least 1"),
    (lambda: HierarchicalEstimator(sampler(antithetic=True), 1, 3), "even number"),
    (lambda: Clip(-1.0), "limit must be positive"),
    (lambda: Clip(float("nan")), "limit must be positive"),
    (
        lambda: HierarchicalEstimator(sampler(), 2, 4).estimate(WrongShape(), stream(0)),
        r"shape \[2, 8\], expected \[2, 4, 8\]",
    ),
    (lambda: HierarchicalEstimator(sampler(), 2, 4).estimate(Scalar(), stream(0)), "at least one|needs a dimension"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input_gets_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_assign_to_fills_grad_for_an_optimiser():
    toy = GaussianToy()
    HierarchicalEstimator(sampler(), 1, 4).estimate(toy, stream(0)).assign_to([toy.theta])
    assert toy.theta.grad is not None
    assert toy.theta.grad.shape == toy.theta.shape
