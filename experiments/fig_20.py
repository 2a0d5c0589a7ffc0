"""Figure 20: pair designs of two draws, and how near the optimum each is (App. D.1.6).

    python experiments/fig_20.py [--quick] [--out DIR] [--teacher small]

The designs are over a pilot's bins of t; one of them is drawn as `carv.strata.Pairs` draws it. `pair_designs.py` does
the same for one pilot of your own.
"""

from __future__ import annotations

from dataclasses import dataclass

import paper
import tyro
from multipliers import ratio
from pair_designs import draw
from records import beside, over_pilots, publish, table
from sds_pilots import pilots
from sds_setting import Setting

from carv.report.experiment import Experiment
from carv.runs.pilot_folder import PilotRecord
from carv.strata import Pairs
from carv.variance.pairs import PairDesign, Targets, compare
from carv.variance.predict import pair_proposal, predict
from carv.variance.values import Value

COLUMNS = ("gain over iid", "of the best gain", "of the best cut")
"""Var(iid) / Var; over that of the best design; and Var(iid) - Var over the best design's."""


@dataclass(frozen=True)
class Settings(Setting):
    """Figure 20."""

    beta: float = 10.0
    """Of the Sinkhorn design."""


def main(settings: Settings) -> None:
    settings = settings.sized()
    records = list(pilots(settings).values())
    found = [designs(record, settings.beta) for record in records]
    names = [one.name for one in found[0]]
    gains = [dict(zip(names, gains_of(*pair), strict=True)) for pair in zip(records, found, strict=True)]
    rows = {
        name: [
            over_pilots([own[name] for own in gains]),
            share([own[i].of_best_gain for own in found]),
            share([own[i].of_best_reduction for own in found]),
        ]
        for i, name in enumerate(names)
    }
    folder = settings.folder("fig_20")
    folder.mkdir(parents=True, exist_ok=True)
    draw(found[0], records[0].tables.t.tolist(), folder / "pairs.png")
    experiment = Experiment(
        "Figure 20",
        "How much of what a design of two draws can gain do strata in the CDF of q ~ p w get?",
        f"{settings.described(len(records))} One render and two draws, on bins of t; iid is without replacement. The "
        "last three designs were fitted to the tables that judge them, so their gains are optimistic.",
        f"IW + strata gains {beside(rows['iw+strata'][0], paper.FIGURE_20['iw+strata'])} over iid, and the paper's "
        f"optimum {beside(rows['sinkhorn'][0], paper.FIGURE_20['sinkhorn'])}.",
        (
            table(
                "Gain of pair designs",
                COLUMNS,
                rows,
                {name: (gain, gain / paper.FIGURE_20["sinkhorn"], None) for name, gain in paper.FIGURE_20.items()},
            ),
        ),
        pictures={"How likely each pair of timesteps is, against an even spread; the first pilot.": "pairs.png"},
        config=settings.to_dict(),
    )
    publish(experiment, folder)


def designs(record: PilotRecord, beta: float) -> tuple[PairDesign, ...]:
    assert record.weight is not None
    return compare(Targets.of_tables(record.tables), record.tables.p.numpy() * record.weight[1], beta)


def gains_of(record: PilotRecord, found: tuple[PairDesign, ...]) -> list[Value | None]:
    """Var(iid) / Var of each design, compared render by render."""
    couplings = [Pairs(one.joint) for one in found]
    each = [predict(record.tables, 1, 2, pair_proposal(record.tables, own), own).variance for own in couplings]
    return [ratio(each[0], variance) for variance in each]


def share(values: list[float]) -> Value | None:
    """A mean over pilots; of one pilot it would have no error, and is left out."""
    return over_pilots([Value(x, 0.0) for x in values]) if len(values) > 1 else None


if __name__ == "__main__":
    main(tyro.cli(Settings))
