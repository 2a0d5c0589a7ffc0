"""Agreement of a field with the prompt's true object, over views that the teacher's pictures do not contain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carv.extras import require
from carv.tasks.sds.field import Field
from carv.world.cameras import held_out_cameras
from carv.world.captions import HELD_OUT, parse_object
from carv.world.render import render_object


@dataclass(frozen=True)
class Agreement:
    """PSNR (dB) and SSIM of each held-out view, `[views]`."""

    psnr: Tensor
    ssim: Tensor

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Mean and standard deviation over the views, for records."""
        pairs = (("psnr", self.psnr), ("ssim", self.ssim))
        return {name: {"mean": float(x.mean()), "std_over_views": float(x.std())} for name, x in pairs}


class TrueObject:
    """The object that a prompt describes, seen from a ring of held-out cameras.

    Args:
        prompt: with a colour and a shape; a view word is ignored.
        views: how many cameras.
        size: pixels along each side.

    Raises:
        ValueError: the prompt does not describe one object of the world.
    """

    def __init__(self, prompt: str, views: int = 8, size: int = 64) -> None:
        self.size = size
        self.cameras = held_out_cameras(views)
        self.pictures = render_object(prompt, self.cameras, size)

    def render(self, field: Field) -> Tensor:
        """The field from the same cameras, `[views, 3, size, size]`, on the CPU."""
        with torch.no_grad():
            rgb: Tensor = field(self.cameras, self.size)[0]
        return rgb.cpu()

    def agreement(self, field: Field) -> Agreement:
        """PSNR and SSIM of the field against the object."""
        return self.score(self.render(field))

    def score(self, rendered: Tensor) -> Agreement:
        """PSNR and SSIM of pictures that `render` gave, by torchmetrics."""
        metrics = require("torchmetrics.functional.image", "sds")
        psnr = metrics.peak_signal_noise_ratio(rendered, self.pictures, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = metrics.structural_similarity_index_measure(rendered, self.pictures, data_range=1.0, reduction="none")
        return Agreement(psnr, ssim)


def describes_one_object(prompt: str) -> bool:
    """Whether a prompt names a colour and a shape of the world, so that there is a true object to compare with."""
    return parse_object(prompt) is not None


def held_out(prompt: str) -> bool | None:
    """Whether carv's small Stable Diffusion never saw the prompt's object in training; None if the world has none."""
    described = parse_object(prompt)
    return None if described is None else (described.shape, described.colour) in HELD_OUT
