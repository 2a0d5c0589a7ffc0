"""Rankings from a part of a bank against those of all of it, by Monte Carlo trials on cached cosines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from carv.rng import Stream

Array = npt.NDArray[np.float64]
Design = Literal["iid", "strata", "systematic"]


def shares(design: Design, budget: int, trials: int, cells: int, at: Stream) -> Array:
    """`[trials, cells]`: of each trial the share of its draws that fell on each cell; rows sum to 1.

    iid draws are with replacement. Strata are those of the cells' quantiles, u = (s + xi) / B, so that B = cells takes
    each cell once: the whole bank. Systematic draws have one xi for all s.

    Args:
        design: of the draws.
        budget: B, the number of draws.
        trials: T.
        cells: M.
        at: where the randomness comes from.
    """
    rng = np.random.default_rng(int.from_bytes(at.digest(16), "little"))
    if design == "iid":
        return rng.multinomial(budget, np.full(cells, 1 / cells), trials) / budget
    xi = rng.random((trials, 1 if design == "systematic" else budget))
    chosen = ((np.arange(budget) + xi) / budget * cells).astype(np.int64).clip(max=cells - 1)
    chosen += cells * np.arange(trials)[:, None]
    return np.bincount(chosen.ravel(), minlength=trials * cells).reshape(trials, cells) / budget


def leave_one_out(scores: Array) -> Array:
    """`[..., n, n]` of all pairs -> `[..., n, n - 1]`: for each query its scores of the others."""
    n = scores.shape[-1]
    others = np.array([[j for j in range(n) if j != i] for i in range(n)])
    return np.take_along_axis(scores, np.broadcast_to(others, (*scores.shape[:-1], n - 1)), -1)


def rank_correlations(cosines: Array, reference: Array, weights: Array) -> Array:
    """`[T, Q]`: Spearman's correlation of each trial's ranking with the reference's.

    Args:
        cosines: `[M, Q, N]`, terms of each cell.
        reference: `[Q, N]`, scores.
        weights: `[T, M]`, from `shares`.
    """
    cells, queries, count = cosines.shape
    scores = (weights @ cosines.reshape(cells, -1)).reshape(len(weights), queries, count)
    found, true = _ranks(scores), _ranks(reference)
    scale = (count**2 - 1) / 12
    middle = (count - 1) / 2
    return np.asarray(((found - middle) * (true - middle)).mean(-1) / scale)


def matching_budget(budgets: Sequence[int], curve: Array, target: float) -> float | None:
    """The budget at which a rising curve reaches a value: linear in log2 of the budget between its points.

    `None` beyond its ends, where there is nothing to interpolate. Wiggles of the trials are ironed out first: the
    curve's running maximum is used.
    """
    rising = np.maximum.accumulate(curve)
    if not rising[0] <= target <= rising[-1]:
        return None
    above = int(np.searchsorted(rising, target, side="left"))
    if above == 0:
        return float(budgets[0])
    low, high = rising[above - 1], rising[above]
    share = (target - low) / (high - low)
    return float(2 ** (np.log2(budgets[above - 1]) * (1 - share) + np.log2(budgets[above]) * share))


def _ranks(scores: Array) -> Array:
    """0..N-1; scores are sums of real numbers, so that ties have no weight."""
    order = scores.argsort(-1)
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), -1)
    return ranks.astype(np.float64)
