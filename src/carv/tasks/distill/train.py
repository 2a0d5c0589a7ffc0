"""DMD2's alternating updates: a plain loop around the estimators of three terms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from carv.adaptive import AdaptiveProposal
from carv.devices import find_device
from carv.estimator import HierarchicalEstimator, learn
from carv.rng import Stream, stream
from carv.tasks.distill.config import DistillConfig
from carv.tasks.distill.data import RealLatents
from carv.tasks.distill.discriminator import Adversarial, Discriminator
from carv.tasks.distill.fake_score import denoising_losses
from carv.tasks.distill.gradient import DMD, Generated
from carv.tasks.distill.networks import Classes, Denoiser, OneStepGenerator
from carv.tasks.distill.ranks import ALONE, Ranks
from carv.tasks.distill.state import gathered, scatter
from carv.teachers.base import Condition
from carv.teachers.diffusers import DiffusersTeacher


def load_teacher(config: DistillConfig) -> DiffusersTeacher:
    """The frozen teacher that the settings name.

    Raises:
        ValueError: not a pipeline that carv reads; no such device.
        ImportError: diffusers is not installed.
    """
    folder: Any = config.teacher
    if folder == "small":
        from carv.teachers.small import small_dit

        folder = small_dit()
    return DiffusersTeacher.from_pretrained(
        folder, device=find_device(config.device), dtype=getattr(torch, config.teacher_dtype)
    )


class Trainer:
    """One run: generator, fake score, discriminator, their optimisers and the number of the next update.

    Every random number is addressed by (seed, update), so a run that was stopped goes on exactly as it would have, and
    the union of several ranks is the run of one process with all their renders.

    Args:
        config: the settings.
        teacher: the frozen teacher, e.g. `load_teacher(config)`.
        real: real latents for the discriminator; needed to train with a gan_weight, not to measure.
        ranks: this process among others.

    Attributes:
        dmd, adversarial: the generator's two terms, each a `TeacherGradient`; no `adversarial` at gan_weight 0.
        estimators: of each term, "generator", "fake" and "gan".
        average: the generator with the running average of its weights.
        steps_done, fake_done: updates of the generator, and of the fake score.
        seconds: spent on updates, "fake" and "generator" apart.
        whole: whether all networks are between two updates; a checkpoint of anything else would be no state of a run.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: DiffusersTeacher,
        real: RealLatents | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.teacher, self.real, self.ranks = config, teacher, real, ranks
        classes = Classes.of(teacher, config.prompts, config.balance)
        self.generator = OneStepGenerator(Denoiser(teacher, config.autocast), config.generator_t)
        self.average = OneStepGenerator(Denoiser(teacher, config.autocast), config.generator_t).requires_grad_(False)
        self.fake = Denoiser(teacher, config.autocast)
        self.dmd = DMD(teacher, self.generator, self.fake, classes, config.guidance_scale, config.weight)
        self.estimators = {
            name: term.build(teacher.schedule, config.renders, config.micro_batch, teacher.device)
            for name, term in config.terms.items()
        }
        self.discriminator: Discriminator | None = None
        self.adversarial: Adversarial | None = None
        if config.gan_weight > 0:
            source = self.fake if config.features == "fake" else teacher
            at = stream(config.seed, "discriminator")
            self.discriminator = Discriminator.of(source, classes.null, at, config.layer)
            self.adversarial = Adversarial(self.dmd, self.discriminator)
        heads = [] if self.discriminator is None else list(self.discriminator.parameters())
        self.fake_parameters = [*self.fake.parameters(), *heads]
        self.optimisers = {
            "generator": _adamw(self.dmd.parameters, config.generator_rate, config.weight_decay),
            "fake": _adamw(self.fake_parameters, config.fake_rate, config.weight_decay),
        }
        self.steps_done = self.fake_done = 0
        self.seconds = {"fake": 0.0, "generator": 0.0}
        self.scalars: dict[str, Tensor] = {}
        self.whole = True

    def step(self) -> None:
        """The fake score's updates that are due, then one of the generator."""
        while self.fake_done < (self.steps_done + 1) * self.config.fake_steps:
            self.fake_update()
        self.generator_update()

    def fake_update(self) -> None:
        """One update of the fake score, and of the discriminator, on latents that the generator makes now.

        Raises:
            ValueError: a loss that is not finite, before anything has changed.
        """
        with self._update("fake"):
            j = self.fake_done % self.config.fake_steps
            here = stream(self.config.seed, "step", self.steps_done, "fake", j)
            with torch.no_grad():
                state = self.dmd.upstream(self._renders("fake", here))
            self.optimisers["fake"].zero_grad()
            self._fake_backward(state, here)
            if self.discriminator is not None:
                self._discriminator_backward(state, here.child("gan"))
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.fake_parameters]
            self._apply("fake", self.fake_parameters, gradients)
            self.fake_done += 1

    def generator_update(self) -> None:
        """One update of the generator: all terms on one upstream state, one backward pass.

        Raises:
            ValueError: a contribution that is not finite or a collapsed weight, before anything has changed.
        """
        with self._update("generator"):
            here, ranks = stream(self.config.seed, "step", self.steps_done), self.ranks
            state = self.dmd.upstream(self._renders("generator", here))
            found = self.estimators["generator"].mean_contribution(
                self.dmd, state, here, rank=ranks.rank, world=ranks.world
            )
            f = found.f_mean
            self.scalars["f_dmd_norm"] = f.norm()
            if self.adversarial is not None:
                gan = self.estimators["gan"].mean_contribution(
                    self.adversarial, state, here.child("gan"), rank=ranks.rank, world=ranks.world
                )
                f = f + self.config.gan_weight * gan.f_mean
                self.scalars["f_gan_norm"] = self.config.gan_weight * gan.f_mean.norm()
            gradients = self.dmd.pull_back(state, f / self.config.renders)
            self._apply("generator", self.dmd.parameters, gradients)
            # A short memory at first, so that the teacher's weights are soon forgotten.
            decay = min(self.config.ema, (1 + self.steps_done) / (10 + self.steps_done))
            torch._foreach_lerp_(list(self.average.parameters()), [p.data for p in self.dmd.parameters], 1 - decay)
            self.steps_done += 1

    @torch.no_grad()
    def generate(self, noise: Tensor, condition: Condition) -> Tensor:
        """Latents `[n, *latent]` of the averaged generator from noise `[n, *latent]` and n rows of condition."""
        found: Tensor = self.average(noise, condition)
        return found

    def _fake_backward(self, state: Generated, here: Stream) -> None:
        config = self.config

        def losses(t: Tensor, noise: Tensor) -> Tensor:
            return denoising_losses(self.fake, self.teacher.schedule, state, t, noise, config.fake_target)

        loss, draws_t, each = self._weighted_backward(self.estimators["fake"], here, losses, 1.0)
        # A gradient's second moment per draw would cost a backward pass each: its loss stands in (Nichol & Dhariwal).
        learn(self.estimators["fake"].sampler, draws_t, each.square(), self.ranks.world)
        self.scalars["fake_loss"] = loss

    def _discriminator_backward(self, state: Generated, here: Stream) -> None:
        discriminator, schedule, factor = self.discriminator, self.teacher.schedule, self.config.discriminator_weight
        assert discriminator is not None
        if self.real is None:
            raise ValueError("the discriminator needs real latents: pass real, or set gan_weight to 0")
        real = self.real.draw(self._renders("gan", here.child("real")), self.dmd.classes)
        total = torch.zeros((), device=self.teacher.device)
        for source, at, is_real in ((state, here, False), (real, here.child("real"), True)):

            def losses(t: Tensor, noise: Tensor, source: Generated = source, is_real: bool = is_real) -> Tensor:
                z_t = schedule.add_noise(source.z[:, None], t, noise)
                return discriminator.losses(z_t, t, source.condition, real=is_real)

            total += self._weighted_backward(self.estimators["gan"], at, losses, factor)[0]
        self.scalars["discriminator_loss"] = total

    def _weighted_backward(
        self, estimator: HierarchicalEstimator, here: Stream, losses: Callable[[Tensor, Tensor], Tensor], factor: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adds the gradient of factor/(R K) sum_rk omega_rk l_rk to `.grad`, for as many draws at once as fit.

        Returns:
            The mean over draws, without factor; t; and the losses `[R, K]`.
        """
        draws, noise = estimator.draw(self.dmd, here, rank=self.ranks.rank, world=self.ranks.world)
        renders, renoise = draws.t.shape
        batch = renoise if self.config.micro_batch is None else max(1, self.config.micro_batch // renders)
        weight, t = draws.weight.to(self.teacher.device), draws.t.to(self.teacher.device)
        each, total = [], torch.zeros((), device=self.teacher.device)
        for k in range(0, renoise, batch):
            part = slice(k, k + batch)
            found = losses(t[:, part], noise[:, part])
            loss = (weight[:, part] * found).sum() / (renders * renoise)
            torch.autograd.backward(factor * loss, inputs=self.fake_parameters)
            each.append(found.detach())
            total += loss.detach()
        return total, draws.t, torch.cat(each, 1)

    def _apply(self, name: str, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.ranks.average(gradients)
        norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
        if not bool(torch.isfinite(norm)):
            raise ValueError(
                f"the {name} update {self.steps_done} has a gradient that is not finite: check the teacher, or lower "
                "the learning rates"
            )
        self.scalars[f"{name}_gradient_norm"] = norm
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimisers[name].step()

    def _renders(self, name: str, here: Stream) -> Any:
        return self.estimators[name].renders_of(here, self.ranks.rank, self.ranks.world)

    @contextmanager
    def _update(self, phase: str) -> Iterator[None]:
        """Times an update. Refused by a ValueError it has changed nothing; stopped by anything else it may have."""
        started, self.whole = self._now(), False
        try:
            yield
        except ValueError:
            self.whole = True
            raise
        self.whole = True
        self.seconds[phase] += self._now() - started

    def _now(self) -> float:
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
        return time.perf_counter()

    def _modules(self) -> dict[str, nn.Module]:
        found = {"generator": self.generator, "average": self.average, "fake": self.fake}
        return found if self.discriminator is None else found | {"head": self.discriminator}

    def _adaptive(self) -> dict[str, AdaptiveProposal]:
        proposals = {name: estimator.sampler.proposal for name, estimator in self.estimators.items()}
        return {name: proposal for name, proposal in proposals.items() if isinstance(proposal, AdaptiveProposal)}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, as named tensors."""
        seconds = torch.tensor([self.seconds["fake"], self.seconds["generator"]], dtype=torch.float64)
        counts = {"done": torch.tensor([self.steps_done, self.fake_done]), "seconds": seconds}
        return gathered(self._modules(), self.optimisers, self._adaptive()) | counts

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        scatter(tensors, self._modules(), self.optimisers, self._adaptive())
        self.steps_done, self.fake_done = (int(n) for n in tensors["done"])
        self.seconds = dict(zip(("fake", "generator"), tensors["seconds"].tolist(), strict=True))


def _adamw(parameters: Sequence[Tensor], rate: float, decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), rate, weight_decay=decay, fused=True)
