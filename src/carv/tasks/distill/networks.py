"""The trained networks of a distillation: copies of the teacher's, as a score and as a generator of one step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carv.rng import Stream
from carv.schedule import NoiseSchedule
from carv.tasks.distill.config import timestep
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.teachers.prediction import to_sample


class Denoiser(nn.Module):
    """A trainable copy of a teacher's network, in float32, that predicts what the teacher's predicts.

    It is in evaluation mode: a class-conditional DiT in training mode would drop labels by torch's global generator.

    Args:
        teacher: whose network, conditions and schedule it has.
        autocast: compute in bfloat16.

    Attributes:
        network: the copy.
        schedule, latent_shape: the teacher's.
    """

    def __init__(self, teacher: DiffusersTeacher, autocast: bool = False) -> None:
        super().__init__()
        self.network: nn.Module = copy.deepcopy(teacher.network).float().eval().requires_grad_(True)
        self._teacher = teacher.with_network(self.network)
        self.schedule: NoiseSchedule = teacher.schedule
        self.latent_shape, self.device, self.autocast = teacher.latent_shape, teacher.device, autocast

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network outputs: eps, x0, v or a flow, `[N, *latent]` in float32, without a learned variance.

        Args:
            z_t: `[N, *latent]`.
            t: `[N]`, in the units of `schedule`.
            condition: N rows.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self._teacher.network_output(z_t, t, condition).float()


def over_draws(module: nn.Module, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A module's output `[R, K, *]` for R renders x K re-noisings: render r's condition stands K times in a row.

    Args:
        module: called with z_t `[N, *latent]`, t `[N]` and a condition of N rows.
        z_t: `[R, K, *latent]`.
        t: `[R, K]`.
        condition: R rows.
    """
    found: Tensor = module(z_t.flatten(0, 1), t.flatten(), condition.repeat_rows(t.shape[1]))
    return found.view(*t.shape, *found.shape[1:])


class OneStepGenerator(nn.Module):
    """z = G(eps, c): a denoiser asked once, at t_G, for x0.

    Args:
        denoiser: its network is what is learned.
        at: t_G in 1000ths; `None` is the schedule's last timestep.

    Raises:
        ValueError: a network that predicts epsilon, at a t_G where alpha(t) = 0.
    """

    def __init__(self, denoiser: Denoiser, at: int | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        schedule = denoiser.schedule
        self.t = timestep(1000 if at is None else at, schedule)
        if schedule.prediction == "epsilon" and float(schedule.alpha(self._times(1))) == 0:
            raise ValueError(f"this teacher predicts epsilon, which says nothing at t = {self.t:g}: set generator_t")

    def forward(self, eps: Tensor, condition: Condition) -> Tensor:
        """z, `[R, *latent]`, differentiable.

        Args:
            eps: `[R, *latent]`, N(0, I).
            condition: R rows.
        """
        t = self._times(len(eps))
        return to_sample(self.denoiser(eps, t, condition), eps, t, self.denoiser.schedule)

    def _times(self, count: int) -> Tensor:
        dtype = torch.float32 if self.denoiser.schedule.continuous else torch.long
        return torch.full((count,), self.t, dtype=dtype, device=self.denoiser.device)


@dataclass(frozen=True)
class Classes:
    """What is generated: prompts, or the classes of a DiT, each with its row of condition.

    Attributes:
        names: C prompts.
        rows: their conditions, C rows.
        null: the unconditional row.
        balance: whether a step's states are spread evenly over the classes.
    """

    names: tuple[str, ...]
    rows: Condition
    null: Condition
    balance: bool = True

    @classmethod
    def of(cls, teacher: DiffusersTeacher, names: Sequence[str] = (), balance: bool = True) -> Classes:
        """The named ones; without names, all classes of a class-conditional teacher.

        Raises:
            ValueError: no names, and the teacher has no classes; a prompt that it does not know.
        """
        if not names:
            names = teacher.classes
            if not names:
                raise ValueError("this teacher has no classes: give the prompts to distil")
        return cls(tuple(names), teacher.encode_prompts(names), teacher.encode_prompts([""]), balance)

    def index(self, stream: Stream, place: int, total: int) -> int:
        """The class of the state at a place among all of a step: uniform over the classes, over all places.

        Balanced, place i of n draws from its own n-th of the classes: floor(C (i + xi) / n).
        """
        xi = float(torch.rand((), generator=stream.child("class").generator(), dtype=torch.float64))
        u = (place + xi) / total if self.balance else xi
        return min(int(u * len(self.names)), len(self.names) - 1)
