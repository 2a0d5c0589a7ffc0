"""The best K and its ECM against c_upstream / c_denoise (Fig. 21)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from carv.report.findings import StudyFindings
from carv.report.methods import UNIFORM
from carv.report.plate import Plate, Table, interval, shown, times
from carv.report.sensitivity import RATIOS, Sensitivity, sensitivity
from carv.report.style import colour, drawn, legend_above, series, set_ticks
from carv.variance.values import Value

_TICKS = (0.3, 1, 3, 10, 30, 100, 300)


def plate(found: StudyFindings, key: str) -> Plate | None:
    """Best ECM and best K over cost ratios from 0.3 to 300, at R = 1."""
    curves = sensitivity(found.main)
    if not curves:
        return None
    ends = [max(curves, key=lambda one: one.ecm[i].value) for i in (0, -1)]
    cheap, dear = (one.ecm[i] for one, i in zip(ends, (0, -1), strict=True))
    finding = (
        f"The best ECM is {times(cheap)} where a render costs 0.3 teacher calls, and {times(dear)} where it costs 300."
    )
    caption = (
        "ECM of the best K at R = 1 (top) and that K (bottom), against uniform iid (1, 1), by the simulated cost "
        "alpha R + R K in teacher calls. Bands: 95 %, of uniform and of the best at 300; the others' "
        "are in the table. The best of several K is slightly optimistic."
    )
    ratio = found.ratio
    if ratio is not None:
        caption += f" Vertical line: the ratio as timed, {shown(ratio)}, with its 95 % interval."
    svg = drawn(lambda top, bottom: _draw(top, bottom, curves, ratio), key, finding, size=(4.4, 4.2), rows=2)
    return Plate(key, "If a render cost more, or less", finding, caption, svg, _table(curves))


def _draw(top: Any, bottom: Any, curves: Sequence[Sensitivity], ratio: Value | None) -> None:
    best = max(curves, key=lambda one: one.ecm[-1].value).method
    for i, one in enumerate(curves):
        look = {**series(i), "marker": ""}
        low, high = np.array(one.interval).T
        top.plot(RATIOS, [value.value for value in one.ecm], label=one.method.name, **look)
        known = np.isfinite(low) & np.isfinite(high)
        if one.method in (UNIFORM, best):
            top.fill_between(RATIOS, low, high, where=known, color=look["color"], alpha=0.16, linewidth=0)
        # A little apart, so that equal K can be told from one another.
        shifted = np.array(one.renoise) * 1.035 ** (i - (len(curves) - 1) / 2)
        bottom.step(RATIOS, shifted, where="mid", **look)
    if ratio is not None:
        for axes in (top, bottom):
            _mark(axes, ratio)
    top.set(xscale="log", yscale="log", ylabel="best ECM")
    low, high = top.get_ylim()
    set_ticks(top.yaxis, [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 30, 50, 100) if low <= tick <= high])
    bottom.set(
        xscale="log", yscale="log", xlabel="c_upstream / c_denoise", ylabel="best K", xlim=(RATIOS[0], RATIOS[-1])
    )
    set_ticks(bottom.xaxis, _TICKS)
    set_ticks(bottom.yaxis, sorted({k for one in curves for k in one.renoise}))
    legend_above(top)


def _mark(axes: Any, ratio: Value) -> None:
    if RATIOS[0] <= ratio.value <= RATIOS[-1]:
        axes.axvline(ratio.value, color=colour("ink"), linewidth=1)
    low, high = ratio.interval()
    if math.isfinite(low) and math.isfinite(high) and high > RATIOS[0]:
        axes.axvspan(max(low, RATIOS[0]), min(high, RATIOS[-1]), color=colour("soft"), alpha=0.15, linewidth=0)


def _table(curves: Sequence[Sensitivity]) -> Table:
    rows = []
    for one in curves:
        for tick in _TICKS:
            i = min(range(len(RATIOS)), key=lambda i: abs(math.log(RATIOS[i] / tick)))
            row = (
                one.method.name,
                f"{RATIOS[i]:.3g}",
                str(one.renoise[i]),
                times(one.ecm[i]),
                interval(one.interval[i]),
            )
            rows.append(row)
    return Table(("Method", "c_upstream / c_denoise", "Best K", "ECM", "95 %"), tuple(rows))
