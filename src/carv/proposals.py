"""Proposals q made from a base p: by a known weight, by measured norms, and so that nothing can be lost.

Each works the same way for discrete and continuous p, and returns a density that is exact to sample and to
divide by.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from carv.density import Density, DiscreteDensity, Reweighted

Factor = Callable[[Tensor], Tensor]
"""t (any shape) -> a factor that is not negative, of the same shape; a `carv.weights.Weight` is one."""


def proportional(base: Density, factor: Factor, cells: int = 1000) -> Density:
    """q ~ p w: the paper's heuristic with w a known weight (Sec. 3.1.2), or any other positive factor.

    Discrete: exact, atom by atom. Continuous: on `cells` equal quantile cells of p, each with Simpson's rule
    for its mass; what is sampled is that piecewise density, so estimates stay exact.

    Args:
        base: p.
        factor: t -> w(t), not negative.
        cells: for a continuous base, how many cells.

    Raises:
        ValueError: a factor that is negative or not finite somewhere in the range, or zero everywhere.

    Example:
        >>> from carv.density import uniform_steps
        >>> q = proportional(uniform_steps(1, 4), lambda t: t.double())
        >>> q.prob(torch.tensor([1, 4])).tolist()
        [0.1, 0.4]
    """
    if isinstance(base, DiscreteDensity):
        return DiscreteDensity(base.first, base.pmf * factor(base.support).to(base.pmf))
    cells_base = _cells(base, cells)
    v = cells_base.edges
    points = torch.stack([v[:-1], (v[:-1] + v[1:]) / 2, v[1:]])
    values = factor(cells_base.base.icdf(points.clamp(max=1 - 2**-53))).to(torch.float64)
    simpson = torch.tensor([1.0, 4.0, 1.0], dtype=torch.float64, device=values.device) / 6
    return Reweighted(cells_base.base, v, cells_base.mass * (simpson @ values))


def oracle(base: Density, t: Shaped[Tensor, " m"], second_moment: Float[Tensor, " m"], cells: int = 1000) -> Density:
    """q* ~ p sqrt(E[|g|^2 | t]): the variance-minimising proposal (Eq. 24), from measured second moments.

    The root is interpolated linearly between the measured t, and constant beyond them.

    Args:
        base: p.
        t: `[m]`, increasing: where E[|g|^2 | t] was measured.
        second_moment: `[m]`, the measured values; not negative.
        cells: as in `proportional`.

    Raises:
        ValueError: t does not increase, the shapes differ, or a moment is negative or not finite.
    """
    if t.ndim != 1 or t.shape != second_moment.shape or len(t) == 0:
        raise ValueError(f"t and second_moment need one shape [m], got {list(t.shape)} and {list(second_moment.shape)}")
    if not bool((t[1:] > t[:-1]).all()):
        raise ValueError("the timesteps of a measured proposal must increase")
    bad = ~(torch.isfinite(second_moment) & (second_moment >= 0))
    if bool(bad.any()):
        raise ValueError(f"second_moment must be finite and not negative, got {second_moment[bad][0].item():g}")
    grid, root = t.to(torch.float64), second_moment.to(torch.float64).sqrt()
    return proportional(base, lambda s: _interpolate(s.to(torch.float64), grid.to(s.device), root.to(s.device)), cells)


def defensive(base: Density, proposal: Density, alpha: float = 0.1, cells: int = 1000) -> Density:
    """(1 - a) q + a p: a proposal whose weights p/q are at most 1/a (Hesterberg 1995).

    A continuous q that is not a `Reweighted` of the same base is first brought onto quantile cells of p.

    Args:
        base: p.
        proposal: q.
        alpha: a in (0, 1], the share that is kept for p.

    Raises:
        ValueError: alpha outside (0, 1]; one law discrete and the other not.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha, the share of the base, must be in (0, 1], got {alpha}")
    if base.discrete != proposal.discrete:
        raise ValueError("the base and the proposal must be both discrete or both continuous")
    if isinstance(base, DiscreteDensity):
        return DiscreteDensity(base.first, alpha * base.pmf + (1 - alpha) * proposal.prob(base.support))
    ours = _cells(base, cells)
    edges = ours.edges
    if isinstance(proposal, Reweighted) and proposal.base == ours.base:
        edges = torch.unique(torch.cat([edges, proposal.edges]))
    at = ours.base.icdf(edges.clamp(max=1 - 2**-53))
    cumulative_p, cumulative_q = ours.cdf(at), proposal.cdf(at)
    cumulative_p[-1] = cumulative_q[-1] = 1.0
    mass = (alpha * cumulative_p + (1 - alpha) * cumulative_q).diff()
    return Reweighted(ours.base, edges, mass.clamp(min=0))


def _cells(base: Density, cells: int) -> Reweighted:
    """A continuous base as a `Reweighted` one: itself, or with `cells` equal cells of factor 1."""
    if isinstance(base, Reweighted):
        return base
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    return Reweighted(base, edges, torch.full((cells,), 1 / cells, dtype=torch.float64))


def _interpolate(x: Tensor, grid: Tensor, values: Tensor) -> Tensor:
    if len(grid) == 1:
        return values.expand(x.shape) if x.ndim else values[0]
    right = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    share = ((x - grid[right - 1]) / (grid[right] - grid[right - 1])).clamp(0, 1)
    return torch.lerp(values[right - 1], values[right], share)
