"""What tests compare: gradients as rows, their cosines, and how far a mean is from its value in standard errors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in gradients.values()], 1)


def cosines(vectors: Tensor) -> Tensor:
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return unit @ unit.T


def z_score(samples, value):
    samples = np.asarray(samples)
    return (samples.mean() - value) / (samples.std(ddof=1) / len(samples) ** 0.5)
