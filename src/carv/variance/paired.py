"""Two measured variances compared where their replicates used common random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from carv.variance.values import Value, ratio

_MIN_BLOCKS = 8


class Blocks(TypedDict):
    """What a measurement keeps of y_i = |x_i - c|^2, in the order of its replicates.

    Attributes:
        block: how many consecutive replicates a mean is over.
        means: of y, for replicates 0 .. block - 1, block .. 2 block - 1, and so on.
    """

    block: int
    means: Sequence[float]


@dataclass(frozen=True)
class PairedRatio:
    """Var_a / Var_b, and what its error rests on.

    Attributes:
        value: the ratio with its standard error.
        correlation: of the errors of Var_a and Var_b that was used; 0 if not paired.
        paired: whether the common blocks were used; otherwise the measurements count as independent.
    """

    value: Value
    correlation: float
    paired: bool

    def describe(self) -> str:
        """The ratio, and in half a sentence how it was compared."""
        if not self.paired:
            return f"{self.value.times()}, unpaired"
        return f"{self.value.times()}, paired with a correlation of {self.correlation:.2f}"


def paired_ratio(a_variance: Value, b_variance: Value, a_blocks: Blocks, b_blocks: Blocks) -> PairedRatio:
    """Var_a / Var_b of two measurements whose replicates i drew the same upstream states, noise or timesteps.

        rho = corr over common blocks of (mean y_a, mean y_b),   correlation of the errors = rho sqrt(m / M)

    with m <= M the two numbers of blocks, because the replicates that only one has are independent of the other's.
    To first order in Var_a and Var_b (`ratio`). A positive rho is moved towards 0 by half a standard error of Fisher's
    transform, atanh(rho) - 1/(2 sqrt(m - 3)), but not below 0: from 8 to 40 blocks and for rho up to 0.99, intervals
    of +-1.96 errors then covered 94 to 96 % of simulated ratios, without it 88 to 95 %. A negative one stays as it is.

    With fewer than 8 common blocks, or blocks without any spread, the ratio is that of independent measurements.

    Args:
        a_variance, b_variance: the variances with their errors, in one unit.
        a_blocks, b_blocks: block means of both, from replicate 0 on, of blocks of one size. They must come from the
            same streams, which nothing here can check: other streams show as a correlation near 0.

    Raises:
        ValueError: blocks of different sizes; a mean that is not finite; Var_b = 0.

    Example:
        >>> few = {"block": 50, "means": [1.0, 2.0, 3.0]}
        >>> paired_ratio(Value(2.0, 0.1), Value(1.0, 0.05), few, few).describe()
        '2.00(14)x, unpaired'
    """
    a, b = _means(a_blocks), _means(b_blocks)
    if a_blocks["block"] != b_blocks["block"]:
        raise ValueError(
            f"blocks of {a_blocks['block']} and of {b_blocks['block']} replicates cannot be paired; give both "
            "measurements blocks of one size"
        )
    common, longer = min(len(a), len(b)), max(len(a), len(b))
    if common < _MIN_BLOCKS or np.ptp(a[:common]) == 0 or np.ptp(b[:common]) == 0:
        return PairedRatio(ratio(a_variance, b_variance), 0.0, False)
    found = _cautious(float(np.corrcoef(a[:common], b[:common])[0, 1]), common)
    correlation = found * math.sqrt(common / longer)
    return PairedRatio(ratio(a_variance, b_variance, correlation), correlation, True)


def _cautious(rho: float, blocks: int) -> float:
    if rho <= 0:
        return max(rho, -1.0)
    within = min(rho, 1 - 1e-15)  # rounding can leave 1 or a little more
    return max(0.0, math.tanh(math.atanh(within) - 0.5 / math.sqrt(blocks - 3)))


def _means(blocks: Blocks) -> np.ndarray:
    means = np.asarray(blocks["means"], dtype=np.float64)
    if means.ndim != 1 or not np.isfinite(means).all():
        raise ValueError("block means are a list of finite numbers; this one holds a NaN, an infinity or a list")
    return means
