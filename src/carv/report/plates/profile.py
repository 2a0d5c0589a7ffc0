"""Gradient norm over t with its parts, and proposals beside it (Fig. 22)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from carv.report.findings import StudyFindings
from carv.report.plate import Plate, Table, shown, times
from carv.report.profile import Norms, Ratios, norms, proposal_gains, proposal_ratios
from carv.report.style import colour, drawn, legend_above, series
from carv.variance.jackknife import Jackknifed

_PARTS = {"total": "all, √m2(t)", "mean": "mean", "render": "render", "noise": "noise"}
_LOOK = {"total": ("ink", "-"), "mean": ("c5", (0, (1.5, 1.2))), "render": ("c1", (0, (5, 1.5))), "noise": ("c4", "-")}
_ROWS = 16


def norms_plate(found: StudyFindings, key: str) -> Plate | None:
    """sqrt(m2(t)) and its parts."""
    if found.study.pilot is None or len(found.study.pilot.tables.t) < 3:
        return None
    seen = norms(found.study.pilot.tables)
    peak = max(range(len(seen.t)), key=lambda i: seen.total[i].value)
    finding = f"The gradient's norm is largest near t = {seen.t[peak]:g}: {shown(seen.total[peak])}."
    caption = (
        "Root mean square norm of a single draw's gradient at t, and its parts: the mean gradient, what renders add to "
        "it, and what the noise adds (with what t does inside a bin). Squares of the parts add up to the square of the "
        "whole. Bands: 95 % over renders."
    )
    rows = tuple((f"{t:g}", *(shown(getattr(seen, part)[i]) for part in _PARTS)) for i, t in _some(seen.t))
    table = Table(("t", "√m2(t)", "Mean", "Render", "Noise"), rows, "Norms in units of the gradient.")
    svg = drawn(lambda axes: _draw_norms(axes, seen), key, finding)
    return Plate(key, "Gradient norm over t", finding, caption, svg, table)


def _some(t: Sequence[float]) -> list[tuple[int, float]]:
    return [(i, t[i]) for i in range(0, len(t), max(1, -(-len(t) // _ROWS)))]


def _draw_norms(axes: Any, seen: Norms) -> None:
    for part, label in _PARTS.items():
        figures: tuple[Jackknifed, ...] = getattr(seen, part)
        tint, dashes = _LOOK[part]
        axes.plot(seen.t, [f.value for f in figures], color=colour(tint), linestyle=dashes, label=label)
        ends = np.array([f.interval() for f in figures])
        known = np.isfinite(ends).all(1)
        low, high = np.where(known[:, None], ends, np.nan).T
        axes.fill_between(seen.t, np.maximum(low, 0), high, color=colour(tint), alpha=0.16, linewidth=0)
    axes.set(xlabel="timestep t", ylabel="norm of one draw's gradient", ylim=(0, None))
    legend_above(axes)


def proposals_plate(found: StudyFindings, key: str) -> Plate | None:
    """q(t)/p(t) of each proposal and of the oracle."""
    pilot = found.study.pilot
    if pilot is None or len(pilot.tables.t) < 3:
        return None
    try:
        ratios = proposal_ratios(pilot)
    except ValueError:
        return None  # all moments are 0: nothing asks for a proposal
    gains = ", ".join(f"{name} {times(gain)}" for name, gain in proposal_gains(pilot).items())
    finding = f"Gain over the base at (1, 1), independent draws: {gains}."
    formula = "" if pilot.weight is None else f" The weight is w(t) = {pilot.weight[0]}."
    caption = (
        "Proposal densities over the base density: above 1 a timestep is drawn more often than in the objective. The "
        "oracle is q ~ p √m2(t) from this pilot, best for independent draws; it has the pilot's noise, and its gain, "
        "judged by the tables that it was fitted to, is optimistic." + formula
    )
    rows = tuple(
        (f"{ratios.t[i]:g}", *(f"{curve[i]:.3g}" for curve in ratios.curves.values()))
        for i, _ in _some(ratios.t.tolist())
    )
    table = Table(("t", *(f"q/p {name}" for name in ratios.curves)), rows, "Densities are exact but for the oracle's.")
    svg = drawn(lambda axes: _draw_proposals(axes, ratios), key, finding)
    return Plate(key, "Proposals beside it", finding, caption, svg, table)


def _draw_proposals(axes: Any, ratios: Ratios) -> None:
    for i, (name, curve) in enumerate(ratios.curves.items()):
        look = {**series(i), "marker": ""}
        if name == "oracle":
            look = {"color": colour("ink"), "linewidth": 1.1}
        axes.plot(ratios.t, curve, label=name, **look)
    axes.set(xlabel="timestep t", ylabel="q(t) / p(t)", ylim=(0, None))
    legend_above(axes)
