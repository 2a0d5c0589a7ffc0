"""Prediction against brute force, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from carv.report.findings import Covered, StudyFindings
from carv.report.plate import Plate, Table, interval, shown
from carv.report.style import colour, drawn, legend_above, log_ticks, whiskers


def plate(found: StudyFindings, key: str) -> Plate | None:
    """measured / predicted of every cell that is known both ways."""
    cells = sorted(found.coverage, key=lambda one: one.measured.design.renders * one.measured.design.renoise)
    if not cells:
        return None
    count = sum(one.covered for one in cells)
    finding = (
        f"{count} of {len(cells)} predictions ({count / len(cells):.0%}) agree with brute force within 95 % intervals."
    )
    caption = (
        "Variance measured by brute force over variance predicted from the pilot, with the 95 % interval of the ratio "
        "(both errors, on the scale of the logarithm). Covered: the interval has 1 in it. Cells of one sweep share the "
        "pilot and may share random numbers, so they hit or miss together: no interval of the share is given."
    )
    rows = tuple(
        (
            one.measured.method.name,
            str(one.measured.cell),
            str(one.measured.seed),
            f"{shown(one.predicted.measured)}, {interval(one.predicted.interval)}",
            f"{shown(one.measured.measured)}, {interval(one.measured.interval)}",
            f"{shown(one.ratio)}, {interval(one.interval)}",
            "yes" if one.covered else "NO",
        )
        for one in cells
    )
    head = ("Method", "(R, K)", "Seed", "Predicted, 95 %", "Measured, 95 %", "Ratio, 95 %", "Covered")
    svg = drawn(lambda axes: _draw(axes, cells), key, finding)
    return Plate(key, "Prediction against brute force", finding, caption, svg, Table(head, rows))


def _draw(axes: Any, cells: Sequence[Covered]) -> None:
    for good, tint, marker in ((True, "c1", "o"), (False, "c2", "X")):
        at = [i for i, one in enumerate(cells) if one.covered == good]
        values = [cells[i].ratio.value for i in at]
        errors = whiskers(values, [cells[i].interval for i in at])
        look = {"color": colour(tint), "marker": marker, "markersize": 4, "linestyle": "none", "elinewidth": 0.9}
        if at:
            axes.errorbar(at, values, errors, capsize=0, label="covered" if good else "not covered", **look)
    axes.axhline(1, color=colour("ink"), linewidth=0.9)
    axes.set(yscale="log", ylabel="measured / predicted variance", xlabel="cells, by their number of draws R K")
    log_ticks(axes.yaxis, *axes.get_ylim())
    draws = [one.measured.design.renders * one.measured.design.renoise for one in cells]
    firsts = {count: draws.index(count) for count in sorted(set(draws))}
    axes.set_xticks(list(firsts.values()), [str(count) for count in firsts])
    axes.grid(visible=False, axis="x")
    legend_above(axes)
