"""Intervals by resampling the renders of a pilot: for figures too far from linear for the jackknife's.

Each render i has a pseudo-value P_i = n theta - (n - 1) theta_(-i) (Tukey 1958) of every figure: their mean is the
figure, and for what is linear in the tables they are what the render itself says. A resample draws n renders with
replacement, the SAME ones for all figures, and applies the function to the means of their pseudo-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from carv.rng import Stream
from carv.variance.jackknife import Jackknifed, derived

_MIN_RENDERS = 4
_IN_TAILS = 20  # resamples beyond the ends of the interval, at least
_AT_ONCE = 1 << 22  # numbers in memory
_CLEAR = 0.5  # the relative error below which a positive figure's logarithm is taken, as in `Jackknifed.interval`


def bootstrap(
    function: Callable[..., float | np.ndarray],
    *figures: Jackknifed,
    stream: Stream,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The interval of function(figures): the studentised bootstrap (Efron & Tibshirani 1993, Sec. 12.5).

        [theta - t_hi se, theta - t_lo se],     t_lo, t_hi quantiles of t* = (theta* - theta) / se*

    with se the jackknife's error, and se* that within the resample. On the scale of log(theta) where theta is clearly
    positive, as `Jackknifed.interval`. Where that one takes Student's law, this one has the law of t from the renders
    themselves, so that it is not symmetric. On the Gaussian toy with 20 or 40 renders 95 % intervals of a variance, a
    relative efficiency and an ECM covered 90 to 96 % (400 or 600 pilots: +-1 to 1.5 %), the jackknife's 91 to 97 %,
    percentile intervals 80 to 95 % and BCa ones 83 to 95 %.

    Pilots with a random projection are refused: with blocks resampled like renders, intervals of a relative efficiency
    covered 87 % where `Jackknifed.interval` covered 93 % (200 pilots with 16 blocks).

    Args:
        function: of as many numbers (or arrays of one shape, element by element) as there are figures, e.g.
            `lambda a, b: a / b`.
        figures: of ONE pilot. Exact ones may be among them.
        stream: which resamples are drawn.
        resamples: how many; with 2000 the ends still move by 1 to 3 % of the interval's length from stream to stream.
        level: of the interval.

    Raises:
        ValueError: figures of pilots with different numbers of renders, with fewer than 4, or with a projection; a
            level outside (0, 1); too few resamples for it; a function that is not finite at the figures.

    Example:
        >>> figure = Jackknifed(2.0, np.array([1.9, 2.0, 2.1, 2.05, 1.95]))
        >>> low, high = bootstrap(lambda x: x, figure, stream=Stream(0))
        >>> low < 2.0 < high
        True
    """
    _check(figures, level, resamples)
    whole = derived(function, *figures)
    if not (math.isfinite(whole.value) and math.isfinite(whole.error)):
        raise ValueError(f"the function is not finite at the figures of all renders, or without one: {whole.value:g}")
    if whole.error == 0:
        return whole.value, whole.value
    if whole.without.min() > 0 and whole.error < _CLEAR * whole.value:
        interval = _studentised(lambda *x: _log(function(*x)), figures, stream, resamples, level)
        if all(map(math.isfinite, interval)):
            return math.exp(interval[0]), math.exp(interval[1])
    return _studentised(function, figures, stream, resamples, level)


def _studentised(
    function: Callable[..., float | np.ndarray],
    figures: tuple[Jackknifed, ...],
    stream: Stream,
    resamples: int,
    level: float,
) -> tuple[float, float]:
    whole = derived(function, *figures)
    pseudo = _pseudo_values(figures, len(whole.without))
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(stream.digest(16), "little")))
    step = max(1, _AT_ONCE // pseudo.size)
    parts = [_resample(function, pseudo, min(step, resamples - first), rng) for first in range(0, resamples, step)]
    theta, error = (np.concatenate(column) for column in zip(*parts, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (theta - whole.value) / error
    # Where a resample leaves the function's range nothing is known: the upper end is then the one that suffers.
    t = np.where(np.isnan(t), -np.inf, t)
    low = float(np.quantile(t, (1 - level) / 2, method="lower"))
    high = float(np.quantile(t, (1 + level) / 2, method="higher"))
    return whole.value - high * whole.error, whole.value - low * whole.error


def _pseudo_values(figures: tuple[Jackknifed, ...], n: int) -> np.ndarray:
    """`[figures, n]`, P; the figure itself for one that is exact."""
    value = np.array([figure.value for figure in figures])[:, None]
    without = [x.without if len(x.without) else np.full(n, x.value) for x in figures]
    return np.asarray(n * value - (n - 1) * np.stack(without))


def _resample(
    function: Callable[..., float | np.ndarray], pseudo: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """theta* and its jackknife error se*, `[count]` each."""
    n = pseudo.shape[1]
    chosen = pseudo[:, rng.integers(n, size=(count, n))]
    total = chosen.mean(2)
    without = total[:, :, None] + (total[:, :, None] - chosen) / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        theta = np.asarray(function(*total), dtype=np.float64)
        each = np.asarray(function(*without), dtype=np.float64)
        square = (n - 1) / n * np.square(each - each.mean(1, keepdims=True)).sum(1)
    return theta, np.sqrt(square)


def _log(x: float | np.ndarray) -> np.ndarray:
    return np.asarray(np.log(x))


def _check(figures: tuple[Jackknifed, ...], level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is in (0, 1), got {level}")
    if resamples * (1 - level) < _IN_TAILS:
        raise ValueError(f"an interval of level {level} needs at least {_IN_TAILS / (1 - level):.0f} resamples")
    if any(len(figure.without_block) for figure in figures):
        raise ValueError("the bootstrap takes no pilots with a random projection; use `derived(...).interval()`")
    n = max((len(figure.without) for figure in figures), default=0)
    if 0 < n < _MIN_RENDERS:
        raise ValueError(f"resampling needs at least {_MIN_RENDERS} renders, got {n}")
