"""Figure 16: does less guidance leave more to gain (App. D.1.5)? Fields trained and measured at three scales.

    python experiments/fig_16.py [--quick] [--out DIR] [--teacher small]

High is the scale of the other experiments, low has a quarter of its omega = s - 1, none is s = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paper
import tyro
from multipliers import BASELINE, COLUMNS, METHODS, cells, efficiencies, means, multipliers, named
from records import Row, beside, curves, ecm_chart, publish, table
from sds_pilots import pilots
from sds_setting import Setting

from carv.report.experiment import Experiment
from carv.variance.predict import PAPER_RENOISE


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 16."""

    seeds: tuple[int, ...] = (0,)
    """Of training: fewer than elsewhere, as there are three runs of each."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    scales = {"high": settings.guidance_scale, "low": settings.low_guidance, "none": 1.0}
    seconds: dict[str, Row] = {}
    gains: dict[str, Row] = {}
    for name, scale in scales.items():
        records = pilots(settings, scale)
        found = cells(records)
        seconds |= means(multipliers(records, found), prefix=f"{name}, ")
        gains |= means(efficiencies(found), prefix=f"{name}, ")
    best = {name: seconds[f"{name}, IW + strata"][PAPER_RENOISE.index(8)] for name in scales}
    experiment = Experiment(
        "Figure 16",
        "Does less guidance leave more to gain?",
        f"{settings.described(len(settings.prompts) * len(settings.seeds))} Fields are trained at the scale that they "
        f"are measured at: {', '.join(f'{name} {scale:g}' for name, scale in scales.items())}. The paper's omega is "
        "100 and 25.",
        f"IW + strata at K = 8: {beside(best['high'], paper.TABLE_1['iw+strat'][3])} at high guidance, "
        f"{beside(best['low'], paper.FIGURE_16['iw+strat'])} at low, {beside(best['none'])} without.",
        (
            table(
                f"ECM by guidance against {BASELINE}, measured seconds",
                COLUMNS,
                seconds,
                named(paper.TABLE_1, "high, ") | {f"low, {METHODS[m]}": at_8(x) for m, x in paper.FIGURE_16.items()},
            ),
            table("RE by guidance against uniform iid at the same K", COLUMNS, gains, named(paper.TABLE_2, "high, ")),
        ),
        tuple(
            ecm_chart(
                f"ECM at {name} guidance, s = {scale:g}" if name != "none" else "ECM without guidance, s = 1",
                curves(PAPER_RENOISE, {method: seconds[f"{name}, {method}"] for method in METHODS.values()}),
            )
            for name, scale in scales.items()
        ),
        config=settings.to_dict(),
    )
    publish(experiment, settings.folder("fig_16"))


def at_8(number: float) -> Sequence[float | None]:
    """The paper gives low guidance at K = 8 only."""
    return [number if k == 8 else None for k in PAPER_RENOISE]


if __name__ == "__main__":
    main(tyro.cli(Settings))
