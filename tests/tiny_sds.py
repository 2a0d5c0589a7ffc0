"""Score distillation of 2x2 pictures under the exact teacher of a few images, and its comparison with naive iid SDS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from carv import weights
from carv.density import uniform_steps
from carv.estimator import HierarchicalEstimator
from carv.proposals import defensive, proportional
from carv.rng import Stream, stream
from carv.sampler import TimestepSampler
from carv.schedule import NoiseSchedule
from carv.strata import COUPLINGS
from carv.tasks.sds.stein import Stein
from carv.tasks.sds.task import SDS
from carv.teachers.exact import ExactTeacher
from carv.variance.bias import BiasReport, bias_test
from carv.world.cameras import WORLD_RANGE

SCHEDULE = NoiseSchedule.scaled_linear()
WEIGHT = weights.sds(SCHEDULE)
BASE = uniform_steps(20, 980)
IW = proportional(BASE, WEIGHT)
PAST = stream(7, "past")


class Picture(nn.Module):
    """A field of 3 size^2 parameters: each entry of a picture is one of them, seen through the camera's azimuth."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.linspace(-1.5, 1.5, 3 * size**2).view(3, size, size))

    def forward(self, cameras: Any, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        azimuth = cameras.azimuth.float().view(-1, 1, 1, 1)
        rgb = torch.sigmoid(self.value * (1 + 0.3 * torch.sin(azimuth)))
        return rgb, torch.ones_like(rgb[:, :1])


def few_images(images: Tensor, bandwidth: float, schedule: NoiseSchedule = SCHEDULE) -> ExactTeacher:
    """The exact teacher of some images; "red" means the first half of them, or the only one."""

    def select(prompt: str) -> Tensor:
        first_half = torch.arange(len(images)) < (len(images) + 1) // 2
        return first_half if prompt.startswith("red") else torch.ones(len(images), dtype=torch.bool)

    return ExactTeacher(images, schedule, select, bandwidth)


def distillation(guidance: float = 3.0, schedule: NoiseSchedule = SCHEDULE) -> SDS:
    images = torch.randn(6, 3, 2, 2, generator=stream(0, "images").generator())
    teacher = few_images(images, 0.3, schedule)
    return SDS(teacher, Picture(), "red", weights.sds(schedule), guidance, WORLD_RANGE, size=2)


def design(
    renders: int = 4, renoise: int = 4, proposal: Any = IW, coupling: str = "per-render", antithetic: bool = False
) -> HierarchicalEstimator:
    sampler = TimestepSampler(BASE, proposal, coupling=COUPLINGS[coupling], antithetic=antithetic, w=WEIGHT)
    return HierarchicalEstimator(sampler, renders, renoise)


def with_a_past(task: Stein, estimator: HierarchicalEstimator | None = None, steps: int = 40) -> Stein:
    """The task with coefficients from some steps of its own, far from 0."""
    estimator = estimator or design()
    for i in range(steps):
        estimator.estimate(task, PAST.child(i))
        task.learn()
    assert bool(task.coefficients.abs().amax(0).gt(0.02).all())
    return task


def compare(ours: HierarchicalEstimator, task: Any, naive_task: Any, name: str, **options: float) -> BiasReport:
    """Ours against 16 naive iid (1, 1) estimates, on streams that share renders."""
    naive = design(16, 1, BASE, "iid")

    def of(estimator: HierarchicalEstimator, task: Any) -> Callable[[Stream], Any]:
        return lambda stream: estimator.estimate(task, stream).gradient

    return bias_test(of(ours, task), of(naive, naive_task), stream(0, name), **({"tolerance": 0.1} | options))


DESIGNS = {
    "(1, 8) weighted strata": design(1, 8),
    "(4, 2) defensive, global strata": design(4, 2, defensive(BASE, IW, 0.3), "global"),
    "(2, 4) antithetic": design(2, 4, antithetic=True),
    "(3, 5) uniform iid": design(3, 5, BASE, "iid"),
}
