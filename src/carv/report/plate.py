"""A figure with its caption and the table of its numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from carv.variance.jackknife import Jackknifed
from carv.variance.values import Value


@dataclass(frozen=True)
class Table:
    """Rows of text under a head.

    Attributes:
        head: of the columns.
        rows: as many cells each.
        note: what a reader needs to know, or "".
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Plate:
    """One figure of the page.

    Attributes:
        key: unique on the page, for ids.
        title: a few words.
        finding: one sentence, what is to be seen; also what a screen reader says.
        caption: how it was made.
        svg: the figure, ready to be inlined.
        table: its numbers.
    """

    key: str
    title: str
    finding: str
    caption: str
    svg: str
    table: Table


def interval(ends: tuple[float, float]) -> str:
    """`1.9 to 2.4`, with a digit more than the width resolves."""
    low, high = ends
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    if low == high:
        return f"{low:.4g} (exact)"
    digits = min(6, max(2, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low)))))
    return f"{low:.{digits}g} to {high:.{digits}g}"


def shown(figure: Value | Jackknifed) -> str:
    """`2.63(8)`; a number without a known error says so."""
    value = figure.measured if isinstance(figure, Jackknifed) else figure
    if not math.isfinite(value.error):
        return f"{value.value:.3g} (error not known)"
    return f"{value.value:.4g} (exact)" if value.error == 0 else str(value)


def times(figure: Value | Jackknifed) -> str:
    """`2.63(8)x`."""
    text = shown(figure)
    return text.replace(" (", "x (", 1) if " (" in text else f"{text}x"
