"""Where the variance of an influence score comes from: timesteps or noise, and the noise's odd or even part."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from attribution_laws import Array, Terms, variance
from attribution_trials import leave_one_out


def ranked_terms(cosines: Array) -> Array:
    """`[M, n, n]` -> `[M, n (n - 1)]`: each query's cosines with the others, less their mean in the same draw.

    That is all that a ranking sees: what all candidates of a query have in common moves no rank.
    """
    others = leave_one_out(cosines)
    return np.asarray((others - others.mean(-1, keepdims=True)).reshape(len(cosines), -1))


def score_terms(cosines: Array) -> Array:
    """`[M, n, n]` -> `[M, n (n - 1) / 2]`: the cosine of each pair."""
    upper = np.triu_indices(cosines.shape[-1], 1)
    return np.asarray(cosines[:, upper[0], upper[1]])


@dataclass(frozen=True)
class Split:
    """The variance of one draw's terms, summed over columns.

    Attributes:
        total: with t and noise drawn.
        timesteps: Var_t E[h | t], which strata of t can remove.
        odd, even: of E Var[h | t], the part that changes its sign with the noise's, which antithetic noise removes,
            and the rest.
    """

    total: float
    timesteps: float
    odd: float
    even: float

    @property
    def noise(self) -> float:
        """E Var[h | t], which no choice of t removes."""
        return self.odd + self.even


def split(first: Array, antithetic: Array, second: Array) -> Split:
    """The split from terms at noise eps, -eps, and another independent noise, `[M, P]` each.

    With h = mean + odd + even:  E[h(eps) h(-eps) | t] - E[h | t]^2 = Var(even | t) - Var(odd | t). Centre the columns
    before: it makes that difference's error smaller, and leaves a bias of one part in M.
    """
    fresh = Terms.fresh(first, second)
    total = float(variance(fresh, "iid", 1).sum())
    noise = float(((first - second) ** 2).mean(0).sum() / 2)
    product = (first * antithetic - (first + antithetic) / 2 * second).mean(0).sum()
    even = (noise + float(product)) / 2
    return Split(total, total - noise, noise - even, even)


def smoothed(values: Array, bins: int) -> Array:
    """A function of the cells, as its mean in each of some bins of neighbours."""
    parts = np.array_split(values, min(bins, len(values)))
    return np.concatenate([np.full(len(part), part.mean()) for part in parts])


def root_proposal(second_moment: Array, bins: int, share: float) -> Array:
    """q ~ sqrt(second moment), smoothed, with a share of p mixed in so that no weight exceeds 1 / share (Eq. 24).

    Args:
        second_moment: `[M]`; for iid draws E[h^2 | t], for strata Var[h | t]. Estimates may be below 0.
        bins: of t.
        share: of p.
    """
    root = np.sqrt(np.clip(smoothed(second_moment, bins), 0, None))
    even = np.full(len(root), 1 / len(root))
    learned = root / root.sum() if root.sum() > 0 else even
    return np.asarray((1 - share) * learned + share * even)
