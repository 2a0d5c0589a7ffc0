"""Per-draw gradients of a teacher's training loss: against autograd, by hand, masked, batched and projected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.tasks.attribution.bank import DrawBank, base_density
from carv.tasks.attribution.gradients import ExampleGradients
from carv.tasks.attribution.loss import training_target
from carv.tasks.attribution.projector import Projector, jl_error
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher

from comparisons import cosines, flat
from tiny_pipelines import dit, wan_of_plain_latents

PROMPTS = {"wan": "a b c", "dit": "7"}
N = 6


def pipeline_of(name: str) -> Any:
    if name == "wan":
        return wan_of_plain_latents(layers=2, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    return dit(10, prediction_type="v_prediction")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DiffusersTeacher]:
    """A tiny teacher of videos or of pictures, random weights, loaded once."""
    loaded: dict[str, DiffusersTeacher] = {}

    def teacher(name: str) -> DiffusersTeacher:
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                pipeline = pipeline_of(name)
                for parameter in pipeline.transformer.parameters():  # DiT starts with output zero
                    parameter.data += 0.05 * torch.randn_like(parameter)
                pipeline.save_pretrained(folder)
            options: dict[str, Any] = {"max_tokens": 8, "size": 16, "frames": 9} if name == "wan" else {}
            loaded[name] = DiffusersTeacher.from_pretrained(folder, **options)
        return loaded[name]

    return teacher


class Draws:
    """An example and N draws of a teacher."""

    def __init__(self, teacher: DiffusersTeacher, name: str, frames: int = 9, seed: int = 0) -> None:
        shape = teacher.with_frames(frames).latent_shape if name == "wan" else teacher.latent_shape
        self.latent = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.condition = teacher.encode_prompts([PROMPTS[name]])
        bank = DrawBank(0, "strata", base_density(teacher.schedule))
        self.t, _ = bank.timesteps(0, N)
        self.noise = bank.noises(0, N, shape)
        self.all = self.latent, self.condition, self.t, self.noise


def by_hand(teacher: DiffusersTeacher, draws: Draws, i: int, weight: Tensor | float = 1.0) -> dict[str, Tensor]:
    """The gradient of draw i by plain autograd, from the formulas of the two teachers."""
    network, z, eps, t = teacher.network, draws.latent, draws.noise[i], draws.t[i]
    parameters = dict(network.named_parameters())
    try:
        network.requires_grad_(True)
        if teacher.schedule.continuous:
            z_t, target = (1 - t.float()) * z + t.float() * eps, eps - z
            time, text = (1000 * t.float())[None], draws.condition.tensors["embeddings"]
            output = network(hidden_states=z_t[None], timestep=time, encoder_hidden_states=text, return_dict=False)[0]
        else:
            acp = diffusers.DDIMScheduler().alphas_cumprod[t]
            z_t, target = acp.sqrt() * z + (1 - acp).sqrt() * eps, acp.sqrt() * eps - (1 - acp).sqrt() * z
            labels = draws.condition.tensors["label"]
            output = network(z_t[None], timestep=t[None], class_labels=labels, return_dict=False)[0][:, :4]
        error = (output[0] - target).square().mean(0)
        frames = len(error) if error.ndim == 3 else 1
        gradients = torch.autograd.grad((weight * error).mean() / frames, tuple(parameters.values()))
    finally:
        network.requires_grad_(False)
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_each_draws_gradient_is_that_of_the_training_loss_by_plain_autograd(
    name: str, teachers: Callable[[str], DiffusersTeacher]
) -> None:
    teacher = teachers(name)
    draws = Draws(teacher, name)
    gradients = ExampleGradients(teacher, Projector(64))
    found = gradients.exact(*draws.all)
    assert gradients._batched
    assert tuple(found) == gradients.names == tuple(dict(teacher.network.named_parameters()))
    norms = gradients(*draws.all).norms
    for i in range(N):
        expected = by_hand(teacher, draws, i)
        scale = torch.stack([part.abs().max() for part in expected.values()]).max()
        for parameter, part in expected.items():
            torch.testing.assert_close(found[parameter][i], part, rtol=1e-4, atol=1e-5 * scale.item())
        torch.testing.assert_close(norms[i], torch.cat([p.flatten() for p in expected.values()]).norm())


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_batched_and_looped_gradients_agree(name: str, teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers(name)
    draws = Draws(teacher, name)
    batched, looped = ExampleGradients(teacher, Projector(64)), ExampleGradients(teacher, Projector(64))
    looped._batched = False
    a, b = batched(*draws.all), looped(*draws.all)
    torch.testing.assert_close(a.vectors, b.vectors, rtol=1e-4, atol=1e-5 * b.vectors.abs().max().item())
    torch.testing.assert_close(a.norms, b.norms)


def test_a_network_that_cannot_be_batched_is_looped_over(
    teachers: Callable[[str], DiffusersTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teachers("dit")
    draws = Draws(teacher, "dit")
    expected = ExampleGradients(teacher, Projector(64))(*draws.all)
    output = teacher.network_output

    def data_dependent(z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return output(z_t, t, condition) if t.sum().item() >= 0 else z_t

    monkeypatch.setattr(teacher, "network_output", data_dependent)
    gradients = ExampleGradients(teacher, Projector(64))
    found = gradients(*draws.all)
    assert not gradients._batched
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["wan", "dit"])
def test_vectors_do_not_depend_on_micro_batches_order_or_company(
    name: str, teachers: Callable[[str], DiffusersTeacher]
) -> None:
    teacher = teachers(name)
    draws = Draws(teacher, name)
    whole = ExampleGradients(teacher, Projector(128))(*draws.all)
    tolerance = 1e-5 * whole.vectors.abs().max().item()
    for micro_batch in (1, 4):
        parts = ExampleGradients(teacher, Projector(128), micro_batch=micro_batch)(*draws.all)
        torch.testing.assert_close(parts.vectors, whole.vectors, rtol=1e-4, atol=tolerance)
    some = torch.tensor([4, 1])
    alone = ExampleGradients(teacher, Projector(128))(
        draws.latent, draws.condition, draws.t[some], draws.noise[some]
    ).vectors
    torch.testing.assert_close(alone, whole.vectors[some], rtol=1e-4, atol=tolerance)


def test_many_examples_at_once_are_each_example_alone(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("dit")
    gradients = ExampleGradients(teacher, Projector(128))
    examples = [Draws(teacher, "dit", seed=seed) for seed in range(N)]
    conditions = [teacher.encode_prompts([str(i)]) for i in range(N)]
    t, noise = examples[0].t, examples[0].noise
    latents = torch.stack([example.latent for example in examples])
    together = gradients(latents, Condition.concatenate(conditions), t, noise)
    for i in range(N):
        alone = gradients(latents[i], conditions[i], t[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(together.vectors[i], alone.vectors[0], rtol=1e-4, atol=1e-5)


def test_a_mask_weighs_each_location_of_the_loss(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("wan")
    draws = Draws(teacher, "wan")
    mask = torch.rand(draws.latent.shape[1:], generator=torch.Generator().manual_seed(3))
    gradients = ExampleGradients(teacher, Projector(64))
    found = gradients.exact(*draws.all, mask)
    expected = by_hand(teacher, draws, 2, mask)
    for parameter in ("proj_out.weight", "blocks.0.attn1.to_q.weight"):
        torch.testing.assert_close(found[parameter][2], expected[parameter], rtol=1e-4, atol=1e-7)
    ones = gradients.exact(*draws.all, torch.ones_like(mask))
    torch.testing.assert_close(flat(ones), flat(gradients.exact(*draws.all)))
    still = gradients(*draws.all, torch.zeros_like(mask))
    assert bool((still.norms == 0).all())
    assert bool((still.vectors == 0).all())


def test_normalised_vectors_do_not_depend_on_the_length_correction(
    teachers: Callable[[str], DiffusersTeacher],
) -> None:
    """Eq. 60's 1/F scales all gradients of a clip, and Eq. 59 divides by their norms; F counts latent frames."""
    teacher = teachers("wan")
    gradients = ExampleGradients(teacher, Projector(256))
    for frames in (1, 5, 9):
        draws = Draws(teacher, "wan", frames)
        found = gradients(*draws.all)
        uncorrected = gradients(*draws.all, torch.ones(draws.latent.shape[1:]))
        latent_frames = (frames - 1) // 4 + 1
        assert draws.latent.shape[1] == latent_frames
        by_autograd = torch.cat([p.flatten() for p in by_hand(teacher, draws, 0, latent_frames).values()])
        torch.testing.assert_close(found.norms[0] * latent_frames, by_autograd.norm())
        cosines = torch.nn.functional.cosine_similarity(found.vectors * latent_frames, uncorrected.vectors)
        torch.testing.assert_close(cosines, torch.ones(N))


def test_a_teacher_takes_clips_of_other_lengths_and_shares_its_weights(
    teachers: Callable[[str], DiffusersTeacher],
) -> None:
    teacher = teachers("wan")
    short = teacher.with_frames(5)
    assert short.network is teacher.network
    assert (short.latent_shape[1], teacher.latent_shape[1]) == (2, 3)
    assert short.encode(torch.rand(1, 3, 5, 16, 16)).shape[1:] == short.latent_shape
    with pytest.raises(ValueError, match=r"videos of 1 \+ 4 n frames, got frames = 6"):
        teacher.with_frames(6)
    with pytest.raises(ValueError, match="takes pictures, not videos of 5 frames"):
        teachers("dit").with_frames(5)


def test_patterns_choose_parameters(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("wan")
    draws = Draws(teacher, "wan")
    gradients = ExampleGradients(teacher, Projector(64), "blocks.1.*.weight, proj_out.bias")
    assert "blocks.1.attn1.to_q.weight" in gradients.names
    assert "proj_out.bias" in gradients.names
    assert not any(name.startswith("blocks.0") or name.endswith("to_q.bias") for name in gradients.names)
    assert gradients.size == sum(dict(teacher.network.named_parameters())[n].numel() for n in gradients.names)
    everything = ExampleGradients(teacher, Projector(64)).exact(*draws.all)
    for name, part in gradients.exact(*draws.all).items():
        torch.testing.assert_close(part, everything[name], rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match=r"no parameter of the network matches 'blcks\.\*'; their names are like"):
        ExampleGradients(teacher, Projector(64), "blocks.*, blcks.*")


def test_adapters_are_chosen_alone_when_the_network_has_some(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        pipeline_of("dit").save_pretrained(tmp_path)
        teacher = DiffusersTeacher.from_pretrained(tmp_path)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
        peft.inject_adapter_in_model(config, teacher.network)
    gradients = ExampleGradients(teacher, Projector(64))
    assert gradients.names
    assert all("lora_" in name for name in gradients.names)
    found = gradients.exact(*Draws(teacher, "dit").all)
    assert gradients._batched
    for name, part in found.items():  # B starts at zero, and hence A's gradient is zero
        assert bool((part.abs().amax(tuple(range(1, part.ndim))) > 1e-9).all()) == ("lora_B" in name)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
def test_the_target_is_what_a_perfect_network_outputs(prediction: Any) -> None:
    """Converted back, the target gives the very noise that was added."""
    from carv.teachers.prediction import to_epsilon

    schedule = NoiseSchedule.flow() if prediction == "flow" else NoiseSchedule.linear(prediction=prediction)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64) if prediction == "flow" else torch.tensor([300, 800])
    z, eps = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = training_target(schedule, z, t, eps)
    torch.testing.assert_close(to_epsilon(target, schedule.add_noise(z, t, eps), t, schedule), eps)


def test_mistakes_are_one_sentence(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("wan")
    draws = Draws(teacher, "wan")
    gradients = ExampleGradients(teacher, Projector(64))
    z, condition, t, noise = draws.all
    with pytest.raises(ValueError, match="needs a latent of its shape"):
        gradients(z[:, :2], condition, t, noise)
    with pytest.raises(ValueError, match="a condition of one row or of 6, got 2"):
        gradients(z, teacher.encode_prompts(["a", "b"]), t, noise)
    with pytest.raises(ValueError, match="give t"):
        gradients(z, condition, t[:2], noise)
    with pytest.raises(ValueError, match=r"a mask of these latents has shape \[3, 2, 2\], got \[2, 2\]"):
        gradients(*draws.all, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"finite and in \[0, 1\]"):
        gradients(*draws.all, torch.full((3, 2, 2), 1.5))
    with pytest.raises(ValueError, match="not finite at t = "):
        gradients(z * float("inf"), condition, t, noise)
    with pytest.raises(ValueError, match="at least 1 gradient"):
        ExampleGradients(teacher, Projector(64), micro_batch=0)


def test_cosines_of_gradients_agree_with_the_exact_ones_as_trakers_do(
    teachers: Callable[[str], DiffusersTeacher],
) -> None:
    """On true gradients: our r.m.s. error of projected cosines is at most 1.6 times that of traker's projector.

    Both are single projections; the ratio of two r.m.s. of 15 correlated errors scatters by about 30 %.
    """
    projectors = pytest.importorskip("trak.projectors")
    teacher = teachers("dit")
    draws = Draws(teacher, "dit")
    gradients = ExampleGradients(teacher, Projector(512))
    exact = flat(gradients.exact(*draws.all))
    theirs = projectors.BasicProjector(
        grad_dim=exact.shape[1], proj_dim=512, seed=0, proj_type=projectors.ProjectionType.normal, device="cpu",
        dtype=torch.float32, block_size=128,
    ).project(exact, model_id=0)  # fmt: skip
    above = torch.triu_indices(N, N, 1)

    def rms(vectors: Tensor) -> float:
        error = (cosines(vectors) - cosines(exact))[above[0], above[1]]
        return float(error.square().mean().sqrt())

    ours = rms(gradients(*draws.all).vectors)
    assert ours < 1.6 * rms(theirs)
    assert ours < 1.6 * jl_error(512)
    # traker's projections are not scaled: their squared norms are k times too large.
    ratio = (theirs.square().sum(1) / exact.square().sum(1)).mean() / 512
    assert 0.8 < ratio < 1.25
