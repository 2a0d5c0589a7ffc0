"""The first lines of the page: what was measured, and what to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carv.report.findings import StudyFindings
from carv.report.methods import Method
from carv.report.plate import Table, interval, shown, times
from carv.variance.advice import Advice, Candidate
from carv.variance.values import Value

_MOST_TIED = 20


@dataclass(frozen=True)
class Headline:
    """What is said before any figure.

    Attributes:
        advice: one sentence: what to run and what it gains.
        reason: why, or "".
        facts: name and value, to be read at a glance.
        tied: cells that cannot be ranked against the advised one; `None` if there are none.
        measured: name and value of what was measured, and how.
    """

    advice: str
    reason: str
    facts: tuple[tuple[str, str], ...]
    tied: Table | None
    measured: tuple[tuple[str, str], ...]


def headline(found: StudyFindings) -> Headline:
    """The first lines."""
    advice = found.advice
    if advice is None:
        return Headline(_without_advice(found), "", (), None, _measured(found))
    return Headline(_advised(advice), advice.reason, _facts(found, advice), _tied(advice), _measured(found))


def name(candidate: Candidate) -> str:
    """`IW + Strat at (R, K) = (1, 8)`."""
    design = candidate.design
    return f"{Method.of(design).name} at (R, K) = ({design.renders}, {design.renoise})"


def _advised(advice: Advice) -> str:
    low, high = advice.gain.interval
    unit = "by measured seconds" if advice.gain.cost == "seconds" else f"in {advice.gain.cost}"
    start = f"Run {name(advice.best)}"
    what = "times less compute than uniform, K = 1, for the same variance"
    if low > 1:
        return f"{start}: {shown(advice.gain.value)} {what}, {unit} (95 %: {interval((low, high))})."
    gain = f"{times(advice.gain.value)} {unit} (95 %: {interval((low, high))})"
    return f"{start}; but its gain over uniform, K = 1, {gain}, is not told apart from none."


def _without_advice(found: StudyFindings) -> str:
    if found.no_advice:
        return found.no_advice
    count = len(found.study.cells)
    return (
        f"{count} {'cell was' if count == 1 else 'cells were'} measured by brute force. Run carv pilot on the same "
        "problem for the split of the variance, and for advice on all other cells."
    )


def _facts(found: StudyFindings, advice: Advice) -> tuple[tuple[str, str], ...]:
    clearly = "" if advice.binds_clearly else ", not clearly"
    facts = [
        ("Gain", f"{times(advice.gain.value)}, {interval(advice.gain.interval)}"),
        ("Binds now", f"{advice.binds}{clearly}"),
        ("Best K for independent draws", _best_renoise(advice.best_renoise)),
    ]
    if found.ratio is not None:
        facts.append(("One render, in teacher calls", shown(found.ratio)))
    facts += [
        ("With the oracle proposal", _left(shown(advice.bound.oracle))),
        ("With infinitely many draws", _left(shown(advice.bound.infinite))),
        ("Cells that cannot be ranked against it", f"{len(advice.tied)} of {len(advice.cells) - 1}"),
    ]
    return tuple(facts)


def _left(share: str) -> str:
    return f"{share} of its variance is left"


def _best_renoise(best: Value) -> str:
    return "not known: renders add no variance that shows" if best.value == float("inf") else shown(best)


def _tied(advice: Advice) -> Table | None:
    if not advice.tied:
        return None
    cells = [advice.best, *advice.tied[:_MOST_TIED]]
    rows = tuple(
        (
            Method.of(cell.design).name + (" (advised)" if cell is advice.best else ""),
            f"({cell.design.renders}, {cell.design.renoise})",
            shown(cell.cost),
            shown(cell.prediction.variance),
            interval(cell.prediction.interval),
        )
        for cell in cells
    )
    left = len(advice.tied) - _MOST_TIED
    note = f"The {left} dearest are left out." if left > 0 else ""
    return Table(("Method", "(R, K)", "Cost", "Variance", "95 %"), rows, note)


def _measured(found: StudyFindings) -> tuple[tuple[str, str], ...]:
    study, pilot = found.study, found.study.pilot
    problem = study.problem
    lines = [("Task", str(problem["task"]))]
    lines += [(key.replace("_", " ").capitalize(), str(value)) for key, value in problem.items() if key not in _SHOWN]
    if {"t_min", "t_max"} <= problem.keys():
        lines.append(("Timesteps", f"{problem['t_min']} to {problem['t_max']}"))
    if pilot is not None:
        renders, bins, noises = pilot.tables.norm_sq.shape
        lines.append(("Pilot", f"{renders} renders x {bins} bins x {noises} noises, seed {pilot.seed}"))
        lines.append(("Pilot's teacher calls", f"{pilot.tables.counts.teacher}"))
    if study.cells:
        replicates = [cell.replicates for cell in study.cells]
        seeds = sorted({cell.seed for cell in study.cells})
        least, most = min(replicates), max(replicates)
        each = f"{least}" if least == most else f"{least} to {most}"
        several = f"{len(study.cells)} cells, {each} estimates each"
        lines.append(("Brute force", f"{several}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"))
    lines.append(("Device", _joined(found, "device")))
    versions = "; ".join(f"{part} {_joined(found, part)}" for part in ("carv", "torch", "python"))
    lines.append(("Versions", versions))
    return tuple(lines)


_SHOWN = ("task", "t_min", "t_max")


def _joined(found: StudyFindings, key: str) -> str:
    return ", ".join(dict.fromkeys(str(one.get(key, "not recorded")) for one in provenances(found))) or "not recorded"


def provenances(found: StudyFindings) -> list[dict[str, Any]]:
    """Of the pilot and the cells, each once."""
    pilot = found.study.pilot
    given = [] if pilot is None else [dict(pilot.provenance)]
    for cell in found.study.cells:
        if dict(cell.provenance) not in given:
            given.append(dict(cell.provenance))
    return given
