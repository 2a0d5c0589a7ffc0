"""Densities over t in [0, 1] in closed form, for flow matching."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density.base import Density, check_range, overlap


class _ClosedForm(Density):
    """A continuous law on [0, 1] with closed-form CDF, inverse and density, truncated to [low, high]."""

    discrete = False

    def __init__(self, low: float, high: float) -> None:
        check_range(low, high)
        if not (low >= 0 and high <= 1):
            raise ValueError(f"a continuous timestep lies in [0, 1], got the range [{low}, {high}]")
        self.low, self.high = float(low), float(high)
        self.device = torch.device("cpu")  # no tables to move: `to` only says where draws are made
        ends = self._cdf(torch.tensor([self.low, self.high], dtype=torch.float64))
        self._below, self._mass = ends[0].item(), (ends[1] - ends[0]).item()
        if low < high and self._mass <= 0:
            raise ValueError(f"this density has no mass in [{low}, {high}]")

    def __eq__(self, other: object) -> bool:
        """Whether two are the same law, on whatever devices."""
        if not isinstance(other, _ClosedForm) or type(self) is not type(other):
            return NotImplemented
        return vars(self) | {"device": None} == vars(other) | {"device": None}

    def __hash__(self) -> int:
        return hash((type(self), self.low, self.high))

    @abstractmethod
    def _cdf(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _icdf(self, u: Tensor) -> Tensor: ...

    @abstractmethod
    def _pdf(self, t: Tensor) -> Tensor: ...

    def icdf(self, u: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return self._icdf(self._below + u.to(torch.float64) * self._mass).clamp(self.low, self.high)

    def cdf(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        t = t.to(torch.float64)
        if self.low == self.high:
            return (t >= self.low).to(torch.float64)
        return ((self._cdf(t.clamp(self.low, self.high)) - self._below) / self._mass).clamp(0, 1)

    def prob(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        t = t.to(torch.float64)
        inside = (t >= self.low) & (t <= self.high)
        if self.low == self.high:  # all mass at one point: the density against that point mass
            return inside.to(torch.float64)
        return torch.where(inside, self._pdf(t) / self._mass, 0.0)

    def to(self, device: torch.device | str) -> Density:
        moved = copy.copy(self)
        moved.device = torch.empty(0, device=device).device  # with its index, as tables and generators have it
        return moved


class ShiftedUniform(_ClosedForm):
    """t = s v / (1 + (s - 1) v) for uniform v: flow matching's shift s; s = 1 is the uniform law.

    Density `s / (s - (s - 1) t)^2` on [0, 1] (Esser et al. 2024, Eq. 23), truncated to [low, high].

    Args:
        low, high: the range of t, within [0, 1]; low = high is a single point.
        shift: s > 0; above 1 it moves mass towards noise (t = 1).

    Raises:
        ValueError: a reversed range, one outside [0, 1], or a shift that is not positive.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, shift: float = 1.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be a positive number, got {shift}")
        self.shift = shift
        super().__init__(low, high)

    def _cdf(self, t: Tensor) -> Tensor:
        return t / (self.shift - (self.shift - 1) * t)

    def _icdf(self, u: Tensor) -> Tensor:
        if self.shift == 1:
            return u
        return self.shift * u / (1 + (self.shift - 1) * u)

    def _pdf(self, t: Tensor) -> Tensor:
        return self.shift / (self.shift - (self.shift - 1) * t) ** 2

    def restrict(self, low: float, high: float) -> ShiftedUniform:
        low, high = overlap(self, low, high)
        return ShiftedUniform(low, high, self.shift)


class LogitNormal(_ClosedForm):
    """logit(t) ~ N(loc + log(shift), scale^2), truncated to [low, high] (Esser et al. 2024, Sec. 3.1).

    A flow shift s multiplies the odds t / (1 - t) by s, hence only moves `loc` by log s.

    Args:
        loc, scale: of the normal law of logit(t); scale > 0.
        shift: the flow shift s > 0.
        low, high: the range of t, within [0, 1].

    Raises:
        ValueError: scale or shift not positive, a bad range, or one without mass.

    Note:
        As a proposal for a base that reaches t = 0 or 1 its weights p/q grow without bound at the ends.
        `defensive` bounds them.
    """

    def __init__(
        self, loc: float = 0.0, scale: float = 1.0, shift: float = 1.0, low: float = 0.0, high: float = 1.0
    ) -> None:
        for name, value in (("scale", scale), ("shift", shift)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not math.isfinite(loc):
            raise ValueError(f"loc must be finite, got {loc}")
        self.loc, self.scale, self.shift = loc, scale, shift
        super().__init__(low, high)

    def _standard(self, t: Tensor) -> Tensor:
        return (torch.logit(t) - self.loc - math.log(self.shift)) / self.scale

    def _cdf(self, t: Tensor) -> Tensor:
        share: Tensor = torch.special.ndtr(self._standard(t))
        return share

    def _icdf(self, u: Tensor) -> Tensor:
        # u = 0 would give t = 0, where the density is 0 and p/q is 0/0.
        return torch.sigmoid(
            torch.special.ndtri(u.clamp(1e-300, 1 - 2**-53)) * self.scale + self.loc + math.log(self.shift)
        )

    def _pdf(self, t: Tensor) -> Tensor:
        # At t = 0 and 1 the density's limit is 0; evaluated there it would be 0/0.
        t = t.clamp(torch.finfo(torch.float64).tiny, 1 - torch.finfo(torch.float64).eps)
        return torch.exp(-0.5 * self._standard(t) ** 2) / (self.scale * math.sqrt(2 * math.pi) * t * (1 - t))

    def restrict(self, low: float, high: float) -> LogitNormal:
        low, high = overlap(self, low, high)
        return LogitNormal(self.loc, self.scale, self.shift, low, high)
