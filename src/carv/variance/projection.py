"""Unbiased random projections: inner products of vectors too long to keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from carv.rng import Stream

_CHUNK = 1 << 16  # coordinates that share one stream
_KEPT_CHUNKS = 16  # whose signs and buckets are kept in memory


@dataclass(frozen=True)
class Projection:
    """J independent count sketches of d/J buckets each (Charikar, Chen & Farach-Colton 2002).

        (P_j a)_h = sum over coordinates i in bucket h of s_ji a_i,     s = +-1,     <a, b> ~ 1/J sum_j <P_j a, P_j b>

    Unbiased: E<P_j a, P_j b> = <a, b>. The variance of the mean over j is about (|a|^2 |b|^2 + <a, b>^2) / d. It is
    common to all inner products and all renders, so that a jackknife over renders does not see it: that is what the
    independent blocks are for. Signs and buckets are addressed by chunk of coordinates; of long vectors most are
    drawn anew at each call, so that they are never all in memory.

    Attributes:
        dim: d, the length of what is kept of each vector.
        blocks: J >= 2, a divisor of d.
        stream: where signs and buckets come from.

    Raises:
        ValueError: blocks below 2, or not a divisor of dim.
    """

    dim: int
    blocks: int
    stream: Stream

    def __post_init__(self) -> None:
        if self.blocks < 2 or self.dim < self.blocks or self.dim % self.blocks:
            raise ValueError(f"a projection needs dim = a multiple of blocks >= 2, got {self.dim} and {self.blocks}")
        object.__setattr__(self, "_kept", {})

    def __call__(self, vectors: Float[Tensor, "n D"]) -> Float[Tensor, "n J d"]:
        """P_j of each vector, `[n, J, d/J]`: the mean over j of inner products is unbiased."""
        n, length = vectors.shape
        width = self.dim // self.blocks
        out = torch.zeros((self.blocks, width, n), dtype=vectors.dtype, device=vectors.device)
        for first in range(0, length, _CHUNK):
            part = vectors[:, first : first + _CHUNK].T
            bucket, sign = self._hash(first // _CHUNK, len(part), vectors.device)
            for j in range(self.blocks):
                out[j].index_add_(0, bucket[j], part * sign[j, :, None])
        return out.permute(2, 0, 1)

    def _hash(self, chunk: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = vars(self)["_kept"]
        if (chunk, length) in kept:
            return kept[chunk, length]
        rng = self.stream.child("chunk", chunk).generator()
        shape = (self.blocks, length)
        bucket = torch.randint(self.dim // self.blocks, shape, generator=rng, dtype=torch.int32).to(device)
        sign = (2 * torch.randint(2, shape, generator=rng, dtype=torch.int8) - 1).to(device)
        if chunk < _KEPT_CHUNKS:
            kept[chunk, length] = bucket, sign
        return bucket, sign
