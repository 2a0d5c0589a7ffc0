"""The fake score's update, the adversarial term, and which classes, noise levels and settings an update takes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from carv.adaptive import AdaptiveProposal
from carv.density import uniform_steps
from carv.proposals import proportional
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.tasks.distill.config import DistillConfig, TermEstimator, tabulated, timestep
from carv.tasks.distill.data import RealLatents
from carv.tasks.distill.discriminator import Adversarial, Discriminator
from carv.tasks.distill.fake_score import denoising_losses
from carv.tasks.distill.gradient import Generated
from carv.tasks.distill.networks import Classes, Denoiser, OneStepGenerator
from carv.tasks.distill.train import Trainer
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

from distillations import CLASSES, Gaussians, estimator, pipeline, raw, shaken, tiny_dit


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return DiffusersTeacher.from_pretrained(tiny_dit(tmp_path_factory.mktemp("tiny") / "dit"))


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
