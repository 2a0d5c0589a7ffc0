"""What each phase of a distillation step costs, and what the phases add up to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from distill_setting import Coupling, DistillSetting
from torch import Tensor

from carv.gradient import Renders
from carv.rng import Stream, stream
from carv.sampler import TimestepSampler
from carv.strata import COUPLINGS
from carv.tasks.distill.config import TermEstimator
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import over_draws
from carv.tasks.distill.train import Trainer
from carv.teachers.guidance import Guided
from carv.variance.cost import measure_cost
from carv.variance.values import Value, ratio

RENDERS = 8
PHASE_RENOISE = (1, 16)


def draws(dmd: DMD, renoise: int, coupling: Coupling, estimates: int, at: Stream) -> tuple[Tensor, Tensor]:
    """t `[1, M K]` of M independent estimates of (1, K), and noise `[1, M K, *latent]`."""
    base = TermEstimator().base(dmd.teacher.schedule)
    drawn = TimestepSampler(base, coupling=COUPLINGS[coupling]).sample(estimates, renoise, at.child("t").generator())
    shape = (1, estimates * renoise, *dmd.latent_shape)
    return drawn.t.reshape(1, -1), torch.randn(shape, generator=at.child("noise").generator())


def phase_costs(settings: DistillSetting, trainer: Trainer) -> Mapping[str, Value]:
    """Processor seconds of each phase at R = 8, timed side by side."""
    dmd = trainer.dmd
    renders = Renders(tuple(stream(0, "phases", r) for r in range(RENDERS)), 0, RENDERS)
    state = dmd.upstream(renders)
    f = torch.zeros_like(state.z)
    steps: dict[str, Callable[[], object]] = {
        "generator forward": lambda: dmd.upstream(renders),
        "generator backward": lambda: dmd.pull_back(state, f, True),
        "fake-score update": trainer.fake_update,
    }
    for k in PHASE_RENOISE:
        t, noise = draws(dmd, k, "iid", RENDERS, stream(0, "phases", "draws", k))
        t, noise = t.view(RENDERS, k), noise[0].unflatten(0, (RENDERS, k))
        steps[f"teacher, K = {k}"] = lambda t=t, noise=noise: teacher_call(dmd, state, t, noise)
        steps[f"fake score, K = {k}"] = lambda t=t, noise=noise: fake_call(dmd, state, t, noise)
        if (gan := trainer.adversarial) is not None:
            steps[f"discriminator, K = {k}"] = lambda gan=gan, t=t, noise=noise: gan.contribution(state, t, noise)
    steps["AdamW of the generator"] = optimiser_step(trainer)
    timed = measure_cost(steps, stream(0, "order"), repetitions=settings.timings, clock=time.process_time)
    return {name: cost.seconds for name, cost in timed.items()}


def teacher_call(dmd: DMD, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
    """The guided teacher at R x K draws."""
    schedule = dmd.teacher.schedule
    guided = Guided(dmd.teacher, dmd.guidance_scale, state.condition, dmd.classes.null)
    return guided(schedule.add_noise(state.z.detach()[:, None], t, noise), t)


@torch.no_grad()
def fake_call(dmd: DMD, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
    """The fake score at R x K draws."""
    z_t = dmd.teacher.schedule.add_noise(state.z[:, None], t, noise)
    return over_draws(dmd.fake, z_t, t, state.condition)


def optimiser_step(trainer: Trainer) -> Callable[[], object]:
    """AdamW on a copy of the generator's weights: a graph that is pulled back again needs the weights it had."""
    copies = [parameter.detach().clone().requires_grad_() for parameter in trainer.dmd.parameters]
    for one in copies:
        one.grad = torch.zeros_like(one)
    like = trainer.optimisers["generator"].defaults
    return torch.optim.AdamW(copies, like["lr"], weight_decay=like["weight_decay"], fused=like["fused"]).step


@dataclass(frozen=True)
class Costs:
    """What the phases add up to, in seconds of one core at R = 8.

    Attributes:
        upstream: of one generator input: forward and backward of the generator.
        draw: of one (t, eps'): guided teacher and fake score, the slope between K = 1 and K = 16.
        fixed: of a step, whatever K: everything but draws and fake-score updates.
        fake: of the fake-score updates of a step.
    """

    upstream: Value
    draw: Value
    fixed: Value
    fake: Value

    @classmethod
    def of(cls, phases: Mapping[str, Value], fake_steps: int) -> Costs:
        """From the phases."""
        low, high = PHASE_RENOISE
        upstream = total([phases["generator forward"], phases["generator backward"]])
        slope = [
            total([phases[f"{network}, K = {high}"], phases[f"{network}, K = {low}"].scaled(-1)])
            for network in ("teacher", "fake score")
        ]
        draw = total(slope).scaled(1 / (RENDERS * (high - low)))
        at_one = [
            phases[f"{network}, K = {low}"]
            for network in ("teacher", "fake score", "discriminator")
            if f"{network}, K = {low}" in phases
        ]
        fixed = total([upstream, phases["AdamW of the generator"], *at_one, draw.scaled(-RENDERS * low)])
        return cls(upstream.scaled(1 / RENDERS), draw, fixed, phases["fake-score update"].scaled(fake_steps))

    def step(self, renoise: int) -> Value:
        """Of a whole step (8, K), with its fake-score updates."""
        return total([self.fixed, self.fake, self.draw.scaled(RENDERS * renoise)])

    @property
    def ratio(self) -> Value:
        """Upstream over draw, the generator alone."""
        return ratio(self.upstream, self.draw)

    @property
    def ratio_with_fake(self) -> Value:
        """(A step's time that K does not touch, fake-score updates included, per input) over draw."""
        return ratio(total([self.fixed, self.fake]).scaled(1 / RENDERS), self.draw)


def total(parts: Sequence[Value]) -> Value:
    """A sum of independent numbers."""
    return Value(sum(part.value for part in parts), math.hypot(*(part.error for part in parts)))
