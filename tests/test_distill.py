"""Distillation's terms: against autograd, plain loops, closed forms and nvidia-modelopt.

The networks are tiny and random; the statistical tests use closed-form denoisers on 12 numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional

from carv.adaptive import AdaptiveProposal
from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Renders
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import iid, per_render
from carv.tasks.distill.config import DistillConfig, TermEstimator, tabulated, timestep
from carv.tasks.distill.data import RealLatents
from carv.tasks.distill.discriminator import Adversarial, Discriminator
from carv.tasks.distill.fake_score import denoising_losses
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Classes, Denoiser, OneStepGenerator
from carv.tasks.distill.train import Trainer
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.prediction import to_epsilon, to_sample

CLASSES = 4


def tiny_dit(folder: Path, prediction: str = "v_prediction") -> Path:
    """A DiT of 4 classes with random weights, nowhere zero: a zero-initialised block would hide its conditions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=CLASSES,
        )
        for parameter in network.parameters():
            if bool((parameter == 0).all()):
                nn.init.normal_(parameter, std=0.2)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, prediction_type=prediction)
    diffusers.DiTPipeline(network, vae, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_dit(tmp_path_factory.mktemp("tiny") / "dit")


@pytest.fixture(scope="module")
def teacher(folder):
    return DiffusersTeacher.from_pretrained(folder)


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """The module with its weights moved, so that student, fake score and teacher differ."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=rng)
    return module


def pipeline(teacher, scale=2.0, weight="dmd"):
    generator = OneStepGenerator(shaken(Denoiser(teacher), 1))
    fake = shaken(Denoiser(teacher), 2)
    return DMD(teacher, generator, fake, Classes.of(teacher), scale, weight)


def estimator(renders=2, renoise=3, coupling=per_render, proposal=None):
    base = uniform_steps(20, 980)
    return HierarchicalEstimator(TimestepSampler(base, proposal, coupling=coupling), renders, renoise)


def raw(network, z_t, t, label):
    return network(z_t, timestep=t, class_labels=label, return_dict=False)[0]


def x0(network, z_t, t, label, schedule):
    alpha, sigma = schedule.alpha(t)[:, None, None, None], schedule.sigma(t)[:, None, None, None]
    return alpha * z_t - sigma * raw(network, z_t, t, label)


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


class Gaussians:
    """E[z | z_t] for z ~ N(m, s^2) in each of 12 entries, as a `Teacher` and as a module that predicts x0."""

    def __init__(self, mean, spread, schedule):
        self.mean, self.spread = mean, spread
        self.schedule, self.latent_shape = schedule, (3, 2, 2)

    def encode_prompts(self, prompts):
        return Condition({"label": torch.zeros(len(prompts), dtype=torch.long)})

    def x0(self, z_t, t):
        shape = (-1,) + (1,) * (z_t.ndim - 1)
        alpha, sigma = (c(t, z_t.dtype).view(shape) for c in (self.schedule.alpha, self.schedule.sigma))
        gain = alpha * self.spread**2 / (alpha**2 * self.spread**2 + sigma**2)
        return self.mean + gain * (z_t - alpha * self.mean)

    def predict_noise(self, z_t, t, conditions):
        return [to_epsilon(self.x0(z_t, t), z_t, t, self.schedule, "sample") for _ in conditions]


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


# The fake score


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_best_denoiser_of_a_gaussian_has_the_closed_form_loss(prediction):
    """sigma^2 s^2 / (alpha^2 s^2 + sigma^2) an entry in x0; in the network's own target with Tweedie's factor.

    240,000 entries at each t: the standard error is 0.3 %; 4 of them are allowed, false alarm 6e-5 each.
    """
    schedule = dataclasses.replace(NoiseSchedule.scaled_linear(), prediction=prediction)
    best = Gaussians(0.7, 0.5, schedule)
    rng = torch.Generator().manual_seed(0)

    class Network(nn.Module):
        def forward(self, z_t, t, condition):
            shape = (-1, 1, 1, 1)
            alpha, sigma = schedule.alpha(t).view(shape), schedule.sigma(t).view(shape)
            z = best.x0(z_t, t)
            eps = (z_t - alpha * z) / sigma
            return {"epsilon": eps, "sample": z, "v_prediction": alpha * eps - sigma * z}[prediction]

    z = 0.7 + 0.5 * torch.randn(20_000, 3, 2, 2, generator=rng)
    state = Generated(z, Condition({"label": torch.zeros(len(z))}), torch.zeros(len(z)))
    for at in (100, 500, 900):
        t, noise = torch.full((len(z), 1), at), torch.randn(len(z), 1, 3, 2, 2, generator=rng)
        alpha, sigma = float(schedule.alpha(t[0, 0])), float(schedule.sigma(t[0, 0]))
        closed = sigma**2 * 0.25 / (alpha**2 * 0.25 + sigma**2)
        # With the error e of x0, that of eps is alpha/sigma e, that of v is e/sigma.
        factor = {"epsilon": (alpha / sigma) ** 2, "sample": 1.0, "v_prediction": 1 / sigma**2}[prediction]
        for target, expected in (("x0", closed), ("network", factor * closed)):
            losses = denoising_losses(Network(), schedule, state, t, noise, target)
            error = float(losses.std()) / len(z) ** 0.5
            assert abs(float(losses.mean()) - expected) < 4 * error
            assert error < 0.005 * expected


def test_the_fake_update_descends_on_the_weighted_mean_of_its_losses(teacher):
    config = DistillConfig(
        teacher="tiny",
        gan_weight=0,
        renders=3,
        fake=TermEstimator(4, coupling="per-render", t_max=999, antithetic=True),
    )
    trainer, split = Trainer(config, teacher), Trainer(dataclasses.replace(config, micro_batch=3), teacher)
    tilted = proportional(uniform_steps(20, 999), lambda t: 0.1 + t / 500)
    for each in (trainer, split):
        fake = each.estimators["fake"]
        sampler = TimestepSampler(fake.sampler.base, tilted, antithetic=True)
        each.estimators["fake"] = dataclasses.replace(fake, sampler=sampler)
    here = stream(0, "step", 0, "fake", 0)
    with torch.no_grad():
        state = trainer.dmd.upstream(trainer.estimators["fake"].renders_of(here))
    draws, noise = trainer.estimators["fake"].draw(trainer.dmd, here)
    loss, schedule = 0.0, teacher.schedule
    for r in range(3):
        for k in range(4):
            t = draws.t[r, k : k + 1]
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            z_t = alpha * state.z[r : r + 1] + sigma * noise[r, k]
            v = alpha * noise[r, k] - sigma * state.z[r]
            predicted = raw(trainer.fake.network, z_t, t, state.label[r : r + 1])
            loss = loss + draws.weight[r, k] * (predicted - v).square().mean() / 12
    naive = torch.autograd.grad(loss, list(trainer.fake.parameters()))
    assert float(draws.weight.std()) > 0.1
    for each in (trainer, split):
        each.fake_update()
        torch.testing.assert_close(each.scalars["fake_loss"], loss.detach(), rtol=1e-5, atol=0)
        for parameter, gradient in zip(each.fake.parameters(), naive, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


# The adversarial term


def gan(teacher, source):
    dmd = pipeline(teacher)
    read = dmd.fake if source == "fake" else teacher
    return Adversarial(dmd, Discriminator.of(read, dmd.classes.null, stream(0, "head"), ""))


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_the_generators_adversarial_gradient_is_autograd_through_the_whole_graph(teacher, source):
    task, at = gan(teacher, source), stream(0, "step", 1)
    ours = estimator()
    found = ours.estimate(task, at)
    draws, noise = ours.draw(task, at)
    state = task.upstream(ours.renders_of(at))
    z_t = teacher.schedule.add_noise(state.z[:, None], draws.t, noise).flatten(0, 1)
    network = task.dmd.fake.network if source == "fake" else teacher.network
    hidden = []
    handle = network.transformer_blocks[1].register_forward_hook(lambda m, i, o: hidden.append(o))
    raw(network, z_t, draws.t.flatten(), state.label.repeat_interleave(3))
    handle.remove()
    d = task.discriminator
    inner = functional.silu(d.inner(functional.layer_norm(hidden[0], (8,))))
    loss = functional.softplus(-d.outer(inner.mean(1))).mean()
    naive = torch.autograd.grad(loss, task.parameters, allow_unused=True, materialize_grads=True)
    assert sum(float(part.square().sum()) for part in naive) > 0
    for ours_part, naive_part in zip(found.gradient, naive, strict=True):
        torch.testing.assert_close(ours_part, naive_part, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("features", "trained"), [("fake", True), ("teacher", False)])
def test_the_discriminator_trains_the_fake_score_only_where_it_reads_it(teacher, features, trained):
    config = DistillConfig(teacher="tiny", features=features, discriminator_weight=1.0, renders=3, gan=TermEstimator(2))
    real = RealLatents(torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % CLASSES)
    trainer = Trainer(config, teacher, real)
    with torch.no_grad():
        state = trainer.dmd.upstream(trainer.estimators["fake"].renders_of(stream(1)))
    trainer._discriminator_backward(state, stream(1))
    moved = sum(float(p.grad.abs().sum()) for p in trainer.fake.parameters() if p.grad is not None)
    assert (moved > 0) == trained
    assert all(float(p.grad.abs().sum()) > 0 for p in trainer.discriminator.parameters())
    assert all(p.grad is None for p in [*trainer.generator.parameters(), *teacher.network.parameters()])


def test_a_discriminator_learns_to_tell_real_from_generated(teacher):
    config = DistillConfig(teacher="tiny", features="teacher", discriminator_weight=1.0, fake_rate=3e-3, renders=8)
    rng = torch.Generator().manual_seed(0)
    real = RealLatents(3 + torch.randn(64, 4, 8, 8, generator=rng), torch.arange(64) % CLASSES)
    trainer = Trainer(config, teacher, real)
    losses = []
    for _ in range(40):
        trainer.fake_update()
        losses.append(float(trainer.scalars["discriminator_loss"]))
        trainer.steps_done += 1
        trainer.fake_done = trainer.steps_done * config.fake_steps
    assert sum(losses[-8:]) / 8 < 0.8 * sum(losses[:8]) / 8


def test_the_generator_update_adds_the_terms_on_one_state(teacher):
    config = DistillConfig(teacher="tiny", gan_weight=0.5, renders=2, gan=TermEstimator(3), generator=TermEstimator(2))
    trainer = Trainer(config, teacher)
    shaken(trainer.fake, 2)
    here = stream(0, "step", 0)
    dmd = trainer.estimators["generator"].estimate(trainer.dmd, here)
    state = trainer.dmd.upstream(trainer.estimators["generator"].renders_of(here))
    gan = trainer.estimators["gan"].mean_contribution(trainer.adversarial, state, here.child("gan"))
    adversarial = trainer.dmd.pull_back(state, 0.5 * gan.f_mean / 2)
    trainer.generator_update()
    for parameter, a, b in zip(trainer.dmd.parameters, dmd.gradient, adversarial, strict=True):
        torch.testing.assert_close(parameter.grad, a + b, rtol=1e-4, atol=1e-7)


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


# Conditions, settings, proposals


def test_balanced_states_cover_the_classes_evenly_and_each_class_is_equally_likely(teacher):
    """2,000 steps of 3 states: a class's share of 1/4 has a standard error of at most 0.0056; 5 are allowed."""
    classes = Classes.of(teacher)
    counts = torch.zeros(CLASSES)
    for i in range(2000):
        labels = [classes.index(stream(0, i, r), r, 3) for r in range(3)]
        assert labels == sorted(labels)
        counts[labels] += 1
    assert float((counts / counts.sum() - 1 / CLASSES).abs().max()) < 5 * 0.0056
    every = [classes.index(stream(1, r), r, 8) for r in range(8)]
    assert every == [0, 0, 1, 1, 2, 2, 3, 3]
    free = dataclasses.replace(classes, balance=False)
    assert {free.index(stream(0, i), 0, 3) for i in range(40)} == set(range(CLASSES))


def test_the_same_latents_are_generated_whatever_the_split(teacher):
    dmd, whole = pipeline(teacher), estimator(renders=4)
    state = dmd.upstream(whole.renders_of(stream(0)))
    halves = [dmd.upstream(estimator(renders=2).renders_of(stream(0), rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([half.label for half in halves]), state.label)
    torch.testing.assert_close(torch.cat([half.z for half in halves]), state.z)


def test_an_epsilon_network_is_refused_where_alpha_is_zero(tmp_path):
    teacher = DiffusersTeacher.from_pretrained(tiny_dit(tmp_path / "epsilon", "epsilon"))
    OneStepGenerator(Denoiser(teacher))
    table = teacher.schedule.acp.clone()
    table[-1] = 0
    teacher.schedule = dataclasses.replace(teacher.schedule, acp=table)
    with pytest.raises(ValueError, match="predicts epsilon, which says nothing at t = 999: set generator_t"):
        OneStepGenerator(Denoiser(teacher))
    assert OneStepGenerator(Denoiser(teacher), 399).t == 399


def test_ranges_are_given_in_thousandths_of_any_schedule():
    short = dataclasses.replace(NoiseSchedule.scaled_linear(), acp=torch.linspace(0.99, 0.01, 50), num_steps=50)
    flow = NoiseSchedule("flow", 1000)
    assert [timestep(n, NoiseSchedule.scaled_linear()) for n in (0, 20, 980, 999, 1000)] == [0, 20, 980, 999, 999]
    assert [timestep(n, short) for n in (0, 20, 980, 1000)] == [0, 1, 49, 49]
    assert [timestep(n, flow) for n in (0, 20, 1000)] == [0, 0.02, 1]
    with pytest.raises(ValueError, match="1000ths"):
        timestep(1001, flow)


def test_a_tabulated_proposal_is_p_times_the_root_of_its_bins_with_a_tenth_of_p(tmp_path):
    path = tmp_path / "m2.json"
    path.write_text(json.dumps({"edges": [20, 500, 900], "m2": [1.0, 9.0]}))
    q = tabulated(uniform_steps(20, 980), path)
    total = 480 * 1 + 481 * 3
    expected = torch.tensor([1, 1, 3, 3]) * 0.9 / total + 0.1 / 961
    torch.testing.assert_close(q.prob(torch.tensor([20, 499, 500, 980])), expected.double())
    path.write_text(json.dumps({"edges": [20, 500], "m2": [1.0, 9.0]}))
    with pytest.raises(ValueError, match="n \\+ 1 increasing edges"):
        tabulated(uniform_steps(20, 980), path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no table of a proposal"):
        tabulated(uniform_steps(20, 980), path)


def test_each_terms_proposal_learns_from_its_own_draws(teacher):
    adaptive = TermEstimator(4, "adaptive", "per-render")
    config = DistillConfig(teacher="tiny", renders=4, fake_steps=1, generator=adaptive, fake=adaptive, gan=adaptive)
    rng = torch.Generator().manual_seed(0)
    real = RealLatents(torch.randn(8, 4, 8, 8, generator=rng), torch.arange(8) % CLASSES)
    trainer = Trainer(config, teacher, real)
    trainer.step()
    seen = {name: int(e.sampler.proposal.state_dict()["seen"]) for name, e in trainer.estimators.items()}
    assert seen == {"generator": 16, "fake": 16, "gan": 16}
    assert all(isinstance(e.sampler.proposal, AdaptiveProposal) for e in trainer.estimators.values())


def test_settings_survive_json_and_a_changed_table_is_another_run(tmp_path):
    path = tmp_path / "m2.json"
    path.write_text(json.dumps({"edges": [20, 980], "m2": [1.0]}))
    config = DistillConfig(prompts=("1", "2"), generator=TermEstimator(4, "table", proposal_table=path))
    before = config.to_json()
    assert DistillConfig.from_json(before) == config
    path.write_text(json.dumps({"edges": [20, 980], "m2": [2.0]}))
    assert config.to_json() != before
    with pytest.raises(ValueError, match="not the settings of a distillation run"):
        DistillConfig.from_json("{}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ema": 1.0}, "ema must lie in"),
        ({"gan_weight": -1.0}, "gan_weight must be a number that is not negative"),
        ({"fake_rate": 0.0}, "fake_rate must be a positive number"),
        ({"weight": "sds"}, "weight must be dmd or paper"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**settings)
    with pytest.raises(ValueError, match="proposal_table goes with"):
        TermEstimator(proposal="table")


def test_a_layer_that_is_not_there_is_refused(teacher):
    with pytest.raises(ValueError, match="no layer 'nowhere'; it has, for example, pos_embed"):
        Discriminator.of(teacher, Classes.of(teacher).null, stream(0), "nowhere")
