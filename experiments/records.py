"""Means over pilots with their errors, as tables and charts; printed, and kept as an experiment's record."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from carv.provenance import provenance
from carv.report.experiment import Chart, Curve, Experiment, Figure, Table
from carv.variance.values import Value

Row: TypeAlias = Sequence[Value | None]
"""One number for each column; `None` where it could not be measured."""

BAND = "one standard error over pilots"
_NAME, _WIDTH = 30, 19
_ROUNDING = 1e-12


def over_pilots(values: Row) -> Value | None:
    """The mean over pilots, with its standard error from their spread; of one pilot its own.

        error^2 = 1/(n (n - 1)) sum_i (x_i - mean)^2

    `None` if some pilot has no value: a mean over the others would be another quantity.
    """
    return _mean(values, lambda known: statistics.stdev(x.value for x in known) / math.sqrt(len(known)))


def of_these_pilots(values: Row) -> Value | None:
    """The mean over pilots, with the standard error that their own errors (over renders, and of costs) give it.

    For few pilots, whose spread says little; it speaks of these pilots, not of others.
    """
    return _mean(values, lambda known: math.sqrt(sum(x.error**2 for x in known)) / len(known))


def figure(value: Value | None, paper: float | None = None) -> Figure:
    """A number for a record, beside the paper's; one that is 1 by definition has no error."""
    if value is None:
        return Figure(None, None, paper)
    exact = value.error <= _ROUNDING * abs(value.value)
    return Figure(value.value, None if exact else value.error, paper)


def table(
    title: str, columns: Sequence[str], rows: Mapping[str, Row], paper: Mapping[str, Sequence[float | None]]
) -> Table:
    """A table of our rows, each beside the paper's row of the same name, if it has one.

    Args:
        title: what it shows; of an ECM with anchor, baseline and cost.
        columns: their heads.
        rows: name -> our numbers.
        paper: name -> the paper's numbers; rows that we have not are shown alone.
    """
    empty: list[None] = [None] * len(columns)
    names = [*rows, *(name for name in paper if name not in rows)]
    return Table(
        title,
        tuple(columns),
        {name: tuple(map(figure, rows.get(name, empty), paper.get(name, empty))) for name in names},
    )


def curves(x: Sequence[float], rows: Mapping[str, Row]) -> dict[str, Curve]:
    """For each row a line with a band of one standard error, through the points that could be measured."""
    found = {}
    for name, row in rows.items():
        points = [(float(at), value) for at, value in zip(x, row, strict=True) if value is not None]
        if points:
            at, values = zip(*points, strict=True)
            low, high = (tuple(one.value + sign * one.error for one in values) for sign in (-1, 1))
            found[name] = Curve(at, tuple(one.value for one in values), low, high)
    return found


def plain_curves(x: Sequence[float], rows: Mapping[str, Sequence[float]]) -> dict[str, Curve]:
    """Lines without bands, such as the paper's."""
    return {name: Curve(tuple(map(float, x)), tuple(map(float, row))) for name, row in rows.items()}


def beside(ours: Value | None, paper: float | None = None) -> str:
    """For a sentence: `2.63(8)x (paper 3.29x)`."""
    text = "not measured" if ours is None else ours.times()
    return text if paper is None else f"{text} (paper {paper:g}x)"


def text(given: Table) -> str:
    """The table for a terminal: ours with its error, the paper's in brackets."""
    head = " " * _NAME + "".join(f"{name:>{_WIDTH}s}" for name in given.columns)
    rows = [
        f"{name:{_NAME}s}" + "".join(f"{_cell(one):>{_WIDTH}s}" for one in figures)
        for name, figures in given.rows.items()
    ]
    return "\n".join([given.title, head, *rows])


def publish(experiment: Experiment, folder: Path) -> None:
    """Print the tables and the finding, and write experiment.json with the machine and the versions."""
    for one in experiment.tables:
        print(text(one), end="\n\n")
    print(experiment.finding)
    dataclasses.replace(experiment, provenance=provenance()).save(folder)
    print(f"wrote {folder}")


def ecm_chart(title: str, lines: Mapping[str, Curve]) -> Chart:
    """ECM over K."""
    return Chart(title, "K, re-noisings of a render", "ECM", lines, BAND, log_x=True)


def _mean(values: Row, error: Callable[[list[Value]], float]) -> Value | None:
    known = [value for value in values if value is not None and math.isfinite(value.error)]
    if not known or len(known) < len(values):
        return None
    if len(known) == 1:
        return known[0]
    return Value(statistics.fmean(x.value for x in known), error(known))


def _cell(one: Figure) -> str:
    ours = "-" if one.value is None else str(Value(one.value, one.error)) if one.error else f"{one.value:.4g}"
    return ours if one.paper is None else f"{ours} [{one.paper:.4g}]"
