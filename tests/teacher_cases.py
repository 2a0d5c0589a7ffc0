"""Schedules, and tensors in float64, for the tests of teachers."""

from __future__ import annotations

import torch
from torch import Tensor

from carv.schedule import NoiseSchedule

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "flow": NoiseSchedule.flow(),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(values.shape + (1,) * (like.ndim - values.ndim))
