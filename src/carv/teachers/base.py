"""What a frozen teacher is: something that predicts the noise in z_t under one or several conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from carv.schedule import NoiseSchedule


@dataclass(frozen=True)
class Condition:
    """What a teacher is conditioned on, N rows of it: class labels, text embeddings, ...

    Attributes:
        tensors: named tensors, each with a leading dimension of the same length N.
    """

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if not sizes or any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) != 1:
            raise ValueError(f"every tensor of a condition needs the same leading dimension N, got shapes {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def repeat_rows(self, times: int) -> Condition:
        """Each row `times` in a row: the layout of R renders x K re-noisings flattened to R K."""
        return Condition({name: tensor.repeat_interleave(times, 0) for name, tensor in self.tensors.items()})

    def rows(self, index: Tensor) -> Condition:
        """The rows at `index`, an integer tensor."""
        return Condition({name: tensor[index] for name, tensor in self.tensors.items()})

    @staticmethod
    def concatenate(parts: Sequence[Condition]) -> Condition:
        """All rows of all parts, in order."""
        return Condition({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


@runtime_checkable
class Teacher(Protocol):
    """A frozen diffusion teacher. Its output is always converted to epsilon, at its own edge.

    Attributes:
        schedule: its noise schedule.
        latent_shape: the shape of one latent z, without batch.
    """

    schedule: NoiseSchedule
    latent_shape: tuple[int, ...]

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """One row of condition for each prompt; the empty prompt is the unconditional row.

        Raises:
            ValueError: a prompt that the teacher cannot understand, saying what it knows.
        """
        ...

    def predict_noise(self, z_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> list[Tensor]:
        """eps_hat(z_t, t, c) for each of several conditions c, without gradients.

        Args:
            z_t: `[N, *latent_shape]`.
            t: `[N]`, in the units of `schedule`.
            conditions: each with N rows. They are asked for together so that a network can batch them
                and a closed form can share its work.
        Returns:
            One `[N, *latent_shape]` tensor for each condition.
        """
        ...
