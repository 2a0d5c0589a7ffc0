"""The gradient of distribution matching: against autograd, plain loops, closed forms and nvidia-modelopt."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from carv.density import uniform_steps
from carv.gradient import Renders
from carv.proposals import proportional
from carv.rng import stream
from carv.schedule import NoiseSchedule
from carv.strata import iid
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Classes, Denoiser, OneStepGenerator
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.prediction import to_epsilon, to_sample

from distillations import CLASSES, Gaussians, estimator, pipeline, tiny_dit, x0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return DiffusersTeacher.from_pretrained(tiny_dit(tmp_path_factory.mktemp("tiny") / "dit"))


# The gradient of distribution matching


def test_the_gradient_is_autograd_of_the_naive_loss_one_draw_at_a_time(teacher):
    dmd, schedule, at = pipeline(teacher), teacher.schedule, stream(0, "step", 3)
    tilted = proportional(uniform_steps(20, 980), lambda t: 0.2 + t / 500)
    ours = estimator(proposal=tilted)
    found = ours.estimate(dmd, at)
    draws, noise = ours.draw(dmd, at)
    generator, loss = dmd.generator.denoiser.network, 0.0
    for r in range(2):
        state = dmd.upstream(Renders((at.child("render", r),), r, 2))
        eps = torch.randn(1, 4, 8, 8, generator=at.child("render", r, "input").generator())
        z = x0(generator, eps, torch.tensor([999]), state.label, schedule)
        for k in range(3):
            t = draws.t[r, k : k + 1]
            with torch.no_grad():
                z_t = schedule.alpha(t) * z + schedule.sigma(t) * noise[r, k]
                null = torch.tensor([CLASSES])
                conditional = x0(teacher.network, z_t, t, state.label, schedule)
                unconditional = x0(teacher.network, z_t, t, null, schedule)
                real = unconditional + 2.0 * (conditional - unconditional)
                fake = x0(dmd.fake.network, z_t, t, state.label, schedule)
                target = z - (fake - real) / (real - z).abs().mean()
            loss = loss + draws.weight[r, k] * 0.5 * functional.mse_loss(z, target) / 6
    naive = torch.autograd.grad(loss, dmd.parameters, allow_unused=True, materialize_grads=True)
    assert sum(float(part.square().sum()) for part in found.gradient) > 0
    for ours_part, naive_part in zip(found.gradient, naive, strict=True):
        torch.testing.assert_close(ours_part, naive_part, rtol=2e-3, atol=2e-6)


def test_with_one_draw_a_latent_a_step_is_bit_for_bit_the_plain_dmd2_step(teacher):
    dmd, schedule, at = pipeline(teacher, scale=1.0), teacher.schedule, stream(0, "step", 7)
    plain = estimator(renders=4, renoise=1, coupling=iid)
    found = plain.estimate(dmd, at)
    draws, noise = plain.draw(dmd, at)
    t = draws.t[:, 0]
    state = dmd.upstream(plain.renders_of(at))
    eps = torch.stack([torch.randn(4, 8, 8, generator=at.child("render", r, "input").generator()) for r in range(4)])
    z = dmd.generator(eps, state.condition)
    with torch.no_grad():
        z_t = schedule.add_noise(z, t, noise[:, 0])
        real = to_sample(teacher.predict_noise(z_t, t, [state.condition])[0], z_t, t, schedule, "epsilon")
        fake = to_sample(dmd.fake(z_t, t, state.condition), z_t, t, schedule)
        w = 1 / (real - z).abs().flatten(1).mean(-1)
        f = w[:, None, None, None] * (fake - real) / z[0].numel()
    naive = torch.autograd.grad((z * f).flatten(1).sum(1).mean(), dmd.parameters, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(found.gradient, naive, strict=True) if b is not None)


def test_at_first_without_guidance_the_scores_agree_and_nothing_moves(teacher):
    denoiser = Denoiser(teacher)
    dmd = DMD(teacher, OneStepGenerator(Denoiser(teacher)), denoiser, Classes.of(teacher))
    found = estimator(renoise=8).estimate(dmd, stream(0))
    assert float(found.f_mean.abs().max()) < 1e-5


def test_the_papers_weight_is_alpha_times_the_public_codes(teacher):
    public, paper = pipeline(teacher), pipeline(teacher, weight="paper")
    state = public.upstream(estimator().renders_of(stream(0)))
    t, noise = (
        torch.tensor([[30, 500, 970]] * 2),
        torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        alpha = teacher.schedule.alpha(t)[..., None, None, None]
        torch.testing.assert_close(paper.contribution(state, t, noise), alpha * public.contribution(state, t, noise))


def test_the_weight_is_one_over_the_mean_absolute_gap_and_the_step_is_divided_by_the_entries(teacher):
    dmd = pipeline(teacher)
    state = dmd.upstream(estimator().renders_of(stream(0)))
    t, noise = torch.tensor([[200, 700]] * 2), torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        real, fake = dmd.denoised(state, t, noise)
        f = dmd.contribution(state, t, noise)
    cs = 4 * 8 * 8  # Eq. 53: C S / |mu_real - z|_1
    w = cs / (real - state.z[:, None]).abs().flatten(2).sum(-1)
    torch.testing.assert_close(f, w[..., None, None, None] * (fake - real) / cs)


# Exact expectations need closed forms: Gaussians with c in the mean


class Score(nn.Module):
    def __init__(self, gaussians):
        super().__init__()
        self.gaussians = gaussians

    def forward(self, z_t, t, condition):
        return self.gaussians.x0(z_t, t)


class Affine(nn.Module):
    """z = a + b eps."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((3, 2, 2), 0.3)), nn.Parameter(torch.tensor(0.8))

    def forward(self, eps, condition):
        return self.a + self.b * eps


def affine_dmd():
    schedule = dataclasses.replace(NoiseSchedule.scaled_linear(), prediction="sample")
    real, fake = Gaussians(1.0, 0.7, schedule), Gaussians(0.3, 0.4, schedule)
    one = Condition({"label": torch.zeros(1, dtype=torch.long)})
    return DMD(real, Affine(), Score(fake), Classes(("0",), one, one))


def test_re_noising_is_unbiased_with_the_weight_of_each_draw_and_its_mutants_are_not():
    """One fixed z, all K = 4 draws of 6,000 estimates against 400,000 plain draws: mean over the 12 entries of f.

    False alarm 5e-7 a side at 5 standard errors. At these standard errors (about 0.2 % of the mean) a bias of 2 % is
    found with probability > 0.999; the two mutants are off by 7 %.
    """
    dmd, count, renoise = affine_dmd(), 6000, 4
    base = uniform_steps(20, 980)
    z = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(3)) * 0.8 + 0.3

    def state(rows):
        return Generated(z.expand(rows, -1, -1, -1), Condition({"label": torch.zeros(rows)}), torch.zeros(rows))

    rng = torch.Generator().manual_seed(4)
    t = base.icdf(torch.rand(1, 400_000, generator=rng, dtype=torch.float64))
    with torch.no_grad():
        plain = dmd.contribution(state(1), t, torch.randn(1, t.numel(), 3, 2, 2, generator=rng)).flatten(2).mean(-1)[0]
    truth, truth_error = plain.double().mean(), plain.double().std() / plain.numel() ** 0.5

    tilted = proportional(base, lambda t: 0.3 + t / 250)
    ours = estimator(count, renoise, proposal=tilted)
    found = ours.mean_contribution(dmd, state(count), stream(5)).f_mean.flatten(1).mean(-1).double()
    error = (found.std() ** 2 / count + truth_error**2) ** 0.5
    assert abs(found.mean() - truth) < 5 * error
    assert error < 0.008 * abs(truth)

    draws, noise = ours.draw(dmd, stream(5))
    with torch.no_grad():
        f = dmd.contribution(state(count), draws.t, noise).flatten(2).mean(-1).double()
        real, fake = dmd.denoised(state(count), draws.t, noise)
        gap = (real - z[:, None]).abs().flatten(2).mean(-1)
        pooled = (draws.weight[..., None] * (fake - real).flatten(2)).mean(1).mean(-1) / gap.mean(1) / 12
    assert abs(f.mean() - truth) > 8 * error, "p/q left out"
    assert abs(pooled.double().mean() - truth) > 8 * error, "the weight pooled over K"


def test_a_collapsed_weight_is_refused_with_its_timestep():
    schedule = NoiseSchedule.scaled_linear()
    dmd = affine_dmd()
    dmd.teacher = Gaussians(0.3, 1e-9, schedule)  # always answers 0.3
    z = torch.full((1, 3, 2, 2), 0.3)
    with pytest.raises(
        ValueError, match=r"collapsed: mean \|mu_real - z\| is .* at t = 400 \(latent 0, re-noising 0\)"
    ):
        dmd.contribution(
            Generated(z, Condition({"label": torch.zeros(1)}), torch.zeros(1)),
            torch.tensor([[400]]),
            torch.zeros(1, 1, 3, 2, 2),
        )


def test_a_teacher_that_is_not_finite_is_refused_with_its_timestep(teacher):
    dmd = pipeline(teacher)
    dmd.teacher = copy.copy(teacher)
    dmd.teacher.predict_noise = lambda z_t, t, conditions: [torch.full_like(z_t, torch.nan) for _ in conditions]
    with pytest.raises(ValueError, match=r"DMD.contribution is not finite at t = \d+"):
        estimator().estimate(dmd, stream(0))


# The independent code


def test_nvidia_modelopts_student_loss_has_the_same_gradient():
    """Its pipeline for flows, guided, on the same t and eps; its 1e-6 in the normaliser is within the tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastgen = pytest.importorskip("modelopt.torch.fastgen")
        from modelopt.torch.fastgen.methods.dmd import DMDPipeline

    class Network(nn.Module):
        """A flow of its own in each entry, with c added."""

        def __init__(self, seed):
            super().__init__()
            rng = torch.Generator().manual_seed(seed)
            self.a, self.b = (nn.Parameter(torch.randn(3, 4, 4, generator=rng)) for _ in range(2))

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            t = timestep[:, None, None, None]
            return torch.tanh(self.a * hidden_states + encoder_hidden_states) * (1 + t) + self.b

    student, real, fake = Network(0), Network(1), Network(2)
    cond = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    null = torch.zeros_like(cond)
    times, rng = torch.tensor([0.1, 0.35, 0.6, 0.9]), torch.Generator().manual_seed(6)
    eps, noise = (torch.randn(4, 3, 4, 4, generator=rng) for _ in range(2))

    class Theirs(DMDPipeline):
        def sample_timesteps(self, *args, **kwargs):
            return times

    config = fastgen.DMDConfig(gan_loss_weight_gen=0.0, guidance_scale=3.0, num_train_timesteps=None, ema=None)
    theirs = Theirs(student, real, fake, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda given: noise.clone())
        loss = theirs.compute_student_loss(torch.zeros_like(eps), eps, cond, negative_encoder_hidden_states=null)
    expected = torch.autograd.grad(loss["vsd"], list(student.parameters()))

    schedule = NoiseSchedule("flow", 1000)

    class Teacher:
        latent_shape = (3, 4, 4)

        def predict_noise(self, z_t, t, conditions):
            with torch.no_grad():
                return [to_epsilon(real(z_t, t, c.tensors["c"]), z_t, t, schedule) for c in conditions]

    Teacher.schedule = schedule

    class Fake(nn.Module):
        def forward(self, z_t, t, condition):
            return fake(z_t, t, condition.tensors["c"])

    one_step = nn.Module()
    one_step.student = student
    dmd = DMD(Teacher(), one_step, Fake(), Classes((), Condition({"c": cond}), Condition({"c": null[:1]})), 3.0)
    start = 0.999 * eps  # modelopt asks its student at sigma = 0.999, with an input of that standard deviation
    t = torch.full((4,), 0.999)
    z = to_sample(student(start, t, cond), start, t, schedule)
    state = Generated(z, Condition({"c": cond}), torch.arange(4))
    with torch.no_grad():
        f = dmd.contribution(state, times[:, None], noise[:, None])[:, 0]
    ours = dmd.pull_back(state, f / 4)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
