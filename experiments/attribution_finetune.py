"""Fine-tuning a video teacher on some clips, and what that does to the loss of others: what influence predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from attribution_gradients import latent_and_condition
from jaxtyping import Float, Int
from torch import Tensor

from carv.rng import Stream
from carv.tasks.attribution.bank import DrawBank, base_density
from carv.tasks.attribution.loss import training_target
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher
from carv.world.clips import Clips


@dataclass(frozen=True)
class Encoded:
    """N clips of one length as the network sees them.

    Attributes:
        latents: `[N, C, F, h, w]`.
        conditions: N rows.
    """

    latents: Float[Tensor, "N C F h w"]
    conditions: Condition

    @classmethod
    def of(cls, teacher: DiffusersTeacher, clips: Clips) -> Encoded:
        """Clips of one length."""
        latents, conditions = zip(*(latent_and_condition(teacher, clips, i) for i in range(len(clips))), strict=True)
        return cls(torch.stack(latents), Condition.concatenate(conditions))


@dataclass(frozen=True)
class Tuning:
    """How a network is fine-tuned: AdamW without decay, at one rate, on all its parameters.

    Attributes:
        steps: of the optimiser.
        batch: clips in a step, each with a t and a noise of its own; t in strata over the batch.
        rate: of learning.
        shift: of the law of t.
    """

    steps: int
    batch: int
    rate: float
    shift: float


def fine_tune(teacher: DiffusersTeacher, clips: Encoded, chosen: Int[Tensor, " n"], tuning: Tuning, at: Stream) -> None:
    """Fine-tune the teacher's network in place on the chosen clips, in passes over them in random order.

    Args:
        teacher: its network changes; see `kept`.
        clips: to choose from.
        chosen: places of clips.
        tuning: how.
        at: where the order, the timesteps and the noise come from.
    """
    parameters = list(teacher.network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=tuning.rate, weight_decay=0.0)
    base = base_density(teacher.schedule, tuning.shift)
    order = _passes(chosen, tuning.steps * tuning.batch, at.child("order"))
    for step in range(tuning.steps):
        rows = order[step * tuning.batch : (step + 1) * tuning.batch]
        rng = at.child("step", step).generator()
        u = (torch.randperm(tuning.batch, generator=rng) + torch.rand(tuning.batch, generator=rng)) / tuning.batch
        noise = torch.randn(tuning.batch, *clips.latents.shape[1:], generator=rng)
        losses = _losses(teacher, clips.latents[rows], clips.conditions.rows(rows), base.icdf(u.double()), noise)
        optimiser.zero_grad(set_to_none=True)
        losses.mean().backward()
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


@contextmanager
def kept(teacher: DiffusersTeacher) -> Iterator[None]:
    """The network's weights afterwards are those before."""
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    try:
        yield
    finally:
        teacher.network.load_state_dict(before)


@torch.no_grad()
def mean_losses(
    teacher: DiffusersTeacher, clips: Encoded, chosen: Sequence[int], draws: int, seed: int, shift: float
) -> Float[Tensor, " n"]:
    """The training loss of each chosen clip, float64, at draws that are the same for all clips and all networks."""
    bank = DrawBank(seed, "strata", base_density(teacher.schedule, shift))
    t, _ = bank.timesteps(0, draws)
    noise = bank.noises(0, draws, tuple(clips.latents.shape[1:]))
    found = []
    for i in chosen:
        rows = torch.full((draws,), i)
        found.append(_losses(teacher, clips.latents[rows], clips.conditions.rows(rows), t, noise).double().mean())
    return torch.stack(found)


def _losses(
    teacher: DiffusersTeacher, z: Tensor, condition: Condition, t: Tensor, noise: Tensor
) -> Float[Tensor, " n"]:
    z_t = teacher.schedule.add_noise(z, t, noise)
    error = teacher.network_output(z_t, t, condition) - training_target(teacher.schedule, z, t, noise)
    return error.square().flatten(1).mean(1)


def _passes(chosen: Int[Tensor, " n"], count: int, at: Stream) -> Int[Tensor, " count"]:
    rounds = -(-count // len(chosen))
    parts = [chosen[torch.randperm(len(chosen), generator=at.child(i).generator())] for i in range(rounds)]
    return torch.cat(parts)[:count]
