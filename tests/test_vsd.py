"""VSD: the hierarchical estimator is unbiased around it, and the adapted score shares the teacher's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carv import weights
from carv.density import uniform_steps
from carv.gradient import Renders
from carv.rng import stream
from carv.sampler import TimestepSampler
from carv.tasks.sds.stein import Stein
from carv.tasks.sds.task import SDS, RenderState
from carv.tasks.sds.vsd import VSD, LoRAScore
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.world.cameras import WORLD_RANGE

from tiny_pipelines import stable_diffusion
from tiny_sds import BASE, DESIGNS, Picture, compare, design, distillation, with_a_past

ALL_STEPS = TimestepSampler(uniform_steps(0, 999))


class Linear(nn.Module):
    """A score of one's own: eps_phi = a(t) z_t + b (t/250 - 2), with a(t) linear in t."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([1.5, -1.0]))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, 12).view(3, 2, 2))

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        s = t.view(-1, 1, 1, 1) / 1000
        return (self.slope[0] + self.slope[1] * s) * z_t + self.bias * (4 * s - 2)


def linear_vsd(**options: Any) -> VSD:
    return VSD(distillation(), Linear(), ALL_STEPS, **options)


def four_channels(rgb: Tensor) -> Tensor:
    return 2 * torch.cat([rgb, rgb.mean(1, keepdim=True)], 1) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stable-diffusion")
    stable_diffusion().save_pretrained(path)
    return path


@pytest.fixture
def teacher(folder):
    return DiffusersTeacher.from_pretrained(folder)


def sds_of(teacher: DiffusersTeacher, guidance: float) -> SDS:
    weight = weights.sds(teacher.schedule)
    return SDS(teacher, Picture(8), "a", weight, guidance, WORLD_RANGE, size=8, encode=four_channels)


def lora_vsd(teacher: DiffusersTeacher, guidance: float = 3.0, steps: int = 0) -> VSD:
    """VSD of a tiny Stable Diffusion, with a phi that is `steps` large steps away from the teacher."""
    task = VSD(sds_of(teacher, guidance), LoRAScore(teacher, 2, stream(0, "lora")), ALL_STEPS, rate=0.05, renoise=4)
    for i in range(steps):
        task.fit(task.upstream(two_renders()), stream(0, "fit", i))
    return task


def two_renders() -> Renders:
    return Renders((stream(0, "render", 0), stream(0, "render", 1)), 0, 2)


def one_call(task: Any, draws: int = 3) -> tuple[RenderState, Tensor, Tensor]:
    rng = stream(0, "call").generator()
    t = torch.randint(20, 980, (2, draws), generator=rng)
    return task.upstream(two_renders()), t, torch.randn(2, draws, *task.latent_shape, generator=rng)


# The estimator around it


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_around_vsd_has_the_mean_of_naive_iid_vsd(name):
    """A bias of 10 % of |mu| is excluded with 95 % confidence; 1 in 1000 such tests alarms falsely."""
    task = linear_vsd()
    report = compare(DESIGNS[name], task, task, name)
    assert report.verdict == "pass", report.describe()


def test_control_variates_around_vsd_keep_its_mean():
    task = linear_vsd()
    report = compare(design(), with_a_past(Stein(task, bins=5)), task, "stein")
    assert report.verdict == "pass", report.describe()


def test_the_estimator_is_unbiased_around_a_lora_adapted_unet(teacher):
    """A bias of 20 % of |mu| is excluded with 95 % confidence; 1 in 1000 such tests alarms falsely."""
    task = lora_vsd(teacher, steps=10)
    report = compare(design(2, 4), task, task, "lora", tolerance=0.2)
    assert report.verdict == "pass", report.describe()


class _AtAnotherT(VSD):
    """phi is asked at another draw's t than the teacher."""

    def _learned(self, state: RenderState, z_t: Tensor, t: Tensor) -> Tensor:
        return super()._learned(state, z_t, t.roll(1, 1))


def test_a_phi_that_is_asked_at_another_t_than_the_teacher_is_seen_as_a_bias():
    """With q = p. With q ~ p w there is none: w p/q is constant, and any other draw's t has the same law."""
    mutant = _AtAnotherT(distillation(), Linear(), ALL_STEPS)
    report = compare(design(proposal=BASE, coupling="iid"), mutant, linear_vsd(), "mutant", tolerance=0.05)
    assert report.verdict == "fail", report.describe()


# What is contributed


def test_contributions_are_those_of_a_loop_over_renders_and_draws(teacher):
    task = lora_vsd(teacher, steps=3)
    state, t, noise = one_call(task)
    found = task.contribution(state, t, noise)
    words = state.cameras.words()
    assert words[0] != words[1]
    for r, word in enumerate(words):
        e_c, e_u = (teacher.encode_prompts([prompt]) for prompt in (f"a, {word} view", ""))
        for k in range(3):
            at = t[r, k : k + 1]
            z_t = teacher.schedule.add_noise(state.z[r : r + 1].detach(), at, noise[r, k : k + 1])
            (c,), (u,) = teacher.predict_noise(z_t, at, [e_c]), teacher.predict_noise(z_t, at, [e_u])
            phi = task.score(z_t, at, e_c).detach()
            assert not torch.allclose(phi, c, atol=1e-3)
            expected = float(task.weight(at)) * (u + 3 * (c - u) - phi)
            torch.testing.assert_close(found[r, k], expected[0], rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_leaves_guidance_alone(teacher):
    """eps_phi is then the conditional teacher, so f = w (s - 1) (e_c - e_u), and 0 without guidance."""
    task = lora_vsd(teacher, guidance=1.0)
    assert float(task.contribution(*one_call(task)).abs().max()) == 0
    task.sds.guidance_scale = 3.0
    state, t, noise = one_call(task)
    found = task.contribution(state, t, noise)
    e_c, e_u = (
        sds_of(teacher, s).contribution(sds_of(teacher, s).upstream(two_renders()), t, noise) for s in (1.0, 0.0)
    )
    torch.testing.assert_close(found, 2 * (e_c - e_u), rtol=1e-4, atol=1e-5)


# The shared network


def test_the_teacher_is_bit_for_bit_what_it_was_and_shares_its_weights(teacher):
    network = teacher.network
    before = {name: (value.data_ptr(), value.clone()) for name, value in network.named_parameters()}
    z_t, t, condition = (
        torch.randn(3, *teacher.latent_shape),
        torch.tensor([5, 300, 999]),
        teacher.encode_prompts(["a", "b", ""]),
    )
    expected = teacher.predict_noise(z_t, t, [condition])[0]
    global_state = torch.get_rng_state()
    task = lora_vsd(teacher, steps=3)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(teacher.predict_noise(z_t, t, [condition])[0], expected)
    assert not torch.equal(task.score(z_t, t, condition), expected)
    after = {name.replace(".base_layer", ""): value for name, value in network.named_parameters() if "lora" not in name}
    assert after.keys() == before.keys()
    for name, (address, value) in before.items():
        assert after[name].data_ptr() == address
        assert torch.equal(after[name], value)
        assert not after[name].requires_grad
    added = sum(parameter.numel() for parameter in task.score.parameters())
    assert added < 0.2 * sum(value.numel() for _, value in before.values())


def test_an_error_within_the_network_leaves_the_teacher_unadapted(teacher):
    task, z_t, t = lora_vsd(teacher, steps=1), torch.zeros(1, *teacher.latent_shape), torch.tensor([500])
    condition = teacher.encode_prompts(["a"])
    before = teacher.predict_noise(z_t, t, [condition])[0]
    with pytest.raises(RuntimeError):
        task.score(z_t, t, Condition({"embeddings": torch.zeros(1, 16, 3)}))
    assert torch.equal(teacher.predict_noise(z_t, t, [condition])[0], before)


def test_a_reset_score_is_the_teacher_again_with_the_first_values_of_its_stream(teacher):
    task = lora_vsd(teacher)
    fresh = {name: value.clone() for name, value in task.score.state_dict().items()}
    task.fit(task.upstream(two_renders()), stream(0))
    task.score.reset(stream(0, "lora"))
    assert all(torch.equal(value, fresh[name]) for name, value in task.score.state_dict().items())
    task.score.reset(stream(1, "lora"))
    assert not torch.equal(task.score.downs[0], fresh["downs.0"])


def test_updates_are_float32_where_the_teacher_is_bfloat16(folder):
    task = lora_vsd(DiffusersTeacher.from_pretrained(folder, dtype=torch.bfloat16), steps=2)
    assert {parameter.dtype for parameter in task.score.parameters()} == {torch.float32}
    assert task.contribution(*one_call(task)).dtype == torch.float32
    assert float(task.score.ups[0].detach().abs().max()) > 0


# Learning phi


def test_steps_of_phi_lower_the_denoising_loss_and_reach_all_updates(teacher):
    """On the same draws again and again, so that the loss has no noise."""
    task = lora_vsd(teacher)
    state = task.upstream(two_renders())
    losses = [float(task.fit(state, stream(0, "fit"))) for _ in range(12)]
    assert losses[-1] < 0.98 * losses[0]
    assert all(float(up.detach().abs().max()) > 0 for up in task.score.ups)
    assert all(parameter.grad is None for parameter in task.parameters)


def test_a_step_of_phi_is_on_the_denoising_loss_at_draws_of_its_own():
    task = linear_vsd(renoise=3)
    state, at = task.upstream(two_renders()), stream(0, "fit")
    t = ALL_STEPS.sample(2, 3, at.child("t").generator()).t
    noise = torch.randn(2, 3, *task.latent_shape, generator=at.child("noise").generator())
    total = 0.0
    for r in range(2):
        for k in range(3):
            z_t = task.teacher.schedule.add_noise(state.z[r : r + 1].detach(), t[r, k : k + 1], noise[r, k : k + 1])
            total += float((task.score(z_t, t[r, k : k + 1], None) - noise[r, k]).square().mean().detach()) / 6
    assert float(task.fit(state, at)) == pytest.approx(total, rel=1e-5)


def test_phi_learns_the_score_of_the_renders():
    """A linear score of one picture, at one t: eps_phi = (z_t - alpha z)/sigma. Adam's last steps leave 0.05."""
    at = 600
    task = VSD(distillation(), Linear(), TimestepSampler(uniform_steps(at, at)), rate=0.02, renoise=256)
    for i in range(300):
        task.fit(task.upstream(Renders((stream(0, "render"),), 0, 1)), stream(0, "fit", i))
    schedule, t = task.teacher.schedule, torch.tensor(at)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    with torch.no_grad():
        at_0, at_1 = (task.score(torch.full((1, 3, 2, 2), value), t[None], None)[0] for value in (0.0, 1.0))
    torch.testing.assert_close(at_1 - at_0, torch.full((3, 2, 2), 1 / sigma), rtol=0, atol=0.05)
    torch.testing.assert_close(at_0, -alpha * task.seen.z[0] / sigma, rtol=0, atol=0.05)


def test_the_renders_of_a_step_are_kept_for_phi_without_their_graph():
    task = linear_vsd()
    design(2, 4).estimate(task, stream(0))
    assert task.seen is not None
    assert task.seen.z.shape == (2, 3, 2, 2)
    assert not task.seen.z.requires_grad
    assert not task.seen.rgb.requires_grad


def test_a_resumed_phi_is_bit_for_bit_the_one_that_never_stopped(teacher, folder):
    whole = lora_vsd(teacher, steps=2)
    resumed = lora_vsd(DiffusersTeacher.from_pretrained(folder))
    resumed.load_state_dict(whole.state_dict())
    for task in (whole, resumed):
        task.fit(task.upstream(two_renders()), stream(5))
    for a, b in zip(whole.score.parameters(), resumed.score.parameters(), strict=True):
        assert torch.equal(a, b)


class Flat(Linear):
    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return z_t.flatten(1)


def test_bad_input_gets_one_clear_sentence(teacher):
    LoRAScore(teacher, 1, stream(0))
    bad = {
        "adapted already": lambda: LoRAScore(teacher, 1, stream(0)),
        "ExactTeacher is none: give VSD a module of your own": lambda: LoRAScore(distillation().teacher, 1, stream(0)),
        "rank of a LoRAScore must be at least 1, got 0": lambda: LoRAScore(teacher, 0, stream(0)),
        "learning rate of phi must be a positive number, got 0": lambda: linear_vsd(rate=0.0),
        "at least one draw for each render, got renoise = 0": lambda: linear_vsd(renoise=0),
        "Identity has no parameters": lambda: VSD(distillation(), nn.Identity(), ALL_STEPS),
        r"Flat returned shape \[6, 12\], expected that of z_t, \[6, 3, 2, 2\]": lambda: VSD(
            distillation(), Flat(), ALL_STEPS
        ).contribution(*one_call(linear_vsd())),
    }
    for message, make in bad.items():
        with pytest.raises(ValueError, match=message):
            make()
