"""What folders hold: a pilot, brute-force cells, an experiment, or several, cells grouped by what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carv.report.experiment import EXPERIMENT, Experiment
from carv.report.pictures import Picture, read_picture
from carv.runs.pilot_folder import PILOT, PilotRecord, cost_from_dict
from carv.runs.store import RECORDS, RecordStore
from carv.variance.advice import Design
from carv.variance.cost import CostModel
from carv.variance.paired import Blocks
from carv.variance.values import Value

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Cell:
    """One design, measured by brute force.

    Attributes:
        design: R, K, and the names of proposal and coupling.
        seed: of the measurement.
        variance: of one estimate, gradient squared.
        interval: its 95 % interval.
        trusted, verdict: of the tail check.
        replicates: how many estimates.
        converged, stopped: whether the aim was reached, and why there are no more replicates.
        not_finite, clipped, policy: what was done to outliers, and how many draws it met.
        stop: the stop rule's settings.
        provenance: versions and device.
        folder: where the record is.
        blocks: means of squares, for comparisons by common random numbers; `None` in records without.
    """

    design: Design
    seed: int
    variance: Value
    interval: tuple[float, float]
    trusted: bool
    verdict: str
    replicates: int
    converged: bool
    stopped: str
    not_finite: int
    clipped: int
    policy: str
    stop: Mapping[str, Any]
    provenance: Mapping[str, Any]
    folder: Path
    blocks: Blocks | None


@dataclass(frozen=True, eq=False)
class Study:
    """All that is known of one problem in one state.

    Attributes:
        problem: its settings, as of `carv.problems.ProblemConfig.to_dict`.
        fingerprint: digests of what else the numbers depend on.
        pilot: with its folder; `None` if there is none.
        cells: brute-force measurements, in the order of the files.
        cost: the model of the pilot or of a record; `None` if nothing was timed.
    """

    problem: Mapping[str, Any]
    fingerprint: Mapping[str, str]
    pilot: PilotRecord | None
    pilot_folder: Path | None
    cells: tuple[Cell, ...]
    cost: CostModel | None

    @property
    def title(self) -> str:
        """The task, and the prompt if it has one."""
        prompt = self.problem.get("prompt")
        return f"{self.problem['task']}: {prompt}" if prompt else str(self.problem["task"])


@dataclass(frozen=True, eq=False)
class ExperimentRecord:
    """An experiment, with what lies beside its record.

    Attributes:
        experiment: the record.
        pictures: its PNGs.
        folder: where it is.
    """

    experiment: Experiment
    pictures: tuple[Picture, ...]
    folder: Path


@dataclass(frozen=True, eq=False)
class Records:
    """All that some folders hold.

    Attributes:
        experiments: in the order of the folders.
        studies: one for each problem, or pilot.
        notes: one sentence for each thing that was left out.
    """

    experiments: tuple[ExperimentRecord, ...]
    studies: tuple[Study, ...]
    notes: tuple[str, ...]


@dataclass
class _Found:
    """What has been read so far."""

    experiments: list[ExperimentRecord] = field(default_factory=list)
    pilots: list[tuple[PilotRecord, Path]] = field(default_factory=list)
    cells: dict[str, list[Cell]] = field(default_factory=dict)
    costs: dict[str, CostModel] = field(default_factory=dict)
    hashes: set[tuple[str, str]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read(folders: Sequence[str | Path]) -> Records:
    """What some folders hold.

    Raises:
        ValueError: no folders; a folder with none of the three; a file that is damaged.
    """
    if not folders:
        raise ValueError("a report needs at least one folder, of `carv pilot`, `carv sweep` or an experiment")
    found = _Found()
    for folder in map(Path, folders):
        _read_folder(folder, found)
    studies = _studies(found)
    if not (studies or found.experiments):
        raise ValueError(f"no pilot and no finished cell in {', '.join(map(str, folders))}: there is nothing to report")
    return Records(tuple(found.experiments), studies, (*found.notes, *_mismatches(studies)))


def _read_folder(folder: Path, found: _Found) -> None:
    held = [name for name in (PILOT, RECORDS, EXPERIMENT) if (folder / name).exists()]
    if not held:
        raise ValueError(
            f"{folder} holds neither {PILOT}, {RECORDS} nor {EXPERIMENT}: give folders of `carv pilot`, `carv sweep` "
            "or an experiment"
        )
    if PILOT in held:
        found.pilots.append((PilotRecord.load(folder), folder))
    if RECORDS in held:
        _read_records(folder, found)
    if EXPERIMENT in held:
        experiment = Experiment.load(folder)
        pictures = tuple(read_picture(folder, name, caption) for caption, name in experiment.pictures.items())
        found.experiments.append(ExperimentRecord(experiment, pictures, folder))


def _studies(found: _Found) -> tuple[Study, ...]:
    """Each pilot with the cells of its problem, then the cells that have no pilot."""
    studies, used = [], set()
    for pilot, folder in found.pilots:
        key = _key(pilot.problem.to_dict(), pilot.fingerprint)
        used.add(key)
        cells = tuple(found.cells.get(key, ()))
        studies.append(Study(pilot.problem.to_dict(), pilot.fingerprint, pilot, folder, cells, pilot.cost))
    for key, alone in found.cells.items():
        if key not in used:
            problem, fingerprint = json.loads(key)
            studies.append(Study(problem, fingerprint, None, None, tuple(alone), found.costs.get(key)))
    return tuple(studies)


def _mismatches(studies: Sequence[Study]) -> Iterator[str]:
    problems = [json.dumps(dict(study.problem), sort_keys=True) for study in studies]
    for i, study in enumerate(studies):
        if study.pilot is None and problems[i] in problems[:i]:
            yield (
                f"Cells of {study.title} were measured on another state of the same problem (checkpoint or module) "
                "than the records before them, so the two are not compared."
            )


def _read_records(folder: Path, found: _Found) -> None:
    store = RecordStore(folder)
    path, records = store.path, store.records()
    if _lines(path) > len(records):
        found.notes.append(
            f"{path}: the last line was not finished and is left out; the same `carv sweep` makes it again."
        )
    skipped: dict[str, int] = {}
    twice = 0
    for number, record in enumerate(records, 1):
        kind = record["kind"]
        if kind not in ("cell", "cost") or (kind == "cost" and not {"problem", "cost"} <= record.keys()):
            skipped[kind] = skipped.get(kind, 0) + 1
            continue
        try:
            twice += not _keep(record, folder, found)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is damaged ({type(error).__name__}: {error}): remove the line, and run the "
                "same `carv sweep` again"
            ) from error
    for kind, count in skipped.items():
        found.notes.append(
            f"{path}: {_count(count, 'record')} of kind {kind!r} skipped, which this report does not know."
        )
    if twice:
        found.notes.append(f"{path}: {_count(twice, 'cell')} skipped that had been read before.")


def _keep(record: Mapping[str, Any], folder: Path, found: _Found) -> bool:
    """Whether the record is new."""
    if record["kind"] == "cost":
        found.costs[_key(record["problem"], record.get("fingerprint", {}))] = cost_from_dict(record["cost"])
        return True
    cell, key = _cell(record, folder), _key(record["cell"]["problem"], record["fingerprint"])
    if (key, record["hash"]) in found.hashes:
        return False
    found.hashes.add((key, record["hash"]))
    found.cells.setdefault(key, []).append(cell)
    return True


def _lines(path: Path) -> int:
    """Of the file, with a torn one."""
    data = path.read_bytes()
    return data.count(b"\n") + (not data.endswith(b"\n") and bool(data))


def _cell(record: Mapping[str, Any], folder: Path) -> Cell:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
    described, tails, given = record["cell"], record["tails"], record["variance"]
    error = given["error"]
    variance = Value(given["value"], math.nan if error is None else error)
    if not (math.isfinite(variance.value) and variance.value >= 0):
        raise ValueError(f"a variance is a number and at least 0, got {given['value']!r}")
    squares = record.get("squares")
    ends = given.get("interval") or variance.interval()
    return Cell(
        Design(**described["design"]),
        int(described["seed"]),
        variance,
        (math.nan if ends[0] is None else float(ends[0]), math.nan if ends[1] is None else float(ends[1])),
        bool(tails["trusted"]),
        str(tails["verdict"]),
        int(record["replicates"]),
        bool(record["converged"]),
        str(record["stopped"]),
        int(record["not_finite"]),
        int(record["clipped"]),
        str(record["policy"]),
        dict(described.get("stop") or {}),
        dict(record["provenance"]),
        folder,
        None if squares is None else Blocks(block=int(squares["block"]), means=list(map(float, squares["means"]))),
    )


def _key(problem: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> str:
    if "task" not in problem:
        raise ValueError("a problem without a task")
    return json.dumps([dict(problem), dict(fingerprint)], sort_keys=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
