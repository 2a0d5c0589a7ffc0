"""What a method is worth: relative efficiency, the effective compute multiplier, the Pareto front, fair rankings.

    RE  = Var_baseline(R, K) / Var_method(R, K)          at the same R and K
    ECM = C_baseline(V) / C_method(V)                    at the same variance V          (Sec. 3.2, C.1.5)

C(V) is the cost at which a curve of configurations reaches variance V: log-log interpolation between those that were
measured, slope -1 (twice the cost for half the variance) beyond them. V is one of two anchors, which answer different
questions: the METHOD's variance (what the baseline would pay for what the method gives) or the BASELINE's (what the
method would pay for what the baseline gives; the paper's headline). Where variance is proportional to 1/R and cost
to R both equal (V_b C_b) / (V_m C_m).

Figures of one pilot are compared render by render (`carv.variance.jackknife.derived`), others by the delta method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from carv.rng import Stream
from carv.variance.bootstrap import bootstrap
from carv.variance.cost import ModelledCost
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.values import NORMAL_95, Value, ratio

Figure: TypeAlias = Jackknifed | Value
"""A variance with its error: predicted from a pilot, or measured by itself."""

Anchor: TypeAlias = Literal["method", "baseline"]
"""Whose variance is the common one."""

_SAME = 1e-10  # exact figures closer than this are equal up to rounding
_STEP = 1e-6  # of the logarithms, for derivatives; the function is linear in them between measured points


@dataclass(frozen=True, eq=False)
class Point:
    """One configuration: what it costs and what variance it leaves.

    Attributes:
        name: for people.
        variance: of one estimate.
        cost: of one estimate, in the unit of all points it is compared with.
    """

    name: str
    variance: Figure
    cost: Value


@dataclass(frozen=True)
class ECM:
    """An effective compute multiplier, and all that its meaning depends on.

    Attributes:
        value: the factor with its standard error.
        interval: 95 %; of a paired comparison, on the scale of the logarithm, where there was one.
        anchor: whose variance both reach.
        baseline, method: the names of the two configurations.
        cost: what was counted, e.g. "seconds" or "teacher calls".
        extrapolated: whether a cost rests on slope -1 beyond the measured points.
    """

    value: Value
    interval: tuple[float, float]
    anchor: Anchor
    baseline: str
    method: str
    cost: str
    extrapolated: bool

    def __str__(self) -> str:
        return self.value.times()

    def describe(self) -> str:
        """The factor with its conditions, as it belongs in a table's caption."""
        beyond = ", extrapolated with slope -1" if self.extrapolated else ""
        return f"{self}: {self.method} against {self.baseline}, {self.cost} at the {self.anchor}'s variance{beyond}"


def relative_efficiency(baseline: Figure, method: Figure) -> Figure:
    """RE = Var_baseline / Var_method.

    Args:
        baseline, method: variances at the same (R, K). Two of one pilot are paired; others are taken as independent.

    Raises:
        ValueError: a method without variance; figures of pilots with different numbers of renders.
    """
    if method.value == 0:
        raise ValueError("a ratio needs a variance that is not 0")
    if isinstance(baseline, Jackknifed) and isinstance(method, Jackknifed):
        return derived(lambda a, b: a / b, baseline, method)
    return ratio(_plain(baseline), _plain(method))


def ecm(
    baseline: Point,
    method: Point,
    *,
    anchor: Anchor = "baseline",
    baseline_curve: Sequence[Point] = (),
    method_curve: Sequence[Point] = (),
    cost: str = "seconds",
    resample: Stream | None = None,
) -> ECM:
    """ECM = C_baseline(V) / C_method(V) at the anchor's variance V.

    A curve passes through its points in the order of their variances; a point alone is a line of slope -1. Variances
    of one pilot are paired over renders; plain values, of variances or costs, count as independent, which
    is conservative where errors are shared. Costs of one `CostModel` err together, and are taken so.

    Args:
        baseline, method: the two configurations.
        anchor: the one whose variance both have to reach.
        baseline_curve, method_curve: the same methods at other cost, e.g. other R. The points above may be among them.
        cost: the unit, for the record.
        resample: the interval over renders by the bootstrap, with resamples from this stream; `None`: Student's of the
            jackknife. A pilot with a projection has the latter only.

    Raises:
        ValueError: a variance or a cost that is not positive; figures of pilots with different numbers of renders.

    Example:
        >>> uniform = [Point(f"({r},1)", Value(4.4 / r, 0), Value(135 * r, 0)) for r in (2, 4)]
        >>> found = ecm(uniform[0], Point("(1,8)", Value(1.76, 0.05), Value(340, 0)), baseline_curve=uniform)
        >>> print(found, found.extrapolated)
        0.993(28)x True
    """
    ours = [baseline, *(point for point in baseline_curve if point is not baseline)]
    theirs = [method, *(point for point in method_curve if point is not method)]
    points = ours + theirs
    for point in points:
        if not (point.variance.value > 0 and point.cost.value > 0):
            raise ValueError(
                f"an ECM needs positive variances and costs; {point.name} has {point.variance} and {point.cost}: "
                "measure more renders"
            )

    def log_ecm(log_variance: np.ndarray, log_cost: np.ndarray) -> float:
        at, n = float(log_variance[_anchor(anchor, len(ours))]), len(ours)
        return _log_cost(at, log_variance[:n], log_cost[:n]) - _log_cost(at, log_variance[n:], log_cost[n:])

    v = np.log([point.variance.value for point in points])
    c = np.log([point.cost.value for point in points])
    paired = [p.variance if isinstance(p.variance, Jackknifed) else Jackknifed(p.variance.value) for p in points]
    each = _elementwise(lambda given: math.exp(log_ecm(given, c)))
    total = derived(each, *paired)
    alone = [0.0 if isinstance(p.variance, Jackknifed) else p.variance.relative_error for p in points]
    rest = math.hypot(
        _delta(lambda given: log_ecm(given, c), v, alone),
        _cost_error(lambda given: log_ecm(v, given), c, [p.cost for p in points]),
    )
    at = v[_anchor(anchor, len(ours))]
    outside = _outside(at, v[len(ours) :] if anchor == "baseline" else v[: len(ours)])
    resampled = resample is not None and len(total.without) > 0 and not len(total.without_block)
    ends = bootstrap(each, *paired, stream=resample) if resample is not None and resampled else total.interval()
    value, interval = _together(total, ends, rest)
    return ECM(value, interval, anchor, baseline.name, method.name, cost, outside)


def comparable(a: Figure, b: Figure) -> bool:
    """Whether a and b can be ranked: the 95 % interval of their ratio (paired, in one pilot) leaves out 1.

    Exact figures can be ranked unless they are equal up to rounding. A figure whose error is not known never can.

    Raises:
        ValueError: figures of pilots with different numbers of renders.
    """
    scale = max(abs(a.value), abs(b.value))
    if not math.isfinite(scale) or abs(a.value - b.value) <= _SAME * scale:
        return False
    if isinstance(a, Jackknifed) and isinstance(b, Jackknifed):
        positive = min(a.value, b.value, *a.without, *b.without) > 0
        pair = _known(derived((lambda x, y: x / y) if positive else (lambda x, y: x - y), a, b))
        low, high = pair.interval() if pair else (-math.inf, math.inf)
        return not low <= (1 if positive else 0) <= high
    error = math.hypot(a.error, b.error)
    return abs(a.value - b.value) > NORMAL_95 * error  # False for NaN


def pareto_front(points: Sequence[Point], clearly: bool = False) -> list[Point]:
    """The points that no other beats in both cost and variance, from the cheapest on.

    Args:
        points: in one unit of cost; errors of costs are not looked at.
        clearly: drop a point only if one that costs no more has a variance that is clearly smaller (`comparable`).
            The front then has all points that may be on it.

    Raises:
        ValueError: figures of pilots with different numbers of renders.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost.value, point.variance.value)):
        rivals = (other for other in points if _beats(other, point))
        if clearly:
            rivals = (other for other in rivals if comparable(other.variance, point.variance))
        if next(rivals, None) is None:
            front.append(point)
    return front


def _beats(a: Point, b: Point) -> bool:
    cost, variance = (a.cost.value, b.cost.value), (a.variance.value, b.variance.value)
    return cost[0] <= cost[1] and variance[0] <= variance[1] and (cost[0] < cost[1] or variance[0] < variance[1])


def _plain(figure: Figure) -> Value:
    return figure.measured if isinstance(figure, Jackknifed) else figure


def _anchor(anchor: Anchor, ours: int) -> int:
    return 0 if anchor == "baseline" else ours


def _log_cost(at: float, log_variance: np.ndarray, log_cost: np.ndarray) -> float:
    """The logarithm of a curve's cost at a variance."""
    order = np.argsort(log_variance, kind="stable")
    v, c = log_variance[order], log_cost[order]
    return float(np.interp(at, v, c)) + max(0.0, float(v[0]) - at) - max(0.0, at - float(v[-1]))


def _outside(at: float, log_variance: np.ndarray) -> bool:
    return not log_variance.min() - _SAME <= at <= log_variance.max() + _SAME


def _elementwise(function: Callable[[np.ndarray], float]) -> Callable[..., float | np.ndarray]:
    """function(log of the variances) of numbers, or of arrays entry by entry; NaN where one is not positive."""

    def each(*given: float | np.ndarray) -> float | np.ndarray:
        rows = np.stack(np.broadcast_arrays(*given), axis=-1).astype(np.float64)
        found = [function(np.log(row)) if row.min() > 0 else math.nan for row in rows.reshape(-1, rows.shape[-1])]
        return np.array(found).reshape(rows.shape[:-1]) if rows.ndim > 1 else found[0]

    return each


def _delta(function: Callable[[np.ndarray], float], at: np.ndarray, errors: Sequence[float]) -> float:
    """The standard error of a function of independent logarithms, to first order; infinite if one is not known."""
    total = 0.0
    for slope, error in zip(_slopes(function, at), errors, strict=True):
        if abs(slope) > _SAME and error != 0:
            total += (slope * error) ** 2 if math.isfinite(error) else math.inf
    return math.sqrt(total)


def _cost_error(function: Callable[[np.ndarray], float], at: np.ndarray, costs: Sequence[Value]) -> float:
    """As `_delta`, for the logarithms of costs; those of one model are its coefficients' linear functions."""
    slopes = _slopes(function, at)
    alone = [0.0 if isinstance(cost, ModelledCost) else cost.relative_error for cost in costs]
    total = _delta(function, at, alone) ** 2
    models: dict[tuple[tuple[float, ...], ...], np.ndarray] = {}
    for slope, cost in zip(slopes, costs, strict=True):
        if isinstance(cost, ModelledCost):
            models.setdefault(cost.covariance, np.zeros(len(cost.terms)))
            models[cost.covariance] += slope / cost.value * np.array(cost.terms)
    for covariance, terms in models.items():
        total += max(0.0, float(terms @ np.array(covariance) @ terms))
    return math.sqrt(total)


def _slopes(function: Callable[[np.ndarray], float], at: np.ndarray) -> list[float]:
    steps = _STEP * np.eye(len(at))
    return [(function(at + step) - function(at - step)) / (2 * _STEP) for step in steps]


def _known(figure: Jackknifed) -> Jackknifed | None:
    """The figure, unless a leave-one-out value is not finite: its error is not known then, and is not 0."""
    return figure if np.isfinite(figure.without).all() and np.isfinite(figure.without_block).all() else None


def _together(total: Jackknifed, ends: tuple[float, float], rest: float) -> tuple[Value, tuple[float, float]]:
    """A positive factor with the errors of both sources: its interval over renders, and `rest`, a relative error."""
    value = total.value
    if _known(total) is None or not math.isfinite(rest):
        return Value(value, math.inf), (0.0, math.inf)
    low, high = ends
    error, half = math.hypot(total.error, rest * value), NORMAL_95 * rest
    if low > 0:
        low, high = (value * math.exp(sign * math.hypot(math.log(end / value), half)) for sign, end in _ends(low, high))
    else:
        low, high = (value + sign * math.hypot(end - value, half * value) for sign, end in _ends(low, high))
    return Value(value, error), (low, high)


def _ends(low: float, high: float) -> tuple[tuple[int, float], tuple[int, float]]:
    return (-1, low), (1, high)
