"""Pictures and latents of diffusers teachers: their units, their sizes, and gradients through the encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import carv
from carv import weights
from carv.density import ShiftedUniform, uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.gradient import Gradient, Renders
from carv.sampler import TimestepSampler
from carv.tasks.sds.config import EstimatorConfig, SDSConfig
from carv.tasks.sds.field import VoxelField
from carv.tasks.sds.task import SDS
from carv.tasks.sds.train import Trainer, load_teacher
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.guidance import Guided
from carv.world.cameras import WORLD_RANGE

from pipeline_families import CASES, every_family, loaded_families, normal, saved_families
from tiny_pipelines import TOKENS


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return saved_families(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def teachers(folders: Callable[[str], Path]) -> Callable[[str], DiffusersTeacher]:
    return loaded_families(folders)


@every_family
def test_latents_have_the_folders_units(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    case, teacher = CASES[name], teachers(name)
    raw = type(case.make().vae).from_pretrained(folders(name) / "vae").eval()
    pictures = torch.rand(2, *teacher.picture_shape, generator=torch.Generator().manual_seed(0))
    xi = normal(2, *teacher.latent_shape)
    with torch.no_grad():
        posterior = raw.encode(2 * pictures - 1).latent_dist
        mean, sample = posterior.mean, posterior.mean + posterior.std * xi
        torch.testing.assert_close(teacher.encode(pictures), (mean - case.mean) * case.scale)
        torch.testing.assert_close(teacher.encode(pictures, xi), (sample - case.mean) * case.scale)
        decoded = raw.decode(xi / case.scale + case.mean).sample
    torch.testing.assert_close(teacher.decode(xi), (decoded * 0.5 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert teacher.decode(xi).shape == pictures.shape


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_pictures_of_another_size_are_resized(name: str, teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers(name)
    colour = torch.tensor([0.2, 0.5, 0.8]).view(1, 3, *[1] * (len(teacher.picture_shape) - 1))
    exact = colour.expand(2, *teacher.picture_shape)
    for size in ((8, 8), (40, 24)):
        z = teacher.encode(colour.expand(2, *teacher.picture_shape[:-2], *size))
        torch.testing.assert_close(z, teacher.encode(exact), rtol=1e-4, atol=1e-4)
    ramp = torch.linspace(0, 1, exact.shape[-1]).expand(exact.shape)  # nothing is transposed or mixed up
    fine = torch.linspace(0, 1, 4 * exact.shape[-1]).expand(*exact.shape[:-2], 4 * exact.shape[-2], -1)
    torch.testing.assert_close(teacher._family.autoencoder._resized(fine), ramp, rtol=0, atol=0.05)


def test_a_video_of_one_frame_takes_pictures(folders: Callable[[str], Path]) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("wan"), size=16, frames=1, max_tokens=TOKENS)
    assert (teacher.picture_shape, teacher.latent_shape) == ((3, 1, 16, 16), (4, 1, 2, 2))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher.encode(pictures), teacher.encode(pictures[:, :, None]))


class Pictures:
    """R pictures sigmoid(theta + a little noise of their own), distilled: a `TeacherGradient`."""

    def __init__(self, teacher: DiffusersTeacher, guided: Guided) -> None:
        self.teacher, self.guided, self.latent_shape = teacher, guided, teacher.latent_shape
        self.theta = normal(*teacher.picture_shape, seed=3).requires_grad_()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def pictures(self, renders: Renders) -> Tensor:
        shape = self.theta.shape
        return torch.stack([(self.theta + torch.randn(shape, generator=s.generator()) / 4).sigmoid() for s in renders])

    def upstream(self, renders: Renders) -> Tensor:
        return self.teacher.encode(self.pictures(renders))

    def contribution(self, state: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.guided(self.teacher.schedule.add_noise(state[:, None], t, noise), t) - noise

    def pull_back(self, state: Tensor, f: Tensor, retain: bool = False) -> Gradient:
        return torch.autograd.grad(state, [self.theta], f, retain_graph=retain)


@every_family
def test_the_estimate_is_the_gradient_of_the_sds_surrogate_whatever_the_micro_batch(
    name: str, folders: Callable[[str], Path], teachers: Callable[[str], DiffusersTeacher]
) -> None:
    """The surrogate is 1/R sum_r 0.5 |z_r - sg(z_r - f_r)|^2, with z from the raw VAE by the formula."""
    case, teacher = CASES[name], teachers(name)
    task = Pictures(teacher, Guided.from_prompts(teacher, case.prompts[:1], 3.0, case.negative))
    law = ShiftedUniform(0.02, 0.98, 3.0) if teacher.schedule.continuous else uniform_steps(20, 980)
    sampler, step = TimestepSampler(law), carv.stream(0, "step", 1)
    estimate = HierarchicalEstimator(sampler, renders=2, renoise=4).estimate(task, step)

    raw = type(case.make().vae).from_pretrained(folders(name) / "vae").eval()
    streams = tuple(step.child("render", r) for r in range(2))
    z = (raw.encode(2 * task.pictures(Renders(streams, 0, 2)) - 1).latent_dist.mean - case.mean) * case.scale
    surrogate = 0.5 * (z - (z - estimate.f_mean).detach()).square().sum() / 2
    [expected] = torch.autograd.grad(surrogate, [task.theta])
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(estimate.gradient[0] / scale, expected / scale, rtol=1e-3, atol=1e-5)

    for micro_batch in (2, 6):
        parts = HierarchicalEstimator(sampler, renders=2, renoise=4, micro_batch=micro_batch).estimate(task, step)
        torch.testing.assert_close(parts.gradient[0] / scale, estimate.gradient[0] / scale, rtol=1e-3, atol=1e-5)


def test_text_to_3d_takes_a_pipeline_and_its_encoder(teachers: Callable[[str], DiffusersTeacher]) -> None:
    teacher = teachers("sd")
    field = VoxelField(8, 6)
    task = SDS(teacher, field, "a", weights.sds(teacher.schedule), 3.0, WORLD_RANGE, size=12, encode=teacher.encode)
    estimator = HierarchicalEstimator(TimestepSampler(uniform_steps(20, 980)), renders=2, renoise=2)
    estimate = estimator.estimate(task, carv.stream(0))
    assert estimate.f_mean.shape == (2, *teacher.latent_shape)
    assert all(bool(gradient.isfinite().all()) for gradient in estimate.gradient)
    assert any(bool((gradient != 0).any()) for gradient in estimate.gradient)


def test_a_text_to_3d_run_names_its_teacher_by_its_folder(folders: Callable[[str], Path]) -> None:
    config = SDSConfig("a", teacher=str(folders("sd")), size=12, field="voxel", resolution=8, samples=4)
    trainer = Trainer(config, load_teacher(config))
    before = trainer.field.density.detach().clone()
    trainer.step()
    assert trainer.task.encoder_calls == 1
    assert not torch.equal(trainer.field.density, before)
    with pytest.raises(ValueError, match="absent"):
        load_teacher(dataclasses.replace(config, teacher="absent"))


@pytest.mark.parametrize("proposal", ["weight", "adaptive"])
def test_a_text_to_3d_run_takes_a_flow_matching_teacher_whose_t_is_continuous(
    proposal: Any, folders: Callable[[str], Path]
) -> None:
    estimator = EstimatorConfig(renoise=4, proposal=proposal)
    config = SDSConfig("a", estimator, teacher=str(folders("sd3")), size=12, field="voxel", resolution=8, samples=4)
    trainer = Trainer(config, load_teacher(config))
    before = trainer.field.density.detach().clone()
    trainer.step()
    assert not torch.equal(trainer.field.density, before)
    law = trainer.estimator.sampler
    t = law.sample(2, 500, torch.Generator().manual_seed(0)).t
    assert t.is_floating_point()
    assert 0.02 <= float(t.min()) < 0.3
    assert 0.9 < float(t.max()) <= 0.98


def test_the_gradient_through_encode_agrees_with_finite_differences(
    folders: Callable[[str], Path],
) -> None:
    teacher = DiffusersTeacher.from_pretrained(folders("sd"), vae_dtype=torch.float64)
    x = torch.rand(1, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction, f = normal(1, 3, 12, 12, seed=1).double(), normal(1, *teacher.latent_shape, seed=2).double()
    [gradient] = torch.autograd.grad(teacher.encode(x), [x], f)
    with torch.no_grad():
        ends = [(teacher.encode(x + h * direction) * f).sum() for h in (1e-5, -1e-5)]
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)
