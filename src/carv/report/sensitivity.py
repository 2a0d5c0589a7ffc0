"""The best K and what it gains, as the cost of a render varies against that of a teacher call (App. D.1.7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from carv.report.methods import UNIFORM, Entry, Method, variance_ratio
from carv.variance.cost import SimulatedCost
from carv.variance.efficiency import Figure
from carv.variance.values import Value

RATIOS = tuple(float(x) for x in np.geomspace(0.3, 300, 61))


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The best K of one method at each cost ratio.

    Attributes:
        method: whose.
        renoise: the best K at each of `RATIOS`.
        ecm: the ECM there, with its error. Being the best of a few it is slightly optimistic.
        interval: 95 % of each.
    """

    method: Method
    renoise: tuple[int, ...]
    ecm: tuple[Value, ...]
    interval: tuple[tuple[float, float], ...]


def sensitivity(cells: Mapping[Method, Sequence[Entry]]) -> tuple[Sensitivity, ...]:
    """For each method the best K at R = 1, by cost(R, K) = alpha R + R K against uniform iid (1, 1).

    Both anchors agree here: ECM = (V_b C_b) / (V_m C_m), since cost is proportional to R.

    Args:
        cells: method -> cells; empty without the baseline.
    """
    one = {entry.design.renoise: entry for entry in cells.get(UNIFORM, ()) if entry.design.renders == 1}
    if 1 not in one:
        return ()
    found = []
    for method, entries in cells.items():
        gains = {
            entry.design.renoise: variance_ratio(one[1], entry)
            for entry in entries
            if entry.design.renders == 1 and entry.seed == one[1].seed
        }
        if len(gains) > 1:
            found.append(_best(method, gains))
    return tuple(found)


def _best(method: Method, gains: Mapping[int, Figure]) -> Sensitivity:
    best, values, intervals = [], [], []
    for alpha in RATIOS:
        cost = SimulatedCost(alpha)
        saved = {k: cost.predict(1, 1).value / cost.predict(1, k).value for k in gains}
        k = max(gains, key=lambda k: saved[k] * gains[k].value)
        low, high = gains[k].interval()
        best.append(k)
        values.append(Value(gains[k].value, gains[k].error).scaled(saved[k]))
        intervals.append((saved[k] * low, saved[k] * high))
    return Sensitivity(method, tuple(best), tuple(values), tuple(intervals))
