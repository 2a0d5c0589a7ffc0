"""Stage 2: the autoencoder on whole clips, with an eye on the digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from carv.rng import Stream
from carv.training.autoencoder import decoded_sample
from carv.training.clips.autoencoder import EDGES, KL, SQUARES
from carv.training.clips.latents import draw_batch
from carv.world.clips import Clips

_DIGIT = 10.0  # how much more a pixel near the digit weighs


@dataclass(frozen=True)
class FinishLoss:
    """w (|e| + 2 e^2 + |de|/2) + 1e-4 KL, each a mean over entries, with the error e = x' - x of whole clips.

    w is 11 times as large within a pixel of the digit as elsewhere, with mean 1: digits are a tenth of the pixels,
    and backgrounds are learned long before them. What comes after the ninth frame is seen here for the first time:
    stage 1 is cheaper, and leaves it poor.

    Attributes:
        vae: the autoencoder.
        clips: to draw from.
        batch: clips in a step, all of one length.
        rng: the stage's stream.
        device: where the network is.
        bf16: autocast.
    """

    vae: Any
    clips: Clips
    batch: int
    rng: Stream
    device: torch.device
    bf16: bool

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        places = draw_batch(self.clips.lengths, self.batch, rng)
        videos = 2 * torch.stack([self.clips.video(i) for i in places]).to(self.device) - 1
        weight = digit_weights(torch.stack([self.clips.masks[i] for i in places])).to(self.device)
        decoded, divergence = decoded_sample(self.vae, videos, rng.child("noise"), self.bf16)
        error = decoded - videos
        pixels: Tensor = (weight * (error.abs() + SQUARES * error.square())).mean()
        across: Tensor = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
        down: Tensor = (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
        return pixels + EDGES * (across + down) + KL * divergence


def digit_weights(masks: Tensor) -> Tensor:
    """[B, 1, F, H, W] of mean 1 from masks [B, F, H, W]: 11 within a pixel of the mask, to 1 elsewhere."""
    near = functional.max_pool2d(masks.float(), 3, 1, 1)[:, None]
    weight: Tensor = 1 + _DIGIT * near
    return weight / weight.mean()
