"""What an experiment found, as a record: tables and charts beside the paper's, pictures, and one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carv.checkpoint import write_whole
from carv.report.given import SMALLEST, fields, listed, named, number, settings, text, within
from carv.report.pictures import plain_name, read_picture

EXPERIMENT = "experiment.json"
FORMAT = 1
_MOST_BYTES = 20_000_000


@dataclass(frozen=True)
class Figure:
    """One number of ours, and the paper's.

    Attributes:
        value: ours; `None` where it was not measured.
        error: its standard error; `None` where it has none, e.g. a baseline that is 1 by definition.
        paper: the paper's number in the same place; `None` if it has none.

    Raises:
        ValueError: a number that is not finite; a negative error, or one of no value.
    """

    value: float | None
    error: float | None = None
    paper: float | None = None

    def __post_init__(self) -> None:
        for name, what in (("value", "a figure"), ("error", "a standard error"), ("paper", "the paper's figure")):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, number(given, what))
        if self.error is not None and (self.value is None or self.error < 0):
            raise ValueError(
                f"a standard error is at least 0 and belongs to a figure, got {self.value} and {self.error}"
            )


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Attributes:
        title: what it shows, with anchor, baseline and cost if it holds an ECM.
        columns: their heads.
        rows: name -> one figure for each column.

    Raises:
        ValueError: no columns or no rows; a row with more or fewer figures than columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[Figure, ...]]

    def __post_init__(self) -> None:
        text(self.title, "the title of a table")
        with within(f"the table {self.title!r:.60}"):
            object.__setattr__(self, "columns", tuple(text(head, "the head of a column") for head in self.columns))
            object.__setattr__(
                self, "rows", {text(name, "a row's name"): tuple(row) for name, row in self.rows.items()}
            )
            if not (self.columns and self.rows):
                raise ValueError("a table has columns and rows")
            for name, row in self.rows.items():
                if len(row) != len(self.columns):
                    raise ValueError(f"the row {name!r:.60} has {len(row)} figures for {len(self.columns)} columns")


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        x, y: its points.
        low, high: the band around them; empty if it has none.

    Raises:
        ValueError: no points; x, y, low and high of different lengths; a number that is not finite; low above high.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("x", "y", "low", "high"):
            object.__setattr__(self, name, tuple(number(one, f"a point's {name}") for one in getattr(self, name)))
        points, ends = len(self.x), (len(self.low), len(self.high))
        if not points or len(self.y) != points or ends not in ((0, 0), (points, points)):
            raise ValueError(
                "a curve has points, and as many x as y, low and high (or neither of the last two), got "
                f"{points}, {len(self.y)}, {ends[0]} and {ends[1]}"
            )
        for low, high in zip(self.low, self.high, strict=True):
            if low > high:
                raise ValueError(f"a band goes from low to high, got {low:g} to {high:g}")


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title, x_label, y_label: with units.
        curves: name -> curve.
        band: what the bands are, e.g. "95 % interval over prompts".
        log_x, log_y: logarithmic axes; x in powers of 2.

    Raises:
        ValueError: no curves; bands without a word what they are; points that are not positive on a logarithmic axis.
    """

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Curve]
    band: str = ""
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        text(self.title, "the title of a chart")
        with within(f"the chart {self.title!r:.60}"):
            text(self.x_label, "the label of x")
            text(self.y_label, "the label of y")
            text(self.band, "what the bands are", empty=True)
            curves = {text(name, "a curve's name"): curve for name, curve in self.curves.items()}
            object.__setattr__(self, "curves", curves)
            if not curves:
                raise ValueError("a chart has curves")
            if not self.band.strip() and any(curve.low for curve in curves.values()):
                raise ValueError(
                    'its curves have bands: say in `band` what they are, e.g. "95 % interval over prompts"'
                )
            for name, curve in curves.items():
                _positive(name, "x", self.log_x, curve.x)
                _positive(name, "y", self.log_y, curve.y)


def _positive(name: str, axis: str, log: bool, points: tuple[float, ...]) -> None:
    if not isinstance(log, bool):
        raise ValueError(f"log_{axis} is true or false, got {log!r:.20}")
    least = min(points)
    if log and least < SMALLEST:
        raise ValueError(
            f"on a logarithmic axis {axis} is at least {SMALLEST:g}, but the curve {name!r:.60} has {least:g}"
        )


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper, repeated.

    Attributes:
        name: of the experiment, e.g. "Tables 1 and 2".
        question: what it asks, in one sentence.
        setting: teacher, prompts, seeds, counts, cost; in one paragraph.
        finding: how ours agrees with the paper's, or why not; one honest sentence.
        tables, charts: what was found.
        pictures: caption -> name of a PNG beside the record.
        config: of the script; text, numbers, lists and mappings, kept as JSON has them.
        provenance: as of `carv.provenance.provenance`.

    Raises:
        ValueError: text that is empty; a picture whose name is a path; settings that JSON does not have.
    """

    name: str
    question: str
    setting: str
    finding: str
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("name", "question", "setting", "finding"):
            text(getattr(self, what), f"the {what} of an experiment")
        pictures = {text(caption, "a caption"): plain_name(text(name, "a picture")) for caption, name in _items(self)}
        made = {"tables": tuple(self.tables), "charts": tuple(self.charts), "pictures": pictures}
        kept = {what: settings(getattr(self, what), what) for what in ("config", "provenance")}
        for what, value in {**made, **kept}.items():
            object.__setattr__(self, what, value)

    def save(self, folder: Path) -> None:
        """Write experiment.json, whole or not at all."""
        record = {"kind": "experiment", "format": FORMAT, **dataclasses.asdict(self)}
        write_whole(folder / EXPERIMENT, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Experiment:
        """What `save` has written, with its pictures looked at.

        Raises:
            ValueError: there is none; a file that is damaged, or of another kind or format; a picture that is missing,
                outside the folder, too large or no PNG.
        """
        path = folder / EXPERIMENT
        if not path.is_file():
            raise ValueError(f"{folder} holds no {EXPERIMENT}: the scripts in experiments/ leave one in their --out")
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"it is larger than {_MOST_BYTES / 1e6:g} MB")
            experiment = _experiment(json.loads(path.read_bytes()))
            for caption, name in experiment.pictures.items():
                read_picture(folder, name, caption)
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); run its script again") from error
        return experiment


def _items(experiment: Experiment) -> list[tuple[Any, Any]]:
    if not isinstance(experiment.pictures, Mapping):
        raise ValueError("the pictures of an experiment map captions to names of files")
    return list(experiment.pictures.items())


def _names(kind: type) -> tuple[str, ...]:
    return tuple(one.name for one in dataclasses.fields(kind))


def _experiment(given: Any) -> Experiment:
    if not isinstance(given, dict) or given.get("kind") != "experiment":
        raise ValueError("it is not an experiment's record")
    if given.get("format") != FORMAT:
        raise ValueError(f"it has format {given.get('format')!r:.20}, this version reads {FORMAT}")
    made = fields(given, ("kind", "format", *_names(Experiment)), "a record")
    tables = tuple(_table(one, f"table {i}") for i, one in enumerate(listed(made["tables"], "tables"), 1))
    charts = tuple(_chart(one, f"chart {i}") for i, one in enumerate(listed(made["charts"], "charts"), 1))
    rest = {name: made[name] for name in _names(Experiment) if name not in ("tables", "charts")}
    return Experiment(tables=tables, charts=charts, **rest)


def _table(given: Any, where: str) -> Table:
    made = fields(given, _names(Table), where)
    rows = {}
    for name, row in named(made["rows"], f"the rows of {where}").items():
        with within(f"{where}, row {name!r:.60}"):
            rows[name] = tuple(Figure(**fields(one, _names(Figure), "a figure")) for one in listed(row, "a row"))
    return Table(made["title"], tuple(listed(made["columns"], f"the columns of {where}")), rows)


def _chart(given: Any, where: str) -> Chart:
    made = fields(given, _names(Chart), where)
    curves = {}
    for name, curve in named(made["curves"], f"the curves of {where}").items():
        with within(f"{where}, curve {name!r:.60}"):
            parts = fields(curve, _names(Curve), "a curve")
            curves[name] = Curve(**{part: tuple(listed(parts[part], part)) for part in parts})
    return Chart(**{**made, "curves": curves})
