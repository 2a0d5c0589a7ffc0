"""Figures with intervals from leave-one-out values: renders are the independent units, projections the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from carv.student import student_quantile
from carv.variance.values import Value

_NONE = np.empty(0)
_CLEAR = 0.5  # the relative error below which a positive figure's logarithm is taken


@dataclass(frozen=True, eq=False)
class Jackknifed:
    """A figure, and what it would be without each render.

        error^2 = (n - 1)/n sum_i (theta_(-i) - mean theta_(-.))^2            (Tukey 1958; Efron & Stein 1981)

    over renders, plus the same over the blocks of a random projection if there was one. By Efron and Stein the
    jackknife's expectation is never below the true variance of a figure made of n - 1 renders. Figures of one pilot
    keep their renders aligned, so that a ratio of two is compared pair by pair: see `derived`.

    Attributes:
        value: the figure from all renders.
        without: `[R0]`, the figure without render i; empty when it is exact.
        without_block: `[J]`, the figure without block j of the projection; empty without a projection.
    """

    value: float
    without: np.ndarray = field(default_factory=lambda: _NONE)
    without_block: np.ndarray = field(default_factory=lambda: _NONE)

    @property
    def error(self) -> float:
        """One standard error; 0 for an exact figure."""
        return _error(self.without, self.without_block)[0]

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the error, infinite for an exact figure.

            1/nu = 1/(n - 1) + kappa/(2 n)

        with kappa the excess kurtosis of the leave-one-out values: few renders that carry much make the error itself
        uncertain. With a projection, renders and blocks are combined as Welch and Satterthwaite do.
        """
        return _error(self.without, self.without_block)[1]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval of that level, on the scale of log(theta) where theta is clearly positive.

        Estimates of variances are skewed to the right: a symmetric interval misses the truth above it too often.

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"the level of an interval is in (0, 1), got {level}")
        if self.error == 0:
            return self.value, self.value
        parts = self.without, self.without_block
        positive = min(x.min() for x in parts if len(x)) > 0 and self.error < _CLEAR * self.value
        error, degrees = _error(*(np.log(x) for x in parts)) if positive else _error(*parts)
        half = student_quantile(0.5 + level / 2, degrees) * error
        if positive:
            return self.value * math.exp(-half), self.value * math.exp(half)
        return self.value - half, self.value + half

    @property
    def largest_influence(self) -> float:
        """The share of error^2 that one render carries, in [0, 1]. Above about 0.5 the figure rests on one render."""
        squares = (self.without - self.without.mean()) ** 2 if len(self.without) else _NONE
        return float(squares.max() / squares.sum()) if len(squares) and squares.sum() > 0 else 0.0

    @property
    def measured(self) -> Value:
        """The number with its standard error, as it is printed."""
        return Value(self.value, self.error)

    def __str__(self) -> str:
        return str(self.measured)


def derived(function: Callable[..., float | np.ndarray], *figures: Jackknifed) -> Jackknifed:
    """function(figures), with its interval: applied to the values, and to what they are without each render.

    Args:
        function: of as many numbers (or arrays of one shape, element by element) as there are figures.
        figures: of ONE pilot. Exact ones may be among them.

    Raises:
        ValueError: figures of pilots with different numbers of renders or blocks.

    Example:
        >>> a = Jackknifed(2.0, np.array([1.0, 2.0, 3.0]))
        >>> b = derived(lambda x, y: x / y, a, a)
        >>> b.value, b.error
        (1.0, 0.0)
    """
    return Jackknifed(
        float(function(*(figure.value for figure in figures))),
        _apply(function, [(figure.value, figure.without) for figure in figures], "renders"),
        _apply(function, [(figure.value, figure.without_block) for figure in figures], "projection blocks"),
    )


def _apply(function: Callable[..., float | np.ndarray], parts: list[tuple[float, np.ndarray]], what: str) -> np.ndarray:
    sizes = {len(x) for _, x in parts if len(x)}
    if len(sizes) > 1:
        raise ValueError(f"figures of one pilot have one number of {what}, got {sorted(sizes)}")
    if not sizes:
        return _NONE
    size = sizes.pop()
    return np.asarray(function(*(x if len(x) else np.full(size, value) for value, x in parts)), dtype=np.float64)


def _error(*parts: np.ndarray) -> tuple[float, float]:
    """The standard error from sets of leave-one-out values, and its degrees of freedom."""
    squares, below = 0.0, 0.0
    for without in parts:
        n = len(without)
        if not np.isfinite(without).all():
            return math.nan, math.inf  # unknown, not exact
        centred = without - without.mean() if n else without
        square = float((n - 1) / n * np.square(centred).sum()) if n > 1 else 0.0
        if square > 0:
            squares += square
            below += square**2 * (1 / (n - 1) + max(0.0, _excess_kurtosis(centred)) / (2 * n))
    return math.sqrt(squares), squares**2 / below if below > 0 else math.inf


def _excess_kurtosis(centred: np.ndarray) -> float:
    """The estimator G2, unbiased for normal data (Joanes & Gill 1998); 0 for fewer than 4 numbers."""
    n = len(centred)
    if n < 4:
        return 0.0
    g2 = float(np.mean(centred**4) / np.mean(centred**2) ** 2) - 3
    return (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * g2 + 6)
