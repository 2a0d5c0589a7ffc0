"""Densities over integer timesteps, for DDPM schedules."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density.base import Density, check_mass, check_range


class DiscreteDensity(Density):
    """A probability mass function over the integers first, first + 1, ..., first + n - 1.

    Draws are `t = first + searchsorted(cdf, u, right=True)`: exact at both end points, and never an atom of
    mass zero. (A continuous draw that is rounded to an integer halves the mass of both end points.)

    Args:
        first: the smallest timestep.
        mass: `[n]`, not negative, finite, not all zero; normalised here.

    Raises:
        ValueError: if mass is not so; the message names the first bad t.

    Example:
        >>> coin = DiscreteDensity(5, torch.tensor([1.0, 0.0, 3.0]))
        >>> coin.icdf(torch.tensor([0.0, 0.24, 0.25, 0.999], dtype=torch.float64)).tolist()
        [5, 5, 7, 7]
    """

    discrete = True

    def __init__(self, first: int, mass: Float[Tensor, " n"]) -> None:
        if mass.ndim != 1 or len(mass) == 0:
            raise ValueError(f"the mass of a discrete density has shape [n], n >= 1, got {list(mass.shape)}")
        check_mass(mass, lambda i: f"t = {first + i}")
        self._set(first, mass)

    @classmethod
    def _trusted(cls, first: int, mass: Tensor) -> DiscreteDensity:
        """Without the checks, and hence without a device sync: for tables that carv itself made."""
        density = cls.__new__(cls)
        density._set(first, mass)
        return density

    def _set(self, first: int, mass: Tensor) -> None:
        total = mass.to(torch.float64).cumsum(0)
        self.first = first
        self.low, self.high = first, first + len(mass) - 1
        # Divided by its own last entry the CDF ends at exactly 1, and atoms of mass zero repeat the entry
        # before them, also after the last positive one: no u < 1 can select them.
        self.cumulative = total / total[-1]
        self.pmf = mass.to(torch.float64) / total[-1]
        self.device = mass.device

    @property
    def support(self) -> Tensor:
        """The integers low..high, `[n]`."""
        return torch.arange(self.first, self.first + len(self.pmf), device=self.device)

    def icdf(self, u: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return self.first + torch.searchsorted(self.cumulative, u, right=True)

    def cdf(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        index = (t - self.first).clamp(max=len(self.pmf) - 1)
        return torch.where(index < 0, 0.0, self.cumulative[index.clamp(min=0).long()])

    def prob(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        index = (t - self.first).long()
        inside = (index >= 0) & (index < len(self.pmf))
        return torch.where(inside, self.pmf[index.clamp(0, len(self.pmf) - 1)], 0.0)

    def restrict(self, low: float, high: float) -> DiscreteDensity:
        check_range(low, high)
        first, last = max(math.ceil(low), self.first), min(math.floor(high), int(self.high))
        if first > last or not bool(self.pmf[first - self.first : last - self.first + 1].sum() > 0):
            raise ValueError(f"the density on {self.low}..{self.high} has no mass in [{low}, {high}]")
        return DiscreteDensity(first, self.pmf[first - self.first : last - self.first + 1])

    def to(self, device: torch.device | str) -> DiscreteDensity:
        # Normalised on the CPU and moved as they are: a parallel cumsum could round otherwise.
        moved = DiscreteDensity.__new__(DiscreteDensity)
        moved.first, moved.low, moved.high = self.first, self.low, self.high
        moved.cumulative, moved.pmf = self.cumulative.to(device), self.pmf.to(device)
        moved.device = moved.pmf.device
        return moved


def uniform_steps(t_min: int, t_max: int) -> DiscreteDensity:
    """Uniform on the integers t_min..t_max, both included (SDS: 20..980 of 1000).

    Raises:
        ValueError: reversed, or t_min < 0.

    Example:
        >>> p = uniform_steps(20, 980)
        >>> p.icdf(torch.tensor([0.0, 0.9999999], dtype=torch.float64)).tolist()
        [20, 980]
    """
    check_range(t_min, t_max)
    if t_min < 0:
        raise ValueError(f"t_min must not be negative, got {t_min}")
    return DiscreteDensity(t_min, torch.ones(t_max - t_min + 1, dtype=torch.float64))
