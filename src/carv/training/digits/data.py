"""What the networks are shown: the training split, and copies of it that are turned, scaled and moved a little."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from carv.rng import Stream
from carv.world.digits import Digits

TURN, SCALE, SHEAR, MOVE = 8.0, 0.06, 0.08, 0.5
"""The largest change of a copy: degrees, relative size of each axis, shear, pixels."""


@dataclass(frozen=True)
class AugmentedDigits:
    """The pictures that the stages train on, by address.

    Attributes:
        images: [M, 3, S, S] bytes; the first of each `copies` pictures is the real one.
        label: [M] the digit of each.
        copies: made of each picture, itself among them.
    """

    images: UInt8[Tensor, "M 3 S S"]
    label: Int[Tensor, "M"]
    copies: int

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, step: int, count: int, rng: Stream) -> Int[Tensor, "count"]:
        """Places of `count` pictures: every epoch is one permutation of all, cut into batches.

        Args:
            step: its number; the only state there is.
            count: pictures, at most as many as there are.
            rng: the stage's stream.
        """
        each = len(self) // count
        order = torch.randperm(len(self), generator=rng.child("epoch", step // each).generator())
        first = (step % each) * count
        return order[first : first + count]

    def floats(self, which: Int[Tensor, "B"]) -> Float[Tensor, "B 3 S S"]:
        """The pictures at these places in [-1, 1]."""
        return self.images[which].float() / 127.5 - 1


def augmented(digits: Digits, copies: int, rng: Stream) -> AugmentedDigits:
    """Each picture and `copies` - 1 distorted ones of it, side by side.

    A copy is turned by up to 8 degrees, scaled by up to 6% along each axis, sheared by up to 0.08 and moved by up to
    half a pixel, all uniform: less than writers differ. No digit is mirrored.

    Args:
        digits: the real pictures.
        copies: of each, 1 for the real ones alone.
        rng: of the distortions.
    """
    rows = digits.floats().repeat_interleave(copies, dim=0)
    label = digits.label.repeat_interleave(copies)
    turned = distorted(rows, rng)
    real = torch.arange(len(rows)) % copies == 0
    images = torch.where(real[:, None, None, None], rows, turned)
    return AugmentedDigits((255 * images).round().to(torch.uint8), label, copies)


def distorted(pictures: Float[Tensor, "M 3 S S"], rng: Stream) -> Float[Tensor, "M 3 S S"]:
    """Each picture under a random affine map of its own, by bicubic interpolation; values stay in [0, 1]."""
    turn, high, wide, shear, down, right = 2 * torch.rand(6, len(pictures), generator=rng.generator()) - 1
    angle = math.radians(TURN) * turn
    rows = torch.stack([angle.cos(), -angle.sin() + SHEAR * shear, angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)
    rows = rows * torch.stack([1 + SCALE * wide, 1 + SCALE * high], dim=1)[:, None]
    moved = torch.stack([right, down], dim=1)[:, :, None] * (2 * MOVE / pictures.shape[-1])
    grid = functional.affine_grid(torch.cat([rows, moved], dim=2), list(pictures.shape), align_corners=False)
    # Strokes reach the edge: they go on beyond it.
    return functional.grid_sample(pictures, grid, "bicubic", "border", align_corners=False).clamp(0, 1)
