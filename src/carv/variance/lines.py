"""How a proposal's quantiles lie against those of the base: one increasing line, whose slope is the weight p/q.

Two axes: u, the uniforms that a coupling makes, is CDF_q(t); v = CDF_p(t) is where the bins of tables are. They are
joined by one increasing line, whose slope dv/du is the weight omega = p/q. For discrete laws it is straight within an
atom, for piecewise laws within a cell, so what is made of it is exact; a closed-form q over another closed-form p is
made straight on 8192 cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from carv.density import Density, DiscreteDensity, Reweighted
from carv.variance.tables import describe

_CELLS = 8192


@dataclass(frozen=True, eq=False)
class Line:
    """v against u for a proposal q of a base p: vertices of a polyline from (0, 0) to (1, 1).

    Attributes:
        u, v: `[n + 1]`, cumulative q and p. A piece with dv = 0 has weight 0; one with du = 0 is never drawn.
    """

    u: np.ndarray
    v: np.ndarray

    def slopes(self) -> np.ndarray:
        """`[n]`, omega = p/q on each piece; infinite where q = 0 and p is not."""
        du, dv = np.diff(self.u), np.diff(self.v)
        never = np.where(dv > 0, np.inf, 0.0)
        slopes: np.ndarray = np.divide(dv, du, out=never, where=du > 0)
        return slopes

    def weight(self, v: np.ndarray) -> np.ndarray:
        """omega at quantiles v of p."""
        piece = np.searchsorted(self.v, v, side="right") - 1
        omega: np.ndarray = self.slopes()[piece.clip(0, len(self.v) - 2)]
        return omega

    def cut(self, edges: np.ndarray, cuts: np.ndarray) -> Pieces:
        """The line cut at its vertices, at v = edges and at u = cuts."""
        ends = np.unique(np.concatenate([self.u, np.interp(edges, self.v, self.u), cuts]))
        middle = (ends[1:] + ends[:-1]) / 2
        piece = (np.searchsorted(self.u, middle, side="right") - 1).clip(0, len(self.u) - 2)
        omega = self.slopes()[piece]
        v = self.v[piece] + omega * (middle - self.u[piece])
        bins = (np.searchsorted(edges, v, side="right") - 1).clip(0, len(edges) - 2)
        return Pieces(ends, middle, omega, v, bins)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Ends in u `[m + 1]`; the middle in u, omega, the middle in v, and the bin of each piece `[m]`."""

    ends: np.ndarray
    middle: np.ndarray
    omega: np.ndarray
    v: np.ndarray
    bins: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """Each piece's p-mass, its length in v."""
        return np.asarray(self.omega * np.diff(self.ends))


def line(base: Density, proposal: Density | None) -> Line:
    """The line that joins u to v.

    Raises:
        ValueError: a discrete and a continuous law together.
    """
    if proposal is None or proposal is base:
        return Line(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    if base.discrete != proposal.discrete:
        raise ValueError("the base and the proposal must be both discrete or both continuous")
    if isinstance(base, DiscreteDensity):
        support = torch.arange(int(min(base.low, proposal.low)), int(max(base.high, proposal.high)) + 1)
        laws = (law.cdf(support.to(law.device)) for law in (proposal, base))
        u, v = (np.concatenate([[0.0], cdf.cpu().numpy()]) for cdf in laws)
        return Line(u, v)
    (root_p, edges_p, below_p), (root_q, edges_q, below_q) = _cells(base), _cells(proposal)
    if root_p is root_q or describe(root_p) == describe(root_q):
        at = np.union1d(edges_p, edges_q)
        return Line(np.interp(at, edges_q, below_q), np.interp(at, edges_p, below_p))
    v = np.linspace(0, 1, _CELLS + 1)
    t = base.icdf(torch.from_numpy(v).clamp(max=1 - 2**-53).to(base.device))
    t[0], t[-1] = base.low, base.high
    u = proposal.cdf(t.to(proposal.device)).cpu().numpy()
    # What q has outside the range of p: weight 0.
    return Line(np.concatenate([[0.0], u, [1.0]]), np.concatenate([[0.0], v, [1.0]]))


def _cells(law: Density) -> tuple[Density, np.ndarray, np.ndarray]:
    if isinstance(law, Reweighted):
        return law.base, law.edges.cpu().numpy(), law.cumulative.cpu().numpy()
    return law, np.array([0.0, 1.0]), np.array([0.0, 1.0])
