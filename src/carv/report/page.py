"""The page: one HTML file that loads nothing, runs nothing, and is read on a phone, a screen or paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carv.checkpoint import write_whole
from carv.report.checks import Warn, checks
from carv.report.commands import commands
from carv.report.comparison import Comparison, comparison
from carv.report.experiment import Experiment
from carv.report.findings import Findings, StudyFindings
from carv.report.headline import Headline, headline, provenances
from carv.report.pictures import Picture
from carv.report.plate import Plate
from carv.report.plates import chart, cost, coverage, gains, profile, sensitivity, split
from carv.report.records import ExperimentRecord
from carv.report.template import fill, written

_PLATES = {
    "split": split.plate,
    "cost": cost.plate,
    "ecm": gains.ecm_plate,
    "re": gains.re_plate,
    "coverage": coverage.plate,
    "norms": profile.norms_plate,
    "proposals": profile.proposals_plate,
    "sensitivity": sensitivity.plate,
}

_FEW = 3  # sections that are found without a list of links


@dataclass(frozen=True, eq=False)
class Section:
    """What the page says of one study."""

    key: str
    title: str
    headline: Headline
    checks: tuple[Warn, ...]
    plates: tuple[Plate, ...]
    provenance: tuple[tuple[str, str], ...]
    commands: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ExperimentSection:
    """What the page says of one experiment."""

    key: str
    experiment: Experiment
    tables: tuple[Comparison, ...]
    plates: tuple[Plate, ...]
    pictures: tuple[Picture, ...]
    provenance: tuple[tuple[str, str], ...]


def write(findings: Findings, path: str | Path) -> None:
    """Writes the page, whole or not at all. The same findings make the same bytes.

    Args:
        findings: of `carv.report.findings.load`.
        path: of the HTML file; its folder is made if need be.

    Raises:
        ImportError: matplotlib or jinja2 is missing; the message says how to install them.
        OSError: the file cannot be written.
    """
    write_whole(Path(path), render(findings).encode())


def render(findings: Findings) -> str:
    """The page as text."""
    sections = [_section(found, findings, f"s{i}") for i, found in enumerate(findings.studies)]
    experiments = [_experiment(one, f"e{i}") for i, one in enumerate(findings.experiments)]
    links = [(one.key, one.experiment.name, one.experiment.question) for one in experiments]
    links += [(one.key, one.title, one.headline.advice) for one in sections]
    return fill(
        "page.html",
        title=_title([name for _, name, _ in links]),
        links=links if len(experiments) > _FEW else [],
        experiments=experiments,
        has_pictures=any(one.pictures for one in experiments),
        sections=sections,
        notes=findings.notes,
    )


def _title(names: Sequence[str]) -> str:
    more = len(names) - _FEW
    return "; ".join(names[:_FEW]) + (f"; and {more} more" if more > 0 else "")


def _section(found: StudyFindings, findings: Findings, key: str) -> Section:
    plates = (make(found, f"{key}-{name}") for name, make in _PLATES.items())
    provenance = tuple((name, str(value)) for one in provenances(found) for name, value in sorted(one.items())) + tuple(
        (f"fingerprint {name}", str(value)) for name, value in sorted(found.study.fingerprint.items())
    )
    return Section(
        key,
        found.study.title,
        headline(found),
        checks(found),
        tuple(plate for plate in plates if plate is not None),
        provenance,
        commands(found.study, findings.folders),
    )


def _experiment(record: ExperimentRecord, key: str) -> ExperimentSection:
    experiment = record.experiment
    return ExperimentSection(
        key,
        experiment,
        tuple(map(comparison, experiment.tables)),
        tuple(chart.plate(one, f"{key}-c{i}") for i, one in enumerate(experiment.charts)),
        record.pictures,
        tuple(
            (name, written(value))
            for given in (experiment.config, experiment.provenance)
            for name, value in sorted(given.items())
        ),
    )
