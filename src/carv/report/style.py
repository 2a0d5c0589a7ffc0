"""How figures look: one small size, colours that the page sets for light and dark, and SVG that can be inlined."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from carv.extras import require

# Of Okabe and Ito (2008), darkened for white paper and lightened for black: name -> light, dark.
COLOURS = {
    "ink": ("#1c2126", "#e4e7ea"),
    "soft": ("#5a646d", "#a5aeb7"),
    "line": ("#d9dde1", "#353b42"),
    "c0": ("#56616c", "#aeb8c2"),
    "c1": ("#0069a8", "#5ab4ea"),
    "c2": ("#b45500", "#f0a030"),
    "c3": ("#a8246f", "#ee8fc4"),
    "c4": ("#007a5a", "#35c79b"),
    "c5": ("#6a49b8", "#b7a0f8"),
}
_ENTRY, _LETTER, _ROW = 36, 5.4, 310  # points: a legend's line, a letter, and the width of a figure
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), "-", (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)))

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "carv",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that layout does not depend on the machine
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": f"cycler('color', ['{COLOURS['ink'][0]}'])",  # of what is not given a colour
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "errorbar.capsize": 2,
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
}


def colour(name: str) -> str:
    """The light colour; `drawn` turns it into the page's variable."""
    return COLOURS[name][0]


def series(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the index-th curve: told apart without colour, too."""
    i, turn = index % len(SERIES), index // len(SERIES)
    j = (i + turn) % len(SERIES)  # beyond six the colours come again, with other markers and dashes
    return {"color": colour(SERIES[i]), "marker": _MARKERS[j], "linestyle": _DASHES[j]}


def drawn(
    draw: Callable[..., None], key: str, alt: str, *, size: tuple[float, float] = (4.4, 3.1), rows: int = 1
) -> str:
    """A figure as SVG for a page: text as text, colours as CSS variables, ids that begin with `key`, no dates.

    Args:
        draw: gets the axes, one a row, with a common x axis.
        key: unique on the page.
        alt: what a screen reader says.
        size: inches.
        rows: of axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    matplotlib, figures = require("matplotlib", "report"), require("matplotlib.figure", "report")
    ink = {name: colour("ink") for name in ("text.color", "axes.labelcolor")}
    soft = {name: colour("soft") for name in ("xtick.color", "ytick.color", "axes.edgecolor")}
    # Layout may warn of a glyph that DejaVu lacks; the reader's browser has it.
    with matplotlib.rc_context({**_SETTINGS, **ink, **soft, "grid.color": colour("line")}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = figures.Figure(figsize=size)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        draw(*axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), key, alt)


def _inline(svg: str, key: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    for name, (light, _) in COLOURS.items():
        svg = re.sub(light, f"var(--{name})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"(font: [^;\"<>]*?px )[^;\"<>]+", r"\1var(--sans)", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    # Only the size goes, so that the page's width rules.
    head = f'<svg class="figure" viewBox="{box[1]}" role="img" aria-label="{html.escape(alt)}">'
    return head + svg[svg.index(">") + 1 :]


def legend_columns(labels: Sequence[str]) -> int:
    """The most columns in which a legend fits the figure, at least one."""
    for columns in range(len(labels), 1, -1):
        parts = np.array_split([len(label) for label in labels], columns)  # as matplotlib does
        if sum(_ENTRY + _LETTER * max(part) for part in parts) <= _ROW:
            return columns
    return 1


def legend_above(axes: Any) -> None:
    """The legend outside the data, above all axes of the figure; a label is cut only where it fills a line alone."""
    handles, labels = axes.get_legend_handles_labels()
    most = int((_ROW - _ENTRY) / _LETTER)
    labels = [label if len(label) <= most else f"{label[: most - 1]}…" for label in labels]
    axes.get_figure().legend(handles, labels, loc="outside upper left", ncols=legend_columns(labels))


def whiskers(values: Sequence[float], intervals: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Error bars for matplotlib; an end that is not known has none."""
    below = [max(0.0, v - low) if math.isfinite(low) else 0.0 for v, (low, _) in zip(values, intervals, strict=True)]
    above = [max(0.0, high - v) if math.isfinite(high) else 0.0 for v, (_, high) in zip(values, intervals, strict=True)]
    return [below, above]


def log_ticks(axis: Any, low: float, high: float, most: int = 6) -> None:
    """Round, plainly written ticks from low to high on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**d for d in decades for step in steps if low * 0.98 <= step * 10.0**d <= high * 1.02]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / most)]
    set_ticks(axis, ticks)


def set_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """These ticks and no others, as `%g`."""
    axis.set_ticks(list(ticks), labels=[f"{tick:.6g}" for tick in ticks])
    axis.set_minor_locator(require("matplotlib.ticker", "report").NullLocator())
