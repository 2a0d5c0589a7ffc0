"""A chart of an experiment: its curves with their bands."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from carv.report.experiment import Chart, Curve
from carv.report.plate import Plate, Table, interval
from carv.report.style import drawn, legend_above, legend_columns, log_ticks, series, set_ticks

_HEIGHT, _ROW = 3.1, 0.19  # inches: of a chart with one line of legend, and of each further line
_WIDE, _HIGH = 48, 28  # letters of a label that fit along x and along y
_DENSE = 24  # points from which markers would hide their line
_FEW = 12  # points up to which each has a bar of its own, where bands of several curves would cover one another
_APART = 0.008  # of the width, between curves with bars


def plate(chart: Chart, key: str) -> Plate:
    """The curves over x, with bars where they have few points and bands where they have many; each is in the table."""
    finding = f"{chart.title}: {chart.y_label} against {chart.x_label}, for {', '.join(chart.curves)}."
    rows = math.ceil(len(chart.curves) / legend_columns(list(chart.curves)))
    svg = drawn(lambda axes: _draw(axes, chart), key, finding, size=(4.4, _HEIGHT + _ROW * (rows - 1)))
    return Plate(key, chart.title, finding, _caption(chart), svg, _table(chart))


def _caption(chart: Chart) -> str:
    kinds = {_has_bars(curve) for curve in chart.curves.values() if curve.low}
    if not kinds:
        return ""
    what = "Bars and bands" if len(kinds) == 2 else "Bars" if True in kinds else "Bands"
    apart = "; curves with bars are drawn a little apart" if True in kinds and len(chart.curves) > 1 else ""
    return f"{what}: {chart.band.strip().rstrip('.')}{apart}."


def _draw(axes: Any, chart: Chart) -> None:
    for i, (name, curve) in enumerate(chart.curves.items()):
        look = series(i) | ({"marker": ""} if len(curve.x) > _DENSE else {}) | {"label": _label(name)}
        if _has_bars(curve):
            x = _apart(chart, curve, i - (len(chart.curves) - 1) / 2)
            axes.plot(x, curve.y, **look)
            axes.vlines(x, curve.low, curve.high, color=look["color"], linewidth=0.9)
        else:
            axes.plot(curve.x, curve.y, **look)
            if curve.low:
                axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.16, linewidth=0)
    labels = {"xlabel": textwrap.fill(chart.x_label, _WIDE), "ylabel": textwrap.fill(chart.y_label, _HIGH)}
    axes.set(xscale="log" if chart.log_x else "linear", yscale="log" if chart.log_y else "linear", **labels)
    if chart.log_y:
        _frame(axes, chart)
        log_ticks(axes.yaxis, *axes.get_ylim())
    if chart.log_x:
        _powers_of_two(axes)
    legend_above(axes)


def _has_bars(curve: Curve) -> bool:
    return bool(curve.low) and len(curve.x) <= _FEW


def _apart(chart: Chart, curve: Curve, place: float) -> list[float]:
    every = [x for one in chart.curves.values() for x in one.x]
    if chart.log_x:
        return [x * (max(every) / min(every)) ** (_APART * place) for x in curve.x]
    return [x + (max(every) - min(every)) * _APART * place for x in curve.x]


def _frame(axes: Any, chart: Chart) -> None:
    """All points, and of the bands what is no more than a decade from them: an end near 0 would flatten all else."""
    points = [y for curve in chart.curves.values() for y in curve.y]
    ends = [end for curve in chart.curves.values() for end in (*curve.low, *curve.high)]
    low, high = min(points), max(points)
    low = min([low, *(end for end in ends if end > low / 10)])
    high = max([high, *(end for end in ends if end < high * 10)])
    room = max((high / low) ** 0.05, 1.02)
    axes.set_ylim(low / room, high * room)


def _powers_of_two(axes: Any) -> None:
    low, high = axes.get_xlim()
    first, last = math.ceil(math.log2(low * 0.999)), math.floor(math.log2(high * 1.001))
    if last - first < 1:
        log_ticks(axes.xaxis, low, high)
        return
    step = math.ceil((last - first + 1) / 9)
    set_ticks(axes.xaxis, [2.0**power for power in range(first, last + 1, step)])


def _label(name: str) -> str:
    """matplotlib leaves names that begin with an underscore out of legends."""
    return f"\u200b{name}" if name.startswith("_") else name


def _table(chart: Chart) -> Table:
    band = any(curve.low for curve in chart.curves.values())
    rows = tuple(
        (
            name,
            f"{x:.6g}",
            f"{y:.4g}",
            *((interval((curve.low[i], curve.high[i])) if curve.low else "",) if band else ()),
        )
        for name, curve in chart.curves.items()
        for i, (x, y) in enumerate(zip(curve.x, curve.y, strict=True))
    )
    return Table(("Curve", chart.x_label, chart.y_label, *((chart.band,) if band else ())), rows)
