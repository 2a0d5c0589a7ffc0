"""ECM and RE of the paper's four methods (App. D.1.1), from pilots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from records import Row, over_pilots
from sds_pilots import Pilots

from carv.density import Density
from carv.runs.pilot_folder import PilotRecord
from carv.variance.efficiency import Anchor, Point, ecm
from carv.variance.jackknife import Jackknifed, derived
from carv.variance.predict import PAPER_RENOISE, Prediction, grid, paper_methods
from carv.variance.values import Value

METHODS: Mapping[str, str] = {"uniform": "uniform", "iw": "IW", "strat": "strata", "iw+strat": "IW + strata"}
"""The names of `carv.variance.predict.paper_methods`, as tables print them. IW is q ~ p w, strata are per render."""

AT_ONE = tuple((1, k) for k in PAPER_RENOISE)
"""R = 1 and the paper's K."""

COLUMNS = [f"K = {k}" for k in PAPER_RENOISE]

BASELINE = "uniform iid (1, 1), at the baseline's variance"

Cost: TypeAlias = Callable[[int, int], Value]
"""(R, K) -> what one estimate costs."""

CostOf: TypeAlias = Callable[[PilotRecord], Cost]
"""A pilot -> its costs."""

Cells: TypeAlias = Mapping[tuple[str, int, int], Prediction]

_BASELINE_RENDERS = (1, 2, 4, 8, 16, 32)


def measured(record: PilotRecord) -> Cost:
    """Seconds, timed beside the pilot."""
    return record.cost.predict


def simulated(alpha: float) -> CostOf:
    """alpha R + R K teacher calls (D.1.7), alpha = 0 too."""
    return lambda record: lambda renders, renoise: Value(alpha * renders + renders * renoise, 0.0)


def cells(pilots: Pilots) -> list[Cells]:
    """For each pilot every method and (R, K) of the paper's 18 x 4."""
    return [grid(one.tables, paper_methods(weight_proposal(one))) for one in pilots.values()]


def weight_proposal(record: PilotRecord) -> Density:
    """q ~ p w."""
    found = record.proposals["weight"]
    assert found is not None
    return found


def multiplier(
    baseline: Jackknifed, at: tuple[int, int], variance: Jackknifed, cost: Cost, anchor: Anchor = "baseline"
) -> Value | None:
    """ECM against uniform iid: of (1, 1) at the baseline's variance, or along (R, 1), R = 1..32, at the method's.

    `None` where an estimated variance is not positive: the pilot is too small for it.

    Args:
        baseline: the variance of uniform iid (1, 1); with R renders it is 1/R of that.
        at, variance: (R, K) of a method, and its variance from the same pilot.
        cost: of estimates.
        anchor: whose variance both reach.
    """
    renders = (1,) if anchor == "baseline" else _BASELINE_RENDERS
    curve = [_point((r, 1), derived(lambda v, r=r: v / r, baseline), cost) for r in renders]
    point = _point(at, variance, cost)
    if min(one.variance.value for one in (*curve, point)) <= 0:
        return None
    return ecm(curve[0], point, anchor=anchor, baseline_curve=curve).value


def multipliers(
    pilots: Pilots,
    found: Sequence[Cells],
    cost_of: CostOf = measured,
    at: Iterable[tuple[int, int]] = AT_ONE,
    anchor: Anchor = "baseline",
) -> dict[str, list[list[Value | None]]]:
    """Method -> for each (R, K) the ECM of every pilot."""
    costs = [cost_of(record) for record in pilots.values()]
    return {
        method: [
            [
                multiplier(own["uniform", 1, 1].variance, (r, k), own[method, r, k].variance, cost, anchor)
                for own, cost in zip(found, costs, strict=True)
            ]
            for r, k in at
        ]
        for method in METHODS
    }


def efficiencies(found: Sequence[Cells], at: Iterable[tuple[int, int]] = AT_ONE) -> dict[str, list[list[Value | None]]]:
    """Method -> for each (R, K) the RE of every pilot, against uniform iid at the same (R, K)."""
    return {
        method: [[ratio(own["uniform", r, k].variance, own[method, r, k].variance) for own in found] for r, k in at]
        for method in METHODS
    }


def ratio(baseline: Jackknifed, method: Jackknifed) -> Value | None:
    """Var_baseline / Var_method of one pilot, compared render by render; `None` where one is not positive."""
    if min(baseline.value, method.value) <= 0:
        return None
    return derived(lambda a, b: a / b, baseline, method).measured


def means(
    values: Mapping[str, Sequence[Row]], mean: Callable[[Row], Value | None] = over_pilots, prefix: str = ""
) -> dict[str, list[Value | None]]:
    """The mean over pilots of each cell, under the methods' printed names."""
    return {prefix + METHODS[method]: [mean(cell) for cell in row] for method, row in values.items()}


def named(paper: Mapping[str, Sequence[float]], prefix: str = "") -> dict[str, Sequence[float]]:
    """The paper's rows under the methods' printed names."""
    return {prefix + METHODS[method]: row for method, row in paper.items()}


def _point(at: tuple[int, int], variance: Jackknifed, cost: Cost) -> Point:
    return Point(str(at), variance, cost(*at))
