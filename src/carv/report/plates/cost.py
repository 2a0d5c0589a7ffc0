"""Variance against cost (Fig. 5, top; Fig. 11, left), with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carv.report.findings import StudyFindings
from carv.report.headline import name
from carv.report.methods import UNIFORM, Entry, Method
from carv.report.plate import Plate, Table, interval, shown
from carv.report.style import colour, drawn, legend_above, log_ticks, series, whiskers
from carv.variance.advice import canonical
from carv.variance.efficiency import pareto_front
from carv.variance.values import Value


def plate(found: StudyFindings, key: str) -> Plate | None:
    """Curves over K at R = 1 and the baseline over R, measured cells over predicted ones."""
    cells = [entry for entries in found.main.values() for entry in entries]
    if len(cells) < 2:
        return None
    front = _front(cells)
    unit = found.costing.unit
    both = bool(found.predicted) and any(found.measured.values())
    finding = _finding(found, cells)
    kind = "predicted from the pilot" if found.predicted else "measured by brute force"
    caption = (
        f"Variance of one estimate ({kind}, 95 % intervals) against its cost in {unit}. Lines follow K at R = 1; "
        "small dots are cells of R > 1, the thin line is uniform K = 1 over R. The stepped line is the Pareto front of "
        "the estimates, its cells marked (R, K)."
    )
    if both:
        caption += " Open markers were measured by brute force."
    if found.costing.assumed:
        caption += " One render is counted as one teacher call, which is an assumption."
    svg = drawn(lambda axes: _draw(axes, found, front), key, finding, size=(4.4, 3.5))
    return Plate(key, "Variance against cost", finding, caption, svg, _table(found, front))


def _finding(found: StudyFindings, cells: Sequence[Entry]) -> str:
    unit = found.costing.unit
    if found.advice is not None:
        best = found.advice.best
        variance, cost = shown(best.prediction.variance), _cost(best.cost)
        return f"The advised cell, {name(best)}, leaves a variance of {variance} for {cost} {unit}."
    least = min(cells, key=lambda entry: entry.cost.value * entry.variance.value)
    return (
        f"Of these cells the least variance times cost has {least.method.name} at (R, K) = {least.cell}: "
        f"{shown(least.measured)} for {_cost(least.cost)} {unit}."
    )


def _cost(cost: Value) -> str:
    return f"{cost.value:g}" if cost.error == 0 else shown(cost)


def _front(cells: Sequence[Entry]) -> list[Entry]:
    points = [entry.point for entry in cells]
    entries = {id(point): entry for point, entry in zip(points, cells, strict=True)}
    front: list[Entry] = []
    for entry in (entries[id(point)] for point in pareto_front(points)):
        # Designs that are one by definition are on several curves.
        if not any(entry.design == other.design and entry.seed == other.seed for other in front):
            front.append(entry)
    return front


def _draw(axes: Any, found: StudyFindings, front: Sequence[Entry]) -> None:
    scale, unit = _unit(found)
    for i, (method, entries) in enumerate(found.main.items()):
        _curve(axes, i, method, entries, scale)
    if found.predicted:
        _overlay(axes, found.measured, scale)
    x, y = [entry.cost.value * scale for entry in front], [entry.variance.value for entry in front]
    axes.step(x, y, where="post", color=colour("ink"), linewidth=0.8, alpha=0.55, zorder=1)
    if found.advice is not None:
        best = found.advice.best
        at = ([best.cost.value * scale], [best.prediction.variance.value])
        axes.plot(*at, marker="*", markersize=11, color=colour("ink"), linestyle="none", label="advised", zorder=4)
    axes.margins(0.14)
    axes.set(xscale="log", yscale="log", xlabel=f"cost of one estimate ({unit})", ylabel="variance (gradient squared)")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        log_ticks(axis, low, high)
    _label(axes, front, scale)
    legend_above(axes)


def _curve(axes: Any, i: int, method: Method, entries: Sequence[Entry], scale: float) -> None:
    look = series(i)
    first = min((entry.seed for entry in entries if entry.seed is not None), default=None)
    line = [entry for entry in entries if entry.design.renders == 1 and entry.seed == first]
    rest = [entry for entry in entries if entry.design.renders > 1 or entry.seed != first]
    values = [entry.variance.value for entry in line]
    axes.errorbar(
        [entry.cost.value * scale for entry in line],
        values,
        whiskers(values, [entry.interval for entry in line]),
        label=method.name,
        elinewidth=0.9,
        markersize=4,
        **look,
    )
    plain = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "markersize": 2}
    axes.plot([e.cost.value * scale for e in rest], [e.variance.value for e in rest], alpha=0.7, **plain)
    if method == UNIFORM:
        over = [entry for entry in entries if entry.design.renoise == 1 and entry.seed == first]
        x, y = [e.cost.value * scale for e in over], [e.variance.value for e in over]
        axes.plot(x, y, color=look["color"], linewidth=0.8)


def _overlay(axes: Any, measured: Mapping[Method, Sequence[Entry]], scale: float) -> None:
    for i, (method, entries) in enumerate(measured.items()):
        own = [entry for entry in entries if canonical(entry.design).coupling == method.coupling]
        values = [entry.variance.value for entry in own]
        axes.errorbar(
            [entry.cost.value * scale for entry in own],
            values,
            whiskers(values, [entry.interval for entry in own]),
            color=series(i)["color"],
            marker=series(i)["marker"],
            linestyle="none",
            markerfacecolor="none",
            markersize=6,
            markeredgewidth=0.8,
            elinewidth=0.8,
            capsize=0,
        )


def _label(axes: Any, front: Sequence[Entry], scale: float) -> None:
    """(R, K) beside cells of the front, of those that lie apart on the page."""
    taken: list[tuple[float, float]] = []
    for entry in front:
        at = entry.cost.value * scale, entry.variance.value
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(at))
        if all(abs(x - other[0]) > 0.2 or abs(y - other[1]) > 0.1 for other in taken):
            taken.append((x, y))
            text = f"({entry.design.renders}, {entry.design.renoise})"
            offset = {"xytext": (-3, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
            axes.annotate(text, at, **offset, fontsize=8, color=colour("soft"))


def _unit(found: StudyFindings) -> tuple[float, str]:
    if found.costing.unit != "seconds":
        return 1.0, "teacher calls, one render as one" if found.costing.assumed else found.costing.unit
    return 1e3, "ms"


def _table(found: StudyFindings, front: Sequence[Entry]) -> Table:
    on_front = {(entry.design, entry.seed) for entry in front}
    rows: dict[tuple[str, ...], None] = {}
    groups = [("predicted", found.predicted), ("measured", found.measured)]
    for kind, cells in groups:
        for method, entries in cells.items():
            for entry in entries:
                seed = "" if entry.seed is None else f", seed {entry.seed}"
                star = "yes" if (entry.design, entry.seed) in on_front else ""
                row = (method.name, str(entry.cell), kind + seed, _cost(entry.cost), shown(entry.measured))
                rows[(*row, interval(entry.interval), star)] = None
    head = ("Method", "(R, K)", "How", f"Cost ({found.costing.unit})", "Variance", "95 %", "On the front")
    return Table(head, tuple(rows))
