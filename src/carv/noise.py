"""The noise of re-noisings by address, so that it depends neither on micro-batches nor on K."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor

from carv.gradient import Renders, TeacherGradient
from carv.rng import Stream

# Noise is addressed in blocks of this many draws, so that it does not depend on the micro-batch, and so that
# the first 8 of 16 re-noisings are those of 8. Even, for antithetic pairs.
_BLOCK = 8


class RenderNoise:
    """eps[r, k] by address: block `k // 8` of render r has a stream of its own."""

    def __init__(self, renders: Renders, task: TeacherGradient, antithetic: bool) -> None:
        self.renders, self.task, self.antithetic = renders, task, antithetic
        self.blocks: dict[int, Tensor] = {}

    def of(self, start: int, stop: int) -> Shaped[Tensor, "R k *latent"]:
        """eps of draws start..stop-1. Blocks before `start` are forgotten: calls go upwards."""
        first, last = start // _BLOCK, (stop - 1) // _BLOCK
        self.blocks = {b: eps for b, eps in self.blocks.items() if b >= first}
        for b in range(first, last + 1):
            if b not in self.blocks:
                self.blocks[b] = torch.stack([self._block(stream, b) for stream in self.renders])
        joined = torch.cat([self.blocks[b] for b in range(first, last + 1)], 1)
        return joined[:, start - first * _BLOCK : stop - first * _BLOCK]

    def _block(self, stream: Stream, block: int) -> Tensor:
        task = self.task
        rng = stream.child("noise", block).generator(task.device)
        distinct = _BLOCK // 2 if self.antithetic else _BLOCK
        eps = torch.randn((distinct, *task.latent_shape), generator=rng, dtype=task.dtype, device=task.device)
        return torch.stack([eps, -eps], 1).flatten(0, 1) if self.antithetic else eps
