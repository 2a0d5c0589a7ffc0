"""Across-input and within-input variance by nested replicates: several estimates for each of several inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from carv.variance.jackknife import Jackknifed, derived

Gram: TypeAlias = Float[np.ndarray, "n n"]


@dataclass(frozen=True)
class Nested:
    """n inputs x with M estimates of (1, K) each; by the law of total variance, with independent inputs,

        Var(R, K) = (across + within) / R
        across = tr Cov_x( E[g | x] ),      within = E_x tr Cov( g | x )

    Attributes:
        gram: `[n, n]`, inner products of the inputs' mean estimates.
        squares: `[n]`, for each input sum_m |g_m - mean|^2 / (M - 1), unbiased for tr Cov(g | x).
        estimates: M.
    """

    gram: Gram
    squares: Float[np.ndarray, " n"]
    estimates: int

    @property
    def within(self) -> Jackknifed:
        """E_x tr Cov(g | x): all that remains for a fixed x."""
        total, n = self.squares.sum(), len(self.squares)
        return Jackknifed(float(total / n), (total - self.squares) / (n - 1))

    @property
    def across(self) -> Jackknifed:
        """tr Cov_x(E[g | x]); the scatter of the means without what the estimates' own noise adds to it."""
        between = Jackknifed(_scatter(self.gram), _scatters_without(self.gram))
        return derived(lambda b, w: b - w / self.estimates, between, self.within)

    @property
    def variance(self) -> Jackknifed:
        """Of one estimate of (1, K): R times that of (R, K)."""
        return derived(lambda a, w: a + w, self.across, self.within)


class Replicates:
    """Collects the estimates of one quantity, input by input."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._squares: list[float] = []
        self._estimates = 0

    def add(self, estimates: Float[Tensor, "M D"]) -> None:
        """The M estimates of the next input."""
        mean = estimates.mean(0)
        self._estimates = len(estimates)
        self._means.append(mean)
        self._squares.append(float((estimates - mean).double().square().sum()) / (len(estimates) - 1))

    def nested(self) -> Nested:
        """What they say."""
        gram = torch.zeros(len(self._means), len(self._means), dtype=torch.float64)
        for part in torch.stack(self._means).split(1 << 18, 1):
            gram += part.double() @ part.double().T
        return Nested(gram.numpy(), np.array(self._squares), self._estimates)


def _scatter(gram: Gram) -> float:
    """1/(n - 1) sum_r |m_r - mean|^2 from inner products."""
    n = len(gram)
    return float((np.trace(gram) - gram.sum() / n) / (n - 1))


def _scatters_without(gram: Gram) -> Float[np.ndarray, " n"]:
    """The scatter without each input in turn."""
    n = len(gram)
    trace = np.trace(gram) - np.diag(gram)
    total = gram.sum() - 2 * gram.sum(1) + np.diag(gram)
    return (trace - total / (n - 1)) / (n - 2)
