"""A law of the timestep: what every density can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


class Density(ABC):
    """A law of the timestep t.

    Attributes:
        low, high: the ends of its range, both included.
        discrete: whether t is an integer.
        device: where its tables are.
    """

    low: float
    high: float
    discrete: bool
    device: torch.device

    @abstractmethod
    def icdf(self, u: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """t with P(T < t) <= u < P(T <= t): uniform u in [0, 1) become draws of t, in increasing order."""

    def draw(self, u: Float[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], Float[Tensor, "..."]]:
        """`icdf(u)` and the density there: the very one whose CDF was inverted, for use in p/q."""
        t = self.icdf(u)
        return t, self.prob(t)

    @abstractmethod
    def cdf(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """P(T <= t), float64."""

    @abstractmethod
    def prob(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The pmf or the probability density at t, float64; 0 outside the range."""

    @abstractmethod
    def restrict(self, low: float, high: float) -> Density:
        """The law conditioned on low <= t <= high: what an annealed range needs.

        Raises:
            ValueError: a reversed range, or one to which this law gives no mass.
        """

    @abstractmethod
    def to(self, device: torch.device | str) -> Density:
        """The same law with its tables on a device."""


def check_mass(mass: Tensor, where: Callable[[int], str]) -> None:
    """Raises ValueError where a mass is negative or not finite, naming the first such place, or zero everywhere."""
    bad = ~(torch.isfinite(mass) & (mass >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0].item())
        raise ValueError(f"a density must be finite and not negative, but it is {mass[i].item():g} at {where(i)}")
    if not bool((mass > 0).any()):
        raise ValueError("a density needs some mass, but it is zero at every t")


def check_range(low: float, high: float) -> None:
    """Raises ValueError for a range of timesteps that is reversed or not finite."""
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"a timestep range needs low <= high, got [{low}, {high}]")


def overlap(density: Density, low: float, high: float) -> tuple[float, float]:
    """The part of [low, high] in a density's range; raises ValueError if there is none."""
    check_range(low, high)
    low, high = max(low, density.low), min(high, density.high)
    if low > high:
        raise ValueError(f"the density on [{density.low}, {density.high}] has no mass there")
    return low, high
