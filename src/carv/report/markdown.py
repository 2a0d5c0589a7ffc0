"""Experiments as sections of a Markdown file: the same words and numbers as on the page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from carv.checkpoint import write_whole
from carv.report.comparison import Cell, comparison
from carv.report.experiment import Chart, Curve, Experiment, Table
from carv.report.plate import interval

_WIDE = 120
_MOST_POINTS = 16  # of a curve that is written out


def write(experiments: Sequence[Experiment], path: Path) -> None:
    """Writes the sections, whole or not at all.

    Raises:
        ValueError: no experiments.
        OSError: the file cannot be written.
    """
    if not experiments:
        raise ValueError("Markdown is made of experiments, and none of the folders holds one: leave --markdown away")
    write_whole(path, markdown(experiments).encode())


def markdown(experiments: Sequence[Experiment]) -> str:
    """A section for each experiment: name, question, finding, setting, tables as `ours (paper x)`, and short charts.

    Text is escaped: none of it is read as Markdown or HTML. The same experiments make the same text.
    """
    return "\n".join(map(_section, experiments))


def _section(experiment: Experiment) -> str:
    parts = [
        f"## {_inline(experiment.name)}",
        _paragraph(experiment.question),
        f"**{_paragraph(experiment.finding)}**",
        _paragraph(experiment.setting),
        *map(_table, experiment.tables),
        *map(_chart, experiment.charts),
    ]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    made = comparison(table)
    head = "ours (paper's)" if made.beside_paper else ""
    rows = [(_cell(name), *map(_beside, cells)) for name, cells in made.rows]
    note = f"\n\n{_inline(made.note)}" if made.note else ""
    return f"{_paragraph(f'{made.title}:')}\n\n{_grid((head, *map(_cell, made.columns)), rows)}{note}"


def _beside(cell: Cell) -> str:
    return f"{_cell(cell.ours)} (paper {_cell(cell.paper)})" if cell.paper else _cell(cell.ours)


def _chart(chart: Chart) -> str:
    title = f"{chart.title}, {chart.y_label}"
    xs = sorted({x for curve in chart.curves.values() for x in curve.x})
    if len(xs) > _MOST_POINTS or any(len(set(curve.x)) < len(curve.x) for curve in chart.curves.values()):
        return _paragraph(f"{title}: {len(xs)} points of {chart.x_label}, drawn by carv report.")
    rows = []
    for name, curve in chart.curves.items():
        at = {x: i for i, x in enumerate(curve.x)}
        rows.append((_cell(name), *(_point(curve, at[x]) if x in at else "" for x in xs)))
    band = f" ({chart.band})" if chart.band.strip() else ""
    return f"{_paragraph(f'{title}{band}:')}\n\n{_grid((_cell(chart.x_label), *(f'{x:.6g}' for x in xs)), rows)}"


def _point(curve: Curve, i: int) -> str:
    band = f" ({interval((curve.low[i], curve.high[i]))})" if curve.low and curve.low[i] < curve.high[i] else ""
    return f"{curve.y[i]:.4g}{band}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _paragraph(given: str) -> str:
    """Lines of up to 120 letters; none begins a list, a heading or a rule."""
    lines = textwrap.wrap(_inline(given), _WIDE, break_long_words=False, break_on_hyphens=False)
    return "\n".join(re.sub(r"^(\d*)([.)](?=\s|$)|(?<!\d)[-+=#*])", r"\1\\\2", line) for line in lines)


def _cell(given: str) -> str:
    return _inline(given).replace("|", "\\|")


def _inline(given: str) -> str:
    """One line of text, with a backslash before what Markdown or HTML would read.

    What stands alone between spaces, and the underscore of c_upstream, are read as they are.
    """
    line = " ".join(given.split())
    marks = r"[\\`\[\]<>$]|&(?=[#\w])|(?<!\s)[*~]|[*~](?!\s)|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(marks, r"\\\g<0>", line)
