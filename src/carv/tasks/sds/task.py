"""Score distillation as a `TeacherGradient`: render and encode upstream, `w(t) (eps_hat - eps)` downstream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from carv.gradient import Gradient, Renders
from carv.tasks.sds.field import Field
from carv.teachers.base import Condition, Teacher
from carv.teachers.guidance import Guided
from carv.weights import Weight
from carv.world.cameras import VIEW_WORDS, CameraRange, Cameras

Encoder = Callable[[Tensor], Tensor]
"""Pictures `[R, 3, H, W]` in [0, 1] -> latents `[R, *latent_shape]`, differentiable."""


@dataclass(frozen=True)
class RenderState:
    """R renders, with their graph.

    Attributes:
        cameras: what they were rendered from.
        rgb: `[R, 3, H, W]` in [0, 1].
        z: `[R, *latent]`, the encoded pictures.
        guided: the teacher, conditioned for each render.
    """

    cameras: Cameras
    rgb: Tensor
    z: Tensor
    guided: Guided


class SDS:
    """u_SDS(theta) = E_camera E_t E_eps[ w(t) (eps_hat(z_t, t, c) - eps) dz/dtheta ]       (Eq. 8, 42)

    The teacher's own Jacobian is left out, as usual. A prompt gets the view word of its camera ("a red chair,
    side view"), as in DreamFusion, unless it has one already.

    Args:
        teacher: the frozen teacher.
        field: what is optimised.
        prompt: what the object should be.
        weight: w(t).
        guidance_scale: s of `e_u + s (e_c - e_u)`.
        cameras: what cameras are drawn from.
        size: pixels along each side of a render.
        encode: pictures to latents; `None` averages pixels down to the teacher's size, in [-1, 1].
        negative: a negative prompt; "" is the unconditional one.
        stratify_azimuth: cover the circle evenly with a step's renders (threestudio's default).

    Raises:
        ValueError: a prompt that the teacher does not know (the message lists what it knows).
    """

    def __init__(
        self,
        teacher: Teacher,
        field: Field,
        prompt: str,
        weight: Weight,
        guidance_scale: float,
        cameras: CameraRange,
        size: int = 64,
        encode: Encoder | None = None,
        negative: str = "",
        stratify_azimuth: bool = True,
    ) -> None:
        self.teacher, self.field, self.weight, self.size = teacher, field, weight, size
        self.guidance_scale, self.cameras, self.stratify_azimuth = guidance_scale, cameras, stratify_azimuth
        self.latent_shape = teacher.latent_shape
        self.encode = encode or to_pixels(teacher.latent_shape[-1])
        self.encoder_calls = 0 if encode is None else 1
        self.parameters = [parameter for parameter in field.parameters() if parameter.requires_grad]
        self.device, self.dtype = self.parameters[0].device, self.parameters[0].dtype
        self._conditions = teacher.encode_prompts([_with_view(prompt, word) for word in VIEW_WORDS])
        self._negative: Condition = teacher.encode_prompts([negative])

    def upstream(self, renders: Renders) -> RenderState:
        cameras = self.cameras.sample(renders, self.stratify_azimuth)
        pictures = [
            # One call for each render: its samples along the rays come from its own stream.
            self.field(cameras[i : i + 1], self.size, stream.child("rays").generator())[0]
            for i, stream in enumerate(renders)
        ]
        rgb = torch.cat(pictures)
        views = torch.tensor([VIEW_WORDS.index(word) for word in cameras.words()], device=self.device)
        guided = Guided(self.teacher, self.guidance_scale, self._conditions.rows(views), self._negative)
        return RenderState(cameras, rgb, self.encode(rgb), guided)

    def contribution(self, state: RenderState, t: Tensor, noise: Tensor) -> Tensor:
        z_t = self.teacher.schedule.add_noise(state.z[:, None], t, noise)
        w = self.weight.unchecked(t).to(noise.dtype)
        return w.view(*t.shape, *[1] * len(self.latent_shape)) * (state.guided(z_t, t) - noise)

    def pull_back(self, state: RenderState, f: Tensor, retain: bool = False) -> Gradient:
        return torch.autograd.grad(state.z, self.parameters, f, retain_graph=retain)


def to_pixels(size: int) -> Encoder:
    """The encoder of a teacher in pixel space: pictures averaged down to `size`, from [0, 1] to [-1, 1]."""

    def encode(rgb: Tensor) -> Tensor:
        small = rgb if rgb.shape[-1] == size else functional.interpolate(rgb, size=(size, size), mode="area")
        return 2 * small - 1

    return encode


def _with_view(prompt: str, word: str) -> str:
    return prompt if " view" in prompt else f"{prompt}, {word} view"
