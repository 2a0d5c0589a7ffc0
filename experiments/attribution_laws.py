"""Exact variances of sampling designs over a bank of cells: no trials, hence no error of trials.

A bank has M timesteps t_c (cells), evenly spaced in the quantiles of p, and for each some terms h_c(eps) in P columns:
cosines of pairs of clips, or entries of a gradient. A design of B draws picks cells; with a proposal q of the cells

    estimate = 1/B sum_i omega(c_i) h(c_i, eps_i),      omega = (1/M) / q

Its variance needs of the noise only the first two moments in each cell, for which two independent noises suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Design = Literal["iid", "strata", "systematic"]


@dataclass(frozen=True)
class Terms:
    """What a bank knows of its terms, `[M, P]` each.

    Attributes:
        square: unbiased for E[h_c^2].
        first, second: unbiased for E[h_c], with independent errors. Of a bank with fixed noise, where there is nothing
            to average over, both are h itself and `square` its square.
    """

    square: Array
    first: Array
    second: Array

    @classmethod
    def fixed(cls, h: Array) -> Terms:
        """One noise for each cell, which is all there is."""
        return cls(h**2, h, h)

    @classmethod
    def fresh(cls, first: Array, second: Array) -> Terms:
        """Terms at two independent noises for each cell."""
        return cls((first**2 + second**2) / 2, first, second)

    @property
    def mean(self) -> Array:
        """`[P]`, the estimate of all cells."""
        return np.asarray((self.first + self.second).mean(0) / 2)


def variance(terms: Terms, design: Design, budget: int, q: Array | None = None) -> Array:
    """`[P]`, the variance of the estimate from `budget` draws: unbiased where `Terms` is.

        iid          1/B ( sum_c q omega^2 E h^2 - mu^2 )
        strata       1/B^2 sum_s ( sum_c pi_s omega^2 E h^2 - (sum_c pi_s omega E h)^2 )
        systematic   as strata for the noise, and for the means the variance over the one shift

    with pi_s the law of the cell of the draw in stratum s of B.

    Args:
        terms: of the bank.
        design: of the draws.
        budget: B.
        q: `[M]`, the mass of each cell, sum 1; even unless given.
    """
    cells = len(terms.square)
    q = np.full(cells, 1 / cells) if q is None else q / q.sum()
    omega = (1 / cells / q)[:, None]
    square, first, second = omega**2 * terms.square, omega * terms.first, omega * terms.second
    if design == "iid":
        return np.asarray((q @ square - (q @ first) * (q @ second)) / budget)
    laws = stratum_laws(q, budget)
    means = (laws @ first) * (laws @ second)
    if design == "strata":
        return np.asarray((laws @ square - means).sum(0) / budget**2)
    noise = q @ (square - first * second) / budget
    return np.asarray(noise + _over_shifts(first, second, q, budget))


def stratum_laws(q: Array, budget: int) -> Array:
    """`[B, M]`: the law of the cell that the draw in each of B equal strata of the quantiles of q picks."""
    ends = np.concatenate([[0.0], np.cumsum(q)])
    ends[-1] = 1.0
    low, high = np.arange(budget) / budget, np.arange(1, budget + 1) / budget
    inside = np.minimum(ends[None, 1:], high[:, None]) - np.maximum(ends[None, :-1], low[:, None])
    laws: Array = np.clip(inside, 0, None)
    return np.asarray(laws / laws.sum(1, keepdims=True))


def _over_shifts(first: Array, second: Array, q: Array, budget: int) -> Array:
    """E over the shift of the product of both means, less the product of their expectations."""
    ends = np.cumsum(q)[:-1] * budget % 1
    breaks = np.concatenate([[0.0], np.unique(ends), [1.0]])
    middle, length = (breaks[1:] + breaks[:-1]) / 2, np.diff(breaks)
    u = (np.arange(budget)[None] + middle[:, None]) / budget
    cells = np.searchsorted(np.cumsum(q)[:-1], u, side="right")
    a, b = first[cells].mean(1), second[cells].mean(1)
    return np.asarray(length @ (a * b) - (length @ a) * (length @ b))
