"""What a design does to the tables: the joint law of two of its draws, with their weights, over bins of t.

Strata cut the line of `carv.variance.lines` in u = CDF_q(t), bins in v = CDF_p(t): all masses are lengths of its
pieces, and no grid in t is needed.

Within a bin F is taken as linear, with its mean in the bin kept and the slope from the two neighbours:

    F(v) = F_i + (v - c_i) (F_{i+1} - F_{i-1}) / (c_{i+1} - c_{i-1}) = sum_j L_j(v) F_j

(one-sided at the ends; no slope where a bin is one atom, inside which F is constant). Whatever is a union of bins is
exact, and the rest, strata that cut bins, has an error of fourth order in the bins' width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from carv import strata
from carv.strata import Coupling, Pairs
from carv.variance.lines import Line, Pieces, line

__all__ = ["Line", "PairLaw", "line", "pair_law"]


@dataclass(frozen=True, eq=False)
class PairLaw:
    """The laws of pairs of draws, times their weights, as coefficients of the entries of Gw and Gc.

    Attributes:
        same_t: `[M, M]`, sum q omega^2 at ONE t: with Gw it makes sum q omega^2 E_x|F_x(t)|^2. Diagonal for atoms.
        within: `[M, M]`, Qw omega omega': of two draws of one render; 0 where there is no such pair (K = 1).
        across: `[M, M]`, Qc omega omega': of two draws of different renders; 0 for R = 1.
    """

    same_t: np.ndarray
    within: np.ndarray
    across: np.ndarray


def pair_law(
    joined: Line, edges: np.ndarray, renders: int, renoise: int, coupling: Coupling, atoms: bool = False
) -> PairLaw:
    """The pair law of a coupling of `carv.strata`.

    With a_b(i) = int L_i dv over stratum b of q (the p-mass of bin i in it, where b is a union of bins), and B = R K,

        iid          Qw = Qc = p p'
        per_render   Qw = K/(K-1) (p p' - sum_b a_b a_b'), b of K;   Qc = p p'
        global       Qw = Qc = B/(B-1) (p p' - sum_b a_b a_b'), b of B
        nested       Qw as per_render;   Qc = p p' - sum_c a_c a_c' + R/(R-1) (sum_c a_c a_c' - sum_b a_b a_b'), c of K
        systematic   Qw = Qc = (E_xi[h h'] - B same_t) / (B (B-1)),   h_i(xi) = sum of omega L_i over the lattice
        Pairs        Qw = sum_bc Q_bc / (pi_b pi_c) a_b a_c', b and c of its bins;   Qc = p p'

    Args:
        joined: the line of the proposal.
        edges: `[M + 1]`, the bins in v.
        renders, renoise: R and K of the coupling. With antithetic noise K is the number of PAIRS of a render.
        coupling: a function of `carv.strata`, or one of its `Pairs`.
        atoms: whether each bin is one atom of p.

    Raises:
        ValueError: counts below 1; a coupling without a known pair law; `Pairs` with other than two draws.
    """
    if renders < 1 or renoise < 1:
        raise ValueError(f"a design needs at least one render and one draw, got renders={renders}, renoise={renoise}")
    if isinstance(coupling, Pairs) and renoise != 2:
        raise ValueError(f"a pair design draws two timesteps for each render, got renoise = {renoise}")
    if not isinstance(coupling, Pairs) and coupling not in _LAWS:
        known = ", ".join(law.__name__ for law in _LAWS)
        raise ValueError(f"no pair law is known for the coupling {coupling!r}; known are {known} of carv.strata")
    size = len(edges) - 1
    whole = joined.cut(edges, np.empty(0))
    p = np.diff(edges)
    # Where q = 0 the contribution is 0 (`predict` checks): all a bin contributes lies in the part that q visits.
    seen = np.bincount(whole.bins, whole.mass, size)
    scale = np.divide(p, seen, out=np.zeros(size), where=seen > 0)
    design = _Design(joined, edges, scale, p * (seen > 0), renders, renoise, atoms)
    same_t = design.same_t(whole)
    within, across = _pairs(design, coupling) if isinstance(coupling, Pairs) else _LAWS[coupling](design)
    zero = np.zeros((size, size))
    return PairLaw(same_t, within if renoise > 1 else zero, across if renders > 1 else zero)


@dataclass(frozen=True, eq=False)
class _Design:
    joined: Line
    edges: np.ndarray
    scale: np.ndarray
    p: np.ndarray
    renders: int
    renoise: int
    atoms: bool

    def masses(self, count: int) -> np.ndarray:
        """a_b(i), `[count, M]`, of equal strata."""
        return self.masses_between(np.arange(count + 1) / count)

    def masses_between(self, cuts: np.ndarray) -> np.ndarray:
        """a_b(i), `[len(cuts) - 1, M]`, of the strata between the cuts in u."""
        count, pieces = len(cuts) - 1, self.joined.cut(self.edges, cuts)
        stratum = (np.searchsorted(cuts, pieces.middle, side="right") - 1).clip(0, count - 1)
        return self.spread(stratum, pieces.bins, pieces.mass, pieces.v, count)

    def spread(self, row: np.ndarray, bins: np.ndarray, weight: np.ndarray, v: np.ndarray, rows: int) -> np.ndarray:
        """sum of weight L(v) by row, `[rows, M]`."""
        size = len(self.p)
        weight = weight * self.scale[bins]
        total = self.histogram(row, bins, weight, rows)
        if not self.atoms:
            left, right, per_v = self.slope(bins)
            tilt = weight * (v - (self.edges[bins] + self.edges[bins + 1]) / 2) * per_v
            total += self.histogram(row, right, tilt, rows) - self.histogram(row, left, tilt, rows)
        return total.reshape(rows, size)

    def slope(self, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The neighbours of each bin, and 1 over the distance of their centres."""
        left, right = np.maximum(bins - 1, 0), np.minimum(bins + 1, len(self.p) - 1)
        centre = (self.edges[1:] + self.edges[:-1]) / 2
        distance = centre[right] - centre[left]
        return left, right, np.divide(1.0, distance, out=np.zeros(np.shape(bins)), where=distance > 0)

    def histogram(self, row: np.ndarray, column: np.ndarray, weight: np.ndarray, rows: int) -> np.ndarray:
        size = len(self.p)
        return np.bincount((row * size + column).ravel(), weight.ravel(), rows * size).reshape(rows, size)

    def same_t(self, pieces: Pieces) -> np.ndarray:
        """sum q omega^2 L L', `[M, M]`: over a piece, the square at its middle plus the slope's share of dv^2 / 12."""
        weight = pieces.omega * pieces.mass * self.scale[pieces.bins] ** 2
        size = len(self.p)
        if self.atoms:
            return np.diag(np.bincount(pieces.bins, weight, size))
        left, right, per_v = self.slope(pieces.bins)
        x = (pieces.v - (self.edges[pieces.bins] + self.edges[pieces.bins + 1]) / 2) * per_v
        steep = (pieces.mass * per_v) ** 2 / 12
        # L = e_i + x (e_right - e_left), L L' entry by entry.
        terms = (
            (pieces.bins, pieces.bins, np.ones_like(x)),
            (pieces.bins, right, x),
            (right, pieces.bins, x),
            (pieces.bins, left, -x),
            (left, pieces.bins, -x),
            (right, right, x**2 + steep),
            (left, left, x**2 + steep),
            (left, right, -(x**2) - steep),
            (right, left, -(x**2) - steep),
        )
        total = np.zeros((size, size))
        for i, j, factor in terms:
            total += self.histogram(i, j, weight * factor, size)
        return total


_Laws = tuple[np.ndarray, np.ndarray]


def _iid(design: _Design) -> _Laws:
    both = np.outer(design.p, design.p)
    return both, both


def _per_render(design: _Design) -> _Laws:
    both, strata_of = np.outer(design.p, design.p), design.masses(design.renoise)
    return _different(both, strata_of.T @ strata_of, design.renoise), both


def _global(design: _Design) -> _Laws:
    count = design.renders * design.renoise
    strata_of = design.masses(count)
    law = _different(np.outer(design.p, design.p), strata_of.T @ strata_of, count)
    return law, law


def _nested(design: _Design) -> _Laws:
    fine = design.masses(design.renders * design.renoise)
    coarse = fine.reshape(design.renoise, design.renders, -1).sum(1)
    both, same = np.outer(design.p, design.p), coarse.T @ coarse
    return _different(both, same, design.renoise), both - same + _different(same, fine.T @ fine, design.renders)


def _pairs(design: _Design, coupling: Pairs) -> _Laws:
    pi = coupling.marginals.numpy()
    # Given its bin b a draw is uniform over a length of pi_b, so that a_b / pi_b is its mean contribution.
    mean = np.divide(1.0, pi, out=np.zeros_like(pi), where=pi > 0)[:, None]
    mean = mean * design.masses_between(coupling.ends.numpy())
    return mean.T @ np.asarray(coupling.joint) @ mean, np.outer(design.p, design.p)


def _systematic(design: _Design) -> _Laws:
    """Between the shifts xi at which some point passes an end of a piece, h is linear in xi."""
    count = design.renders * design.renoise
    pieces = design.joined.cut(design.edges, np.empty(0))
    shifts = np.unique(np.concatenate([[0.0, 1.0], np.mod(pieces.ends * count, 1.0)]))
    middle, length = (shifts[1:] + shifts[:-1]) / 2, np.diff(shifts)
    u = (np.arange(count) + middle[:, None]) / count
    at = (np.searchsorted(pieces.ends, u, side="right") - 1).clip(0, len(pieces.bins) - 1)
    row = np.broadcast_to(np.arange(len(middle))[:, None], at.shape)
    bins, omega = pieces.bins[at], pieces.omega[at]
    v = pieces.v[at] + omega * (u - pieces.middle[at])
    h = design.spread(row, bins, omega, v, len(middle))
    square = (h.T * length) @ h
    if not design.atoms:  # how h changes over the interval, as a point's v moves by omega length / B
        change = h - design.spread(row, bins, omega, v - omega * length[:, None] / count, len(middle))
        square += (change.T * (length / 12)) @ change
    law = (square - count * design.same_t(pieces)) / max(1, count * (count - 1))
    return law, law


def _different(all_pairs: np.ndarray, same: np.ndarray, count: int) -> np.ndarray:
    """The law of a pair in DIFFERENT strata out of `count` equally likely ones."""
    return np.asarray((all_pairs - same) * (count / max(1, count - 1)))


_LAWS: dict[Coupling, Callable[[_Design], _Laws]] = {
    strata.iid: _iid,
    strata.per_render: _per_render,
    strata.global_strata: _global,
    strata.systematic: _systematic,
    strata.nested: _nested,
}
