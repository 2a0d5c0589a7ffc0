"""Random projections of gradients to a few hundred dimensions, made as they are used and never kept whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from carv.rng import Stream, stream

ProjectorKind = Literal["sparse", "rademacher", "gaussian", "identity"]

_CHUNK = 1 << 14  # coordinates that share one stream
_KEPT_BYTES = 128 * 2**20  # of tables of "sparse" that are kept between calls


@dataclass(frozen=True)
class Projector:
    """P with E <P a, P b> = <a, b>, applied tensor by tensor and chunk by chunk.

        P a = sum over tensors and their chunks c of P_c a_c,    Var <P a, P b> <= (|a|^2 |b|^2 + <a, b>^2) / k

    ==========  ========================================================================================
    kind        P_c, `[k, 16384]`
    ==========  ========================================================================================
    sparse      `nonzeros` entries +-1/sqrt(nonzeros) in each column, one in each block of k / nonzeros
                rows (Kane & Nelson 2014): the variance of the dense ones, for nonzeros / k of the work
    rademacher  entries +-1/sqrt(k)
    gaussian    entries N(0, 1/k)
    identity    none: the vectors themselves, zeros behind; for tests and for few parameters
    ==========  ========================================================================================

    Each chunk of each tensor has a stream of its own, named by (seed, tensor, chunk), so that the result is the same
    for any micro-batch and machine, up to the order of sums. What is held does not grow with the number of
    parameters: a dense chunk takes 16384 k floats (32 MiB at k = 512); of sparse ones at most 128 MiB are kept.

    Attributes:
        dimensions: k. Of "identity", the number of all parameters, or anything above it.
        kind: see the table.
        seed: of P. Vectors of different seeds cannot be compared.
        nonzeros: in a column of "sparse"; a divisor of k.

    Raises:
        ValueError: an unknown kind, k < 1, or nonzeros that do not divide k.

    Example:
        >>> project = Projector(512)
        >>> project({"weight": torch.ones(3, 20, 20), "bias": torch.ones(3, 20)}).shape
        torch.Size([3, 512])
    """

    dimensions: int = 512
    kind: ProjectorKind = "sparse"
    seed: int = 0
    nonzeros: int = 4

    def __post_init__(self) -> None:
        if self.kind not in get_args(ProjectorKind):
            raise ValueError(f"unknown projector {self.kind!r}; there are {', '.join(get_args(ProjectorKind))}")
        if self.dimensions < 1 or self.nonzeros < 1:
            raise ValueError(f"a projector needs dimensions and nonzeros >= 1, got {self.dimensions}, {self.nonzeros}")
        if self.kind == "sparse" and self.dimensions % self.nonzeros:
            raise ValueError(f"nonzeros must divide the {self.dimensions} dimensions, got {self.nonzeros}")
        object.__setattr__(self, "_kept", {})

    def __call__(self, gradients: Mapping[str, Tensor]) -> Float[Tensor, "n k"]:
        """P of n gradients, float32 `[n, k]` on their device.

        Args:
            gradients: a tensor `[n, *parameter]` for each name. The order of the names does not matter, but for the
                rounding of sums and the order of "identity".

        Raises:
            ValueError: no tensors, or "identity" with more parameters than dimensions.
        """
        if not gradients:
            raise ValueError("a projection needs the gradient of at least one parameter")
        flat = {name: part.flatten(1).to(torch.float32) for name, part in gradients.items()}
        if self.kind == "identity":
            return self._padded(torch.cat(list(flat.values()), 1))
        first = next(iter(flat.values()))
        out = first.new_zeros((self.dimensions, len(first)))
        for name, vectors in flat.items():
            for chunk, part in enumerate(torch.split(vectors, _CHUNK, 1)):
                out += self._project(part, name, chunk)
        return out.T.contiguous()

    @property
    def settings(self) -> dict[str, int | str]:
        """What the vectors depend on, for a cache's fingerprint."""
        settings: dict[str, int | str] = {"kind": self.kind, "dimensions": self.dimensions, "seed": self.seed}
        return settings | {"nonzeros": self.nonzeros} if self.kind == "sparse" else settings

    def _padded(self, vectors: Tensor) -> Tensor:
        missing = self.dimensions - vectors.shape[1]
        if missing < 0:
            raise ValueError(
                f'the "identity" projector keeps {self.dimensions} numbers and there are {vectors.shape[1]}: give as '
                "many dimensions, or another kind"
            )
        return functional.pad(vectors, (0, missing))

    def _project(self, part: Tensor, name: str, chunk: int) -> Tensor:
        """P_c of one chunk, `[k, n]`."""
        address = stream(self.seed, "attribution", "projector", self.kind, name, chunk)
        if self.kind != "sparse":
            return self._dense(address, part.shape[1]).to(part.device) @ part.T
        index, sign = self._table(address, part.shape[1])
        rows = functional.pad(part, (0, index.numel() // self.nonzeros - part.shape[1])).T.contiguous()
        index, sign = index.to(part.device), sign.to(part.device)
        return functional.embedding_bag(index, rows, mode="sum", per_sample_weights=sign)

    def _dense(self, address: Stream, length: int) -> Tensor:
        """P_c, `[k, length]`."""
        shape = (self.dimensions, length)
        if self.kind == "gaussian":
            return torch.randn(shape, generator=address.generator()) / math.sqrt(self.dimensions)
        count = self.dimensions * length
        # Signs from packed bits: 32 times fewer numbers to draw.
        words = torch.empty(-(-count // 64), dtype=torch.int64).random_(-(2**63), None, generator=address.generator())
        bits = torch.from_numpy(np.unpackbits(words.numpy().view(np.uint8), count=count))
        return bits.view(shape).to(torch.float32).mul_(2).sub_(1).div_(math.sqrt(self.dimensions))

    def _table(self, address: Stream, length: int) -> tuple[Tensor, Tensor]:
        """Of each of the k rows of P_c the columns that are not zero, and their entries, both `[k, columns]`.

        A block's rows share out a random permutation of the columns, padded to a multiple of the rows. Two columns
        then meet in a row with a probability below 1 / rows, which is why the variance is at most the dense one.
        """
        kept: dict[tuple[Stream, int], tuple[Tensor, Tensor]] = vars(self)["_kept"]
        if (address, length) in kept:
            return kept[address, length]
        rows, rng = self.dimensions // self.nonzeros, address.generator()
        padded = -(-length // rows) * rows
        order = torch.stack([torch.randperm(padded, generator=rng) for _ in range(self.nonzeros)])
        sign = torch.randint(2, order.shape, generator=rng, dtype=torch.int8).to(torch.float32) * 2 - 1
        shape = (self.dimensions, padded // rows)
        table = order.view(shape).to(torch.int32), sign.view(shape) / math.sqrt(self.nonzeros)
        if sum(index.numel() for index, _ in kept.values()) * 8 < _KEPT_BYTES:
            kept[address, length] = table
        return table


def jl_error(dimensions: int, cosine: float = 0.0) -> float:
    """The standard deviation of a projected cosine: (1 - c^2) / sqrt(k), for a true cosine c (delta method).

    0.044 at k = 512 and c = 0. One projection serves all draws and examples, so that more draws do not average this
    error away where the gradients of different draws are alike.

    Raises:
        ValueError: k < 1, or a cosine outside [-1, 1].

    Example:
        >>> round(jl_error(512), 3)
        0.044
    """
    if dimensions < 1 or abs(cosine) > 1:
        raise ValueError(f"need dimensions >= 1 and a cosine in [-1, 1], got {dimensions} and {cosine}")
    return (1 - cosine**2) / math.sqrt(dimensions)
