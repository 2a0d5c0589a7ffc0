"""Where the variance comes from: render, timestep, noise (the law of total variance)."""

from __future__ import annotations

from typing import Any

from carv.report.findings import StudyFindings
from carv.report.methods import UNIFORM, Entry, Method, predict_entry
from carv.report.plate import Plate, Table, interval, shown
from carv.report.style import colour, drawn, legend_above, whiskers
from carv.variance.jackknife import Jackknifed, derived

PARTS = ("render", "timestep", "noise")
_COLOURS = ("c1", "c2", "c4")
_RENOISE = (1, 4, 16)


def plate(found: StudyFindings, key: str) -> Plate | None:
    """Parts of the variance at uniform (1, K) and at the advised cell, against the whole at uniform (1, 1)."""
    entries = _entries(found)
    if not entries or entries[0].variance.value <= 0:
        return None
    whole = entries[0].variance
    assert isinstance(whole, Jackknifed)
    shares = [[_share(entry, part, whole) for part in _parts(entry)] for entry in entries]
    first = dict(zip(PARTS, shares[0], strict=True))
    largest = max(first, key=lambda name: first[name].value)
    finding = (
        f"At uniform (1, 1) the {largest} makes {shown(first[largest])} of the variance "
        f"(95 %: {interval(first[largest].interval())})."
    )
    caption = (
        "Parts of R times the variance of one estimate, by the law of total variance, in units of the whole at uniform "
        "(1, 1), with 95 % intervals over renders. R divides all parts alike; re-noising (K) and strata cannot reduce "
        "the render's."
    )
    names = [_name(entry, i == len(entries) - 1 and found.advice is not None) for i, entry in enumerate(entries)]
    rows = tuple(
        (entry.point.name, shown(entry.measured), *(f"{shown(share)}, {interval(share.interval())}" for share in row))
        for entry, row in zip(entries, shares, strict=True)
    )
    table = Table(
        ("Cell (R, K)", "Variance (gradient squared)", *(f"{part.capitalize()} part, 95 %" for part in PARTS)),
        rows,
        "Parts times R, in units of the variance at uniform (1, 1). A part near 0 can be estimated as negative.",
    )
    svg = drawn(lambda axes: _draw(axes, names, shares), key, finding, size=(4.4, 3.3))
    return Plate(key, "Where the variance comes from", finding, caption, svg, table)


def _entries(found: StudyFindings) -> list[Entry]:
    pilot, model = found.study.pilot, found.costing.model
    if pilot is None:
        return []
    entries = [predict_entry(pilot, UNIFORM, 1, k, model) for k in _RENOISE]
    if found.advice is not None:
        best = found.advice.best.design
        entries.append(predict_entry(pilot, Method.of(best), best.renders, best.renoise, model))
    return entries


def _share(entry: Entry, part: Jackknifed, whole: Jackknifed) -> Jackknifed:
    return derived(lambda a, b: entry.design.renders * a / b, part, whole)


def _parts(entry: Entry) -> tuple[Jackknifed, Jackknifed, Jackknifed]:
    assert entry.split is not None
    return entry.split.render, entry.split.timestep, entry.split.noise


def _name(entry: Entry, advised: bool) -> str:
    cell = f"({entry.design.renders}, {entry.design.renoise})"
    return f"advised\n{cell}" if advised else f"uniform\n{cell}"


def _draw(axes: Any, names: list[str], shares: list[list[Jackknifed]]) -> None:
    for i, (part, tint) in enumerate(zip(PARTS, _COLOURS, strict=True)):
        figures = [row[i] for row in shares]
        values = [figure.value for figure in figures]
        at = [group + (i - 1) * 0.27 for group in range(len(shares))]
        axes.bar(at, values, 0.25, color=colour(tint), label=part)
        errors = whiskers(values, [figure.interval() for figure in figures])
        axes.errorbar(at, values, errors, fmt="none", ecolor=colour("ink"), elinewidth=1)
    axes.axhline(0, color=colour("soft"), linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("R x part / whole at uniform (1, 1)")
    legend_above(axes)
