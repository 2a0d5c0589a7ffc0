"""Figure 13: does the gain last through training? Pilots of three checkpoints, at low guidance.

    python experiments/fig_13.py [--quick] [--out DIR] [--teacher small]

The runs are those of fig_16.py at low guidance.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from multipliers import BASELINE, COLUMNS, cells, efficiencies, means, multipliers
from records import Row, beside, curves, ecm_chart, publish, table
from sds_pilots import pilots
from sds_setting import Setting

from carv.report.experiment import Curve, Experiment
from carv.variance.predict import PAPER_RENOISE


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 13."""

    seeds: tuple[int, ...] = (0,)
    """Of training: fewer than elsewhere, as there are three pilots of each run."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    seconds: dict[str, Row] = {}
    gains: dict[str, Row] = {}
    lines: dict[str, Curve] = {}
    for step in settings.checkpoints:
        records = pilots(settings, settings.low_guidance, step)
        found = cells(records)
        own = means(multipliers(records, found), prefix=f"step {step}, ")
        seconds |= own
        gains |= means(efficiencies(found), prefix=f"step {step}, ")
        lines |= curves(PAPER_RENOISE, {name: row for name, row in own.items() if "uniform" in name or "+" in name})
    experiment = Experiment(
        "Figure 13",
        "Does the gain last through training?",
        f"{settings.described(len(settings.prompts) * len(settings.seeds))} Here the guidance scale is "
        f"{settings.low_guidance:g}, as the paper's is lower there; its steps are 1000, 2000 and 9000.",
        "IW + strata at K = 8: "
        + ", ".join(f"{beside(seconds[f'step {s}, IW + strata'][3])} at step {s}" for s in settings.checkpoints)
        + "; the paper's gain falls with training and stays above 1.",
        (
            table(f"ECM over training against {BASELINE}, measured seconds", COLUMNS, seconds, {}),
            table("RE over training against uniform iid at the same K", COLUMNS, gains, {}),
        ),
        (ecm_chart("ECM over training", lines),),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_13"))


if __name__ == "__main__":
    main(tyro.cli(Settings))
