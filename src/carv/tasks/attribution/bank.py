"""The draws (t, eps) of an attribution, addressed one by one, so that every example of every run shares them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density import Density, DiscreteDensity, ShiftedUniform, uniform_steps
from carv.rng import Stream, stream
from carv.schedule import NoiseSchedule

Design = Literal["iid", "strata", "systematic", "global"]
NoiseMode = Literal["fresh", "fixed"]

PAPER_CELLS = 768
"""The number of timesteps of the paper's bank (App. D.3.2)."""

_BITS = 53  # of a uniform: a float64 in [0, 1) holds exactly so many


class DrawBank:
    """A bank of draws (t_i, eps_i), i = 0, 1, 2, ..., with weights p/q.

        1/B sum_{i < B} weight_i h(t_i, eps_i)      is unbiased for E_{t ~ p, eps} h(t, eps)

    Draw i depends on (seed, replicate, i) only: it is the same whatever batch, order, worker or budget, and a larger
    budget keeps the draws of a smaller one (all designs but "global").

    ==============  =====================================================================================
    design          u_i, which goes through the inverse CDF of q
    ==============  =====================================================================================
    iid             independent
    strata          van der Corput's sequence in base 2 with Owen's nested uniform scrambling: the first
                    2^m draws are one in each of 2^m equal strata, for every m, uniform inside
    systematic      van der Corput's sequence rotated by ONE uniform: the first 2^m draws are a randomly
                    shifted lattice. Unlike strata it can be worse than iid, for integrands of its period
    global          one in each of `size` equal strata, in random order: the paper's, with a fixed size
    ==============  =====================================================================================

    With `noise="fresh"` each draw has noise of its own. With `noise="fixed"` (the paper's bank) there are `cells`
    timesteps, t_c = icdf_p((c + 1/2) / cells), each with ONE noise eps_c, and a draw chooses a cell; what is then
    estimated is the mean over all cells. That depends on `seed` alone, so that replicates sample one bank.

    Args:
        seed: of the bank.
        design: see the table.
        base: p, the law of t in the training loss.
        proposal: q; p unless given. In a fixed bank the cells have mass ~ q(t_c) / p(t_c).
        noise: "fresh" or "fixed".
        cells: of a fixed bank.
        size: the number of draws of "global".
        antithetic: draws 2 j and 2 j + 1 are at one t, with noise eps_j and -eps_j (fresh noise only).
        replicate: another sampling; of a fixed bank the noise stays.

    Raises:
        ValueError: an unknown design or mode, a size without "global" or the reverse, antithetic fixed noise, or a
            base and proposal of different kinds.

    Example:
        >>> bank = DrawBank(0, "strata", ShiftedUniform())
        >>> sorted((bank.timesteps(0, 8)[0] * 8).int().tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> bool((bank.timesteps(0, 16)[0][:8] == bank.timesteps(0, 8)[0]).all())
        True

    Source: Owen (1995), Randomly permuted (t, m, s)-nets and (t, s)-sequences; CARV Eq. 11, 14.
    """

    def __init__(
        self,
        seed: int,
        design: Design,
        base: Density,
        proposal: Density | None = None,
        noise: NoiseMode = "fresh",
        *,
        cells: int = PAPER_CELLS,
        size: int | None = None,
        antithetic: bool = False,
        replicate: int = 0,
    ) -> None:
        if design not in get_args(Design):
            raise ValueError(f"unknown design {design!r}; there are {', '.join(get_args(Design))}")
        if noise not in get_args(NoiseMode):
            raise ValueError(f'noise is "fresh" or "fixed", got {noise!r}')
        if (design == "global") != (size is not None):
            raise ValueError('a size goes with the design "global", which needs one, and with no other')
        if cells < 1 or (size is not None and size < 1):
            raise ValueError(f"a bank needs at least one cell and one draw, got cells = {cells}, size = {size}")
        if antithetic and (noise == "fixed" or (size or 0) % 2):
            raise ValueError("antithetic draws come in pairs with fresh noise: not with a fixed bank, nor an odd size")
        if proposal is not None and proposal.discrete != base.discrete:
            raise ValueError("the base and the proposal must be both discrete or both continuous")
        self.seed, self.design, self.base, self.noise_mode = seed, design, base, noise
        self.proposal = base if proposal is None else proposal
        self.cells, self.size, self.antithetic, self.replicate = cells, size, antithetic, replicate
        self._noise = stream(seed, "attribution", "noise")
        self._uniform = stream(seed, "attribution", "uniform", design, replicate)
        if noise == "fresh":
            self._noise = self._noise.child("replicate", replicate)
        self._words: dict[int, int] = {}
        self._grid = _grid(base, self.proposal, cells) if noise == "fixed" else None
        self._order = None if size is None else self._permutation(size // 2 if antithetic else size)

    def timesteps(self, first: int, last: int) -> tuple[Shaped[Tensor, " n"], Float[Tensor, " n"]]:
        """t and p/q of the draws first, ..., last - 1, on the CPU: t float64 (flow) or int64, the weight float64.

        Raises:
            ValueError: a reversed range, or one beyond the size of "global".
        """
        u = self.uniforms(first, last)
        if self._grid is not None:
            cell = self._grid.law.icdf(u)
            return self._grid.t[cell], 1 / (self.cells * self._grid.law.prob(cell))
        t, density = self.proposal.draw(u)
        return t, self.base.prob(t) / density

    def cell(self, first: int, last: int) -> Shaped[Tensor, " n"]:
        """Of a fixed bank: the cell, int64 in 0..cells - 1, of the draws first, ..., last - 1.

        Raises:
            ValueError: the bank has fresh noise.
        """
        return self._fixed().law.icdf(self.uniforms(first, last))

    def grid(self) -> Shaped[Tensor, " cells"]:
        """Of a fixed bank: t of all its cells, increasing; the mean over them, all of weight 1, is the reference.

        Raises:
            ValueError: the bank has fresh noise.
        """
        return self._fixed().t

    def noise(self, index: int, latent_shape: tuple[int, ...]) -> Tensor:
        """eps of draw `index`, float32, standard normal; each latent frame has a stream of its own.

        Hence clips of different lengths share the noise of the frames that both have, and a picture that of a clip's
        first frame.

        Args:
            index: of the draw.
            latent_shape: `(C, h, w)`, or `(C, F, h, w)` of a video.
        """
        if self.noise_mode == "fixed":
            return self.cell_noise(int(self.cell(index, index + 1)), latent_shape)
        if self.antithetic:
            return _normal(self._noise.child(index // 2), latent_shape) * (1 - 2 * (index % 2))
        return _normal(self._noise.child(index), latent_shape)

    def cell_noise(self, cell: int, latent_shape: tuple[int, ...]) -> Tensor:
        """Of a fixed bank: eps of a cell, as `noise`.

        Raises:
            ValueError: the bank has fresh noise, or no such cell.
        """
        if not 0 <= cell < len(self._fixed().t):
            raise ValueError(f"the bank's cells are 0..{self.cells - 1}, got {cell}")
        return _normal(self._noise.child("cell", cell), latent_shape)

    def noises(self, first: int, last: int, latent_shape: tuple[int, ...]) -> Tensor:
        """eps of the draws first, ..., last - 1, `[n, *latent_shape]`."""
        if self.noise_mode == "fixed":
            cells = self.cell(first, last).tolist()
            return torch.stack([self.cell_noise(cell, latent_shape) for cell in cells])
        return torch.stack([self.noise(index, latent_shape) for index in range(first, last)])

    def uniforms(self, first: int, last: int) -> Float[Tensor, " n"]:
        """u of the draws first, ..., last - 1, float64 in [0, 1): what strata are made of. See `timesteps`."""
        if not 0 <= first < last:
            raise ValueError(f"draws are counted from 0, and there must be some: got {first} to {last}")
        if self.size is not None and last > self.size:
            raise ValueError(
                f'this bank of {self.size} global strata ends before draw {last}; only "iid", "strata" and '
                '"systematic" grow'
            )
        step = 2 if self.antithetic else 1
        points = [self._point(i // step) for i in range(first, last)]
        return torch.tensor(points, dtype=torch.float64) * 2.0**-_BITS

    @property
    def settings(self) -> dict[str, int | str | bool | None]:
        """What the draws depend on, for a cache's fingerprint; the laws of t by a digest of their quantiles."""
        return {
            "seed": self.seed,
            "design": self.design,
            "base": _digest(self.base),
            "proposal": _digest(self.proposal),
            "noise": self.noise_mode,
            "cells": self.cells if self.noise_mode == "fixed" else None,
            "size": self.size,
            "antithetic": self.antithetic,
            "replicate": self.replicate,
        }

    def _point(self, index: int) -> int:
        """u of a point as a whole number of 2^-53: integers are never rounded out of their stratum."""
        if self.design == "strata":
            return self._scrambled(index)
        if self.design == "systematic":
            return (_reversed(index) + self._word(0)) % (1 << _BITS)
        if self._order is not None:
            return ((self._order[index] << _BITS) + self._word(index)) // len(self._order)
        return self._word(index)

    def _scrambled(self, index: int) -> int:
        """Nested uniform scrambling: digit k + 1 is flipped by a bit that belongs to the k digits before it.

        The node of the digits that index mod 2^k has is named by (k, index mod 2^k); its bit is bit k of the word of
        index mod 2^k, and no other node has that bit.
        """
        digits = _reversed(index)
        flips = 0
        for k in range(_BITS):
            flips = flips << 1 | self._word(index & ((1 << k) - 1)) >> k & 1
        return digits ^ flips

    def _word(self, number: int) -> int:
        """The 53 uniform bits with a number."""
        if number not in self._words:
            self._words[number] = int.from_bytes(self._uniform.child(number).digest(8), "little") >> (64 - _BITS)
        return self._words[number]

    def _permutation(self, size: int) -> list[int]:
        order: list[int] = torch.randperm(size, generator=self._uniform.child("order", size).generator()).tolist()
        return order

    def _fixed(self) -> _Grid:
        if self._grid is None:
            raise ValueError('this bank has fresh noise and hence no cells; ask for noise="fixed"')
        return self._grid


@dataclass(frozen=True, eq=False)
class _Grid:
    """The timesteps of a fixed bank, and the law by which its cells are drawn."""

    t: Tensor
    law: DiscreteDensity


def _grid(base: Density, proposal: Density, cells: int) -> _Grid:
    t = base.icdf((torch.arange(cells, dtype=torch.float64) + 0.5) / cells)
    if proposal is base:
        return _Grid(t, DiscreteDensity(0, torch.ones(cells, dtype=torch.float64)))
    ratio = proposal.prob(t) / base.prob(t)
    if not bool((ratio > 0).all()):
        raise ValueError(
            f"the proposal is zero at t = {t[~(ratio > 0)][0].item():g}, where the base is not: mix in some of the "
            "base (carv.proposals.defensive)"
        )
    return _Grid(t, DiscreteDensity(0, ratio))


def base_density(
    schedule: NoiseSchedule, shift: float = 1.0, low: float | None = None, high: float | None = None
) -> Density:
    """p, the law of t in the training loss: uniform, or of a flow with a shift.

    Args:
        schedule: the teacher's.
        shift: of a flow; 1 is uniform on [0, 1]. What the network was trained with is not in its folder: the
            scheduler's own shift is for sampling.
        low, high: another range, in the schedule's units.

    Raises:
        ValueError: a shift for a discrete schedule, or a bad range.
    """
    if schedule.continuous:
        return ShiftedUniform(0.0 if low is None else low, 1.0 if high is None else high, shift)
    if shift != 1.0:
        raise ValueError(f"a shift of {shift} is for flow matching; this teacher has a discrete schedule")
    return uniform_steps(0 if low is None else int(low), schedule.num_steps - 1 if high is None else int(high))


def _normal(address: Stream, latent_shape: tuple[int, ...]) -> Tensor:
    if len(latent_shape) not in (3, 4):
        raise ValueError(f"a latent has the shape (C, h, w) or (C, F, h, w), got {tuple(latent_shape)}")
    frames = latent_shape[1] if len(latent_shape) == 4 else 1
    one = (latent_shape[0], *latent_shape[-2:])
    drawn = [torch.randn(one, generator=address.child("frame", frame).generator()) for frame in range(frames)]
    return torch.stack(drawn, 1) if len(latent_shape) == 4 else drawn[0]


def _reversed(index: int) -> int:
    """The binary digits of an index behind the point, as a whole number of 2^-53: van der Corput's point."""
    return int(f"{index:0{_BITS}b}"[::-1], 2)


def _digest(law: Density) -> str:
    """Of its range and quantiles, to ten digits: the same on all machines."""
    at = (torch.arange(256, dtype=torch.float64) + 0.5) / 256
    text = f"{law.low:.10g} {law.high:.10g} " + " ".join(f"{t:.10g}" for t in law.icdf(at).tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
