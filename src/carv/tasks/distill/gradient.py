"""Distribution matching as a `TeacherGradient`: generate upstream, compare two denoisers downstream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carv.gradient import Gradient, Renders
from carv.tasks.distill.config import WeightName
from carv.tasks.distill.networks import Classes, over_draws
from carv.teachers.base import Condition, Teacher
from carv.teachers.guidance import Guided
from carv.teachers.prediction import to_sample

_COLLAPSED = 1e-6
"""mean |mu_real - z| below which its inverse is no weight any more."""


@dataclass(frozen=True)
class Generated:
    """R generated latents, with their graph where they are to be differentiated.

    Attributes:
        z: `[R, *latent]`.
        condition: R rows.
        label: `[R]`, the place of each class in `Classes.names`.
    """

    z: Tensor
    condition: Condition
    label: Tensor


class DMD:
    """u_DMD(theta) = E_{eps,c} E_t E_eps'[ w (mu_fake(z_t, t, c) - mu_real(z_t, t, c)) / (C S) . dG(eps, c)/dtheta ]

        z = G(eps, c),   z_t = alpha z + sigma eps',   w = 1 / mean_{C S} |mu_real(z_t, t, c) - z|      (Eq. 10, 52, 53)

    mu_real is guided, mu_fake is not. w belongs to one draw (t, eps') of one z, so it is a part of f: pooled over K it
    would be another objective. Divided by C S, the number of a latent's entries, f is the gradient of the public
    codes' loss 0.5 mean (z - sg(z - w (mu_fake - mu_real)))^2, mean over entries; their 1e-6 beside the mean of w is
    left out. Descending along u_DMD moves the generator towards the teacher.

    Args:
        teacher: the frozen teacher.
        generator: G, a `OneStepGenerator`, or any module called with eps `[R, *latent]` and R rows of condition.
        fake: mu_fake's network, a `Denoiser` of the generator's latents, or any module called with z_t `[N, *latent]`,
            t `[N]` and N rows of condition that predicts what the teacher's network predicts.
        classes: c's law.
        guidance_scale: s of `e_u + s (e_c - e_u)`; the paper's omega is s - 1 (Eq. 56).
        weight: "dmd" is w as above; "paper" is alpha(t) w, which Eqs. 10 and 53 together say and no public code has.

    Attributes:
        parameters: of the generator.

    Source:
        Yin et al. 2024 (arXiv 2311.18828, 2405.14867); App. B.3.2 of the paper.
    """

    def __init__(
        self,
        teacher: Teacher,
        generator: nn.Module,
        fake: nn.Module,
        classes: Classes,
        guidance_scale: float = 1.0,
        weight: WeightName = "dmd",
    ) -> None:
        self.teacher, self.generator, self.fake, self.classes = teacher, generator, fake, classes
        self.guidance_scale, self.weight = guidance_scale, weight
        self.latent_shape = teacher.latent_shape
        self.parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
        self.device, self.dtype = self.parameters[0].device, torch.float32

    def upstream(self, renders: Renders) -> Generated:
        places = range(renders.first, renders.first + len(renders))
        label = torch.tensor(
            [self.classes.index(stream, place, renders.total) for stream, place in zip(renders, places, strict=True)],
            device=self.device,
        )
        eps = torch.stack(
            [
                torch.randn(
                    self.latent_shape,
                    generator=stream.child("input").generator(self.device),
                    dtype=self.dtype,
                    device=self.device,
                )
                for stream in renders
            ]
        )
        condition = self.classes.rows.rows(label)
        return Generated(self.generator(eps, condition), condition, label)

    def denoised(self, state: Generated, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """mu_real and mu_fake `[R, K, *latent]` at (t, eps'), without gradients.

        Args:
            state: R generated latents.
            t: `[R, K]`.
            noise: `[R, K, *latent]`, eps'.
        """
        with torch.no_grad():
            schedule = self.teacher.schedule
            z_t = schedule.add_noise(state.z[:, None], t, noise)
            negative = None if self.guidance_scale == 1 else self.classes.null
            guided = Guided(self.teacher, self.guidance_scale, state.condition, negative)
            real = to_sample(guided(z_t, t), z_t, t, schedule, "epsilon")
            return real, to_sample(over_draws(self.fake, z_t, t, state.condition), z_t, t, schedule)

    def contribution(self, state: Generated, t: Tensor, noise: Tensor) -> Tensor:
        real, fake = self.denoised(state, t, noise)
        gap = (real - state.z.detach()[:, None]).abs().flatten(2).mean(-1)
        _refuse_collapse(gap, t)
        w = 1 / gap
        if self.weight == "paper":
            w = w * self.teacher.schedule.alpha(t, w.dtype)
        entries = real[0, 0].numel()
        return w.view(*t.shape, *[1] * len(self.latent_shape)) * (fake - real) / entries

    def pull_back(self, state: Generated, f: Tensor, retain: bool = False) -> Gradient:
        return torch.autograd.grad(
            state.z, self.parameters, f, retain_graph=retain, allow_unused=True, materialize_grads=True
        )


def _refuse_collapse(gap: Tensor, t: Tensor) -> None:
    """Raise where mu_real = z almost: the weight 1/gap would be all that is left of the gradient."""
    low = gap < _COLLAPSED
    if bool(low.any()):
        r, k = (int(i) for i in low.nonzero()[0])
        raise ValueError(
            f"the weight of distribution matching collapsed: mean |mu_real - z| is {gap[r, k].item():.1e} at "
            f"t = {t[r, k].item():g} (latent {r}, re-noising {k}), so its inverse is no weight. The teacher gives back "
            "what it is shown there: draw larger t, or check the teacher"
        )
