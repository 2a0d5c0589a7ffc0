"""ECM over K (Fig. 5, bottom; Fig. 11, middle) and RE over K (Fig. 11, right)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carv.report.findings import Gain, StudyFindings
from carv.report.methods import UNIFORM, Method
from carv.report.plate import Plate, Table, interval, times
from carv.report.style import colour, drawn, legend_above, series, set_ticks, whiskers
from carv.variance.jackknife import Jackknifed
from carv.variance.values import Value

Figure = tuple[Value, tuple[float, float]]
"""A factor and its interval."""
_ROOM = 2.5
_APART = 1.03  # between the curves, so that their error bars can be told from one another
Read = Callable[[Gain], Figure | None]


def ecm_plate(found: StudyFindings, key: str) -> Plate | None:
    """ECM against uniform iid K = 1 for each method over K."""
    best = _largest(found.gains, _ecm)
    if best is None:
        return None
    gain, (value, ends) = best
    assert gain.ecm is not None
    finding = (
        f"The largest ECM beside the baseline's 1 is {times(value)} (95 %: {interval(ends)}), of "
        f"{gain.entry.method.name} at (R, K) = {gain.entry.cell}."
    )
    caption = (
        f"Effective compute multiplier at R = {gain.entry.design.renders}: cost of the baseline over cost of the "
        f"method, in {gain.ecm.cost}, at equal variance. Anchor: the method's variance. Baseline: {gain.ecm.baseline}, "
        "at as many renders as reach that variance. 95 % intervals, paired over renders where predicted; the largest "
        "of many is slightly optimistic."
    )
    return _plate(found, key, "Effective compute multiplier", finding, caption, _ecm, "ECM")


def re_plate(found: StudyFindings, key: str) -> Plate | None:
    """RE against uniform iid at the same R and K for each method over K."""
    others = {method: gains for method, gains in found.gains.items() if method != UNIFORM}
    best = _largest(others, _re)
    if best is None:
        return None
    gain, (value, ends) = best
    finding = (
        f"At equal R and K the largest gain is {times(value)} (95 %: {interval(ends)}), of {gain.entry.method.name} at "
        f"K = {gain.entry.design.renoise}."
    )
    caption = (
        f"Relative efficiency at R = {gain.entry.design.renders}: variance of uniform iid draws over variance of the "
        "method, at the same R and K, hence at the same cost, with 95 % intervals. It isolates what the proposal and "
        "the strata do."
    )
    return _plate(found, key, "Relative efficiency", finding, caption, _re, "RE")


def _plate(found: StudyFindings, key: str, title: str, finding: str, caption: str, read: Read, label: str) -> Plate:
    caption += " A bar that leaves the frame is in the table."
    if found.predicted and any(found.measured.values()):
        caption += " Open markers were measured by brute force."
    svg = drawn(lambda axes: _draw(axes, found, read, label), key, finding)
    return Plate(key, title, finding, caption, svg, _table(found, read, label))


def _ecm(gain: Gain) -> Figure | None:
    return None if gain.ecm is None else (gain.ecm.value, gain.ecm.interval)


def _re(gain: Gain) -> Figure | None:
    figure = gain.efficiency
    if figure is None:
        return None
    return (figure.measured if isinstance(figure, Jackknifed) else figure), figure.interval()


def _largest(gains: Mapping[Method, Sequence[Gain]], read: Read) -> tuple[Gain, Figure] | None:
    """Beside figures that are 1 by definition."""
    known = [(gain, figure) for several in gains.values() for gain in several if (figure := read(gain))]
    known = [(gain, figure) for gain, figure in known if figure[0] != Value(1, 0)]
    return max(known, key=lambda pair: pair[1][0].value, default=None)


def _draw(axes: Any, found: StudyFindings, read: Read, label: str) -> None:
    seen: set[int] = set()
    for i, (method, gains) in enumerate(found.gains.items()):
        seen |= _curve(axes, i, method, gains, read)
    if found.predicted:
        for i, gains in enumerate(found.measured_gains.values()):
            seen |= _points(axes, i, gains, read)
    axes.axhline(1, color=colour("soft"), linewidth=0.8)
    largest = _largest(found.gains, read)
    if largest is not None:
        # An error that is many times its figure would flatten all curves.
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low), min(high, _ROOM * max(1.0, largest[1][0].value)))
    axes.set(xscale="log", xlabel="K, re-noisings of each render", ylabel=label)
    set_ticks(axes.xaxis, sorted(seen))
    legend_above(axes)


def _curve(axes: Any, i: int, method: Method, gains: Sequence[Gain], read: Read) -> set[int]:
    first = min((gain.entry.seed for gain in gains if gain.entry.seed is not None), default=None)
    known = [(gain, figure) for gain in gains if gain.entry.seed == first and (figure := read(gain))]
    return _bars(axes, i, known, label=method.name, elinewidth=0.9, **series(i))


def _points(axes: Any, i: int, gains: Sequence[Gain], read: Read) -> set[int]:
    look = {**series(i), "linestyle": "none", "markerfacecolor": "none", "markersize": 7}
    return _bars(axes, i, [(gain, figure) for gain in gains if (figure := read(gain))], elinewidth=0.9, **look)


def _bars(axes: Any, i: int, known: Sequence[tuple[Gain, Figure]], **look: Any) -> set[int]:
    if not known:
        return set()
    x, y = [gain.entry.design.renoise for gain, _ in known], [figure[0].value for _, figure in known]
    apart = [k * _APART**i for k in x]
    axes.errorbar(apart, y, whiskers(y, [figure[1] for _, figure in known]), **look)
    return set(x)


def _table(found: StudyFindings, read: Read, label: str) -> Table:
    groups = [("predicted", found.gains)] if found.predicted else []
    groups.append(("measured", found.measured_gains))
    rows, beyond = [], False
    for kind, several in groups:
        for method, gains in several.items():
            for gain in gains:
                figure = read(gain)
                if figure is None:
                    continue
                outside = label == "ECM" and gain.ecm is not None and gain.ecm.extrapolated
                beyond |= outside
                seed = "" if gain.entry.seed is None else f", seed {gain.entry.seed}"
                value = times(figure[0]) + (" †" if outside else "")
                cell = (method.name, str(gain.entry.cell), kind + seed)
                rows.append((*cell, value, interval(figure[1]) if math.isfinite(figure[1][1]) else "not known"))
    note = "† rests on a slope of -1 beyond the baseline's measured cells." if beyond else ""
    return Table(("Method", "(R, K)", "How", label, "95 %"), tuple(rows), note)
