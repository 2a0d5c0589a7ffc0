"""A continuous density times a piecewise-constant factor: how proposals over real t are made."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density.base import Density, check_mass


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
        check_mass(mass, lambda i: f"t = {base.icdf((edges[i] + edges[i + 1]) / 2).item():g}")
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
