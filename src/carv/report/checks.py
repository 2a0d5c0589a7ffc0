"""What could be wrong with the figures, said plainly; what is serious comes first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from carv.report.findings import Gain, StudyFindings
from carv.report.records import Cell
from carv.runs.pilot_folder import PilotRecord
from carv.variance.moments import TRUSTED_SHARE

_FEW_RENDERS = 20
_ONE_RENDER = 0.5
_MISFIT = 4.0
_NAMED = 4
_VERSIONS = ("carv", "source", "torch", "python", "device")


@dataclass(frozen=True)
class Warn:
    """One sentence.

    Attributes:
        text: what, and what to do about it.
        serious: whether figures may mean nothing because of it.
    """

    text: str
    serious: bool = False


def checks(found: StudyFindings) -> tuple[Warn, ...]:
    """All that holds of a study, serious ones first."""
    said = [*_of_pilot(found), *_of_cells(found.study.cells), *_of_costs(found), *_of_comparisons(found)]
    return tuple(sorted(said, key=lambda warning: not warning.serious))


def _of_pilot(found: StudyFindings) -> Iterator[Warn]:
    pilot = found.study.pilot
    if found.no_advice:
        yield Warn(found.no_advice, serious=True)
    if pilot is None or pilot.tables.is_exact:
        return
    share = pilot.tables.top_share
    if math.isnan(share):
        yield Warn("The pilot has fewer than 100 draws, too few to check its tails.", serious=True)
    elif share > TRUSTED_SHARE:
        yield Warn(
            f"The top 1 % of the pilot's draws carry {share:.0%} of the sum of squares: its tails are too heavy for a "
            "predicted variance or its interval to mean anything. Measure the cells that matter by brute force.",
            serious=True,
        )
    else:
        yield Warn(f"The pilot's tails are moderate: the top 1 % of its draws carry {share:.0%} of the sum of squares.")
    if pilot.tables.renders < _FEW_RENDERS:
        yield Warn(
            f"The pilot has {pilot.tables.renders} renders; with fewer than {_FEW_RENDERS} intervals are rough. Run it "
            "again with more."
        )
    yield from _of_influence(found, pilot)


def _of_influence(found: StudyFindings, pilot: PilotRecord) -> Iterator[Warn]:
    if found.advice is None:
        return
    influence = found.advice.best.prediction.variance.largest_influence
    if influence > _ONE_RENDER:
        yield Warn(
            f"One of {pilot.tables.renders} renders carries {influence:.0%} of the squared error of the advised cell's "
            "variance: the figure rests on it. Run the pilot with more renders.",
            serious=True,
        )


def _of_cells(cells: tuple[Cell, ...]) -> Iterator[Warn]:
    heavy = [cell for cell in cells if not cell.trusted]
    if heavy:
        names = ", ".join(str(cell.design) for cell in heavy[:_NAMED]) + (", ..." if len(heavy) > _NAMED else "")
        first = f"{heavy[0].design}: {_sentence(heavy[0].verdict)}"
        yield Warn(f"{_some(len(heavy), len(cells))} have tails too heavy to trust ({names}). {first}", serious=True)
    capped = [cell for cell in cells if not cell.converged]
    if capped:
        first = f"{capped[0].design}: {capped[0].stopped}"
        yield Warn(f"{_some(len(capped), len(cells))} stopped before the aim was reached, e.g. {_sentence(first)}")
    lost = [cell for cell in cells if cell.not_finite]
    if lost:
        draws = sum(cell.not_finite for cell in lost)
        yield Warn(f"{_some(len(lost), len(cells))} met {draws} contributions that were not finite.", serious=True)
    for policy in dict.fromkeys(cell.policy for cell in cells if cell.policy):
        touched = sum(cell.clipped for cell in cells if cell.policy == policy)
        yield Warn(
            f"Outliers were treated ({policy}) and {touched} draws were clipped: such estimates are biased.",
            touched > 0,
        )
    for name in _VERSIONS:
        values = dict.fromkeys(str(cell.provenance.get(name)) for cell in cells)
        if len(values) > 1:
            yield Warn(
                f"Cells were measured with different {name}: {', '.join(values)}.", serious=name in ("carv", "source")
            )


def _of_costs(found: StudyFindings) -> Iterator[Warn]:
    cost = found.study.cost
    if cost is None:
        yield Warn(
            "Nothing was timed, so cost is counted in teacher calls with one render as one call: an assumption. The "
            "figure over cost ratios shows what depends on it."
        )
        return
    if cost.misfit > _MISFIT:
        yield Warn(
            "The cost model misses the times by more than their errors (chi^2 per degree of freedom "
            f"{cost.misfit:.3g}): batching or caches are not affine in R and R K. Its errors are enlarged accordingly."
        )
    for name, meaning in (("c_upstream", "a render"), ("c_denoise", "a teacher draw")):
        term = getattr(cost, name)
        if term.value <= 2 * term.error:
            yield Warn(
                f"The cost of {meaning}, {term} s, is not told apart from 0, so figures per second are uncertain. Time "
                "it on an idle machine, with more repetitions.",
                serious=True,
            )


def _of_comparisons(found: StudyFindings) -> Iterator[Warn]:
    pilot, cells = found.study.pilot, found.study.cells
    if found.advice is not None and found.advice.tied:
        count = len(found.advice.tied)
        some = "1 cell" if count == 1 else f"{count} cells"
        yield Warn(
            f"{some} cannot be ranked against the advised one: their intervals overlap. They are listed under it."
        )
    beyond = [gain for gain in _all_gains(found) if gain.ecm is not None and gain.ecm.extrapolated]
    if beyond:
        yield Warn(
            f"{len(beyond)} ECMs rest on a slope of -1 beyond the cells that were measured; a dagger marks them in the "
            "table."
        )
    if found.coverage:
        missed = [one for one in found.coverage if not one.covered]
        share = len(missed) / len(found.coverage)
        if missed:
            yield Warn(
                f"{len(missed)} of {len(found.coverage)} predictions are not covered by brute force, where 1 in 20 "
                "would miss by chance (they share one pilot, so misses come together).",
                serious=share > 0.25,
            )
    if pilot is not None:
        for name in _VERSIONS[:2]:
            others = {str(cell.provenance.get(name)) for cell in cells} - {str(pilot.provenance.get(name))}
            if others:
                yield Warn(
                    f"The pilot and the cells were made with different {name}: {pilot.provenance.get(name)} and "
                    f"{', '.join(sorted(others))}."
                )


def _all_gains(found: StudyFindings) -> Iterator[Gain]:
    groups = [found.gains] if found.study.pilot is None else [found.gains, found.measured_gains]
    seen = set()
    for gains in groups:
        for gain in (gain for several in gains.values() for gain in several):
            key = (gain.entry.design, gain.entry.seed)
            if key not in seen:
                seen.add(key)
                yield gain


def _some(part: int, total: int) -> str:
    return f"{part} of {total} cells"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
