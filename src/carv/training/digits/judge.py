"""Stage 3: the judge, a classifier of the same pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from carv.judge.model import JudgeConfig, JudgeNetwork
from carv.rng import Stream
from carv.training.digits.config import DigitsSizes
from carv.training.digits.data import AugmentedDigits, distorted
from carv.world.digits import CLASSES

_NOISE = 0.05  # the largest standard deviation; pictures are in [0, 1]
_SMOOTHING = 0.05


def judge_config(sizes: DigitsSizes) -> JudgeConfig:
    """The shape of the judge."""
    return JudgeConfig(sizes.image, CLASSES, sizes.judge, sizes.features)


@dataclass(frozen=True)
class JudgeLoss:
    """Cross-entropy with 5% label smoothing, on pictures distorted anew in each step, half of them noisy.

    The noise keeps the judge from leaning on what only clean pictures have; samples never are that clean.

    Attributes:
        network: to train.
        pictures: to draw from.
        batch: pictures in a step.
        rng: the stage's stream.
        device: where the network is.
    """

    network: JudgeNetwork
    pictures: AugmentedDigits
    batch: int
    rng: Stream
    device: torch.device

    def __call__(self, step: int) -> Tensor:
        """The loss of a step."""
        rng = self.rng.child("step", step)
        which = self.pictures.batch(step, self.batch, self.rng)
        clean = (self.pictures.floats(which) + 1) / 2
        shown = noisy(distorted(clean, rng.child("distort")), rng.child("noise"))
        logits = self.network(shown.to(self.device))
        return functional.cross_entropy(logits, self.pictures.label[which].to(self.device), label_smoothing=_SMOOTHING)


def noisy(pictures: Float[Tensor, "B 3 S S"], rng: Stream) -> Float[Tensor, "B 3 S S"]:
    """A random half of the pictures with grey noise of up to 0.05, still in [0, 1]."""
    generator = rng.generator()
    strength = _NOISE * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    half = torch.rand(len(pictures), 1, 1, 1, generator=generator) < 0.5
    noise = torch.randn(len(pictures), 1, *pictures.shape[2:], generator=generator)
    return torch.where(half, pictures + strength * noise, pictures).clamp(0, 1)
