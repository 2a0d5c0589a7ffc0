"""What the records say: the advice, every cell, what it is worth, and whether prediction and measurement agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from carv.report.methods import (
    UNIFORM,
    Costing,
    Entry,
    Method,
    ecm_of,
    measured,
    methods_of_cells,
    methods_of_pilot,
    predict_entry,
    predicted,
    re_of,
)
from carv.report.records import ExperimentRecord, Study, read
from carv.variance.advice import Advice, Design, advise
from carv.variance.cost import SimulatedCost
from carv.variance.efficiency import ECM, Figure
from carv.variance.values import Value, ratio

ASSUMED_RATIO = 1.0
"""Teacher calls that a render counts as where nothing was timed (App. D.1.7 has 0 and 1)."""


@dataclass(frozen=True, eq=False)
class Gain:
    """What a cell is worth.

    Attributes:
        entry: the cell.
        ecm: at its variance, against uniform iid K = 1; `None` without such a baseline.
        efficiency: RE against uniform iid at the same (R, K); `None` without it.
    """

    entry: Entry
    ecm: ECM | None
    efficiency: Figure | None


@dataclass(frozen=True, eq=False)
class Covered:
    """One cell both ways.

    Attributes:
        predicted, measured: the cell.
        ratio: measured / predicted.
        interval: its 95 % interval, of both errors, on the scale of the logarithm.
    """

    predicted: Entry
    measured: Entry
    ratio: Value
    interval: tuple[float, float]

    @property
    def covered(self) -> bool:
        """Whether the interval has 1 in it."""
        return self.interval[0] <= 1 <= self.interval[1]


@dataclass(frozen=True, eq=False)
class StudyFindings:
    """What is found out about one problem.

    Attributes:
        study: the records.
        costing: the cost model, and its unit.
        methods: those that are drawn.
        predicted, measured: method -> cells.
        gains: method -> what the cells at R = 1 are worth, or at the least R that was measured; predicted ones if there
            is a pilot.
        measured_gains: the same of brute force.
        coverage: the cells that are known both ways.
        advice: what to run; `None` without a pilot or where `no_advice` says why there is none.
        no_advice: one sentence, or "".
    """

    study: Study
    costing: Costing
    methods: tuple[Method, ...]
    predicted: Mapping[Method, tuple[Entry, ...]]
    measured: Mapping[Method, tuple[Entry, ...]]
    gains: Mapping[Method, tuple[Gain, ...]]
    measured_gains: Mapping[Method, tuple[Gain, ...]]
    coverage: tuple[Covered, ...]
    advice: Advice | None
    no_advice: str

    @property
    def main(self) -> Mapping[Method, tuple[Entry, ...]]:
        """The predicted cells, or the measured ones if there is no pilot."""
        return self.predicted or self.measured

    @property
    def ratio(self) -> Value | None:
        """c_upstream / c_denoise as timed, `None` if it was not, or if a draw took no measurable time."""
        model = self.study.cost
        if model is None or not model.c_denoise.value > 0:
            return None
        return model.ratio


@dataclass(frozen=True, eq=False)
class Findings:
    """All that the records in some folders say.

    Attributes:
        folders: where the records are.
        experiments: what was repeated of the paper.
        studies: one for each problem, or pilot.
        notes: what was left out, one sentence each.
    """

    folders: tuple[Path, ...]
    experiments: tuple[ExperimentRecord, ...]
    studies: tuple[StudyFindings, ...]
    notes: tuple[str, ...]


def load(folders: Sequence[str | Path]) -> Findings:
    """What the records in some folders say.

    Args:
        folders: of `carv pilot`, `carv sweep`, an experiment, or several in one; cells of one problem are put together.

    Raises:
        ValueError: no folders; a folder with none of the three; a file that is damaged.
    """
    records = read(folders)
    return Findings(
        tuple(map(Path, folders)), records.experiments, tuple(map(_findings, records.studies)), records.notes
    )


def _findings(study: Study) -> StudyFindings:
    model = study.cost or SimulatedCost(ASSUMED_RATIO)
    costing = Costing(model, "seconds" if study.cost else "teacher calls", study.cost is None)
    pilot = study.pilot
    if pilot is None:
        methods = methods_of_cells(study.cells)
        found = measured(study.cells, methods, model)
        gains = _gains(found, costing)
        return StudyFindings(study, costing, methods, {}, found, gains, gains, (), None, "")
    advice, no_advice = _advice(study, costing)
    methods = methods_of_pilot(pilot, None if advice is None else advice.best.design)
    guesses, found = predicted(pilot, methods, model), measured(study.cells, methods, model)
    gains, checked = _gains(guesses, costing), _gains(found, costing)
    coverage = tuple(_coverage(study, guesses, costing))
    return StudyFindings(study, costing, methods, guesses, found, gains, checked, coverage, advice, no_advice)


def _advice(study: Study, costing: Costing) -> tuple[Advice | None, str]:
    assert study.pilot is not None
    try:
        return advise(study.pilot.tables, costing.model, proposals=study.pilot.proposals, cost=costing.unit), ""
    except ValueError as error:
        return None, f"No advice can be given: {error}."


def _gains(cells: Mapping[Method, tuple[Entry, ...]], costing: Costing) -> dict[Method, tuple[Gain, ...]]:
    uniform = cells.get(UNIFORM, ())
    by_cell = {(entry.cell, entry.seed): entry for entry in uniform}
    least = min((entry.design.renders for entries in cells.values() for entry in entries), default=1)
    return {
        method: tuple(
            Gain(entry, ecm_of(entry, uniform, costing), re_of(entry, by_cell))
            for entry in entries
            if entry.design.renders == least
        )
        for method, entries in cells.items()
    }


def _coverage(study: Study, guesses: Mapping[Method, tuple[Entry, ...]], costing: Costing) -> Iterator[Covered]:
    """Each measured cell once, under the method that its own name has."""
    pilot = study.pilot
    assert pilot is not None
    known = {entry.design: entry for entries in guesses.values() for entry in entries}
    own = measured(study.cells, methods_of_cells(study.cells), costing.model)
    done: set[tuple[Design, int | None]] = set()
    for method, entries in own.items():
        if method.proposal not in pilot.proposals:
            continue
        for entry in entries:
            design = method.at(*entry.cell)
            if (design, entry.seed) in done:
                continue
            done.add((design, entry.seed))
            if design not in known:
                known[design] = predict_entry(pilot, method, *entry.cell, costing.model)
            if known[design].variance.value > 0:
                yield _covered(known[design], entry)


def _covered(guess: Entry, entry: Entry) -> Covered:
    factor = ratio(entry.measured, guess.measured)
    below = math.hypot(_log(entry.measured.value, entry.interval[0]), _log(guess.interval[1], guess.measured.value))
    above = math.hypot(_log(entry.interval[1], entry.measured.value), _log(guess.measured.value, guess.interval[0]))
    return Covered(guess, entry, factor, (factor.value * math.exp(-below), factor.value * math.exp(above)))


def _log(a: float, b: float) -> float:
    """log(a / b), infinite where one end of an interval is not positive or not known."""
    return math.log(a / b) if a > 0 and b > 0 and math.isfinite(a / b) else math.inf
