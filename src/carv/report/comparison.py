"""Figures of ours beside the paper's, as they are written on the page and in Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from carv.report.experiment import Figure, Table
from carv.report.plate import shown
from carv.variance.values import Value

MISSING = "\u2013"
_RESOLVED = 1e-13  # of a figure: a smaller error is below what its floating point number can tell


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        ours: `2.63(8)`; a dash where it was not measured.
        paper: `2.63`, or "" if the paper has none.
    """

    ours: str
    paper: str


@dataclass(frozen=True)
class Comparison:
    """A table as text.

    Attributes:
        title: of the table.
        columns: heads.
        rows: name and cells.
        beside_paper: whether any figure of the paper's is in it.
        note: how it is read, or "".
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    beside_paper: bool
    note: str


def comparison(table: Table) -> Comparison:
    """A table as text."""
    rows = tuple((name, tuple(Cell(ours(one), paper(one)) for one in row)) for name, row in table.rows.items())
    cells = [cell for _, row in rows for cell in row]
    missing = any(cell.ours == MISSING for cell in cells)
    return Comparison(
        table.title,
        table.columns,
        rows,
        any(cell.paper for cell in cells),
        f"{MISSING}: not measured." if missing else "",
    )


def ours(figure: Figure) -> str:
    """Our figure with its standard error; one without is written as it is, to four digits."""
    if figure.value is None:
        return MISSING
    if figure.error is None:
        whole = figure.value.is_integer() and abs(figure.value) < 1e6
        return f"{figure.value:.0f}" if whole else f"{figure.value:.4g}"
    error = figure.error if figure.error > _RESOLVED * abs(figure.value) else 0.0
    return shown(Value(figure.value, error))


def paper(figure: Figure) -> str:
    """The paper's figure, or ""."""
    return "" if figure.paper is None else f"{figure.paper:.6g}"
