"""A teacher from a diffusers folder: it predicts as its family's own pipeline, in few calls of a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from carv.schedule import NoiseSchedule
from carv.teachers.base import Condition, Teacher
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.guidance import Guided

from pipeline_families import CASES, PROMPTS, every_family, loaded_families, normal, saved_families, times


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_families(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def teachers(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    return loaded_families(folders)


def by_hand(prediction: str, output: Tensor, z_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """epsilon from the network's output: z from its definition, then (z_t - alpha z) / sigma."""
    if prediction == "epsilon":
        return output
    z = alpha * z_t - sigma * output if prediction == "v" else z_t - sigma * output
    return (z_t - alpha * z) / sigma


def what_the_scheduler_is_shown(pipeline: Any, call: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(guided output, t, z_t) of each step of a real pipeline."""
    seen = []
    step = pipeline.scheduler.step

    def spy(output: Tensor, t: Tensor, sample: Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((output, t, sample))
        return step(output, t, sample, *rest, **options)

    pipeline.scheduler.step = spy
    pipeline.set_progress_bar_config(disable=True)
    pipeline(**call, num_inference_steps=3)
    return seen


@every_family
def test_guidance_gives_what_the_pipeline_shows_its_scheduler(
    name: str,
    folders: Callable[[str], Path],
    teachers: Callable[[str], DiffusersTeacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, teacher = CASES[name], teachers(name)
    assert isinstance(teacher, Teacher)
    latents = normal(2, *teacher.latent_shape, seed=1)
    pipeline = type(case.make()).from_pretrained(folders(name), local_files_only=True)
    flux_pack, flux_unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
    if name == "flux":
        latents = flux_pack(latents, 2, *teacher.latent_shape)
    if name == "dit":  # its pipeline takes no latents
        monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: latents)
    seen = what_the_scheduler_is_shown(pipeline, case.call | ({} if name == "dit" else {"latents": latents}))
    assert len(seen) == 3
    guided = Guided.from_prompts(teacher, case.prompts, 3.0, case.negative)
    for output, t, z_t in seen:
        output, z_t = output[:2], z_t[:2]
        if name == "flux":
            output, z_t = (flux_unpack(tensor, 16, 16, 2) for tensor in (output, z_t))
        if teacher.schedule.continuous:
            t = (t.double() / 1000).expand(2)
            alpha, sigma = 1 - t[0], t[0]
        else:
            acp = pipeline.scheduler.alphas_cumprod.double()[int(t)]
            t, alpha, sigma = t.expand(2), acp.sqrt(), (1 - acp).sqrt()
        expected = by_hand(case.prediction, output.double(), z_t.double(), alpha, sigma)
        got = guided(z_t[:, None], t[:, None])[:, 0]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=2e-5)


@every_family
def test_rows_do_not_see_each_other(name: str, teachers: Callable[[str], DiffusersTeacher]) -> None:
    """Rows of unequal t and condition, asked for together under two conditions, or one by one."""
    teacher, prompts = teachers(name), CASES[name].prompts
    z_t, t = normal(3, *teacher.latent_shape), times(teacher, 0.02, 0.5, 0.97)
    conditions = teacher.encode_prompts([*prompts, ""]), teacher.encode_prompts(["", "", prompts[0]])
    together = teacher.predict_noise(z_t, t, conditions)
    assert len(together) == 2
    for condition, outputs in zip(conditions, together, strict=True):
        for row in range(3):
            only = torch.tensor([row])
            [alone] = teacher.predict_noise(z_t[only], t[only], [condition.rows(only)])
            torch.testing.assert_close(outputs[only], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-4)  # the conditions do something


@every_family
def test_a_prediction_never_waits_for_the_device(
    name: str,
    folders: Callable[[str], Path],
    teachers: Callable[[str], DiffusersTeacher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the "meta" device there are no numbers: asking for one raises."""
    case, conditions = CASES[name], teachers(name).encode_prompts(["", CASES[name].prompts[0]])
    monkeypatch.setattr(NoiseSchedule, "__post_init__", lambda self: None)  # looks at its table, once
    teacher = DiffusersTeacher.from_pretrained(folders(name), device="meta", **case.load)
    moved = Condition({key: tensor.to("meta") for key, tensor in conditions.tensors.items()})
    guided = Guided(teacher, 3.0, moved, moved)
    z_t = torch.empty(2, 3, *teacher.latent_shape, device="meta")
    assert guided(z_t, times(teacher, 0.1, 0.2, 0.3).expand(2, 3).to("meta")).device.type == "meta"


def spy_on_network(teacher: DiffusersTeacher) -> list[int]:
    """The batch size of each call of the network from now on."""
    sizes: list[int] = []
    teacher._family.network.register_forward_hook(lambda _, __, output: sizes.append(len(output[0])))
    return sizes


@every_family
def test_guidance_calls_the_network_once(name: str, folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders(name), **CASES[name].load)
    calls = spy_on_network(teacher)
    guided = Guided.from_prompts(teacher, CASES[name].prompts, 7.5, CASES[name].negative)
    guided(normal(2, 3, *teacher.latent_shape), times(teacher, 0.1, 0.2, 0.3).expand(2, 3))
    assert calls == [2 * 2 * 3]


@every_family
def test_every_network_is_frozen_and_no_random_number_is_drawn(
    name: str, teachers: Callable[[str], DiffusersTeacher]
) -> None:
    teacher = teachers(name)
    family: Any = teacher._family
    networks = [family.network, family.autoencoder._model, *[text.model for text in family.text]]
    assert len(networks) == {"sd": 3, "sdxl": 4, "dit": 2, "sd3": 5, "flux": 4, "wan": 3}[name]
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    before = torch.get_rng_state()
    z_t = normal(1, *teacher.latent_shape).requires_grad_()
    [noise] = teacher.predict_noise(z_t, times(teacher, 0.3), [teacher.encode_prompts([CASES[name].prompts[0]])])
    teacher.decode(teacher.encode(torch.rand(1, *teacher.picture_shape, generator=torch.Generator())))
    assert not noise.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sd", "flux", "wan"])
def test_half_precision_networks_give_float32_near_the_full_ones(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    full = teachers(name)
    half = DiffusersTeacher.from_pretrained(folders(name), dtype=torch.bfloat16, **CASES[name].load)
    assert {p.dtype for p in half._family.autoencoder._model.parameters()} == {torch.float32}
    # 0.5 and 0.25 are exact in bfloat16, which Flux turns t into.
    z_t, t = normal(2, *full.latent_shape), times(full, 0.5, 0.25)
    [expected] = full.predict_noise(z_t, t, [full.encode_prompts(PROMPTS)])
    [got] = half.predict_noise(z_t, t, [half.encode_prompts(PROMPTS)])
    assert got.dtype == torch.float32
    assert (got - expected).norm() / expected.norm() < 0.05


def test_what_is_not_a_prediction_stays_exact_in_half_precision(folders: Callable[[str], Path]) -> None:
    """eps_hat = alpha v + sigma z_t with z_t as it is, not as the network is shown it."""
    half = DiffusersTeacher.from_pretrained(folders("sd"), dtype=torch.bfloat16)
    z_t, t = normal(1, *half.latent_shape), torch.tensor([999])
    condition = half.encode_prompts([""])
    [noise] = half.predict_noise(z_t, t, [condition])
    output = half._family.output(z_t.bfloat16(), t, condition).float()
    alpha, sigma = half.schedule.alpha(t), half.schedule.sigma(t)
    torch.testing.assert_close(noise, alpha * output + sigma * z_t)


def test_compile_wraps_the_network(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def spy(network: Any) -> Any:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", spy)
    DiffusersTeacher.from_pretrained(folders("dit"))
    assert not compiled
    teacher = DiffusersTeacher.from_pretrained(folders("dit"), compile=True)
    assert [type(network).__name__ for network in compiled] == ["DiTTransformer2DModel"]
    teacher.predict_noise(normal(1, *teacher.latent_shape), torch.tensor([10]), [teacher.encode_prompts(["3"])])
