"""The law of |mean|^2, estimated without bias, where the mean is 0, and upper bounds where it is not known to be.

    T = sum_{i != j} <d_i, d_j> / (m (m - 1))            a U-statistic of m independent vectors, from their Gram matrix

For d of mean b and covariance Sigma, E T = |b|^2 and Var T = 2 tr(Sigma^2) / (m (m - 1)) + 4 b' Sigma b / m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from carv.rng import Stream

_AT_ONCE = 4096
_EXCEEDING = 5  # T is too large if fewer sign flips than this reach it, of 5 / level


def exceeds(gram: Tensor, level: float, stream: Stream) -> tuple[float, bool]:
    """Whether T is too large for b = 0, by random signs: (p value, whether it is at most the level).

        T* = sum_{i != j} s_i s_j <d_i, d_j> / (m (m - 1)),   s = +-1,      p = (1 + number of T* >= T) / (1 + number)

    For symmetric d the test is exact at any m. It ends as soon as p cannot be small any more.

    Args:
        gram: `[m, m]` float64, <d_i, d_j>.
        level: of the test.
        stream: of the signs.
    """
    m, draws = len(gram), math.ceil(_EXCEEDING / level)
    off = gram - gram.diagonal().diag()
    # What rounding makes of equal sums must not count as smaller: with all d alike, flipping all signs changes nothing.
    reached = float(off.sum()) - 1e-12 * float(off.abs().sum())
    allowed, above, done = math.floor(level * (draws + 1)) - 1, 0, 0
    rng = stream.generator()
    while done < draws and above <= allowed:
        count = min(_AT_ONCE, draws - done)
        signs = torch.randint(2, (count, m), generator=rng, dtype=torch.int8).to(off).mul_(2).sub_(1)
        above += int(((signs @ off) * signs).sum(1).ge(reached).sum())
        done += count
    return (1 + above) / (1 + done), above <= allowed


@dataclass(frozen=True)
class Spread:
    """What the variance of T consists of, and how sure a bound is to be.

    Attributes:
        top: sd of the mean of d along the direction in which d varies most: the root of the largest eigenvalue of
            Sigma / m.
        rest: sd of T from all other directions.
        z: the one-sided normal quantile of the confidence.
    """

    top: float
    rest: float
    z: float

    def upper(self, square: float, factor: float = 1.0) -> float:
        """The largest |b| for which T would be as small as it is with probability 1 - confidence.

        The worst case: b along the top direction, where T = (|b| + e)^2 - top^2 + others with e ~ N(0, top^2), whose
        lower quantile is (|b| - z top)^2 - top^2. The distances of independent quantiles from the mean add in squares,
        which is exact for one direction and for very many.

        Args:
            square: T, or what it may become.
            factor: how many times as many replicates there are to be.
        """
        top, rest = self.top / math.sqrt(factor), self.rest / factor

        def lower_quantile(b: float) -> float:
            down = b**2 - max(0.0, b - self.z * top) ** 2 + top**2
            return b**2 - math.hypot(down, self.z * rest)

        if top == rest == 0:
            return math.sqrt(max(square, 0.0))
        low, high = 0.0, top + math.sqrt(rest) + math.sqrt(max(square, 0.0))
        while lower_quantile(high) <= square:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if lower_quantile(middle) <= square else (low, middle)
        return high


def spread_of(gram: Tensor, confidence: float) -> Spread:
    """Top and rest from the centred Gram matrix: both are rather too large than too small where m is small.

    Args:
        gram: `[m, m]` float64, <d_i, d_j>.
        confidence: of the bounds, one-sided.
    """
    m = len(gram)
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    top_square = max(0.0, float(torch.linalg.eigvalsh(centred)[-1])) / (m - 1) / m
    off = centred - centred.diagonal().diag()
    variance = 2 * float(off.square().sum()) / (m * (m - 1)) ** 2
    return Spread(math.sqrt(top_square), math.sqrt(max(0.0, variance - 2 * top_square**2)), _z(confidence))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence)
