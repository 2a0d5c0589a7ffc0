"""The multi-resolution hash encoding of Instant-NGP (Müller et al. 2022, arXiv 2201.05989), in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_PRIMES = (1, 2654435761, 805459861)
_INITIAL = 1e-4
_CHUNK = 8192
"""Points at a time on a CPU: a level's indices and weights stay in the cache, which halves the time."""


@dataclass(frozen=True)
class Level:
    """One grid over the unit cube.

    Attributes:
        cells: N along each side, so N + 1 vertices.
        first: the place of its first entry in the table.
        entries: T, how many it has.
        hashed: whether vertices share entries; else each has its own.
    """

    cells: int
    first: int
    entries: int
    hashed: bool


class HashEncoding(nn.Module):
    """Features of points in the unit cube, from grids of growing resolution, each interpolated trilinearly.

    Level l of L has N_l = floor(N_min (N_max / N_min)^(l / (L - 1))) cells along each side. Its vertex (i, j, k)
    reads entry `i + (N + 1) j + (N + 1)^2 k` where all vertices fit into the level's T entries, else

        (i  xor  2654435761 j  xor  805459861 k)  mod  T.                                               (its Eq. 4)

    Levels from `open_levels` on give zeros and get no gradient (threestudio's ProgressiveBandHashGrid).

    Attributes:
        table: [features, entries of all levels], at first uniform in +-1e-4.
        levels: where each level's entries are.
        open_levels: how many levels are in use; all, unless it is set.
    """

    def __init__(
        self, levels: int, features: int, log2_entries: int, coarsest: int, finest: int, rng: torch.Generator
    ) -> None:
        """
        Args:
            levels: L.
            features: numbers in an entry.
            log2_entries: a level has at most 2 to the power of this many entries, T.
            coarsest: N_min, cells along each side.
            finest: N_max.
            rng: for the first values.
        """
        super().__init__()
        self.levels = _layout(levels, 2**log2_entries, coarsest, finest)
        self.features = features
        self.open_levels = levels
        shape = (features, self.levels[-1].first + self.levels[-1].entries)
        self.table = nn.Parameter((2 * torch.rand(shape, generator=rng) - 1) * _INITIAL)

    @property
    def width(self) -> int:
        """Numbers in an encoded point: levels x features."""
        return len(self.levels) * self.features

    def forward(self, points: Float[Tensor, "P 3"]) -> Float[Tensor, "P width"]:
        """The features of points, level by level; those outside the unit cube count as their nearest inside.

        Differentiable in the table any number of times, not in the points.
        """
        features = _interpolate(self.table, points.detach(), self.levels[: self.open_levels])
        closed = len(self.levels) - self.open_levels
        features = nn.functional.pad(features, (0, 0, 0, 0, 0, closed)) if closed else features
        return features.flatten(0, 1).T


def _layout(levels: int, most: int, coarsest: int, finest: int) -> tuple[Level, ...]:
    found: list[Level] = []
    for level in range(levels):
        # 1e-6 so that the last is `finest` in spite of rounding.
        cells = int(coarsest * (finest / coarsest) ** (level / max(1, levels - 1)) + 1e-6)
        vertices = (cells + 1) ** 3
        first = found[-1].first + found[-1].entries if found else 0
        found.append(Level(cells, first, min(most, vertices), vertices > most))
    return tuple(found)


def _corners(level: Level, points: Float[Tensor, "3 P"]) -> tuple[Int[Tensor, "8 P"], Float[Tensor, "8 P"]]:
    """The entries of the eight vertices around each point, and their trilinear weights."""
    n = level.cells
    scaled = (points * n).clamp(0, n)
    # 32 bits are faster, and enough: products stay below n T, as only a prime's remainder modulo T matters.
    whole = torch.int32 if n * level.entries < 2**31 else torch.int64
    low = scaled.to(whole).clamp(max=n - 1)
    high_share = scaled - low
    strides = [p % level.entries for p in _PRIMES] if level.hashed else [1, n + 1, (n + 1) ** 2]
    x, y, z = (torch.stack([low[a] * s, (low[a] + 1) * s]) for a, s in enumerate(strides))
    if level.hashed:
        entry = (z[:, None, None] ^ y[:, None] ^ x) & (level.entries - 1)
    else:
        entry = z[:, None, None] + y[:, None] + x
    x_share, y_share, z_share = torch.stack([1 - high_share, high_share], 1)
    share = z_share[:, None, None] * y_share[:, None] * x_share
    return entry.view(8, -1), share.view(8, -1)


def _chunks(points: Tensor) -> Iterator[tuple[slice, Tensor]]:
    size = _CHUNK if points.device.type == "cpu" else max(1, len(points))
    for first in range(0, len(points), size):
        part = slice(first, first + size)
        yield part, points[part].T.contiguous()


class _Interpolate(torch.autograd.Function):
    """`[F, entries], [P, 3], levels -> [levels, F, P]`, linear in the table; its adjoint is `_Scatter`.

    A function of its own because autograd through indexing keeps every index and weight: 768 bytes a point for 8
    levels, against 12 here, and more time. Each of the two is the other's derivative, so both have derivatives of
    any order.
    """

    @staticmethod
    def forward(table: Tensor, points: Tensor, levels: tuple[Level, ...]) -> Tensor:
        found = table.new_empty(len(levels), len(table), len(points))
        for part, some in _chunks(points):
            for level, out in zip(levels, found[..., part], strict=True):
                entry, share = _corners(level, some)
                for row, values in zip(out, table[:, level.first : level.first + level.entries], strict=True):
                    torch.sum(values.index_select(0, entry.view(-1)).view(8, -1).mul_(share), 0, out=row)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[Level, ...]], output: Tensor) -> None:
        table, points, ctx.levels = inputs
        ctx.entries = table.shape[1]
        ctx.save_for_backward(points)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (points,) = ctx.saved_tensors
        return _scatter(gradient, points, ctx.levels, ctx.entries), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], table: Tensor, points: Tensor, levels: tuple[Level, ...]
    ) -> tuple[Tensor, int]:
        joined = table.movedim(in_dims[0], 0)  # [B, F, entries]: one pass works out the indices for all B
        found = _interpolate(joined.flatten(0, 1), points, levels)
        return found.view(len(levels), *joined.shape[:2], len(points)), 1


class _Scatter(torch.autograd.Function):
    """`[levels, F, P], [P, 3], levels, entries -> [F, entries]`: adds each point's numbers to its vertices' entries."""

    @staticmethod
    def forward(gradient: Tensor, points: Tensor, levels: tuple[Level, ...], entries: int) -> Tensor:
        found = gradient.new_zeros(gradient.shape[1], entries)
        for part, some in _chunks(points):
            for level, given in zip(levels, gradient[..., part].contiguous(), strict=True):
                entry, share = _corners(level, some)
                for row, values in zip(found[:, level.first : level.first + level.entries], given, strict=True):
                    row.index_add_(0, entry.view(-1), (share * values).view(-1))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, tuple[Level, ...], int], output: Tensor) -> None:
        _, points, ctx.levels, _ = inputs
        ctx.save_for_backward(points)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (points,) = ctx.saved_tensors
        return _interpolate(gradient, points, ctx.levels), None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int, ...],
        gradient: Tensor,
        points: Tensor,
        levels: tuple[Level, ...],
        entries: int,
    ) -> tuple[Tensor, int]:
        joined = gradient.movedim(in_dims[0], 1)  # [levels, B, F, P]
        found = _scatter(joined.flatten(1, 2), points, levels, entries)
        return found.view(*joined.shape[1:3], entries), 0


def _interpolate(table: Tensor, points: Tensor, levels: tuple[Level, ...]) -> Float[Tensor, "levels F P"]:
    found: Tensor = _Interpolate.apply(table, points, levels)  # type: ignore[no-untyped-call]
    return found


def _scatter(gradient: Tensor, points: Tensor, levels: tuple[Level, ...], entries: int) -> Float[Tensor, "F entries"]:
    found: Tensor = _Scatter.apply(gradient, points, levels, entries)  # type: ignore[no-untyped-call]
    return found
