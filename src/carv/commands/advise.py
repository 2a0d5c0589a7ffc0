"""`carv advise`: what to run, from a pilot's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carv.rng import stream
from carv.runs.pilot_folder import PilotRecord
from carv.strata import COUPLINGS
from carv.variance.advice import SAFE, Advice, Bound, Candidate, Cost, advise
from carv.variance.cost import SimulatedCost
from carv.variance.figures import as_json

_SHOWN_TIES = 5


@dataclass(frozen=True)
class AdviseConfig:
    """What the advice is for. With neither a budget nor a target: the largest ECM."""

    budget: float | None = None
    """The most that one estimate may cost, in seconds (or teacher draws with --cost-ratio)."""
    target_variance: float | None = None
    """The most that the variance of one estimate may be."""
    cost_ratio: float | None = None
    """Count teacher draws, with one render worth so many, instead of the measured seconds."""
    renders: tuple[int, ...] = (1, 2, 4, 8)
    """The R to try."""
    renoise: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """The K to try."""
    proposals: tuple[str, ...] = ()
    """The proposals to try; by default all that the pilot knows."""
    couplings: tuple[str, ...] = tuple(SAFE)
    """The couplings to try."""
    bootstrap: bool = False
    """The interval of the gain by bootstrap over renders, instead of Student's with the jackknife's error."""


def advise_from(folder: Path, config: AdviseConfig) -> tuple[PilotRecord, Advice]:
    """The advice for a pilot's folder.

    Raises:
        ValueError: no pilot there; unknown names; what `carv.variance.advice.advise` refuses.
    """
    record = PilotRecord.load(folder)
    for kind, names, known in (
        ("proposal", config.proposals, record.proposals),
        ("coupling", config.couplings, COUPLINGS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"no {kind} {name!r} here; known: {', '.join(known)}")
    cost: Cost = record.cost if config.cost_ratio is None else SimulatedCost(config.cost_ratio)
    found = advise(
        record.tables,
        cost,
        budget=config.budget,
        target_variance=config.target_variance,
        renoise=config.renoise,
        renders=config.renders,
        proposals={name: record.proposals[name] for name in config.proposals or record.proposals},
        couplings={name: COUPLINGS[name] for name in config.couplings},
        cost="seconds" if config.cost_ratio is None else "teacher draws",
        resample=stream(record.seed, "bootstrap") if config.bootstrap else None,
    )
    return record, found


def summary(record: PilotRecord, advice: Advice) -> str:
    """The advice, why, and how sure it is."""
    best = advice.best
    low, high = advice.gain.interval
    lines = [
        f"run {best.design}",
        f"ECM {advice.gain.describe()}; 95 % interval {low:.3g} to {high:.3g}",
        advice.reason,
        _bound_line(advice.bound),
    ]
    if not advice.binds_clearly:
        lines.append("which part of the variance is the largest is not certain: the intervals overlap")
    if advice.tied:
        shown = "; ".join(str(cell.design) for cell in advice.tied[:_SHOWN_TIES])
        more = f" and {len(advice.tied) - _SHOWN_TIES} more" if len(advice.tied) > _SHOWN_TIES else ""
        lines.append(f"cannot be told apart from it by this pilot, cheapest first: {shown}{more}")
    if low <= 1:
        lines.append("the interval includes 1: a pilot with more renders is needed to say that this gains anything")
    if record.problem.task == "sds":
        lines.append(f"as options of carv sds: {_options(best)}")
    return "\n".join(lines)


def _bound_line(bound: Bound) -> str:
    oracle, infinite = (figure.measured.scaled(100) for figure in (bound.oracle, bound.infinite))
    return (
        f"what no choice of t can pass: an oracle proposal would leave {oracle} % of this variance, infinitely many "
        f"re-noisings {infinite} %"
    )


def _options(cell: Candidate) -> str:
    design = cell.design
    pairs = " --antithetic" if design.antithetic else ""
    return (
        f"--renders {design.renders} --renoise {design.renoise} --proposal {design.proposal} "
        f"--coupling {design.coupling}{pairs}"
    )


def to_json(record: PilotRecord, advice: Advice) -> dict[str, Any]:
    """For `--json`."""
    gain = advice.gain
    return {
        "task": record.problem.to_dict(),
        "design": vars(advice.best.design),
        "variance": as_json(advice.best.prediction.variance),
        "cost": {"value": advice.best.cost.value, "error": advice.best.cost.error, "unit": gain.cost},
        "ecm": as_json(gain.value, gain.interval)
        | {"anchor": gain.anchor, "baseline": gain.baseline, "extrapolated": gain.extrapolated},
        "binds": advice.binds,
        "binds_clearly": advice.binds_clearly,
        "best_renoise": vars(advice.best_renoise),
        "bound": {"oracle": as_json(advice.bound.oracle), "infinite_renoise": as_json(advice.bound.infinite)},
        "reason": advice.reason,
        "tied": [vars(cell.design) for cell in advice.tied],
        **record.provenance,
    }
