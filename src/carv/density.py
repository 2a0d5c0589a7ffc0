"""Timestep densities p and q: exact to sample, exact to divide by.

Two kinds share one interface. `DiscreteDensity` is a pmf over consecutive integers (DDPM). The continuous
ones are `ShiftedUniform` and `LogitNormal` (flow matching practice), in closed form, and `Reweighted`, any of
these times a piecewise-constant factor. `carv.proposals` makes proposals of both kinds from a base.

All tables are float64. What is sampled is what is divided by: no density here is rounded, snapped or
interpolated after the draw, which would bias every estimate made with it.
"""

from __future__ import annotations

import copy
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


# Discrete


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
        _check_mass(mass, lambda i: f"t = {first + i}")
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
        _check_range(low, high)
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
    _check_range(t_min, t_max)
    if t_min < 0:
        raise ValueError(f"t_min must not be negative, got {t_min}")
    return DiscreteDensity(t_min, torch.ones(t_max - t_min + 1, dtype=torch.float64))


# Continuous


class _ClosedForm(Density):
    """A continuous law on [0, 1] with closed-form CDF, inverse and density, truncated to [low, high]."""

    discrete = False

    def __init__(self, low: float, high: float) -> None:
        _check_range(low, high)
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
        low, high = _overlap(self, low, high)
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
        low, high = _overlap(self, low, high)
        return LogitNormal(self.loc, self.scale, self.shift, low, high)


class Reweighted(Density):
    """A continuous base times a factor that is constant on cells of the base's quantiles.

        q(t) = p(t) m_i / (v_{i+1} - v_i)    for v_i <= CDF_p(t) < v_{i+1}

    so that `p / q` is piecewise constant whatever p is, and both the density and its inverse are exact.

    Args:
        base: p, in closed form.
        edges: `[n + 1]`, quantiles of p from 0 to 1, increasing.
        mass: `[n]`, m, the probability of each cell under q; normalised here.

    Raises:
        ValueError: edges that do not increase from 0 to 1; mass that is negative, not finite or all zero.
    """

    discrete = False

    def __init__(self, base: Density, edges: Float[Tensor, " n1"], mass: Float[Tensor, " n"]) -> None:
        if base.discrete or isinstance(base, Reweighted):
            raise ValueError("Reweighted takes a continuous base in closed form; for a discrete one make a pmf")
        edges = edges.to(torch.float64)
        increasing = edges.ndim == 1 and len(edges) >= 2 and bool((edges[1:] > edges[:-1]).all())
        if not increasing or edges[0] != 0 or edges[-1] != 1:
            raise ValueError("the cell edges of a reweighted density must increase from 0 to 1")
        if mass.shape != (len(edges) - 1,):
            raise ValueError(f"{len(edges)} edges need {len(edges) - 1} masses, got shape {list(mass.shape)}")
        _check_mass(mass, lambda i: f"t = {base.icdf((edges[i] + edges[i + 1]) / 2).item():g}")
        self._set(base, edges, mass)

    @classmethod
    def _trusted(cls, base: Density, edges: Tensor, mass: Tensor) -> Reweighted:
        """Without the checks, and hence without a device sync: for tables that carv itself made."""
        density = cls.__new__(cls)
        density._set(base, edges, mass)
        return density

    def _set(self, base: Density, edges: Tensor, mass: Tensor) -> None:
        total = mass.to(torch.float64).cumsum(0)
        self.base, self.edges = base, edges
        self.low, self.high = base.low, base.high
        self.mass = mass.to(torch.float64) / total[-1]
        self.cumulative = torch.cat([total.new_zeros(1), total / total[-1]])
        self.device = mass.device
        self._derive()

    def _derive(self) -> None:
        """What draws look up: the upper end of each cell, p/q in it, and the last v that is inside."""
        self._upper = self.cumulative[1:].contiguous()
        self._inner = self.edges[1:-1].contiguous()
        self._ratio = (self.edges[1:] - self.edges[:-1]) / self.mass
        # v = offset + u ratio; cells without mass are never drawn, so their entries may be anything.
        offset = self.edges[:-1] - self.cumulative[:-1] * self._ratio
        last_inside = torch.nextafter(self.edges[1:], self.edges[:-1])
        self._cells = torch.stack([offset, self._ratio, last_inside], -1)

    def _invert(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The quantile v of the base, and p/q in its cell."""
        u = u.to(torch.float64)
        offset, ratio, last_inside = self._cells[torch.searchsorted(self._upper, u, right=True)].unbind(-1)
        # Rounding must not carry v over into the next cell, whose factor is another one.
        return torch.minimum(offset + u * ratio, last_inside), ratio

    def icdf(self, u: Float[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        return self.base.icdf(self._invert(u)[0])

    def draw(self, u: Float[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], Float[Tensor, "..."]]:
        t, ratio = self.draw_with_ratio(u)
        return t, self.base.prob(t) / ratio

    def draw_with_ratio(self, u: Float[Tensor, "..."]) -> tuple[Shaped[Tensor, "..."], Float[Tensor, "..."]]:
        """`icdf(u)` and p/q there, of the cell that was drawn.

        Not of the cell that a rounded t would be found in again: the neighbour's mass may be 0.
        """
        v, ratio = self._invert(u)
        return self.base.icdf(v), ratio

    def _cell(self, v: Tensor) -> Tensor:
        return torch.searchsorted(self._inner, v, right=True)

    def cdf(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        v = self.base.cdf(t)
        cell = self._cell(v)
        return self.cumulative[cell] + (v - self.edges[cell]) / self._ratio[cell]

    def prob(self, t: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self.base.prob(t) / self._ratio[self._cell(self.base.cdf(t))]

    def restrict(self, low: float, high: float) -> Density:
        base = self.base.restrict(low, high)
        ends = self.base.cdf(torch.tensor([base.low, base.high], dtype=torch.float64, device=self.device))
        if base.low == base.high:
            return base
        inner = self.edges[(self.edges > ends[0]) & (self.edges < ends[1])]
        edges = torch.cat([ends[:1], inner, ends[1:]])
        mass = (edges[1:] - edges[:-1]) / self._ratio[self._cell((edges[1:] + edges[:-1]) / 2)]
        scaled = (edges - ends[0]) / (ends[1] - ends[0])
        scaled[0], scaled[-1] = 0.0, 1.0
        return Reweighted(base, scaled, mass)

    def to(self, device: torch.device | str) -> Reweighted:
        moved = Reweighted.__new__(Reweighted)
        moved.base, moved.low, moved.high = self.base.to(device), self.low, self.high
        moved.edges, moved.mass = self.edges.to(device), self.mass.to(device)
        moved.cumulative = self.cumulative.to(device)
        moved.device = moved.mass.device
        moved._derive()
        return moved


def _check_mass(mass: Tensor, where: Callable[[int], str]) -> None:
    bad = ~(torch.isfinite(mass) & (mass >= 0))
    if bool(bad.any()):
        i = int(bad.nonzero()[0].item())
        raise ValueError(f"a density must be finite and not negative, but it is {mass[i].item():g} at {where(i)}")
    if not bool((mass > 0).any()):
        raise ValueError("a density needs some mass, but it is zero at every t")


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"a timestep range needs low <= high, got [{low}, {high}]")


def _overlap(density: Density, low: float, high: float) -> tuple[float, float]:
    _check_range(low, high)
    low, high = max(low, density.low), min(high, density.high)
    if low > high:
        raise ValueError(f"the density on [{density.low}, {density.high}] has no mass there")
    return low, high
