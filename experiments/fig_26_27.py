"""Figures 26 and 27: does less variance distil faster? Frechet distance over updates and over time.

    python experiments/fig_26_27.py [--quick] [--out DIR] [--teacher small]

Re-sampling in the student's step (Fig. 26) and in the fake score's (Fig. 27), against (8, 1) and (48, 1). Every run has
the same seconds of one core; several processes with the same --runs share the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import paper
import tyro
from distill_curves import (
    Axis,
    Histories,
    Measure,
    Paired,
    band,
    best_by,
    common_end,
    difference,
    last,
    over_seeds,
    time_to,
)
from distill_runs import step_costs, trained
from distill_setting import DistillSetting
from records import figure, publish, table

from carv.report.experiment import Chart, Experiment, Figure, Table
from carv.tasks.distill.config import DistillConfig
from carv.variance.values import Value

BASELINE = "(8, 1)"
STUDENT = (BASELINE, "(8, 8)", "(8, 16)", "(48, 1)")
FAKE = (BASELINE, "(8, 8) in the fake score", "(8, 16) in the fake score", "(48, 1)")
BAND = "one standard deviation over seeds, as the paper's"


@dataclass(frozen=True)
class Settings(DistillSetting):
    """Figures 26 and 27."""

    target: float = 5.0
    """The Frechet distance whose time is compared; the teacher's own samples, 25 steps each, have 2.5."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    configs = configurations(settings)
    costs = step_costs(settings, configs)
    publish(record(settings, trained(settings, configs, costs, settings.seeds), costs), settings.folder("fig_26_27"))


def configurations(settings: DistillSetting) -> dict[str, DistillConfig]:
    """Name -> (R, K) of the student's step and K of the fake score's."""
    return {
        BASELINE: settings.config(8, 1),
        "(8, 8)": settings.config(8, 8),
        "(8, 16)": settings.config(8, 16),
        "(48, 1)": settings.config(48, 1),
        "(8, 8) in the fake score": settings.config(8, 1, 8),
        "(8, 16) in the fake score": settings.config(8, 1, 16),
    }


def record(settings: Settings, found: Mapping[str, Histories], costs: Mapping[str, Value]) -> Experiment:
    """Tables at equal updates and equal time, and the four panels of each figure."""
    all_runs = list(found.values())
    ends: dict[Axis, float] = {axis: common_end(all_runs, axis) for axis in ("steps", "seconds")}
    compared = measures(settings, ends)
    return Experiment(
        "Figures 26 and 27",
        "Does a gradient of less variance distil faster, at equal updates and at equal time?",
        f"{settings.described()} Each run has {settings.seconds:g} such seconds; {len(settings.seeds)} seeds. Best: "
        "the smallest distance so far; interpolated between evaluations, never extrapolated. Differences are to (8, 1) "
        "at the same seed, whose runs see the same real pictures; their intervals are Student's over seeds. K > 1 is "
        "in strata per input.",
        finding(found, compared),
        (
            means(found, compared),
            *differences(found, compared),
            table(
                "Seconds of one core for an update of the generator with its fake-score updates",
                ["ours", "over (8, 1)"],
                {name: [cost, cost.scaled(1 / costs[BASELINE].value)] for name, cost in costs.items()},
                paper_costs(),
            ),
        ),
        tuple(charts(found)),
        config=settings.to_dict(),
    )


def measures(settings: Settings, ends: Mapping[Axis, float]) -> dict[str, Measure]:
    """What is compared: at equal updates, at equal time, and the time that a distance takes."""
    return {
        f"best by {ends['steps']:.3g} updates": best_by(ends["steps"], "steps"),
        f"best by {ends['seconds'] * 3 / 4:.3g} s": best_by(ends["seconds"] * 3 / 4, "seconds"),
        f"best by {ends['seconds']:.3g} s": best_by(ends["seconds"], "seconds"),
        f"updates to {settings.target:g}": time_to(settings.target, "steps"),
        f"seconds to {settings.target:g}": time_to(settings.target, "seconds"),
    }


def means(found: Mapping[str, Histories], compared: Mapping[str, Measure]) -> Table:
    """Over seeds."""
    every = {**compared, "last": last}
    rows = {name: [over_seeds(runs, measure) for measure in every.values()] for name, runs in found.items()}
    return table("Frechet distance, and what it takes to reach one; means over seeds", list(every), rows, {})


def differences(found: Mapping[str, Histories], compared: Mapping[str, Measure]) -> list[Table]:
    """To the baseline, seed by seed: below 0 is better."""
    others = {name: runs for name, runs in found.items() if name != BASELINE}
    return [
        Table(
            f"{what[0].upper()}{what[1:]}, minus that of {BASELINE}",
            ("difference", "low", "high"),
            {name: tuple(spread(difference(runs, found[BASELINE], measure))) for name, runs in others.items()},
        )
        for what, measure in compared.items()
    ]


def spread(found: Paired | None) -> list[Figure]:
    """Mean with its error, and the ends of the interval."""
    if found is None:
        return [Figure(None)] * 3
    return [figure(found.mean), Figure(found.low), Figure(found.high)]


def charts(found: Mapping[str, Histories]) -> list[Chart]:
    """Best and raw over updates and seconds of Fig. 26; best of Fig. 27."""
    labels: dict[Axis, str] = {"steps": "generator updates", "seconds": "seconds of one core"}
    panels = [("student step (Fig. 26)", STUDENT, True), ("student step (Fig. 26)", STUDENT, False)]
    panels.append(("fake-score step (Fig. 27)", FAKE, True))
    return [
        Chart(
            f"{'Best' if best else 'Raw'} Frechet distance over {axis}, re-sampling in the {where}",
            label,
            "Frechet distance",
            {name: band(found[name], axis, best) for name in names if name in found},
            BAND,
        )
        for where, names, best in panels
        for axis, label in labels.items()
    ]


def finding(found: Mapping[str, Histories], compared: Mapping[str, Measure]) -> str:
    """The comparison that the paper makes, at equal updates and at equal time."""
    by_steps, _, by_time, _, seconds = compared.items()
    parts = []
    for name in ("(8, 8)", "(8, 16)", "(8, 16) in the fake score", "(48, 1)"):
        told = [
            f"{what} {shown(difference(found[name], found[BASELINE], measure))}"
            for what, measure in (by_steps, by_time, seconds)
        ]
        parts.append(f"{name}: {', '.join(told)}")
    return f"Minus {BASELINE}, seed by seed. {'; '.join(parts)}. The paper: better at equal updates, not at equal time."


def shown(found: Paired | None) -> str:
    """With its interval."""
    return "not reached by all" if found is None else f"{found.mean} ({found.low:.3g} to {found.high:.3g})"


def paper_costs() -> dict[str, list[float | None]]:
    """Seconds on an A100, and their ratios."""
    one = paper.DISTILLATION_STEP_SECONDS[BASELINE]
    return {name: [None, seconds / one] for name, seconds in paper.DISTILLATION_STEP_SECONDS.items()}


if __name__ == "__main__":
    main(tyro.cli(Settings))
