"""Text-to-3D by score distillation: a plain loop around the estimator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carv.adaptive import AdaptiveProposal
from carv.devices import find_device
from carv.estimator import Estimate
from carv.rng import stream
from carv.tasks.sds.config import SDSConfig
from carv.tasks.sds.field import Field
from carv.tasks.sds.task import SDS
from carv.teachers.base import Teacher
from carv.teachers.exact import ExactTeacher
from carv.teachers.small import small_pipeline
from carv.weights import by_name
from carv.world.dataset import load_world

_NOISE_MEMORY = 0.9
_STEPS_FOR_NOISE = 10


def world_teacher(config: SDSConfig, say: Callable[[str], None] | None = None) -> ExactTeacher:
    """The exact teacher of carv's own 3D world, whose pictures are rendered at first use.

    Args:
        config: the schedule and the bandwidth are taken from it.
        say: told about the rendering while it goes on.
    """

    def progress(done: int, total: int) -> None:
        if say is not None and (done == total or done % 4 == 0):
            say(f"rendering the pictures of carv's 3D world, once: {done} of {total} shapes")

    world = load_world(progress=progress)
    images = world.images_float().to(find_device(config.device))
    return ExactTeacher(images, config.schedule, world.mask, bandwidth=config.bandwidth)


def load_teacher(config: SDSConfig, say: Callable[[str], None] | None = None) -> Teacher:
    """The teacher that the settings name.

    Args:
        config: the settings.
        say: told about what takes long.

    Raises:
        ValueError: not a pipeline that carv reads; no such device.
        ImportError: diffusers or transformers is not installed.
    """
    if config.teacher == "world":
        if config.teacher_dtype != "float32":
            raise ValueError(f"the exact teacher computes in float32, not in {config.teacher_dtype}")
        return world_teacher(config, say)
    from carv.teachers.diffusers import DiffusersTeacher  # heavy, and an extra

    folder = small_pipeline() if config.teacher == "small" else config.teacher
    return DiffusersTeacher.from_pretrained(
        folder, device=find_device(config.device), dtype=getattr(torch, config.teacher_dtype), vae_dtype=torch.float32
    )


@dataclass
class GradientNoise:
    """The share of |g|^2 that is noise, from successive steps: 1 - <g_i, g_{i-1}> / |g|^2, smoothed.

    Draws of different steps are independent, so the inner product of neighbours estimates |mu|^2 without bias
    while mu changes little, for any coupling; per-draw variances would overstate a stratified estimate's.
    """

    previous: Tensor | None = None
    signal: Tensor | float = 0.0
    total: Tensor | float = 0.0
    steps: int = 0

    def update(self, gradient: Tensor) -> None:
        """Take in the flat gradient of the next step. No device sync."""
        if self.previous is not None:
            self.signal = _NOISE_MEMORY * self.signal + (1 - _NOISE_MEMORY) * (gradient @ self.previous)
            self.total = _NOISE_MEMORY * self.total + (1 - _NOISE_MEMORY) * (gradient @ gradient)
            self.steps += 1
        self.previous = gradient

    @property
    def share(self) -> float | None:
        """Between 0 and 1; `None` until it means something."""
        if self.steps < _STEPS_FOR_NOISE or self.total == 0:
            return None
        return min(1.0, max(0.0, 1 - float(self.signal) / float(self.total)))


class Trainer:
    """One run: the field, the task, the estimator, the optimiser and the number of the next step.

    Every random number is addressed by (seed, step), so a run that was stopped goes on exactly as it would have.

    Args:
        config: the settings.
        teacher: the frozen teacher, e.g. `load_teacher(config)`. One with an `encode` gets pictures through it, others
            at their own size in [-1, 1].
    """

    def __init__(self, config: SDSConfig, teacher: Teacher) -> None:
        self.config = config
        self.field: Field = config.build_field()
        weight = by_name(config.weight, teacher.schedule)
        self.task = SDS(
            teacher,
            self.field,
            config.prompt,
            weight,
            config.scale,
            config.camera_range,
            config.size,
            encode=getattr(teacher, "encode", None),
            negative=config.negative,
            stratify_azimuth=config.stratify_azimuth,
        )
        self.estimator = config.estimator.build(weight, teacher.schedule, self.task.device)
        groups = self.field.parameter_groups()
        self.rates = [config.rates[name] for name in groups]
        self.optimiser = torch.optim.Adam(
            [{"params": group} for group in groups.values()], betas=(0.9, 0.99), eps=1e-15
        )
        self.steps_done = 0
        self.noise = GradientNoise()

    def step(self) -> Estimate:
        """One optimiser step."""
        here = stream(self.config.seed, "step", self.steps_done)
        estimate = self.estimator.estimate(self.task, here)
        self.noise.update(torch.cat([gradient.flatten() for gradient in estimate.gradient]))
        estimate.assign_to(self.task.parameters)
        self._regularise(estimate.f_mean[0].numel(), here.child("regulariser").generator())
        self._set_rates()
        self.optimiser.step()
        self.steps_done += 1
        self.field.at_step(self.steps_done)
        return estimate

    def _set_rates(self) -> None:
        """Cosine decay, a function of the step alone so that a resumed run has the same rates."""
        config = self.config
        done = min(self.steps_done / config.steps, 1.0)
        share = config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * done)) / 2
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = share * rate

    def _regularise(self, latent_entries: int, generator: torch.Generator) -> None:
        """Add the gradient of the field's regulariser."""
        loss = self.field.regulariser(self.config.smoothness, self.config.sparsity, generator)
        torch.autograd.backward(latent_entries * loss)  # adds to .grad

    def state_dict(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, as named tensors."""
        tensors = {f"field.{name}": value for name, value in self.field.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        if isinstance(self.estimator.sampler.proposal, AdaptiveProposal):
            learned = self.estimator.sampler.proposal.state_dict()
            tensors |= {f"adaptive.{name}": value for name, value in learned.items()}
        return tensors | {"steps_done": torch.tensor(self.steps_done)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.field.load_state_dict(_below("field.", tensors))
        moments: dict[int, Any] = {}
        for name, value in _below("adam.", tensors).items():
            i, moment = name.split(".")
            moments.setdefault(int(i), {})[moment] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        if isinstance(self.estimator.sampler.proposal, AdaptiveProposal):
            self.estimator.sampler.proposal.load_state_dict(_below("adaptive.", tensors))
        self.steps_done = int(tensors["steps_done"])
        self.field.at_step(self.steps_done)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
